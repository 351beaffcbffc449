//! Proofs as files: something that one machine computed, in a form that another can check without asking it.
//!
//! One strict layout for every kind, all integers little-endian, nothing after the end, one encoding for one content:
//!
//! ```text
//!  0      8  "MURMURPF"
//!  8      2  version: 1
//! 10      1  kind: 1 an inference, 2 an evaluation
//! 11      1  0 unsigned | 1 signed
//! 12   32+64  signer (ed25519), signature          only if signed
//!            +------------------------------------------------------------------------+
//!  .    97|109| which model: root 32, shape 32, tokenizer 32, then 0, or 1 with        |  what the signature covers,
//!            |              branch u32 and round u64 of the run whose model it is     |  with version and kind
//!            | the rest as its kind says: `inference`, `evaluation`                   |
//!            +------------------------------------------------------------------------+
//! ```
//!
//! A file has at most [`MAX_BYTES`]; every count is checked against its bound and against the bytes that are left before anything is allocated. Whether
//! the signature holds is part of decoding: what [`Proof::decode`] gives back was said by who is named in it.

use coordinatorless::types::{Hash, PeerId, Signature};
use coordinatorless::wire::{Keys, Scheme, verify_bytes};
use trainer::config::ModelConfig;

use crate::evaluation::Evaluation;
use crate::inference::Inference;

mod bytes;

pub(crate) use bytes::{Reader, Writer};

/// Most bytes of a proof.
pub const MAX_BYTES: u64 = 256 << 20;
/// What a proof begins with.
const MAGIC: &[u8; 8] = b"MURMURPF";
/// Version of all that is written here.
const VERSION: u16 = 1;
/// The domain of signatures.
const DOMAIN: &str = "proof";

/// Why bytes are no proof.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProofError {
    /// Another file.
    #[error(
        "not a proof: expected it to begin with {:?}, found {found:?}",
        String::from_utf8_lossy(MAGIC)
    )]
    Magic {
        /// Its first bytes, as text.
        found: String,
    },
    /// Of another version of this program.
    #[error("a proof of version {found}; this program reads version {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// It ends early.
    #[error("{what}: expected {expected} more bytes, found {found}")]
    Short {
        /// What was being read.
        what: &'static str,
        /// Bytes needed.
        expected: u64,
        /// Bytes left.
        found: u64,
    },
    /// It goes on after its end.
    #[error("{found} bytes follow the end of the proof, expected none")]
    Long {
        /// How many.
        found: u64,
    },
    /// A value outside what it may be.
    #[error("{what} is {found}, expected {expected}")]
    Value {
        /// Which.
        what: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Settings that no text is drawn by.
    #[error("the settings: {0}")]
    Settings(String),
    /// Signed by someone else, or changed since.
    #[error("the signature is not that of peer {signer}: the file was changed, or somebody else signed it")]
    Signature {
        /// Who is named.
        signer: PeerId,
    },
}

