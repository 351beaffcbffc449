//! Every value in eight bits: what DiLoCo sends when its exchange is quantised (Streaming DiLoCo, arXiv 2501.18512, section 2.3, goes to four).
//!
//! ```text
//! shard        ┌───────────┬─────────────┬───────┬─────────┬─────────┬───
//!              │ version 1 │ quantizer 3 │ 0 │ 0 │ block 0 │ block 1 │ ...      15 blocks, the last shard fewer
//!              └───────────┴─────────────┴───────┴─────────┴─────────┴───
//! block        ┌──────────────────────┬─────────────────────┐
//! (64 chunks)  │ scale code per chunk │ i8 a parameter      │
//!              └──────────────────────┴─────────────────────┘
//! ```
//!
//! A chunk is 4096 parameters. Code `c` above 0 makes one step worth `2^(c-1)` units of `2^-32`; values are whole steps, -127 to 127, and the code
//! is the least at which the largest of them fits. Code 0 is a chunk of zeros. So one content has one encoding, every value is exact in
//! `f32`, and there is no accumulator: rounding loses at most half a step.

use std::ops::Range;

use super::codec::{Caps, Codec, INNER_BITS};
use super::whole::{Factor, ONE, after_header, check_count, checked_params, encode_shards};
use super::{CodecError, DecodeError, Encoded};

/// Parameters that share a scale.
const CHUNK: usize = 4096;
/// Chunks in a block.
const BLOCK_CHUNKS: usize = 64;
/// Parameters in a block, the unit that threads share out.
const BLOCK: usize = CHUNK * BLOCK_CHUNKS;
/// Blocks in a shard: below 4 MiB.
const SHARD_BLOCKS: usize = 15;
/// Version, quantiser, two zeros.
const HEADER: [u8; 4] = [1, 3, 0, 0];
/// The largest code: 127 steps of `2^28` units stay below `2^36`.
const LAST_CODE: u8 = 29;
/// Most steps either way.
const MOST: f64 = 127.0;

/// Encodes and decodes contributions of every value in eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int8Codec {
    params: usize,
}

impl Int8Codec {
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
        self.blocks().div_ceil(SHARD_BLOCKS)
    }

    fn shard_blocks(self, shard: usize) -> Range<usize> {
        shard * SHARD_BLOCKS..((shard + 1) * SHARD_BLOCKS).min(self.blocks())
    }

    /// Codes and values of a range of blocks.
    fn bytes(self, blocks: Range<usize>) -> usize {
        let params = self.blocks_params(blocks).len();
        params.div_ceil(CHUNK) + params
    }

    fn encode_shard(self, shard: usize, delta: &[f32]) -> Result<Vec<u8>, CodecError> {
        let blocks = self.shard_blocks(shard);
        let mut bytes = Vec::with_capacity(HEADER.len() + self.bytes(blocks.clone()));
        bytes.extend_from_slice(&HEADER);
        for block in blocks {
            let params = self.blocks_params(block..block + 1);
            let values = &delta[params.clone()];
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let (index, value) = (params.start + at, values[at]);
                return Err(CodecError::NotFinite { index, value });
            }
            let codes: Vec<u8> = values.chunks(CHUNK).map(code).collect();
            bytes.extend_from_slice(&codes);
            for (values, code) in values.chunks(CHUNK).zip(&codes) {
                bytes.extend(values.iter().map(|value| steps(*value, *code) as u8));
            }
        }
        Ok(bytes)
    }

    /// Calls `each` with the place and the units of every value of a block.
    fn read(self, block: usize, bytes: &[u8], mut each: impl FnMut(usize, i64)) -> Result<(), DecodeError> {
        let params = self.blocks_params(block..block + 1).len();
        let chunks = params.div_ceil(CHUNK);
        let (codes, values) = bytes
            .split_at_checked(chunks)
            .ok_or(DecodeError::BlockEndsEarly { block })?;
        for (chunk, (values, &code)) in values.chunks(CHUNK).zip(codes).enumerate() {
            let number = block * BLOCK_CHUNKS + chunk;
            check_chunk(number, code, values)?;
            let shift = u32::from(code.max(1)) - 1;
            for (place, value) in values.iter().enumerate() {
                each(chunk * CHUNK + place, i64::from(*value as i8) << shift);
            }
        }
        Ok(())
    }
}

