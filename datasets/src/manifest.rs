//! The list of a data set's shards. Its hash, the *root*, names the whole data set in a run's configuration: whoever holds
//! the root can fetch manifest and shards from anyone and check every byte.
//!
//! On disk it is compact JSON in exactly one form, so that the root is plain BLAKE3 of the file and the manifest can be
//! fetched as a blob by its root. It says nothing of paths or names on the machine that prepared it.

use serde::{Deserialize, Serialize};

use crate::tokenizer::TokenizerKind;

/// The version written, and the only one read.
pub const VERSION: u32 = 1;
/// Largest manifest read, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 64 << 20;
/// Most shards in a data set.
pub const MAX_SHARDS: usize = 1 << 19;
/// Largest shard in tokens, so that a peer never holds or serves more than 64 MiB for one.
pub const MAX_SHARD_TOKENS: u64 = 1 << 25;
/// Smallest span of a full shard in tokens: below it, files and list would outgrow the data.
pub const MIN_SHARD_TOKENS: u64 = 256;
/// Longest sequence in tokens.
pub const MAX_SEQ_LEN: usize = 1 << 20;

/// One shard: a file of plain little-endian tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// BLAKE3 of its bytes, which is also its name.
    #[serde(with = "hex_hash")]
    pub hash: [u8; 32],
    /// Tokens in it.
    pub tokens: u64,
}

/// A data set: how it was tokenized, and its shards. The training shards come first, then the held-out ones; all have
/// [`shard_tokens`](Self::shard_tokens) tokens but the last of each part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: [`VERSION`].
    pub version: u32,
    /// The vocabulary.
    pub tokenizer: TokenizerKind,
    /// Tokens of one training sequence (inputs; a sequence carries one more as the last target).
    pub seq_len: usize,
    /// Bytes of one token in a shard: 1 or 2, as the tokenizer needs.
    pub token_bytes: usize,
    /// Tokens of a full shard.
    pub shard_tokens: u64,
    /// Documents it was made of.
    pub documents: u64,
    /// Bytes of UTF-8 text it was made of, both parts together.
    pub text_bytes: u64,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens never trained on.
    pub held_out_tokens: u64,
    /// The shards.
    pub shards: Vec<ShardInfo>,
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More bytes than any manifest has.
    #[error("a manifest of {found} bytes; at most {limit} are read")]
    TooLarge {
        /// Bytes given.
        found: usize,
        /// The bound.
        limit: usize,
    },
    /// Not JSON of the right shape.
    #[error("not a manifest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The right content in another spelling, which would have another root.
    #[error("the manifest is not in canonical form: byte {offset} differs")]
    NotCanonical {
        /// The first byte that differs from the canonical form.
        offset: usize,
    },
    /// A field has a value it cannot have.
    #[error("the manifest's {field} is {found}; expected {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it must be.
        expected: String,
    },
}

impl Manifest {
    /// The one canonical form: compact JSON, fields in the order of the type, hashes in lower-case hex.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Integers, strings and lists of them always serialize, and into memory nothing can fail.
        serde_json::to_vec(self).unwrap_or_else(|e| unreachable!("a manifest serializes: {e}"))
    }

    /// Reads a manifest; refuses anything [`to_bytes`](Self::to_bytes) would not have written.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge {
                found: bytes.len(),
                limit: MAX_MANIFEST_BYTES,
            });
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        let canonical = manifest.to_bytes();
        if canonical != bytes {
            let offset = canonical.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            return Err(ManifestError::NotCanonical { offset });
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// The data set's name: BLAKE3 of [`to_bytes`](Self::to_bytes).
    pub fn root(&self) -> [u8; 32] {
        *blake3::hash(&self.to_bytes()).as_bytes()
    }

    /// Shards that hold training tokens: the first ones.
    pub fn train_shards(&self) -> usize {
        shards_for(self.train_tokens, self.shard_tokens)
    }

    /// Sequences to train on. Each takes `seq_len` tokens and shares its last target with the next one's first input.
    pub fn train_sequences(&self) -> u64 {
        sequences_in(self.train_tokens, self.seq_len)
    }

    /// Sequences held out.
    pub fn held_out_sequences(&self) -> u64 {
        sequences_in(self.held_out_tokens, self.seq_len)
    }

    /// Every relation between the fields.
    fn check(&self) -> Result<(), ManifestError> {
        let within = |field, found: u64, expected: std::ops::RangeInclusive<u64>| {
            let text = format!("{} to {}", expected.start(), expected.end());
            if expected.contains(&found) {
                Ok(())
            } else {
                Err(ManifestError::Field {
                    field,
                    found,
                    expected: text,
                })
            }
        };
        let exactly = |field, found: u64, expected: u64| within(field, found, expected..=expected);
        exactly("version", self.version.into(), VERSION.into())?;
        within("seq_len", self.seq_len as u64, 1..=MAX_SEQ_LEN as u64)?;
        exactly(
            "token_bytes",
            self.token_bytes as u64,
            self.tokenizer.token_bytes() as u64,
        )?;
        within("shard_tokens", self.shard_tokens, MIN_SHARD_TOKENS..=MAX_SHARD_TOKENS)?;
        // Bounded before anything is added or multiplied with them.
        let most = MAX_SHARDS as u64 * self.shard_tokens;
        within("train_tokens", self.train_tokens, self.seq_len as u64 + 1..=most)?;
        within("held_out_tokens", self.held_out_tokens, 0..=most)?;
        let train = self.train_shards();
        let count = train + shards_for(self.held_out_tokens, self.shard_tokens);
        within("number of shards", self.shards.len() as u64, 1..=MAX_SHARDS as u64)?;
        exactly("number of shards", self.shards.len() as u64, count as u64)?;
        let (train, held_out) = self.shards.split_at(train);
        for (shards, mut left) in [(train, self.train_tokens), (held_out, self.held_out_tokens)] {
            for shard in shards {
                let expected = left.min(self.shard_tokens);
                exactly("tokens of a shard", shard.tokens, expected)?;
                left -= expected;
            }
        }
        Ok(())
    }
}

