//! How a flat vector of parameters divides into chunks, blocks and shards. Everything follows from three agreed numbers, so
//! a contribution need not say it, and a liar cannot.
//!
//! A *chunk* is what one selection and one scale cover. A *block* is 64 chunks coded on their own, the unit that threads
//! share out. A *shard* is as many whole blocks as are sure to fit 4 MiB, the unit that peers fetch.

use std::ops::Range;

use super::entropy::max_gap_bits;

/// Chunks in a block.
pub(crate) const BLOCK_CHUNKS: usize = 64;

/// A shard is never longer than this, in bytes.
pub const MAX_SHARD_BYTES: usize = 4 << 20;

/// Bytes before the block lengths of a shard: version, quantiser, two zeros.
pub(crate) const HEADER: [u8; 4] = [1, 1, 0, 0];

/// Bytes of one block length.
pub(crate) const LENGTH_BYTES: usize = 4;

/// The three agreed numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) params: usize,
    pub(crate) chunk: usize,
    pub(crate) k: usize,
}

impl Geometry {
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

    /// No block of `chunks` chunks is longer, whatever it holds: Rice parameter, scales, gaps and signs.
    pub(crate) fn max_block_bytes(&self, chunks: usize) -> usize {
        let bits = max_gap_bits(self.chunk, self.k) + self.k as u64;
        1 + chunks + (chunks as u64 * bits).div_ceil(8) as usize
    }

    pub(crate) fn blocks_per_shard(&self) -> usize {
        (MAX_SHARD_BYTES - HEADER.len()) / (LENGTH_BYTES + self.max_block_bytes(BLOCK_CHUNKS))
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
        HEADER.len() + self.shard_blocks(shard).map(block).sum::<usize>()
    }
}
