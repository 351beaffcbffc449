//! The decoder once more, one sequence and one number at a time in double precision, from the papers: what the tensor code is held equal to.

use super::{Layout, Model, init_flat};
use crate::config::ModelConfig;
use tch::{Device, Tensor};

type Rows = Vec<Vec<f64>>;

/// A model's tensors by name.
struct Weights<'a> {
    layout: Layout,
    flat: &'a [f32],
}

impl Weights<'_> {
    fn values(&self, name: &str) -> Vec<f64> {
        let entry = self.layout.get(name).unwrap_or_else(|| panic!("no tensor {name}"));
        self.flat[entry.offset..entry.offset + entry.len]
            .iter()
            .map(|&x| f64::from(x))
            .collect()
    }

    /// `x W^T` for every row of `x`.
    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let weight = self.values(name);
        let dot = |row: &[f64], w: &[f64]| row.iter().zip(w).map(|(a, b)| a * b).sum();
        x.iter()
            .map(|row| weight.chunks(row.len()).map(|w| dot(row, w)).collect())
            .collect()
    }

    fn norm(&self, name: &str, x: &Rows, eps: f64) -> Rows {
        let weight = self.values(name);
        let normed = |row: &Vec<f64>| {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            row.iter()
                .zip(&weight)
                .map(|(v, w)| v / (mean + eps).sqrt() * w)
                .collect()
        };
        x.iter().map(normed).collect()
    }
}

/// One head's vector at `position`, turned: the pair (i, i + hd/2) by `position * theta^(-2i/hd)`.
fn rotated(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let angle = position as f64 * theta.powf(-2.0 * i as f64 / x.len() as f64);
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin();
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin();
    }
    out
}

/// Softmax-weighted values of one query over all places up to its own.
fn attend(query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let weights: Vec<f64> = keys
        .iter()
        .map(|key| (key.iter().zip(query).map(|(a, b)| a * b).sum::<f64>() * scale).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mixed = |i: usize| weights.iter().zip(values).map(|(w, v)| w * v[i]).sum::<f64>() / total;
    (0..query.len()).map(mixed).collect()
}

fn logits(config: &ModelConfig, flat: &[f32], tokens: &[u32]) -> Rows {
    let weights = Weights {
        layout: Layout::new(config),
        flat,
    };
    let (dim, hd, shared) = (config.dim, config.head_dim(), config.heads / config.kv_heads);
    let embedding = weights.values("model.embed_tokens.weight");
    let mut x: Rows = tokens
        .iter()
        .map(|&t| embedding[t as usize * dim..][..dim].to_vec())
        .collect();
    let added = |x: &Rows, y: &Rows| -> Rows {
        x.iter()
            .zip(y)
            .map(|(x, y)| x.iter().zip(y).map(|(x, y)| x + y).collect())
            .collect()
    };
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let h = weights.norm(&name("input_layernorm"), &x, config.norm_eps);
        let heads = |part: &str, h: &Rows| weights.linear(&name(part), h);
        let (q, k, v) = (
            heads("self_attn.q_proj", &h),
            heads("self_attn.k_proj", &h),
            heads("self_attn.v_proj", &h),
        );
        let mut mixed: Rows = vec![Vec::new(); tokens.len()];
        for head in 0..config.heads {
            let kv = head / shared; // consecutive query heads share one
            let keys: Rows = (0..k.len())
                .map(|p| rotated(&k[p][kv * hd..][..hd], p, config.rope_theta))
                .collect();
            let values: Rows = v.iter().map(|row| row[kv * hd..][..hd].to_vec()).collect();
            for place in 0..tokens.len() {
                let query = rotated(&q[place][head * hd..][..hd], place, config.rope_theta);
                mixed[place].extend(attend(&query, &keys[..=place], &values[..=place]));
            }
        }
        x = added(&x, &weights.linear(&name("self_attn.o_proj"), &mixed));
        let h = weights.norm(&name("post_attention_layernorm"), &x, config.norm_eps);
        let (gate, up) = (
            weights.linear(&name("mlp.gate_proj"), &h),
            weights.linear(&name("mlp.up_proj"), &h),
        );
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let inner: Rows = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| g.iter().zip(u).map(|(&g, u)| silu(g) * u).collect())
            .collect();
        x = added(&x, &weights.linear(&name("mlp.down_proj"), &inner));
    }
    let x = weights.norm("model.norm.weight", &x, config.norm_eps);
    weights.linear(
        if config.tied_embeddings {
            "model.embed_tokens.weight"
        } else {
            "lm_head.weight"
        },
        &x,
    )
}

#[test]
fn the_tensor_code_equals_the_plain_decoder() {
    for (kv_heads, tied_embeddings) in [(4, true), (2, false), (1, true)] {
        let config = ModelConfig {
            vocab_size: 32,
            dim: 32,
            layers: 2,
            heads: 4,
            kv_heads,
            ffn: 48,
            tied_embeddings,
            ..ModelConfig::demo()
        };
        // Larger than initial weights, so that attention and the norms' weights matter.
        let flat: Vec<f32> = init_flat(&config, 5)
            .iter()
            .enumerate()
            .map(|(i, x)| 8.0 * x + 1e-3 * (i % 7) as f32)
            .collect();
        let tokens: Vec<u32> = (0..12).map(|i| (i * i + 3) % 32).collect();
        let mut model = Model::new(&config, Device::Cpu).unwrap_or_else(|error| panic!("{error}"));
        model.load_flat(&flat).unwrap_or_else(|error| panic!("{error}"));
        let input = Tensor::from_slice(&tokens.iter().map(|&t| i64::from(t)).collect::<Vec<_>>()).view([1, -1]);
        let found = tch::no_grad(|| model.logits(&input)); // [1, 12, 32]
        for (place, row) in logits(&config, &flat, &tokens).iter().enumerate() {
            for (token, expected) in row.iter().enumerate() {
                let found = found.double_value(&[0, place as i64, token as i64]);
                let near = (found - expected).abs() < 1e-3 * expected.abs().max(1.0);
                assert!(
                    near,
                    "kv_heads {kv_heads}, place {place}, token {token}: {found} {expected}"
                );
            }
        }
    }
}
