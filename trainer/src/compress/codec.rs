//! What every codec of contributions does: pseudo-gradients to bytes for one peer, bytes of many to one integer sum for all. The run
//! config chooses one ([`AnyCodec`]); [`crate::aggregate`] knows only this trait.

use std::borrow::Cow;
use std::ops::Range;

use super::block::{BlockCoder, split_block};
use super::dense::DenseCodec;
use super::geometry::Geometry;
use super::int8::Int8Codec;
use super::levels::{LevelsCodec, LevelsReader};
use super::parallel::available_threads;
use super::quantize::{Quantizer, SCALES};
use super::{CodecError, DecodeError, Encoded, SparseCodec, norm_squared};
use crate::config::CompressionConfig;

/// Fraction bits of a clip factor.
pub const CLIP_BITS: u32 = 32;

/// Encodes pseudo-gradients of one model, and adds up what others encoded.
///
/// A contribution is cut into shards, which peers fetch, and within them into blocks, which threads share out. Values are integers in
/// units of `2^-32`, below `2^36` in magnitude.
pub trait Codec: Sync {
    /// What one thread needs to read blocks.
    type Reader;
    /// What one contribution's values are multiplied by, prepared.
    type Factor: Sync;

    /// Parameters of the model.
    fn params(&self) -> usize;
    /// The longest that a whole contribution can be, in bytes.
    fn max_total_bytes(&self) -> u64;
    /// Encodes accumulator and pseudo-gradient on at most `threads` threads; the result is the same for any number.
    ///
    /// # Errors
    /// An input of the wrong length, or a value that is not finite.
    fn encode_with(&self, accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError>;
    /// [`Codec::encode_with`] on all cores.
    ///
    /// # Errors
    /// As there.
    fn encode(&self, accumulator: &[f32], delta: &[f32]) -> Result<Encoded, CodecError> {
        self.encode_with(accumulator, delta, available_threads())
    }
    /// Decodes strictly and keeps nothing.
    ///
    /// # Errors
    /// Anything that [`Codec::encode_with`] cannot have written.
    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError>;
    /// Decodes strictly to one value a parameter.
    ///
    /// # Errors
    /// As [`Codec::check`].
    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError>;

    /// Blocks of a contribution.
    fn blocks(&self) -> usize;
    /// Parameters of a range of blocks.
    fn blocks_params(&self, blocks: Range<usize>) -> Range<usize>;
    /// Finds the bytes of every block; reads headers and lengths only.
    ///
    /// # Errors
    /// Shards or blocks of a length that cannot be.
    fn split<'a, S: AsRef<[u8]>>(&self, shards: &'a [S]) -> Result<Vec<&'a [u8]>, DecodeError>;
    /// The largest that a value of each chunk may count as, from what contributions of these weights say; none, where a codec has no scales.
    ///
    /// # Errors
    /// The place of a contribution that does not decode, where it has to read it.
    fn caps(&self, _contributions: &[Vec<&[u8]>], _weights: &[u64]) -> Result<Caps, (usize, DecodeError)> {
        Ok(Caps::default())
    }
    /// The squared norm in units of `2^-64`, exact; with values above the caps cut off.
    ///
    /// # Errors
    /// Where it has to read what does not decode.
    fn norm_squared(&self, blocks: &[&[u8]], caps: &Caps) -> Result<u128, DecodeError>;
    /// A reader for one thread.
    fn reader(&self) -> Self::Reader;
    /// Prepares `floor(value * clip * weight / 2^32)`: `clip` is at most `2^32`, and value, weight and peers have 62 bits together.
    fn factor(&self, clip: u64, weight: u64) -> Self::Factor;
    /// Adds the values of a block to its parameters' sums.
    ///
    /// # Errors
    /// As [`Codec::check`].
    fn add(
        &self,
        reader: &mut Self::Reader,
        block: usize,
        bytes: &[u8],
        factor: &Self::Factor,
        caps: &Caps,
        sums: &mut [i64],
    ) -> Result<(), DecodeError>;
    /// The inner product of a block's values, in units of `2^-32`, with their parameters' sums, each divided by `2^`[`INNER_BITS`] and rounded down;
    /// with values above the caps cut off.
    ///
    /// # Errors
    /// As [`Codec::check`].
    fn inner(
        &self,
        reader: &mut Self::Reader,
        block: usize,
        bytes: &[u8],
        caps: &Caps,
        sums: &[i64],
    ) -> Result<i128, DecodeError>;
}

