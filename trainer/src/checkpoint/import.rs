//! A model from elsewhere: a Hugging Face folder (`config.json` and safetensors), or a GGUF file.
//!
//! Such files come from anyone. Whatever is wrong with one gives one error that names what was expected and found; nothing in it makes us
//! panic, read outside it, or take memory out of proportion to it.

use std::path::Path;

use super::archive::{Archive, ImportError, at, wrong};
use super::gguf::Gguf;
use super::parts::{Part, gguf_parts, hf_parts};
use super::{gguf_config, read_hf_config, safetensors_file};
use crate::config::{Family, ModelConfig};
use crate::model::Layout;

/// Longest `config.json` that is read: a hundred times a usual one.
const MAX_CONFIG: u64 = 1 << 20;

/// A model read from files.
#[derive(Debug)]
pub struct Imported {
    /// Its shape.
    pub config: ModelConfig,
    /// Its parameters, in the layout's order.
    pub theta: Vec<f32>,
}

/// Reads the model at `path`: a folder as Hugging Face's, or a file as GGUF.
///
/// # Errors
/// See [`ImportError`].
pub fn import(path: &Path) -> Result<Imported, ImportError> {
    if path.is_dir() {
        return import_folder(path);
    }
    import_gguf(&Gguf::open(path)?)
}

/// The shape of the model at `path`, without its parameters.
///
/// # Errors
/// See [`ImportError`].
pub fn model_config(path: &Path) -> Result<ModelConfig, ImportError> {
    if path.is_dir() {
        return folder_config(path);
    }
    gguf_config::read(&Gguf::open(path)?)
}

/// Reads the model in a Hugging Face folder.
///
/// # Errors
/// See [`ImportError`].
pub fn import_folder(folder: &Path) -> Result<Imported, ImportError> {
    let config = folder_config(folder)?;
    let archive = safetensors_file::open_folder(folder)?;
    let layout = Layout::new(&config);
    let mut parts = hf_parts(&config, &layout);
    if config.family == Family::Gpt2 && archive.tensors.contains_key("wte.weight") {
        // The oldest files, the original's among them, are of the model without its head: names without the prefix.
        for part in &mut parts {
            part.name = part.name.trim_start_matches("transformer.").to_owned();
        }
    }
    let copy = archive.tensors.contains_key("lm_head.weight") && config.tied_embeddings;
    let theta = archive.assemble(&layout, &parts, |name| {
        harmless(name) || (copy && name == "lm_head.weight")
    })?;
    if copy {
        must_be_the_embedding(&archive, &parts, &theta)?;
    }
    Ok(Imported { config, theta })
}

/// The shape that a folder's `config.json` describes.
fn folder_config(folder: &Path) -> Result<ModelConfig, ImportError> {
    let path = folder.join("config.json");
    let len = std::fs::metadata(&path).map_err(at(&path))?.len();
    if len > MAX_CONFIG {
        return Err(wrong(
            &path,
            "the file",
            format!("{len} bytes long"),
            format!("at most {MAX_CONFIG}"),
        ));
    }
    let text = std::fs::read_to_string(&path).map_err(at(&path))?;
    read_hf_config(&text).map_err(|source| ImportError::Config {
        path: folder.to_owned(),
        source,
    })
}

/// Tensors of old files that follow from the configuration: wavelengths, causal masks.
fn harmless(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// That the head which a file keeps beside the embedding is that embedding, where the configuration says so.
fn must_be_the_embedding(archive: &Archive, parts: &[Part], theta: &[f32]) -> Result<(), ImportError> {
    let Some(embedding) = parts.first() else { return Ok(()) };
    let mut head = embedding.clone();
    head.name = "lm_head.weight".to_owned();
    archive.must_hold(&head)?;
    if archive.read(&head.name)? == theta[embedding.range.clone()] {
        return Ok(());
    }
    let expected = format!("the same as {}, since tie_word_embeddings is true", embedding.name);
    Err(wrong(&archive.path, "tensor lm_head.weight", "another", expected))
}

/// Reads the model in a GGUF file.
///
/// # Errors
/// See [`ImportError`].
pub fn import_gguf(gguf: &Gguf) -> Result<Imported, ImportError> {
    let config = gguf_config::read(gguf)?;
    let layout = Layout::new(&config);
    let parts = gguf_parts(&config, &layout);
    let theta = gguf.archive.assemble(&layout, &parts, |name| {
        config.rope_scaling.is_some() && name == gguf_config::ROPE_FACTORS
    })?;
    Ok(Imported { config, theta })
}
