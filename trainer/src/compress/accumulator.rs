//! The commitment to an accumulator: a Merkle root from which single chunks can be opened later.
//!
//! ```text
//! leaf i  BLAKE3 of 4096 values, little-endian f32 (the last leaf may be shorter)   context "murmur/v1/accumulator/leaf"
//! node    BLAKE3 of left and right; an odd one at a level's end moves up unchanged  context "murmur/v1/accumulator/node"
//! root    BLAKE3 of the number of values, little-endian u64, and the top node       context "murmur/v1/accumulator/root"
//! ```
//!
//! Three contexts (BLAKE3 key derivation) keep a leaf from passing for a node, and the count in the root fixes the shape of
//! the tree, so that moving up unchanged is unambiguous. Values are hashed by their bits: -0.0 is not 0.0.

use super::parallel::{available_threads, map_ranges};

/// Values in one leaf.
pub const ACCUMULATOR_LEAF: usize = 4096;

const LEAF: &str = "murmur/v1/accumulator/leaf";
const NODE: &str = "murmur/v1/accumulator/node";
const ROOT: &str = "murmur/v1/accumulator/root";

/// Merkle root of an accumulator. The same for any number of threads.
#[must_use]
pub fn accumulator_root(values: &[f32]) -> [u8; 32] {
    let leaves: Vec<&[f32]> = values.chunks(ACCUMULATOR_LEAF).collect();
    let hashed = map_ranges(leaves.len(), available_threads(), |range| {
        leaves[range].iter().map(|leaf| leaf_hash(leaf)).collect::<Vec<_>>()
    });
    root(values.len(), hashed.into_iter().flatten().collect())
}

/// The root of `params` zeros: what a newcomer starts from, and whoever declares its accumulator lost.
#[must_use]
pub fn accumulator_zero_root(params: usize) -> [u8; 32] {
    let zeros = [0.0; ACCUMULATOR_LEAF];
    let mut leaves = vec![leaf_hash(&zeros); params / ACCUMULATOR_LEAF];
    let rest = params % ACCUMULATOR_LEAF;
    if rest > 0 {
        leaves.push(leaf_hash(&zeros[..rest]));
    }
    root(params, leaves)
}

/// Hash of one leaf: up to 4096 values.
#[must_use]
pub fn leaf_hash(values: &[f32]) -> [u8; 32] {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    blake3::derive_key(LEAF, &bytes)
}

fn root(values: usize, mut level: Vec<[u8; 32]>) -> [u8; 32] {
    while level.len() > 1 {
        level = level.chunks(2).map(parent).collect();
    }
    let mut bytes = (values as u64).to_le_bytes().to_vec();
    bytes.extend(level.concat()); // nothing, for an empty vector
    blake3::derive_key(ROOT, &bytes)
}

fn parent(children: &[[u8; 32]]) -> [u8; 32] {
    match children {
        [only] => *only,
        both => blake3::derive_key(NODE, both.as_flattened()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_zeros_is_the_root_of_zeros() {
        for params in [0, 1, 4095, 4096, 4097, 5 * 4096, 6 * 4096 + 1] {
            assert_eq!(
                accumulator_zero_root(params),
                accumulator_root(&vec![0.0; params]),
                "{params}"
            );
        }
    }

    #[test]
    fn every_value_its_place_and_the_length_matter() {
        let mut values = vec![0.5f32; 3 * 4096 + 7];
        let before = accumulator_root(&values);
        assert_ne!(accumulator_root(&values[..3 * 4096 + 6]), before);
        for place in [0, 4096, 3 * 4096 + 6] {
            values[place] = -0.5;
            assert_ne!(accumulator_root(&values), before, "{place}");
            values[place] = 0.5;
        }
        assert_eq!(accumulator_root(&values), before);
    }

    #[test]
    fn three_leaves_form_the_documented_tree() {
        let values: Vec<f32> = (0..2 * 4096 + 5).map(|i| i as f32).collect();
        let leaves: Vec<_> = values.chunks(4096).map(leaf_hash).collect();
        let left = blake3::derive_key(NODE, &[leaves[0], leaves[1]].concat());
        let top = blake3::derive_key(NODE, &[left, leaves[2]].concat());
        let count = (values.len() as u64).to_le_bytes();
        assert_eq!(
            accumulator_root(&values),
            blake3::derive_key(ROOT, &[&count[..], &top].concat())
        );
    }
}
