//! The metadata of a GGUF file to [`ModelConfig`]: architectures `llama`, `qwen2`, `qwen3` and `gpt2`.
//!
//! Llama 3's stretched wavelengths are not in the metadata but in a tensor, `rope_freqs.weight`: by how much each pair's wavelength is
//! stretched. It is held against what [`RopeScaling::Llama3`] gives for Llama 3.1's and 3.2's settings, and refused if it is something else.

use std::path::Path;

use super::HfConfigError;
use super::archive::{ImportError, wrong};
use super::gguf::{Gguf, Value};
use crate::config::{Family, ModelConfig, RopeScaling};
use crate::model::frequencies;

/// The tensor of stretched wavelengths, `[hd / 2]`.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The model that the file describes, checked.
pub(crate) fn read(gguf: &Gguf) -> Result<ModelConfig, ImportError> {
    let name = gguf.text("general.architecture").unwrap_or("absent");
    let family = match name {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gpt2" => Family::Gpt2,
        _ => {
            return Err(wrong(
                &gguf.path,
                "general.architecture",
                name,
                "llama, qwen2, qwen3 or gpt2",
            ));
        }
    };
    let keys = Keys { gguf, name };
    keys.must_read_everything()?;
    let heads = keys.size("attention.head_count")?;
    let dim = keys.size("embedding_length")?;
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(width) if width.checked_mul(heads) != Some(dim) => Some(width),
        _ => None,
    };
    let mut config = ModelConfig {
        family,
        vocab_size: keys.vocab_size()?,
        dim,
        layers: keys.size("block_count")?,
        heads,
        kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: keys.size("feed_forward_length")?,
        max_seq_len: keys.size("context_length")?,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: keys.rope_scaling()?,
        norm_eps: keys.norm_eps(family)?,
        tied_embeddings: !gguf.archive.tensors.contains_key("output.weight"),
    };
    validate(&gguf.path, &config)?;
    if family.has_rope() {
        keys.must_equal("rope.dimension_count", config.head_dim())?;
        keys.must_equal("attention.value_length", config.head_dim())?;
        if gguf.archive.tensors.contains_key(ROPE_FACTORS) {
            config.rope_scaling = Some(llama3(gguf, &config)?);
        }
    }
    Ok(config)
}

fn validate(path: &Path, config: &ModelConfig) -> Result<(), ImportError> {
    config.validate().map_err(|error| ImportError::Config {
        path: path.to_owned(),
        source: HfConfigError::Bound(error),
    })
}

/// The settings that give the file's factors.
fn llama3(gguf: &Gguf, plain: &ModelConfig) -> Result<RopeScaling, ImportError> {
    let factors = gguf.archive.read(ROPE_FACTORS)?;
    let largest = factors.iter().copied().fold(1.0, f32::max);
    let scaling = RopeScaling::Llama3 {
        factor: f64::from(largest),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let stretched = ModelConfig {
        rope_scaling: Some(scaling),
        ..plain.clone()
    };
    validate(&gguf.path, &stretched)?;
    let expected: Vec<f64> = frequencies(plain)
        .iter()
        .zip(frequencies(&stretched))
        .map(|(plain, stretched)| plain / stretched)
        .collect();
    let near = |(found, expected): (&f32, &f64)| (f64::from(*found) - expected).abs() < 1e-4 * expected;
    if factors.len() == expected.len() && factors.iter().zip(&expected).all(near) {
        return Ok(scaling);
    }
    let found = format!("{} factors up to {largest}", factors.len());
    Err(wrong(
        &gguf.path,
        format!("tensor {ROPE_FACTORS}"),
        found,
        "those of Llama 3.1 or 3.2 (from 8192 tokens)",
    ))
}

/// The keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    name: &'a str,
}

impl Keys<'_> {
    /// The key with the architecture before it, and its value.
    fn get(&self, key: &str) -> (String, Option<&Value>) {
        let key = format!("{}.{key}", self.name);
        let value = self.gguf.get(&key);
        (key, value)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ImportError> {
        let (key, value) = self.get(key);
        let size = match value {
            None => return Ok(None),
            Some(&Value::Unsigned(size)) => usize::try_from(size).ok(),
            Some(&Value::Signed(size)) => usize::try_from(size).ok(),
            Some(_) => None,
        };
        match size {
            Some(size) => Ok(Some(size)),
            None => Err(self.wrong(key, value, "a whole number")),
        }
    }

    fn size(&self, key: &str) -> Result<usize, ImportError> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.wrong(self.get(key).0, None, "a whole number"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ImportError> {
        let (key, value) = self.get(key);
        match value {
            None => Ok(None),
            Some(Value::Float(number)) => Ok(Some(*number)),
            Some(_) => Err(self.wrong(key, value, "a number")),
        }
    }

    fn norm_eps(&self, family: Family) -> Result<f64, ImportError> {
        let key = match family {
            Family::Gpt2 => "attention.layer_norm_epsilon",
            _ => "attention.layer_norm_rms_epsilon",
        };
        let eps = self.number(key)?;
        eps.ok_or_else(|| self.wrong(self.get(key).0, None, "a number"))
    }

    /// Rows of the embedding; the file may say it in the metadata too, and then the same.
    fn vocab_size(&self) -> Result<usize, ImportError> {
        let embedding = self.gguf.archive.tensors.get("token_embd.weight");
        let rows = embedding.and_then(|stored| stored.shape.first().copied());
        let rows = rows.ok_or_else(|| wrong(&self.gguf.path, "tensor token_embd.weight", "absent", "the embedding"))?;
        self.must_equal("vocab_size", rows)?;
        Ok(rows)
    }

    fn must_equal(&self, key: &str, expected: usize) -> Result<(), ImportError> {
        match self.optional_size(key)? {
            Some(found) if found != expected => {
                Err(wrong(&self.gguf.path, self.get(key).0, found, expected.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// No window, no experts, nothing else that would be computed otherwise.
    fn must_read_everything(&self) -> Result<(), ImportError> {
        self.must_equal("expert_count", 0)?;
        let Some(window) = self.optional_size("attention.sliding_window")? else {
            return Ok(());
        };
        let context = self.size("context_length")?;
        if window == 0 || window >= context {
            return Ok(());
        }
        let expected = format!("absent, or at least context_length = {context}");
        Err(wrong(
            &self.gguf.path,
            self.get("attention.sliding_window").0,
            window,
            expected,
        ))
    }

    fn rope_scaling(&self) -> Result<Option<RopeScaling>, ImportError> {
        let (key, kind) = self.get("rope.scaling.type");
        match kind {
            None => Ok(None),
            Some(Value::Text(kind)) if kind == "none" => Ok(None),
            Some(Value::Text(kind)) if kind == "linear" => match self.number("rope.scaling.factor")? {
                Some(factor) => Ok(Some(RopeScaling::Linear { factor })),
                None => Err(self.wrong(self.get("rope.scaling.factor").0, None, "a number")),
            },
            other => Err(self.wrong(key, other, "none or linear")),
        }
    }

    fn wrong(&self, key: String, found: Option<&Value>, expected: &str) -> ImportError {
        let found = match found {
            None => "absent".to_owned(),
            Some(Value::Unsigned(value)) => value.to_string(),
            Some(Value::Signed(value)) => value.to_string(),
            Some(Value::Float(value)) => value.to_string(),
            Some(Value::Bool(value)) => value.to_string(),
            Some(Value::Text(text)) => format!("{:?}", text.chars().take(60).collect::<String>()),
            Some(Value::Texts(_) | Value::Numbers(..)) => "an array".to_owned(),
        };
        wrong(&self.gguf.path, key, found, expected)
    }
}
