//! The ways of training together, behind one trait: what a peer does between two exchanges, what it sends, and what all make of it.
//!
//! | algorithm | between exchanges | sent | agreed beside the parameters | kept by a peer |
//! |---|---|---|---|---|
//! | [`Sparse`] | H inner steps | the k largest of each chunk, with sign | nothing | accumulator; inner state if carried |
//! | [`DiLoCo`] | H inner steps | every value, fp32 or int8 | outer momentum | inner state |
//! | [`Demo`] | one gradient | the k largest of each block's cosine transform | nothing | momentum |
//! | [`Ddp`] | one gradient | every value | optimizer state | nothing |
//!
//! A round goes: every peer does [`Algorithm::work`] from the agreed parameters and [`Algorithm::encode`]s what it found; the contributions that
//! count are summed by [`crate::aggregate`]; every replica [`Algorithm::advance`]s alike. A contribution that does not count leaves its peer's
//! accumulator as it was: only then [`Algorithm::counted`] is called.
//!
//! `advance` of `sparse`, `diloco` and `demo` is scalar Rust on agreed values, so replicas stay bit-identical on any hardware. That of `ddp` runs the inner
//! optimizer on the mean gradient: with AdamW it is bit-identical on CPUs, with Muon only where libtorch multiplies alike.

mod dct;
mod ddp;
mod demo;
mod diloco;
mod sparse;

pub use dct::Tiles;
pub use ddp::Ddp;
pub use demo::Demo;
pub use diloco::DiLoCo;
pub use sparse::Sparse;

use tch::{Device, Tensor};

use crate::aggregate::{AggregateError, Update};
use crate::apply::ApplyError;
use crate::compress::quantize::FRACTION_BITS;
use crate::compress::{Codec, CodecError, Encoded};
use crate::config::{ModelConfig, OptimizerConfig, TrainingConfig};
use crate::eval::{EvalError, validation_loss};
use crate::gradient::Gradients;
use crate::local::LocalError;
use crate::model::{Model, ModelError, host};
use crate::optimizer::{Optimizer, clip_scale};

/// Why a round of an algorithm gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ArmError {
    /// The local steps failed.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The model could not be made or filled.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The codec refuses its settings, or values that are not finite.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Contributions cannot be summed.
    #[error(transparent)]
    Aggregate(#[from] AggregateError),
    /// The update cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The held-out loss cannot be had.
    #[error(transparent)]
    Eval(#[from] EvalError),
}

impl ArmError {
    /// Whether numbers ceased to be finite: the run diverged, and that is its result.
    #[must_use]
    pub fn is_divergence(&self) -> bool {
        matches!(
            self,
            Self::Local(LocalError::NonFinite { .. }) | Self::Codec(CodecError::NotFinite { .. })
        )
    }
}

/// What a peer works on between two exchanges.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The agreed parameters, in the layout's order.
    pub theta: &'a [f32],
    /// The learning rate, from the schedule.
    pub lr: f64,
    /// One batch a step: `[steps][batch_sequences][seq_len + 1]` tokens below the vocabulary's size.
    pub batches: &'a [Vec<Vec<u32>>],
}

/// One way of training together. All vectors have one value a parameter.
pub trait Algorithm {
    /// How contributions are written.
    type Codec: Codec;
    /// What replicas agree on beside the parameters; a joiner needs it.
    type Outer;
    /// What a peer keeps to itself from round to round; a newcomer starts afresh.
    type Own;

    /// The codec of all contributions.
    fn codec(&self) -> &Self::Codec;
    /// Inner steps between two exchanges.
    fn inner_steps(&self) -> u32;
    /// The agreed state before the first round.
    fn start(&self, engine: &Engine) -> Self::Outer;
    /// What a newcomer has.
    fn newcomer(&self, engine: &Engine) -> Self::Own;
    /// What a peer finds: the vector that it will encode, descending when subtracted.
    ///
    /// # Errors
    /// Loss or gradient are not finite, or memory is short.
    fn work(&self, engine: &mut Engine, own: &mut Self::Own, work: Work<'_>) -> Result<Vec<f32>, ArmError>;
    /// What a peer sends.
    ///
    /// # Errors
    /// Values that are not finite.
    fn encode(&self, own: &Self::Own, vector: &[f32]) -> Result<Encoded, ArmError>;
    /// Told when what was encoded counts.
    fn counted(&self, own: &mut Self::Own, encoded: Encoded);
    /// Moves the agreed parameters and state by an agreed update, alike on every replica.
    ///
    /// # Errors
    /// An update of another length, or short memory.
    fn advance(
        &self,
        engine: &mut Engine,
        theta: &mut Vec<f32>,
        outer: &mut Self::Outer,
        update: &Update,
        lr: f64,
    ) -> Result<(), ArmError>;
}

/// A model with its training settings: what computes gradients and takes inner steps.
pub struct Engine {
    model: Model,
    gradients: Gradients,
    training: TrainingConfig,
}

impl Engine {
    /// An engine on the CPU.
    ///
    /// # Errors
    /// Settings out of bounds, or too little memory.
    pub fn new(model: &ModelConfig, training: &TrainingConfig) -> Result<Self, ArmError> {
        training.validate_with(model).map_err(LocalError::from)?;
        let model = Model::new(model, Device::Cpu)?;
        Ok(Self {
            gradients: Gradients::new(&model, training)?,
            model,
            training: training.clone(),
        })
    }

