//! DeMo (arXiv 2411.19870, algorithm 1): every step, each peer adds its gradient to its momentum, takes the largest coefficients of the momentum's
//! cosine transform out of it and sends them; all add them up, transform back, and move by the sign.
//!
//! The momentum lives in the transform's domain, where it is the same linear recursion. Coefficients are sent as sign and one scale per 4096 of them, by
//! the sparse codec, where the paper's have full precision; what is taken out of the momentum is the coefficient itself, as in the paper.

use crate::aggregate::Update;
use crate::compress::{Encoded, SparseCodec};

use super::{Algorithm, ArmError, Engine, Tiles, Work, mean};

/// Coefficients that share a scale: those of one tile of 64 by 64.
const CHUNK: usize = 4096;
/// Decay of the momentum (the paper's `compression_decay`).
const DECAY: f32 = 0.999;

/// See the module.
#[derive(Debug)]
pub struct Demo {
    codec: SparseCodec,
    tiles: Tiles,
}

impl Demo {
    /// The arm that sends `k` of 4096 coefficients of the model of `engine`.
    ///
    /// # Errors
    /// `k` out of bounds.
    pub fn new(engine: &Engine, k: usize) -> Result<Self, ArmError> {
        Ok(Self {
            codec: SparseCodec::new(engine.params(), CHUNK, k, DECAY)?,
            tiles: engine.tiles(),
        })
    }
}

impl Algorithm for Demo {
    type Codec = SparseCodec;
    type Outer = ();
    /// Momentum, in the transform's domain.
    type Own = Vec<f32>;

    fn codec(&self) -> &SparseCodec {
        &self.codec
    }

    fn inner_steps(&self) -> u32 {
        1
    }

    fn start(&self, _engine: &Engine) {}

    fn newcomer(&self, engine: &Engine) -> Vec<f32> {
        vec![0.0; engine.params()]
    }

    fn work(&self, engine: &mut Engine, _own: &mut Vec<f32>, work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        let gradient = engine.gradient(work.theta, &work.batches[0])?;
        Ok(self.tiles.forward(&gradient))
    }

    fn encode(&self, own: &Vec<f32>, vector: &[f32]) -> Result<Encoded, ArmError> {
        let mut encoded = self.codec.encode_with(own, vector, 1)?;
        let sent = self
            .codec
            .decode(&encoded.shards)
            .map_err(|source| crate::aggregate::AggregateError::Decode {
                contribution: 0,
                source,
            })?;
        sent.for_each(|param, _| encoded.accumulator[param] = 0.0);
        Ok(encoded)
    }

    fn counted(&self, own: &mut Vec<f32>, encoded: Encoded) {
        *own = encoded.accumulator;
    }

    fn advance(
        &self,
        _engine: &mut Engine,
        theta: &mut Vec<f32>,
        _outer: &mut (),
        update: &Update,
        lr: f64,
    ) -> Result<(), ArmError> {
        let lr = lr as f32;
        for (theta, direction) in theta.iter_mut().zip(self.tiles.inverse(&mean(update))) {
            if direction != 0.0 {
                *theta -= lr.copysign(direction);
            }
        }
        Ok(())
    }
}
