//! From a pseudo-gradient to bytes. What every codec does stands in [`codec`], and a run chooses one: [`dense`], which sends every value, or
//! the one below, sparse top-k with error feedback, one scale a chunk, Rice-coded positions.
//!
//! Per flat chunk of 4096 parameters, with accumulator `e` and pseudo-gradient `d` (SparseLoCo, arXiv 2508.15706; DeMo, arXiv
//! 2411.19870; error feedback after Karimireddy et al., arXiv 1901.09847):
//!
//! 1. `a = fl(fl(beta * e) + d)`, no fused multiply-add.
//! 2. Select the k largest |a|, ties by lower index (`select`). Padding of the last chunk is never selected: a chunk
//!    shorter than k is sent whole.
//! 3. Quantise to sign and one logarithmic scale, the mean |a| of the selected ([`quantize`]). A mean too small for the
//!    smallest scale silences the chunk.
//! 4. `e' = fl(a - decoded)`, where `decoded` is exactly what every other peer decodes.
//! 5. Sort indices, Rice-code gaps, pack signs ([`entropy`], `block`), cut into shards.
//!
//! # Byte layout, version 1
//!
//! The number of parameters, the chunk length and k are agreed in the run config and not repeated. All of it is canonical:
//! one content has one encoding, and the decoder takes no other. Integers are little-endian.
//!
//! ```text
//! contribution = shard 0 | shard 1 | ...          each a blob of at most 4 MiB, holding whole blocks
//!
//! shard        ┌───────────┬─────────────┬───────┬───────────────────────────┬─────────┬─────────┬───
//!              │ version 1 │ quantizer 1 │ 0 │ 0 │ length of each block, u32 │ block 0 │ block 1 │ ...
//!              └───────────┴─────────────┴───────┴───────────────────────────┴─────────┴─────────┴───
//!                 1 byte      1 byte      2 bytes   4 bytes a block
//!
//! block        ┌────────────────┬──────────────────────┬──────────────────────────────────────┬─────────┐
//! (64 chunks)  │ Rice parameter │ scale code per chunk │ chunk 0: gaps, signs │ chunk 1 │ ... │ 0 bits  │
//!              └────────────────┴──────────────────────┴──────────────────────────────────────┴─────────┘
//!                 1 byte           1 byte a chunk         bits, lowest first in each byte         to a byte
//!
//! chunk        gap 0 | ... | gap n-1 | sign 0 | ... | sign n-1        n = min(k, length); nothing if its code is 0
//! gap          (gap >> p) zeros, a one, the low p bits                positions skipped since the last selected one
//! sign         0 plus, 1 minus
//! ```
//!
//! The Rice parameter is the one that codes its block in the fewest bits among four around the usual one, the smallest of
//! equals. At k = 64 of 4096 this makes 7.5 + 1 + 8/64 bits a value and 0.1% of framing: 0.0169 bytes a parameter.

pub mod accumulator;
pub(crate) mod block;
pub mod codec;
pub mod dense;
pub mod entropy;
mod error;
mod geometry;
pub mod int8;
pub mod levels;
pub(crate) mod parallel;
pub mod quantize;
pub mod reference;
pub(crate) mod select;
mod shard;
mod sparse;
pub mod whole;

pub use accumulator::{ACCUMULATOR_LEAF, accumulator_root, accumulator_zero_root};
pub use codec::{AnyCodec, Codec};
pub use dense::DenseCodec;
pub use error::{CodecError, DecodeError};
pub use geometry::MAX_SHARD_BYTES;
pub use int8::Int8Codec;
pub use levels::LevelsCodec;
pub use quantize::Quantizer;
pub use sparse::Decoded;
pub(crate) use sparse::norm_squared;

use std::ops::Range;

use block::{Block, BlockCoder, Chunk};
use geometry::Geometry;
use parallel::available_threads;
use select::Selector;

/// Encodes and decodes contributions to one model.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseCodec {
    geometry: Geometry,
    beta: f32,
}

/// A contribution and the accumulator it leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// The bytes to publish, each at most [`MAX_SHARD_BYTES`].
    pub shards: Vec<Vec<u8>>,
    /// `e'`, one value a parameter: kept if the contribution is counted, dropped for the old one if not.
    pub accumulator: Vec<f32>,
}

impl SparseCodec {
    /// A codec for `params` parameters: `k` values out of each `chunk`, accumulator decay `beta`.
    ///
    /// # Errors
    /// A setting outside its bounds: `params` 1 to 2^40, `chunk` a multiple of 64 up to 65536, `k` 1 to `chunk`, `beta` 0 to 1.
    pub fn new(params: usize, chunk: usize, k: usize, beta: f32) -> Result<Self, CodecError> {
        let geometry = Geometry::new(params, chunk, k, beta, Quantizer::Sign)?;
        Ok(Self { geometry, beta })
    }

    /// Parameters of the model.
    #[must_use]
    pub fn params(&self) -> usize {
        self.geometry.params
    }