/// The least code whose steps hold the largest of `values`; the last one cuts off what is larger.
fn code(values: &[f32]) -> u8 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let units = f64::from(largest) * ONE;
    if units.round() == 0.0 {
        return 0;
    }
    let fits = |code: &u8| (units / step(*code)).round() <= MOST;
    (1..LAST_CODE).find(fits).unwrap_or(LAST_CODE)
}

/// Units that one step of a code above 0 is worth.
fn step(code: u8) -> f64 {
    (1u64 << (code - 1)) as f64
}

fn steps(value: f32, code: u8) -> i8 {
    match code {
        0 => 0,
        code => (f64::from(value) * ONE / step(code)).round().clamp(-MOST, MOST) as i8,
    }
}

/// Refuses what [`code`] and [`steps`] do not write.
fn check_chunk(chunk: usize, code: u8, values: &[u8]) -> Result<(), DecodeError> {
    let largest = values
        .iter()
        .map(|value| (*value as i8).unsigned_abs())
        .max()
        .unwrap_or(0);
    // One code less would hold fewer than 64 steps (128 of its own are one too many).
    let least = if code > 1 { 64 } else { code };
    let honest = code <= LAST_CODE && largest >= least && largest <= if code == 0 { 0 } else { 127 };
    if honest {
        return Ok(());
    }
    Err(DecodeError::Steps { chunk, code, largest })
}

impl Codec for Int8Codec {
    type Reader = ();
    type Factor = Factor;

    fn params(&self) -> usize {
        self.params
    }

    fn max_total_bytes(&self) -> u64 {
        (HEADER.len() * self.shards() + self.bytes(0..self.blocks())) as u64
    }

    /// The accumulator is not read, and the new one is zero.
    fn encode_with(&self, _accumulator: &[f32], delta: &[f32], threads: usize) -> Result<Encoded, CodecError> {
        let encode = |shard| self.encode_shard(shard, delta);
        encode_shards(self.params, delta, self.shards(), threads, encode)
    }

    fn check<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<(), DecodeError> {
        let blocks = self.split(shards)?;
        let mut blocks = blocks.into_iter().enumerate();
        blocks.try_for_each(|(block, bytes)| self.read(block, bytes, |_, _| ()))
    }

    fn to_dense<S: AsRef<[u8]>>(&self, shards: &[S]) -> Result<Vec<f32>, DecodeError> {
        let blocks = self.split(shards)?;
        let mut dense = Vec::with_capacity(self.params);
        for (block, bytes) in blocks.into_iter().enumerate() {
            self.read(block, bytes, |_, units| dense.push((units as f64 / ONE) as f32))?;
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
            let own = self.shard_blocks(shard);
            let expected = HEADER.len() + self.bytes(own.clone());
            let mut rest = after_header(shard, bytes.as_ref(), HEADER, expected)?;
            for block in own {
                let part;
                (part, rest) = rest.split_at(self.bytes(block..block + 1));
                blocks.push(part);
            }
        }
        Ok(blocks)
    }

    /// Fewer than 2^41 values below 2^36 make a sum below 2^113.
    fn norm_squared(&self, blocks: &[&[u8]], _caps: &Caps) -> Result<u128, DecodeError> {
        let mut squared = 0;
        for (block, bytes) in blocks.iter().enumerate() {
            self.read(block, bytes, |_, units| {
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
        self.read(block, bytes, |place, units| sums[place] += factor.of(units))
    }

    fn inner(&self, (): &mut (), block: usize, bytes: &[u8], _caps: &Caps, sums: &[i64]) -> Result<i128, DecodeError> {
        let mut inner = 0;
        self.read(block, bytes, |place, units| {
            inner += i128::from(units) * i128::from(sums[place] >> INNER_BITS);
        })?;
        Ok(inner)
    }
}
