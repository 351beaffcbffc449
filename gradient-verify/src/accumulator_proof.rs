//! Some leaves of an accumulator, each with its path to the root that the commit names.
//!
//! The root is the BLAKE3 hash of the accumulator's bytes, and BLAKE3 is a Merkle tree, so a part of them can be shown to belong to it: for each
//! leaf of [`ACCUMULATOR_LEAF`] values (16 KiB) the pairs of hashes from the root down to it (64 bytes a level). That is the format of verified
//! streaming (`bao`), with which blobs are exchanged anyway: an auditor asks the member for parts of the blob, and what has come proves itself, here
//! and to anyone it is shown to later.
//!
//! Which leaves nobody could know when the accumulator was committed to: they follow from the auditor's own lot
//! ([`AuditOrder::leaves`](coordinatorless::protocol::event::AuditOrder::leaves)). A lie in a share `f` of the leaves is missed by `n` of
//! them with a chance of `(1-f)^n`: with 100, less than one in thirty thousand where a tenth of the accumulator is false.
//!
//! Of 16 million parameters (3907 leaves), 100 leaves and their paths are 1.68 MB, of which 40 KB hashes, and open in 0.04 s on a core that others
//! share; the whole accumulator would be 64 MB. A doubling of the model adds 64 bytes a leaf, so a billion parameters make 1.7 MB, twice for before and
//! after.

use std::io::Cursor;

use bao_tree::io::BaoContentItem;
use bao_tree::io::outboard::PreOrderMemOutboard;
use bao_tree::io::sync::{DecodeResponseIter, encode_ranges_validated};
use bao_tree::{BaoTree, BlockSize, ChunkNum, ChunkRanges};
use coordinatorless::types::Hash;
use trainer::compress::ACCUMULATOR_LEAF;

use crate::opening::{OpeningError, Which};

/// Bytes of a leaf.
const LEAF_BYTES: u64 = 4 * ACCUMULATOR_LEAF as u64;
/// A leaf in BLAKE3's chunks of 1024 bytes: 2^4 of them.
const LEAF_LOG: u8 = 4;
/// Chunks of a leaf.
const LEAF_CHUNKS: u64 = 1 << LEAF_LOG;

/// Leaves of an accumulator of so many values.
#[must_use]
pub fn leaf_count(params: usize) -> u64 {
    (params as u64).div_ceil(ACCUMULATOR_LEAF as u64)
}

fn tree(bytes: u64) -> BaoTree {
    BaoTree::new(bytes, BlockSize::from_chunk_log(LEAF_LOG))
}

fn ranges(leaves: &[u64]) -> ChunkRanges {
    leaves.iter().fold(ChunkRanges::empty(), |all, leaf| {
        let from = leaf.saturating_mul(LEAF_CHUNKS);
        all | ChunkRanges::from(ChunkNum(from)..ChunkNum(from.saturating_add(LEAF_CHUNKS)))
    })
}

/// The proof of these leaves of an accumulator, as its owner gives it: length, then hashes and leaves from the root down.
///
/// # Errors
/// Into memory there are none but a leaf that is not there.
pub fn prove(accumulator: &[u8], leaves: &[u64]) -> std::io::Result<Vec<u8>> {
    let outboard = PreOrderMemOutboard::create(accumulator, BlockSize::from_chunk_log(LEAF_LOG));
    let mut proof = (accumulator.len() as u64).to_le_bytes().to_vec();
    encode_ranges_validated(accumulator, &outboard, &ranges(leaves), &mut proof).map_err(std::io::Error::other)?;
    Ok(proof)
}

