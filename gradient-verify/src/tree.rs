//! A Merkle tree: one root for many leaves, of which any can be shown alone.
//!
//! Leaves are hashed with their index, pairs from left to right, and what has no partner goes up as it is:
//!
//! ```text
//!            root
//!         /        \
//!      [0 1 2 3]    \
//!      /      \      \
//!   [0 1]    [2 3]    4          leaf i = H("murmur/v1/proof-leaf", i u32, bytes)
//!   /   \    /   \               node   = H("murmur/v1/proof-node", left, right)
//!  0     1  2     3
//! ```
//!
//! How many leaves there are is not in the root; it has to be known, and signed, beside it.

use coordinatorless::types::Hash;

/// The hash of a leaf.
pub(crate) fn leaf(index: u32, bytes: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/proof-leaf");
    hasher.update(&index.to_le_bytes()).update(bytes);
    Hash(*hasher.finalize().as_bytes())
}

fn node(left: &Hash, right: &Hash) -> Hash {
    Hash::derive("murmur/v1/proof-node", &[left.0, right.0].concat())
}

/// The next level up.
fn above(level: &[Hash]) -> Vec<Hash> {
    let join = |pair: &[Hash]| match pair {
        [left, right] => node(left, right),
        _ => pair[0],
    };
    level.chunks(2).map(join).collect()
}

/// The root of these leaves; zero for none.
pub(crate) fn root(leaves: &[Hash]) -> Hash {
    let mut level = leaves.to_vec();
    while level.len() > 1 {
        level = above(&level);
    }
    level.first().copied().unwrap_or_default()
}

/// All levels of a tree, to show many leaves of it.
pub(crate) struct Paths(Vec<Vec<Hash>>);

impl Paths {
    pub(crate) fn new(leaves: &[Hash]) -> Self {
        let mut levels = vec![leaves.to_vec()];
        while let Some(level) = levels.last().filter(|level| level.len() > 1) {
            levels.push(above(level));
        }
        Self(levels)
    }

    /// The hashes that lead from leaf `index` to the root.
    pub(crate) fn of(&self, index: usize) -> Vec<Hash> {
        let beside = |(height, level): (usize, &Vec<Hash>)| level.get(index >> height ^ 1).copied();
        let below_the_root = self.0.iter().enumerate().take(self.0.len() - 1);
        below_the_root.filter_map(beside).collect()
    }
}

/// How many hashes lead from leaf `index` of `count` to the root.
pub(crate) fn path_len(mut count: usize, mut index: usize) -> usize {
    let mut length = 0;
    while count > 1 {
        length += usize::from(index ^ 1 < count);
        (count, index) = (count.div_ceil(2), index / 2);
    }
    length
}

/// The root that a leaf and its path lead to; `None` for a path of the wrong length.
pub(crate) fn root_of(leaf: Hash, mut count: usize, mut index: usize, path: &[Hash]) -> Option<Hash> {
    let (mut hash, mut path) = (leaf, path.iter());
    while count > 1 {
        if index ^ 1 < count {
            let beside = path.next()?;
            hash = if index.is_multiple_of(2) {
                node(&hash, beside)
            } else {
                node(beside, &hash)
            };
        }
        (count, index) = (count.div_ceil(2), index / 2);
    }
    path.next().is_none().then_some(hash)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_leads_to_the_root_and_no_other_does() {
        for count in 1..40_usize {
            let leaves: Vec<Hash> = (0..count as u32).map(|i| leaf(i, b"x")).collect();
            let root = root(&leaves);
            for index in 0..count {
                let path = Paths::new(&leaves).of(index);
                assert_eq!(path.len(), path_len(count, index));
                assert_eq!(root_of(leaves[index], count, index, &path), Some(root));
                assert_ne!(root_of(leaf(99, b"x"), count, index, &path), Some(root));
                let longer = [&path[..], &[root]].concat();
                assert_eq!(root_of(leaves[index], count, index, &longer), None);
                if !path.is_empty() {
                    assert_eq!(root_of(leaves[index], count, index, &path[1..]), None);
                    let other = (index + 1) % count;
                    assert_ne!(
                        root_of(leaves[index], count, other, &path),
                        Some(root),
                        "{index} of {count} as {other}"
                    );
                }
            }
        }
        assert_eq!(root(&[]), Hash::default());
    }
}
