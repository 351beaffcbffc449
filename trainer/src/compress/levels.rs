//! The same selection as [`super::SparseCodec`], with more said of each value: two levels a chunk, or the value as it is. Here to compare with: much of what a sign and
//! one scale leave out comes later through the accumulator (`trainer/README.md` has what each teaches). Plain code, several times slower than the other.
//!
//! ```text
//! shard        as there, with quantizer 4 (two levels) or 5 (raw)
//!
//! block        ┌────────────────┬─────────────────────────────┬──────────────────────────────┬─────────┐
//! (64 chunks)  │ Rice parameter │ two scale codes per chunk   │ chunk 0 │ chunk 1 │ ...      │ 0 bits  │
//!              └────────────────┴─────────────────────────────┴──────────────────────────────┴─────────┘
//!                 1 byte           low, high: 2 bytes a chunk     bits, lowest first              to a byte
//!                                  (raw: none)
//!
//! two levels   gaps | signs | levels: 0 low, 1 high      nothing if both codes are 0
//! raw          gaps | values, f32 of 32 bits each
//! ```
//!
//! Two levels are the means of the magnitudes below the mean of all, and of the others (4 values in 2 bits, as the codebooks of QSGD's kind, Alistarh et al., arXiv
//! 1610.02132). Where they have the same code, or the low one none, one level stands for both, and all level bits are 0. Raw values lie on the grid of the sums, as
//! dense ones do ([`super::dense`]); what the grid takes away stays in the accumulator.

use std::ops::Range;

use super::codec::{Caps, Codec, INNER_BITS};
use super::dense::{grid_units, on_grid};
use super::entropy::{BadEnd, BitReader, BitWriter, RiceCosts};
use super::geometry::Geometry;
use super::quantize::{Quantizer, SCALES, UNIT, scale_code};
use super::select::Selector;
use super::whole::Factor;
use super::{CodecError, DecodeError, Encoded, accumulate, encode_by};

/// Encodes and decodes contributions of few values, each with a level or as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct LevelsCodec {
    geometry: Geometry,
    beta: f32,
}

/// What one chunk says: positions, and their values in units.
#[derive(Debug, Default)]
struct Content {
    codes: [u8; 2],
    indices: Vec<u16>,
    units: Vec<i64>,
}

/// Rice parameter, the codes of every chunk (none where values are raw), bits.
type Parts<'a> = (u32, &'a [[u8; 2]], &'a [u8]);

/// Buffers of one thread that reads.
#[derive(Debug)]
pub struct LevelsReader {
    costs: RiceCosts,
    gaps: Vec<u16>,
    content: Content,
}

