//! Model files from anyone: the good ones are read, whatever their form; the bad ones give one error that tells what was expected and found.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{GgufWriter, llama, llama_gguf, write_folder, write_safetensors};
use proptest::prelude::*;
use serde_json::json;
use trainer::checkpoint::{export_hf, import};
use trainer::config::{Family, ModelConfig};
use trainer::model::{Layout, init_flat};

/// The error at `path`, in words.
fn told(path: &Path) -> String {
    import(path).unwrap_err().to_string()
}

/// That reading `path` fails with a message that has all of `words`.
fn refused(path: &Path, words: &[&str]) {
    let told = told(path);
    assert!(words.iter().all(|word| told.contains(word)), "{words:?} in: {told}");
}

#[test]
fn what_is_exported_comes_back_bit_for_bit() {
    for family in [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gpt2] {
        let config = ModelConfig {
            family,
            vocab_size: 256,
            dim: 32,
            layers: 2,
            heads: 4,
            ffn: 48,
            ..ModelConfig::demo()
        };
        let (layout, theta) = (Layout::new(&config), init_flat(&config, 3));
        let folder = tempfile::tempdir().unwrap();
        export_hf(folder.path(), &config, &layout, &theta, None).unwrap();
        let read = import(folder.path()).unwrap();
        assert_eq!((read.config, read.theta), (config, theta), "{family:?}");
    }
}

#[test]
fn a_folder_and_a_gguf_file_of_one_model_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let (config, json, tensors) = llama();
    write_folder(folder.path(), &json, &tensors);
    let file = folder.path().join("model.gguf");
    fs::write(&file, llama_gguf()).unwrap();
    let (ours, theirs) = (import(folder.path()).unwrap(), import(&file).unwrap());
    assert_eq!(ours.config, config);
    assert_eq!(theirs.config, config);
    assert_eq!(ours.theta, theirs.theta);
}

#[test]
fn shards_are_put_together_by_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let (_, json, tensors) = llama();
    write_folder(folder.path(), &json, &tensors);
    let whole = import(folder.path()).unwrap().theta;
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let (first, second) = tensors.split_at(5);
    write_safetensors(&folder.path().join("a.safetensors"), first);
    write_safetensors(&folder.path().join("b.safetensors"), second);
    let write_index = |place: &dyn Fn(usize) -> &'static str| {
        let map: serde_json::Map<String, serde_json::Value> = tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name.clone(), json!(place(i))))
            .collect();
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    };
    let right = |i: usize| if i < 5 { "a.safetensors" } else { "b.safetensors" };
    write_index(&right);
    assert_eq!(import(folder.path()).unwrap().theta, whole);
    write_index(&|i| if i < 4 { "a.safetensors" } else { "b.safetensors" });
    refused(
        folder.path(),
        &[
            &tensors[4].name,
            "a.safetensors",
            "in b.safetensors, as the weight_map says",
        ],
    );
    write_index(&|i| if i < 5 { "../a.safetensors" } else { "b.safetensors" });
    refused(folder.path(), &["../a.safetensors", "the name of a file"]);
    write_index(&|_| "c.safetensors");
    refused(folder.path(), &["c.safetensors"]);
}

#[test]
fn a_tied_head_may_be_there_if_it_is_the_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut config, mut tensors) = llama();
    config["tie_word_embeddings"] = json!(true);
    write_folder(folder.path(), &config, &tensors);
    refused(
        folder.path(),
        &["lm_head.weight is another", "the same as model.embed_tokens.weight"],
    );
    let embedding = tensors
        .iter()
        .find(|tensor| tensor.name.contains("embed"))
        .unwrap()
        .values
        .clone();
    tensors
        .iter_mut()
        .find(|tensor| tensor.name == "lm_head.weight")
        .unwrap()
        .values = embedding;
    write_folder(folder.path(), &config, &tensors);
    let with = import(folder.path()).unwrap();
    tensors.retain(|tensor| tensor.name != "lm_head.weight");
    write_folder(folder.path(), &config, &tensors);
    assert_eq!(import(folder.path()).unwrap().theta, with.theta);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let (_, config, tensors) = llama();
    let write = |change: &dyn Fn(&mut Vec<common::Tensor>)| {
        let mut changed = tensors.clone();
        change(&mut changed);
        write_folder(path, &config, &changed);
    };
    write(&|tensors| tensors.retain(|tensor| tensor.name != "model.norm.weight"));
    refused(path, &["model.norm.weight is absent, expected shape [32]"]);
    write(&|tensors| tensors[0].name = "model.layers.7.surprise".to_owned());
    assert!(told(path).contains("absent"), "what misses is told first");
    write(&|tensors| {
        let mut more = tensors[0].clone();
        more.name = "model.layers.7.surprise".to_owned();
        tensors.push(more);
    });
    refused(path, &["model.layers.7.surprise is there", "no such tensor"]);
    write(&|tensors| {
        let head = tensors
            .iter_mut()
            .find(|tensor| tensor.name == "lm_head.weight")
            .unwrap();
        head.shape = vec![32, 24];
    });
    refused(path, &["lm_head.weight is of shape [32, 24], expected shape [24, 32]"]);
    write(&|tensors| tensors[0].values[3] = f32::NAN);
    refused(path, &["parameter 3 of", "NaN", "finite"]);
    let mut more = config.clone();
    more["num_hidden_layers"] = json!(2);
    write_folder(path, &more, &tensors);
    refused(path, &["model.layers.1.", "is absent"]);
}

