//! Text from the model: one token at a time, each drawn from the scores of the last place.
//!
//! Keys and values of what was read are kept, so a further token costs one token. Past `max_seq_len` the window slides, every place moves,
//! and it is read again for each token. The draws come from BLAKE3 over the seed, so a seed gives the same text on one machine at fixed threads,
//! and anyone can draw again: [`Choices`] says whether a given text is what these scores and draws lead to.

use tch::Tensor;

use crate::config::Precision;
use crate::local::token_tensor;
use crate::model::{Cache, Model, ModelError, host};

mod choices;

pub use choices::Choices;

/// How to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to add.
    pub max_tokens: usize,
    /// Divides the scores; 0 always takes the likeliest.
    pub temperature: f64,
    /// Only the likeliest so many tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability (nucleus sampling, arXiv 1904.09751); 1 for all.
    pub top_p: f64,
    /// Divides the scores above zero of tokens that are there already, and multiplies those below (CTRL, arXiv 1909.05858, section 4.1); 1 for none.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 200,
            temperature: 0.8,
            top_k: 50,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// Why nothing was generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The parameters do not fit the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// A token that the vocabulary lacks.
    #[error("the prompt has token {found} in a vocabulary of {vocab_size}")]
    Token {
        /// The token found.
        found: u32,
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
    /// An option out of range.
    #[error("{option} is {found}, but must be {bound}")]
    Option {
        /// Which.
        option: &'static str,
        /// Its value.
        found: f64,
        /// What is allowed.
        bound: &'static str,
    },
    /// The model's scores are not numbers.
    #[error("the model's scores are not finite; its parameters are broken")]
    NonFinite,
}

/// Continues `prompt` under the parameters `theta`; calls `on_token` with each new token and returns the new ones.
///
/// # Errors
/// See [`GenerateError`].
pub fn generate(
    model: &mut Model,
    theta: &[f32],
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32),
) -> Result<Vec<u32>, GenerateError> {
    generate_watched(model, theta, prompt, options, Precision::Fp32, on_token, &mut |_| ())
}

/// The same in any precision, and shows what the head reads: `on_hidden` gets `[places, dim]` after the last norm, first of all places of the
/// prompt, then of each new token but the last, which is never read. Once the window slides, it gets the whole window each time.
///
/// # Errors
/// See [`GenerateError`].
pub fn generate_watched(
    model: &mut Model,
    theta: &[f32],
    prompt: &[u32],
    options: &GenerateOptions,
    precision: Precision,
    on_token: &mut dyn FnMut(u32),
    on_hidden: &mut dyn FnMut(&[f32]),
) -> Result<Vec<u32>, GenerateError> {
    check(model, prompt, options)?;
    model.load_flat(theta)?;
    let mut draws = Draws::new(options.seed);
    let (mut tokens, mut cache) = (prompt.to_vec(), Cache::default());
    for _ in 0..options.max_tokens {
        let uniform = draws.next_uniform();
        let mut scores = next_scores(model, &tokens, &mut cache, precision, on_hidden);
        penalise(&mut scores, &tokens, options.repetition_penalty);
        let token = draw(&scores, options, uniform)?;
        tokens.push(token);
        on_token(token);
    }
    Ok(tokens.split_off(prompt.len()))
}

/// The numbers that tokens are drawn by, one a token, from the seed alone.
struct Draws(blake3::OutputReader);

