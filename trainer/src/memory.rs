//! How much memory training takes, told before it is asked for.
//!
//! Where the gradient is written out by hand ([`crate::model`], on a CPU) nearly every byte is planned: parameters, gradient, optimizer state,
//! and the buffers of the pass. What is not planned are libtorch itself and what its operators take in passing, for which see
//! [`Need::passing`]. The prediction is of what training adds to a process that has the model's code loaded already.

use crate::config::{Family, ModelConfig, OptimizerKind, Precision, TrainingConfig};
use crate::kernels::Bf16;
use crate::model::by_hand::ByHand;
use crate::model::{Layout, block_matrices};

/// What one local round needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The parameters, `f32`.
    pub parameters: u64,
    /// Their gradient, `f32`.
    pub gradient: u64,
    /// The optimizer's state.
    pub state: u64,
    /// What the forward pass keeps, working space, logits, and in bf16 a copy of the weights.
    pub activations: u64,
    /// What the optimizer's step takes in passing.
    pub passing: u64,
}

/// There is not enough.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "training this model needs {} MB and the machine has {} MB to spare; take a smaller micro_batch, recompute = true, precision = \"bf16\", or a smaller model",
    .need / 1_000_000, .available / 1_000_000
)]
pub struct MemoryError {
    /// Bytes needed.
    pub need: u64,
    /// Bytes available.
    pub available: u64,
}

impl Need {
    /// Of training a model on a CPU. Both configurations are valid ones.
    pub fn of_training(model: &ModelConfig, training: &TrainingConfig) -> Self {
        let layout = Layout::new(model);
        let (batch, seq, again) = (training.sequences_at_once(), training.seq_len, training.recompute);
        let activations = match (model.family, training.precision) {
            (Family::Llama, Precision::Fp32 | Precision::Tf32) => ByHand::<f32>::bytes(model, batch, seq, again),
            (Family::Llama, Precision::Bf16) => ByHand::<Bf16>::bytes(model, batch, seq, again),
            _ => (batch * seq) as u128 * by_autograd(model),
        };
        let all = 4 * layout.total as u64;
        let matrices = 4 * layout.matrices.len() as u64;
        let (state, passing) = match training.optimizer.kind {
            OptimizerKind::AdamW => (2 * all, 0),
            OptimizerKind::Sgd => (all, 0),
            OptimizerKind::Muon => (2 * (all - matrices) + matrices, 2 * matrices + orthogonalising(model)),
        };
        Self {
            parameters: all,
            gradient: all,
            state,
            activations: u64::try_from(activations).unwrap_or(u64::MAX),
            passing,
        }
    }

    /// The whole.
    pub fn total(&self) -> u64 {
        let rest = self.parameters + self.gradient + self.state + self.passing;
        rest.saturating_add(self.activations)
    }

    /// Compares it with what the machine has. The parameters are there already when this is asked.
    ///
    /// # Errors
    /// There is less; where the system does not tell, there is enough.
    pub fn must_fit(&self) -> Result<(), MemoryError> {
        let need = self.total() - self.parameters;
        match available() {
            Some(available) if available < need => Err(MemoryError { need, available }),
            _ => Ok(()),
        }
    }
}

/// Bytes that autograd keeps per token, for the models that are not written out: in every block the residual stream and its norms (6 `dim`),
/// queries, keys and values before and after they are turned and what attention mixed (3 `q_dim + 3 kv_dim`), and the feed-forward before and
/// after its activation (4 `ffn`, 2 without a gate); then the scores and their softmax (2 `vocab`). An estimate: attention keeps no
/// square of the length, and what operators take in passing is not counted.
fn by_autograd(model: &ModelConfig) -> u128 {
    let feed_forward = if model.family.has_gate() { 4 } else { 2 } * model.ffn;
    let block = 6 * model.dim + 3 * (model.q_dim() + model.kv_dim()) + feed_forward;
    4 * (model.layers * block + 2 * model.vocab_size) as u128
}

/// Bytes of Muon's iteration on its largest group: the gathered directions, two generations of the iterate, and two of the small squares.
fn orthogonalising(model: &ModelConfig) -> u64 {
    let mut groups: Vec<([usize; 2], u64)> = Vec::new();
    for (_, [rows, columns]) in block_matrices(model) {
        let sides = [rows.min(columns), rows.max(columns)];
        match groups.iter_mut().find(|(known, _)| *known == sides) {
            Some((_, count)) => *count += 1,
            None => groups.push((sides, 1)),
        }
    }
    let bytes = groups
        .into_iter()
        .map(|([short, long], count)| 4 * count * (model.layers * short * (3 * long + 2 * short)) as u64);
    bytes.max().unwrap_or(0)
}

/// Bytes that new work may take without swapping, by the system's own estimate (Linux: `MemAvailable`).
pub fn available() -> Option<u64> {
    kib_of("/proc/meminfo", "MemAvailable:")
}

/// Bytes of memory that this process holds.
pub fn resident() -> Option<u64> {
    kib_of("/proc/self/status", "VmRSS:")
}

/// The most bytes that this process has held, since its start or the last [`forget_peak`].
pub fn peak() -> Option<u64> {
    kib_of("/proc/self/status", "VmHWM:")
}

/// Lets [`peak`] start anew from what is held now; without effect where the system does not allow it.
pub fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A line of one of Linux' tables, which count in KiB.
fn kib_of(path: &str, name: &str) -> Option<u64> {
    let table = std::fs::read_to_string(path).ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_both_numbers_and_what_to_try() {
        let need = Need {
            parameters: 0,
            gradient: 1 << 60,
            state: 0,
            activations: 0,
            passing: 0,
        };
        let Some(available) = available() else { return };
        assert!(available > 0);
        let told = need.must_fit().map_err(|error| error.to_string());
        assert!(
            told.as_ref().is_err_and(|told| told.contains("micro_batch")),
            "{told:?}"
        );
    }

    #[test]
    fn the_largest_shape_a_stranger_may_ask_for_overflows_nothing() {
        let model = ModelConfig {
            dim: 16_384,
            layers: 256,
            heads: 1024,
            kv_heads: 1,
            ffn: 8,
            max_seq_len: 1 << 20,
            ..ModelConfig::demo()
        };
        let training = TrainingConfig {
            seq_len: 1 << 20,
            batch_sequences: 65_536,
            ..TrainingConfig::default()
        };
        training.validate_with(&model).unwrap();
        let need = Need::of_training(&model, &training);
        assert!(need.total() > 1 << 55);
        assert!(need.must_fit().is_err() || available().is_none());
    }

    #[test]
    fn smaller_pieces_and_blocks_that_run_again_need_less() {
        let model = ModelConfig::demo();
        let need = |micro_batch, recompute| {
            let training = TrainingConfig {
                micro_batch,
                recompute,
                ..TrainingConfig::default()
            };
            Need::of_training(&model, &training).total()
        };
        assert!(need(Some(2), false) < need(None, false));
        assert!(need(None, true) < need(None, false));
    }
}
