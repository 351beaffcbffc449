//! Files of proofs: written whole, signed by the peer whose directory was named, read within bounds.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use coordinatorless::types::PeerId;
use gradient_verify::proof::{Identity, MAX_BYTES, Proof, ProofError, Statement, encode};
use serde_json::{Value, json};

use crate::cli::ModelArgs;
use crate::failure::usage;
use crate::peer_dir::{PeerDir, write_whole};

/// A proof that was written.
pub struct Written {
    /// Where.
    pub file: PathBuf,
    /// How long it is.
    pub bytes: usize,
    /// Who signed it.
    pub signer: Option<PeerId>,
}

impl Written {
    /// For scripts.
    pub fn report(&self) -> Value {
        json!({"file": self.file, "bytes": self.bytes, "signer": self.signer})
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signed = match self.signer {
            Some(signer) => format!("signed by peer {}", signer.short()),
            None => "not signed".to_owned(),
        };
        let (file, bytes) = (self.file.display(), self.bytes);
        write!(f, "the proof is in {file}, {signed}: {bytes} bytes")
    }
}

/// Writes a proof; a peer's model is signed for with its key, a model from elsewhere with none.
///
/// # Errors
/// The disk, or the key's file.
pub fn write(file: &Path, model: &Identity, statement: &Statement, source: &ModelArgs) -> Result<Written> {
    let keys = match source.model {
        Some(_) => None,
        None => Some(PeerDir::find(source.dir.dir.as_deref())?.key()?),
    };
    let bytes = encode(model, statement, keys.as_ref());
    write_whole(file, &bytes)?;
    Ok(Written {
        file: file.to_owned(),
        bytes: bytes.len(),
        signer: keys.map(|keys| keys.id()),
    })
}

/// Reads a proof.
///
/// # Errors
/// No file, or not a proof (exit code 2); one whose signature does not hold (exit code 1).
pub fn read(file: &Path) -> Result<Proof> {
    let cannot = |error: std::io::Error| usage(format!("cannot read {}: {error}", file.display()));
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(cannot)?;
    opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    Proof::decode(&bytes).map_err(|error| match error {
        ProofError::Signature { .. } => anyhow!("{}: {error}", file.display()),
        error => usage(format!("{}: {error}", file.display())),
    })
}
