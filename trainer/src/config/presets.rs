//! Shapes by name, from one million to eight billion parameters.
//!
//! The small ones are our own, counted with the 256 bytes as vocabulary; from 135m on they are those of published models, counted with theirs. A
//! run takes its vocabulary from its tokenizer, whatever the preset.

use super::{Family, ModelConfig, RopeScaling};

/// A shape's name, what it is, and how to make it.
type Preset = (&'static str, &'static str, fn() -> ModelConfig);

/// All presets, smallest first.
const PRESETS: [Preset; 12] = [
    ("demo", "the demo's byte-level model", ModelConfig::demo),
    ("1m", "a byte-level model for seconds", || own(128, 5, 4, 4, 384)),
    ("5m", "a byte-level model for minutes", || own(256, 7, 8, 4, 704)),
    ("16m", "a byte-level model for an hour", || own(384, 10, 6, 3, 1024)),
    ("60m", "the smallest for a larger vocabulary", || {
        own(640, 13, 10, 5, 1728)
    }),
    ("gpt2", "GPT-2 small", gpt2),
    ("135m", "SmolLM2-135M", || smollm2(576, 30, 9, 3, 1536)),
    ("360m", "SmolLM2-360M", || smollm2(960, 32, 15, 5, 2560)),
    ("qwen3-0.6b", "Qwen3-0.6B", qwen3),
    ("1b", "Llama-3.2-1B", || llama32(2048, 16, 32, 8192)),
    ("3b", "Llama-3.2-3B", || llama32(3072, 28, 24, 8192)),
    ("8b", "Llama-3-8B", llama3_8b),
];

impl ModelConfig {
    /// The shape called `name`, if there is one.
    pub fn preset(name: &str) -> Option<Self> {
        let (_, _, make) = PRESETS.iter().find(|(known, _, _)| *known == name)?;
        Some(make())
    }

    /// The names and what they are, smallest first.
    pub fn presets() -> impl Iterator<Item = (&'static str, &'static str)> {
        PRESETS.iter().map(|&(name, what, _)| (name, what))
    }
}

/// A byte-level Llama that reads 1024 tokens.
fn own(dim: usize, layers: usize, heads: usize, kv_heads: usize, ffn: usize) -> ModelConfig {
    ModelConfig {
        dim,
        layers,
        heads,
        kv_heads,
        ffn,
        max_seq_len: 1024,
        ..ModelConfig::demo()
    }
}

/// Radford and others 2019, the smallest of four.
fn gpt2() -> ModelConfig {
    ModelConfig {
        family: Family::Gpt2,
        vocab_size: 50_257,
        dim: 768,
        layers: 12,
        heads: 12,
        kv_heads: 12,
        ffn: 3072,
        max_seq_len: 1024,
        ..ModelConfig::demo()
    }
}

/// SmolLM2 (arXiv 2502.02737).
fn smollm2(dim: usize, layers: usize, heads: usize, kv_heads: usize, ffn: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 49_152,
        max_seq_len: 8192,
        rope_theta: 100_000.0,
        ..own(dim, layers, heads, kv_heads, ffn)
    }
}

/// Qwen3 (arXiv 2505.09388), the smallest.
fn qwen3() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen3,
        vocab_size: 151_936,
        head_dim: Some(128),
        max_seq_len: 40_960,
        rope_theta: 1e6,
        norm_eps: 1e-6,
        ..own(1024, 28, 16, 8, 3072)
    }
}

/// Llama 3.2 (arXiv 2407.21783 and its model card), tied, with stretched wavelengths.
fn llama32(dim: usize, layers: usize, heads: usize, ffn: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 128_256,
        max_seq_len: 131_072,
        rope_theta: 500_000.0,
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }),
        ..own(dim, layers, heads, 8, ffn)
    }
}

/// Llama 3 (arXiv 2407.21783).
fn llama3_8b() -> ModelConfig {
    ModelConfig {
        vocab_size: 128_256,
        max_seq_len: 8192,
        rope_theta: 500_000.0,
        tied_embeddings: false,
        ..own(4096, 32, 32, 8, 14_336)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn published_shapes_have_the_published_numbers_of_parameters() {
        for (name, params) in [
            ("gpt2", 124_439_808),
            ("135m", 134_515_008),
            ("360m", 361_821_120),
            ("qwen3-0.6b", 596_049_920),
            ("1b", 1_235_814_400),
            ("3b", 3_212_749_824),
            ("8b", 8_030_261_248),
        ] {
            assert_eq!(ModelConfig::preset(name).unwrap().param_count(), params, "{name}");
        }
    }

    #[test]
    fn our_own_shapes_are_near_their_names_and_all_are_valid() {
        for (name, params) in [("1m", 1.0e6), ("5m", 5.0e6), ("16m", 16.0e6), ("60m", 60.0e6)] {
            let found = ModelConfig::preset(name).unwrap().param_count() as f64;
            assert!((found / params - 1.0).abs() < 0.11, "{name}: {found}");
        }
        let mut last = 0;
        for (name, _) in ModelConfig::presets() {
            let config = ModelConfig::preset(name).unwrap();
            config.validate().unwrap();
            assert!(config.param_count() > last, "{name}: smallest first");
            last = config.param_count();
        }
        assert_eq!(ModelConfig::preset("9b"), None);
    }
}
