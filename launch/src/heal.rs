//! What a peer does before it starts: files that were changed or torn since it stopped are noticed, and fetched again from the others.
//!
//! Snapshots and large blobs are named by their BLAKE3 hash, so one read of each tells. The blob store believes its own notes of what it
//! holds whole; where one file differs, the whole store goes. The others have what was in it, or it lies in this peer's other folders, too; only a
//! contribution that nobody fetched yet is lost.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::types::Hash;

use crate::peer_dir::PeerDir;

/// Removes what is not what its name says, and with it the blob store that relied on it. Returns the files that differed.
///
/// # Errors
/// The disk.
pub fn drop_damaged(dir: &PeerDir) -> Result<Vec<PathBuf>> {
    let blobs = dir.path().join("blobs");
    let mut differing = Vec::new();
    for (folder, ending) in [(dir.snapshots(), "safetensors"), (blobs.join("data"), "data")] {
        for path in files(&folder, ending) {
            if named(&path).is_some_and(|name| !is_partial(&path) && hash(&path).is_ok_and(|found| found != name)) {
                differing.push(path);
            }
        }
    }
    if differing.is_empty() {
        return Ok(differing);
    }
    for path in &differing {
        tracing::warn!(
            "{} was changed since it was written; it is not used, but fetched again from the others",
            path.display()
        );
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    fs::remove_dir_all(&blobs)
        .or_else(|error| {
            (error.kind() == std::io::ErrorKind::NotFound)
                .then_some(())
                .ok_or(error)
        })
        .with_context(|| format!("cannot remove {}", blobs.display()))?;
    Ok(differing)
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect()
}

/// The hash that a file is named by; `current.safetensors` has none.
fn named(path: &Path) -> Option<Hash> {
    Hash::from_hex(path.file_stem()?.to_str()?)
}

/// A blob that is still on its way has its sizes beside it, and another content than its name says. There is also a map of what is there, unless the
/// process was killed before it was written.
fn is_partial(path: &Path) -> bool {
    ["sizes4", "bitfield"]
        .iter()
        .any(|kind| path.with_extension(kind).exists())
}

fn hash(path: &Path) -> std::io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(Hash(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_snapshot_goes_with_the_blobs_and_whole_ones_stay() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PeerDir::new(temp.path());
        let data = temp.path().join("blobs/data");
        fs::create_dir_all(dir.snapshots()).unwrap();
        fs::create_dir_all(&data).unwrap();
        let good = dir.snapshots().join(format!("{}.safetensors", Hash::of(b"model")));
        fs::write(&good, b"model").unwrap();
        fs::write(dir.snapshots().join("current.safetensors"), b"any").unwrap();
        let partial = data.join(format!("{}.data", Hash::of(b"whole")));
        fs::write(&partial, b"wh").unwrap();
        for kind in ["sizes4", "bitfield"] {
            let beside = partial.with_extension(kind);
            fs::write(&beside, b"").unwrap();
            assert!(drop_damaged(&dir).unwrap().is_empty(), "{kind}");
            assert!(partial.exists());
            fs::remove_file(beside).unwrap();
        }
        fs::write(partial.with_extension("sizes4"), b"").unwrap();

        fs::write(&good, b"modem").unwrap();
        assert_eq!(drop_damaged(&dir).unwrap(), std::slice::from_ref(&good));
        assert!(!good.exists() && !temp.path().join("blobs").exists());
        assert!(dir.snapshots().join("current.safetensors").exists());
    }

    #[test]
    fn a_changed_blob_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        let data = temp.path().join("blobs/data");
        fs::create_dir_all(&data).unwrap();
        let blob = data.join(format!("{}.data", Hash::of(b"shard")));
        fs::write(&blob, b"shart").unwrap();
        assert_eq!(drop_damaged(&PeerDir::new(temp.path())).unwrap(), [blob]);
    }
}
