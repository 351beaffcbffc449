//! Multiple choice by likelihood: which of several continuations of a question does the model find likeliest?
//!
//! As the usual harness does it (EleutherAI's lm-evaluation-harness, "A framework for few-shot language model evaluation", 2021): a
//! choice's score is the sum of its tokens' log probabilities after the question. *Accuracy* takes the highest sum; *normalised accuracy* the highest
//! sum a byte of the choice's text, which does not favour short choices.

use tch::{Kind, Tensor};

use crate::config::Precision;
use crate::eval::EvalError;
use crate::local::token_tensor;
use crate::model::Model;

/// One question with its choices, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The question; at least one token.
    pub question: Vec<u32>,
    /// The choices as they follow it: at least two, each at least one token, with the bytes of its text.
    pub choices: Vec<(Vec<u32>, usize)>,
    /// Which is right, from 0.
    pub answer: usize,
}

/// What the model made of one item.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The log probability of each choice, in nats.
    pub log_likelihoods: Vec<f64>,
    /// The likeliest choice.
    pub chosen: usize,
    /// The likeliest choice a byte.
    pub chosen_a_byte: usize,
}

impl Scored {
    /// What follows from the log probability of each choice of `item`.
    pub fn new(log_likelihoods: Vec<f64>, item: &Item) -> Self {
        let a_byte: Vec<f64> = log_likelihoods
            .iter()
            .zip(&item.choices)
            .map(|(score, (_, bytes))| score / (*bytes).max(1) as f64)
            .collect();
        Self {
            chosen: highest(&log_likelihoods),
            chosen_a_byte: highest(&a_byte),
            log_likelihoods,
        }
    }
}

/// Scores every choice of an item with the parameters that the model holds. A question that is too long for the model loses its beginning, as
/// in the harness.
///
/// # Errors
/// Tokens out of the vocabulary, or a choice that does not fit the model by itself.
pub fn score(model: &Model, item: &Item) -> Result<Scored, EvalError> {
    score_in(model, item, Precision::Fp32)
}

/// The same in any precision.
///
/// # Errors
/// As there.
pub fn score_in(model: &Model, item: &Item, precision: Precision) -> Result<Scored, EvalError> {
    let log_likelihoods = item
        .choices
        .iter()
        .enumerate()
        .map(|(index, (choice, _))| log_likelihood(model, (&item.question, choice), index, precision))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Scored::new(log_likelihoods, item))
}

/// The first of the highest; what is not a number is never it, unless all are.
fn highest(scores: &[f64]) -> usize {
    let better = |best: usize, at: usize| {
        if scores[at] > scores[best] || scores[best].is_nan() {
            at
        } else {
            best
        }
    };
    (0..scores.len()).reduce(better).unwrap_or(0)
}

/// `log p(choice | question)`, in nats.
fn log_likelihood(
    model: &Model,
    (question, choice): (&[u32], &[u32]),
    index: usize,
    precision: Precision,
) -> Result<f64, EvalError> {
    let (context, vocab_size) = (model.config().max_seq_len, model.config().vocab_size);
    if question.is_empty() || choice.is_empty() || choice.len() > context {
        return Err(EvalError::Length {
            index,
            expected: format!("a question of at least 1 token, and a choice of 1 to {context}"),
            found: choice.len(),
        });
    }
    if let Some(&found) = question
        .iter()
        .chain(choice)
        .find(|&&token| token as usize >= vocab_size)
    {
        return Err(EvalError::Token {
            index,
            found,
            vocab_size,
        });
    }
    // The last token predicts nothing, so one more than the model reads may take part.
    let kept = question.len().min(context + 1 - choice.len());
    let mut tokens = question[question.len() - kept..].to_vec();
    tokens.extend_from_slice(choice);
    let read = tokens.len() - 1;
    let input = token_tensor(std::slice::from_ref(&tokens[..read].to_vec()), read, model.device()); // [1, read]
    let targets: Vec<i64> = choice.iter().map(|&token| i64::from(token)).collect();
    let targets = Tensor::from_slice(&targets).to_device(model.device()).unsqueeze(1); // [choice, 1]
    let sum = tch::no_grad(|| {
        let (x, head) = model.before_head(&input, precision.kind()); // [read, dim], [vocab, dim]
        let places = x.narrow(0, (read - choice.len()) as i64, choice.len() as i64);
        places
            .matmul(&head.tr())
            .log_softmax(-1, Kind::Float)
            .gather(1, &targets, false)
            .sum(Kind::Double)
    });
    Ok(sum.double_value(&[]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::init_flat;
    use tch::Device;

    fn model() -> Model {
        let config = ModelConfig {
            dim: 16,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            ffn: 24,
            max_seq_len: 12,
            ..ModelConfig::demo()
        };
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        // Far from its start, so that the scores differ.
        let theta: Vec<f32> = init_flat(&config, 3).iter().map(|value| value * 20.0).collect();
        model.load_flat(&theta).unwrap();
        model
    }

    /// By the chain rule, one token at a time.
    fn plainly(model: &Model, question: &[u32], choice: &[u32]) -> f64 {
        let mut so_far = question.to_vec();
        let mut sum = 0.0;
        for &token in choice {
            let window = so_far.clone();
            let columns = window.len();
            let logits = model
                .logits(&token_tensor(&[window], columns, Device::Cpu))
                .select(1, -1)
                .view([-1]);
            sum += logits.log_softmax(-1, Kind::Double).double_value(&[i64::from(token)]);
            so_far.push(token);
        }
        sum
    }

    #[test]
    fn a_choice_is_as_likely_as_its_tokens_one_by_one() {
        let model = model();
        let item = Item {
            question: vec![1, 2, 3, 4],
            choices: vec![(vec![9], 1), (vec![5, 6, 7], 3), (vec![200, 100], 2)],
            answer: 0,
        };
        let scored = score(&model, &item).unwrap();
        for ((choice, _), found) in item.choices.iter().zip(&scored.log_likelihoods) {
            let expected = plainly(&model, &item.question, choice);
            assert!((found - expected).abs() < 1e-3, "expected {expected}, found {found}");
        }
        assert_eq!(scored.chosen, highest(&scored.log_likelihoods));
    }

    #[test]
    fn long_choices_are_not_punished_when_counted_by_the_byte() {
        let model = model();
        let two = |first: usize, second: usize| Item {
            question: vec![1, 2],
            choices: vec![(vec![9], first), (vec![9, 8, 7], second)],
            answer: 0,
        };
        let scored = score(&model, &two(1, 1000)).unwrap();
        assert_eq!((scored.chosen, scored.chosen_a_byte), (0, 1));
    }

    #[test]
    fn a_question_that_is_too_long_loses_its_beginning() {
        let model = model();
        let long: Vec<u32> = (0..40).collect();
        let item = |question: &[u32]| Item {
            question: question.to_vec(),
            choices: vec![(vec![9, 8], 2), (vec![7], 1)],
            answer: 0,
        };
        let (whole, end) = (
            score(&model, &item(&long)).unwrap(),
            score(&model, &item(&long[29..])).unwrap(),
        );
        assert_eq!(whole.log_likelihoods[0], end.log_likelihoods[0]);
        assert!(score(&model, &item(&[])).is_err());
        assert!(score(&model, &item(&[999])).is_err());
    }

    #[test]
    fn what_is_not_a_number_is_not_the_highest() {
        assert_eq!(highest(&[f64::NAN, -3.0, -2.0, f64::NAN]), 2);
        assert_eq!(highest(&[-1.0, -1.0]), 0);
        assert_eq!(highest(&[f64::NAN]), 0);
    }
}