    /// Parameters in a chunk.
    #[must_use]
    pub fn chunk(&self) -> usize {
        self.geometry.chunk
    }

    /// Values sent of each chunk.
    #[must_use]
    pub fn k(&self) -> usize {
        self.geometry.k
    }

    /// The same where `k` values of a chunk are sent.
    fn with_k(&self, k: usize) -> Self {
        Self {
            geometry: self.geometry.with_k(k),
            beta: self.beta,
        }
    }

    /// Decay of the accumulator.
    #[must_use]
    pub fn beta(&self) -> f32 {
        self.beta
    }

    /// Shards of every contribution to this model.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        self.geometry.shards()
    }

    /// The longest that shard number `shard` can be, in bytes; zero for one that does not exist.
    #[must_use]
    pub fn max_shard_bytes(&self, shard: usize) -> u64 {
        if shard < self.shard_count() {
            self.geometry.max_shard_bytes(shard) as u64
        } else {
            0
        }
    }

    /// The longest that a whole contribution can be, in bytes: the limit for a commit's `len`.
    #[must_use]
    pub fn max_total_bytes(&self) -> u64 {
        (0..self.shard_count()).map(|shard| self.max_shard_bytes(shard)).sum()
    }

    /// Encodes a pseudo-gradient, on all cores.
    ///
    /// `accumulator` is e (zeros for a newcomer) and `delta` is d, one value a parameter each.
    ///
    /// # Errors
    /// An input of the wrong length, or a sum that is not finite.
    pub fn encode(&self, accumulator: &[f32], delta: &[f32]) -> Result<Encoded, CodecError> {
        self.encode_with(accumulator, delta, available_threads())
    }

    /// [`SparseCodec::encode`] on at most `threads` threads; the result is the same for any number.
    ///
    /// # Errors
    /// As [`SparseCodec::encode`].
    pub fn encode_with(&self, accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        self.encode_into(accumulator, delta, threads, Vec::new())
    }

    /// [`SparseCodec::encode_with`] that writes the new accumulator into the buffer of an older one, whatever it holds: for
    /// large models, getting fresh memory from the system takes longer than encoding.
    ///
    /// # Errors
    /// As [`SparseCodec::encode`].
    pub fn encode_into(
        &self,
        accumulator: &[f32],
        delta: &[f32],
        threads: usize,
        next: Vec<f32>,
    ) -> Result<Encoded, CodecError> {
        encode_by(
            self.geometry,
            accumulator,
            delta,
            threads,
            next,
            |blocks, accumulator, delta, next| self.encode_blocks(blocks, accumulator, delta, next),
        )
    }

    /// Decodes strictly and keeps nothing.
    ///
    /// # Errors
    /// Anything that [`SparseCodec::encode`] cannot have written: see [`DecodeError`].
    pub fn check(&self, shards: &[impl AsRef<[u8]>]) -> Result<(), DecodeError> {
        let mut coder = BlockCoder::new(self.geometry);
        let blocks = self.geometry.split_shards(shards)?;
        blocks
            .iter()
            .enumerate()
            .try_for_each(|(block, bytes)| coder.unpack(block, bytes, |_| ()))
    }

    /// Decodes strictly to sparse values.
    ///
    /// # Errors
    /// As [`SparseCodec::check`].
    pub fn decode(&self, shards: &[impl AsRef<[u8]>]) -> Result<Decoded, DecodeError> {
        let mut coder = BlockCoder::new(self.geometry);
        let mut blocks = Vec::with_capacity(self.geometry.blocks());
        for (block, bytes) in self.geometry.split_shards(shards)?.into_iter().enumerate() {
            let mut content = Block::default();
            coder.unpack(block, bytes, |chunk| content.push(chunk))?;
            blocks.push(content);
        }
        Ok(Decoded::new(self.geometry, blocks))
    }

    /// Writes sparse values of this codec back to bytes: the same that they were decoded from.
    ///
    /// # Errors
    /// [`CodecError::Length`] if they belong to a model of another size or another chunk length or k.
    pub fn pack(&self, decoded: &Decoded) -> Result<Vec<Vec<u8>>, CodecError> {
        if decoded.geometry() != self.geometry {
            let (expected, found) = (self.params(), decoded.geometry().params);
            return Err(CodecError::Length {
                what: "the content, or its codec,",
                expected,
                found,
            });
        }
        let mut coder = BlockCoder::new(self.geometry);
        let pack = |(block, content): (usize, &Block)| {
            let mut bytes = Vec::new();
            coder.pack(block, content, &mut bytes);
            bytes
        };
        let parts: Vec<Vec<u8>> = decoded.blocks().iter().enumerate().map(pack).collect();
        Ok(self.geometry.join_shards(&parts))
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Encodes a range of blocks; the slices begin with its first parameter. Returns the bytes of each.
    fn encode_blocks(
        &self,
        blocks: Range<usize>,
        accumulator: &[f32],
        delta: &[f32],
        next: &mut [f32],
    ) -> Result<Vec<Vec<u8>>, CodecError> {
        let first = self.geometry.blocks_params(blocks.clone()).start;
        let mut scratch = Scratch::default();
        let mut coder = BlockCoder::new(self.geometry);
        let mut content = Block::default();
        let mut encoded = Vec::with_capacity(blocks.len());
        for block in blocks {
            content.clear();
            for number in self.geometry.block_chunks(block) {
                let params = self.geometry.chunk_params(number);
                let range = params.start - first..params.end - first;
                let next = &mut next[range.clone()];
                accumulate(
                    self.beta,
                    &accumulator[range.clone()],
                    &delta[range],
                    next,
                    params.start,
                )?;
                content.push(scratch.quantize(number, self.k(), next));
            }
            let mut bytes = Vec::with_capacity(self.geometry.max_block_bytes(content.codes.len()));
            coder.pack(block, &content, &mut bytes);
            encoded.push(bytes);
        }
        Ok(encoded)
    }
}

