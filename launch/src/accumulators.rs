//! The accumulators of a peer on disk: `accumulator/<root>`, little-endian `f32`, one a parameter. The root is BLAKE3 of the file, so
//! an auditor can fetch it by what the commit names. Where the run carries the inner optimizer's state, that follows in the same file, so
//! that both are always those of one round: the last one that was counted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use coordinatorless::types::Hash;
use trainer::compress::{accumulator_root, accumulator_zero_root};

use crate::peer_dir::write_whole;

/// A peer's accumulators, the last few of them.
pub struct Accumulators {
    folder: PathBuf,
    /// Numbers in a file.
    len: usize,
    keep: usize,
    zero: Hash,
}

impl Accumulators {
    /// In this folder, of `len` numbers each; the newest `keep` are kept.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(folder: PathBuf, len: usize, keep: usize) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self {
            folder,
            len,
            keep,
            zero: Hash(accumulator_zero_root(len)),
        })
    }

    /// The accumulator with this root, and its root: if it is lost or torn, that is zeros, which is said aloud (R19).
    pub fn load(&self, root: Hash) -> (Vec<f32>, Hash) {
        let zeros = || (vec![0.0; self.len], self.zero);
        if root == self.zero {
            return zeros();
        }
        match self.read(root) {
            Some(values) => (values, root),
            None => {
                tracing::warn!(root = %root.short(), "the accumulator is lost or torn; declared, starting from zeros");
                zeros()
            }
        }
    }

    fn read(&self, root: Hash) -> Option<Vec<f32>> {
        let bytes = fs::read(self.path(root)).ok()?;
        let (values, rest) = bytes.as_chunks::<4>();
        let whole = rest.is_empty() && values.len() == self.len && Hash::of(&bytes) == root;
        whole.then(|| values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Keeps an accumulator; returns its root and file.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self, values: &[f32]) -> Result<(Hash, PathBuf)> {
        let root = Hash(accumulator_root(values));
        let path = self.path(root);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        write_whole(&path, &bytes)?;
        self.prune(&path);
        Ok((root, path))
    }

    fn path(&self, root: Hash) -> PathBuf {
        self.folder.join(root.to_string())
    }

    /// Old ones go; the one just written stays.
    fn prune(&self, newest: &Path) {
        let age = |path: &Path| {
            fs::metadata(path)
                .and_then(|meta| meta.modified())
                .unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let entries = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .filter(|path| path != newest)
            .map(|path| (age(&path), path))
            .collect();
        files.sort();
        let old = files.len().saturating_sub(self.keep.saturating_sub(1));
        for (_, path) in files.drain(..old) {
            // What cannot be removed now can be later.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accumulator_reads_back_by_its_root_and_a_torn_one_is_zeros() {
        let temp = tempfile::tempdir().unwrap();
        let all = Accumulators::open(temp.path().to_owned(), 3, 2).unwrap();
        let (root, path) = all.save(&[1.0, -2.0, 3.5]).unwrap();
        assert_eq!(
            Hash::of(&fs::read(&path).unwrap()),
            root,
            "the root is the file's own hash"
        );
        assert_eq!(all.load(root), (vec![1.0, -2.0, 3.5], root));
        fs::write(&path, [0; 11]).unwrap();
        let zero = Hash(accumulator_zero_root(3));
        assert_eq!(all.load(root), (vec![0.0; 3], zero));
        assert_eq!(all.load(zero), (vec![0.0; 3], zero));
    }

    #[test]
    fn only_the_last_ones_are_kept() {
        let temp = tempfile::tempdir().unwrap();
        let all = Accumulators::open(temp.path().to_owned(), 1, 2).unwrap();
        let saved: Vec<Hash> = (0..5)
            .map(|i| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                all.save(&[i as f32 + 1.0]).unwrap().0
            })
            .collect();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
        assert_eq!(all.load(saved[4]).1, saved[4]);
        assert_eq!(all.load(saved[3]).1, saved[3]);
    }
}
