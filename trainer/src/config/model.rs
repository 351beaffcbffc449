//! The shape of a model: its family, its sizes, and what follows from them (parameters, floating-point operations).

use serde::{Deserialize, Serialize};

use super::{ConfigError, require};

/// Most parameters a model may have: far above what the host-side flat vectors can hold, far below overflow.
const MAX_PARAMS: usize = 1 << 38;

/// Which decoder the sizes describe. The first three are one design with small differences; all of it is in `model.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases (arXiv 2302.13971, 2407.21783); Mistral without its window is the same.
    #[default]
    Llama,
    /// As Llama, with biases on queries, keys and values (arXiv 2407.10671).
    Qwen2,
    /// As Llama, with an RMSNorm on every head's query and key before they are turned (arXiv 2505.09388).
    Qwen3,
    /// LayerNorm with biases, learned positions, GELU (its tanh form), biases everywhere (Radford and others 2019).
    Gpt2,
}

impl Family {
    /// Whether it is the default, which files leave out: run files from before there were families keep their hashes.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether queries and keys are turned by position (RoPE); otherwise positions are learned and added to the embedding.
    pub fn has_rope(self) -> bool {
        self != Self::Gpt2
    }

    /// Whether queries, keys and values have a bias.
    pub fn has_qkv_bias(self) -> bool {
        matches!(self, Self::Qwen2 | Self::Gpt2)
    }

    /// Whether each head's query and key are normed.
    pub fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// Whether the feed-forward is gated (SwiGLU: three matrices); otherwise it has two and GELU between them.
    pub fn has_gate(self) -> bool {
        self != Self::Gpt2
    }

    /// Whether norms and the output projections have biases too.
    pub fn has_biases_everywhere(self) -> bool {
        self == Self::Gpt2
    }
}

/// How RoPE's wavelengths are stretched to read further than the model was first trained to; named and written as in Hugging Face's
/// `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// Every wavelength times `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// Bound: 1 to 1e6.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths times `factor`, short ones as they were, and a smooth passage in between (arXiv 2407.21783, and the
    /// reference code published with it).
    Llama3 {
        /// Bound: 1 to 1e6; 8 in Llama 3.1, 32 in 3.2.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full. Bound: above 0, below the next.
        low_freq_factor: f64,
        /// Those below `original_max_position_embeddings / high_freq_factor` are left alone. Bound: at most 1e6.
        high_freq_factor: f64,
        /// Longest sequence of the first training, in tokens. Bound: 2 to 2^20.
        original_max_position_embeddings: usize,
    },
}

/// The shape of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Which decoder; Llama's where it is left out.
    #[serde(skip_serializing_if = "Family::is_default")]
    pub family: Family,
    /// Distinct tokens; 256 for bytes, 50257 for GPT-2's. Bound: 2 to 2^20.
    pub vocab_size: usize,
    /// Width of the residual stream. Bound: 8 to 32768, a multiple of `2 * heads` (RoPE turns pairs within a head) unless `head_dim` is given,
    /// of `heads` for GPT-2.
    pub dim: usize,
    /// Decoder blocks. Bound: 1 to 1024.
    pub layers: usize,
    /// Query heads, each `dim / heads` wide. Bound: 1 to 1024.
    pub heads: usize,
    /// Key and value heads, shared by `heads / kv_heads` query heads each (grouped-query attention, arXiv 2305.13245). A divisor of `heads`.
    pub kv_heads: usize,
    /// Width of one head where it isn't `dim / heads`, as in Qwen3. Bound: 2 to 1024, even.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Inner width of the feed-forward. Bound: 8 to 131072.
    pub ffn: usize,
    /// Longest sequence, in tokens, that the model is asked to read; for GPT-2 also the number of learned positions. Bound: 2 to 2^20.
    pub max_seq_len: usize,
    /// Base of the rotary wavelengths (RoFormer, arXiv 2104.09864; 10000 there and in Llama). Bound: 1 to 1e9.
    pub rope_theta: f64,
    /// How those are stretched; not at all where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square in RMSNorm, to the variance in LayerNorm. Bound: 1e-12 to 0.1; Llama's 1e-5.
    pub norm_eps: f64,
    /// Whether the output head is the token embedding; saves `vocab_size * dim` parameters in a small model.
    pub tied_embeddings: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self::demo()
    }
}

