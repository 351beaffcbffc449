//! Whether a text is what scores and draws lead to, give or take the rounding of other hardware.
//!
//! A draw is a point on a line on which the tokens lie side by side, likeliest first, each as long as it is likely. Scores that are off by a hair
//! move the borders by a hair, and let tokens with nearly equal scores change places. So a token is allowed with a *slack* `s` (in score) if
//! some scores within about `s` of the given ones would have led to it; [`Choices::next`] tells the smallest such slack.

use super::{Draws, GenerateError, GenerateOptions, check_options, draw, penalise};

/// Most that a border may move, as a share of the line, whatever the slack: at temperatures near zero any slack would move it everywhere.
const MOST_MOVED: f64 = 0.1;
/// Slacks beyond this are as good as none: the token was not drawn from these scores.
const MOST_SLACK: f64 = 16.0;
/// Halvings of the interval in which the slack is sought: it is found to one part in a million.
const HALVINGS: u32 = 44;

/// Follows a text token by token.
pub struct Choices<'a> {
    options: &'a GenerateOptions,
    draws: Draws,
    tokens: Vec<u32>,
}

impl<'a> Choices<'a> {
    /// At the end of the prompt.
    ///
    /// # Errors
    /// No prompt, or an option out of range.
    pub fn new(prompt: &[u32], options: &'a GenerateOptions) -> Result<Self, GenerateError> {
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        check_options(options)?;
        Ok(Self {
            options,
            draws: Draws::new(options.seed),
            tokens: prompt.to_vec(),
        })
    }

    /// The slack that `token` needs to be drawn next from `scores`, those that follow all tokens so far: 0 for the one that is drawn, infinite for
    /// one that is not even nearly.
    ///
    /// # Errors
    /// Scores that are not numbers, or a token that they do not cover.
    pub fn next(&mut self, mut scores: Vec<f32>, token: u32) -> Result<f64, GenerateError> {
        let (found, vocab_size) = (token, scores.len());
        if token as usize >= vocab_size {
            return Err(GenerateError::Token { found, vocab_size });
        }
        let uniform = self.draws.next_uniform();
        penalise(&mut scores, &self.tokens, self.options.repetition_penalty);
        self.tokens.push(token);
        if draw(&scores, self.options, uniform)? == token {
            return Ok(0.0);
        }
        let line = Line::new(&scores, self.options, uniform, token);
        if !line.allows(MOST_SLACK) {
            return Ok(f64::INFINITY);
        }
        let (mut refused, mut allowed) = (0.0, MOST_SLACK);
        for _ in 0..HALVINGS {
            let middle = (refused + allowed) / 2.0;
            *(if line.allows(middle) {
                &mut allowed
            } else {
                &mut refused
            }) = middle;
        }
        Ok(allowed)
    }
}

/// The tokens side by side, and the one in question.
struct Line<'a> {
    options: &'a GenerateOptions,
    uniform: f64,
    /// All scores, highest first.
    sorted: Vec<f64>,
    /// The score in question.
    own: f64,
}

impl<'a> Line<'a> {
    fn new(scores: &[f32], options: &'a GenerateOptions, uniform: f64, token: u32) -> Self {
        let mut sorted: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let own = f64::from(scores[token as usize]);
        Self {
            options,
            uniform,
            sorted,
            own,
        }
    }

    fn allows(&self, slack: f64) -> bool {
        let (best, temperature) = (self.sorted[0], self.options.temperature);
        if temperature == 0.0 {
            return self.own >= best - slack;
        }
        let moved = (slack / temperature).exp_m1().min(MOST_MOVED);
        let kept = match self.options.top_k {
            0 => self.sorted.len(),
            k => k.min(self.sorted.len()),
        };
        let weight = |score: f64| ((score - best) / temperature).exp();
        let weights: Vec<f64> = self.sorted[..kept].iter().map(|&score| weight(score)).collect();
        let all: f64 = weights.iter().sum();
        // The nucleus ends where its share is reached, which may be a token earlier or later.
        [-moved, 0.0, moved].iter().any(|shift| {
            let mut reached = 0.0;
            let nucleus = all * (self.options.top_p + shift);
            let within = weights.iter().take_while(|&&weight| {
                let within = reached < nucleus;
                reached += weight;
                within
            });
            let count = within.count().max(1);
            self.lies_in(&weights[..count], slack, moved, weight(self.own))
        })
    }

