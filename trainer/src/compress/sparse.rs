//! A decoded contribution: sparse values, as every peer sees them.

use super::block::{Block, Chunk};
use super::entropy::{entropy_bits, log2_binomial};
use super::geometry::Geometry;
use super::quantize::{SCALES, scale_value};

/// The content of one contribution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    geometry: Geometry,
    blocks: Vec<Block>,
}

impl Decoded {
    pub(crate) fn new(geometry: Geometry, blocks: Vec<Block>) -> Self {
        Self { geometry, blocks }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        self.blocks
            .iter()
            .enumerate()
            .flat_map(|(number, block)| block.chunks(self.geometry, number))
    }

    /// Number of values sent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.iter().map(|block| block.indices.len()).sum()
    }

    /// Whether every chunk is silent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scale code of every chunk; 0 for a silent one.
    pub fn scale_codes(&self) -> impl Iterator<Item = u8> {
        self.blocks.iter().flat_map(|block| block.codes.iter().copied())
    }

    /// Calls `each` with every parameter sent, in order, and its value.
    pub fn for_each(&self, mut each: impl FnMut(usize, f32)) {
        for chunk in self.chunks() {
            let (first, scale) = (chunk.number * self.geometry.chunk, scale_value(chunk.code));
            chunk.for_each(|index, negative| each(first + index, if negative { -scale } else { scale }));
        }
    }

    /// All values, zero where nothing was sent: one a parameter.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.geometry.params];
        self.for_each(|param, value| dense[param] = value);
        dense
    }

    /// Sum of squared values in units of `2^-64`, exact: fewer than 2^41 values of at most 2^72 each fit easily.
    #[must_use]
    pub fn norm_squared(&self) -> u128 {
        self.chunks()
            .map(|chunk| norm_squared(chunk.code, chunk.indices.len()))
            .sum()
    }

    /// The fewest bytes that could carry this content if positions and signs are taken as random and scale codes as drawn
    /// from their own histogram: what the codec is measured against.
    #[must_use]
    pub fn entropy_bytes(&self) -> f64 {
        let mut codes = [0; 256];
        let mut bits = 0.0;
        let mut full_chunk_bits = None;
        for chunk in self.chunks() {
            codes[usize::from(chunk.code)] += 1;
            let (length, sent) = (self.geometry.chunk_params(chunk.number).len(), chunk.indices.len());
            let chunk_bits = || log2_binomial(length, sent) + sent as f64;
            bits += match sent {
                0 => 0.0,
                _ if length == self.geometry.chunk => *full_chunk_bits.get_or_insert_with(chunk_bits),
                _ => chunk_bits(),
            };
        }
        (bits + entropy_bits(&codes) * codes.iter().sum::<u64>() as f64) / 8.0
    }
}

/// Squared norm of `count` values of one scale, in units of `2^-64`.
pub(crate) fn norm_squared(code: u8, count: usize) -> u128 {
    let scale = u128::from(SCALES[usize::from(code)]);
    scale * scale * count as u128
}