/// Encodes all blocks on at most `threads` threads. `encode` is given a range of blocks and the parts of accumulator, pseudo-gradient and new accumulator
/// that begin with its first parameter, and returns the bytes of each block.
fn encode_by(
    geometry: Geometry,
    accumulator: &[f32],
    delta: &[f32],
    threads: usize,
    mut next: Vec<f32>,
    encode: impl Fn(Range<usize>, &[f32], &[f32], &mut [f32]) -> Result<Vec<Vec<u8>>, CodecError> + Sync,
) -> Result<Encoded, CodecError> {
    check_length(geometry.params, "the accumulator", accumulator)?;
    check_length(geometry.params, "the pseudo-gradient", delta)?;
    resize(&mut next, geometry.params);
    let (encode, mut rest) = (&encode, &mut next[..]);
    let mut jobs = Vec::new();
    for blocks in parallel::split(geometry.blocks(), threads) {
        let range = geometry.blocks_params(blocks.clone());
        let part;
        (part, rest) = rest.split_at_mut(range.len());
        jobs.push(move || encode(blocks, &accumulator[range.clone()], &delta[range], part));
    }
    let mut parts = Vec::with_capacity(geometry.blocks());
    for part in parallel::run(jobs) {
        parts.extend(part?);
    }
    Ok(Encoded {
        shards: geometry.join_shards(&parts),
        accumulator: next,
    })
}

/// `a = fl(fl(beta * e) + d)`, written to `next`; the first parameter is number `first`. Refuses a sum that is not finite.
fn accumulate(beta: f32, accumulator: &[f32], delta: &[f32], next: &mut [f32], first: usize) -> Result<(), CodecError> {
    let mut bad = false;
    for ((next, e), d) in next.iter_mut().zip(accumulator).zip(delta) {
        *next = beta * e + d;
        bad |= !next.is_finite();
    }
    match next.iter().enumerate().find(|(_, value)| bad && !value.is_finite()) {
        Some((index, value)) => Err(CodecError::NotFinite {
            index: first + index,
            value: *value,
        }),
        None => Ok(()),
    }
}

fn check_length(expected: usize, what: &'static str, values: &[f32]) -> Result<(), CodecError> {
    match values.len() {
        found if expected == found => Ok(()),
        found => Err(CodecError::Length { what, expected, found }),
    }
}

/// Makes a buffer `length` long. Its content is whatever was there; an empty one is taken from the system, already zero.
pub(crate) fn resize<T: Clone + Default>(buffer: &mut Vec<T>, length: usize) {
    if buffer.is_empty() {
        *buffer = vec![T::default(); length];
    }
    buffer.resize(length, T::default());
}

/// Buffers of one thread that encodes.
#[derive(Debug, Default)]
struct Scratch {
    selector: Selector,
    indices: Vec<u16>,
    signs: Vec<u64>,
}

impl Scratch {
    /// Selects and quantises the values of one chunk, and leaves in them what the others will not see.
    fn quantize(&mut self, number: usize, k: usize, values: &mut [f32]) -> Chunk<'_> {
        self.selector.top_k(values, k.min(values.len()), &mut self.indices);
        self.signs.clear();
        let magnitude = |index: &u16| f64::from(values[usize::from(*index)].abs());
        // Summed in the order of the indices: part of the definition, for floats do not associate.
        let mean = self.indices.iter().map(magnitude).sum::<f64>() / self.indices.len() as f64;
        let code = quantize::scale_code(mean);
        if code == 0 {
            self.indices.clear();
            return Chunk {
                number,
                code,
                indices: &self.indices,
                signs: &self.signs,
            };
        }
        let scale = quantize::scale_value(code);
        for indices in self.indices.chunks(64) {
            let mut signs = 0;
            for (bit, index) in indices.iter().enumerate() {
                let value = &mut values[usize::from(*index)];
                let negative = *value < 0.0;
                signs |= u64::from(negative) << bit;
                *value -= if negative { -scale } else { scale };
            }
            self.signs.push(signs);
        }
        Chunk {
            number,
            code,
            indices: &self.indices,
            signs: &self.signs,
        }
    }
}
