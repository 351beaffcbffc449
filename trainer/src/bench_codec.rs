//! Rows of `murmur bench codec`: how many bytes a parameter costs, against the entropy of what is sent, and how fast.
//!
//! Speeds are gigabytes of fp32 parameters a second, the best of several runs. The large buffers are those of the run before,
//! as in a peer that goes on round after round. Decoding is measured as it is used, strictly and into the integer sums: alone, where clearing
//! the sums (8 bytes a parameter) takes most of the time, and as one of `TOGETHER` contributions of a round.

use std::hint::black_box;
use std::mem;
use std::time::{Duration, Instant};

use crate::aggregate::{AggregateError, Rule, Weighted, aggregate_by, aggregate_into};
use crate::apply::{ApplyError, OuterRate, apply_with};
use crate::compress::{CodecError, DecodeError, SparseCodec, reference};

/// The reference is timed on at most this many parameters: it is slow.
const REFERENCE_PARAMS: usize = 1 << 20;

/// Parameters in a chunk.
const CHUNK: usize = 4096;

/// Decay of the accumulator.
const BETA: f32 = 0.95;

/// Each speed is measured for about this long, and at least three times.
const MEASURE: Duration = Duration::from_millis(400);

/// Contributions that are summed in one pass for [`Row::decode_gb_s`].
const TOGETHER: usize = 8;

/// One line of the report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// `synthetic` (heavy-tailed) or `pseudo-gradient` (given by the caller).
    pub source: &'static str,
    /// Parameters.
    pub params: usize,
    /// Values sent of each chunk of 4096.
    pub k: usize,
    /// Always `sign` today.
    pub quantizer: &'static str,
    /// Threads at work.
    pub threads: usize,
    /// Bytes of all shards for each parameter.
    pub bytes_per_param: f64,
    /// Entropy of what is sent for each parameter: positions, signs, scales.
    pub entropy_bytes_per_param: f64,
    /// Encoding, GB/s of fp32 parameters.
    pub encode_gb_s: f64,
    /// Strict decoding and adding of one of eight contributions, GB/s of fp32 parameters covered by it.
    pub decode_gb_s: f64,
    /// The same for one alone, clearing of the sums included.
    pub decode_alone_gb_s: f64,
    /// Encoding by the plain reference on one thread, GB/s of fp32 parameters.
    pub reference_encode_gb_s: f64,
}

/// A round's contributions, summed and applied.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Round {
    /// Contributions.
    pub contributions: usize,
    /// Parameters.
    pub params: usize,
    /// Values sent of each chunk of 4096.
    pub k: usize,
    /// Threads at work.
    pub threads: usize,
    /// Seconds from bytes to the new model, by the usual rule; the best of several.
    pub seconds: f64,
    /// The same by the rule of agreement.
    pub agreement_seconds: f64,
}

/// Measures how soon a model of `params` parameters stands where `contributions` take it, from their bytes on.
///
/// # Errors
/// Settings that the codec refuses.
pub fn round(params: usize, k: usize, contributions: usize, threads: usize) -> Result<Round, BenchError> {
    let codec = SparseCodec::new(params, CHUNK, k, BETA)?;
    let mut theta = heavy_tailed(params, 1);
    let shards = codec.encode_with(&vec![0.0; params], &theta, threads)?.shards;
    let weighted = vec![
        Weighted {
            tokens: 1,
            shards: &shards
        };
        contributions
    ];
    let rate = OuterRate::new(1.0)?;
    let mut sums = Vec::new();
    let mut seconds = |rule| -> Result<f64, BenchError> {
        let time = best_time(|| -> Result<(), BenchError> {
            let update = aggregate_by(&codec, &weighted, rule, threads, mem::take(&mut sums))?;
            apply_with(&mut theta, &update, rate, threads)?;
            sums = update.into_sums();
            Ok(())
        });
        Ok(time?.as_secs_f64())
    };
    Ok(Round {
        contributions,
        params,
        k,
        threads,
        seconds: seconds(Rule::MedianNorm)?,
        agreement_seconds: seconds(Rule::Agreement)?,
    })
}

