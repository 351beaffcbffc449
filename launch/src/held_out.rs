//! Loss on held-out text, also in bits per byte, which compares models of different vocabularies.

use anyhow::Result;
use datasets::{Dataset, Tokenizer, TokenizerKind};
use trainer::eval::validation_loss;
use trainer::model::Model;

/// How well a model reads a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeldOut {
    /// Nats per token.
    pub loss: f64,
    /// Bits per byte of the text.
    pub bits_per_byte: f64,
}

/// Loss on up to `count` held-out sequences, spread evenly over all of them: the same ones for everybody.
///
/// # Errors
/// Data without a held-out part, or of another tokenizer.
pub fn held_out(model: &mut Model, theta: &[f32], data: &Dataset, count: u64) -> Result<HeldOut> {
    let sequences = held_out_sequences(data, count);
    let loss = validation_loss(model, theta, &sequences)?;
    let predicted = || sequences.iter().flat_map(|sequence| sequence.iter().skip(1));
    let bytes = text_bytes(data.manifest().tokenizer, predicted().copied());
    Ok(HeldOut {
        loss,
        bits_per_byte: bits_per_byte(loss, predicted().count(), bytes),
    })
}

/// Up to `count` held-out sequences, spread evenly over all of them.
pub fn held_out_sequences(data: &Dataset, count: u64) -> Vec<Vec<u32>> {
    let all = data.held_out_sequences();
    let count = count.min(all);
    (0..count).map(|i| data.held_out(i * all / count)).collect()
}

/// Bits per byte of `tokens` predicted at `loss` nats each, which stand for `bytes` bytes.
pub fn bits_per_byte(loss: f64, tokens: usize, bytes: usize) -> f64 {
    loss * tokens as f64 / bytes.max(1) as f64 / std::f64::consts::LN_2
}

/// Bytes of the text that tokens stand for. A document's end, where it is a token of its own, is none.
fn text_bytes(kind: TokenizerKind, tokens: impl Iterator<Item = u32>) -> usize {
    let tokenizer = Tokenizer::new(kind);
    let own_end = kind != TokenizerKind::Bytes;
    tokens
        .filter(|&token| !(own_end && token == kind.end_of_document()))
        .map(|token| tokenizer.token_bytes(token).map_or(0, |bytes| bytes.len()))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_per_byte_are_those_of_the_text_not_of_the_tokens() {
        let text = "Decentralized training";
        for kind in [TokenizerKind::Bytes, TokenizerKind::Gpt2] {
            let mut tokens = Tokenizer::new(kind).encode(text);
            if kind == TokenizerKind::Gpt2 {
                tokens.push(kind.end_of_document());
            }
            assert_eq!(text_bytes(kind, tokens.into_iter()), text.len(), "{kind}");
        }
        // Guessing bytes blindly costs eight bits each.
        assert!((bits_per_byte(256_f64.ln(), 10, 10) - 8.0).abs() < 1e-12);
        // Two bytes a token halve it.
        assert!((bits_per_byte(256_f64.ln(), 10, 20) - 4.0).abs() < 1e-12);
    }
}