/// The highest scale code that counts in each chunk of the model; nothing is cut off where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caps(Vec<u8>);

impl Caps {
    /// Codes above the median that still count in full: an octave, twice the median's scale. Scales of honest peers in one chunk are closer.
    const SLACK: u8 = 8;

    /// Caps above the medians of what contributions say: `codes` reads the scale code of every chunk of a block.
    ///
    /// # Errors
    /// The place of a contribution that does not decode.
    pub(super) fn of<'a>(
        geometry: Geometry,
        contributions: &[Vec<&'a [u8]>],
        weights: &[u64],
        codes: impl Fn(usize, &'a [u8]) -> Result<Cow<'a, [u8]>, DecodeError>,
    ) -> Result<Self, (usize, DecodeError)> {
        let mut caps = Vec::with_capacity(geometry.chunks());
        let mut voices = Vec::with_capacity(contributions.len());
        for block in 0..geometry.blocks() {
            let own = contributions.iter().enumerate();
            let own = own.map(|(place, blocks)| codes(block, blocks[block]).map_err(|error| (place, error)));
            let said = own.collect::<Result<Vec<_>, _>>()?;
            for chunk in 0..geometry.block_chunks(block).len() {
                voices.clear();
                let of = said.iter().zip(weights).map(|(codes, weight)| (codes[chunk], *weight));
                voices.extend(of.filter(|(code, weight)| *code > 0 && *weight > 0));
                caps.push(median_code(&mut voices).saturating_add(Self::SLACK));
            }
        }
        Ok(Self(caps))
    }

    pub(super) fn cut(&self, chunk: usize, code: u8) -> u8 {
        self.0.get(chunk).map_or(code, |cap| code.min(*cap))
    }
}

/// The lower weighted median of codes that are not zero: 0 if there is none. `voices` is left sorted.
fn median_code(voices: &mut [(u8, u64)]) -> u8 {
    voices.sort_unstable();
    let total: u128 = voices.iter().map(|(_, weight)| u128::from(*weight)).sum();
    let mut below = 0;
    for (code, weight) in voices {
        below += u128::from(*weight);
        if 2 * below >= total {
            return *code;
        }
    }
    0
}

/// Bits that a sum loses before it is multiplied by a value: 38 are left, and fewer than 2^41 products below 2^74 stay below 2^115.
pub const INNER_BITS: u32 = 24;

/// What each scale code of one contribution adds to a sum.
pub struct Table([i64; 256]);

impl Codec for SparseCodec {
    type Reader = BlockCoder;
    type Factor = Table;

    fn params(&self) -> usize {
        self.params()
    }

    fn max_total_bytes(&self) -> u64 {
        self.max_total_bytes()
    }

    fn encode_with(&self, accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        self.encode_with(accumulator, delta, threads)
    }

    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError> {
        self.check(shards)
    }

    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError> {
        Ok(self.decode(shards)?.to_dense())
    }

    fn blocks(&self) -> usize {
        self.geometry().blocks()
    }

    fn blocks_params(&self, blocks: Range<usize>) -> Range<usize> {
        self.geometry().blocks_params(blocks)
    }