/// Why there is no row.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BenchError {
    /// The codec refuses the settings or the vector.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// What was encoded does not decode: a bug.
    #[error("what was encoded does not decode: {0}")]
    Decode(#[from] DecodeError),
    /// What was encoded cannot be summed: a bug.
    #[error("what was encoded cannot be summed: {0}")]
    Aggregate(#[from] AggregateError),
    /// What was summed cannot be applied: a bug.
    #[error("what was summed cannot be applied: {0}")]
    Apply(#[from] ApplyError),
}

/// Measures one setting on heavy-tailed values made up from a seed.
///
/// # Errors
/// Settings that the codec refuses.
pub fn synthetic_row(params: usize, k: usize, threads: usize) -> Result<Row, BenchError> {
    let delta = heavy_tailed(params, 1);
    // The second round is measured: its accumulator is as full as any later one's is in kind.
    let codec = SparseCodec::new(params, CHUNK, k, BETA)?;
    let accumulator = codec.encode_with(&vec![0.0; params], &delta, threads)?.accumulator;
    row("synthetic", &accumulator, &delta, k, threads)
}

/// Measures one setting on a worker's accumulator and pseudo-gradient, one value a parameter each.
///
/// # Errors
/// Settings that the codec refuses, or values that are not finite.
pub fn pseudo_gradient_row(accumulator: &[f32], delta: &[f32], k: usize, threads: usize) -> Result<Row, BenchError> {
    row("pseudo-gradient", accumulator, delta, k, threads)
}

fn row(source: &'static str, accumulator: &[f32], delta: &[f32], k: usize, threads: usize) -> Result<Row, BenchError> {
    let params = delta.len();
    let codec = SparseCodec::new(params, CHUNK, k, BETA)?;
    let shards = codec.encode_with(accumulator, delta, threads)?.shards;
    let bytes: usize = shards.iter().map(Vec::len).sum();
    let entropy = codec.decode(&shards)?.entropy_bytes();
    let contributions = [Weighted {
        tokens: 1,
        shards: &shards,
    }; TOGETHER];
    let mut buffer = Vec::new();
    let encode = best_time(|| -> Result<(), BenchError> {
        buffer = codec
            .encode_into(accumulator, delta, threads, mem::take(&mut buffer))?
            .accumulator;
        Ok(())
    })?;
    let mut sums = Vec::new();
    let mut decode = |contributions: &[Weighted<'_, Vec<u8>>]| {
        best_time(|| -> Result<(), BenchError> {
            sums = aggregate_into(&codec, contributions, threads, mem::take(&mut sums))?.into_sums();
            Ok(())
        })
    };
    let (alone, together) = (decode(&contributions[..1])?, decode(&contributions)?);
    let some = params.min(REFERENCE_PARAMS);
    let small = SparseCodec::new(some, CHUNK, k, BETA)?;
    let slow = best_time(|| -> Result<(), BenchError> {
        black_box(reference::encode(&small, &accumulator[..some], &delta[..some])?);
        Ok(())
    })?;
    Ok(Row {
        source,
        params,
        k,
        quantizer: "sign",
        threads,
        bytes_per_param: bytes as f64 / params as f64,
        entropy_bytes_per_param: entropy / params as f64,
        encode_gb_s: gb_per_second(params, encode),
        decode_gb_s: gb_per_second(TOGETHER * params, together),
        decode_alone_gb_s: gb_per_second(params, alone),
        reference_encode_gb_s: gb_per_second(some, slow),
    })
}

/// Heavy-tailed values as pseudo-gradients have them: a normal variable times the exponential of another, with a scale that
/// changes from row to row of 512. The same for the same seed.
#[must_use]
pub fn heavy_tailed(params: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut row_scale = 1.0;
    let value = |index| {
        if index % 512 == 0 {
            row_scale = 1e-3 * (0.7 * normal(&mut state)).exp();
        }
        (row_scale * normal(&mut state) * normal(&mut state).exp()) as f32
    };
    (0..params).map(value).collect()
}

/// About normal: the sum of eight uniform variables, scaled to variance one.
fn normal(state: &mut u64) -> f64 {
    let bits = [splitmix(state), splitmix(state)];
    let sum: f64 = bits
        .iter()
        .flat_map(|bits| (0..4).map(move |part| f64::from((bits >> (16 * part)) as u16)))
        .sum();
    (sum / 65536.0 - 4.0) * 1.5f64.sqrt()
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

fn best_time<E>(mut work: impl FnMut() -> Result<(), E>) -> Result<Duration, E> {
    let start = Instant::now();
    let mut best = Duration::MAX;
    let mut runs = 0;
    while runs < 3 || start.elapsed() < MEASURE {
        let begin = Instant::now();
        work()?;
        best = best.min(begin.elapsed());
        runs += 1;
    }
    Ok(best)
}

fn gb_per_second(params: usize, time: Duration) -> f64 {
    4.0 * params as f64 / time.as_secs_f64().max(1e-9) / 1e9
}