impl LevelsCodec {
    /// A codec for `params` parameters: `k` values out of each `chunk`, accumulator decay `beta`.
    ///
    /// # Errors
    /// As [`super::SparseCodec::new`].
    ///
    /// # Panics
    /// With [`Quantizer::Sign`], which is another codec's.
    pub fn new(params: usize, chunk: usize, k: usize, beta: f32, quantizer: Quantizer) -> Result<Self, CodecError> {
        assert!(quantizer != Quantizer::Sign, "signs alone are SparseCodec's");
        Ok(Self {
            geometry: Geometry::new(params, chunk, k, beta, quantizer)?,
            beta,
        })
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
    pub(super) fn with_k(&self, k: usize) -> Self {
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

    fn raw(&self) -> bool {
        self.geometry.quantizer == Quantizer::Raw
    }

    /// Values of a chunk that speaks.
    fn count(&self, chunk: usize) -> usize {
        self.geometry.k.min(self.geometry.chunk_params(chunk).len())
    }

    /// Selects and quantises a chunk, and leaves in `values` what the others will not see.
    fn quantize(&self, selector: &mut Selector, values: &mut [f32], content: &mut Content) {
        selector.top_k(values, self.geometry.k.min(values.len()), &mut content.indices);
        content.codes = [0; 2];
        content.units.clear();
        if self.raw() {
            let units = content
                .indices
                .iter()
                .map(|index| grid_units(values[usize::from(*index)]));
            content.units.extend(units);
        } else {
            self.two_levels(values, content);
        }
        for (index, units) in content.indices.iter().zip(&content.units) {
            values[usize::from(*index)] -= value(*units);
        }
    }

    fn two_levels(&self, values: &[f32], content: &mut Content) {
        let magnitude = |index: &u16| f64::from(values[usize::from(*index)].abs());
        let mean = |some: &dyn Fn(f64) -> bool| {
            // Summed in the order of the indices: part of the definition, for floats do not associate.
            let (mut sum, mut count) = (0.0, 0u32);
            for magnitude in content.indices.iter().map(magnitude).filter(|it| some(*it)) {
                (sum, count) = (sum + magnitude, count + 1);
            }
            if count == 0 { 0.0 } else { sum / f64::from(count) }
        };
        let middle = mean(&|_| true);
        let (low, high) = (
            scale_code(mean(&|it| it < middle)),
            scale_code(mean(&|it| it >= middle)),
        );
        let two = low > 0 && low < high;
        content.codes = if two { [low, high] } else { [scale_code(middle); 2] };
        if content.codes == [0; 2] {
            return content.indices.clear();
        }
        let units = content.indices.iter().map(|index| {
            let code = content.codes[usize::from(two && magnitude(index) >= middle)];
            let scale = SCALES[usize::from(code)] as i64;
            if values[usize::from(*index)] < 0.0 {
                -scale
            } else {
                scale
            }
        });
        let units: Vec<i64> = units.collect();
        content.units = units;
    }

    /// The bytes of a block.
    fn pack(&self, chunks: &[Content]) -> Vec<u8> {
        let mut costs = self.costs();
        let gaps: Vec<Vec<u16>> = chunks.iter().map(|chunk| gaps(&chunk.indices)).collect();
        gaps.iter().for_each(|gaps| costs.add(gaps));
        let parameter = costs.best();
        let mut out = vec![parameter as u8];
        if !self.raw() {
            out.extend(chunks.iter().flat_map(|chunk| chunk.codes));
        }
        let mut writer = BitWriter::new(&mut out);
        for (chunk, gaps) in chunks.iter().zip(gaps) {
            gaps.iter().for_each(|gap| writer.push_gap(*gap, parameter));
            if self.raw() {
                let bits = |units: &i64| u64::from(value(*units).to_bits());
                chunk.units.iter().for_each(|units| writer.push(bits(units), 32));
                continue;
            }
            let high = SCALES[usize::from(chunk.codes[1])];
            let two = chunk.codes[0] != chunk.codes[1];
            let units = || chunk.units.iter();
            units().for_each(|units| writer.push(u64::from(*units < 0), 1));
            units().for_each(|units| writer.push(u64::from(two && units.unsigned_abs() == high), 1));
        }
        writer.finish();
        out
    }

    /// Reads block number `block` and calls `visit` with the number of each of its chunks and what it says.
    fn unpack(
        &self,
        reader: &mut LevelsReader,
        block: usize,
        bytes: &[u8],
        caps: &Caps,
        mut visit: impl FnMut(usize, &Content),
    ) -> Result<(), DecodeError> {
        let chunks = self.geometry.block_chunks(block);
        let (parameter, codes, bits) = self.split_block(block, bytes)?;
        let rice = |expected: u32, found: u32| DecodeError::RiceParameter {
            block,
            expected: expected as u8,
            found: found as u8,
        };
        reader.costs.clear();
        // A parameter that no author may choose would only fail at the end; refused now, shifts by it are in bounds.
        if parameter > 15 {
            return Err(rice(reader.costs.best(), parameter));
        }
        let mut stream = BitReader::new(bits);
        for (place, chunk) in chunks.enumerate() {
            let codes = codes.get(place).copied().unwrap_or_default();
            let count = if self.raw() || codes != [0; 2] {
                self.count(chunk)
            } else {
                0
            };
            self.read_gaps(reader, &mut stream, parameter, chunk, count)?;
            reader.content.codes = codes;
            if self.raw() {
                self.read_values(reader, &mut stream, chunk)?;
            } else {
                self.read_levels(reader, &mut stream, chunk, caps)?;
            }
            visit(chunk, &reader.content);
        }
        stream.finish().map_err(|end| match end {
            BadEnd::Short => DecodeError::BlockEndsEarly { block },
            BadEnd::Long => DecodeError::BlockEndsLate { block },
            BadEnd::Padding => DecodeError::Padding { block },
        })?;
        match reader.costs.best() {
            best if best == parameter => Ok(()),
            best => Err(rice(best, parameter)),
        }
    }

    fn split_block<'a>(&self, block: usize, bytes: &'a [u8]) -> Result<Parts<'a>, DecodeError> {
        let early = DecodeError::BlockEndsEarly { block };
        let codes = if self.raw() {
            0
        } else {
            2 * self.geometry.block_chunks(block).len()
        };
        let Some((parameter, rest)) = bytes.split_first() else {
            return Err(early);
        };
        let (codes, bits) = rest.split_at_checked(codes).ok_or(early)?;
        Ok((u32::from(*parameter), codes.as_chunks().0, bits))
    }

