//! The accumulators of a peer on disk: `accumulator/<branch>/<root>`, little-endian `f32`, one a parameter. The root is BLAKE3 of the file, so
//! an auditor can fetch it by what the commit names. Where the run carries the inner optimizer's state, that follows in the same file, so
//! that both are always those of one round: the last one that was counted.
//!
//! Each branch has its own, since rounds on one do not make those of another older: who went on without the others for long, and comes back,
//! is asked to open what it sent before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use coordinatorless::node::ACCUMULATOR_BRANCHES;
use coordinatorless::types::{Branch, Hash};
use trainer::compress::{accumulator_root, accumulator_zero_root};

use crate::peer_dir::write_whole;

/// A peer's accumulators, the last few of them of each branch.
pub struct Accumulators {
    folder: PathBuf,
    /// Numbers in a file.
    len: usize,
    keep: usize,
    zero: Hash,
}

impl Accumulators {
    /// In this folder, of `len` numbers each; the newest `keep` of a branch are kept.
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
        let bytes = fs::read(find(&self.folder, root)?).ok()?;
        let (values, rest) = bytes.as_chunks::<4>();
        let whole = rest.is_empty() && values.len() == self.len && Hash::of(&bytes) == root;
        whole.then(|| values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Keeps an accumulator of a round on this branch; returns its root and file.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self, branch: Branch, values: &[f32]) -> Result<(Hash, PathBuf)> {
        let root = Hash(accumulator_root(values));
        let folder = self.folder.join(branch.to_string());
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(root.to_string());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        write_whole(&path, &bytes)?;
        self.prune(&folder, &path);
        Ok((root, path))
    }

    /// Old ones of the same branch go, and branches left long ago; the one just written stays. What cannot be removed now can be later.
    fn prune(&self, branch: &Path, newest: &Path) {
        for path in oldest(branch, newest, self.keep) {
            let _ = fs::remove_file(path);
        }
        for path in oldest(&self.folder, branch, ACCUMULATOR_BRANCHES) {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// The file of the accumulator with this root, in a peer's folder of accumulators.
pub fn find(folder: &Path, root: Hash) -> Option<PathBuf> {
    let branches = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files = branches.map(|branch| branch.path().join(root.to_string()));
    files.find(|file| file.is_file())
}

/// All accumulators in a peer's folder of them, with their branches: the branch that was written to last comes last, and of each the newest.
pub fn all(folder: &Path) -> Vec<(Branch, PathBuf)> {
    let mut all = Vec::new();
    for branch in by_age(folder) {
        let number = branch.file_name().and_then(|name| name.to_str()?.parse().ok());
        let Some(number) = number else { continue };
        all.extend(by_age(&branch).into_iter().map(|path| (number, path)));
    }
    all
}

/// All but the newest `keep` in this folder, `newest` being one of those.
fn oldest(folder: &Path, newest: &Path, keep: usize) -> Vec<PathBuf> {
    let mut all = by_age(folder);
    all.retain(|path| path != newest);
    all.truncate(all.len().saturating_sub(keep.saturating_sub(1)));
    all
}

/// What is in this folder, the oldest first.
fn by_age(folder: &Path) -> Vec<PathBuf> {
    let age = |path: &Path| {
        fs::metadata(path)
            .and_then(|meta| meta.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<(SystemTime, PathBuf)> = entries
        .map(|entry| entry.path())
        .map(|path| (age(&path), path))
        .collect();
    all.sort();
    all.into_iter().map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accumulator_reads_back_by_its_root_and_a_torn_one_is_zeros() {
        let temp = tempfile::tempdir().unwrap();
        let all = Accumulators::open(temp.path().to_owned(), 3, 2).unwrap();
        let (root, path) = all.save(0, &[1.0, -2.0, 3.5]).unwrap();
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
    fn the_last_ones_of_each_branch_are_kept_and_of_two_branches() {
        let temp = tempfile::tempdir().unwrap();
        let all = Accumulators::open(temp.path().to_owned(), 1, 2).unwrap();
        let save = |branch, value: f32| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            all.save(branch, &[value]).unwrap().0
        };
        let kept = |roots: &[Hash]| roots.iter().map(|root| all.load(*root).1 == *root).collect::<Vec<_>>();
        let left: Vec<Hash> = [1.0, 2.0, 3.0].map(|value| save(7, value)).to_vec();
        assert_eq!(kept(&left), [false, true, true]);
        let own: Vec<Hash> = (0..5).map(|i| save(8, 10.0 + i as f32)).collect();
        assert_eq!(kept(&own), [false, false, false, true, true]);
        assert_eq!(kept(&left), [false, true, true], "rounds on one branch age no other");
        let file = |branch, root: &Hash| (branch, temp.path().join(format!("{branch}/{root}")));
        let there = [(7, &left[1]), (7, &left[2]), (8, &own[3]), (8, &own[4])];
        let there = there.map(|(branch, root)| file(branch, root));
        assert_eq!(super::all(temp.path()), there);
        let back = save(7, 4.0);
        assert_eq!(kept(&left), [false, false, true]);
        let third = save(9, 20.0);
        assert_eq!(kept(&[back, third]), [true, true]);
        assert_eq!(kept(&own), [false; 5], "of the two branches written last");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), ACCUMULATOR_BRANCHES);
    }
}
