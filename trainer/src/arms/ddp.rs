//! Dense training: every gradient of every step, averaged, and one optimizer that all agree on. The yardstick.
//!
//! The optimizer's state is agreed, too: a joiner has it from the snapshot. On the CPU AdamW is plain Rust, elementwise, and has the same bits
//! everywhere. Muon multiplies matrices in libtorch and hasn't, so runs may not choose it; the bench, which has one replica, may.

use tch::{Device, Tensor};

use super::{Algorithm, ArmError, clock, fits, mean, parts};
use crate::aggregate::Update;
use crate::compress::{AnyCodec, Codec};
use crate::config::{ModelConfig, TrainingConfig};
use crate::local::LocalError;
use crate::model::host;
use crate::optimizer::{Optimizer, clip_scale};
use crate::schedule::learning_rate;

/// See the module.
#[derive(Debug)]
pub struct Ddp {
    codec: AnyCodec,
    model: ModelConfig,
    training: TrainingConfig,
}

impl Ddp {
    /// Gradients of this model by `codec`, steps by the optimizer of `training`.
    #[must_use]
    pub fn new(codec: AnyCodec, model: &ModelConfig, training: &TrainingConfig) -> Self {
        Self {
            codec,
            model: model.clone(),
            training: training.clone(),
        }
    }

    fn state_len(&self) -> usize {
        Optimizer::state_len(&self.training.optimizer, &self.model)
    }

    /// One step on `theta` along a gradient that all agree on.
    fn step(&self, theta: &mut [f32], state: &mut [f32], gradient: &[f32], lr: f64) -> Result<(), LocalError> {
        let squares = gradient.iter().map(|g| f64::from(*g) * f64::from(*g));
        let scale = clip_scale(squares.sum::<f64>().sqrt(), self.training.grad_clip);
        let Self { model, training, .. } = self;
        let mut optimizer = Optimizer::new(&training.optimizer, training.precision, model, Device::Cpu);
        optimizer.load_state(state)?;
        let mut moved = Tensor::f_from_slice(theta)?;
        optimizer.step(&mut moved, &Tensor::f_from_slice(gradient)?, scale, lr)?;
        theta.copy_from_slice(&host::to_vec(&moved));
        state.copy_from_slice(&optimizer.state());
        Ok(())
    }
}

impl Algorithm for Ddp {
    fn codec(&self) -> &AnyCodec {
        &self.codec
    }

    fn outer(&self) -> Vec<(&'static str, usize)> {
        vec![clock::TENSOR, ("outer.optimizer", self.state_len())]
    }

    fn advance(&self, agreed: &mut [f32], update: &Update, tokens: u64, _threads: usize) -> Result<(), ArmError> {
        let params = self.codec.params();
        fits(params, update)?;
        let (theta, outer) = parts(agreed, params, clock::TENSOR.1 + self.state_len())?;
        let (clock, state) = outer.split_at_mut(clock::TENSOR.1);
        if update.total_weight() > 0 {
            let lr = learning_rate(&self.training, clock::read(clock));
            self.step(theta, state, &mean(update), lr)?;
        }
        clock::add(clock, tokens);
        Ok(())
    }
}