    fn read_gaps(
        &self,
        reader: &mut LevelsReader,
        stream: &mut BitReader<'_>,
        parameter: u32,
        chunk: usize,
        count: usize,
    ) -> Result<(), DecodeError> {
        let limit = self.geometry.chunk_params(chunk).len() as u64;
        let LevelsReader { costs, gaps, content } = reader;
        gaps.clear();
        content.indices.clear();
        let mut next = 0;
        for _ in 0..count {
            let gap = stream.gap(parameter).unwrap_or(limit);
            let position = next + gap;
            if position >= limit {
                return Err(DecodeError::IndexOutOfRange { chunk, limit });
            }
            gaps.push(gap as u16);
            content.indices.push(position as u16);
            next = position + 1;
        }
        costs.add(gaps);
        Ok(())
    }

    fn read_values(
        &self,
        reader: &mut LevelsReader,
        stream: &mut BitReader<'_>,
        chunk: usize,
    ) -> Result<(), DecodeError> {
        let Content { indices, units, .. } = &mut reader.content;
        units.clear();
        for index in indices {
            let bits = stream.take(32) as u32;
            let param = self.geometry.chunk_params(chunk).start + usize::from(*index);
            units.push(on_grid(f32::from_bits(bits)).ok_or(DecodeError::Value { param, bits })?);
        }
        Ok(())
    }

    fn read_levels(
        &self,
        reader: &mut LevelsReader,
        stream: &mut BitReader<'_>,
        chunk: usize,
        caps: &Caps,
    ) -> Result<(), DecodeError> {
        let Content { codes, indices, units } = &mut reader.content;
        let scale = |code: u8| SCALES[usize::from(caps.cut(chunk, code))] as i64;
        let levels = codes.map(scale);
        units.clear();
        units.extend(indices.iter().map(|_| if stream.take(1) == 1 { -1 } else { 1 }));
        let mut high = 0;
        for unit in units.iter_mut() {
            let level = stream.take(1) as usize;
            *unit *= levels[level];
            high += level;
        }
        // One content has one encoding: two codes are two levels in use, equal ones leave the bits unused.
        let canonical = match codes[0].cmp(&codes[1]) {
            std::cmp::Ordering::Less => codes[0] > 0 && high > 0 && high < units.len(),
            std::cmp::Ordering::Equal => high == 0,
            std::cmp::Ordering::Greater => false,
        };
        match canonical {
            true => Ok(()),
            false => Err(DecodeError::Levels {
                chunk,
                codes: *codes,
                high,
            }),
        }
    }

    fn costs(&self) -> RiceCosts {
        RiceCosts::new(self.geometry.chunk, self.geometry.k)
    }