impl ModelConfig {
    /// The demo's byte-level model: 885,888 parameters, small enough that two CPU cores learn English from it in minutes.
    pub fn demo() -> Self {
        Self {
            family: Family::Llama,
            vocab_size: 256,
            dim: 128,
            layers: 4,
            heads: 4,
            kv_heads: 4,
            head_dim: None,
            ffn: 384,
            max_seq_len: 256,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tied_embeddings: true,
        }
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.dim / self.heads)
    }

    /// Rows of the query projection: `heads * head_dim`; `dim` unless `head_dim` is given.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim()
    }

    /// Rows of the key (and of the value) projection: `kv_heads * head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim()
    }

    /// Parameters in the matrices of one decoder block.
    pub fn layer_matrix_params(&self) -> usize {
        let feed_forward = if self.family.has_gate() { 3 } else { 2 };
        self.dim * (2 * self.q_dim() + 2 * self.kv_dim()) + feed_forward * self.dim * self.ffn
    }

    /// Parameters in the norms and biases of one decoder block.
    pub fn layer_vector_params(&self) -> usize {
        let family = self.family;
        let mut params = 2 * self.dim;
        if family.has_qk_norm() {
            params += 2 * self.head_dim();
        }
        if family.has_qkv_bias() {
            params += self.q_dim() + 2 * self.kv_dim();
        }
        if family.has_biases_everywhere() {
            // Both norms, attention's output, and the feed-forward's two matrices.
            params += 2 * self.dim + self.dim + self.ffn + self.dim;
        }
        params
    }

    /// All parameters, a tied head counted once.
    pub fn param_count(&self) -> usize {
        let tables = if self.tied_embeddings { 1 } else { 2 } * self.vocab_size;
        let positions = if self.family.has_rope() { 0 } else { self.max_seq_len };
        let last_norm = if self.family.has_biases_everywhere() { 2 } else { 1 };
        (tables + positions + last_norm) * self.dim
            + self.layers * (self.layer_vector_params() + self.layer_matrix_params())
    }

    /// Floating-point operations to train on one token (forward and backward) of a full-length sequence; see [`Self::flops_per_token_at`].
    pub fn flops_per_token(&self) -> u64 {
        self.flops_per_token_at(self.max_seq_len)
    }

    /// Floating-point operations to train on one token of sequences of `seq_len` tokens: `6 N` for the matrix products, N counting the blocks'
    /// matrices and the head (an embedding look-up multiplies nothing), plus `6 * layers * q_dim * seq_len` for attention over the average
    /// half of a causal window (PaLM, arXiv 2204.02311, appendix B, counts the whole window: twice that).
    pub fn flops_per_token_at(&self, seq_len: usize) -> u64 {
        let products = self.layers * self.layer_matrix_params() + self.vocab_size * self.dim;
        6 * (products as u64) + 6 * (self.layers as u64) * (self.q_dim() as u64) * (seq_len as u64)
    }

    /// Checks every bound and relation.
    ///
    /// # Errors
    /// The first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_sizes()?;
        self.validate_heads()?;
        self.validate_positions()?;
        let eps = (1e-12..=0.1).contains(&self.norm_eps);
        require(
            eps,
            "model.norm_eps",
            self.norm_eps,
            "1e-12 to 0.1",
            "1e-5 is the usual value",
        )?;
        let params = self.param_count();
        require(
            params <= MAX_PARAMS,
            "model",
            format!("{params} parameters"),
            "at most 2^38",
            "make it smaller",
        )
    }

    fn validate_sizes(&self) -> Result<(), ConfigError> {
        let bounds = [
            (
                "model.vocab_size",
                self.vocab_size,
                2,
                1 << 20,
                "take the tokenizer's size",
            ),
            ("model.dim", self.dim, 8, 32_768, "choose a width in that range"),
            ("model.layers", self.layers, 1, 1024, "choose a depth in that range"),
            ("model.heads", self.heads, 1, 1024, "choose a number in that range"),
            (
                "model.kv_heads",
                self.kv_heads,
                1,
                self.heads,
                "at most one per query head",
            ),
            ("model.ffn", self.ffn, 8, 131_072, "usually 8/3 of dim"),
            (
                "model.max_seq_len",
                self.max_seq_len,
                2,
                1 << 20,
                "choose a length in that range",
            ),
        ];
        bounds.into_iter().try_for_each(|(field, value, low, high, fix)| {
            let bound = format!("{low} to {high}");
            require((low..=high).contains(&value), field, value, bound, fix)
        })
    }

    /// How the heads divide what they divide.
    fn validate_heads(&self) -> Result<(), ConfigError> {
        let rope = self.family.has_rope();
        match self.head_dim {
            Some(width) => require(
                rope && (2..=1024).contains(&width) && width.is_multiple_of(2),
                "model.head_dim",
                width,
                "even, 2 to 1024, and not of GPT-2",
                "leave it out for dim / heads",
            )?,
            None => {
                let multiple = if rope { 2 * self.heads } else { self.heads };
                require(
                    self.dim.is_multiple_of(multiple),
                    "model.dim",
                    self.dim,
                    format!("a multiple of {multiple}"),
                    "change dim or heads",
                )?;
            }
        }
        let shared = self.heads.is_multiple_of(self.kv_heads) && (rope || self.heads == self.kv_heads);
        let divisor = if rope { "a divisor of" } else { "for GPT-2 equal to" };
        require(
            shared,
            "model.kv_heads",
            self.kv_heads,
            format!("{divisor} heads = {}", self.heads),
            "change heads or kv_heads",
        )
    }

    fn validate_positions(&self) -> Result<(), ConfigError> {
        let base = (1.0..=1e9).contains(&self.rope_theta);
        require(
            base,
            "model.rope_theta",
            self.rope_theta,
            "1 to 1e9",
            "10000 is the usual value",
        )?;
        let Some(scaling) = self.rope_scaling else {
            return Ok(());
        };
        let told = || serde_json::to_string(&scaling).unwrap_or_else(|_| format!("{scaling:?}"));
        require(
            self.family.has_rope(),
            "model.rope_scaling",
            told(),
            "absent for GPT-2, whose positions are learned",
            "leave it out",
        )?;
        require(
            scaling.within_bounds(),
            "model.rope_scaling",
            told(),
            "a factor of 1 to 1e6 and, for llama3, 0 < low_freq_factor < high_freq_factor <= 1e6 and an original length of 2 to 2^20",
            "take the values from the model's config.json",
        )
    }
}

