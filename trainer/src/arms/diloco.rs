//! DiLoCo (arXiv 2311.08105, algorithm 1): inner steps with a private optimizer, every value sent, Nesterov momentum outside. With Muon inside it is
//! MuLoCo (arXiv 2505.23725).

use crate::aggregate::Update;
use crate::compress::{Codec, Encoded};
use crate::config::OptimizerConfig;
use crate::optimizer::Optimizer;

use super::{Algorithm, ArmError, Engine, Work, mean};

/// Outer learning rate, the paper's best (section 3).
const OUTER_RATE: f32 = 0.7;
/// Outer Nesterov momentum, likewise.
const OUTER_MOMENTUM: f32 = 0.9;

/// See the module. `C` is how every value is written: [`DenseCodec`](crate::compress::DenseCodec) or
/// [`Int8Codec`](crate::compress::Int8Codec).
#[derive(Debug)]
pub struct DiLoCo<C> {
    codec: C,
    optimizer: OptimizerConfig,
    inner_steps: u32,
}

impl<C: Codec> DiLoCo<C> {
    /// The arm that writes with `codec`.
    pub fn new(codec: C, optimizer: &OptimizerConfig, inner_steps: u32) -> Self {
        Self {
            codec,
            optimizer: optimizer.clone(),
            inner_steps,
        }
    }
}

impl<C: Codec> Algorithm for DiLoCo<C> {
    type Codec = C;
    /// Outer momentum.
    type Outer = Vec<f32>;
    /// The inner optimizer.
    type Own = Optimizer;

    fn codec(&self) -> &C {
        &self.codec
    }

    fn inner_steps(&self) -> u32 {
        self.inner_steps
    }

    fn start(&self, engine: &Engine) -> Vec<f32> {
        vec![0.0; engine.params()]
    }

    fn newcomer(&self, engine: &Engine) -> Optimizer {
        engine.optimizer(&self.optimizer)
    }

    fn work(&self, engine: &mut Engine, own: &mut Optimizer, work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        engine.steps(own, work)
    }

    fn encode(&self, _own: &Optimizer, vector: &[f32]) -> Result<Encoded, ArmError> {
        Ok(self.codec.encode_with(&[], vector, 1)?)
    }

    fn counted(&self, _own: &mut Optimizer, _encoded: Encoded) {}

    fn advance(
        &self,
        _engine: &mut Engine,
        theta: &mut Vec<f32>,
        outer: &mut Vec<f32>,
        update: &Update,
        _lr: f64,
    ) -> Result<(), ArmError> {
        if update.total_weight() == 0 {
            return Ok(());
        }
        nesterov(theta, outer, &mean(update));
        Ok(())
    }
}

/// `m <- .9 m + g; theta <- theta - .7 (g + .9 m)`, each operation rounded once, as in PyTorch's SGD.
fn nesterov(theta: &mut [f32], momentum: &mut [f32], gradient: &[f32]) {
    for ((theta, m), g) in theta.iter_mut().zip(momentum).zip(gradient) {
        *m = OUTER_MOMENTUM * *m + g;
        *theta -= OUTER_RATE * (g + OUTER_MOMENTUM * *m);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_step_is_nesterovs() {
        let (mut theta, mut momentum) = ([1.0f32], [0.0f32]);
        nesterov(&mut theta, &mut momentum, &[0.1]);
        assert!((theta[0] - (1.0 - 0.7 * 0.19)).abs() < 1e-6, "{theta:?}");
        nesterov(&mut theta, &mut momentum, &[0.1]);
        // m = .09 + .1 = .19; step = .7 (.1 + .171)
        assert!((theta[0] - (1.0 - 0.7 * 0.19 - 0.7 * 0.271)).abs() < 1e-6, "{theta:?}");
    }
}
