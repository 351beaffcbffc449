//! One thing that was evaluated: its input, and how likely the model finds it.

use trainer::choices::{self, score_in};
use trainer::config::Precision;
use trainer::eval::{EvalError, log_likelihoods};
use trainer::model::Model;

use super::Kind;
use crate::proof::{ProofError, Reader, Writer};

/// Most tokens of a text, a question or a choice.
const MAX_TOKENS: usize = 1 << 20;
/// Most choices of a question.
const MAX_CHOICES: usize = 1 << 10;

/// What the model is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A text of at least two tokens: the first is given, the others are predicted.
    Text(Vec<u32>),
    /// A question with its choices.
    Question(choices::Item),
}

/// An input and the log likelihoods, in nats, that a model is claimed to give: of the text, or of each choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// What was read.
    pub input: Input,
    /// What came out.
    pub scores: Vec<f64>,
}

impl Input {
    /// The most tokens that are read at once for it.
    #[must_use]
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text(tokens) => tokens.len(),
            Self::Question(item) => {
                let longest = item.choices.iter().map(|(choice, _)| choice.len()).max();
                item.question.len() + longest.unwrap_or(0)
            }
        }
    }

    /// Tokens predicted for each score.
    #[must_use]
    pub fn predicted(&self) -> Vec<usize> {
        match self {
            Self::Text(tokens) => vec![tokens.len().saturating_sub(1)],
            Self::Question(item) => item.choices.iter().map(|(choice, _)| choice.len()).collect(),
        }
    }

    /// What the model that is loaded gives.
    ///
    /// # Errors
    /// Tokens that it does not read.
    pub fn scores(&self, model: &Model, precision: Precision) -> Result<Vec<f64>, EvalError> {
        let mut scores = match self {
            Self::Text(tokens) => log_likelihoods(model, std::slice::from_ref(tokens), precision)?,
            Self::Question(item) => score_in(model, item, precision)?.log_likelihoods,
        };
        scores.iter_mut().for_each(canonical);
        Ok(scores)
    }

    /// The same for all of `inputs`; texts of one length together.
    ///
    /// # Errors
    /// Tokens that it does not read.
    pub fn all_scores(model: &Model, inputs: &[Self], precision: Precision) -> Result<Vec<Vec<f64>>, EvalError> {
        let texts: Vec<Vec<u32>> = inputs
            .iter()
            .filter_map(|input| match input {
                Self::Text(tokens) => Some(tokens.clone()),
                Self::Question(_) => None,
            })
            .collect();
        let together = texts.len() == inputs.len() && texts.iter().all(|text| text.len() == texts[0].len());
        if !together {
            return inputs.iter().map(|input| input.scores(model, precision)).collect();
        }
        let mut scores = log_likelihoods(model, &texts, precision)?;
        scores.iter_mut().for_each(canonical);
        Ok(scores.into_iter().map(|score| vec![score]).collect())
    }
}

/// No probability is above one, whatever rounding says, and certainty has one zero. What is no number stays none.
fn canonical(score: &mut f64) {
    if *score >= 0.0 {
        *score = 0.0;
    }
}

impl Item {
    /// Whether the likeliest choice is right, by sum and by the byte; `None` for a text.
    pub(super) fn right(&self) -> Option<(bool, bool)> {
        match &self.input {
            Input::Text(_) => None,
            Input::Question(item) => {
                let scored = choices::Scored::new(self.scores.clone(), item);
                Some((scored.chosen == item.answer, scored.chosen_a_byte == item.answer))
            }
        }
    }

    /// What the leaf is the hash of.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        self.write(&mut out);
        out.into_bytes()
    }

    pub(super) fn write(&self, out: &mut Writer) {
        match &self.input {
            Input::Text(tokens) => out.tokens(tokens),
            Input::Question(item) => {
                out.tokens(&item.question);
                out.u32(item.choices.len() as u32);
                out.u32(item.answer as u32);
                for (choice, bytes) in &item.choices {
                    out.u32(*bytes as u32);
                    out.tokens(choice);
                }
            }
        }
        for &score in &self.scores {
            out.f64(score);
        }
    }

    pub(super) fn read(bytes: &mut Reader<'_>, kind: Kind) -> Result<Self, ProofError> {
        let (input, count) = match kind {
            Kind::Loss => (Input::Text(bytes.tokens("a text", 2, MAX_TOKENS)?), 1),
            Kind::Choices => {
                let question = bytes.tokens("a question", 1, MAX_TOKENS)?;
                let count = bytes.count("the number of choices", 2, MAX_CHOICES)?;
                let answer = bytes.count("the right choice", 0, count - 1)?;
                let choice = |bytes: &mut Reader<'_>| {
                    let length = bytes.count("the bytes of a choice", 0, 4 * MAX_TOKENS)?;
                    Ok((bytes.tokens("a choice", 1, MAX_TOKENS)?, length))
                };
                let choices = (0..count).map(|_| choice(bytes)).collect::<Result<_, ProofError>>()?;
                let item = choices::Item {
                    question,
                    choices,
                    answer,
                };
                (Input::Question(item), count)
            }
        };
        let score = |_| {
            let score = bytes.f64("a log likelihood")?;
            match score <= 0.0 {
                true => Ok(score),
                false => Err(ProofError::value("a log likelihood", "0 at most", score)),
            }
        };
        Ok(Self {
            input,
            scores: (0..count).map(score).collect::<Result<_, _>>()?,
        })
    }
}