    fn split<'a, S: AsRef<[u8]>>(&self, shards: &'a [S]) -> Result<Vec<&'a [u8]>, DecodeError> {
        self.geometry().split_shards(shards)
    }

    /// Twice the median of each chunk's scales: without it, who sends large scales everywhere has as much say as the rest where scales are tiny, for the
    /// norm of the whole hardly tells.
    fn caps(&self, contributions: &[Vec<&[u8]>], weights: &[u64]) -> Result<Caps, (usize, DecodeError)> {
        let geometry = self.geometry();
        Caps::of(geometry, contributions, weights, |block, bytes| {
            let (_, codes, _) = split_block(block, geometry.block_chunks(block).len(), bytes)?;
            Ok(codes.into())
        })
    }

    /// From scale codes alone. Fewer than 2^41 values below 2^36 make a sum below 2^113.
    fn norm_squared(&self, blocks: &[&[u8]], caps: &Caps) -> Result<u128, DecodeError> {
        let geometry = self.geometry();
        let mut squared = 0;
        for (block, bytes) in blocks.iter().enumerate() {
            let chunks = geometry.block_chunks(block);
            let (_, codes, _) = split_block(block, chunks.len(), bytes)?;
            for (chunk, code) in chunks.zip(codes) {
                squared += norm_squared(
                    caps.cut(chunk, *code),
                    geometry.k.min(geometry.chunk_params(chunk).len()),
                );
            }
        }
        Ok(squared)
    }

    fn reader(&self) -> BlockCoder {
        BlockCoder::new(self.geometry())
    }

    /// Each entry is below `2^(value bits + weight bits)`, since a clip factor is at most one; so the sum over all peers stays below `2^62`.
    fn factor(&self, clip: u64, weight: u64) -> Table {
        let factor = u128::from(clip) * u128::from(weight);
        Table(SCALES.map(|scale| ((u128::from(scale) * factor) >> CLIP_BITS) as i64))
    }

    fn add(
        &self,
        reader: &mut BlockCoder,
        block: usize,
        bytes: &[u8],
        factor: &Table,
        caps: &Caps,
        sums: &mut [i64],
    ) -> Result<(), DecodeError> {
        let geometry = self.geometry();
        let first = geometry.blocks_params(block..block + 1).start;
        reader.unpack(block, bytes, |chunk| {
            let own = geometry.chunk_params(chunk.number);
            let sums = &mut sums[own.start - first..own.end - first];
            let step = factor.0[usize::from(caps.cut(chunk.number, chunk.code))];
            chunk.for_each(|index, negative| {
                let sign = -i64::from(negative); // 0 or -1: x ^ -1 - -1 is -x
                sums[index] += (step ^ sign) - sign;
            });
        })
    }

    /// The signed sums of a chunk first, since they share a scale: at most 2^16 of 2^38 fit 64 bits.
    fn inner(
        &self,
        reader: &mut BlockCoder,
        block: usize,
        bytes: &[u8],
        caps: &Caps,
        sums: &[i64],
    ) -> Result<i128, DecodeError> {
        let geometry = self.geometry();
        let first = geometry.blocks_params(block..block + 1).start;
        let mut inner = 0;
        reader.unpack(block, bytes, |chunk| {
            let own = geometry.chunk_params(chunk.number);
            let sums = &sums[own.start - first..own.end - first];
            let mut along = 0;
            chunk.for_each(|index, negative| {
                let sum = sums[index] >> INNER_BITS;
                along += if negative { -sum } else { sum };
            });
            inner += i128::from(along) * i128::from(SCALES[usize::from(caps.cut(chunk.number, chunk.code))]);
        })?;
        Ok(inner)
    }
}

/// The codec that a run chose.
#[derive(Clone, Debug, PartialEq)]
pub enum AnyCodec {
    /// The few largest values of each chunk, by their signs.
    Sparse(SparseCodec),
    /// The same values, with more said of each.
    Levels(LevelsCodec),
    /// Every value.
    Dense(DenseCodec),
    /// Every value, in eight bits.
    Int8(Int8Codec),
}

/// [`Codec::Reader`] of any.
pub enum AnyReader {
    /// Of sparse contributions.
    Sparse(BlockCoder),
    /// Of those that say more of each value.
    Levels(Box<LevelsReader>),
    /// Those that hold every value need nothing.
    Whole,
}

/// [`Codec::Factor`] of any.
pub enum AnyFactor {
    /// Of a sparse contribution.
    Sparse(Box<Table>),
    /// Of any other.
    Whole(super::whole::Factor),
}

impl AnyCodec {
    /// The codec that a run's settings choose, for a model of `params` parameters: that of the rounds in which most is sent.
    ///
    /// # Errors
    /// A setting outside its bounds.
    pub fn new(params: usize, config: &CompressionConfig) -> Result<Self, CodecError> {
        Ok(match config.algorithm.as_str() {
            "dense" => Self::Dense(DenseCodec::new(params)?),
            "int8" => Self::Int8(Int8Codec::new(params)?),
            _ => {
                let CompressionConfig { chunk, beta, .. } = *config;
                let k = config.most_k();
                match config.quantizer {
                    Quantizer::Sign => Self::Sparse(SparseCodec::new(params, chunk, k, beta as f32)?),
                    other => Self::Levels(LevelsCodec::new(params, chunk, k, beta as f32, other)?),
                }
            }
        })
    }

    /// The same where `k` values of a chunk are sent (1 to the chunk's length; others are taken as the nearest of these).
    #[must_use]
    pub fn with_k(&self, k: usize) -> Self {
        match self {
            Self::Sparse(codec) => Self::Sparse(codec.with_k(k)),
            Self::Levels(codec) => Self::Levels(codec.with_k(k)),
            Self::Dense(_) | Self::Int8(_) => self.clone(),
        }
    }
}

