//! The files of a data folder, and how they get there whole.
//!
//! ```text
//! DIR/manifest.json        the manifest, in canonical form
//! DIR/shards/<hash>.bin    plain little-endian tokens, u8 or u16, named by BLAKE3
//! ```
//!
//! A file appears by rename after it was written and synced aside, and is never changed afterwards. So a crash leaves
//! nothing half-written under a real name, and a mapped file stays what it was.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::manifest::{MAX_SHARD_TOKENS, Manifest, ManifestError, hex};

/// Largest shard in bytes: the most tokens, two bytes each.
pub const MAX_SHARD_BYTES: u64 = MAX_SHARD_TOKENS * 2;

/// Why received bytes were not installed. Nothing was written under a real name.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// They are not what the hash names.
    #[error("received bytes hash to {}, expected {}", hex(found), hex(expected))]
    WrongHash {
        /// The hash asked for.
        expected: [u8; 32],
        /// The hash of the bytes.
        found: [u8; 32],
    },
    /// More bytes than a shard may have.
    #[error("a shard of {found} bytes; at most {limit} are taken")]
    TooLarge {
        /// Bytes given.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// They have the right hash and are not a manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where a data folder keeps its manifest.
pub fn manifest_path(dir: &Path) -> PathBuf {
    dir.join("manifest.json")
}

/// Where a data folder keeps the shard of this hash.
pub fn shard_path(dir: &Path, hash: &[u8; 32]) -> PathBuf {
    dir.join("shards").join(format!("{}.bin", hex(hash)))
}

/// The shards that a data folder lacks, each once, in the manifest's order. A file of the right name with other content
/// (torn, or tampered with) counts as lacking. Reads and hashes every shard there is.
pub fn missing(dir: &Path, manifest: &Manifest) -> Vec<[u8; 32]> {
    let mut seen = HashSet::new();
    let hashes = manifest
        .shards
        .iter()
        .map(|shard| shard.hash)
        .filter(|hash| seen.insert(*hash));
    hashes
        .filter(|hash| hash_of(&shard_path(dir, hash)).ok() != Some(*hash))
        .collect()
}

/// BLAKE3 of a file.
fn hash_of(path: &Path) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(*hasher.finalize().as_bytes())
}

/// Puts a shard fetched from elsewhere in its place, if it is what the hash names. Replaces a damaged file.
pub fn install_shard(dir: &Path, hash: &[u8; 32], bytes: &[u8]) -> Result<(), InstallError> {
    if bytes.len() as u64 > MAX_SHARD_BYTES {
        return Err(InstallError::TooLarge {
            found: bytes.len() as u64,
            limit: MAX_SHARD_BYTES,
        });
    }
    check_hash(hash, bytes)?;
    place(&shard_path(dir, hash), bytes)
}

/// Puts a manifest fetched from elsewhere in its place, if it is what the root names.
pub fn install_manifest(dir: &Path, root: &[u8; 32], bytes: &[u8]) -> Result<Manifest, InstallError> {
    check_hash(root, bytes)?;
    let manifest = Manifest::from_bytes(bytes)?;
    place(&manifest_path(dir), bytes)?;
    Ok(manifest)
}

fn check_hash(expected: &[u8; 32], bytes: &[u8]) -> Result<(), InstallError> {
    let found = *blake3::hash(bytes).as_bytes();
    if found == *expected {
        Ok(())
    } else {
        Err(InstallError::WrongHash {
            expected: *expected,
            found,
        })
    }
}

fn place(path: &Path, bytes: &[u8]) -> Result<(), InstallError> {
    write_whole(path, bytes).map_err(|source| InstallError::Io {
        path: path.to_owned(),
        source,
    })
}

/// A name for what is written aside. Two writers of one thing, in one process or in several, must not share it.
pub(crate) fn part_name() -> String {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    format!(
        ".{}-{}.part",
        std::process::id(),
        WRITES.fetch_add(1, Ordering::Relaxed)
    )
}

/// Writes a file aside, syncs it and renames it into place; makes its folder if need be.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let aside = folder.join(part_name());
    let written = (|| {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&aside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_installed_under_its_hash() {
        let dir = tempfile::tempdir().unwrap();
        let hash = *blake3::hash(b"tokens").as_bytes();
        install_shard(dir.path(), &hash, b"tokens").unwrap();
        assert_eq!(fs::read(shard_path(dir.path(), &hash)).unwrap(), b"tokens");
    }

    #[test]
    fn bytes_of_another_hash_leave_no_file_behind() {
        let dir = tempfile::tempdir().unwrap();
        let refused = install_shard(dir.path(), &[1; 32], b"tokens");
        assert!(matches!(refused, Err(InstallError::WrongHash { expected, .. }) if expected == [1; 32]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn bytes_that_hash_right_but_are_no_manifest_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = *blake3::hash(b"{}").as_bytes();
        assert!(matches!(
            install_manifest(dir.path(), &root, b"{}"),
            Err(InstallError::Manifest(_))
        ));
        assert!(!manifest_path(dir.path()).exists());
    }
}
