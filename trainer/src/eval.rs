//! Held-out loss of the agreed model.

use tch::{Kind, Tensor};

use crate::config::Precision;
use crate::local::token_tensor;
use crate::model::{Model, ModelError, host};

/// Tokens per forward pass; bounds the memory of the logits.
const BATCH_TOKENS: usize = 4096;

/// Why an evaluation gave no number.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The parameters do not fit the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Nothing to read.
    #[error("no sequence to evaluate on")]
    Empty,
    /// A sequence whose length differs from the first's, or is out of range.
    #[error("sequence {index} has {found} tokens, expected {expected}")]
    Length {
        /// Which sequence.
        index: usize,
        /// What its length may be.
        expected: String,
        /// Its length.
        found: usize,
    },
    /// A token that the vocabulary lacks.
    #[error("sequence {index} has token {found} in a vocabulary of {vocab_size}")]
    Token {
        /// Which sequence.
        index: usize,
        /// The token found.
        found: u32,
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
}

/// Mean cross-entropy, nats per predicted token, of the parameters `theta` on `sequences`, all of one length: the first token of each is
/// given, the others are predicted.
///
/// # Errors
/// See [`EvalError`]. The loss itself may be infinite or not a number when the parameters are.
pub fn validation_loss(model: &mut Model, theta: &[f32], sequences: &[Vec<u32>]) -> Result<f64, EvalError> {
    check(model, sequences)?;
    model.load_flat(theta)?;
    let columns = sequences[0].len();
    let per_pass = (BATCH_TOKENS / columns).max(1);
    let sum: f64 = sequences
        .chunks(per_pass)
        .map(|batch| {
            let tokens: Tensor = token_tensor(batch, columns, model.device());
            tch::no_grad(|| model.loss(&tokens)).double_value(&[]) * batch.len() as f64
        })
        .sum();
    Ok(sum / sequences.len() as f64)
}

/// The log probability, in nats, that the parameters held by `model` give to all tokens but the first of each of `sequences`, which are of one
/// length.
///
/// # Errors
/// See [`EvalError`]. What comes out may be no number when the parameters are none.
pub fn log_likelihoods(model: &Model, sequences: &[Vec<u32>], precision: Precision) -> Result<Vec<f64>, EvalError> {
    check(model, sequences)?;
    let columns = sequences[0].len();
    let of_batch = |batch: &[Vec<u32>]| {
        let tokens = token_tensor(batch, columns, model.device()); // [batch, columns]
        let (rows, seq) = (batch.len() as i64, columns as i64 - 1);
        let (x, head) = model.before_head(&tokens.narrow(1, 0, seq), precision.kind());
        let logits = x.matmul(&head.tr()).view([rows, seq, -1]); // [batch, seq, vocab]
        let targets = tokens.narrow(1, 1, seq).unsqueeze(2); // [batch, seq, 1]
        let chosen = logits.log_softmax(-1, Kind::Float).gather(2, &targets, false);
        let sums = chosen.sum_dim_intlist([1_i64, 2].as_slice(), false, Kind::Double);
        let each = |row| sums.double_value(&[row]);
        (0..rows).map(each).collect::<Vec<f64>>()
    };
    let batches = sequences.chunks((BATCH_TOKENS / columns).max(1));
    Ok(tch::no_grad(|| batches.flat_map(of_batch).collect()))
}

/// What a model makes of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Scores of the next token at every place, `[tokens][vocab_size]`.
    pub logits: Vec<Vec<f32>>,
    /// The last of them: what may come next.
    pub next: Vec<f32>,
    /// Mean cross-entropy, nats, of every token but the first; `None` for a single one.
    pub loss: Option<f64>,
}

/// Reads `tokens`, at most `max_seq_len`, under the parameters `theta`.
///
/// # Errors
/// See [`EvalError`].
pub fn read(model: &mut Model, theta: &[f32], tokens: &[u32]) -> Result<Reading, EvalError> {
    check_text(model, tokens)?;
    model.load_flat(theta)?;
    let input = token_tensor(&[tokens.to_vec()], tokens.len(), model.device());
    let scores = tch::no_grad(|| model.logits(&input)).contiguous(); // [1, tokens, vocab]
    let scores = host::to_vec(&scores);
    let logits: Vec<Vec<f32>> = scores.chunks(model.config().vocab_size).map(<[f32]>::to_vec).collect();
    let losses = logits.iter().zip(&tokens[1..]).map(|(row, &next)| surprise(row, next));
    Ok(Reading {
        loss: (tokens.len() > 1).then(|| losses.sum::<f64>() / (tokens.len() - 1) as f64),
        next: logits.last().cloned().unwrap_or_default(),
        logits,
    })
}

/// Refuses a text that the model cannot read at once.
pub(crate) fn check_text(model: &Model, tokens: &[u32]) -> Result<(), EvalError> {
    let most = model.config().max_seq_len;
    if !(1..=most).contains(&tokens.len()) {
        return Err(EvalError::Length {
            index: 0,
            expected: format!("1 to {most}"),
            found: tokens.len(),
        });
    }
    check_tokens(model, 0, tokens)
}

