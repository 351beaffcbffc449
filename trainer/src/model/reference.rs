//! The decoder once more, one sequence and one number at a time in double precision, from the papers: what the tensor code is held equal to.

use super::rope::frequencies;
use super::{Cache, Layout, Model, init_flat};
use crate::config::{Family, ModelConfig, RopeScaling};
use tch::{Device, Kind, Tensor};

type Rows = Vec<Vec<f64>>;

/// A model's tensors by name.
struct Weights<'a> {
    config: &'a ModelConfig,
    layout: Layout,
    flat: &'a [f32],
}

impl Weights<'_> {
    fn get(&self, name: &str) -> Option<Vec<f64>> {
        let entry = self.layout.get(name)?;
        let values = &self.flat[entry.offset..entry.offset + entry.len];
        Some(values.iter().map(|&x| f64::from(x)).collect())
    }

    fn values(&self, name: &str) -> Vec<f64> {
        self.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// `x W^T` for every row of `x`, plus the bias if there is one.
    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let weight = self.values(&format!("{name}.weight"));
        let bias = self.get(&format!("{name}.bias"));
        let dot = |row: &[f64], w: &[f64]| row.iter().zip(w).map(|(a, b)| a * b).sum::<f64>();
        let at = |i: usize| bias.as_ref().map_or(0.0, |bias| bias[i]);
        let product = |row: &Vec<f64>| {
            let columns = weight.chunks(row.len()).enumerate();
            columns.map(|(i, w)| dot(row, w) + at(i)).collect()
        };
        x.iter().map(product).collect()
    }

    /// RMSNorm, or LayerNorm where there is a bias.
    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.values(&format!("{name}.weight"));
        let bias = self.get(&format!("{name}.bias"));
        let len = x.len() as f64;
        let mean = if bias.is_some() {
            x.iter().sum::<f64>() / len
        } else {
            0.0
        };
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / len;
        let scaled = x
            .iter()
            .zip(&weight)
            .map(|(v, w)| (v - mean) / (variance + self.config.norm_eps).sqrt() * w);
        match bias {
            None => scaled.collect(),
            Some(bias) => scaled.zip(bias).map(|(v, b)| v + b).collect(),
        }
    }

    fn norms(&self, name: &str, x: &Rows) -> Rows {
        x.iter().map(|row| self.norm(name, row)).collect()
    }

    /// One head's vector at `position`: normed under `name` and turned, as far as the family does so.
    fn placed(&self, name: &str, x: &[f64], position: usize) -> Vec<f64> {
        let x = if self.config.family.has_qk_norm() {
            self.norm(name, x)
        } else {
            x.to_vec()
        };
        if self.config.family.has_rope() {
            turned(&x, position, &frequencies(self.config))
        } else {
            x
        }
    }
}

/// The pair (i, i + hd/2) turned by `position * frequencies[i]`.
fn turned(x: &[f64], position: usize, frequencies: &[f64]) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let angle = position as f64 * frequencies[i];
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

