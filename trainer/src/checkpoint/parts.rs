//! Which tensor of a file fills which part of the flat vector, and how it has to be turned for that.
//!
//! Our own names are Hugging Face's for the Llama family, so there the file is the layout. GPT-2 has other names, keeps q, k, v in one
//! tensor, and stores its matrices transposed (`Conv1D`: inputs by outputs). GGUF has names of its own; its Llama files have the rows of every query
//! and key head in the order of interleaved rotation (pairs 2i, 2i+1), ours is that of halves (pairs i, i + hd/2).

use std::ops::Range;

use crate::config::{Family, ModelConfig};
use crate::model::Layout;

/// What lies between a file's tensor and ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing.
    AsIs,
    /// The file has inputs by outputs.
    Transposed,
    /// The file has each head's rows as pairs: its row `2 j + s` of a head is our row `s hd/2 + j`.
    Paired {
        /// Heads in the matrix.
        heads: usize,
    },
}

/// One tensor of a file and its place; a place may hold several of the layout's tensors, side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its name in the file.
    pub(crate) name: String,
    /// Its shape in the file, row-major.
    pub(crate) shape: Vec<usize>,
    /// Its elements in the flat vector.
    pub(crate) range: Range<usize>,
    /// How it is turned.
    pub(crate) change: Change,
}

/// The parts of a Hugging Face folder.
pub(crate) fn hf_parts(config: &ModelConfig, layout: &Layout) -> Vec<Part> {
    if config.family != Family::Gpt2 {
        return parts(layout, str::to_owned);
    }
    let mut parts = parts(layout, gpt2_name);
    for part in parts
        .iter_mut()
        .filter(|part| part.shape.len() == 2 && part.name.contains(".h."))
    {
        part.shape.reverse();
        part.change = Change::Transposed;
    }
    parts
}

/// The parts of a GGUF file.
pub(crate) fn gguf_parts(config: &ModelConfig, layout: &Layout) -> Vec<Part> {
    let joined = config.family == Family::Gpt2;
    let mut parts = parts(layout, |name| gguf_name(name, joined));
    if config.family == Family::Llama {
        for part in &mut parts {
            let heads = match part.name.as_str() {
                name if name.ends_with(".attn_q.weight") => config.heads,
                name if name.ends_with(".attn_k.weight") => config.kv_heads,
                _ => continue,
            };
            part.change = Change::Paired { heads };
        }
    }
    parts
}

/// The layout's tensors under other names; neighbours that get one name become one.
fn parts(layout: &Layout, rename: impl Fn(&str) -> String) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::with_capacity(layout.entries.len());
    for entry in &layout.entries {
        let name = rename(&entry.name);
        let end = entry.offset + entry.len;
        match parts.last_mut().filter(|last| last.name == name) {
            Some(last) => {
                last.shape[0] += entry.shape[0];
                last.range.end = end;
            }
            None => parts.push(Part {
                name,
                shape: entry.shape.clone(),
                range: entry.offset..end,
                change: Change::AsIs,
            }),
        }
    }
    parts
}

/// `model.layers.7.self_attn.q_proj.weight` as its layer, the name within, and `weight` or `bias`.
fn within_block(name: &str) -> Option<(&str, &str, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (within, kind) = rest.rsplit_once('.')?;
    Some((layer, within, kind))
}

fn gpt2_name(name: &str) -> String {
    let Some((layer, within, kind)) = within_block(name) else {
        let name = name.replace("model.embed_tokens", "transformer.wte");
        let name = name.replace("model.embed_positions", "transformer.wpe");
        return name.replace("model.norm", "transformer.ln_f");
    };
    let within = match within {
        "input_layernorm" => "ln_1",
        "post_attention_layernorm" => "ln_2",
        "self_attn.o_proj" => "attn.c_proj",
        "mlp.up_proj" => "mlp.c_fc",
        "mlp.down_proj" => "mlp.c_proj",
        _ => "attn.c_attn",
    };
    format!("transformer.h.{layer}.{within}.{kind}")
}