impl Draws {
    fn new(seed: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"murmur/generate/1\0").update(&seed.to_le_bytes());
        Self(hasher.finalize_xof())
    }

    /// The next, in `[0, 1)`.
    fn next_uniform(&mut self) -> f64 {
        let mut eight = [0; 8];
        self.0.fill(&mut eight);
        (u64::from_le_bytes(eight) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn check(model: &Model, prompt: &[u32], options: &GenerateOptions) -> Result<(), GenerateError> {
    let vocab_size = model.config().vocab_size;
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    if let Some(&found) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(GenerateError::Token { found, vocab_size });
    }
    check_options(options)
}

/// Refuses settings that no text is drawn by.
///
/// # Errors
/// The first that is out of range.
pub fn check_options(options: &GenerateOptions) -> Result<(), GenerateError> {
    if !(0.0..=100.0).contains(&options.temperature) {
        return Err(GenerateError::Option {
            option: "temperature",
            found: options.temperature,
            bound: "0 to 100",
        });
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        return Err(GenerateError::Option {
            option: "top_p",
            found: options.top_p,
            bound: "above 0, at most 1",
        });
    }
    if !(1.0..=100.0).contains(&options.repetition_penalty) {
        return Err(GenerateError::Option {
            option: "repetition_penalty",
            found: options.repetition_penalty,
            bound: "1 to 100",
        });
    }
    Ok(())
}

/// Makes every token of `tokens` less likely, once each however often it is there.
fn penalise(scores: &mut [f32], tokens: &[u32], penalty: f64) {
    if penalty == 1.0 {
        return;
    }
    let penalty = penalty as f32;
    let mut seen = vec![false; scores.len()];
    for &token in tokens {
        let place = token as usize;
        if let Some(score) = scores
            .get_mut(place)
            .filter(|_| !std::mem::replace(&mut seen[place], true))
        {
            *score = if *score > 0.0 {
                *score / penalty
            } else {
                *score * penalty
            };
        }
    }
}

/// The scores of the token after `tokens`, `vocab_size` of them, reading at most the last `max_seq_len`. `cache` holds what the call before
/// has read.
fn next_scores(
    model: &Model,
    tokens: &[u32],
    cache: &mut Cache,
    precision: Precision,
    on_hidden: &mut dyn FnMut(&[f32]),
) -> Vec<f32> {
    let first = tokens.len().saturating_sub(model.config().max_seq_len);
    if first > 0 {
        *cache = Cache::default();
    }
    let news = tokens[first + cache.places()..].to_vec();
    let columns = news.len();
    let input: Tensor = token_tensor(&[news], columns, model.device()); // [1, columns]
    let (scores, hidden) = tch::no_grad(|| model.next_scores(&input, cache, precision.kind()));
    on_hidden(&host::to_vec(&hidden.contiguous()));
    host::to_vec(&scores)
}

/// Draws a token from `scores` by a uniform number in `[0, 1)`.
fn draw(scores: &[f32], options: &GenerateOptions, uniform: f64) -> Result<u32, GenerateError> {
    if scores.iter().any(|score| !score.is_finite()) {
        return Err(GenerateError::NonFinite);
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Stable, so that equal scores stay in the order of their tokens.
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    if options.temperature == 0.0 {
        return Ok(order[0] as u32);
    }
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let best = f64::from(scores[order[0]]);
    let weights: Vec<f64> = order
        .iter()
        .map(|&i| ((f64::from(scores[i]) - best) / options.temperature).exp())
        .collect();
    let nucleus = weights.iter().sum::<f64>() * options.top_p;
    let mut reached = 0.0;
    let kept = weights.iter().take_while(|&&weight| {
        let within = reached < nucleus;
        reached += weight;
        within
    });
    let kept = kept.count().max(1);
    let mut left = uniform * weights[..kept].iter().sum::<f64>();
    let drawn = weights[..kept].iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    // Rounding may leave a hair of the interval uncovered; it belongs to the last.
    Ok(order[drawn.unwrap_or(kept - 1)] as u32)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SCORES: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    fn shares(options: &GenerateOptions) -> Vec<f64> {
        let mut counts = vec![0.0; SCORES.len()];
        for i in 0..10_000 {
            counts[draw(&SCORES, options, f64::from(i) / 10_000.0).unwrap() as usize] += 1e-4;
        }
        counts
    }

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        let options = GenerateOptions {
            temperature: 1.0,
            top_k: 0,
            ..GenerateOptions::default()
        };
        let total: f64 = SCORES.iter().map(|&score| f64::from(score).exp()).sum();
        for (share, score) in shares(&options).iter().zip(SCORES) {
            assert!((share - f64::from(score).exp() / total).abs() < 2e-4);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail_and_no_temperature_takes_the_best() {
        let all = GenerateOptions {
            temperature: 1.0,
            top_k: 0,
            ..GenerateOptions::default()
        };
        let kept = |options: GenerateOptions| shares(&options).iter().filter(|&&share| share > 0.0).count();
        assert_eq!(
            kept(GenerateOptions {
                top_k: 2,
                ..all.clone()
            }),
            2
        );
        // The likeliest has probability .64, the next .24: .7 needs both.
        assert_eq!(
            kept(GenerateOptions {
                top_p: 0.7,
                ..all.clone()
            }),
            2
        );
        assert_eq!(
            kept(GenerateOptions {
                top_p: 1e-9,
                ..all.clone()
            }),
            1
        );
        assert_eq!(
            shares(&GenerateOptions {
                temperature: 0.0,
                ..all
            })[1]
                .round(),
            1.0
        );
    }

    #[test]
    fn what_was_said_is_less_likely_once_and_not_once_for_each_time() {
        let mut scores = SCORES;
        penalise(&mut scores, &[1, 3, 1, 1], 2.0);
        assert_eq!(scores, [0.0, 1.0, 1.0, -2.0]);
        penalise(&mut scores, &[0, 1, 2, 3], 1.0);
        assert_eq!(scores, [0.0, 1.0, 1.0, -2.0]);
    }

    #[test]
    fn broken_scores_are_refused() {
        let scores = [0.0, f32::NAN];
        assert!(matches!(
            draw(&scores, &GenerateOptions::default(), 0.5),
            Err(GenerateError::NonFinite)
        ));
    }
}
