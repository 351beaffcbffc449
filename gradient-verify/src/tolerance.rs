//! How far a claim may be from its replay, and whether what was sent is what the codec sends.
//!
//! **Distance.** Relative L2, `||claim - replay|| / ||replay||`. Never the cosine: it passes a tenth of the work skipped, and any scaling.
//! Measured on a toy network, in fp32: honest replays in any order or batch split differ by 2e-7 to 1e-6; one of 256 samples swapped by
//! 8.5e-2; one step of 30 left out by 2.2e-2; 10% of the samples skipped by 0.33; wrong data by 1.4. A bound of 0.01 lies between: below what is
//! computed in bf16 (1.6e-2 and more), and more than twice what rounding can do at the floor below.
//!
//! With `murmur audit calibrate` on the demo's model (rounds of 15 steps, twice 64 honest replays in eight ways on an AMD EPYC with AVX-512; the report
//! of the second is in `gradient-verify/calibration`): honest fp32 up to 1.1e-5 and bf16 up to 6.7e-2, half of them the same to the bit; one sequence of 120 swapped
//! from 3.8e-2 on; one step of 15 left out from 7.3e-2; half of them 0.52; bf16 in place of fp32 from 2.7e-2.
//!
//! **Floor.** Parameters are `f32`, so differences of them carry the rounding of the parameters themselves. A pseudo-gradient that
//! is shorter than [`NOISE_FLOOR`] times the model is of the size of that rounding and no evidence (a schedule that ends at a rate of zero
//! gives exactly zero); lengths are then compared to the floor. The floor follows from the agreed model, never from what a member says.
//!
//! **Selection.** The sum `a = beta*e + d` is recovered from the member's own bytes as `e' + sent`, for `e' = fl(a - sent)`. That is
//! exact but for one rounding, known for each value, so no threshold near ties is needed: each value sent must reach, within its
//! rounding, the largest one kept; its sign must be that of the sum; the scale must be the mean magnitude within
//! [`SCALE_SLACK`]. Without this a member could subtract from its accumulator whatever it sends, noise or the very opposite, and the
//! distance would not show it.

use trainer::compress::quantize::scale_value;

/// Least length of a pseudo-gradient that is compared to itself, as a share of the model's length: `2^-16`, 256 times what rounding to
/// `f32` can move.
pub const NOISE_FLOOR: f64 = 1.0 / 65_536.0;

/// Largest relative difference between a chunk's scale and the mean magnitude it stands for. Neighbouring scales are 9.05% apart, so the nearest
/// is within 4.5%, the smallest ones (rounded to whole units) within 7%.
pub const SCALE_SLACK: f64 = 0.08;

/// Relative rounding of one `f32` subtraction, doubled to be safe.
const ROUNDING: f64 = 1.0 / (1u64 << 23) as f64;

/// Rounding of a subtraction among the smallest numbers.
const SMALLEST: f64 = f32::MIN_POSITIVE as f64 * ROUNDING;

/// Two pseudo-gradients compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// `||claim - replay|| / ||replay||`, the divisor at least the floor; finite and not negative.
    pub relative: f64,
    /// `||claim|| / ||replay||`, with the same divisor.
    pub norm_ratio: f64,
}

/// Sums of squares over all parameters, taken chunk by chunk: a partial sum is added to the total once a chunk, so that sums over billions keep
/// their precision.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    difference: f64,
    claim: f64,
    replay: f64,
    theta: f64,
}

impl Sums {
    /// Adds one chunk; all slices have its length. `claim` is in double precision, as it is a sum itself.
    pub fn add(&mut self, claim: &[f64], replay: &[f32], theta: &[f32]) {
        let mut chunk = Self::default();
        for ((claim, replay), theta) in claim.iter().zip(replay).zip(theta) {
            let (replay, theta) = (f64::from(*replay), f64::from(*theta));
            chunk.difference += (claim - replay).powi(2);
            chunk.claim += claim.powi(2);
            chunk.replay += replay.powi(2);
            chunk.theta += theta.powi(2);
        }
        self.difference += chunk.difference;
        self.claim += chunk.claim;
        self.replay += chunk.replay;
        self.theta += chunk.theta;
    }

    /// The distance over everything added. Two zeros are equal; anything is infinitely far from nothing at all.
    #[must_use]
    pub fn distance(&self) -> Distance {
        let length = self.replay.sqrt().max(NOISE_FLOOR * self.theta.sqrt());
        let relative = |squares: f64, of_nothing: f64| match (squares > 0.0, length > 0.0) {
            (_, true) => squares.sqrt() / length,
            (true, false) => f64::MAX,
            (false, false) => of_nothing,
        };
        Distance {
            relative: relative(self.difference, 0.0),
            norm_ratio: relative(self.claim, 1.0),
        }
    }
}

