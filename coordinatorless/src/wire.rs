//! Signed canonical messages.
//!
//! ```text
//! frame = version u16 LE | kind u8 | signer 32 | signature 64 | payload (rkyv, canonical)
//! ```
//! The signature is ed25519 over `BLAKE3::derive_key("murmur/v1/<kind>", payload)` (R1). A frame is dropped with a reason when it
//! is over its kind's size limit, of another version, not validly encoded, not canonical (decoding and encoding again gives other
//! bytes), or not signed by its signer. Nothing is allocated by a length that the bytes merely claim: `rkyv` validates in place.
//! On a link between two peers most messages take a shorter form (`wire/link.rs`); what is signed stays the same.

use std::mem::{offset_of, size_of};

use rkyv::{Archive, Deserialize, Serialize, rancor, util::AlignedVec};

use crate::types::*;

/// The wire's version; another one is refused.
pub const VERSION: u16 = 6;
/// Bytes before the payload.
pub const HEADER: usize = 2 + 1 + 32 + 64;
/// The largest payload of a message that carries a record.
pub const MAX_RECORD: usize = 1 << 20;
/// The largest payload of a list of decided records handed to a laggard.
pub const MAX_RECORDS: usize = 8 << 20;
/// The largest payload of any other message.
pub const MAX_SMALL: usize = 96 << 10;

/// Why a frame was dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Shorter than a header.
    #[error("message cut short: expected at least {expected} bytes, found {found}")]
    Short {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// Over the limit of its kind.
    #[error("message too long: expected at most {expected} bytes, found {found}")]
    Long {
        /// The limit.
        expected: usize,
        /// Bytes there.
        found: usize,
    },
    /// Of another protocol version.
    #[error("other wire version: expected {VERSION}, found {found}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// Not one of the known kinds.
    #[error("unknown kind of message: {found}")]
    Kind {
        /// The kind found.
        found: u8,
    },
    /// `rkyv` found the bytes invalid.
    #[error("payload is not validly encoded")]
    Invalid,
    /// Valid, but not the one encoding of what it says.
    #[error("payload is not canonically encoded")]
    NotCanonical,
    /// The signature does not fit signer and payload.
    #[error("signature of {signer} does not fit")]
    Signature {
        /// Who is said to have signed.
        signer: PeerId,
    },
}

impl WireError {
    /// A short name for counters and `rejected` events.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Short { .. } => "short",
            Self::Long { .. } => "oversized",
            Self::Version { .. } => "version",
            Self::Kind { .. } => "kind",
            Self::Invalid => "malformed",
            Self::NotCanonical => "not canonical",
            Self::Signature { .. } => "signature",
        }
    }
}

/// Something with one canonical encoding.
pub trait Canonical: Sized {
    /// The encoding.
    fn to_canonical(&self) -> Vec<u8>;
    /// Decodes strictly: only the canonical bytes of a value are accepted.
    fn from_canonical(bytes: &[u8]) -> Result<Self, WireError>;
}

impl<T> Canonical for T
where
    T: Archive
        + for<'a> Serialize<
            rkyv::api::high::HighSerializer<AlignedVec, rkyv::ser::allocator::ArenaHandle<'a>, rancor::Error>,
        >,
    T::Archived: for<'a> rkyv::bytecheck::CheckBytes<rkyv::api::high::HighValidator<'a, rancor::Error>>
        + Deserialize<T, rkyv::api::high::HighDeserializer<rancor::Error>>,
{
    fn to_canonical(&self) -> Vec<u8> {
        match rkyv::to_bytes::<rancor::Error>(self) {
            Ok(bytes) => bytes.into_vec(),
            // Serialising into memory fails only where a length overflows u32, and every sequence here is far below that.
            Err(error) => unreachable!("in-memory encoding failed: {error}"),
        }
    }

    fn from_canonical(bytes: &[u8]) -> Result<Self, WireError> {
        let value = rkyv::from_bytes::<T, rancor::Error>(bytes).map_err(|_| WireError::Invalid)?;
        if value.to_canonical() != bytes {
            Err(WireError::NotCanonical)
        } else {
            Ok(value)
        }
    }
}

impl Record {
    /// The record's hash: what votes name and the next record points to.
    pub fn hash(&self) -> Hash {
        Hash::derive("murmur/v1/record", &self.to_canonical())
    }
}