/// `-ln` of the probability that `scores` give to `token`.
fn surprise(scores: &[f32], token: u32) -> f64 {
    let best = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = scores.iter().map(|&score| (f64::from(score) - best).exp()).sum();
    total.ln() + best - f64::from(scores[token as usize])
}

fn check(model: &Model, sequences: &[Vec<u32>]) -> Result<(), EvalError> {
    let length = sequences.first().ok_or(EvalError::Empty)?.len();
    let most = model.config().max_seq_len + 1;
    if !(2..=most).contains(&length) {
        return Err(EvalError::Length {
            index: 0,
            expected: format!("2 to {most}"),
            found: length,
        });
    }
    for (index, sequence) in sequences.iter().enumerate() {
        if sequence.len() != length {
            return Err(EvalError::Length {
                index,
                expected: length.to_string(),
                found: sequence.len(),
            });
        }
        check_tokens(model, index, sequence)?;
    }
    Ok(())
}

pub(crate) fn check_tokens(model: &Model, index: usize, sequence: &[u32]) -> Result<(), EvalError> {
    let vocab_size = model.config().vocab_size;
    match sequence.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(&found) => Err(EvalError::Token {
            index,
            found,
            vocab_size,
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::init_flat;
    use tch::Device;

    fn model() -> (Model, Vec<f32>) {
        let config = ModelConfig {
            dim: 16,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            ffn: 24,
            ..ModelConfig::demo()
        };
        (Model::new(&config, Device::Cpu).unwrap(), init_flat(&config, 3))
    }

    #[test]
    fn an_untrained_model_is_as_good_as_a_guess() {
        let (mut model, theta) = model();
        let sequences: Vec<Vec<u32>> = (0..40)
            .map(|i| (0..129).map(|j| (i * 7 + j * 13) % 256).collect())
            .collect();
        let loss = validation_loss(&mut model, &theta, &sequences).unwrap();
        assert!((loss - 256.0_f64.ln()).abs() < 0.05, "{loss}");
        // One pass or many: the same mean.
        let single: f64 = sequences
            .iter()
            .map(|sequence| validation_loss(&mut model, &theta, std::slice::from_ref(sequence)).unwrap())
            .sum();
        assert!((single / 40.0 - loss).abs() < 1e-5);
    }

    #[test]
    fn a_reading_has_the_loss_that_validation_has() {
        let (mut model, theta) = model();
        let tokens: Vec<u32> = (0..60).map(|i| i * i % 256).collect();
        let reading = read(&mut model, &theta, &tokens).unwrap();
        let expected = validation_loss(&mut model, &theta, std::slice::from_ref(&tokens)).unwrap();
        assert!((reading.loss.unwrap() - expected).abs() < 1e-5);
        assert_eq!((reading.logits.len(), reading.next.len()), (60, 256));
        assert_eq!(read(&mut model, &theta, &tokens[..1]).unwrap().loss, None);
        let told = read(&mut model, &theta, &[]).unwrap_err().to_string();
        assert_eq!(told, "sequence 0 has 0 tokens, expected 1 to 256");
    }

    #[test]
    fn log_likelihoods_add_up_to_the_loss() {
        let (model, theta) = {
            let (mut model, theta) = model();
            model.load_flat(&theta).unwrap();
            (model, theta)
        };
        let sequences: Vec<Vec<u32>> = (0..40).map(|i| (0..129).map(|j| (i * j) % 256).collect()).collect();
        let found = log_likelihoods(&model, &sequences, Precision::Fp32).unwrap();
        let mut again = self::model().0;
        let loss = validation_loss(&mut again, &theta, &sequences).unwrap();
        assert!((found.iter().sum::<f64>() / (40.0 * 128.0) + loss).abs() < 1e-5);
        let one = log_likelihoods(&model, &sequences[7..8], Precision::Fp32).unwrap();
        assert!((one[0] - found[7]).abs() < 1e-3);
        assert!(log_likelihoods(&model, &[vec![1, 256]], Precision::Fp32).is_err());
    }

    #[test]
    fn bad_sequences_are_named() {
        let (mut model, theta) = model();
        let mut told = |sequences: &[Vec<u32>]| validation_loss(&mut model, &theta, sequences).unwrap_err().to_string();
        assert_eq!(told(&[]), "no sequence to evaluate on");
        assert_eq!(
            told(&[vec![1, 2, 3], vec![1, 2]]),
            "sequence 1 has 2 tokens, expected 3"
        );
        assert_eq!(told(&[vec![1; 258]]), "sequence 0 has 258 tokens, expected 2 to 257");
        assert_eq!(told(&[vec![1, 256]]), "sequence 0 has token 256 in a vocabulary of 256");
    }
}