    fn encode_blocks(
        &self,
        blocks: Range<usize>,
        accumulator: &[f32],
        delta: &[f32],
        next: &mut [f32],
    ) -> Result<Vec<Vec<u8>>, CodecError> {
        let first = self.geometry.blocks_params(blocks.clone()).start;
        let mut selector = Selector::default();
        let encode = |block| {
            let mut chunks = Vec::new();
            for chunk in self.geometry.block_chunks(block) {
                let params = self.geometry.chunk_params(chunk);
                let range = params.start - first..params.end - first;
                let next = &mut next[range.clone()];
                accumulate(
                    self.beta,
                    &accumulator[range.clone()],
                    &delta[range],
                    next,
                    params.start,
                )?;
                let mut content = Content::default();
                self.quantize(&mut selector, next, &mut content);
                chunks.push(content);
            }
            Ok(self.pack(&chunks))
        };
        blocks.map(encode).collect()
    }
}

/// A value of so many units as a float, exactly: scales and values on the grid have at most 24 significant bits.
fn value(units: i64) -> f32 {
    units as f32 * UNIT
}

/// What lies between sorted positions.
fn gaps(indices: &[u16]) -> Vec<u16> {
    let starts = std::iter::once(0).chain(indices.iter().map(|index| u32::from(*index) + 1));
    let gap = |(index, start): (&u16, u32)| (u32::from(*index) - start) as u16;
    indices.iter().zip(starts).map(gap).collect()
}

impl Codec for LevelsCodec {
    type Reader = LevelsReader;
    type Factor = Factor;

    fn params(&self) -> usize {
        self.geometry.params
    }

    fn max_total_bytes(&self) -> u64 {
        let shard = |shard| self.geometry.max_shard_bytes(shard) as u64;
        (0..self.geometry.shards()).map(shard).sum()
    }

    fn encode_with(&self, accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        encode_by(
            self.geometry,
            accumulator,
            delta,
            threads,
            Vec::new(),
            |blocks, accumulator, delta, next| self.encode_blocks(blocks, accumulator, delta, next),
        )
    }

    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError> {
        let mut reader = self.reader();
        let blocks = self.split(shards)?;
        let mut blocks = blocks.into_iter().enumerate();
        blocks.try_for_each(|(block, bytes)| self.unpack(&mut reader, block, bytes, &Caps::default(), |_, _| ()))
    }

    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError> {
        let mut reader = self.reader();
        let mut dense = vec![0.0; self.geometry.params];
        for (block, bytes) in self.split(shards)?.into_iter().enumerate() {
            self.unpack(&mut reader, block, bytes, &Caps::default(), |chunk, content| {
                let values = &mut dense[self.geometry.chunk_params(chunk)];
                for (index, units) in content.indices.iter().zip(&content.units) {
                    values[usize::from(*index)] = value(*units);
                }
            })?;
        }
        Ok(dense)
    }

    fn blocks(&self) -> usize {
        self.geometry.blocks()
    }

    fn blocks_params(&self, blocks: Range<usize>) -> Range<usize> {
        self.geometry.blocks_params(blocks)
    }