/// Checks one chunk after another for what the codec would have sent; keeps its buffer.
#[derive(Debug, Default)]
pub struct Selection {
    magnitudes: Vec<f64>,
}

impl Selection {
    /// Whether `sent` (the decoded values, zero where nothing was sent) is what the codec makes of the sum `kept + sent`, `k` values at most. The
    /// slices are one chunk, all finite; a strict decoder has made sure that the values sent have one magnitude and the right number.
    pub fn follows(&mut self, kept: &[f32], sent: &[f32], k: usize) -> bool {
        let scale = sent.iter().fold(0.0, |scale: f32, sent| scale.max(sent.abs()));
        if scale == 0.0 {
            return self.is_silent(kept, k);
        }
        let Some(ranks) = Ranks::of(kept, sent) else {
            return false;
        };
        let (mean, error) = (ranks.sum / ranks.count, ranks.rounding / ranks.count);
        let low = f64::from(scale) * (1.0 - SCALE_SLACK);
        let high = f64::from(scale) * (1.0 + SCALE_SLACK);
        // Above the table's end the largest scale stands for everything.
        let largest = scale >= scale_value(u8::MAX);
        ranks.in_order() && mean + error >= low && (largest || mean - error <= high)
    }

    /// The same where values have levels of their own, which are not checked: what was sent has the right signs, and nothing larger was kept.
    #[must_use]
    pub fn in_order(kept: &[f32], sent: &[f32]) -> bool {
        Ranks::of(kept, sent).is_some_and(|ranks| ranks.in_order())
    }

    /// Whether a chunk that sent nothing had nothing to send: the mean of its `k` largest is below the smallest scale.
    fn is_silent(&mut self, kept: &[f32], k: usize) -> bool {
        let k = k.min(kept.len());
        if k == 0 {
            return true;
        }
        self.magnitudes.clear();
        self.magnitudes.extend(kept.iter().map(|kept| f64::from(kept.abs())));
        self.magnitudes.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        self.magnitudes[..k].iter().sum::<f64>() / k as f64 <= f64::from(scale_value(1))
    }
}

/// Magnitudes of a chunk's sums, as far as they can be known.
struct Ranks {
    weakest_sent: f64,
    strongest_kept: f64,
    /// Of those sent: their number, sum, and what rounding may have taken from it.
    count: f64,
    sum: f64,
    rounding: f64,
}

impl Ranks {
    /// Those of the sum `kept + sent`; none if a value was sent with the wrong sign.
    fn of(kept: &[f32], sent: &[f32]) -> Option<Self> {
        let mut ranks = Self {
            weakest_sent: f64::INFINITY,
            strongest_kept: 0.0,
            count: 0.0,
            sum: 0.0,
            rounding: 0.0,
        };
        for (kept, sent) in kept.iter().zip(sent) {
            let (kept, sent) = (f64::from(*kept), f64::from(*sent));
            let value = kept + sent;
            if sent == 0.0 {
                ranks.strongest_kept = ranks.strongest_kept.max(value.abs());
                continue;
            }
            let error = kept.abs() * ROUNDING + SMALLEST;
            if value * sent.signum() < -error {
                return None;
            }
            ranks.weakest_sent = ranks.weakest_sent.min(value.abs() + error);
            ranks.count += 1.0;
            ranks.sum += value.abs();
            ranks.rounding += error;
        }
        Some(ranks)
    }

