//! The learning rate as a function of the tokens counted so far in the whole run: linear warm-up, then a cosine down to a floor, or the peak and a
//! straight decay at the end (WSD), or the peak for good.
//!
//! It depends on agreed state only (the record's token count), so a late joiner trains at the same rate as everyone, and it is constant
//! within a round: every peer's every inner step of round r uses the count that record r-1 closed with. Only IEEE additions,
//! multiplications and divisions are used (no library cosine), so the value is the same to the last bit on every machine.

use crate::config::{ScheduleConfig, ScheduleShape, TrainingConfig};

/// The factor on the peak learning rate, within `[0, 1]`, after `global_tokens` counted tokens.
///
/// The warm-up starts at a tenth of the peak rather than at nothing: with the rate constant within a round, the first
/// round would otherwise be worth no step at all.
pub fn ratio(schedule: &ScheduleConfig, global_tokens: u64) -> f64 {
    if global_tokens < schedule.warmup_tokens {
        let done = global_tokens as f64 / schedule.warmup_tokens as f64;
        return WARMUP_START + (1.0 - WARMUP_START) * done;
    }
    let above_floor = match schedule.shape {
        ScheduleShape::Constant => return 1.0,
        _ if global_tokens >= schedule.total_tokens => 0.0,
        ScheduleShape::Cosine => {
            let span = (schedule.total_tokens - schedule.warmup_tokens) as f64;
            let done = (global_tokens - schedule.warmup_tokens) as f64 / span;
            0.5 * (1.0 + cos_pi(done))
        }
        ScheduleShape::Wsd => {
            let left = (schedule.total_tokens - global_tokens) as f64;
            (left / schedule.decay_tokens as f64).min(1.0)
        }
    };
    schedule.min_ratio + (1.0 - schedule.min_ratio) * above_floor
}

/// Share of the peak in a run's very first round.
const WARMUP_START: f64 = 0.1;

/// The learning rate of the round that starts after `global_tokens` counted tokens.
pub fn learning_rate(training: &TrainingConfig, global_tokens: u64) -> f64 {
    training.optimizer.lr * ratio(&training.schedule, global_tokens)
}

/// `cos(pi x)` for x in `[0, 1]`, by the Taylor series of the sine about one half: `cos(pi x) = sin(pi (1/2 - x))`, with an argument of at
/// most pi/2 in magnitude. Twelve terms leave less than 1e-15 of error.
pub(crate) fn cos_pi(x: f64) -> f64 {
    let angle = std::f64::consts::PI * (0.5 - x);
    let square = angle * angle;
    let mut term = angle;
    let mut sum = angle;
    for n in 1..12_u32 {
        let n = f64::from(2 * n);
        term = -term * square / (n * (n + 1.0));
        sum += term;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: ScheduleConfig = ScheduleConfig {
        shape: ScheduleShape::Cosine,
        decay_tokens: 0,
        warmup_tokens: 1000,
        total_tokens: 11_000,
        min_ratio: 0.1,
    };

    #[test]
    fn the_rate_rises_linearly_then_falls_as_a_cosine_to_its_floor() {
        let at = |tokens| ratio(&RUN, tokens);
        assert_eq!(at(0), 0.1);
        assert!((at(500) - 0.55).abs() < 1e-12);
        assert_eq!(at(1000), 1.0);
        assert!((at(6000) - 0.55).abs() < 1e-12);
        assert!((at(3500) - (0.1 + 0.9 * 0.5 * (1.0 + 0.5_f64.sqrt()))).abs() < 1e-12);
        assert_eq!(at(11_000), 0.1);
        assert_eq!(at(u64::MAX), 0.1);
    }

    #[test]
    fn a_stable_rate_stays_at_the_peak_until_its_last_decay() {
        let run = ScheduleConfig {
            shape: ScheduleShape::Wsd,
            decay_tokens: 2000,
            ..RUN
        };
        assert!((ratio(&run, 500) - 0.55).abs() < 1e-12);
        assert_eq!((ratio(&run, 1000), ratio(&run, 9000)), (1.0, 1.0));
        assert!((ratio(&run, 10_000) - 0.55).abs() < 1e-12);
        assert_eq!((ratio(&run, 11_000), ratio(&run, u64::MAX)), (0.1, 0.1));
    }

    #[test]
    fn a_constant_rate_never_falls() {
        let run = ScheduleConfig {
            shape: ScheduleShape::Constant,
            ..RUN
        };
        assert!((ratio(&run, 500) - 0.55).abs() < 1e-12);
        assert_eq!((ratio(&run, 1000), ratio(&run, u64::MAX)), (1.0, 1.0));
    }

    #[test]
    fn the_rate_scales_with_its_peak() {
        let mut training = TrainingConfig {
            schedule: RUN,
            ..TrainingConfig::default()
        };
        training.optimizer.lr = 0.004;
        assert!((learning_rate(&training, 6000) - 0.004 * 0.55).abs() < 1e-15);
    }

    #[test]
    fn the_cosine_agrees_with_the_library() {
        for i in 0..=1000 {
            let x = f64::from(i) / 1000.0;
            assert!((cos_pi(x) - (std::f64::consts::PI * x).cos()).abs() < 1e-15, "at {x}");
        }
    }

    #[test]
    fn a_run_without_warm_up_starts_at_the_peak() {
        let run = ScheduleConfig {
            warmup_tokens: 0,
            ..RUN
        };
        assert_eq!(ratio(&run, 0), 1.0);
        let all_warm_up = ScheduleConfig {
            warmup_tokens: 11_000,
            ..RUN
        };
        assert_eq!(ratio(&all_warm_up, 11_000), 0.1);
    }
}
