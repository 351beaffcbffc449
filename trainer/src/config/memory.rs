//! How much memory training takes, told before it starts.

use super::{ModelConfig, OptimizerKind, TrainingConfig};

/// Bytes of one `f32`.
const FLOAT: u64 = 4;

/// Bytes that training takes, in single precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingMemory {
    /// The parameters that are trained: 4 bytes each.
    pub parameters: u64,
    /// Their gradient: as much.
    pub gradient: u64,
    /// The inner optimizer's state: two floats a parameter under AdamW, one under Muon on the blocks' matrices.
    pub moments: u64,
    /// What the forward pass keeps for the backward pass of one batch; a rough count, see [`activation_floats`].
    pub activations: u64,
}

impl TrainingMemory {
    /// For a batch of `batch_sequences` sequences of `seq_len` tokens.
    pub fn new(model: &ModelConfig, training: &TrainingConfig) -> Self {
        let params = model.param_count() as u64;
        let matrices = (model.layers * model.layer_matrix_params()) as u64;
        let floats = match training.optimizer.kind {
            OptimizerKind::AdamW => 2 * params,
            OptimizerKind::Muon => 2 * (params - matrices) + matrices,
        };
        let tokens = training.tokens_per_step();
        Self {
            parameters: FLOAT * params,
            gradient: FLOAT * params,
            moments: FLOAT * floats,
            activations: FLOAT.saturating_mul(tokens).saturating_mul(activation_floats(model)),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let state = self.parameters + self.gradient + self.moments;
        state.saturating_add(self.activations)
    }
}

/// Floats kept per token: in every block the residual stream and its norms (6 `dim`), queries, keys and values before and after they are
/// turned and what attention mixed (3 `q_dim + 3 kv_dim`), and the feed-forward before and after its activation (4 `ffn`, 2 without a gate); then
/// the scores and their softmax (2 `vocab`). Attention keeps no square of the length: its kernel computes that again.
fn activation_floats(model: &ModelConfig) -> u64 {
    let feed_forward = if model.family.has_gate() { 4 } else { 2 } * model.ffn;
    let block = 6 * model.dim + 3 * (model.q_dim() + model.kv_dim()) + feed_forward;
    (model.layers * block + 2 * model.vocab_size) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn muon_keeps_one_moment_of_the_matrices_and_adamw_two_of_everything() {
        let model = ModelConfig::demo();
        let mut training = TrainingConfig::default();
        let params = model.param_count() as u64;
        let matrices = (model.layers * model.layer_matrix_params()) as u64;
        let muon = TrainingMemory::new(&model, &training);
        assert_eq!((muon.parameters, muon.gradient), (4 * params, 4 * params));
        assert_eq!(muon.moments, 8 * params - 4 * matrices);
        training.optimizer.kind = OptimizerKind::AdamW;
        assert_eq!(TrainingMemory::new(&model, &training).moments, 8 * params);
    }

    #[test]
    fn activations_grow_with_the_batch_and_nothing_overflows() {
        let model = ModelConfig::demo();
        let one = TrainingMemory::new(&model, &TrainingConfig::default());
        let two = TrainingMemory::new(
            &model,
            &TrainingConfig {
                batch_sequences: 16,
                ..TrainingConfig::default()
            },
        );
        assert_eq!(2 * one.activations, two.activations);
        let huge = TrainingConfig {
            seq_len: 1 << 20,
            batch_sequences: 65_536,
            ..TrainingConfig::default()
        };
        let largest = ModelConfig {
            dim: 32_768,
            layers: 1024,
            ..model
        };
        assert!(TrainingMemory::new(&largest, &huge).total() > 1 << 50);
    }
}
