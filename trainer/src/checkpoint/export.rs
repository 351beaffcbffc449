//! A folder that Hugging Face's `transformers` loads: `AutoModelForCausalLM.from_pretrained(folder)`.
//!
//! The layout already carries the Llama family's names and shapes, so there the weights are the snapshot's data under a header with the metadata
//! `{"format":"pt"}` that `transformers` asks for; GPT-2's are renamed, joined and transposed ([`super::parts`]). A tied head is left out and
//! `tie_word_embeddings` is true.
//!
//! With the vocabulary as `tokenizer.json` ([`super::tokenizer_json`]), `AutoTokenizer.from_pretrained(folder)` works too.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Value, json};

use super::parts::{Change, Part, hf_parts, turned_back};
use super::{CheckpointError, at, header, hf_config, write_atomically};
use crate::config::ModelConfig;
use crate::model::{Entry, Layout};

/// Why a folder could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Parameters of another model.
    #[error("{found} parameters given for a model of {expected}")]
    Length {
        /// Parameters of the model.
        expected: usize,
        /// Parameters given.
        found: usize,
    },
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] CheckpointError),
}

/// Writes `config.json`, `generation_config.json`, `model.safetensors` and, where there is a `tokenizer`, `tokenizer.json` with its
/// configuration into `folder`, which is made if absent; files of these names are replaced.
///
/// # Errors
/// Parameters of another length, or what the file system says.
pub fn export_hf(
    folder: &Path,
    config: &ModelConfig,
    layout: &Layout,
    theta: &[f32],
    tokenizer: Option<&Value>,
) -> Result<(), ExportError> {
    if theta.len() != layout.total {
        return Err(ExportError::Length {
            expected: layout.total,
            found: theta.len(),
        });
    }
    std::fs::create_dir_all(folder).map_err(at(folder))?;
    write_json(folder, "config.json", &hf_config(config))?;
    write_json(
        folder,
        "generation_config.json",
        &json!({"do_sample": true, "temperature": 0.8, "top_k": 50}),
    )?;
    if let Some(tokenizer) = tokenizer {
        write_json(folder, "tokenizer.json", tokenizer)?;
        let reader = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        write_json(folder, "tokenizer_config.json", &reader)?;
    }
    let (entries, values) = file_order(config, layout, theta);
    let head = header(&entries, r#"{"format":"pt"}"#);
    write_atomically(&folder.join("model.safetensors"), &head, &values)?;
    Ok(())
}

fn write_json(folder: &Path, name: &str, value: &Value) -> Result<(), CheckpointError> {
    write_atomically(&folder.join(name), format!("{value:#}\n").as_bytes(), &[])
}

/// Names and shapes of the file's tensors, one after the other, and their values in that order; borrowed where the file is the layout.
fn file_order<'a>(config: &ModelConfig, layout: &Layout, theta: &'a [f32]) -> (Vec<Entry>, Cow<'a, [f32]>) {
    let parts = hf_parts(config, layout);
    let entry = |part: &Part| Entry {
        name: part.name.clone(),
        shape: part.shape.clone(),
        offset: part.range.start,
        len: part.range.len(),
    };
    let entries = parts.iter().map(entry).collect();
    if parts.iter().all(|part| part.change == Change::AsIs) {
        return (entries, Cow::Borrowed(theta));
    }
    let mut values = Vec::with_capacity(theta.len());
    for part in &parts {
        values.extend(turned_back(part, &theta[part.range.clone()]));
    }
    (entries, Cow::Owned(values))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::init_flat;

    #[test]
    fn an_export_holds_what_transformers_reads() {
        let folder = tempfile::tempdir().unwrap();
        for tied_embeddings in [true, false] {
            let config = ModelConfig {
                dim: 16,
                layers: 1,
                heads: 2,
                ffn: 24,
                kv_heads: 1,
                tied_embeddings,
                ..ModelConfig::demo()
            };
            let (layout, theta) = (Layout::new(&config), init_flat(&config, 1));
            export_hf(folder.path(), &config, &layout, &theta, None).unwrap();
            let weights = std::fs::read(folder.path().join("model.safetensors")).unwrap();
            let (_, metadata) = safetensors::SafeTensors::read_metadata(&weights).unwrap();
            assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
            let read = safetensors::SafeTensors::deserialize(&weights).unwrap();
            assert_eq!(
                read.tensor("model.layers.0.self_attn.k_proj.weight").unwrap().shape(),
                [8, 16]
            );
            assert_eq!(read.tensor("lm_head.weight").is_ok(), !tied_embeddings);
            let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
            let read: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(read["architectures"][0], "LlamaForCausalLM");
            assert_eq!(read["tie_word_embeddings"], tied_embeddings);
        }
    }

    #[test]
    fn parameters_of_another_model_are_not_exported() {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::demo();
        let result = export_hf(folder.path(), &config, &Layout::new(&config), &[0.0], None);
        assert!(matches!(result, Err(ExportError::Length { found: 1, .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
