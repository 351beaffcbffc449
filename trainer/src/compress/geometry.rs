//! How a flat vector of parameters divides into chunks, blocks and shards. Everything follows from three agreed numbers, so
//! a contribution need not say it, and a liar cannot.
//!
//! A *chunk* is what one selection and one scale cover. A *block* is 64 chunks coded on their own, the unit that threads
//! share out. A *shard* is as many whole blocks as are sure to fit 4 MiB, the unit that peers fetch.

use std::ops::Range;

use super::CodecError;
use super::entropy::max_gap_bits;
use super::quantize::Quantizer;

/// Chunks in a block.
pub(crate) const BLOCK_CHUNKS: usize = 64;

/// A shard is never longer than this, in bytes.
pub const MAX_SHARD_BYTES: usize = 4 << 20;

/// Bytes before the block lengths of a shard: version, quantiser, two zeros.
pub(crate) const HEADER_BYTES: usize = 4;

/// Bytes of one block length.
pub(crate) const LENGTH_BYTES: usize = 4;

/// The three agreed numbers, and what is said of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) params: usize,
    pub(crate) chunk: usize,
    pub(crate) k: usize,
    pub(crate) quantizer: Quantizer,
}

impl Geometry {
    /// The geometry of a codec whose accumulator decays by `beta`, if all of that is within its bounds.
    pub(crate) fn new(
        params: usize,
        chunk: usize,
        k: usize,
        beta: f32,
        quantizer: Quantizer,
    ) -> Result<Self, CodecError> {
        if chunk == 0 || !chunk.is_multiple_of(64) || chunk > 1 << 16 {
            return Err(CodecError::ChunkLength { found: chunk });
        }
        if k == 0 || k > chunk {
            return Err(CodecError::K { chunk, found: k });
        }
        if !(0.0..=1.0).contains(&beta) {
            return Err(CodecError::Beta { found: beta });
        }
        if params == 0 || params as u64 > 1 << 40 {
            return Err(CodecError::Params { found: params });
        }
        Ok(Self {
            params,
            chunk,
            k,
            quantizer,
        })
    }

    /// The same with another `k`, brought within its bounds.
    pub(crate) fn with_k(self, k: usize) -> Self {
        let k = k.clamp(1, self.chunk);
        Self { k, ..self }
    }

    /// What every shard begins with.
    pub(crate) fn header(&self) -> [u8; HEADER_BYTES] {
        let quantizer = match self.quantizer {
            Quantizer::Sign => 1,
            // 2 and 3 are those of every value, as it is and in eight bits.
            Quantizer::Sign2 => 4,
            Quantizer::Raw => 5,
        };
        [1, quantizer, 0, 0]
    }

    pub(crate) fn chunks(&self) -> usize {
        self.params.div_ceil(self.chunk)
    }

    /// Parameters of a chunk; the last may be short, and what pads it to full length is never selected.
    pub(crate) fn chunk_params(&self, chunk: usize) -> Range<usize> {
        chunk * self.chunk..((chunk + 1) * self.chunk).min(self.params)
    }

    pub(crate) fn blocks(&self) -> usize {
        self.chunks().div_ceil(BLOCK_CHUNKS)
    }

    pub(crate) fn block_chunks(&self, block: usize) -> Range<usize> {
        block * BLOCK_CHUNKS..((block + 1) * BLOCK_CHUNKS).min(self.chunks())
    }

    /// Parameters of a range of blocks.
    pub(crate) fn blocks_params(&self, blocks: Range<usize>) -> Range<usize> {
        let params = |block: usize| (block * BLOCK_CHUNKS * self.chunk).min(self.params);
        params(blocks.start)..params(blocks.end)
    }

    /// No block of `chunks` chunks is longer, whatever it holds: Rice parameter, scales, gaps, and what is said of each value.
    pub(crate) fn max_block_bytes(&self, chunks: usize) -> usize {
        let (codes, value_bits) = match self.quantizer {
            Quantizer::Sign => (1, 1),
            Quantizer::Sign2 => (2, 2),
            Quantizer::Raw => (0, 32),
        };
        let bits = max_gap_bits(self.chunk, self.k) + value_bits * self.k as u64;
        1 + codes * chunks + (chunks as u64 * bits).div_ceil(8) as usize
    }

    pub(crate) fn blocks_per_shard(&self) -> usize {
        (MAX_SHARD_BYTES - HEADER_BYTES) / (LENGTH_BYTES + self.max_block_bytes(BLOCK_CHUNKS))
    }

    pub(crate) fn shards(&self) -> usize {
        self.blocks().div_ceil(self.blocks_per_shard())
    }

    pub(crate) fn shard_blocks(&self, shard: usize) -> Range<usize> {
        let per_shard = self.blocks_per_shard();
        shard * per_shard..((shard + 1) * per_shard).min(self.blocks())
    }

    /// No encoding of this shard is longer.
    pub(crate) fn max_shard_bytes(&self, shard: usize) -> usize {
        let block = |block| LENGTH_BYTES + self.max_block_bytes(self.block_chunks(block).len());
        HEADER_BYTES + self.shard_blocks(shard).map(block).sum::<usize>()
    }
}