fn sum(x: &Rows, y: &Rows) -> Rows {
    let row = |(x, y): (&Vec<f64>, &Vec<f64>)| x.iter().zip(y).map(|(x, y)| x + y).collect();
    x.iter().zip(y).map(row).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// GELU's tanh form, as in GPT-2.
fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

/// Attention of one block over its normed input.
fn attention(weights: &Weights<'_>, block: &str, h: &Rows) -> Rows {
    let (config, hd) = (weights.config, weights.config.head_dim());
    let name = |part: &str| format!("{block}.self_attn.{part}");
    let projected = |part: &str| weights.linear(&name(part), h);
    let (q, k, v) = (projected("q_proj"), projected("k_proj"), projected("v_proj"));
    let mut mixed: Rows = vec![Vec::new(); h.len()];
    for head in 0..config.heads {
        let kv = head / (config.heads / config.kv_heads); // consecutive query heads share one
        let keys: Rows = (0..h.len())
            .map(|place| weights.placed(&name("k_norm"), &k[place][kv * hd..][..hd], place))
            .collect();
        let values: Rows = v.iter().map(|row| row[kv * hd..][..hd].to_vec()).collect();
        for place in 0..h.len() {
            let query = weights.placed(&name("q_norm"), &q[place][head * hd..][..hd], place);
            mixed[place].extend(attend(&query, &keys[..=place], &values[..=place]));
        }
    }
    weights.linear(&name("o_proj"), &mixed)
}

fn feed_forward(weights: &Weights<'_>, block: &str, h: &Rows) -> Rows {
    let up = weights.linear(&format!("{block}.mlp.up_proj"), h);
    let inner: Rows = if weights.config.family.has_gate() {
        let gate = weights.linear(&format!("{block}.mlp.gate_proj"), h);
        let row = |(g, u): (&Vec<f64>, &Vec<f64>)| g.iter().zip(u).map(|(&g, u)| silu(g) * u).collect();
        gate.iter().zip(&up).map(row).collect()
    } else {
        up.iter().map(|row| row.iter().map(|&u| gelu(u)).collect()).collect()
    };
    weights.linear(&format!("{block}.mlp.down_proj"), &inner)
}

fn logits(config: &ModelConfig, flat: &[f32], tokens: &[u32]) -> Rows {
    let weights = Weights {
        config,
        layout: Layout::new(config),
        flat,
    };
    let rows = |name: &str, places: &[usize]| -> Option<Rows> {
        let table = weights.get(name)?;
        Some(
            places
                .iter()
                .map(|&i| table[i * config.dim..][..config.dim].to_vec())
                .collect(),
        )
    };
    let ids: Vec<usize> = tokens.iter().map(|&token| token as usize).collect();
    let places: Vec<usize> = (0..tokens.len()).collect();
    let mut x = rows("model.embed_tokens.weight", &ids).unwrap_or_default();
    if let Some(positions) = rows("model.embed_positions.weight", &places) {
        x = sum(&x, &positions);
    }
    for layer in 0..config.layers {
        let block = format!("model.layers.{layer}");
        let h = weights.norms(&format!("{block}.input_layernorm"), &x);
        x = sum(&x, &attention(&weights, &block, &h));
        let h = weights.norms(&format!("{block}.post_attention_layernorm"), &x);
        x = sum(&x, &feed_forward(&weights, &block, &h));
    }
    let x = weights.norms("model.norm", &x);
    let head = if config.tied_embeddings {
        "model.embed_tokens"
    } else {
        "lm_head"
    };
    weights.linear(head, &x)
}

/// Every family, with and without what it may have.
fn shapes() -> Vec<ModelConfig> {
    let base = ModelConfig {
        vocab_size: 32,
        dim: 32,
        layers: 2,
        heads: 4,
        ffn: 48,
        max_seq_len: 24,
        ..ModelConfig::demo()
    };
    let with = |change: fn(&mut ModelConfig)| {
        let mut config = base.clone();
        change(&mut config);
        config
    };
    vec![
        base.clone(),
        with(|c| (c.kv_heads, c.tied_embeddings) = (2, false)),
        with(|c| c.kv_heads = 1),
        with(|c| c.rope_scaling = Some(RopeScaling::Linear { factor: 2.0 })),
        with(|c| {
            c.rope_scaling = Some(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 16,
            });
        }),
        with(|c| (c.family, c.kv_heads) = (Family::Qwen2, 2)),
        with(|c| (c.family, c.kv_heads, c.head_dim) = (Family::Qwen3, 2, Some(12))),
        with(|c| c.family = Family::Gpt2),
        with(|c| (c.family, c.tied_embeddings) = (Family::Gpt2, false)),
    ]
}

/// Parameters larger than initial ones, so that attention, the norms' weights and the biases matter.
fn lively(config: &ModelConfig) -> Vec<f32> {
    let alive = |(i, &x): (usize, &f32)| {
        if x == 1.0 || x == 0.0 {
            x + 0.05 * (i % 7) as f32
        } else {
            8.0 * x + 1e-3 * (i % 7) as f32
        }
    };
    init_flat(config, 5).iter().enumerate().map(alive).collect()
}

#[test]
fn a_token_read_behind_the_others_has_the_scores_that_reading_all_gives() {
    for config in shapes() {
        let mut model = Model::new(&config, Device::Cpu).unwrap_or_else(|error| panic!("{error}"));
        model
            .load_flat(&lively(&config))
            .unwrap_or_else(|error| panic!("{error}"));
        let tokens = Tensor::from_slice(&(0..12).map(|i| (i * i + 3) % 32).collect::<Vec<i64>>()).view([1, -1]);
        let expected = tch::no_grad(|| model.logits(&tokens)); // [1, 12, 32]
        let mut cache = Cache::default();
        let mut start = 0;
        for length in [5, 1, 1, 1, 1, 1, 1, 1] {
            let (found, _) =
                tch::no_grad(|| model.next_scores(&tokens.narrow(1, start, length), &mut cache, Kind::Float)); // [32]
            start += length;
            let difference = (found - expected.select(0, 0).select(0, start - 1))
                .abs()
                .max()
                .double_value(&[]);
            assert!(difference < 1e-4, "{config:?} at {start}: {difference}");
        }
        assert_eq!(cache.places(), 12);
    }
}

#[test]
fn the_tensor_code_equals_the_plain_decoder() {
    for config in shapes() {
        let flat = lively(&config);
        let tokens: Vec<u32> = (0..12).map(|i| (i * i + 3) % 32).collect();
        let mut model = Model::new(&config, Device::Cpu).unwrap_or_else(|error| panic!("{error}"));
        model.load_flat(&flat).unwrap_or_else(|error| panic!("{error}"));
        let input = Tensor::from_slice(&tokens.iter().map(|&t| i64::from(t)).collect::<Vec<_>>()).view([1, -1]);
        let found = tch::no_grad(|| model.logits(&input)); // [1, 12, 32]
        for (place, row) in logits(&config, &flat, &tokens).iter().enumerate() {
            for (token, expected) in row.iter().enumerate() {
                let found = found.double_value(&[0, place as i64, token as i64]);
                let near = (found - expected).abs() < 1e-4 * expected.abs().max(1.0);
                assert!(near, "{config:?}, place {place}, token {token}: {found} {expected}");
            }
        }
    }
}