fn gguf_name(name: &str, joined: bool) -> String {
    let Some((layer, within, kind)) = within_block(name) else {
        let name = name.replace("model.embed_tokens", "token_embd");
        let name = name.replace("model.embed_positions", "position_embd");
        return name.replace("lm_head", "output").replace("model.norm", "output_norm");
    };
    let within = match within {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ if joined => "attn_qkv",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        _ => "attn_v",
    };
    format!("blk.{layer}.{within}.{kind}")
}

/// Turns `values`, a file's tensor in the file's order, to ours.
pub(crate) fn turned(part: &Part, values: Vec<f32>) -> Vec<f32> {
    match (part.change, part.shape.as_slice()) {
        (Change::Transposed, &[rows, columns]) => transposed(&values, rows, columns),
        (Change::Paired { heads }, &[rows, columns]) => halves_of_pairs(&values, rows / heads, columns),
        _ => values,
    }
}

/// Our part of the flat vector in the file's order: the way back of [`turned`], for what is written.
pub(crate) fn turned_back(part: &Part, values: &[f32]) -> Vec<f32> {
    match (part.change, part.shape.as_slice()) {
        (Change::Transposed, &[rows, columns]) => transposed(values, columns, rows),
        _ => values.to_vec(),
    }
}

/// A matrix of `rows` by `columns`, transposed.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

/// Each head's `hd` rows of `columns`, from the order of pairs to that of halves.
fn halves_of_pairs(values: &[f32], hd: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks(hd * columns) {
        let row = |i: usize| &head[i * columns..(i + 1) * columns];
        for half in 0..2 {
            for pair in 0..hd / 2 {
                out.extend_from_slice(row(2 * pair + half));
            }
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn gpt2() -> ModelConfig {
        ModelConfig {
            family: Family::Gpt2,
            ..ModelConfig::demo()
        }
    }

    #[test]
    fn gpt2s_file_joins_query_key_and_value_and_is_transposed() {
        let layout = Layout::new(&gpt2());
        let parts = hf_parts(&gpt2(), &layout);
        let part = |name: &str| parts.iter().find(|part| part.name == name).unwrap();
        let joined = part("transformer.h.1.attn.c_attn.weight");
        assert_eq!(
            (joined.shape.as_slice(), joined.change),
            (&[128, 384][..], Change::Transposed)
        );
        let q = layout.get("model.layers.1.self_attn.q_proj.weight").unwrap();
        assert_eq!(joined.range, q.offset..q.offset + 3 * q.len);
        assert_eq!(part("transformer.h.0.attn.c_attn.bias").shape, [384]);
        assert_eq!(part("transformer.wte.weight").change, Change::AsIs);
        assert_eq!(part("transformer.wpe.weight").shape, [256, 128]);
    }

    #[test]
    fn all_parts_together_are_the_flat_vector() {
        for family in [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gpt2] {
            let config = ModelConfig { family, ..gpt2() };
            let layout = Layout::new(&config);
            for parts in [hf_parts(&config, &layout), gguf_parts(&config, &layout)] {
                let mut next = 0;
                for part in &parts {
                    assert_eq!(part.range.start, next, "{}", part.name);
                    assert_eq!(part.range.len(), part.shape.iter().product::<usize>());
                    next = part.range.end;
                }
                assert_eq!(next, layout.total);
                let names: std::collections::BTreeSet<&str> = parts.iter().map(|part| part.name.as_str()).collect();
                assert_eq!(names.len(), parts.len(), "every name once");
            }
        }
    }

    #[test]
    fn pairs_become_halves() {
        // Two heads of four rows of one column: rows 0 1 2 3 of a head are pairs (0 1), (2 3).
        let found = halves_of_pairs(&[0., 1., 2., 3., 10., 11., 12., 13.], 4, 1);
        assert_eq!(found, [0., 2., 1., 3., 10., 12., 11., 13.]);
    }

    #[test]
    fn turning_back_undoes_turning() {
        let part = Part {
            name: String::new(),
            shape: vec![2, 3],
            range: 0..6,
            change: Change::Transposed,
        };
        let file = vec![1., 2., 3., 4., 5., 6.];
        let ours = turned(&part, file.clone());
        assert_eq!(ours, [1., 4., 2., 5., 3., 6.]);
        assert_eq!(turned_back(&part, &ours), file);
    }
}
