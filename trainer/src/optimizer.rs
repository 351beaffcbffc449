//! The inner optimizers, over flat buffers. Their state starts from zero in every round, so nothing private outlives one; or, with `carry`, it is
//! what the round before left ([`Optimizer::state`]).
//!
//! [`Optimizer::step`] takes the flat parameters and the flat gradient. With `muon`, the blocks' matrices take orthogonalised momentum
//! (`optimizer/muon.rs`) and embedding, head and norms take AdamW; with `adamw`, everything takes AdamW (`optimizer/adamw.rs`); with `sgd`,
//! everything takes momentum (`optimizer/sgd.rs`). Norms are never decayed.
//! Each rule has a plain, slow reference beside it that a test holds it equal to, and `tests/optimizers.rs` holds all to PyTorch's own.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use crate::config::{ModelConfig, OptimizerConfig, OptimizerKind, Precision};
use crate::model::{Layout, host};

mod adamw;
mod muon;
mod sgd;

use adamw::AdamW;
use muon::Muon;
use sgd::Sgd;

/// An inner optimizer with its state.
pub struct Optimizer {
    config: OptimizerConfig,
    rule: Rule,
}

/// Ranges of the flat vector, with the decay of each.
type Decayed = Vec<(Range<usize>, f64)>;

enum Rule {
    AdamW(AdamW, Decayed),
    Muon(Muon, AdamW, Decayed),
    Sgd(Sgd, Decayed),
}

impl Optimizer {
    /// A fresh optimizer for a model of this shape, on `device`. State and update are in fp32; Muon's iteration multiplies in `precision`.
    pub fn new(config: &OptimizerConfig, precision: Precision, model: &ModelConfig, device: Device) -> Self {
        let layout = Layout::new(model);
        let vectors = vec![
            (layout.embeddings.clone(), config.weight_decay),
            (layout.norms.clone(), 0.0),
        ];
        let mut all = vectors.clone();
        all.push((layout.matrices.clone(), config.weight_decay));
        let rule = match config.kind {
            OptimizerKind::AdamW => Rule::AdamW(AdamW::new(layout.total, device), all),
            OptimizerKind::Sgd => Rule::Sgd(Sgd::new(config, layout.total, device), all),
            OptimizerKind::Muon => Rule::Muon(
                Muon::new(config, model, &layout, precision.kind(), device),
                AdamW::new(layout.matrices.start, device),
                vectors,
            ),
        };
        Self {
            config: config.clone(),
            rule,
        }
    }

    /// One step: `theta` and `gradient` are flat, `[total]`, on the optimizer's device; the gradient counts `scale` times (clipping).
    /// `theta` is the owning handle, and no graph that needs its old values is alive.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub fn step(&mut self, theta: &mut Tensor, gradient: &Tensor, scale: f64, lr: f64) -> Result<(), TchError> {
        match &mut self.rule {
            Rule::AdamW(adamw, ranges) => adamw.step(&self.config, ranges, theta, gradient, scale, lr),
            Rule::Sgd(sgd, ranges) => sgd.step(ranges, theta, gradient, scale, lr),
            Rule::Muon(muon, adamw, ranges) => {
                adamw.step(&self.config, ranges, theta, gradient, scale, lr);
                muon.step(theta, gradient, scale, lr)?;
            }
        }
        Ok(())
    }
}

// The state as numbers: the steps taken (0 for rules that don't count them), then each tensor in the order of `tensors`.
impl Optimizer {
    /// How many numbers a state has.
    pub fn state_len(config: &OptimizerConfig, model: &ModelConfig) -> usize {
        let layout = Layout::new(model);
        1 + match config.kind {
            OptimizerKind::AdamW => 2 * layout.total,
            OptimizerKind::Sgd => layout.total,
            OptimizerKind::Muon => layout.total + layout.matrices.start,
        }
    }

    /// A copy of the state, of [`Self::state_len`] numbers; all zeros before the first step.
    pub fn state(&self) -> Vec<f32> {
        let steps = match &self.rule {
            Rule::AdamW(adamw, _) | Rule::Muon(_, adamw, _) => adamw.steps,
            Rule::Sgd(..) => 0,
        };
        // Exact up to 2^24 steps, when every power of a beta that steps go into has long been zero.
        let mut state = vec![steps as f32];
        for tensor in self.tensors() {
            state.extend(host::to_vec(tensor));
        }
        state
    }

    /// Takes up a state that [`Self::state`] told.
    ///
    /// # Errors
    /// One of another length, or libtorch's.
    pub fn load_state(&mut self, state: &[f32]) -> Result<(), TchError> {
        let expected = 1 + self.tensors().iter().map(|tensor| tensor.numel()).sum::<usize>();
        let Some((steps, mut rest)) = state.split_first().filter(|_| state.len() == expected) else {
            let found = state.len();
            return Err(TchError::Shape(format!(
                "an optimizer state of {found} numbers, expected {expected}"
            )));
        };
        match &mut self.rule {
            Rule::AdamW(adamw, _) | Rule::Muon(_, adamw, _) => adamw.steps = *steps as i32,
            Rule::Sgd(..) => (),
        }
        for tensor in self.tensors() {
            let (own, others) = rest.split_at(tensor.numel());
            tensor.shallow_clone().f_copy_(&Tensor::f_from_slice(own)?)?;
            rest = others;
        }
        Ok(())
    }

    fn tensors(&self) -> Vec<&Tensor> {
        match &self.rule {
            Rule::AdamW(adamw, _) => vec![&adamw.mean, &adamw.square],
            Rule::Sgd(sgd, _) => vec![&sgd.buffer],
            Rule::Muon(muon, adamw, _) => vec![&muon.mean, &adamw.mean, &adamw.square],
        }
    }
}

/// The factor that brings a gradient of L2 norm `norm` to at most `limit`; 1 when it already is.
pub fn clip_scale(norm: f64, limit: f64) -> f64 {
    if norm > limit { limit / norm } else { 1.0 }
}

/// Zeros, `[len]`.
fn zeros(len: usize, device: Device) -> Tensor {
    Tensor::zeros([len as i64], (Kind::Float, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_gradient_is_left_alone_and_a_long_one_cut() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert_eq!(clip_scale(4.0, 1.0), 0.25);
    }
}