impl ProofError {
    pub(crate) fn value(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Value {
            what,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// Which model a proof is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its root: the hash of all parameters ([`trainer::checkpoint::model_root`]).
    pub model_root: Hash,
    /// The hash of its configuration ([`shape_of`]): the same parameters compute other things with other heads or wavelengths.
    pub shape: Hash,
    /// The hash of its `tokenizer.json`, zero where it has none: which texts the tokens stand for.
    pub tokenizer: Hash,
    /// Branch and round of the run whose model it is.
    pub round: Option<(u32, u64)>,
}

/// The hash of a configuration. The length that a model with rotary positions is asked to read changes nothing that it computes.
#[must_use]
pub fn shape_of(config: &ModelConfig) -> Hash {
    let mut config = config.clone();
    if config.family.has_rope() {
        config.max_seq_len = 2;
    }
    // Debug output names every field with its exact value, and needs no encoder that could fail.
    Hash::derive("murmur/v1/model-shape", format!("{config:?}").as_bytes())
}

impl Identity {
    /// How another model differs from this one, in words; `None` if both are the same. Rounds are told only, not compared: the root decides.
    #[must_use]
    pub fn differs_from(&self, other: &Self) -> Option<String> {
        let rounds = |id: &Self| {
            id.round
                .map_or(String::new(), |(_, round)| format!(" (after round {round})"))
        };
        let root = |id: &Self| format!("{}{}", id.model_root, rounds(id));
        let pairs = [
            (
                "the model root",
                self.model_root == other.model_root,
                root(self),
                root(other),
            ),
            (
                "the hash of its shape",
                self.shape == other.shape,
                self.shape.to_string(),
                other.shape.to_string(),
            ),
            (
                "the hash of its tokenizer",
                self.tokenizer == other.tokenizer,
                self.tokenizer.to_string(),
                other.tokenizer.to_string(),
            ),
        ];
        let (what, _, expected, found) = pairs.into_iter().find(|(_, same, ..)| !same)?;
        Some(format!("{what} is expected to be {expected}, found {found}"))
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(&self.model_root.0);
        out.bytes(&self.shape.0);
        out.bytes(&self.tokenizer.0);
        match self.round {
            None => out.u8(0),
            Some((branch, round)) => {
                out.u8(1);
                out.u32(branch);
                out.u64(round);
            }
        }
    }

    fn read(bytes: &mut Reader<'_>) -> Result<Self, ProofError> {
        Ok(Self {
            model_root: Hash(bytes.array("the model root")?),
            shape: Hash(bytes.array("the hash of the shape")?),
            tokenizer: Hash(bytes.array("the hash of the tokenizer")?),
            round: match bytes.flag("whether a round follows")? {
                false => None,
                true => Some((bytes.u32("the branch")?, bytes.u64("the round")?)),
            },
        })
    }
}

/// What was proven.
#[derive(Debug, Clone, PartialEq)]
pub enum Statement {
    /// A text that the model wrote.
    Inference(Inference),
    /// How likely the model finds texts, or answers to questions.
    Evaluation(Evaluation),
}

impl Statement {
    fn kind(&self) -> u8 {
        match self {
            Self::Inference(_) => 1,
            Self::Evaluation(_) => 2,
        }
    }
}

/// A statement about a model, and who makes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Proof {
    /// Who says so, if anyone does.
    pub signer: Option<PeerId>,
    /// Of which model.
    pub model: Identity,
    /// What.
    pub statement: Statement,
}

/// The bytes that are signed.
fn signed_bytes(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    bytes.push(kind);
    bytes.extend_from_slice(body);
    bytes
}

/// The file of a statement, signed if there are keys.
#[must_use]
pub fn encode(model: &Identity, statement: &Statement, keys: Option<&Keys>) -> Vec<u8> {
    let mut body = Writer::default();
    model.write(&mut body);
    match statement {
        Statement::Inference(inference) => inference.write(&mut body),
        Statement::Evaluation(evaluation) => evaluation.write(&mut body),
    }
    let body = body.into_bytes();
    let mut out = Writer::default();
    out.bytes(MAGIC);
    out.u16(VERSION);
    out.u8(statement.kind());
    out.u8(u8::from(keys.is_some()));
    if let Some(keys) = keys {
        out.bytes(&keys.id().0);
        out.bytes(&keys.sign_bytes(DOMAIN, &signed_bytes(statement.kind(), &body)).0);
    }
    out.bytes(&body);
    out.into_bytes()
}

impl Proof {
    /// Reads a file.
    ///
    /// # Errors
    /// Bytes that [`encode`] never writes, or a signature that does not hold; see [`ProofError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ProofError> {
        if bytes.len() as u64 > MAX_BYTES {
            let found = bytes.len() as u64 - MAX_BYTES;
            return Err(ProofError::Long { found });
        }
        let mut reader = Reader::new(bytes);
        let start = bytes.get(..MAGIC.len()).unwrap_or(bytes);
        if start != MAGIC {
            let found = String::from_utf8_lossy(start).into_owned();
            return Err(ProofError::Magic { found });
        }
        reader.array::<8>("its beginning")?;
        let version = reader.u16("the version")?;
        if version != VERSION {
            return Err(ProofError::Version { found: version });
        }
        let kind = reader.u8("the kind")?;
        let signer = match reader.flag("whether it is signed")? {
            false => None,
            true => Some((
                PeerId(reader.array("the signer")?),
                Signature(reader.array("the signature")?),
            )),
        };
        if let Some((signer, signature)) = signer {
            let signed = signed_bytes(kind, reader.rest());
            verify_bytes(Scheme::Ed25519, DOMAIN, &signed, signer, signature)
                .map_err(|_| ProofError::Signature { signer })?;
        }
        let model = Identity::read(&mut reader)?;
        let statement = match kind {
            1 => Statement::Inference(Inference::read(&mut reader)?),
            2 => Statement::Evaluation(Evaluation::read(&mut reader)?),
            other => {
                let expected = "1 (an inference) or 2 (an evaluation)";
                return Err(ProofError::value("the kind", expected, other));
            }
        };
        reader.end()?;
        Ok(Self {
            signer: signer.map(|(signer, _)| signer),
            model,
            statement,
        })
    }
}
