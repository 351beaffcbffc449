//! The canonical flat order of a model's parameters, computed from its configuration alone.
//!
//! All that is agreed, hashed, compressed and summed is one vector of `f32`; this file says which tensor lies where in it. The order puts
//! what is used together side by side:
//!
//! ```text
//! embed_tokens [vocab, dim] | lm_head [vocab, dim] unless tied | embed_positions [max_seq_len, dim] of GPT-2      AdamW, with weight decay
//! norms and biases: every block's, then the final norm                                                        AdamW, without
//! block 0: q k v o gate up down | block 1: ... | ...                                                          Muon
//! ```
//!
//! q, k, v are adjacent, so one product with `[q_rows + 2 kv_rows, dim]` makes all three; their biases and gate and up likewise. Blocks have
//! equal length, so the same matrix of every block is one strided view. Names are those of Hugging Face's Llama and Qwen, for GPT-2 too, whose
//! own names (and transposed matrices) are a matter of its files alone.

use std::ops::Range;

use crate::config::ModelConfig;

/// One named tensor within the flat vector; row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).
    pub name: String,
    /// `[rows, columns]` of a matrix, which maps `columns` inputs to `rows` outputs, or `[len]` of a norm or bias.
    pub shape: Vec<usize>,
    /// First element, counted in elements.
    pub offset: usize,
    /// Elements.
    pub len: usize,
}

/// Where everything lies; equal configurations have equal layouts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// All tensors in flat order, without gap or overlap.
    pub entries: Vec<Entry>,
    /// Elements in all.
    pub total: usize,
    /// The elements of the embeddings and the untied head.
    pub embeddings: Range<usize>,
    /// The elements of all norms and biases.
    pub norms: Range<usize>,
    /// The elements of the blocks' matrices.
    pub matrices: Range<usize>,
    /// Elements in the matrices of one block.
    pub block_len: usize,
}

impl Layout {
    /// The layout of a validated configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let (dim, vocab) = (config.dim, config.vocab_size);
        let mut layout = Self {
            entries: Vec::new(),
            total: 0,
            embeddings: 0..0,
            norms: 0..0,
            matrices: 0..0,
            block_len: config.layer_matrix_params(),
        };
        layout.push("model.embed_tokens.weight".to_owned(), &[vocab, dim]);
        if !config.tied_embeddings {
            layout.push("lm_head.weight".to_owned(), &[vocab, dim]);
        }
        if !config.family.has_rope() {
            layout.push("model.embed_positions.weight".to_owned(), &[config.max_seq_len, dim]);
        }
        layout.embeddings = 0..layout.total;
        for layer in 0..config.layers {
            for (name, len) in block_vectors(config) {
                layout.push(format!("model.layers.{layer}.{name}"), &[len]);
            }
        }
        layout.push("model.norm.weight".to_owned(), &[dim]);
        if config.family.has_biases_everywhere() {
            layout.push("model.norm.bias".to_owned(), &[dim]);
        }
        layout.norms = layout.embeddings.end..layout.total;
        for layer in 0..config.layers {
            for (name, shape) in block_matrices(config) {
                layout.push(format!("model.layers.{layer}.{name}.weight"), &shape);
            }
        }
        layout.matrices = layout.norms.end..layout.total;
        debug_assert_eq!(layout.total, config.param_count());
        layout
    }

    /// This layout with more tensors behind its own, `(name, elements)` each: parameters that are agreed on, and no part of the model.
    #[must_use]
    pub fn with_more(mut self, tensors: &[(&str, usize)]) -> Self {
        for (name, len) in tensors {
            self.push((*name).to_owned(), &[*len]);
        }
        self
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    fn push(&mut self, name: String, shape: &[usize]) {
        let len = shape.iter().product();
        self.entries.push(Entry {
            name,
            shape: shape.to_vec(),
            offset: self.total,
            len,
        });
        self.total += len;
    }
}

/// The matrices of one block in flat order: name within the block, `[rows, columns]`.
pub fn block_matrices(config: &ModelConfig) -> Vec<(&'static str, [usize; 2])> {
    let (dim, q, kv, ffn) = (config.dim, config.q_dim(), config.kv_dim(), config.ffn);
    let mut matrices = vec![
        ("self_attn.q_proj", [q, dim]),
        ("self_attn.k_proj", [kv, dim]),
        ("self_attn.v_proj", [kv, dim]),
        ("self_attn.o_proj", [dim, q]),
    ];
    if config.family.has_gate() {
        matrices.push(("mlp.gate_proj", [ffn, dim]));
    }
    matrices.extend([("mlp.up_proj", [ffn, dim]), ("mlp.down_proj", [dim, ffn])]);
    matrices
}

/// The norms and biases of one block in flat order: name within the block, length.
pub(crate) fn block_vectors(config: &ModelConfig) -> Vec<(&'static str, usize)> {
    let (dim, family) = (config.dim, config.family);
    let mut vectors = Vec::new();
    for norm in NORMS {
        vectors.push((norm[0], dim));
        if family.has_biases_everywhere() {
            vectors.push((norm[1], dim));
        }
    }
    if family.has_qk_norm() {
        vectors.push(("self_attn.q_norm.weight", config.head_dim()));
        vectors.push(("self_attn.k_norm.weight", config.head_dim()));
    }
    if family.has_qkv_bias() {
        vectors.push(("self_attn.q_proj.bias", config.q_dim()));
        vectors.push(("self_attn.k_proj.bias", config.kv_dim()));
        vectors.push(("self_attn.v_proj.bias", config.kv_dim()));
    }
    if family.has_biases_everywhere() {
        vectors.push(("self_attn.o_proj.bias", dim));
        vectors.push(("mlp.up_proj.bias", config.ffn));
        vectors.push(("mlp.down_proj.bias", dim));
    }
    vectors
}

/// A block's two norms, weight and bias: before attention, before the feed-forward.
const NORMS: [[&str; 2]; 2] = [
    ["input_layernorm.weight", "input_layernorm.bias"],
    ["post_attention_layernorm.weight", "post_attention_layernorm.bias"],
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Family;

    #[test]
    fn entries_tile_the_flat_vector_in_order() {
        for family in [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gpt2] {
            for tied_embeddings in [true, false] {
                let config = ModelConfig {
                    family,
                    tied_embeddings,
                    kv_heads: if family.has_rope() { 2 } else { 4 },
                    head_dim: family.has_qk_norm().then_some(48),
                    ..ModelConfig::demo()
                };
                let layout = Layout::new(&config);
                let mut next = 0;
                for entry in &layout.entries {
                    assert_eq!(entry.offset, next, "{}", entry.name);
                    assert_eq!(entry.len, entry.shape.iter().product::<usize>());
                    next += entry.len;
                }
                assert_eq!(next, config.param_count());
                assert_eq!(layout.matrices.len(), config.layers * layout.block_len);
                assert_eq!(layout.get("lm_head.weight").is_some(), !tied_embeddings);
            }
        }
    }

    #[test]
    fn query_key_and_value_are_adjacent() {
        let layout = Layout::new(&ModelConfig {
            kv_heads: 2,
            ..ModelConfig::demo()
        });
        let at = |name: &str| {
            layout
                .get(&format!("model.layers.3.self_attn.{name}_proj.weight"))
                .unwrap()
        };
        assert_eq!(at("q").offset + at("q").len, at("k").offset);
        assert_eq!(at("k").offset + at("k").len, at("v").offset);
        assert_eq!(at("k").shape, [64, 128]);
    }
}