/// Calls a method of whichever codec it is.
macro_rules! either {
    ($self:ident, $codec:ident => $call:expr) => {
        match $self {
            AnyCodec::Sparse($codec) => $call,
            AnyCodec::Levels($codec) => $call,
            AnyCodec::Dense($codec) => $call,
            AnyCodec::Int8($codec) => $call,
        }
    };
}

impl Codec for AnyCodec {
    type Reader = AnyReader;
    type Factor = AnyFactor;

    fn params(&self) -> usize {
        either!(self, codec => Codec::params(codec))
    }

    fn max_total_bytes(&self) -> u64 {
        either!(self, codec => Codec::max_total_bytes(codec))
    }

    fn encode_with(&self, accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        either!(self, codec => Codec::encode_with(codec, accumulator, delta, threads))
    }

    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError> {
        either!(self, codec => Codec::check(codec, shards))
    }

    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError> {
        either!(self, codec => Codec::to_dense(codec, shards))
    }

    fn blocks(&self) -> usize {
        either!(self, codec => Codec::blocks(codec))
    }

    fn blocks_params(&self, blocks: Range<usize>) -> Range<usize> {
        either!(self, codec => Codec::blocks_params(codec, blocks))
    }

    fn split<'a, S: AsRef<[u8]>>(&self, shards: &'a [S]) -> Result<Vec<&'a [u8]>, DecodeError> {
        either!(self, codec => Codec::split(codec, shards))
    }

    fn caps(&self, contributions: &[Vec<&[u8]>], weights: &[u64]) -> Result<Caps, (usize, DecodeError)> {
        either!(self, codec => Codec::caps(codec, contributions, weights))
    }

    fn norm_squared(&self, blocks: &[&[u8]], caps: &Caps) -> Result<u128, DecodeError> {
        either!(self, codec => Codec::norm_squared(codec, blocks, caps))
    }

    fn reader(&self) -> AnyReader {
        match self {
            Self::Sparse(codec) => AnyReader::Sparse(codec.reader()),
            Self::Levels(codec) => AnyReader::Levels(Box::new(codec.reader())),
            Self::Dense(_) | Self::Int8(_) => AnyReader::Whole,
        }
    }

    fn factor(&self, clip: u64, weight: u64) -> AnyFactor {
        match self {
            Self::Sparse(codec) => AnyFactor::Sparse(Box::new(codec.factor(clip, weight))),
            Self::Levels(codec) => AnyFactor::Whole(codec.factor(clip, weight)),
            Self::Dense(codec) => AnyFactor::Whole(codec.factor(clip, weight)),
            Self::Int8(codec) => AnyFactor::Whole(codec.factor(clip, weight)),
        }
    }

    fn add(
        &self,
        reader: &mut AnyReader,
        block: usize,
        bytes: &[u8],
        factor: &AnyFactor,
        caps: &Caps,
        sums: &mut [i64],
    ) -> Result<(), DecodeError> {
        match (self, reader, factor) {
            (Self::Sparse(codec), AnyReader::Sparse(reader), AnyFactor::Sparse(factor)) => {
                codec.add(reader, block, bytes, factor, caps, sums)
            }
            (Self::Levels(codec), AnyReader::Levels(reader), AnyFactor::Whole(factor)) => {
                codec.add(reader, block, bytes, factor, caps, sums)
            }
            (Self::Dense(codec), _, AnyFactor::Whole(factor)) => codec.add(&mut (), block, bytes, factor, caps, sums),
            (Self::Int8(codec), _, AnyFactor::Whole(factor)) => codec.add(&mut (), block, bytes, factor, caps, sums),
            _ => unreachable!("reader and factor come from the codec that reads"),
        }
    }

    fn inner(
        &self,
        reader: &mut AnyReader,
        block: usize,
        bytes: &[u8],
        caps: &Caps,
        sums: &[i64],
    ) -> Result<i128, DecodeError> {
        match (self, reader) {
            (Self::Sparse(codec), AnyReader::Sparse(reader)) => codec.inner(reader, block, bytes, caps, sums),
            (Self::Levels(codec), AnyReader::Levels(reader)) => codec.inner(reader, block, bytes, caps, sums),
            (Self::Dense(codec), _) => codec.inner(&mut (), block, bytes, caps, sums),
            (Self::Int8(codec), _) => codec.inner(&mut (), block, bytes, caps, sums),
            _ => unreachable!("the reader comes from the codec that reads"),
        }
    }
}
