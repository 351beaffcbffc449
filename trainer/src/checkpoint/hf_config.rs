//! `config.json`, as Hugging Face's `transformers` writes it, to [`ModelConfig`] and back.
//!
//! Read are LlamaForCausalLM, MistralForCausalLM (where its window covers the context), Qwen2ForCausalLM, Qwen3ForCausalLM and
//! GPT2LMHeadModel, written by version 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`). A key that changes what is computed, with a value
//! that is not computed here, is refused; every other unknown key is of no matter and left alone. A key that is absent has the
//! value that `transformers` gives it, where that value is the same in all versions; otherwise it is missed.

use serde_json::{Map, Value, json};

use crate::config::{ConfigError, Family, ModelConfig, RopeScaling};

/// Why a `config.json` describes no model that is computed here.
#[derive(Debug, thiserror::Error)]
pub enum HfConfigError {
    /// Not JSON.
    #[error("config.json is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A key with a value that is not computed here.
    #[error("config.json: {key} is {found}, expected {expected}")]
    Key {
        /// The key.
        key: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Sizes out of bounds.
    #[error("config.json: {0}")]
    Bound(#[from] ConfigError),
}

/// The architectures: name, `model_type`, and the family that computes them. The first of a family is what is written.
const ARCHITECTURES: [(&str, &str, Family); 5] = [
    ("LlamaForCausalLM", "llama", Family::Llama),
    ("MistralForCausalLM", "mistral", Family::Llama),
    ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
    ("GPT2LMHeadModel", "gpt2", Family::Gpt2),
];

/// The model that a `config.json` describes, checked.
///
/// # Errors
/// The first key that is missing, malformed or not supported, with what was expected and found.
pub fn read_hf_config(text: &str) -> Result<ModelConfig, HfConfigError> {
    let value: Value = serde_json::from_str(text)?;
    let keys = Keys(
        value
            .as_object()
            .ok_or_else(|| refuse("the whole", "an object", &value))?,
    );
    let (model_type, family) = architecture(keys)?;
    keys.must_be("quantization_config", &[Value::Null])?;
    keys.must_be("is_encoder_decoder", &[json!(false)])?;
    keys.must_be("add_cross_attention", &[json!(false)])?;
    let config = match family {
        Family::Gpt2 => gpt2(keys)?,
        _ => llama(keys, model_type, family)?,
    };
    config.validate()?;
    Ok(config)
}

/// `model_type` and family; the two keys that name them must agree.
fn architecture(keys: Keys<'_>) -> Result<(&'static str, Family), HfConfigError> {
    let known = || ARCHITECTURES.map(|(name, _, _)| name).join(", ");
    let (key, found) = match keys.get("architectures") {
        Some(names) => ("architectures", names.get(0).unwrap_or(names)),
        None => ("model_type", keys.get("model_type").unwrap_or(&Value::Null)),
    };
    let (_, model_type, family) = ARCHITECTURES
        .into_iter()
        .find(|(name, model_type, _)| found == if key == "architectures" { name } else { model_type })
        .ok_or_else(|| refuse(key, format!("one of {}", known()), found))?;
    keys.must_be("model_type", &[json!(model_type)])?;
    Ok((model_type, family))
}

fn llama(keys: Keys<'_>, model_type: &str, family: Family) -> Result<ModelConfig, HfConfigError> {
    keys.must_be("hidden_act", &[json!("silu"), json!("swish")])?;
    keys.must_be("attention_bias", &[json!(false)])?;
    keys.must_be("mlp_bias", &[json!(false)])?;
    keys.must_be("partial_rotary_factor", &[json!(1.0), json!(1)])?;
    let (dim, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
    let kv_heads = match keys.get("num_key_value_heads") {
        // Llama's own default; those of the others depend on the version.
        None if model_type == "llama" => heads,
        _ => keys.size("num_key_value_heads")?,
    };
    let head_dim = match keys.get("head_dim") {
        None if family != Family::Qwen3 => None,
        _ => Some(keys.size("head_dim")?).filter(|width| width.checked_mul(heads) != Some(dim)),
    };
    let max_seq_len = keys.size("max_position_embeddings")?;
    reads_everything(keys, model_type, max_seq_len)?;
    Ok(ModelConfig {
        family,
        vocab_size: keys.size("vocab_size")?,
        dim,
        layers: keys.size("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        ffn: keys.size("intermediate_size")?,
        max_seq_len,
        rope_theta: rope_theta(keys)?,
        rope_scaling: rope_scaling(keys)?,
        norm_eps: keys.number("rms_norm_eps")?,
        tied_embeddings: keys.flag("tie_word_embeddings", false)?,
    })
}

fn gpt2(keys: Keys<'_>) -> Result<ModelConfig, HfConfigError> {
    keys.must_be("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")])?;
    keys.must_be("scale_attn_weights", &[json!(true)])?;
    keys.must_be("scale_attn_by_inverse_layer_idx", &[json!(false)])?;
    let (dim, heads) = (keys.size("n_embd")?, keys.size("n_head")?);
    Ok(ModelConfig {
        family: Family::Gpt2,
        vocab_size: keys.size("vocab_size")?,
        dim,
        layers: keys.size("n_layer")?,
        heads,
        kv_heads: heads,
        ffn: match keys.get("n_inner") {
            None => dim.saturating_mul(4),
            Some(_) => keys.size("n_inner")?,
        },
        max_seq_len: keys.size("n_positions")?,
        norm_eps: match keys.get("layer_norm_epsilon") {
            None => 1e-5,
            Some(_) => keys.number("layer_norm_epsilon")?,
        },
        tied_embeddings: keys.flag("tie_word_embeddings", true)?,
        ..ModelConfig::demo()
    })
}

/// That every place reads all places before it: no window shorter than the context, in no layer. Llama knows no window; Qwen has a switch
/// for its own.
fn reads_everything(keys: Keys<'_>, model_type: &str, context: usize) -> Result<(), HfConfigError> {
    let windowed = match model_type {
        "mistral" => true,
        "qwen2" | "qwen3" => keys.flag("use_sliding_window", false)?,
        _ => false,
    };
    if windowed && keys.get("sliding_window").is_some() {
        let window = keys.size("sliding_window")?;
        if window < context {
            let expected = format!("null, or at least max_position_embeddings = {context}");
            return Err(refuse("sliding_window", expected, &json!(window)));
        }
        return Ok(());
    }
    let Some(types) = keys.get("layer_types") else {
        return Ok(());
    };
    let full = |types: &Vec<Value>| types.iter().all(|one| one == "full_attention");
    if types.as_array().is_some_and(full) {
        return Ok(());
    }
    Err(refuse("layer_types", "\"full_attention\" in every layer", types))
}

/// The tables that may describe the rotation: version 4's and version 5's.
fn rope_tables(keys: Keys<'_>) -> Result<Vec<(&'static str, Keys<'_>)>, HfConfigError> {
    let mut tables = Vec::new();
    for key in ["rope_scaling", "rope_parameters"] {
        if let Some(value) = keys.get(key) {
            let table = value.as_object().ok_or_else(|| refuse(key, "an object", value))?;
            tables.push((key, Keys(table)));
        }
    }
    Ok(tables)
}

/// The base, from wherever it is written; 10000 where it is nowhere. Places that contradict each other are refused.
fn rope_theta(keys: Keys<'_>) -> Result<f64, HfConfigError> {
    let mut tables: Vec<Keys<'_>> = rope_tables(keys)?.into_iter().map(|(_, table)| table).collect();
    tables.push(keys);
    let mut theta = None;
    for table in tables.iter().filter(|table| table.get("rope_theta").is_some()) {
        let found = table.number("rope_theta")?;
        if theta.is_some_and(|theta| theta != found) {
            return Err(refuse(
                "rope_theta",
                format!("{theta:?} as elsewhere in the file"),
                &json!(found),
            ));
        }
        theta = Some(found);
    }
    Ok(theta.unwrap_or(10_000.0))
}

/// The scaling; both tables, where there are two, must say the same.
fn rope_scaling(keys: Keys<'_>) -> Result<Option<RopeScaling>, HfConfigError> {
    let mut scaling = None;
    for (key, table) in rope_tables(keys)? {
        let found = one_scaling(key, table)?;
        if scaling.is_some_and(|other| other != found) {
            return Err(refuse(
                key,
                "the same scaling as in rope_scaling",
                &Value::Object(table.0.clone()),
            ));
        }
        scaling = Some(found);
    }
    Ok(scaling.flatten())
}

fn one_scaling(key: &'static str, table: Keys<'_>) -> Result<Option<RopeScaling>, HfConfigError> {
    table.must_be("partial_rotary_factor", &[json!(1.0), json!(1)])?;
    let kind = table
        .get("rope_type")
        .or(table.get("type"))
        .and_then(Value::as_str)
        .unwrap_or("default");
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear {
            factor: table.number("factor")?,
        })),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: table.number("factor")?,
            low_freq_factor: table.number("low_freq_factor")?,
            high_freq_factor: table.number("high_freq_factor")?,
            original_max_position_embeddings: table.size("original_max_position_embeddings")?,
        })),
        _ => Err(refuse(
            key,
            "a rope_type of default, linear or llama3",
            &Value::Object(table.0.clone()),
        )),
    }
}

