//! What a check found, in numbers and in words.

use std::ops::Range;

use super::{Bounds, Distance};

/// One fingerprint, held against the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// The places in the whole text, from 0.
    pub places: Range<usize>,
    /// Whether they are the prompt's.
    pub of_prompt: bool,
    /// How far the claim is from what was computed here.
    pub distance: Distance,
    /// Whether that is within bounds.
    pub holds: bool,
}

/// The whole check.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    bounds: Bounds,
    /// Every fingerprint, in order.
    pub spans: Vec<Span>,
    /// The largest slack of a token, and which token of the answer, from 0.
    pub slack: (f64, usize),
    /// The first token of the answer whose slack is beyond the bound.
    pub token: Option<usize>,
    /// Tokens beyond the bound.
    pub tokens_off: usize,
    /// Tokens checked.
    pub tokens: usize,
}

impl Report {
    pub(super) fn new(bounds: &Bounds) -> Self {
        Self {
            bounds: *bounds,
            spans: Vec::new(),
            slack: (0.0, 0),
            token: None,
            tokens_off: 0,
            tokens: 0,
        }
    }

    pub(super) fn add_span(&mut self, places: Range<usize>, prompt: usize, distance: Distance) {
        self.spans.push(Span {
            of_prompt: places.start < prompt,
            holds: self.bounds.allow(&distance),
            places,
            distance,
        });
    }

    pub(super) fn add_token(&mut self, number: usize, slack: f64) {
        self.tokens += 1;
        if slack > self.slack.0 {
            self.slack = (slack, number);
        }
        if slack > self.bounds.slack {
            self.tokens_off += 1;
            self.token.get_or_insert(number);
        }
    }

    /// Mean difference over all fingerprints together, in units of the last bit.
    #[must_use]
    pub fn overall(&self) -> f64 {
        let near = |span: &Span| (span.distance.compared - span.distance.exponents) as f64;
        let count: f64 = self.spans.iter().map(near).sum();
        let sum: f64 = self.spans.iter().map(|span| near(span) * span.distance.mean).sum();
        if count > 0.0 { sum / count } else { f64::INFINITY }
    }

    /// The largest of each number over all fingerprints.
    #[must_use]
    pub fn worst(&self) -> Distance {
        let none = Distance {
            compared: 0,
            exponents: 0,
            mean: 0.0,
            median: 0.0,
        };
        self.spans.iter().fold(none, |worst, span| Distance {
            compared: worst.compared.max(span.distance.compared),
            exponents: worst.exponents.max(span.distance.exponents),
            mean: worst.mean.max(span.distance.mean),
            median: worst.median.max(span.distance.median),
        })
    }

    /// Fingerprints out of bounds.
    #[must_use]
    pub fn spans_off(&self) -> usize {
        self.spans.iter().filter(|span| !span.holds).count()
    }

    /// Whether the proof holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.spans_off() == 0 && self.token.is_none() && self.overall() <= self.bounds.overall
    }

    /// What was found, in one or two plain sentences.
    #[must_use]
    pub fn explain(&self) -> String {
        if self.holds() {
            return format!(
                "this model computed all {} fingerprints, and all {} tokens are those that it draws",
                self.spans.len(),
                self.tokens
            );
        }
        let mut told = Vec::new();
        if let Some(what) = self.activations() {
            told.push(what);
        }
        if let Some(token) = self.token {
            let times = match self.tokens_off {
                1 => "is not the one".to_owned(),
                off => format!("and {} more are not those", off - 1),
            };
            told.push(format!(
                "token {} of the answer {times} that the model draws by these settings",
                token + 1
            ));
        }
        told.join("; ")
    }

    /// What is wrong with the fingerprints, if anything.
    fn activations(&self) -> Option<String> {
        let off = self.spans_off();
        if off == 0 && self.overall() <= self.bounds.overall {
            return None;
        }
        let exponents: usize = self.spans.iter().map(|span| span.distance.exponents).sum();
        let compared: usize = self.spans.iter().map(|span| span.distance.compared).sum();
        let share = exponents as f64 / compared.max(1) as f64;
        let first = self.spans.iter().find(|span| !span.holds);
        let whole = first.is_none_or(|span| span.places.start == 0);
        let likely = if let (Some(span), false) = (first, whole) {
            let place = span.places.start + 1;
            format!(
                "what it read is right up to token {} of the text and wrong from then on",
                place - 1
            )
        } else if share > 0.25 {
            "another model, or another prompt, computed it".to_owned()
        } else {
            "a model like this one computed it, but not this one in single precision: lower precision, rounded weights, or other training"
                .to_owned()
        };
        Some(format!(
            "{off} of {} fingerprints are out of bounds ({:.0}% of the exponents differ, the rest by {:.2} units on average, {} allowed): {likely}",
            self.spans.len(),
            100.0 * share,
            self.overall(),
            self.bounds.overall
        ))
    }
}