    /// Whether the draw may meet the token where these `weights` make up the line.
    fn lies_in(&self, weights: &[f64], slack: f64, moved: f64, own: f64) -> bool {
        let scores = &self.sorted[..weights.len()];
        if self.own < scores[scores.len() - 1] - slack {
            return false;
        }
        let all: f64 = weights.iter().sum();
        let certain = scores.partition_point(|&score| score > self.own + slack);
        let possible = scores.partition_point(|&score| score >= self.own - slack);
        let (first, last): (f64, f64) = (weights[..certain].iter().sum(), weights[..possible].iter().sum());
        // Outside the line so far, it would take the place of the last.
        let last = last.max(first + own);
        let point = self.uniform * all;
        (first - moved * all..=last + moved * all).contains(&point)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn scores(salt: u32) -> Vec<f32> {
        let value = |i: u32| ((i.wrapping_mul(2_654_435_761) ^ salt.wrapping_mul(40_503)) % 1000) as f32 / 250.0;
        (0..64).map(value).collect()
    }

    fn settings() -> Vec<GenerateOptions> {
        let mut all = Vec::new();
        for temperature in [0.0, 1e-3, 0.3, 0.8, 2.0] {
            for (top_k, top_p) in [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.9), (1, 1.0)] {
                for repetition_penalty in [1.0, 1.3] {
                    let seed = all.len() as u64;
                    all.push(GenerateOptions {
                        temperature,
                        top_k,
                        top_p,
                        repetition_penalty,
                        seed,
                        max_tokens: 40,
                    });
                }
            }
        }
        all
    }

    /// Forty tokens drawn from scores that are off by up to `off`, and the largest slack that they need under the true ones.
    fn largest_slack(options: &GenerateOptions, off: f32) -> f64 {
        let (mut draws, mut tokens) = (Draws::new(options.seed), vec![1, 2]);
        let mut choices = Choices::new(&tokens, options).unwrap();
        let mut largest: f64 = 0.0;
        for place in 0..40 {
            let truth = scores(place);
            let mut theirs: Vec<f32> = truth
                .iter()
                .zip(scores(place + 999))
                .map(|(a, b)| a + off * (b / 2.0 - 1.0))
                .collect();
            penalise(&mut theirs, &tokens, options.repetition_penalty);
            let token = draw(&theirs, options, draws.next_uniform()).unwrap();
            largest = largest.max(choices.next(truth, token).unwrap());
            tokens.push(token);
        }
        largest
    }

    #[test]
    fn what_was_drawn_from_nearly_these_scores_needs_little_slack() {
        for options in settings() {
            assert_eq!(largest_slack(&options, 0.0), 0.0, "{options:?}");
            let slack = largest_slack(&options, 1e-4);
            assert!(slack < 1e-3, "{slack} {options:?}");
        }
    }

    #[test]
    fn another_token_than_the_drawn_one_needs_much() {
        // Near temperature zero a slack moves the borders by all that is allowed, and more would pass.
        let settings = settings();
        let settings = settings
            .iter()
            .filter(|o| o.temperature != 1e-3 && o.top_k != 1 && o.repetition_penalty == 1.0);
        let (mut tried, mut passed) = (0, 0);
        for options in settings {
            let mut draws = Draws::new(options.seed);
            for place in 0..40 {
                let (truth, uniform) = (scores(place), draws.next_uniform());
                let honest = draw(&truth, options, uniform).unwrap() as usize;
                for token in (0..64).filter(|&token| truth[token] != truth[honest]) {
                    tried += 1;
                    passed += u32::from(Line::new(&truth, options, uniform, token as u32).allows(1e-3));
                }
            }
        }
        assert!(
            tried > 30_000 && passed * 500 < tried,
            "{passed} of {tried} other tokens pass"
        );
    }

    #[test]
    fn a_token_that_is_none_is_named() {
        let options = GenerateOptions::default();
        assert!(matches!(Choices::new(&[], &options), Err(GenerateError::EmptyPrompt)));
        let mut choices = Choices::new(&[1], &options).unwrap();
        assert!(matches!(
            choices.next(vec![0.0; 4], 4),
            Err(GenerateError::Token {
                found: 4,
                vocab_size: 4
            })
        ));
        assert!(matches!(
            choices.next(vec![f32::NAN; 4], 3),
            Err(GenerateError::NonFinite)
        ));
    }
}
