//! Every value, as it is: what a peer alone trains with, and peers on fast links who would rather spend bytes than learning.
//!
//! With one peer, an outer rate of 1 and an inner optimizer that keeps its state, a run is ordinary training: each round ends where the
//! local steps did, but for the rounding of one subtraction.
//!
//! ```text
//! shard        ┌───────────┬─────────────┬───────┬──────────────────┐
//!              │ version 1 │ quantizer 2 │ 0 │ 0 │ f32, f32, ...    │      786,432 values, the last shard fewer
//!              └───────────┴─────────────┴───────┴──────────────────┘
//! ```
//!
//! Values are little-endian and lie on the grid of the sums, multiples of `2^-32` below 16 in magnitude: what every peer adds is exactly what
//! was sent, and one content has one encoding (zero has no sign). What rounding takes away is at most `2^-33`, below the last bit of any
//! parameter that matters, so there is no accumulator: it stays zero.

use std::ops::Range;

use super::codec::{Caps, Codec, INNER_BITS};
use super::quantize::{FRACTION_BITS, VALUE_BITS};
use super::whole::{Factor, ONE, after_header, check_count, checked_params, encode_shards};
use super::{CodecError, DecodeError, Encoded};

/// Parameters in a block, the unit that threads share out: 1 MiB.
const BLOCK: usize = 1 << 18;
/// Blocks in a shard: with its header it stays below 4 MiB.
const SHARD_BLOCKS: usize = 3;
/// Bytes of a value.
const VALUE: usize = 4;
/// Version, quantiser, two zeros.
const HEADER: [u8; 4] = [1, 2, 0, 0];
/// The largest magnitude, in units: the largest `f32` below 16.
const LARGEST: f64 = ((1u64 << VALUE_BITS) - (1 << (VALUE_BITS - 24))) as f64;

/// Encodes and decodes contributions of every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseCodec {
    params: usize,
}

impl DenseCodec {
    /// A codec for `params` parameters.
    ///
    /// # Errors
    /// None, or more than 2^40.
    pub fn new(params: usize) -> Result<Self, CodecError> {
        Ok(Self {
            params: checked_params(params)?,
        })
    }

    fn shards(self) -> usize {
        self.params.div_ceil(SHARD_BLOCKS * BLOCK)
    }

    fn shard_params(self, shard: usize) -> Range<usize> {
        let start = |shard: usize| (shard * SHARD_BLOCKS * BLOCK).min(self.params);
        start(shard)..start(shard + 1)
    }

    fn encode_shard(self, shard: usize, delta: &[f32]) -> Result<Vec<u8>, CodecError> {
        let params = self.shard_params(shard);
        let mut bytes = Vec::with_capacity(HEADER.len() + VALUE * params.len());
        bytes.extend_from_slice(&HEADER);
        for (index, &value) in params.clone().zip(&delta[params]) {
            if !value.is_finite() {
                return Err(CodecError::NotFinite { index, value });
            }
            bytes.extend_from_slice(&((grid_units(value) as f64 / ONE) as f32).to_le_bytes());
        }
        Ok(bytes)
    }

    /// Calls `each` with the values of a block, as floats and in units.
    fn read(self, block: usize, bytes: &[u8], mut each: impl FnMut(usize, f32, i64)) -> Result<(), DecodeError> {
        let (values, _) = bytes.as_chunks::<VALUE>();
        for (place, value) in values.iter().enumerate() {
            let value = f32::from_le_bytes(*value);
            let units = on_grid(value).ok_or(DecodeError::Value {
                param: block * BLOCK + place,
                bits: value.to_bits(),
            })?;
            each(place, value, units);
        }
        Ok(())
    }
}

/// The units nearest to a finite value, below 16 in magnitude; halves go away from zero.
///
/// Written without `f64::round`, which is a call where the build's machine need not have SSE4.1. The sum is exact where it can matter: of 24 significant
/// bits and a half, from `2^-29` units to `2^36`.
#[inline]
pub(super) fn grid_units(value: f32) -> i64 {
    let units = (f64::from(value) * ONE).clamp(-LARGEST, LARGEST);
    (units + 0.5_f64.copysign(units)) as i64
}

/// The units of a value that lies on the grid, by its bits: signs are as good as random, and a branch on each would be guessed wrongly half of the time.
#[inline]
pub(super) fn on_grid(value: f32) -> Option<i64> {
    /// The exponent of the largest values, 8 to below 16, of which one unit in the last place is `2^12` units.
    const TOP: u32 = 127 + VALUE_BITS - FRACTION_BITS - 1;
    const WIDEST: u32 = VALUE_BITS - f32::MANTISSA_DIGITS;
    let bits = value.to_bits();
    let exponent = bits >> 23 & 0xff;
    let implied = u32::from(exponent != 0) << 23;
    let widest = u64::from(bits & 0x7f_ffff | implied) << WIDEST;
    // Too large ones wrap around, and are shifted out like those that are too small.
    let down = TOP.wrapping_sub(exponent).min(63);
    let units = widest >> down;
    let negative_zero = bits == 1 << 31;
    let on_grid = units << down == widest && !negative_zero;
    let sign = -i64::from(bits >> 31);
    on_grid.then_some((units as i64 ^ sign) - sign)
}

