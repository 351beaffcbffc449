//! The canonical flat order of a model's parameters, computed from its configuration alone.
//!
//! All that is agreed, hashed, compressed and summed is one vector of `f32`; this file says which tensor lies where in it. The order puts
//! what is used together side by side:
//!
//! ```text
//! embed_tokens [vocab, dim] | lm_head [vocab, dim] unless tied        AdamW, with weight decay
//! norms: every block's two, then the final one, [dim] each            AdamW, without
//! block 0: q k v o gate up down | block 1: ... | ...                  Muon
//! ```
//!
//! q, k, v are adjacent, so one product with `[q_rows + 2 kv_rows, dim]` makes all three; gate and up likewise. Blocks have equal length, so
//! the same matrix of every block is one strided view. Names are those of Hugging Face's Llama.

use std::ops::Range;

use crate::config::ModelConfig;

/// One named tensor within the flat vector; row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Hugging Face name (`model.layers.0.self_attn.q_proj.weight`).
    pub name: String,
    /// `[rows, columns]` of a matrix, which maps `columns` inputs to `rows` outputs, or `[dim]` of a norm.
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
    /// The elements of embedding and untied head.
    pub embeddings: Range<usize>,
    /// The elements of all norms.
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
        layout.embeddings = 0..layout.total;
        for layer in 0..config.layers {
            layout.push(format!("model.layers.{layer}.input_layernorm.weight"), &[dim]);
            layout.push(format!("model.layers.{layer}.post_attention_layernorm.weight"), &[dim]);
        }
        layout.push("model.norm.weight".to_owned(), &[dim]);
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
pub fn block_matrices(config: &ModelConfig) -> [(&'static str, [usize; 2]); 7] {
    let (dim, kv, ffn) = (config.dim, config.kv_dim(), config.ffn);
    [
        ("self_attn.q_proj", [dim, dim]),
        ("self_attn.k_proj", [kv, dim]),
        ("self_attn.v_proj", [kv, dim]),
        ("self_attn.o_proj", [dim, dim]),
        ("mlp.gate_proj", [ffn, dim]),
        ("mlp.up_proj", [ffn, dim]),
        ("mlp.down_proj", [dim, ffn]),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entries_tile_the_flat_vector_in_order() {
        for tied_embeddings in [true, false] {
            let config = ModelConfig {
                tied_embeddings,
                kv_heads: 2,
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
