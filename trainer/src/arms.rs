//! The ways of training together, behind one trait: what a peer sends of what it found, and what all make of the sum.
//!
//! | `training.algorithm` | between exchanges | sent | agreed beside the parameters | kept by a peer |
//! |---|---|---|---|---|
//! | `sparse` ([`Rounds`]) | H inner steps | the k largest of each chunk, with sign | nothing | accumulator; inner state if carried |
//! | `diloco` ([`Rounds`]) | H inner steps | every value, fp32 or int8 | outer momentum | inner state if carried |
//! | `demo` ([`Demo`]) | one gradient | the k largest of each block's cosine transform, with sign | tokens so far | momentum |
//! | `ddp` ([`Ddp`]) | one gradient | every value | optimizer state, tokens so far | nothing |
//!
//! A round goes: every peer trains from the agreed parameters ([`crate::local`]), takes the [`Algorithm::vector`] of what it found and encodes it; the
//! contributions that count are summed by [`crate::aggregate`]; every replica [`Algorithm::advance`]s alike. A contribution that does not
//! count leaves its peer's accumulator as it was. Peers that run and the bench that compares go through the same code.
//!
//! **Agreed state** is one flat vector: the parameters in the layout's order, then what the algorithm keeps beside them ([`Algorithm::outer`]). Its
//! root, its snapshots and its joiners are those of a model with a few more tensors ([`agreed_layout`]). All steps on it are scalar
//! Rust, one rounding an operation, so replicas stay bit-identical on any hardware; only [`Ddp`] with Muon, which no run may choose, multiplies
//! matrices in libtorch.

mod dct;
mod ddp;
mod demo;
mod rounds;

pub use dct::Tiles;
pub use ddp::Ddp;
pub use demo::Demo;
pub use rounds::Rounds;

use std::borrow::Cow;

use crate::aggregate::{AggregateError, Update};
use crate::apply::ApplyError;
use crate::compress::quantize::FRACTION_BITS;
use crate::compress::{AnyCodec, CodecError};
use crate::config::{ModelConfig, TrainingConfig, Way};
use crate::eval::EvalError;
use crate::local::LocalError;
use crate::model::{Layout, ModelError};

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

/// One way of training together.
pub trait Algorithm: Send + Sync {
    /// The codec of contributions, that of rounds in which most is sent: their longest is the longest there is.
    fn codec(&self) -> &AnyCodec;

    /// The codec of this round's contributions, the first round being 1.
    fn codec_of(&self, _round: u64) -> Cow<'_, AnyCodec> {
        Cow::Borrowed(self.codec())
    }

    /// What replicas agree on beside the parameters: names and lengths of tensors that begin as zeros.
    fn outer(&self) -> Vec<(&'static str, usize)> {
        Vec::new()
    }

    /// What a peer encodes of what it found (a pseudo-gradient, or a gradient): one value a parameter, descending when subtracted.
    fn vector(&self, found: Vec<f32>) -> Vec<f32> {
        found
    }

    /// Moves the agreed state by an agreed update over `tokens` counted tokens, alike on every replica and for any number of threads.
    ///
    /// # Errors
    /// An update or a state of another length.
    fn advance(&self, agreed: &mut [f32], update: &Update, tokens: u64, threads: usize) -> Result<(), ArmError>;
}

/// The way that a run's settings choose; they have been checked.
///
/// # Errors
/// A setting that the codec or the outer rate refuses.
pub fn algorithm(model: &ModelConfig, training: &TrainingConfig) -> Result<Box<dyn Algorithm>, ArmError> {
    let codec = AnyCodec::new(model.param_count(), &training.compression)?;
    Ok(match training.algorithm {
        Way::Sparse | Way::Diloco => Box::new(Rounds::new(codec, training)?),
        Way::Demo => Box::new(Demo::new(codec, model, training)),
        Way::Ddp => Box::new(Ddp::new(codec, model, training)),
    })
}

/// Where everything of the agreed state lies: the model's tensors, then the algorithm's.
#[must_use]
pub fn agreed_layout(model: &ModelConfig, algorithm: &dyn Algorithm) -> Layout {
    Layout::new(model).with_more(&algorithm.outer())
}

/// The parameters within the agreed state, and the rest.
///
/// # Errors
/// A state of another length than `params` and `outer` together.
fn parts(agreed: &mut [f32], params: usize, outer: usize) -> Result<(&mut [f32], &mut [f32]), ApplyError> {
    let (expected, found) = (params + outer, agreed.len());
    if expected != found {
        return Err(ApplyError::Length { expected, found });
    }
    Ok(agreed.split_at_mut(params))
}

/// Refuses an update of another length.
fn fits(params: usize, update: &Update) -> Result<(), ApplyError> {
    match (params, update.sums().len()) {
        (expected, found) if expected == found => Ok(()),
        (expected, found) => Err(ApplyError::Length { expected, found }),
    }
}

/// The mean of an update, one value a parameter; zeros if nothing counts. The same bits everywhere: one exact conversion, one product,
/// one rounding.
fn mean(update: &Update) -> Vec<f32> {
    let unit = (1u64 << FRACTION_BITS) as f64;
    let factor = match update.total_weight() {
        0 => 0.0,
        weight => 1.0 / (weight as f64 * unit),
    };
    update.sums().iter().map(|sum| (*sum as f64 * factor) as f32).collect()
}

/// Tokens counted so far, as part of the agreed state: what the learning rate of an agreed step follows. Two numbers below 2^24, exact in `f32`,
/// the lower half first; at 2^48 tokens it stops.
mod clock {
    /// Its name and length.
    pub(super) const TENSOR: (&str, usize) = ("outer.tokens", 2);
    /// One more than the largest half.
    const HALF: u64 = 1 << 24;

    /// The count; halves that no count gives (from a snapshot that was agreed on, or never) are taken as far as they go.
    pub(super) fn read(halves: &[f32]) -> u64 {
        let half = |at: usize| halves.get(at).map_or(0, |half| (*half as u64).min(HALF - 1));
        half(1) * HALF + half(0)
    }

    /// Counts `tokens` more.
    pub(super) fn add(halves: &mut [f32], tokens: u64) {
        let sum = read(halves).saturating_add(tokens).min(HALF * HALF - 1);
        for (half, value) in halves.iter_mut().zip([sum % HALF, sum / HALF]) {
            *half = value as f32;
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn tokens_are_counted_exactly_up_to_the_last() {
            let mut halves = [0.0; 2];
            let mut expected = 0u64;
            for tokens in [7, HALF - 3, HALF, 123_456_789_012, 1] {
                add(&mut halves, tokens);
                expected += tokens;
                assert_eq!(read(&halves), expected);
            }
            add(&mut halves, u64::MAX);
            assert_eq!(read(&halves), HALF * HALF - 1);
            assert_eq!(read(&[f32::NAN, -1.0]), 0);
        }
    }
}