    fn split<'a, S: AsRef<[u8]>>(&self, shards: &'a [S]) -> Result<Vec<&'a [u8]>, DecodeError> {
        self.geometry.split_shards(shards)
    }

    /// Twice the median of each chunk's high levels; none for raw values, which have no scales.
    fn caps(&self, contributions: &[Vec<&[u8]>], weights: &[u64]) -> Result<Caps, (usize, DecodeError)> {
        if self.raw() {
            return Ok(Caps::default());
        }
        Caps::of(self.geometry, contributions, weights, |block, bytes| {
            let (_, codes, _) = self.split_block(block, bytes)?;
            Ok(codes.iter().map(|[_, high]| *high).collect())
        })
    }

    /// Fewer than 2^41 values below 2^36 make a sum below 2^113.
    fn norm_squared(&self, blocks: &[&[u8]], caps: &Caps) -> Result<u128, DecodeError> {
        let (mut reader, mut squared) = (self.reader(), 0);
        for (block, bytes) in blocks.iter().enumerate() {
            self.unpack(&mut reader, block, bytes, caps, |_, content| {
                let squares = content
                    .units
                    .iter()
                    .map(|units| u128::from(units.unsigned_abs()).pow(2));
                squared += squares.sum::<u128>();
            })?;
        }
        Ok(squared)
    }

    fn reader(&self) -> LevelsReader {
        LevelsReader {
            costs: self.costs(),
            gaps: Vec::new(),
            content: Content::default(),
        }
    }

    fn factor(&self, clip: u64, weight: u64) -> Factor {
        Factor::new(clip, weight)
    }

    fn add(
        &self,
        reader: &mut LevelsReader,
        block: usize,
        bytes: &[u8],
        factor: &Factor,
        caps: &Caps,
        sums: &mut [i64],
    ) -> Result<(), DecodeError> {
        let first = self.geometry.blocks_params(block..block + 1).start;
        self.unpack(reader, block, bytes, caps, |chunk, content| {
            let sums = &mut sums[self.geometry.chunk_params(chunk).start - first..];
            for (index, units) in content.indices.iter().zip(&content.units) {
                sums[usize::from(*index)] += factor.of(*units);
            }
        })
    }

    fn inner(
        &self,
        reader: &mut LevelsReader,
        block: usize,
        bytes: &[u8],
        caps: &Caps,
        sums: &[i64],
    ) -> Result<i128, DecodeError> {
        let first = self.geometry.blocks_params(block..block + 1).start;
        let mut inner = 0;
        self.unpack(reader, block, bytes, caps, |chunk, content| {
            let sums = &sums[self.geometry.chunk_params(chunk).start - first..];
            for (index, units) in content.indices.iter().zip(&content.units) {
                inner += i128::from(*units) * i128::from(sums[usize::from(*index)] >> INNER_BITS);
            }
        })?;
        Ok(inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::aggregate::{Weighted, aggregate_with};

    const BOTH: [Quantizer; 2] = [Quantizer::Sign2, Quantizer::Raw];

    fn codec(params: usize, quantizer: Quantizer) -> LevelsCodec {
        LevelsCodec::new(params, 256, 16, 0.9, quantizer).unwrap()
    }

    /// Heavy-tailed values, the same for the same seed.
    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
            x * x * x * 1e-2
        };
        (0..count).map(|_| next()).collect()
    }

    /// Magnitudes of one chunk's values.
    fn magnitudes(dense: &[f32]) -> Vec<f32> {
        let mut all: Vec<f32> = dense.iter().filter(|x| **x != 0.0).map(|x| x.abs()).collect();
        all.sort_by(f32::total_cmp);
        all.dedup();
        all
    }

    #[test]
    fn what_is_sent_and_what_is_kept_make_up_the_sum() {
        for quantizer in BOTH {
            // Several blocks, the last chunk shorter than k.
            let params = 64 * 256 * 2 + 256 + 9;
            let codec = codec(params, quantizer);
            let (e, d) = (noise(1, params), noise(2, params));
            let one = codec.encode_with(&e, &d, 1).unwrap();
            assert_eq!(codec.encode_with(&e, &d, 3).unwrap(), one, "on any number of threads");
            let sent = codec.to_dense(&one.shards).unwrap();
            codec.check(&one.shards).unwrap();
            for (param, (kept, sent)) in one.accumulator.iter().zip(&sent).enumerate() {
                assert_eq!(*kept, (0.9 * e[param] + d[param]) - sent, "{quantizer:?} {param}");
            }
            assert_eq!(
                sent.iter().filter(|x| **x != 0.0).count(),
                129 * 16 + 9,
                "{quantizer:?}"
            );
            let levels = magnitudes(&sent[..256]).len();
            assert!(
                if quantizer == Quantizer::Raw {
                    levels > 10
                } else {
                    levels == 2
                },
                "{levels}"
            );
        }
    }

    #[test]
    fn raw_errs_least_and_two_levels_less_than_one() {
        let values = noise(3, 1 << 16);
        let left = |encoded: Encoded| encoded.accumulator.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let zero = vec![0.0; values.len()];
        let sign = super::super::SparseCodec::new(values.len(), 256, 16, 0.9).unwrap();
        let one = left(sign.encode_with(&zero, &values, 1).unwrap());
        let two = left(
            codec(values.len(), Quantizer::Sign2)
                .encode_with(&zero, &values, 1)
                .unwrap(),
        );
        let raw = left(
            codec(values.len(), Quantizer::Raw)
                .encode_with(&zero, &values, 1)
                .unwrap(),
        );
        assert!(raw < two && two < one, "{raw} {two} {one}");
    }

    #[test]
    fn one_level_stands_for_both_where_all_are_alike_and_nothing_for_what_is_too_small() {
        let codec = codec(256, Quantizer::Sign2);
        let of = |value: f32| {
            let encoded = codec.encode_with(&[0.0; 256], &[value; 256], 1).unwrap();
            codec.to_dense(&encoded.shards).unwrap()
        };
        assert_eq!(magnitudes(&of(-0.5)), [0.5]);
        assert_eq!(of(1e-12), [0.0; 256]);
    }

    #[test]
    fn sums_are_exact_and_norms_those_of_the_values() {
        for quantizer in BOTH {
            let codec = codec(1000, quantizer);
            let encode = |seed| codec.encode_with(&[0.0; 1000], &noise(seed, 1000), 1).unwrap().shards;
            let (a, b) = (encode(4), encode(4));
            let weighted = |shards| Weighted { tokens: 7, shards };
            let sum = aggregate_with(&codec, &[weighted(&a[..]), weighted(&b[..])], 1).unwrap();
            let dense = codec.to_dense(&a).unwrap();
            for (sum, value) in sum.sums().iter().zip(&dense) {
                assert_eq!(*sum as f64, 14.0 * f64::from(*value) * 2f64.powi(32), "{quantizer:?}");
            }
            let norm = codec.norm_squared(&codec.split(&a).unwrap(), &Caps::default()).unwrap();
            let expected: f64 = dense.iter().map(|x| (f64::from(*x) * 2f64.powi(32)).powi(2)).sum();
            assert!((norm as f64 / expected - 1.0).abs() < 1e-9, "{quantizer:?}");
        }
    }

    proptest! {
        #[test]
        fn strangers_bytes_decode_only_if_they_are_canonical(bytes in prop::collection::vec(any::<u8>(), 0..200), raw: bool, zeros in 0usize..40) {
            let codec = LevelsCodec::new(64, 64, 2, 0.9, BOTH[usize::from(raw)]).unwrap();
            // Behind a header that is right, and with a start that may well be.
            let mut block = bytes;
            block.iter_mut().take(zeros).for_each(|byte| *byte &= 3);
            let mut shard = codec.geometry.header().to_vec();
            shard.extend((block.len() as u32).to_le_bytes());
            shard.extend(&block);
            let shards = [shard];
            if codec.check(&shards).is_ok() {
                let mut reader = codec.reader();
                let mut contents = Vec::new();
                codec.unpack(&mut reader, 0, &block, &Caps::default(), |_, content| {
                    contents.push(Content { codes: content.codes, indices: content.indices.clone(), units: content.units.clone() });
                }).unwrap();
                prop_assert_eq!(codec.pack(&contents), block, "one content has one encoding");
            }
        }
    }

    #[test]
    fn levels_that_no_encoder_writes_are_refused() {
        let codec = LevelsCodec::new(64, 64, 2, 0.9, Quantizer::Sign2).unwrap();
        let mut values = [0.0; 64];
        (values[3], values[9]) = (0.25, -1.0);
        let good = codec.encode_with(&[0.0; 64], &values, 1).unwrap().shards;
        let with = |place: usize, byte: u8| {
            let mut shards = good.clone();
            shards[0][place] = byte;
            codec.check(&shards)
        };
        let (low, high) = (good[0][9], good[0][10]);
        assert_eq!(with(9, low), Ok(()));
        for (place, byte) in [(9, high), (9, 0), (9, high + 1), (10, low), (10, low - 1)] {
            let found = with(place, byte);
            assert!(matches!(found, Err(DecodeError::Levels { chunk: 0, .. })), "{found:?}");
        }
    }
}
