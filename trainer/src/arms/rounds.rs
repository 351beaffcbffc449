//! Rounds of inner steps, and one outer step on the mean of what they found.
//!
//! With the sparse codec and no momentum it is SparseLoCo (arXiv 2508.15706, algorithm 1; the codec and the sum are Murmur's own): what was not
//! sent stays in the peer's accumulator. With every value and Nesterov momentum outside it is DiLoCo (arXiv 2311.08105, algorithm 1), with
//! Muon inside MuLoCo (arXiv 2505.23725).

use std::borrow::Cow;

use super::{Algorithm, ArmError, fits, mean, parts};
use crate::aggregate::Update;
use crate::apply::{OuterRate, apply_with};
use crate::compress::{AnyCodec, Codec};
use crate::config::{CompressionConfig, TrainingConfig};

/// See the module.
#[derive(Debug)]
pub struct Rounds {
    codec: AnyCodec,
    compression: CompressionConfig,
    rate: OuterRate,
    /// Of Nesterov's kind; none if 0.
    momentum: f32,
}

impl Rounds {
    /// Contributions by `codec`, and the outer step of these settings.
    ///
    /// # Errors
    /// An outer rate out of bounds.
    pub fn new(codec: AnyCodec, training: &TrainingConfig) -> Result<Self, ArmError> {
        Ok(Self {
            codec,
            compression: training.compression.clone(),
            rate: OuterRate::new(training.outer_rate)?,
            momentum: training.outer_momentum as f32,
        })
    }
}

impl Algorithm for Rounds {
    fn codec(&self) -> &AnyCodec {
        &self.codec
    }

    fn codec_of(&self, round: u64) -> Cow<'_, AnyCodec> {
        match self.compression.k_last {
            None => Cow::Borrowed(&self.codec),
            Some(_) => Cow::Owned(self.codec.with_k(self.compression.k_of(round))),
        }
    }

    fn outer(&self) -> Vec<(&'static str, usize)> {
        match self.momentum {
            0.0 => Vec::new(),
            _ => vec![("outer.momentum", self.codec.params())],
        }
    }

    fn advance(&self, agreed: &mut [f32], update: &Update, _tokens: u64, threads: usize) -> Result<(), ArmError> {
        if self.momentum == 0.0 {
            return Ok(apply_with(agreed, update, self.rate, threads)?);
        }
        let params = self.codec.params();
        fits(params, update)?;
        let (theta, momentum) = parts(agreed, params, params)?;
        if update.total_weight() > 0 {
            nesterov(theta, momentum, &mean(update), self.rate.value() as f32, self.momentum);
        }
        Ok(())
    }
}

/// `m <- mu m + g; theta <- theta - rate (g + mu m)`, each operation rounded once, as in PyTorch's SGD.
fn nesterov(theta: &mut [f32], momentum: &mut [f32], gradient: &[f32], rate: f32, mu: f32) {
    for ((theta, m), g) in theta.iter_mut().zip(momentum).zip(gradient) {
        *m = mu * *m + g;
        *theta -= rate * (g + mu * *m);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_step_is_nesterovs() {
        let (mut theta, mut momentum) = ([1.0f32], [0.0f32]);
        nesterov(&mut theta, &mut momentum, &[0.1], 0.7, 0.9);
        assert!((theta[0] - (1.0 - 0.7 * 0.19)).abs() < 1e-6, "{theta:?}");
        nesterov(&mut theta, &mut momentum, &[0.1], 0.7, 0.9);
        // m = .09 + .1 = .19; step = .7 (.1 + .171)
        assert!((theta[0] - (1.0 - 0.7 * 0.19 - 0.7 * 0.271)).abs() < 1e-6, "{theta:?}");
    }
}