/// The keys of an object. `null` is as good as absent.
#[derive(Clone, Copy)]
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// A count that must be there.
    fn size(self, key: &'static str) -> Result<usize, HfConfigError> {
        let found = self.get(key).unwrap_or(&Value::Null);
        let size = found.as_u64().and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| refuse(key, "a whole number", found))
    }

    /// A number that must be there.
    fn number(self, key: &'static str) -> Result<f64, HfConfigError> {
        let found = self.get(key).unwrap_or(&Value::Null);
        found.as_f64().ok_or_else(|| refuse(key, "a number", found))
    }

    fn flag(self, key: &'static str, absent: bool) -> Result<bool, HfConfigError> {
        match self.get(key) {
            None => Ok(absent),
            Some(found) => found.as_bool().ok_or_else(|| refuse(key, "true or false", found)),
        }
    }

    /// That `key` is absent or one of `allowed`.
    fn must_be(self, key: &'static str, allowed: &[Value]) -> Result<(), HfConfigError> {
        match self.get(key) {
            Some(found) if !allowed.contains(found) => {
                let words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                Err(refuse(key, words.join(" or "), found))
            }
            _ => Ok(()),
        }
    }
}

/// A refusal; a long value is cut.
fn refuse(key: &'static str, expected: impl Into<String>, found: &Value) -> HfConfigError {
    let mut words = if found.is_null() {
        "absent".to_owned()
    } else {
        found.to_string()
    };
    if words.chars().count() > 120 {
        words = words.chars().take(120).chain("...".chars()).collect();
    }
    HfConfigError::Key {
        key,
        expected: expected.into(),
        found: words,
    }
}

