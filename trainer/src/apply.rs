//! The agreed update, applied to the model: the one place where integers become floats again, the same bits everywhere.
//!
//! A pseudo-gradient is `theta_r - theta_local`, so the model moves against the mean: `theta - rate * sum / total weight`. For
//! each parameter, in IEEE 754 arithmetic rounding to nearest, no fused multiply-add:
//!
//! ```text
//! factor = fl64(rate units / (total weight * 2^48))        once; the divisor is exact, or rounded once
//! step   = fl32(fl64(fl64(sum) * factor))                  sum in units of 2^-32, rate in units of 2^-16
//! theta  = fl32(theta - step)
//! ```
//!
//! Each operation is one that every processor rounds alike, and parameters do not depend on one another, so threads and
//! vector width cannot matter. There is no outer momentum: accumulators carry it.

use crate::aggregate::Update;
use crate::compress::parallel::{available_threads, run, split};
use crate::compress::quantize::FRACTION_BITS;

/// Fraction bits of an [`OuterRate`].
const RATE_BITS: u32 = 16;

/// Threads are worth their start only from this many parameters each.
const PARAMS_PER_THREAD: usize = 1 << 18;

/// The outer learning rate in fixed point: a multiple of `2^-16` up to 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterRate(u32);

/// An update that cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ApplyError {
    /// The rate is negative, too large, not a number, or so small that it would be zero.
    #[error("the outer rate must be 0 or from 2^-16 to {limit}, not {found}")]
    Rate {
        /// Largest rate.
        limit: f64,
        /// The rate asked for.
        found: f64,
    },
    /// The update is for another model.
    #[error("an update of {found} parameters for a model of {expected}")]
    Length {
        /// Parameters of the model.
        expected: usize,
        /// Parameters of the update.
        found: usize,
    },
}

impl OuterRate {
    /// The largest rate.
    pub const MAX: f64 = 1024.0;

    /// The multiple of `2^-16` nearest to `rate`, halves away from zero; multiplying by `2^16` is exact, so all peers agree.
    ///
    /// # Errors
    /// A rate that is negative, above [`OuterRate::MAX`], not a number, or positive but rounded to zero.
    pub fn new(rate: f64) -> Result<Self, ApplyError> {
        let units = (rate * f64::from(1 << RATE_BITS)).round();
        let lost = rate > 0.0 && units == 0.0;
        if !(0.0..=Self::MAX).contains(&rate) || lost {
            return Err(ApplyError::Rate {
                limit: Self::MAX,
                found: rate,
            });
        }
        Ok(Self(units as u32))
    }

    /// The rate in units of `2^-16`.
    #[must_use]
    pub fn units(self) -> u32 {
        self.0
    }

    /// The rate as it is applied.
    #[must_use]
    pub fn value(self) -> f64 {
        f64::from(self.0) / f64::from(1 << RATE_BITS)
    }
}

/// Moves `theta`, one value a parameter, by an agreed update. An update without weight moves nothing.
///
/// # Errors
/// [`ApplyError::Length`]; `theta` is then as before.
pub fn apply(theta: &mut [f32], update: &Update, outer_rate: OuterRate) -> Result<(), ApplyError> {
    apply_with(theta, update, outer_rate, available_threads())
}

/// [`apply`] on at most `threads` threads; the result is the same for any number.
///
/// # Errors
/// As [`apply`].
pub fn apply_with(theta: &mut [f32], update: &Update, outer_rate: OuterRate, threads: usize) -> Result<(), ApplyError> {
    let (expected, found) = (theta.len(), update.sums().len());
    if expected != found {
        return Err(ApplyError::Length { expected, found });
    }
    if update.total_weight() == 0 {
        return Ok(());
    }
    let unit = (1u64 << (FRACTION_BITS + RATE_BITS)) as f64;
    let factor = f64::from(outer_rate.units()) / (update.total_weight() as f64 * unit);
    let mut rest = theta;
    let mut jobs = Vec::new();
    for range in split(expected, threads.min(expected / PARAMS_PER_THREAD)) {
        let part;
        (part, rest) = rest.split_at_mut(range.len());
        let sums = &update.sums()[range];
        jobs.push(move || move_by(part, sums, factor));
    }
    run(jobs);
    Ok(())
}

fn move_by(theta: &mut [f32], sums: &[i64], factor: f64) {
    for (theta, sum) in theta.iter_mut().zip(sums) {
        *theta -= (*sum as f64 * factor) as f32;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_rounded_to_its_unit_or_refused() {
        assert_eq!(OuterRate::new(2.0).unwrap().units(), 2 << 16);
        assert_eq!(OuterRate::new(0.7).unwrap().units(), 45875);
        assert_eq!(OuterRate::new(0.0).unwrap().value(), 0.0);
        for bad in [-0.1, 1024.1, f64::NAN, f64::INFINITY, 1e-9] {
            assert!(OuterRate::new(bad).is_err(), "{bad}");
        }
    }
}
