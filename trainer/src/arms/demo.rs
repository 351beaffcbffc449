//! DeMo (arXiv 2411.19870, algorithm 1): every step, each peer adds its gradient to its momentum, takes the largest coefficients of the momentum's
//! cosine transform out of it and sends them; all add them up, transform back, and move by the sign.
//!
//! The momentum lives in the transform's domain, where it is the same linear recursion: it is the codec's accumulator. Coefficients are sent as sign and
//! one scale per 4096 of them, where the paper's have full precision, and what is taken out of the momentum is what was sent, where the
//! paper takes out the coefficient: so an auditor can add up what was kept, what was sent and what was found.

use super::{Algorithm, ArmError, Tiles, clock, fits, mean, parts};
use crate::aggregate::Update;
use crate::compress::{AnyCodec, Codec};
use crate::config::{ModelConfig, TrainingConfig};
use crate::model::Layout;
use crate::schedule::learning_rate;

/// See the module.
#[derive(Debug)]
pub struct Demo {
    codec: AnyCodec,
    tiles: Tiles,
    training: TrainingConfig,
}

impl Demo {
    /// Coefficients of this model by `codec`, steps at the learning rate of `training`.
    #[must_use]
    pub fn new(codec: AnyCodec, model: &ModelConfig, training: &TrainingConfig) -> Self {
        Self {
            codec,
            tiles: Tiles::new(&Layout::new(model)),
            training: training.clone(),
        }
    }
}

impl Algorithm for Demo {
    fn codec(&self) -> &AnyCodec {
        &self.codec
    }

    fn outer(&self) -> Vec<(&'static str, usize)> {
        vec![clock::TENSOR]
    }

    fn vector(&self, found: Vec<f32>) -> Vec<f32> {
        self.tiles.forward(&found)
    }

    fn advance(&self, agreed: &mut [f32], update: &Update, tokens: u64, _threads: usize) -> Result<(), ArmError> {
        let params = self.codec.params();
        fits(params, update)?;
        let (theta, clock) = parts(agreed, params, clock::TENSOR.1)?;
        let lr = learning_rate(&self.training, clock::read(clock)) as f32;
        for (theta, direction) in theta.iter_mut().zip(self.tiles.inverse(&mean(update))) {
            if direction != 0.0 {
                *theta -= lr.copysign(direction);
            }
        }
        clock::add(clock, tokens);
        Ok(())
    }
}
