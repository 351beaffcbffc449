//! Dense training: every gradient of every step, averaged, and one optimizer that all agree on. The yardstick.

use crate::aggregate::Update;
use crate::compress::{Codec, DenseCodec, Encoded};
use crate::config::OptimizerConfig;
use crate::optimizer::Optimizer;

use super::{Algorithm, ArmError, Engine, Work, mean};

/// See the module.
#[derive(Debug)]
pub struct Ddp {
    codec: DenseCodec,
    optimizer: OptimizerConfig,
}

impl Ddp {
    /// The arm for a model of `params` parameters.
    ///
    /// # Errors
    /// No parameters.
    pub fn new(params: usize, optimizer: &OptimizerConfig) -> Result<Self, ArmError> {
        Ok(Self {
            codec: DenseCodec::new(params)?,
            optimizer: optimizer.clone(),
        })
    }
}

impl Algorithm for Ddp {
    type Codec = DenseCodec;
    type Outer = Optimizer;
    type Own = ();

    fn codec(&self) -> &DenseCodec {
        &self.codec
    }

    fn inner_steps(&self) -> u32 {
        1
    }

    fn start(&self, engine: &Engine) -> Optimizer {
        engine.optimizer(&self.optimizer)
    }

    fn newcomer(&self, _engine: &Engine) {}

    fn work(&self, engine: &mut Engine, _own: &mut (), work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        engine.gradient(work.theta, &work.batches[0])
    }

    fn encode(&self, _own: &(), vector: &[f32]) -> Result<Encoded, ArmError> {
        Ok(self.codec.encode_with(&[], vector, 1)?)
    }

    fn counted(&self, _own: &mut (), _encoded: Encoded) {}

    fn advance(
        &self,
        engine: &mut Engine,
        theta: &mut Vec<f32>,
        outer: &mut Optimizer,
        update: &Update,
        lr: f64,
    ) -> Result<(), ArmError> {
        if update.total_weight() == 0 {
            return Ok(());
        }
        engine.agreed_step(outer, theta, &mean(update), lr)
    }
}
