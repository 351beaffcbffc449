//! Blocks joined to shards, and shards taken apart again: headers and lengths only. The layout is drawn in [`super`].

use super::DecodeError;
use super::geometry::{Geometry, HEADER_BYTES, LENGTH_BYTES};

impl Geometry {
    /// Cuts the bytes of all blocks into shards.
    pub(crate) fn join_shards(&self, blocks: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let shard = |shard| {
            let blocks = &blocks[self.shard_blocks(shard)];
            let bytes = blocks.iter().map(|block| LENGTH_BYTES + block.len()).sum::<usize>();
            let mut out = Vec::with_capacity(HEADER_BYTES + bytes);
            out.extend_from_slice(&self.header());
            out.extend(blocks.iter().flat_map(|block| (block.len() as u32).to_le_bytes()));
            blocks.iter().for_each(|block| out.extend_from_slice(block));
            out
        };
        (0..self.shards()).map(shard).collect()
    }

    /// Finds the bytes of every block. Reads headers and lengths only.
    pub(crate) fn split_shards<'a>(&self, shards: &'a [impl AsRef<[u8]>]) -> Result<Vec<&'a [u8]>, DecodeError> {
        if shards.len() != self.shards() {
            return Err(DecodeError::ShardCount {
                expected: self.shards(),
                found: shards.len(),
            });
        }
        let mut blocks = Vec::with_capacity(self.blocks());
        for (shard, bytes) in shards.iter().enumerate() {
            self.split_shard(shard, bytes.as_ref(), &mut blocks)?;
        }
        Ok(blocks)
    }

    fn split_shard<'a>(&self, shard: usize, bytes: &'a [u8], blocks: &mut Vec<&'a [u8]>) -> Result<(), DecodeError> {
        let found = &bytes[..HEADER_BYTES.min(bytes.len())];
        if found != self.header() {
            return Err(DecodeError::Header {
                shard,
                expected: self.header(),
                found: found.to_vec(),
            });
        }
        let numbers = self.shard_blocks(shard);
        let lengths_bytes = LENGTH_BYTES * numbers.len();
        let Some((lengths, mut rest)) = bytes[HEADER_BYTES..].split_at_checked(lengths_bytes) else {
            let expected = (HEADER_BYTES + lengths_bytes) as u64;
            return Err(DecodeError::ShardLength {
                shard,
                expected,
                found: bytes.len(),
            });
        };
        let (lengths, _) = lengths.as_chunks::<LENGTH_BYTES>();
        let claimed = lengths
            .iter()
            .map(|length| u64::from(u32::from_le_bytes(*length)))
            .sum::<u64>();
        let expected = (HEADER_BYTES + lengths_bytes) as u64 + claimed;
        if expected != bytes.len() as u64 {
            return Err(DecodeError::ShardLength {
                shard,
                expected,
                found: bytes.len(),
            });
        }
        for (block, length) in numbers.zip(lengths) {
            let length = u32::from_le_bytes(*length) as usize;
            let limit = self.max_block_bytes(self.block_chunks(block).len());
            if length > limit {
                return Err(DecodeError::BlockLength {
                    block,
                    limit,
                    found: length,
                });
            }
            let bytes;
            (bytes, rest) = rest.split_at(length);
            blocks.push(bytes);
        }
        Ok(())
    }
}