impl RopeScaling {
    fn within_bounds(&self) -> bool {
        let fair = |factor: f64| (1.0..=1e6).contains(&factor);
        match *self {
            Self::Linear { factor } => fair(factor),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => fair(factor) && low > 0.0 && low < high && high <= 1e6 && (2..=1 << 20).contains(&original),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::TrainingConfig;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    #[test]
    fn the_demo_has_about_nine_hundred_thousand_parameters() {
        assert_eq!(ModelConfig::demo().param_count(), 885_888);
        TrainingConfig::default().validate_with(&ModelConfig::demo()).unwrap();
    }

    #[test]
    fn a_bad_value_is_told_with_its_bound_and_its_fix() {
        let model = ModelConfig {
            kv_heads: 3,
            ..ModelConfig::demo()
        };
        let error = model.validate().unwrap_err();
        assert_eq!(error.field, "model.kv_heads");
        let told = error.to_string();
        assert_eq!(
            told,
            "model.kv_heads is 3, but must be a divisor of heads = 4; change heads or kv_heads"
        );
    }

    #[test]
    fn what_does_not_fit_the_family_is_refused() {
        let gpt2 = ModelConfig {
            family: Family::Gpt2,
            ..ModelConfig::demo()
        };
        gpt2.validate().unwrap();
        let refused = |model: ModelConfig| model.validate().unwrap_err().field;
        assert_eq!(
            refused(ModelConfig {
                kv_heads: 2,
                ..gpt2.clone()
            }),
            "model.kv_heads"
        );
        assert_eq!(
            refused(ModelConfig {
                head_dim: Some(32),
                ..gpt2.clone()
            }),
            "model.head_dim"
        );
        assert_eq!(
            refused(ModelConfig {
                rope_scaling: Some(LLAMA3),
                ..gpt2
            }),
            "model.rope_scaling"
        );
        assert_eq!(
            refused(ModelConfig {
                head_dim: Some(33),
                ..ModelConfig::demo()
            }),
            "model.head_dim"
        );
        assert_eq!(
            refused(ModelConfig {
                rope_scaling: Some(RopeScaling::Linear { factor: f64::NAN }),
                ..ModelConfig::demo()
            }),
            "model.rope_scaling"
        );
    }

    #[test]
    fn the_largest_admitted_shape_does_not_overflow() {
        for family in [Family::Llama, Family::Gpt2] {
            let huge = ModelConfig {
                family,
                vocab_size: 1 << 20,
                dim: 32_768,
                layers: 1024,
                heads: 1024,
                kv_heads: 1024,
                head_dim: family.has_rope().then_some(1024),
                ffn: 131_072,
                max_seq_len: 1 << 20,
                ..ModelConfig::demo()
            };
            assert_eq!(huge.validate().unwrap_err().field, "model");
        }
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = r#"{"dim": 128, "depth": 4}"#;
        assert!(
            serde_json::from_str::<ModelConfig>(text)
                .unwrap_err()
                .to_string()
                .contains("depth")
        );
    }

    #[test]
    fn what_is_left_at_its_default_is_not_written_so_that_old_runs_keep_their_hashes() {
        let plain = serde_json::to_string(&ModelConfig::demo()).unwrap();
        assert_eq!(
            plain,
            r#"{"vocab_size":256,"dim":128,"layers":4,"heads":4,"kv_heads":4,"ffn":384,"max_seq_len":256,"rope_theta":10000.0,"norm_eps":0.00001,"tied_embeddings":true}"#
        );
        let full = ModelConfig {
            family: Family::Qwen3,
            head_dim: Some(64),
            rope_scaling: Some(LLAMA3),
            ..ModelConfig::demo()
        };
        let text = serde_json::to_string(&full).unwrap();
        assert!(
            text.contains(r#""rope_scaling":{"rope_type":"llama3","factor":8.0"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), full);
    }
}
