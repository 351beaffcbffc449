//! Proof of an inference: this text was written by this model from this prompt with these settings.
//!
//! Three things are held against the model by who checks, in one pass over the whole text ([`Inference::check`]):
//!
//! 1. **What the model's head read** at every place, by a [`fingerprint`] of each 32 places: another model, lower precision, or another prompt give
//!    other numbers; other hardware gives nearly the same.
//! 2. **Every token**: it is the one that the scores and the seed lead to, or as near to it as rounding may bring it
//!    ([`trainer::generate::Choices`]). So a text cannot be changed, and at temperature 0 it is the model's likeliest.
//! 3. **Which model**: root, shape and tokenizer are named in the proof ([`crate::proof::Identity`]); comparing them is the caller's part.
//!
//! In the file, after what every [`crate::proof`] begins with:
//!
//! ```text
//!   8  temperature f64       8  seed u64                4  tokens of the prompt, then 4 each
//!   8  top-p f64             4  top-k u32               4  tokens of the answer, then 4 each
//!   8  repetition penalty    4  dim u32                 .. fingerprints, 258 bytes each
//! ```
//!
//! There is a fingerprint for each 32 places of the prompt, then for each 32 of the answer, the last of either for what is left. A place is where a token
//! was read; the answer's last token is not read, so `prompt + answer - 1` places are covered.
//!
//! What it does not show: *when* it was computed, and that the prover did not also compute something else; a prover who has the right model can make a proof
//! of any prompt. The seed is the prover's choice unless it was agreed before: who tries many seeds and shows one text has chosen among honest texts.

use std::ops::Range;

use trainer::config::Precision;
use trainer::eval::EvalError;
use trainer::generate::{Choices, GenerateError, GenerateOptions, check_options, generate_watched};
use trainer::model::Model;
use trainer::prefill::prefill;

use crate::proof::{ProofError, Reader, Writer};

mod bounds;
mod field;
pub mod fingerprint;
pub mod measure;
mod report;

pub use bounds::Bounds;
pub use fingerprint::{Distance, Fingerprint};
pub use report::{Report, Span};

use fingerprint::{FingerprintError, TOKENS, TOP};

/// Most tokens of a prompt, and of an answer.
pub const MAX_TOKENS: usize = 1 << 20;
/// Widest model; as in [`trainer::config::ModelConfig`].
const MAX_DIM: usize = 32_768;
/// Places whose scores are held at a time: a large vocabulary times a long text is more than memory has.
const SCORES_AT_ONCE: usize = 64;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Inference {
    /// How tokens were drawn; `max_tokens` is the length of the answer.
    pub options: GenerateOptions,
    /// The tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// Those that were added, at least one.
    pub answer: Vec<u32>,
    /// The model's width.
    dim: usize,
    /// Of the places in order.
    prints: Vec<Fingerprint>,
}

/// Why there is no proof, or why one cannot be right whatever the model computes.
#[derive(Debug, thiserror::Error)]
pub enum InferenceError {
    /// Tokens or settings that no text is drawn by.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Tokens that the model does not read.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// No fingerprint.
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
    /// More than the model reads at once, or nothing.
    #[error(
        "a prompt of {prompt} tokens and an answer of {answer}: a proof covers an answer of at least 1, and at most {most} tokens in all, what this model reads at once"
    )]
    Length {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to add.
        answer: usize,
        /// Most of both.
        most: usize,
    },
    /// Of a model of another width.
    #[error("the fingerprints are of a model of width {found}; this one's is {expected}")]
    Width {
        /// The model's.
        expected: usize,
        /// The proof's.
        found: usize,
    },
}

/// The places that share a fingerprint: of the prompt, then of the answer.
fn spans(prompt: usize, answer: usize) -> Vec<Range<usize>> {
    let split = |from: usize, to: usize| (from..to).step_by(TOKENS).map(move |at| at..to.min(at + TOKENS));
    split(0, prompt).chain(split(prompt, prompt + answer - 1)).collect()
}

fn must_fit(model: &Model, prompt: usize, answer: usize) -> Result<(), InferenceError> {
    // The last token is not read.
    let most = (model.config().max_seq_len + 1).min(MAX_TOKENS);
    if answer == 0 || prompt.saturating_add(answer) > most {
        return Err(InferenceError::Length { prompt, answer, most });
    }
    Ok(())
}

