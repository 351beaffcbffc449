//! Text to token ids and back. Two vocabularies: the 256 bytes, for small models that need no other, and the byte-level
//! BPE of GPT-2 (Radford et al. 2019, section 2.2), whose ids fit 16 bits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tiktoken_rs::{CoreBPE, r50k_base_singleton};

/// Which vocabulary a data set and its model use. Part of the run's agreed configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// One token per byte of UTF-8: 256 ids.
    Bytes,
    /// GPT-2's byte-level BPE: 50257 ids, the last of them the end of a text.
    Gpt2,
}

impl TokenizerKind {
    /// Number of token ids: every id is below it.
    pub fn vocab_size(self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Gpt2 => 50_257,
        }
    }

    /// Bytes of one token in a shard: the fewest that hold every id.
    pub fn token_bytes(self) -> usize {
        match self {
            Self::Bytes => 1,
            Self::Gpt2 => 2,
        }
    }

    /// The token that ends a document, so that one text does not run into the next. The 256 bytes have no id to spare:
    /// there it is a newline.
    pub fn end_of_document(self) -> u32 {
        match self {
            Self::Bytes => u32::from(b'\n'),
            Self::Gpt2 => 50_256,
        }
    }
}

impl fmt::Display for TokenizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Gpt2 => "gpt2",
        })
    }
}

/// The name is of no known tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown tokenizer '{found}': it must be bytes or gpt2")]
pub struct UnknownTokenizer {
    /// The name given.
    pub found: String,
}

impl FromStr for TokenizerKind {
    type Err = UnknownTokenizer;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "bytes" => Ok(Self::Bytes),
            "gpt2" => Ok(Self::Gpt2),
            _ => Err(UnknownTokenizer { found: name.to_owned() }),
        }
    }
}

/// A vocabulary ready for use. Cheap to copy; GPT-2's tables are built once per process, on first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokenizer {
    kind: TokenizerKind,
}

impl Tokenizer {
    /// The tokenizer of this kind.
    pub fn new(kind: TokenizerKind) -> Self {
        Self { kind }
    }

    /// Which kind it is.
    pub fn kind(&self) -> TokenizerKind {
        self.kind
    }

    /// Number of token ids: 256 or 50257.
    pub fn vocab_size(&self) -> usize {
        self.kind.vocab_size()
    }

    /// The ids of a text. A text that spells out a special token (`<|endoftext|>`) gets the ids of its letters, so no
    /// document can forge a border.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match self.kind {
            TokenizerKind::Bytes => text.bytes().map(u32::from).collect(),
            TokenizerKind::Gpt2 => bpe().encode_ordinary(text),
        }
    }

    /// The text of ids. Never fails: what is not UTF-8 (a character cut in two) or not in the vocabulary (a model's
    /// padded head) reads as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(tokens.len().saturating_mul(2 * self.kind.token_bytes()));
        for &token in tokens {
            match self.token_bytes(token) {
                Some(text) => bytes.extend_from_slice(&text),
                None => bytes.extend_from_slice("\u{fffd}".as_bytes()),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that one id stands for; `None` outside the vocabulary.
    pub fn token_bytes(&self, token: u32) -> Option<Vec<u8>> {
        match self.kind {
            TokenizerKind::Bytes => u8::try_from(token).ok().map(|byte| vec![byte]),
            TokenizerKind::Gpt2 => bpe().decode_bytes(&[token]).ok(),
        }
    }
}

/// GPT-2's vocabulary and merges, which tiktoken calls r50k.
fn bpe() -> &'static CoreBPE {
    r50k_base_singleton()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gpt2_ids_are_those_of_the_original() {
        let gpt2 = Tokenizer::new(TokenizerKind::Gpt2);
        let ids = gpt2.encode("Hello world, decentralized training!");
        assert_eq!(ids, [15496, 995, 11, 26512, 3047, 0]);
        assert_eq!(gpt2.decode(&ids), "Hello world, decentralized training!");
    }

    #[test]
    fn a_text_cannot_forge_the_end_of_a_document() {
        let ids = Tokenizer::new(TokenizerKind::Gpt2).encode("a<|endoftext|>b");
        assert!(!ids.contains(&TokenizerKind::Gpt2.end_of_document()));
    }

    #[test]
    fn ids_outside_the_vocabulary_read_as_replacement_characters() {
        assert_eq!(
            Tokenizer::new(TokenizerKind::Bytes).decode(&[72, 256, 105]),
            "H\u{fffd}i"
        );
        assert_eq!(
            Tokenizer::new(TokenizerKind::Gpt2).decode(&[15496, 50_257, u32::MAX]),
            "Hello\u{fffd}\u{fffd}"
        );
    }

    #[test]
    fn half_a_character_reads_as_a_replacement_character() {
        assert_eq!(Tokenizer::new(TokenizerKind::Bytes).decode(&[0xc3]), "\u{fffd}");
    }

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for kind in [TokenizerKind::Bytes, TokenizerKind::Gpt2] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
        assert!("GPT2".parse::<TokenizerKind>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself(text in "\\PC{0,80}") {
            for kind in [TokenizerKind::Bytes, TokenizerKind::Gpt2] {
                let tokenizer = Tokenizer::new(kind);
                let ids = tokenizer.encode(&text);
                prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                prop_assert_eq!(tokenizer.decode(&ids), text.clone());
            }
        }
    }
}
