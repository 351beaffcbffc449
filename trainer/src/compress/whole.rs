//! What the codecs that send every value ([`super::dense`], [`super::int8`]) have in common: shards encoded side by side, a header and a length that
//! follow from the model alone, and sums of whole units.

use std::ops::Range;

use super::codec::CLIP_BITS;
use super::parallel::{run, split};
use super::quantize::FRACTION_BITS;
use super::{CodecError, DecodeError, Encoded};

/// One in units of the sums.
pub(super) const ONE: f64 = (1u64 << FRACTION_BITS) as f64;

/// What a contribution's values are multiplied by: clip times weight.
#[derive(Clone, Copy, Debug)]
pub struct Factor(u128);

impl Factor {
    pub(super) fn new(clip: u64, weight: u64) -> Self {
        Self(u128::from(clip) * u128::from(weight))
    }

    /// `floor(|units| * clip * weight / 2^32)` with the sign of `units`.
    #[inline]
    pub(super) fn of(self, units: i64) -> i64 {
        let magnitude = u128::from(units.unsigned_abs());
        // One multiplication instead of three, and none to be checked, for every weight that a run may have.
        let product = match u64::try_from(self.0) {
            Ok(factor) => magnitude * u128::from(factor),
            Err(_) => magnitude * self.0,
        };
        let scaled = (product >> CLIP_BITS) as i64;
        // A branch on the sign would be guessed wrongly half of the time.
        let sign = units >> 63;
        (scaled ^ sign).wrapping_sub(sign)
    }
}

/// The model's size, if a codec can be made for it: 1 to 2^40 parameters.
pub(super) fn checked_params(params: usize) -> Result<usize, CodecError> {
    if params == 0 || params as u64 > 1 << 40 {
        return Err(CodecError::Params { found: params });
    }
    Ok(params)
}

/// All shards of `delta`, each by `encode`, on at most `threads` threads. There is no accumulator: nothing is left over.
pub(super) fn encode_shards(
    params: usize,
    delta: &[f32],
    shards: usize,
    threads: usize,
    encode: impl Fn(usize) -> Result<Vec<u8>, CodecError> + Sync,
) -> Result<Encoded, CodecError> {
    let (expected, found) = (params, delta.len());
    if expected != found {
        let what = "the pseudo-gradient";
        return Err(CodecError::Length { what, expected, found });
    }
    let encode = &encode;
    let some = |shards: Range<usize>| shards.map(encode).collect::<Result<Vec<_>, _>>();
    let jobs = split(shards, threads).map(|shards| move || some(shards)).collect();
    let mut all = Vec::with_capacity(shards);
    for part in run(jobs) {
        all.extend(part?);
    }
    Ok(Encoded {
        shards: all,
        accumulator: vec![0.0; params],
    })
}

/// Refuses another number of shards than the model has.
pub(super) fn check_count(expected: usize, found: usize) -> Result<(), DecodeError> {
    match expected == found {
        true => Ok(()),
        false => Err(DecodeError::ShardCount { expected, found }),
    }
}

/// What follows a shard's header, which is to be `header`; `expected` is the length of the whole.
pub(super) fn after_header(shard: usize, bytes: &[u8], header: [u8; 4], expected: usize) -> Result<&[u8], DecodeError> {
    let begin = &bytes[..header.len().min(bytes.len())];
    if begin != header {
        return Err(DecodeError::Header {
            shard,
            expected: header,
            found: begin.to_vec(),
        });
    }
    if bytes.len() != expected {
        let (expected, found) = (expected as u64, bytes.len());
        return Err(DecodeError::ShardLength { shard, expected, found });
    }
    Ok(&bytes[header.len()..])
}
