//! How far honest machines and cheats are from a proof: what the [`Bounds`] are set by, and what shows that they hold for a given model.

use trainer::config::Precision;
use trainer::generate::GenerateOptions;
use trainer::local::set_threads;
use trainer::model::Model;
use trainer::prefill::prefill;

use super::{Bounds, Distance, Inference, InferenceError, Report};

/// One way to make a proof, and what a check says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What was done.
    pub name: String,
    /// Whether it should pass.
    pub honest: bool,
    /// The largest of each number over all fingerprints.
    pub worst: Distance,
    /// The mean difference over all fingerprints.
    pub overall: f64,
    /// Fingerprints out of bounds, and all.
    pub spans: (usize, usize),
    /// The largest slack of a token; infinite for one that is impossible.
    pub slack: f64,
    /// Tokens out of bounds, and all.
    pub tokens: (usize, usize),
    /// Whether it passed.
    pub holds: bool,
}

impl Case {
    /// What a check found.
    pub fn new(name: impl Into<String>, honest: bool, report: &Report) -> Self {
        Self {
            name: name.into(),
            honest,
            worst: report.worst(),
            overall: report.overall(),
            spans: (report.spans_off(), report.spans.len()),
            slack: report.slack.0,
            tokens: (report.tokens_off, report.tokens),
            holds: report.holds(),
        }
    }

    /// Whether it was judged as it should be.
    #[must_use]
    pub fn right(&self) -> bool {
        self.holds == self.honest
    }
}

/// What is measured: a model, a text to continue, and other models that pretend to be it.
pub struct Subject<'a> {
    /// Its parameters.
    pub theta: &'a [f32],
    /// What is continued; at least two tokens.
    pub prompt: &'a [u32],
    /// How.
    pub options: &'a GenerateOptions,
    /// Parameters of the same shape, by name.
    pub others: &'a [(String, Vec<f32>)],
    /// Threads of the honest.
    pub threads: usize,
}

/// Makes a proof in every way and checks each with `bounds`. The threads are left as the subject says.
///
/// # Errors
/// A text that the model does not read at once, or settings out of range.
pub fn measure(model: &mut Model, subject: &Subject<'_>, bounds: &Bounds) -> Result<Vec<Case>, InferenceError> {
    let mut cases = honest(model, subject, bounds)?;
    let own = Inference::prove(model, subject.theta, subject.prompt, subject.options, &mut |_| ())?;
    let mut check = |name: &str, model: &mut Model, proof: &Inference| -> Result<(), InferenceError> {
        model.load_flat(subject.theta).map_err(trainer::eval::EvalError::from)?;
        cases.push(Case::new(name, false, &proof.check(model, bounds)?));
        Ok(())
    };
    let eight_bits = rounded_to_8_bits(model, subject.theta);
    let others = subject
        .others
        .iter()
        .map(|(name, theta)| (name.as_str(), theta.as_slice()));
    for (name, theta) in others.chain([("weights rounded to 8 bits", eight_bits.as_slice())]) {
        let proof = Inference::prove(model, theta, subject.prompt, subject.options, &mut |_| ())?;
        check(name, model, &proof)?;
    }
    let (theta, prompt, options) = (subject.theta, subject.prompt, subject.options);
    let proof = Inference::prove_in(model, theta, prompt, options, Precision::Bf16, &mut |_| ())?;
    check("computed in bf16", model, &proof)?;
    for (name, theirs) in other_prompts(model, prompt) {
        let mut proof = Inference::prove(model, theta, &theirs, options, &mut |_| ())?;
        proof.prompt = prompt.to_vec();
        check(name, model, &proof)?;
    }
    // Another token in the middle; then once more with fingerprints of the changed text, which are right.
    let mut proof = own;
    let middle = proof.answer.len() / 2;
    proof.answer[middle] = (proof.answer[middle] + 1) % model.config().vocab_size as u32;
    check("one token of the answer changed", model, &proof)?;
    let text = [prompt, &proof.answer[..proof.answer.len() - 1]].concat();
    let hidden = prefill(model, &text, Precision::Fp32, 1)?.hidden();
    let forged = Inference::of_parts(options, prompt, &proof.answer, &hidden, model.config().dim)?;
    check("the same, with the fingerprints of the changed text", model, &forged)?;
    Ok(cases)
}

/// Proofs by this model: at other numbers of threads on either side, made in one pass, checked beside other texts.
fn honest(model: &mut Model, subject: &Subject<'_>, bounds: &Bounds) -> Result<Vec<Case>, InferenceError> {
    let (theta, prompt, options) = (subject.theta, subject.prompt, subject.options);
    let mut cases = Vec::new();
    let mut threads = vec![1, subject.threads];
    threads.dedup();
    for &provers in &threads {
        set_threads(provers);
        let proof = Inference::prove(model, theta, prompt, options, &mut |_| ())?;
        for &checkers in &threads {
            set_threads(checkers);
            let name = format!("honest: {provers} threads, token by token; checked on {checkers} in one pass");
            cases.push(Case::new(name, true, &proof.check(model, bounds)?));
        }
        let name = format!("honest: {provers} threads; checked beside two other texts");
        cases.push(Case::new(name, true, &proof.check_beside(model, bounds, 3)?));
        let text = [prompt, &proof.answer[..proof.answer.len() - 1]].concat();
        set_threads(1);
        let hidden = prefill(model, &text, Precision::Fp32, 2)?.hidden();
        let at_once = Inference::of_parts(options, prompt, &proof.answer, &hidden, model.config().dim)?;
        set_threads(subject.threads);
        let name = format!(
            "honest: text of {provers} threads read in one pass of two; checked on {}",
            subject.threads
        );
        cases.push(Case::new(name, true, &at_once.check(model, bounds)?));
    }
    set_threads(subject.threads);
    Ok(cases)
}

/// Prompts of the same length that someone might answer instead.
fn other_prompts(model: &Model, prompt: &[u32]) -> Vec<(&'static str, Vec<u32>)> {
    let vocab = model.config().vocab_size as u32;
    let changed = |at: usize| {
        let mut theirs = prompt.to_vec();
        theirs[at] = (theirs[at] + 1) % vocab;
        theirs
    };
    vec![
        ("first token of the prompt changed", changed(0)),
        ("last token of the prompt changed", changed(prompt.len() - 1)),
        (
            "words of the prompt in another order",
            prompt.iter().rev().copied().collect(),
        ),
    ]
}

/// Every row of every matrix with one scale and 8 bits a value, as quantised models have it; norms and biases as they are.
pub(crate) fn rounded_to_8_bits(model: &Model, theta: &[f32]) -> Vec<f32> {
    let mut rounded = theta.to_vec();
    for entry in &model.layout().entries {
        if let [_, columns] = entry.shape[..] {
            for row in rounded[entry.offset..entry.offset + entry.len].chunks_mut(columns) {
                let scale = row.iter().fold(0.0, |most: f32, value| most.max(value.abs())) / 127.0;
                if scale > 0.0 {
                    row.iter_mut()
                        .for_each(|value| *value = (*value / scale).round() * scale);
                }
            }
        }
    }
    rounded
}
