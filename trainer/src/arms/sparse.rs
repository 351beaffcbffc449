//! Sparse local rounds: inner steps, then the k largest values of each chunk with error feedback, no outer momentum (SparseLoCo, arXiv
//! 2508.15706, algorithm 1; the codec and the sum are Murmur's own).

use crate::aggregate::Update;
use crate::apply::{OuterRate, apply_with};
use crate::compress::{Encoded, SparseCodec};
use crate::config::{CompressionConfig, OptimizerConfig};
use crate::optimizer::Optimizer;

use super::{Algorithm, ArmError, Engine, Work};

/// See the module.
#[derive(Debug)]
pub struct Sparse {
    codec: SparseCodec,
    optimizer: OptimizerConfig,
    inner_steps: u32,
    outer_rate: OuterRate,
    /// Whether the inner optimizer's state goes on from round to round, private to the peer.
    carry: bool,
    /// Whether what was not sent is kept for later rounds.
    accumulate: bool,
}

/// What a peer keeps.
pub struct Own {
    accumulator: Vec<f32>,
    inner: Option<Optimizer>,
}

impl Own {
    /// What was not sent yet, one value a parameter.
    #[must_use]
    pub fn accumulator(&self) -> &[f32] {
        &self.accumulator
    }
}

impl Sparse {
    /// The arm for a model of `params` parameters.
    ///
    /// # Errors
    /// Compression or outer rate out of bounds.
    pub fn new(
        params: usize,
        compression: &CompressionConfig,
        optimizer: &OptimizerConfig,
        inner_steps: u32,
        outer_rate: f64,
    ) -> Result<Self, ArmError> {
        let CompressionConfig { chunk, k, beta, .. } = *compression;
        Ok(Self {
            codec: SparseCodec::new(params, chunk, k, beta as f32)?,
            optimizer: optimizer.clone(),
            inner_steps,
            outer_rate: OuterRate::new(outer_rate)?,
            carry: false,
            accumulate: true,
        })
    }

    /// The same, with inner state carried from round to round.
    #[must_use]
    pub fn carrying(self, carry: bool) -> Self {
        Self { carry, ..self }
    }

    /// The same, with or without an accumulator.
    #[must_use]
    pub fn accumulating(self, accumulate: bool) -> Self {
        Self { accumulate, ..self }
    }
}

impl Algorithm for Sparse {
    type Codec = SparseCodec;
    type Outer = ();
    type Own = Own;

    fn codec(&self) -> &SparseCodec {
        &self.codec
    }

    fn inner_steps(&self) -> u32 {
        self.inner_steps
    }

    fn start(&self, _engine: &Engine) {}

    fn newcomer(&self, engine: &Engine) -> Own {
        Own {
            accumulator: vec![0.0; engine.params()],
            inner: None,
        }
    }

    fn work(&self, engine: &mut Engine, own: &mut Own, work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        let mut inner = own.inner.take().unwrap_or_else(|| engine.optimizer(&self.optimizer));
        let delta = engine.steps(&mut inner, work)?;
        own.inner = self.carry.then_some(inner);
        Ok(delta)
    }

    fn encode(&self, own: &Own, vector: &[f32]) -> Result<Encoded, ArmError> {
        Ok(self.codec.encode_with(&own.accumulator, vector, 1)?)
    }

    fn counted(&self, own: &mut Own, encoded: Encoded) {
        if self.accumulate {
            own.accumulator = encoded.accumulator;
        }
    }

    fn advance(
        &self,
        _engine: &mut Engine,
        theta: &mut Vec<f32>,
        _outer: &mut (),
        update: &Update,
        _lr: f64,
    ) -> Result<(), ArmError> {
        Ok(apply_with(theta, update, self.outer_rate, 1)?)
    }
}