    /// Parameters of the model.
    #[must_use]
    pub fn params(&self) -> usize {
        self.model.layout().total
    }

    /// A fresh inner optimizer.
    pub(crate) fn optimizer(&self, config: &OptimizerConfig) -> Optimizer {
        Optimizer::new(
            config,
            self.training.precision,
            self.model.config(),
            self.model.device(),
        )
    }

    /// The tiles of this model's cosine transform.
    #[must_use]
    pub fn tiles(&self) -> Tiles {
        Tiles::new(self.model.layout())
    }

    /// Held-out loss of `theta`, nats per token.
    ///
    /// # Errors
    /// As [`validation_loss`].
    pub fn evaluate(&mut self, theta: &[f32], sequences: &[Vec<u32>]) -> Result<f64, ArmError> {
        Ok(validation_loss(&mut self.model, theta, sequences)?)
    }

    /// The gradient of one batch at `theta`, not clipped.
    pub(crate) fn gradient(&mut self, theta: &[f32], batch: &[Vec<u32>]) -> Result<Vec<f32>, ArmError> {
        self.model.load_flat(theta)?;
        let (_, gradient, _) = finite_gradient(&mut self.gradients, &self.model, batch, 0)?;
        Ok(host::to_vec(gradient))
    }

    /// The pseudo-gradient `theta - local` after one step a batch.
    pub(crate) fn steps(&mut self, optimizer: &mut Optimizer, work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        self.model.load_flat(work.theta)?;
        for (step, batch) in work.batches.iter().enumerate() {
            let (_, gradient, norm) = finite_gradient(&mut self.gradients, &self.model, batch, step as u32)?;
            let scale = clip_scale(norm, self.training.grad_clip);
            optimizer
                .step(self.model.flat_mut(), gradient, scale, work.lr)
                .map_err(LocalError::from)?;
        }
        let minus = |local: &[f32]| {
            work.theta
                .iter()
                .zip(local)
                .map(|(agreed, local)| agreed - local)
                .collect()
        };
        Ok(self.model.with_flat(minus))
    }

    /// One optimizer step on `theta` itself, along a gradient that all agree on.
    pub(crate) fn agreed_step(
        &mut self,
        optimizer: &mut Optimizer,
        theta: &mut Vec<f32>,
        gradient: &[f32],
        lr: f64,
    ) -> Result<(), ArmError> {
        let norm = gradient
            .iter()
            .map(|g| f64::from(*g) * f64::from(*g))
            .sum::<f64>()
            .sqrt();
        self.model.load_flat(theta)?;
        let gradient = Tensor::f_from_slice(gradient).map_err(LocalError::from)?;
        let scale = clip_scale(norm, self.training.grad_clip);
        optimizer
            .step(self.model.flat_mut(), &gradient, scale, lr)
            .map_err(LocalError::from)?;
        *theta = self.model.read_flat();
        Ok(())
    }
}

/// Loss, gradient and its norm, all finite.
fn finite_gradient<'a>(
    gradients: &'a mut Gradients,
    model: &Model,
    batch: &[Vec<u32>],
    step: u32,
) -> Result<(f64, &'a Tensor, f64), LocalError> {
    let (loss, gradient) = gradients.of(model, batch)?;
    let norm = gradient.norm().double_value(&[]);
    for (what, value) in [("loss", loss), ("gradient norm", norm)] {
        if !value.is_finite() {
            return Err(LocalError::NonFinite { step, what, value });
        }
    }
    Ok((loss, gradient, norm))
}

/// The mean of an update, one value a parameter; zeros if nothing counts. The same bits everywhere: one exact conversion, one product,
/// one rounding.
pub(crate) fn mean(update: &Update) -> Vec<f32> {
    let unit = (1u64 << FRACTION_BITS) as f64;
    let factor = match update.total_weight() {
        0 => 0.0,
        weight => 1.0 / (weight as f64 * unit),
    };
    update.sums().iter().map(|sum| (*sum as f64 * factor) as f32).collect()
}