/// Every message between peers that bears a signature.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// A contribution is ready.
    Commit(Commit),
    /// What I hold, whom I hear.
    Have(Have),
    /// A record for this view.
    Proposal(Box<Proposal>),
    /// A vote.
    Vote(Vote),
    /// Let me in.
    Join(Join),
    /// I am leaving.
    Leave(Leave),
    /// An audit's result.
    Verdict(Verdict),
    /// The quorum is gone.
    Regroup(Regroup),
    /// A voter said two things in one slot.
    Evidence(Evidence),
    /// What was computed for a proof of speed.
    Speed(SpeedClaim),
}

/// How far before the end of a payload its run stands: `rkyv` writes what a message holds by value last.
macro_rules! run_of {
    ($message:ty) => {
        Some(
            size_of::<rkyv::Archived<$message>>()
                - offset_of!(rkyv::Archived<$message>, slot)
                - offset_of!(rkyv::Archived<Slot>, run),
        )
    };
}

macro_rules! kinds {
    ($($code:literal $variant:ident $name:literal $limit:expr, $run:expr;)*) => {
        impl Body {
            /// Where the run stands in a payload of this kind, counted from the end, if the link may say it instead.
            fn run_from_end(kind: u8) -> Option<usize> {
                match kind { $($code => $run,)* _ => None }
            }
            /// The kind's code on the wire.
            pub fn kind(&self) -> u8 {
                match self { $(Self::$variant(_) => $code,)* }
            }
            /// The kind's name, part of the signing context.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)* }
            }
            /// Canonical payload bytes.
            pub fn payload(&self) -> Vec<u8> {
                match self { $(Self::$variant(body) => body.to_canonical(),)* }
            }
            fn decode(kind: u8, payload: &[u8]) -> Result<Self, WireError> {
                match kind {
                    $($code => {
                        if payload.len() > $limit {
                            return Err(WireError::Long { expected: $limit, found: payload.len() });
                        }
                        Ok(Self::$variant(Canonical::from_canonical(payload)?))
                    })*
                    found => Err(WireError::Kind { found }),
                }
            }
        }
    };
}
kinds! {
    1 Commit "commit" MAX_SMALL, run_of!(Commit);
    2 Have "have" MAX_SMALL, run_of!(Have);
    3 Proposal "proposal" MAX_RECORD, None;
    4 Vote "vote" MAX_SMALL, run_of!(Vote);
    5 Join "join" MAX_SMALL, run_of!(Join);
    6 Leave "leave" MAX_SMALL, run_of!(Leave);
    7 Verdict "verdict" MAX_SMALL, run_of!(Verdict);
    8 Regroup "regroup" MAX_SMALL, run_of!(Regroup);
    9 Evidence "evidence" MAX_SMALL, None;
    10 Speed "speed" MAX_SMALL, run_of!(SpeedClaim);
}

impl Body {
    /// Run, branch, round and view that the message is for.
    pub fn slot(&self) -> Slot {
        match self {
            Self::Commit(body) => body.slot,
            Self::Have(body) => body.slot,
            Self::Proposal(body) => body.slot,
            Self::Vote(body) => body.slot,
            Self::Join(body) => body.slot,
            Self::Leave(body) => body.slot,
            Self::Verdict(body) => body.slot,
            Self::Regroup(body) => body.slot,
            Self::Evidence(body) => body.first.0.slot,
            Self::Speed(body) => body.slot,
        }
    }
}

/// How messages are signed. Real peers use ed25519; the simulator may use a keyed hash, which costs a hundredth and is as good
/// among parties that do not try to break it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// ed25519, the peer's iroh key.
    Ed25519,
    /// BLAKE3 keyed with the peer's id: the simulator's.
    KeyedHash,
}

/// A peer's secret key with its scheme.
#[derive(Clone)]
pub struct Keys {
    scheme: Scheme,
    secret: iroh_base::SecretKey,
    id: PeerId,
}

impl Keys {
    /// Keys from an ed25519 secret.
    pub fn new(secret: [u8; 32], scheme: Scheme) -> Self {
        let secret = iroh_base::SecretKey::from_bytes(&secret);
        let id = PeerId(*secret.public().as_bytes());
        Self { scheme, secret, id }
    }
    /// Who signs.
    pub fn id(&self) -> PeerId {
        self.id
    }
    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }
    /// The secret, for the endpoint and the VRF key derived from it.
    pub fn secret(&self) -> [u8; 32] {
        self.secret.to_bytes()
    }
    /// Signs a message.
    pub fn sign(&self, body: &Body) -> Signed {
        let digest = digest(body.name(), &body.payload());
        let signature = match self.scheme {
            Scheme::Ed25519 => Signature(self.secret.sign(&digest).to_bytes()),
            Scheme::KeyedHash => keyed(&self.id, &digest),
        };
        Signed {
            signer: self.id,
            body: body.clone(),
            signature,
        }
    }
}