#[test]
fn headers_that_lie_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let (_, config, _) = llama();
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        fs::write(path.join("model.safetensors"), bytes).unwrap();
    };
    let tensor =
        |shape: &str, offsets: &str| format!(r#""a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
    file(&format!("{{{}}}", tensor("[2]", "[0,8]")), 7);
    refused(path, &["length of the data is 7", "8, as the header says"]);
    file(&format!("{{{}}}", tensor("[3]", "[0,8]")), 8);
    refused(path, &["tensor a of F32 and shape [3] is in bytes 0 to 8", "12 bytes"]);
    file(&format!("{{{}}}", tensor("[2]", "[8,0]")), 8);
    refused(path, &["tensor a", "8 bytes"]);
    file(&format!("{{{}}}", tensor("[4611686018427387904,16]", "[0,8]")), 8);
    refused(path, &["tensor a", "a length that can be"]);
    file(&format!("{{{}}}", tensor("[2]", "[4,12]")), 12);
    refused(path, &["the first byte of tensor a is 4, expected 0"]);
    file(
        &format!(
            r#"{{{},"b":{{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}}}"#,
            tensor("[2]", "[0,8]")
        ),
        12,
    );
    refused(path, &["the first byte of tensor b is 4, expected 8"]);
    file("[]", 0);
    refused(path, &["the header"]);
    fs::write(path.join("model.safetensors"), [0xff; 8]).unwrap();
    refused(path, &["the header's length", "at most 0"]);
    fs::write(path.join("model.safetensors"), [1; 3]).unwrap();
    refused(path, &["3 bytes long", "at least 8"]);
    fs::remove_file(path.join("model.safetensors")).unwrap();
    refused(path, &["model.safetensors"]);
}

#[test]
fn gguf_files_that_lie_are_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let file = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    file(b"GGML and more");
    refused(&path, &["the magic is \"GGML\"", "\"GGUF\""]);
    file(&[b"GGUF".as_slice(), &1_u32.to_le_bytes(), &[0; 16]].concat());
    refused(&path, &["the version is 1, expected 2 or 3"]);
    file(&[b"GGUF".as_slice(), &3_u32.to_le_bytes(), &[0xff; 16]].concat());
    refused(&path, &["the number of tensors", "at most 0"]);
    file(&[b"GGUF".as_slice(), &3_u32.to_le_bytes(), &[0; 8]].concat());
    refused(&path, &["the number of keys is cut off at byte 16"]);
    file(&GgufWriter::default().text("general.architecture", "mamba").finish());
    refused(&path, &["general.architecture is mamba", "llama, qwen2, qwen3 or gpt2"]);
    file(&GgufWriter::default().text("a", "b").text("a", "c").finish());
    refused(&path, &["key a is there twice"]);
    file(&GgufWriter::default().tensor("t", &[1 << 40, 1 << 40], 0, &[]).finish());
    refused(&path, &["tensor t", "of shape"]);
    file(&GgufWriter::default().tensor("t", &[1 << 40], 0, &[]).finish());
    refused(&path, &["tensor t", "to end within"]);
    file(&GgufWriter::default().tensor("t", &[1, 33], 8, &[0; 40]).finish());
    refused(&path, &["tensor t", "rows of a multiple of 32"]);
    file(&GgufWriter::default().tensor("t", &[], 0, &[]).finish());
    refused(&path, &["of 0 dimensions", "1 to 4"]);
    let good = llama_gguf();
    file(&good[..good.len() - 64]);
    refused(&path, &["to end within"]);
}

/// Reads a mutated file: whatever comes of it, it comes as a value.
fn read_mutated(name: &str, bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    if name.ends_with(".gguf") {
        fs::write(&path, bytes).unwrap();
        let _ = import(&path);
        return;
    }
    let (_, config, tensors) = llama();
    write_folder(folder.path(), &config, &tensors);
    fs::write(path, bytes).unwrap();
    let _ = import(folder.path());
}

fn mutated(bytes: &[u8], changes: &[(usize, u8)], cut: usize, most: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let most = most.min(bytes.len());
    for &(place, value) in changes {
        bytes[place % most] = value;
    }
    bytes.truncate(bytes.len() - cut.min(bytes.len()));
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_mutation_of_a_gguf_file_panics(changes in prop::collection::vec((0..4096_usize, any::<u8>()), 0..6), cut in 0..200_usize) {
        read_mutated("model.gguf", &mutated(&llama_gguf(), &changes, cut, 1200));
    }

    #[test]
    fn no_mutation_of_a_safetensors_file_panics(changes in prop::collection::vec((0..4096_usize, any::<u8>()), 0..6), cut in 0..200_usize) {
        let folder = tempfile::tempdir().unwrap();
        let (_, config, tensors) = llama();
        write_folder(folder.path(), &config, &tensors);
        let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
        read_mutated("model.safetensors", &mutated(&bytes, &changes, cut, 1300));
    }

    #[test]
    fn no_mutation_of_a_config_panics(changes in prop::collection::vec((0..4096_usize, any::<u8>()), 0..4), cut in 0..3_usize) {
        let (_, config, _) = llama();
        read_mutated("config.json", &mutated(config.to_string().as_bytes(), &changes, cut, 4096));
    }

    #[test]
    fn no_number_in_a_config_panics(key in 0..8_usize, value in prop_oneof![any::<u64>(), 0..2000_u64, Just(1_u64 << 32)]) {
        let keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings"];
        let (_, mut config, _) = llama();
        config[keys[key]] = json!(value);
        read_mutated("config.json", config.to_string().as_bytes());
    }
}
