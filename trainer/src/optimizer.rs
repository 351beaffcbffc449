//! The inner optimizers, over flat buffers; their state starts from zero in every round, so nothing private outlives one.
//!
//! [`Optimizer::step`] takes the flat parameters and the flat gradient. With `muon`, the blocks' matrices take orthogonalised momentum
//! (`optimizer/muon.rs`) and embedding, head and norms take AdamW; with `adamw`, everything takes AdamW (`optimizer/adamw.rs`). Norms are
//! never decayed.
//! Each rule has a plain, slow reference beside it that a test holds it equal to.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, OptimizerConfig, OptimizerKind};
use crate::model::Layout;

mod adamw;
mod muon;

use adamw::AdamW;
use muon::Muon;

/// The state of one round's inner optimizer.
pub struct Optimizer {
    config: OptimizerConfig,
    /// The ranges of the flat vector that AdamW covers, with the decay of each.
    adamw_ranges: Vec<(Range<usize>, f64)>,
    adamw: AdamW,
    muon: Option<Muon>,
}

impl Optimizer {
    /// A fresh optimizer for a model of this shape, on `device`.
    pub fn new(config: &OptimizerConfig, model: &ModelConfig, device: Device) -> Self {
        let layout = Layout::new(model);
        let mut adamw_ranges = vec![
            (layout.embeddings.clone(), config.weight_decay),
            (layout.norms.clone(), 0.0),
        ];
        let muon = match config.kind {
            OptimizerKind::Muon => Some(Muon::new(config, model, &layout, device)),
            OptimizerKind::AdamW => {
                adamw_ranges.push((layout.matrices.clone(), config.weight_decay));
                None
            }
        };
        let covered = adamw_ranges.last().map_or(0, |(range, _)| range.end);
        Self {
            config: config.clone(),
            adamw_ranges,
            adamw: AdamW::new(covered, device),
            muon,
        }
    }

    /// One step: `theta` and `gradient` are flat, `[total]`, on the optimizer's device; the gradient counts `scale` times (clipping).
    /// `theta` is the owning handle, and no graph that needs its old values is alive.
    pub fn step(&mut self, theta: &mut Tensor, gradient: &Tensor, scale: f64, lr: f64) {
        self.adamw
            .step(&self.config, &self.adamw_ranges, theta, gradient, scale, lr);
        if let Some(muon) = &mut self.muon {
            muon.step(theta, gradient, scale, lr);
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
