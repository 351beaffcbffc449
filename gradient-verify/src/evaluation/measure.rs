//! How far honest machines and cheats are from a proof of an evaluation: what the [`Tolerance`] is set by, and what shows that it holds for a given model.

use coordinatorless::types::Hash;
use trainer::choices;
use trainer::config::Precision;
use trainer::eval::EvalError;
use trainer::local::set_threads;
use trainer::model::Model;

use super::{Evaluation, Input, Item, Report, Tolerance, Total};
use crate::inference::measure::rounded_to_8_bits;

/// One way to make a proof, and what a check says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What was done.
    pub name: String,
    /// Whether it should pass.
    pub honest: bool,
    /// The largest distance of a likelihood, as [`Tolerance::one`] measures it.
    pub largest: f64,
    /// The mean.
    pub mean: f64,
    /// Whether it passed.
    pub holds: bool,
    /// What the check says.
    pub why: String,
}

impl Case {
    fn new(name: &str, honest: bool, report: &Report, count: usize) -> Self {
        Self {
            name: name.to_owned(),
            honest,
            largest: report.largest,
            mean: report.mean,
            holds: report.holds(),
            why: report.explain(count),
        }
    }

    /// Whether it was judged as it should be.
    #[must_use]
    pub fn right(&self) -> bool {
        self.holds == self.honest
    }
}

/// Inputs cut from `tokens`, at least eight of them: eight texts, or as many questions of which the right choice is how it goes on.
#[must_use]
pub fn inputs_of(tokens: &[u32], questions: bool) -> Vec<Input> {
    let length = (tokens.len() / 2).max(7);
    let cut = |i: usize| tokens[i * (tokens.len() - length) / 7..][..length].to_vec();
    let question = |i: usize| {
        let text = cut(i);
        let (question, choice) = text.split_at(length / 2);
        let other: Vec<u32> = choice.iter().rev().copied().collect();
        Input::Question(choices::Item {
            question: question.to_vec(),
            choices: vec![(choice.to_vec(), 5), (other, 5), (choice[..1].to_vec(), 1)],
            answer: i % 3,
        })
    };
    let input = |i| if questions { question(i) } else { Input::Text(cut(i)) };
    (0..8).map(input).collect()
}

/// Evaluates `inputs` in every way, each checked in full with the parameters `theta`; `others` are parameters of other models by name.
///
/// # Errors
/// Inputs that the model does not read.
pub fn measure(
    model: &mut Model,
    theta: &[f32],
    inputs: &[Input],
    others: &[(String, Vec<f32>)],
    threads: usize,
    tolerance: &Tolerance,
) -> Result<Vec<Case>, EvalError> {
    let mut cases = Vec::new();
    let source = Hash::of(b"measured");
    let all = inputs.len();
    for (provers, checkers) in [(1, threads), (threads, 1)] {
        model.load_flat(theta)?;
        set_threads(provers);
        let proof = Evaluation::new(source, of_all(model, inputs, Precision::Fp32)?);
        set_threads(checkers);
        let report = proof.check(model, all, &[], Some(inputs), tolerance);
        let name = format!("honest: {provers} threads; checked on {checkers}, one by one");
        cases.push(Case::new(&name, true, &report, all));
    }
    set_threads(threads);
    let honest = of_all(model, inputs, Precision::Fp32)?;
    let mut check = |name: &str, proof: &Evaluation, model: &Model| {
        let report = proof.check(model, all, &[], Some(inputs), tolerance);
        cases.push(Case::new(name, false, &report, all));
    };
    let proof = Evaluation::new(source, of_all(model, inputs, Precision::Bf16)?);
    check("computed in bf16", &proof, model);
    let eight_bits = rounded_to_8_bits(model, theta);
    let others = others.iter().map(|(name, theta)| (name.as_str(), theta.as_slice()));
    for (name, other) in others.chain([("weights rounded to 8 bits", eight_bits.as_slice())]) {
        model.load_flat(other)?;
        let proof = Evaluation::new(source, of_all(model, inputs, Precision::Fp32)?);
        model.load_flat(theta)?;
        check(name, &proof, model);
    }
    let tampered = |change: fn(&mut Item)| {
        let mut items = honest.clone();
        change(&mut items[3]);
        Evaluation::new(source, items)
    };
    check(
        "one likelihood better by 0.1",
        &tampered(|item| item.scores[0] = (item.scores[0] + 0.1).min(0.0)),
        model,
    );
    check("one input changed", &tampered(change_input), model);
    let mut better = Evaluation::new(source, honest.clone());
    better.total = match better.total {
        Total::Loss(loss) => Total::Loss(loss * 0.999),
        Total::Right(right, a_byte) => Total::Right(right + 1, a_byte),
    };
    check("a better total than the items add up to", &better, model);
    let mut other = Evaluation::new(source, honest);
    other.root = Hash::of(b"other items");
    check("a root of other items", &other, model);
    Ok(cases)
}

/// Every input with its likelihoods; texts in batches.
fn of_all(model: &Model, inputs: &[Input], precision: Precision) -> Result<Vec<Item>, EvalError> {
    Input::all_scores(model, inputs, precision).map(|scores| {
        let pairs = inputs.iter().cloned().zip(scores);
        pairs.map(|(input, scores)| Item { input, scores }).collect()
    })
}

/// Puts another token first, or names another choice as the right one.
fn change_input(item: &mut Item) {
    match &mut item.input {
        Input::Text(tokens) => {
            let other = tokens.iter().position(|&token| token != tokens[0]).unwrap_or(0);
            tokens.swap(0, other);
        }
        Input::Question(question) => question.answer = (question.answer + 1) % question.choices.len(),
    }
}
