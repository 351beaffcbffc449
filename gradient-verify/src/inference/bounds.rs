//! How far apart an honest prover and an honest checker may be.

use super::fingerprint::Distance;

/// What is allowed; see the table in this crate's README.md for what was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Values of one fingerprint whose exponents differ, as a share of all.
    pub exponents: f64,
    /// Mean difference in one fingerprint, in units of the last bit of a bfloat16.
    pub mean: f64,
    /// Median difference in one fingerprint.
    pub median: f64,
    /// Mean difference over all fingerprints together, which is known better than that of one.
    pub overall: f64,
    /// Slack of a token, in score.
    pub slack: f64,
}

impl Default for Bounds {
    /// For single precision on both sides. Of the 128 values of one fingerprint a few may round the other way; the nearest cheat that was measured moves
    /// 0.13 units overall, honest machines less than 0.001.
    fn default() -> Self {
        Self {
            exponents: 0.04,
            mean: 0.1,
            median: 0.0,
            overall: 0.03,
            slack: 1e-3,
        }
    }
}

impl Bounds {
    /// Whether one fingerprint's distance is within them.
    #[must_use]
    pub fn allow(&self, distance: &Distance) -> bool {
        let exponents = distance.exponents as f64 <= self.exponents * distance.compared as f64;
        exponents && distance.mean <= self.mean && distance.median <= self.median
    }
}
