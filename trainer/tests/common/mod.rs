//! Model files for tests, made without a tensor library: weights by formula, a writer of safetensors and one of GGUF.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use trainer::checkpoint::{export_hf, hf_config};
use trainer::config::ModelConfig;
use trainer::model::Layout;

/// Element i of the tensor called `name`; the same formula as in `launch/benches/parity.py`, where it is told.
pub fn formula(name: &str, shape: &[usize]) -> Vec<f32> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let centre = if shape.len() == 1 && !name.ends_with(".bias") {
        1.0
    } else {
        0.0
    };
    let value = |i: u64| {
        let mut z = hash.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (centre + ((z >> 48) as f64 / 65_536.0 - 0.5) / 2.0) as f32
    };
    (0..shape.iter().product::<usize>() as u64).map(value).collect()
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Tensor {
    pub fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

/// The tensors of this model's Hugging Face file, with the formula's values.
pub fn tensors(config: &ModelConfig) -> Vec<Tensor> {
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::new(config);
    let zeros = vec![0.0; layout.total];
    export_hf(folder.path(), config, &layout, &zeros, None).unwrap();
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, TensorView<'_>)| Tensor {
        name: name.to_owned(),
        shape: view.shape().to_vec(),
        values: formula(name, view.shape()),
    };
    let mut tensors: Vec<Tensor> = read.iter().map(tensor).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Writes a safetensors file by the format's own crate.
pub fn write_safetensors(path: &Path, tensors: &[Tensor]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(Tensor::bytes).collect();
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .zip(&data)
        .map(|(tensor, data)| {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), data).unwrap();
            (tensor.name.as_str(), view)
        })
        .collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Writes a folder as transformers does.
pub fn write_folder(folder: &Path, config: &Value, tensors: &[Tensor]) {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    write_safetensors(&folder.join("model.safetensors"), tensors);
}

/// A small Llama, its `config.json` and its file's tensors; made once.
pub fn llama() -> (ModelConfig, Value, Vec<Tensor>) {
    static MADE: OnceLock<(ModelConfig, Value, Vec<Tensor>)> = OnceLock::new();
    MADE.get_or_init(make_llama).clone()
}

fn make_llama() -> (ModelConfig, Value, Vec<Tensor>) {
    let config = ModelConfig {
        vocab_size: 24,
        dim: 32,
        layers: 1,
        heads: 4,
        kv_heads: 2,
        ffn: 64,
        max_seq_len: 32,
        tied_embeddings: false,
        ..ModelConfig::demo()
    };
    let tensors = tensors(&config);
    (config.clone(), hf_config(&config), tensors)
}

/// Bytes of a GGUF file as they are put together.
#[derive(Default)]
pub struct GgufWriter {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    entries: Vec<u8>,
    data: Vec<u8>,
}

impl GgufWriter {
    fn string(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.keys += 1;
        Self::string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    pub fn text(&mut self, key: &str, text: &str) -> &mut Self {
        self.key(key, 8);
        Self::string(&mut self.metadata, text);
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
        self
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
        self
    }

    pub fn texts(&mut self, key: &str, texts: &[&str]) -> &mut Self {
        self.key(key, 9);
        self.metadata.extend(8_u32.to_le_bytes());
        self.metadata.extend((texts.len() as u64).to_le_bytes());
        for text in texts {
            Self::string(&mut self.metadata, text);
        }
        self
    }

    /// A tensor of type `kind` (0 is F32); `shape` is row-major.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) -> &mut Self {
        self.tensors += 1;
        Self::string(&mut self.entries, name);
        self.entries.extend((shape.len() as u32).to_le_bytes());
        for &size in shape.iter().rev() {
            self.entries.extend((size as u64).to_le_bytes());
        }
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(self.keys.to_le_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(&self.entries);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

/// [`llama`] as a GGUF file: other names, and rows of queries and keys in pairs.
pub fn llama_gguf() -> Vec<u8> {
    let (config, _, tensors) = llama();
    let mut file = GgufWriter::default();
    let size = |value: usize| u32::try_from(value).unwrap();
    file.text("general.architecture", "llama")
        .u32("llama.block_count", size(config.layers))
        .u32("llama.context_length", size(config.max_seq_len))
        .u32("llama.embedding_length", size(config.dim))
        .u32("llama.feed_forward_length", size(config.ffn))
        .u32("llama.attention.head_count", size(config.heads))
        .u32("llama.attention.head_count_kv", size(config.kv_heads))
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .texts("tokenizer.ggml.tokens", &["a", "b"]);
    for tensor in &tensors {
        let name = tensor
            .name
            .replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("lm_head", "output")
            .replace("model.norm", "output_norm")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "");
        let heads = if name.ends_with("attn_q.weight") {
            config.heads
        } else if name.ends_with("attn_k.weight") {
            config.kv_heads
        } else {
            0
        };
        let paired = Tensor {
            values: pairs_of_halves(&tensor.values, heads, config.dim),
            ..tensor.clone()
        };
        file.tensor(&name, &tensor.shape, 0, &paired.bytes());
    }
    file.finish()
}

/// As the converters write it: `weight.reshape(heads, 2, hd / 2, columns).swapaxes(1, 2)`.
fn pairs_of_halves(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    if heads == 0 {
        return values.to_vec();
    }
    let hd = values.len() / columns / heads;
    let mut out = Vec::new();
    for head in 0..heads {
        for pair in 0..hd / 2 {
            for half in 0..2 {
                let row = head * hd + half * hd / 2 + pair;
                out.extend_from_slice(&values[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}