impl Inference {
    /// Continues `prompt` as [`trainer::generate::generate`] does, and keeps the fingerprints.
    ///
    /// # Errors
    /// As there, or a text that the model cannot read at once.
    pub fn prove(
        model: &mut Model,
        theta: &[f32],
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Self, InferenceError> {
        Self::prove_in(model, theta, prompt, options, Precision::Fp32, on_token)
    }

    /// The same in any precision; one other than fp32 is a cheat, to be measured.
    fn prove_in(
        model: &mut Model,
        theta: &[f32],
        prompt: &[u32],
        options: &GenerateOptions,
        precision: Precision,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Self, InferenceError> {
        must_fit(model, prompt.len(), options.max_tokens)?;
        let mut hidden = Vec::new();
        let mut keep = |rows: &[f32]| hidden.extend_from_slice(rows);
        let answer = generate_watched(model, theta, prompt, options, precision, on_token, &mut keep)?;
        Self::of_parts(options, prompt, &answer, &hidden, model.config().dim)
    }

    /// From what the head read, `[places, dim]`.
    fn of_parts(
        options: &GenerateOptions,
        prompt: &[u32],
        answer: &[u32],
        hidden: &[f32],
        dim: usize,
    ) -> Result<Self, InferenceError> {
        let prints = spans(prompt.len(), answer.len())
            .into_iter()
            .map(|span| Fingerprint::of(&hidden[span.start * dim..span.end * dim]))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            options: options.clone(),
            prompt: prompt.to_vec(),
            answer: answer.to_vec(),
            dim,
            prints,
        })
    }

    /// Reads the whole text with the parameters that `model` holds and compares, with what `bounds` allow.
    ///
    /// # Errors
    /// A proof that cannot be this model's whatever its parameters: tokens outside its vocabulary, more than it reads, another width.
    pub fn check(&self, model: &Model, bounds: &Bounds) -> Result<Report, InferenceError> {
        self.check_beside(model, bounds, 1)
    }

    /// The same, with so many copies of the text side by side: other shapes of products, other rounding.
    fn check_beside(&self, model: &Model, bounds: &Bounds, copies: usize) -> Result<Report, InferenceError> {
        let (prompt, dim) = (self.prompt.len(), model.config().dim);
        must_fit(model, prompt, self.answer.len())?;
        if self.dim != dim {
            return Err(InferenceError::Width {
                expected: dim,
                found: self.dim,
            });
        }
        let text = [&self.prompt[..], &self.answer[..self.answer.len() - 1]].concat();
        let read = prefill(model, &text, Precision::Fp32, copies)?;
        let hidden = read.hidden();
        let mut report = Report::new(bounds);
        for (span, print) in spans(prompt, self.answer.len()).into_iter().zip(&self.prints) {
            let distance = print.distance(&hidden[span.start * dim..span.end * dim])?;
            report.add_span(span, prompt, distance);
        }
        let mut choices = Choices::new(&self.prompt, &self.options)?;
        // The scores at the prompt's last place lead to the answer's first token.
        let places = prompt - 1..text.len();
        for from in places.clone().step_by(SCORES_AT_ONCE) {
            let to = places.end.min(from + SCORES_AT_ONCE);
            for (place, scores) in (from..to).zip(read.scores(from..to)) {
                let number = place + 1 - prompt;
                report.add_token(number, choices.next(scores, self.answer[number])?);
            }
        }
        Ok(report)
    }

    /// Bytes of all fingerprints.
    #[must_use]
    pub fn fingerprint_bytes(&self) -> usize {
        self.prints.iter().map(|print| 2 + 2 * print.len()).sum()
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.f64(self.options.temperature);
        out.f64(self.options.top_p);
        out.f64(self.options.repetition_penalty);
        out.u64(self.options.seed);
        out.u32(self.options.top_k as u32);
        out.u32(self.dim as u32);
        out.tokens(&self.prompt);
        out.tokens(&self.answer);
        for print in &self.prints {
            print.write(out);
        }
    }

    pub(crate) fn read(bytes: &mut Reader<'_>) -> Result<Self, ProofError> {
        let mut options = GenerateOptions {
            temperature: bytes.f64("the temperature")?,
            top_p: bytes.f64("top-p")?,
            repetition_penalty: bytes.f64("the repetition penalty")?,
            seed: bytes.u64("the seed")?,
            top_k: bytes.u32("top-k")? as usize,
            max_tokens: 0,
        };
        check_options(&options).map_err(|error| ProofError::Settings(error.to_string()))?;
        let dim = bytes.count("the width", 1, MAX_DIM)?;
        let prompt = bytes.tokens("the prompt", 1, MAX_TOKENS)?;
        let answer = bytes.tokens("the answer", 1, MAX_TOKENS)?;
        options.max_tokens = answer.len();
        let prints = spans(prompt.len(), answer.len())
            .into_iter()
            .map(|span| Fingerprint::read(bytes, TOP.min(span.len() * dim)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            options,
            prompt,
            answer,
            dim,
            prints,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_every_place_that_was_read() {
        assert_eq!(spans(1, 2), [0..1, 1..2]);
        assert_eq!(spans(40, 34), [0..32, 32..40, 40..72, 72..73]);
        assert_eq!(spans(32, 33), [0..32, 32..64]);
    }
}