/// The values of these leaves (ascending), one after the other, if `proof` shows them to be those of an accumulator of `params` values with this root.
/// Nothing is allocated by a length that the proof merely claims.
///
/// # Errors
/// [`OpeningError::Proof`] says nothing of the member: anyone can send bytes that prove nothing. A value that is not finite and is proven does.
pub fn open_leaves(
    which: Which,
    proof: &[u8],
    root: &Hash,
    params: usize,
    leaves: &[u64],
) -> Result<Vec<f32>, OpeningError> {
    let refuse = |why: String| OpeningError::Proof { which, why };
    let bytes = 4 * params as u64;
    let (length, encoded) = proof
        .split_first_chunk::<8>()
        .ok_or_else(|| refuse(format!("{} bytes, expected at least 8", proof.len())))?;
    let claimed = u64::from_le_bytes(*length);
    if claimed != bytes {
        return Err(refuse(format!("of {claimed} bytes, this model's have {bytes}")));
    }
    let ordered = leaves.windows(2).all(|pair| pair[0] < pair[1]);
    if !ordered || leaves.last().is_none_or(|last| *last >= leaf_count(params)) {
        return Err(refuse("leaves that there are not, or not in order".to_owned()));
    }
    let asked = ranges(leaves);
    let mut rest = Cursor::new(encoded);
    let mut values = Vec::with_capacity(leaves.len() * ACCUMULATOR_LEAF);
    let items = DecodeResponseIter::new(root.0.into(), tree(bytes), &mut rest, &asked);
    for item in items {
        match item.map_err(|error| refuse(error.to_string()))? {
            BaoContentItem::Parent(_) => {}
            BaoContentItem::Leaf(leaf) => {
                let numbers = leaf.data.as_chunks::<4>().0;
                values.extend(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
        }
    }
    let left = encoded.len() as u64 - rest.position();
    let expected: u64 = leaves
        .iter()
        .map(|leaf| LEAF_BYTES.min(bytes - leaf * LEAF_BYTES) / 4)
        .sum();
    if left > 0 || values.len() as u64 != expected {
        return Err(refuse(format!(
            "{} values and {left} bytes after them, expected {expected} and none",
            values.len()
        )));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(OpeningError::NotFinite {
            which,
            index: leaves[at / ACCUMULATOR_LEAF] as usize * ACCUMULATOR_LEAF + at % ACCUMULATOR_LEAF,
            found: values[at],
        }),
        None => Ok(values),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use trainer::compress::accumulator_root;

    use super::*;
    use crate::opening::accumulator_bytes;

    fn values(params: usize) -> Vec<f32> {
        (0..params).map(|i| (i as f32).sin()).collect()
    }

    fn opened(params: usize, leaves: &[u64], change: impl Fn(&mut Vec<u8>)) -> Result<Vec<f32>, OpeningError> {
        let values = values(params);
        let mut proof = prove(&accumulator_bytes(&values), leaves).unwrap();
        change(&mut proof);
        open_leaves(Which::After, &proof, &Hash(accumulator_root(&values)), params, leaves)
    }

    #[test]
    fn leaves_open_to_what_was_committed_the_short_last_one_too() {
        for params in [1, 4096, 4097, 8192, 50_000, 123_457] {
            let all = values(params);
            let count = leaf_count(params);
            let some: Vec<u64> = (0..count).filter(|leaf| leaf % 3 == 0 || *leaf + 1 == count).collect();
            let expected: Vec<f32> = some
                .iter()
                .flat_map(|leaf| all.chunks(ACCUMULATOR_LEAF).nth(*leaf as usize).unwrap())
                .copied()
                .collect();
            assert_eq!(opened(params, &some, |_| ()).unwrap(), expected, "{params}");
        }
    }

    #[test]
    fn a_proof_with_any_byte_changed_cut_or_lengthened_is_refused_and_accuses_nobody() {
        let leaves = [0, 5, 12];
        let length = prove(&accumulator_bytes(&values(50_000)), &leaves).unwrap().len();
        for at in (0..length).step_by(97).chain(0..9).chain([length - 1]) {
            let error = opened(50_000, &leaves, |proof| proof[at] ^= 1).unwrap_err();
            assert!(matches!(error, OpeningError::Proof { .. }), "{at}: {error}");
        }
        for kept in [0, 7, 8, 100, length - 1] {
            assert!(opened(50_000, &leaves, |proof| proof.truncate(kept)).is_err(), "{kept}");
        }
        let error = opened(50_000, &leaves, |proof| proof.push(0)).unwrap_err();
        assert!(error.to_string().contains("1 bytes after them"), "{error}");
    }

    #[test]
    fn other_leaves_than_those_asked_for_are_refused() {
        let (params, all) = (50_000, values(50_000));
        let root = Hash(accumulator_root(&all));
        let proof = prove(&accumulator_bytes(&all), &[3, 4]).unwrap();
        for asked in [&[4, 5][..], &[3], &[3, 4, 6], &[4, 3], &[3, 3], &[99], &[]] {
            let result = open_leaves(Which::Before, &proof, &root, params, asked);
            assert!(
                matches!(result, Err(OpeningError::Proof { .. })),
                "{asked:?}: {result:?}"
            );
        }
        let other = Hash(accumulator_root(&all[1..]));
        assert!(open_leaves(Which::Before, &proof, &other, params, &[3, 4]).is_err());
        assert!(open_leaves(Which::Before, &proof, &root, params + 1, &[3, 4]).is_err());
    }

    #[test]
    fn a_value_that_is_no_number_is_named_by_its_place_in_the_model() {
        let mut all = values(50_000);
        all[5 * ACCUMULATOR_LEAF + 7] = f32::NAN;
        let bytes = accumulator_bytes(&all);
        let proof = prove(&bytes, &[2, 5]).unwrap();
        let result = open_leaves(Which::Before, &proof, &Hash::of(&bytes), 50_000, &[2, 5]);
        assert!(
            matches!(result, Err(OpeningError::NotFinite { index, .. }) if index == 5 * ACCUMULATOR_LEAF + 7),
            "{result:?}"
        );
    }

    #[test]
    fn a_hundred_leaves_cost_little_whatever_the_model() {
        // 16 million values: 3907 leaves, twelve levels.
        let params = 16_000_000;
        let all = values(params);
        let bytes = accumulator_bytes(&all);
        let leaves: Vec<u64> = (0..100).map(|i| i * 39).collect();
        let began = std::time::Instant::now();
        let proof = prove(&bytes, &leaves).unwrap();
        let proving = began.elapsed();
        let began = std::time::Instant::now();
        let found = open_leaves(Which::After, &proof, &Hash::of(&bytes), params, &leaves).unwrap();
        let opening = began.elapsed();
        assert_eq!(found.len(), 100 * ACCUMULATOR_LEAF);
        println!(
            "100 of {} leaves: {} bytes, of which {} hashes and length; proven in {proving:?} (all hashed), opened in {opening:?}",
            leaf_count(params),
            proof.len(),
            proof.len() - 100 * LEAF_BYTES as usize
        );
        // At most a path of 64 bytes a level for each leaf, beside the leaf itself.
        assert!(
            proof.len() <= 8 + 100 * (LEAF_BYTES as usize + 12 * 64),
            "{}",
            proof.len()
        );
    }
}