impl Codec for DenseCodec {
    type Reader = ();
    type Factor = Factor;

    fn params(&self) -> usize {
        self.params
    }

    fn max_total_bytes(&self) -> u64 {
        (HEADER.len() * self.shards() + VALUE * self.params) as u64
    }

    /// The accumulator is not read, and the new one is zero.
    fn encode_with(&self, _accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        let encode = |shard| self.encode_shard(shard, delta);
        encode_shards(self.params, delta, self.shards(), threads, encode)
    }

    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError> {
        let blocks = self.split(shards)?;
        let mut blocks = blocks.into_iter().enumerate();
        blocks.try_for_each(|(block, bytes)| self.read(block, bytes, |_, _, _| ()))
    }

    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError> {
        let blocks = self.split(shards)?;
        let mut dense = Vec::with_capacity(self.params);
        for (block, bytes) in blocks.into_iter().enumerate() {
            self.read(block, bytes, |_, value, _| dense.push(value))?;
        }
        Ok(dense)
    }

    fn blocks(&self) -> usize {
        self.params.div_ceil(BLOCK)
    }

    fn blocks_params(&self, blocks: Range<usize>) -> Range<usize> {
        (blocks.start * BLOCK).min(self.params)..(blocks.end * BLOCK).min(self.params)
    }

    fn split<'a, S: AsRef<[u8]>>(&self, shards: &'a [S]) -> Result<Vec<&'a [u8]>, DecodeError> {
        check_count(self.shards(), shards.len())?;
        let mut blocks = Vec::with_capacity(self.blocks());
        for (shard, bytes) in shards.iter().enumerate() {
            let expected = HEADER.len() + VALUE * self.shard_params(shard).len();
            let values = after_header(shard, bytes.as_ref(), HEADER, expected)?;
            blocks.extend(values.chunks(VALUE * BLOCK));
        }
        Ok(blocks)
    }

    /// Fewer than 2^41 values below 2^36 make a sum below 2^113.
    fn norm_squared(&self, blocks: &[&[u8]], _caps: &Caps) -> Result<u128, DecodeError> {
        let mut squared = 0;
        for (block, bytes) in blocks.iter().enumerate() {
            self.read(block, bytes, |_, _, units| {
                squared += u128::from(units.unsigned_abs()).pow(2)
            })?;
        }
        Ok(squared)
    }

    fn reader(&self) {}

    fn factor(&self, clip: u64, weight: u64) -> Factor {
        Factor::new(clip, weight)
    }

    fn add(
        &self,
        (): &mut (),
        block: usize,
        bytes: &[u8],
        factor: &Factor,
        _caps: &Caps,
        sums: &mut [i64],
    ) -> Result<(), DecodeError> {
        self.read(block, bytes, |place, _, units| sums[place] += factor.of(units))
    }

    fn inner(&self, (): &mut (), block: usize, bytes: &[u8], _caps: &Caps, sums: &[i64]) -> Result<i128, DecodeError> {
        let mut inner = 0;
        self.read(block, bytes, |place, _, units| {
            inner += i128::from(units) * i128::from(sums[place] >> INNER_BITS);
        })?;
        Ok(inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_is_what_the_library_rounds_to() {
        // Every exponent, with mantissas that lie on, beside and between whole units; and a sample of all floats.
        let edges = (0..=255_u32).flat_map(|exponent| {
            let mantissas = [0, 1, 2, 0x3f_ffff, 0x40_0000, 0x40_0001, 0x7f_fffe, 0x7f_ffff];
            mantissas.map(|mantissa| exponent << 23 | mantissa)
        });
        let sample = (0..1_000_000_u32).map(|i| i.wrapping_mul(0x9e37_79b1));
        for bits in edges.chain(sample).flat_map(|bits| [bits, bits | 1 << 31]) {
            let value = f32::from_bits(bits);
            let units = f64::from(value) * ONE;
            if value.is_finite() {
                let rounded = units.round().clamp(-LARGEST, LARGEST);
                assert_eq!(grid_units(value), rounded as i64, "{value:e}");
            }
            let is_on_it = units.abs() <= LARGEST && units.fract() == 0.0 && bits != 1 << 31;
            assert_eq!(on_grid(value), is_on_it.then_some(units as i64), "{value:e}");
        }
    }
}
