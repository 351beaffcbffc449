//! A whole text in one pass: what the head reads at every place, and the scores that follow it there.
//!
//! Who checks a text reads it this way: one pass over all of it costs far less than one for each token, and gives the same numbers within rounding.

use std::ops::Range;

use tch::Tensor;

use crate::config::Precision;
use crate::eval::{EvalError, check_text};
use crate::local::token_tensor;
use crate::model::{Model, host};

/// A text, read.
pub struct Prefill {
    /// What the head reads, `[tokens, dim]`.
    hidden: Tensor,
    /// `[vocab, dim]`.
    head: Tensor,
}

/// Reads `tokens`, at most `max_seq_len`, with the parameters that the model holds. `copies` of the text are read side by side, as a machine that
/// serves several people does; the first is told.
///
/// # Errors
/// See [`EvalError`].
pub fn prefill(model: &Model, tokens: &[u32], precision: Precision, copies: usize) -> Result<Prefill, EvalError> {
    check_text(model, tokens)?;
    let batch = vec![tokens.to_vec(); copies.max(1)];
    let input = token_tensor(&batch, tokens.len(), model.device()); // [copies, tokens]
    let (hidden, head) = tch::no_grad(|| model.before_head(&input, precision.kind()));
    Ok(Prefill {
        hidden: hidden.narrow(0, 0, tokens.len() as i64),
        head,
    })
}

impl Prefill {
    /// What the head reads after the last norm, place by place, `[tokens * dim]`.
    pub fn hidden(&self) -> Vec<f32> {
        host::to_vec(&self.hidden.contiguous())
    }

    /// The scores of the token after each of `places`, which lie within the text; `vocab` floats each.
    pub fn scores(&self, places: Range<usize>) -> Vec<Vec<f32>> {
        let x = self.hidden.narrow(0, places.start as i64, places.len() as i64); // [places, dim]
        let scores = tch::no_grad(|| x.matmul(&self.head.tr())).contiguous(); // [places, vocab]
        let vocab = self.head.size()[0] as usize;
        host::to_vec(&scores).chunks(vocab).map(<[f32]>::to_vec).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::eval::read;
    use crate::generate::{GenerateOptions, generate_watched};
    use crate::model::init_flat;
    use tch::Device;

    #[test]
    fn one_pass_gives_what_token_by_token_gives() {
        let config = ModelConfig {
            dim: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            ffn: 24,
            ..ModelConfig::demo()
        };
        let theta: Vec<f32> = init_flat(&config, 3).iter().map(|value| value * 5.0).collect();
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        let options = GenerateOptions {
            max_tokens: 20,
            ..GenerateOptions::default()
        };
        let mut shown = Vec::new();
        let added = generate_watched(
            &mut model,
            &theta,
            &[1, 2, 3],
            &options,
            Precision::Fp32,
            &mut |_| (),
            &mut |hidden| shown.extend_from_slice(hidden),
        );
        let tokens = [vec![1, 2, 3], added.unwrap()].concat();
        let tokens = &tokens[..tokens.len() - 1];
        let near = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        for copies in [1, 3] {
            let read_at_once = prefill(&model, tokens, Precision::Fp32, copies).unwrap();
            assert!(near(&read_at_once.hidden(), &shown));
            assert_eq!(shown.len(), tokens.len() * 16);
            let scores = read_at_once.scores(4..7);
            let expected = read(&mut model, &theta, tokens).unwrap().logits;
            assert!(scores.iter().zip(&expected[4..7]).all(|(a, b)| near(a, b)));
        }
        assert!(prefill(&model, &[], Precision::Fp32, 1).is_err());
        assert!(prefill(&model, &[256], Precision::Fp32, 1).is_err());
        assert!(prefill(&model, &[0; 257], Precision::Fp32, 1).is_err());
    }
}
