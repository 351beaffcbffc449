//! One block: 64 chunks' codes, indices and signs, to bytes and strictly back. The layout is drawn in [`super`].

use super::DecodeError;
use super::entropy::{BadEnd, BitReader, BitWriter, RiceCosts};
use super::geometry::Geometry;

/// What a block says. A chunk of code 0 has no indices and no signs, any other exactly `min(k, length)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Block {
    /// One scale code a chunk.
    pub(crate) codes: Vec<u8>,
    /// Positions within their chunk, sorted, chunk after chunk.
    pub(crate) indices: Vec<u16>,
    /// A set bit is a negative value. Every chunk that speaks starts a new word.
    pub(crate) signs: Vec<u64>,
}

/// What one chunk says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk<'a> {
    /// Number of the chunk in the whole vector.
    pub(crate) number: usize,
    pub(crate) code: u8,
    pub(crate) indices: &'a [u16],
    pub(crate) signs: &'a [u64],
}

impl Chunk<'_> {
    /// Calls `each` with the position of every value and whether it is negative.
    #[inline]
    pub(crate) fn for_each(&self, mut each: impl FnMut(usize, bool)) {
        for (indices, signs) in self.indices.chunks(64).zip(self.signs) {
            let mut signs = *signs;
            for index in indices {
                each(usize::from(*index), signs & 1 == 1);
                signs >>= 1;
            }
        }
    }
}

impl Block {
    pub(crate) fn clear(&mut self) {
        self.codes.clear();
        self.indices.clear();
        self.signs.clear();
    }

    /// Adds a chunk; one of code 0 must say nothing.
    pub(crate) fn push(&mut self, chunk: Chunk<'_>) {
        self.codes.push(chunk.code);
        self.indices.extend_from_slice(chunk.indices);
        self.signs.extend_from_slice(chunk.signs);
    }

    /// The chunks of this block, which is number `block` of its vector.
    pub(crate) fn chunks(&self, geometry: Geometry, block: usize) -> impl Iterator<Item = Chunk<'_>> {
        let (mut indices, mut signs) = (&self.indices[..], &self.signs[..]);
        geometry
            .block_chunks(block)
            .zip(&self.codes)
            .map(move |(number, code)| {
                let count = if *code == 0 {
                    0
                } else {
                    geometry.k.min(geometry.chunk_params(number).len())
                };
                let chunk_indices;
                let chunk_signs;
                (chunk_indices, indices) = indices.split_at(count);
                (chunk_signs, signs) = signs.split_at(count.div_ceil(64));
                Chunk {
                    number,
                    code: *code,
                    indices: chunk_indices,
                    signs: chunk_signs,
                }
            })
    }
}

/// Writes and reads blocks of one geometry, reusing its buffers.
#[derive(Clone, Debug)]
pub struct BlockCoder {
    geometry: Geometry,
    costs: RiceCosts,
    gaps: Vec<u16>,
    indices: Vec<u16>,
    signs: Vec<u64>,
}