    fn in_order(&self) -> bool {
        self.weakest_sent >= self.strongest_kept
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use trainer::compress::SparseCodec;

    use super::*;

    const CHUNK: usize = 128;
    const K: usize = 16;

    /// What is kept and sent of `sum` by the codec itself.
    fn encoded(sum: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let codec = SparseCodec::new(sum.len(), CHUNK, K, 0.5).unwrap();
        let encoded = codec.encode(&vec![0.0; sum.len()], sum).unwrap();
        (encoded.accumulator, codec.decode(&encoded.shards).unwrap().to_dense())
    }

    fn follows(kept: &[f32], sent: &[f32]) -> bool {
        let mut selection = Selection::default();
        let mut chunks = kept.chunks(CHUNK).zip(sent.chunks(CHUNK));
        chunks.all(|(kept, sent)| selection.follows(kept, sent, K))
    }

    /// Values in `-1..1`, the same for the same seed.
    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn whatever_the_codec_sends_follows() {
        for seed in 0..400 {
            // A last chunk shorter than k now and then, magnitudes from below the smallest scale to far above the largest, tails of all
            // weights, ties and zeros.
            let octaves = (seed % 70) as i32 - 40;
            let tail = 1 + (seed % 9) as i32;
            let sum: Vec<f32> = noise(seed, 3 * CHUNK + (seed as usize % 40))
                .iter()
                .map(|x| x.signum() * x.abs().powi(tail) * 2f32.powi(octaves))
                .map(|x| if seed % 3 == 0 { (x * 4.0).round() / 4.0 } else { x })
                .collect();
            let (kept, sent) = encoded(&sum);
            assert!(follows(&kept, &sent), "seed {seed}");
        }
    }

    #[test]
    fn one_giant_among_dwarfs_is_no_accusation() {
        // The mean of the selected exceeds all but one of them by far: what is kept has lost their last bits.
        let mut sum = noise(5, CHUNK);
        sum.iter_mut().for_each(|x| *x *= 1e-7);
        for giant in [1.0, 100.0, 1e9, -1e30] {
            sum[77] = giant;
            let (kept, sent) = encoded(&sum);
            assert!(follows(&kept, &sent), "{giant}");
        }
    }

    /// An honest chunk's sum, what it sent and the number of a value that it sent, and of one that it kept.
    fn honest() -> (Vec<f32>, Vec<f32>, usize, usize) {
        let sum = noise(9, CHUNK);
        let (_, sent) = encoded(&sum);
        let chosen = sent.iter().position(|sent| *sent != 0.0).unwrap();
        let left = sent.iter().position(|sent| *sent == 0.0).unwrap();
        (sum, sent, chosen, left)
    }

    /// What a member keeps that wants the distance to show nothing.
    fn kept(sum: &[f32], sent: &[f32]) -> Vec<f32> {
        sum.iter().zip(sent).map(|(sum, sent)| sum - sent).collect()
    }

    #[test]
    fn other_indices_do_not_follow() {
        let (sum, mut sent, chosen, left) = honest();
        assert!(follows(&kept(&sum, &sent), &sent));
        sent.swap(chosen, left);
        assert!(!follows(&kept(&sum, &sent), &sent));
    }

    #[test]
    fn a_flipped_sign_does_not_follow() {
        let (sum, mut sent, chosen, _) = honest();
        sent[chosen] = -sent[chosen];
        assert!(!follows(&kept(&sum, &sent), &sent));
    }

    #[test]
    fn another_scale_does_not_follow() {
        let (sum, honest, ..) = honest();
        for factor in [0.1, 0.8, 1.2, 50.0] {
            let sent: Vec<f32> = honest.iter().map(|sent| sent * factor).collect();
            assert!(!follows(&kept(&sum, &sent), &sent), "{factor}");
        }
    }

    #[test]
    fn silence_follows_only_from_nothing_to_say() {
        let silence = [0.0; CHUNK];
        assert!(follows(&silence, &silence));
        assert!(!follows(&noise(3, CHUNK), &silence));
    }

    fn distance(claim: &[f64], replay: &[f32], theta: &[f32]) -> Distance {
        let mut sums = Sums::default();
        for i in 0..claim.len() {
            sums.add(&claim[i..=i], &replay[i..=i], &theta[i..=i]);
        }
        sums.distance()
    }

    #[test]
    fn the_distance_is_relative_to_the_replay() {
        let found = distance(&[3.6, 4.8], &[3.0, 4.0], &[1.0, 1.0]);
        assert!(
            (found.relative - 0.2).abs() < 1e-12 && (found.norm_ratio - 1.2).abs() < 1e-12,
            "{found:?}"
        );
    }

    #[test]
    fn a_round_that_moved_nothing_accuses_nobody_for_rounding() {
        let found = distance(&[1e-8, -1e-8], &[0.0, 0.0], &[1.0, 1.0]);
        assert!(found.relative < 1e-3, "{found:?}");
        let found = distance(&[0.1, 0.1], &[0.0, 0.0], &[1.0, 1.0]);
        assert!(found.relative > 1e3, "{found:?}");
    }

    #[test]
    fn nothing_is_equal_to_nothing_and_far_from_something() {
        let nothing = Distance {
            relative: 0.0,
            norm_ratio: 1.0,
        };
        assert_eq!(distance(&[0.0], &[0.0], &[0.0]), nothing);
        assert_eq!(distance(&[1e-30], &[0.0], &[0.0]).relative, f64::MAX);
    }
}