/// Shards of a part with so many tokens.
fn shards_for(tokens: u64, shard_tokens: u64) -> usize {
    // Checked manifests have at most MAX_SHARDS; a hand-made one saturates.
    usize::try_from(tokens.div_ceil(shard_tokens.max(1))).unwrap_or(usize::MAX)
}

fn sequences_in(tokens: u64, seq_len: usize) -> u64 {
    tokens.saturating_sub(1) / (seq_len as u64).max(1)
}

/// Lower-case hex of a hash.
pub(crate) fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from(*hash).to_hex().to_string()
}

/// A hash as a hex string in JSON.
mod hex_hash {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::hex(hash))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(&text).map_err(D::Error::custom)?;
        Ok(*hash.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Manifest {
        let shard = |byte, tokens| ShardInfo {
            hash: [byte; 32],
            tokens,
        };
        Manifest {
            version: VERSION,
            tokenizer: TokenizerKind::Bytes,
            seq_len: 64,
            token_bytes: 1,
            shard_tokens: 1000,
            documents: 3,
            text_bytes: 2697,
            train_tokens: 2500,
            held_out_tokens: 200,
            shards: vec![shard(1, 1000), shard(2, 1000), shard(3, 500), shard(4, 200)],
        }
    }

    #[test]
    fn what_was_written_reads_back_and_its_root_is_the_hash_of_the_file() {
        let bytes = sample().to_bytes();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), sample());
        assert_eq!(sample().root(), *blake3::hash(&bytes).as_bytes());
    }

    #[test]
    fn another_spelling_of_the_same_manifest_is_refused() {
        let text = String::from_utf8(sample().to_bytes()).unwrap();
        for other in [
            text.replace(':', ": "),
            format!("{text}\n"),
            text.replace(&"01".repeat(32), &"01".repeat(31)),
        ] {
            assert!(Manifest::from_bytes(other.as_bytes()).is_err(), "{other}");
        }
        let unknown = text.replacen('{', "{\"extra\":1,", 1);
        assert!(matches!(
            Manifest::from_bytes(unknown.as_bytes()),
            Err(ManifestError::Malformed(_))
        ));
    }

    #[test]
    fn fields_that_contradict_one_another_are_refused() {
        let wrong: [fn(&mut Manifest); 10] = [
            |m| m.version = 2,
            |m| m.seq_len = 0,
            |m| m.seq_len = 2500,
            |m| m.token_bytes = 2,
            |m| m.shard_tokens = 0,
            |m| m.train_tokens = u64::MAX,
            |m| m.held_out_tokens = u64::MAX,
            |m| m.shards.truncate(3),
            |m| m.shards[0].tokens = 999,
            |m| m.train_tokens += 1,
        ];
        for (i, change) in wrong.iter().enumerate() {
            let mut manifest = sample();
            change(&mut manifest);
            let refused = Manifest::from_bytes(&manifest.to_bytes());
            assert!(
                matches!(refused, Err(ManifestError::Field { .. })),
                "change {i}: {refused:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Manifest::from_bytes(&bytes);
        }

        #[test]
        fn a_changed_byte_never_panics_nor_keeps_the_root(at in 0_usize..600, to: u8) {
            let mut bytes = sample().to_bytes();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            if let Ok(read) = Manifest::from_bytes(&bytes) {
                prop_assert_ne!(read.root(), sample().root());
                prop_assert_eq!(read.to_bytes(), bytes);
            }
        }
    }
}
