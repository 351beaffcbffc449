//! The commitment to an accumulator: BLAKE3 of its values as little-endian f32, in order.
//!
//! BLAKE3 is itself a Merkle tree. One codec chunk of 4096 values is 16 KiB, the chunk group that verified streaming works in, so
//! single chunks can be opened against this root as verified slices, and the whole accumulator can be fetched from its owner by it.
//! Values are hashed by their bits: -0.0 is not 0.0.

/// Values in one opening: a chunk group of BLAKE3's verified streaming.
pub const ACCUMULATOR_LEAF: usize = 4096;

/// Root of an accumulator.
#[must_use]
pub fn accumulator_root(values: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(ACCUMULATOR_LEAF * 4);
    for leaf in values.chunks(ACCUMULATOR_LEAF) {
        bytes.clear();
        bytes.extend(leaf.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update(&bytes);
    }
    *hasher.finalize().as_bytes()
}

/// The root of `params` zeros: what a newcomer starts from, and whoever declares its accumulator lost.
#[must_use]
pub fn accumulator_zero_root(params: usize) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let zeros = [0u8; ACCUMULATOR_LEAF * 4];
    let mut left = params * 4;
    while left > 0 {
        let now = left.min(zeros.len());
        hasher.update(&zeros[..now]);
        left -= now;
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_the_hash_of_the_bytes_whatever_the_length() {
        for len in [0usize, 1, 4095, 4096, 4097, 10_000] {
            let values: Vec<f32> = (0..len).map(|i| i as f32 * 0.5 - 3.0).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(accumulator_root(&values), *blake3::hash(&bytes).as_bytes());
            assert_eq!(accumulator_zero_root(len), accumulator_root(&vec![0.0; len]));
        }
    }

    #[test]
    fn a_single_bit_changes_the_root() {
        assert_ne!(accumulator_root(&[0.0, 1.0]), accumulator_root(&[-0.0, 1.0]));
    }
}