impl Keys {
    /// Signs bytes that are no message of the protocol, in the domain `name`, which no message has.
    pub fn sign_bytes(&self, name: &str, bytes: &[u8]) -> Signature {
        let digest = digest(&format!("bytes/{name}"), bytes);
        match self.scheme {
            Scheme::Ed25519 => Signature(self.secret.sign(&digest).to_bytes()),
            Scheme::KeyedHash => keyed(&self.id, &digest),
        }
    }
}

/// Whether `signer` has signed `bytes` in the domain `name` by [`Keys::sign_bytes`].
///
/// # Errors
/// It has not.
pub fn verify_bytes(
    scheme: Scheme,
    name: &str,
    bytes: &[u8],
    signer: PeerId,
    signature: Signature,
) -> Result<(), WireError> {
    verify(scheme, &format!("bytes/{name}"), bytes, signer, signature)
}

fn digest(name: &str, payload: &[u8]) -> [u8; 32] {
    blake3::derive_key(&format!("murmur/v1/{name}"), payload)
}

fn keyed(id: &PeerId, digest: &[u8; 32]) -> Signature {
    let mut bytes = [0; 64];
    blake3::Hasher::new_keyed(&id.0)
        .update(digest)
        .finalize_xof()
        .fill(&mut bytes);
    Signature(bytes)
}

/// A message with its signer and signature. Whether the signature holds is known only after [`Signed::verify`] or
/// [`Signed::from_frame`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signed {
    /// Who signed.
    pub signer: PeerId,
    /// What.
    pub body: Body,
    /// The signature.
    pub signature: Signature,
}

impl Signed {
    /// The bytes that travel.
    pub fn to_frame(&self) -> Vec<u8> {
        let payload = self.body.payload();
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.extend_from_slice(&VERSION.to_le_bytes());
        frame.push(self.body.kind());
        frame.extend_from_slice(&self.signer.0);
        frame.extend_from_slice(&self.signature.0);
        frame.extend_from_slice(&payload);
        frame
    }

    /// Decodes and verifies a frame.
    pub fn from_frame(frame: &[u8], scheme: Scheme) -> Result<Self, WireError> {
        let short = WireError::Short {
            expected: HEADER,
            found: frame.len(),
        };
        let (header, payload) = frame.split_at_checked(HEADER).ok_or(short)?;
        let version = u16::from_le_bytes([header[0], header[1]]);
        if version != VERSION {
            return Err(WireError::Version { found: version });
        }
        let mut signer = [0; 32];
        signer.copy_from_slice(&header[3..35]);
        let mut signature = [0; 64];
        signature.copy_from_slice(&header[35..HEADER]);
        Self::open(header[2], PeerId(signer), Signature(signature), payload, scheme)
    }

    /// A message from its parts, decoded strictly and verified.
    fn open(kind: u8, signer: PeerId, signature: Signature, payload: &[u8], scheme: Scheme) -> Result<Self, WireError> {
        let body = Body::decode(kind, payload)?;
        verify(scheme, body.name(), payload, signer, signature)?;
        Ok(Self {
            signer,
            body,
            signature,
        })
    }

    /// Verifies the signature of a message that came inside another one.
    pub fn verify(&self, scheme: Scheme) -> Result<(), WireError> {
        verify(
            scheme,
            self.body.name(),
            &self.body.payload(),
            self.signer,
            self.signature,
        )
    }
}

fn verify(scheme: Scheme, name: &str, payload: &[u8], signer: PeerId, signature: Signature) -> Result<(), WireError> {
    let digest = digest(name, payload);
    let holds = match scheme {
        Scheme::Ed25519 => iroh_base::PublicKey::from_bytes(&signer.0).is_ok_and(|key| {
            key.verify(&digest, &iroh_base::Signature::from_bytes(&signature.0))
                .is_ok()
        }),
        Scheme::KeyedHash => keyed(&signer, &digest) == signature,
    };
    if holds {
        Ok(())
    } else {
        Err(WireError::Signature { signer })
    }
}

mod link;
#[cfg(test)]
mod tests;