impl BlockCoder {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let costs = RiceCosts::new(geometry.chunk, geometry.k);
        Self {
            geometry,
            costs,
            gaps: Vec::new(),
            indices: Vec::new(),
            signs: Vec::new(),
        }
    }

    /// Appends the bytes of `content`, which is block number `block`.
    pub(crate) fn pack(&mut self, block: usize, content: &Block, out: &mut Vec<u8>) {
        self.costs.clear();
        self.gaps.clear();
        for chunk in content.chunks(self.geometry, block) {
            let start = self.gaps.len();
            let mut next = 0;
            self.gaps.extend(chunk.indices.iter().map(|index| {
                let gap = u32::from(*index) - next;
                next = u32::from(*index) + 1;
                gap as u16
            }));
            self.costs.add(&self.gaps[start..]);
        }
        let parameter = self.costs.best();
        out.push(parameter as u8);
        out.extend_from_slice(&content.codes);
        let mut writer = BitWriter::new(out);
        let mut gaps = &self.gaps[..];
        for chunk in content.chunks(self.geometry, block) {
            let chunk_gaps;
            (chunk_gaps, gaps) = gaps.split_at(chunk.indices.len());
            for gap in chunk_gaps {
                writer.push_gap(*gap, parameter);
            }
            for (signs, count) in chunk.signs.iter().zip(sign_counts(chunk.indices.len())) {
                writer.push(*signs, count);
            }
        }
        writer.finish();
    }

    /// Reads block number `block` and calls `visit` with each of its chunks, those of code 0 included.
    ///
    /// # Errors
    /// Any byte that [`BlockCoder::pack`] would not have written, though chunks before it may have been visited.
    #[inline]
    pub(crate) fn unpack(
        &mut self,
        block: usize,
        bytes: &[u8],
        mut visit: impl FnMut(Chunk<'_>),
    ) -> Result<(), DecodeError> {
        let chunks = self.geometry.block_chunks(block);
        let (parameter, codes, bits) = split_block(block, chunks.len(), bytes)?;
        // A parameter that no author may choose would only fail at the end; refused now, shifts by it are in bounds.
        if parameter > 15 {
            return Err(DecodeError::RiceParameter {
                block,
                expected: self.costs.best() as u8,
                found: parameter as u8,
            });
        }
        self.costs.clear();
        let mut reader = BitReader::new(bits);
        for (number, code) in chunks.zip(codes) {
            let count = if *code == 0 {
                0
            } else {
                self.geometry.k.min(self.geometry.chunk_params(number).len())
            };
            self.read_chunk(&mut reader, parameter, number, count)?;
            visit(Chunk {
                number,
                code: *code,
                indices: &self.indices,
                signs: &self.signs,
            });
        }
        reader.finish().map_err(|end| match end {
            BadEnd::Short => DecodeError::BlockEndsEarly { block },
            BadEnd::Long => DecodeError::BlockEndsLate { block },
            BadEnd::Padding => DecodeError::Padding { block },
        })?;
        match self.costs.best() {
            best if best == parameter => Ok(()),
            best => Err(DecodeError::RiceParameter {
                block,
                expected: best as u8,
                found: parameter as u8,
            }),
        }
    }

    #[inline]
    fn read_chunk(
        &mut self,
        reader: &mut BitReader<'_>,
        parameter: u32,
        number: usize,
        count: usize,
    ) -> Result<(), DecodeError> {
        let limit = self.geometry.chunk_params(number).len() as u64;
        self.gaps.resize(count, 0);
        self.indices.resize(count, 0);
        let mut next = 0;
        for (gap, index) in self.gaps.iter_mut().zip(&mut self.indices) {
            let read = reader.gap(parameter).unwrap_or(limit);
            // Gaps count what lies between, so indices are sorted and unique by construction; only the end must be watched.
            let position = next + read;
            if position >= limit {
                return Err(DecodeError::IndexOutOfRange { chunk: number, limit });
            }
            (*gap, *index) = (read as u16, position as u16);
            next = position + 1;
        }
        self.costs.add(&self.gaps);
        self.signs.clear();
        self.signs.extend(sign_counts(count).map(|count| reader.take(count)));
        Ok(())
    }
}

/// Bits of each sign word of a chunk with `count` values.
fn sign_counts(count: usize) -> impl Iterator<Item = u32> {
    (0..count.div_ceil(64)).map(move |word| (count - 64 * word).min(64) as u32)
}

/// The parts of a block: Rice parameter, scale codes, bits.
///
/// # Errors
/// The block is too short for its parameter and codes.
pub(crate) fn split_block(block: usize, chunks: usize, bytes: &[u8]) -> Result<(u32, &[u8], &[u8]), DecodeError> {
    let early = DecodeError::BlockEndsEarly { block };
    let Some((parameter, rest)) = bytes.split_first() else {
        return Err(early);
    };
    match rest.split_at_checked(chunks) {
        Some((codes, bits)) => Ok((u32::from(*parameter), codes, bits)),
        None => Err(early),
    }
}
