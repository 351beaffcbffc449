//! Anyone's bytes as a model file: never a panic, never memory out of proportion; an error that has words, or a model of its own layout.
//!
//! The first byte chooses what they are: a GGUF file, the safetensors file of a small Llama, or that model's `config.json`.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use trainer::checkpoint::{export_hf, import};
use trainer::config::ModelConfig;
use trainer::model::{Layout, init_flat};

/// A folder of this process with a whole model in it; what is fuzzed replaces one of its files.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("murmur-fuzz-{}", std::process::id()));
        write_model(&folder);
        folder
    })
}

fn write_model(folder: &Path) {
    let config = ModelConfig {
        dim: 32,
        layers: 1,
        ffn: 32,
        ..ModelConfig::demo()
    };
    let theta = init_flat(&config, 0);
    export_hf(folder, &config, &Layout::new(&config), &theta, None).expect("a folder to write in");
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let folder = folder();
    let (name, read) = match first % 3 {
        0 => ("model.gguf", folder.join("model.gguf")),
        1 => ("model.safetensors", folder.to_owned()),
        _ => ("config.json", folder.to_owned()),
    };
    let path = folder.join(name);
    let whole = std::fs::read(&path).ok();
    std::fs::write(&path, rest).expect("a file to write");
    match import(&read) {
        Ok(model) => assert_eq!(model.theta.len(), Layout::new(&model.config).total),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Some(whole) = whole {
        std::fs::write(&path, whole).expect("a file to write");
    }
});