/// The `config.json` of a model; its rotation is written in the places of version 4 and in that of version 5.
pub fn hf_config(config: &ModelConfig) -> Value {
    let named = ARCHITECTURES.iter().find(|(_, _, family)| *family == config.family);
    let Some((architecture, model_type, _)) = named else {
        unreachable!("every family has an architecture")
    };
    let mut keys = match config.family {
        Family::Gpt2 => gpt2_keys(config),
        _ => llama_keys(config),
    };
    let common = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
        "torch_dtype": "float32",
    });
    for (key, value) in common.as_object().into_iter().flatten() {
        keys.insert(key.clone(), value.clone());
    }
    Value::Object(keys)
}

fn llama_keys(config: &ModelConfig) -> Map<String, Value> {
    let scaling = config.rope_scaling.map(|scaling| json!(scaling));
    let mut rotation = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
    rotation["rope_theta"] = json!(config.rope_theta);
    object(json!({
        "hidden_size": config.dim,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim(),
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rotation,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "use_sliding_window": false,
    }))
}

fn gpt2_keys(config: &ModelConfig) -> Map<String, Value> {
    object(json!({
        "n_embd": config.dim,
        "n_inner": config.ffn,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        // Written for who goes on training elsewhere: none here either.
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(keys) => keys,
        _ => unreachable!("only objects are passed"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn qwen2() -> Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
            "layer_types": ["full_attention"], "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_window": null, "use_sliding_window": false, "tie_word_embeddings": true, "vocab_size": 40, "torch_dtype": "bfloat16"
        })
    }

    /// Qwen2's configuration with one key changed.
    fn with(key: &str, value: Value) -> String {
        let mut keys = qwen2();
        keys[key] = value;
        keys.to_string()
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_model() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        let demo = ModelConfig::demo;
        for config in [
            demo(),
            ModelConfig {
                rope_scaling: Some(llama3),
                kv_heads: 2,
                tied_embeddings: false,
                ..demo()
            },
            ModelConfig {
                rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }),
                ..demo()
            },
            ModelConfig {
                family: Family::Qwen2,
                kv_heads: 1,
                rope_theta: 1e6,
                ..demo()
            },
            ModelConfig {
                family: Family::Qwen3,
                head_dim: Some(48),
                ..demo()
            },
            ModelConfig {
                family: Family::Gpt2,
                ..demo()
            },
        ] {
            let text = hf_config(&config).to_string();
            assert_eq!(read_hf_config(&text).unwrap(), config, "{text}");
        }
    }

    #[test]
    fn harmless_keys_are_left_alone() {
        let text = with("chat_template_hint", json!({"a": [1, 2]}));
        let config = read_hf_config(&text).unwrap();
        assert_eq!(
            (config.family, config.kv_heads, config.rope_theta),
            (Family::Qwen2, 2, 1e6)
        );
    }

    #[test]
    fn what_would_be_computed_otherwise_is_refused_with_key_expected_and_found() {
        for (key, value, words) in [
            (
                "architectures",
                json!(["MambaForCausalLM"]),
                &["architectures", "MambaForCausalLM", "LlamaForCausalLM"][..],
            ),
            (
                "model_type",
                json!("qwen3"),
                &["model_type is \"qwen3\"", "expected \"qwen2\""],
            ),
            (
                "hidden_act",
                json!("gelu"),
                &["hidden_act is \"gelu\"", "expected \"silu\""],
            ),
            (
                "attention_bias",
                json!(true),
                &["attention_bias is true", "expected false"],
            ),
            (
                "layer_types",
                json!(["sliding_attention"]),
                &["layer_types", "sliding_attention", "full_attention"],
            ),
            (
                "rope_parameters",
                json!({"rope_type": "yarn", "factor": 4.0}),
                &["rope_parameters", "yarn", "llama3"],
            ),
            (
                "rope_parameters",
                json!({"rope_type": "llama3", "factor": 4.0}),
                &["low_freq_factor is absent", "a number"],
            ),
            ("rope_theta", json!(5.0), &["rope_theta", "5.0", "1000000"]),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2.0}),
                &["rope_parameters", "the same scaling"],
            ),
            (
                "quantization_config",
                json!({"bits": 4}),
                &["quantization_config", "bits", "null"],
            ),
            (
                "hidden_size",
                json!("many"),
                &["hidden_size is \"many\"", "a whole number"],
            ),
            ("hidden_size", json!(-4), &["hidden_size is -4"]),
            ("num_key_value_heads", Value::Null, &["num_key_value_heads is absent"]),
            ("num_attention_heads", json!(0), &["heads is 0", "1 to 1024"]),
            ("num_hidden_layers", json!(u64::MAX), &["model.layers", "1 to 1024"]),
            ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor is 0.5"]),
        ] {
            let told = read_hf_config(&with(key, value)).unwrap_err().to_string();
            assert!(words.iter().all(|word| told.contains(word)), "{words:?} in: {told}");
        }
        for text in ["", "[]", "{", "null", "{\"model_type\": \"llama\"}"] {
            assert!(read_hf_config(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_window_shorter_than_the_context_is_refused_and_a_longer_one_changes_nothing() {
        let mistral = |window: Value| {
            let mut keys = qwen2();
            keys["architectures"] = json!(["MistralForCausalLM"]);
            keys["model_type"] = json!("mistral");
            keys["sliding_window"] = window;
            read_hf_config(&keys.to_string())
        };
        assert_eq!(mistral(Value::Null).unwrap().family, Family::Llama);
        mistral(json!(64)).unwrap();
        let told = mistral(json!(63)).unwrap_err().to_string();
        assert!(
            told.contains("sliding_window is 63, expected null, or at least max_position_embeddings = 64"),
            "{told}"
        );
        // Qwen's window is off unless its switch is on.
        read_hf_config(&with("sliding_window", json!(8))).unwrap();
        let mut on = qwen2();
        on["sliding_window"] = json!(8);
        on["use_sliding_window"] = json!(true);
        assert!(read_hf_config(&on.to_string()).is_err());
    }
}
