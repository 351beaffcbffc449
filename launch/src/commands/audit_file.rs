//! `murmur audit FILE`: whether what a proof says is so, by computing it again.

use std::path::Path;

use anyhow::{Result, anyhow};
use gradient_verify::evaluation::{Evaluation, Input, Kind, Tolerance, Total};
use gradient_verify::inference::{Bounds, Inference};
use gradient_verify::proof::{Identity, Proof, Statement};
use serde_json::{Value, json};
use trainer::model::Model;

use super::{eval, print_json, tasks};
use crate::cli::AuditArgs;
use crate::device::device;
use crate::failure::usage;
use crate::held_out::held_out_sequences;
use crate::loaded::Loaded;
use crate::peer_dir::PeerDir;
use crate::proofs;
use crate::vocabulary::Vocabulary;

/// Most characters of a text that are shown.
const SHOWN: usize = 60;

/// What a check came to.
struct Outcome {
    holds: bool,
    /// Why, in a sentence.
    why: String,
    /// What is told before it, line by line.
    lines: Vec<String>,
    /// The same for scripts.
    report: Value,
}

/// Checks a proof against the model that was named.
///
/// # Errors
/// It does not hold (exit code 1); it is no proof, or one of another model (exit code 2).
pub fn run(file: &Path, args: &AuditArgs) -> Result<()> {
    let proof = proofs::read(file)?;
    let loaded = Loaded::open(&args.source)?;
    if let Some(differs) = proof.model.differs_from(&loaded.identity()) {
        return Err(usage(format!(
            "{} is about another model than the one given: {differs}; name the right one with --dir or --model",
            file.display()
        )));
    }
    let outcome = match &proof.statement {
        Statement::Inference(inference) => of_inference(args, inference, loaded)?,
        Statement::Evaluation(evaluation) => of_evaluation(args, evaluation, loaded)?,
    };
    tell(args, &proof, &outcome)?;
    if outcome.holds {
        return Ok(());
    }
    Err(anyhow!("the proof does not hold"))
}

fn tell(args: &AuditArgs, proof: &Proof, outcome: &Outcome) -> Result<()> {
    if args.json {
        let mut report = outcome.report.clone();
        report["holds"] = json!(outcome.holds);
        report["why"] = json!(outcome.why);
        report["signer"] = json!(proof.signer);
        report["model_root"] = json!(proof.model.model_root);
        report["round"] = json!(proof.model.round.map(|(_, round)| round));
        return print_json(&report);
    }
    let signed = match proof.signer {
        Some(signer) => format!("signed by peer {signer}"),
        None => "not signed".to_owned(),
    };
    println!("{}, {signed}", what(&proof.model));
    for line in &outcome.lines {
        println!("  {line}");
    }
    let verdict = if outcome.holds { "holds" } else { "does not hold" };
    println!("{verdict}: {}", outcome.why);
    Ok(())
}

/// Which model, for people.
fn what(model: &Identity) -> String {
    let root = model.model_root.short();
    match model.round {
        Some((_, round)) => format!("by the model after round {round} (root {root})"),
        None => format!("by the model with root {root}"),
    }
}

fn of_inference(args: &AuditArgs, inference: &Inference, loaded: Loaded) -> Result<Outcome> {
    let (prompt, answer, options) = (&inference.prompt, &inference.answer, &inference.options);
    let lines = vec![
        format!("prompt: {} tokens, {}", prompt.len(), shown(&loaded.vocabulary, prompt)),
        format!("answer: {} tokens, {}", answer.len(), shown(&loaded.vocabulary, answer)),
        format!(
            "drawn at temperature {}, top-k {}, top-p {}, repetition penalty {}, seed {}",
            options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed
        ),
    ];
    let mut report = json!({
        "kind": "inference", "prompt_ids": prompt, "ids": answer, "prompt": loaded.vocabulary.decode(prompt),
        "text": loaded.vocabulary.decode(answer), "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty, "seed": options.seed, "fingerprint_bytes": inference.fingerprint_bytes(),
    });
    let refused = |why: String, lines: Vec<String>, report: Value| Outcome {
        holds: false,
        why,
        lines,
        report,
    };
    if let Some(asked) = &args.prompt {
        let asked = loaded.vocabulary.encode(asked)?;
        if asked != *prompt {
            let why = format!("the prompt is another than the {} tokens asked for", asked.len());
            return Ok(refused(why, lines, report));
        }
    }
    let loaded = loaded.for_tokens(prompt.len() + answer.len());
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    model.load_flat(&loaded.theta)?;
    let bounds = Bounds::default();
    let found = match inference.check(&model, &bounds) {
        Ok(found) => found,
        Err(error) => return Ok(refused(error.to_string(), lines, report)),
    };
    let (worst, (slack, token)) = (found.worst(), found.slack);
    report["fingerprints"] = json!({
        "count": found.spans.len(), "off": found.spans_off(), "exponents": worst.exponents, "mean": worst.mean, "median": worst.median,
        "overall": found.overall(),
    });
    report["tokens"] = json!({
        "count": found.tokens, "off": found.tokens_off, "first_off": found.token,
        "slack": slack.is_finite().then_some(slack), "slack_at": token,
    });
    report["bounds"] = json!({
        "exponents": bounds.exponents, "mean": bounds.mean, "median": bounds.median, "overall": bounds.overall, "slack": bounds.slack,
    });
    let mut lines = lines;
    lines.push(format!(
        "fingerprints: at most {} of {} exponents differ, and the rest by {:.4} units on average ({} allowed over all)",
        worst.exponents,
        worst.compared,
        found.overall(),
        bounds.overall
    ));
    lines.push(format!(
        "tokens: drawn with a slack of at most {slack:.1e} ({:.0e} allowed)",
        bounds.slack
    ));
    Ok(Outcome {
        holds: found.holds(),
        why: found.explain(),
        lines,
        report,
    })
}

fn of_evaluation(args: &AuditArgs, evaluation: &Evaluation, loaded: Loaded) -> Result<Outcome> {
    let there = evaluation.items();
    let known = inputs(args, evaluation, &loaded)?;
    let seed = match &args.seed {
        Some(words) => words.clone(),
        None => format!("{:016x}", rand::random::<u64>()),
    };
    let loaded = loaded.for_tokens(there.iter().map(|(_, item)| item.input.tokens()).max().unwrap_or(0));
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    model.load_flat(&loaded.theta)?;
    let tolerance = Tolerance::default();
    let found = evaluation.check(
        &model,
        args.sample as usize,
        seed.as_bytes(),
        known.as_deref(),
        &tolerance,
    );
    let (what, total) = match evaluation.total {
        Total::Loss(loss) => ("texts", json!({"loss": loss})),
        Total::Right(right, a_byte) => ("questions", json!({"right": right, "right_a_byte": a_byte})),
    };
    let compared = match found.inputs_compared {
        true => "the inputs that are there were compared with those of the source",
        false => "the inputs were taken as they are: their source is not known here",
    };
    let lines = vec![
        format!(
            "claims {} on {} {what}, {} of them in the file",
            evaluation.total,
            evaluation.count,
            there.len()
        ),
        compared.to_owned(),
        match found.added_up {
            true => format!(
                "{} computed again; which ones: --seed {seed} --sample {}",
                found.checked.len(),
                args.sample
            ),
            false => format!("{} computed again: those that the root drew", found.checked.len()),
        },
        format!(
            "their log likelihoods differ by {:.1e} at most ({:.0e} allowed) and {:.1e} on average ({:.0e} allowed), over the square root of the tokens",
            found.largest, tolerance.one, found.mean, tolerance.mean
        ),
    ];
    let report = json!({
        "kind": "evaluation", "total": total, "items": evaluation.count, "in_file": there.len(), "root": evaluation.root,
        "source": evaluation.source, "seed": seed, "checked": found.checked, "largest": found.largest, "mean": found.mean,
        "added_up": found.added_up, "inputs_compared": found.inputs_compared,
        "tolerance": {"one": tolerance.one, "mean": tolerance.mean},
    });
    Ok(Outcome {
        holds: found.holds(),
        why: found.explain(evaluation.count),
        lines,
        report,
    })
}

/// The inputs that an evaluation should have: of the file of questions that was named, or of the held-out text of the directory that was named, if
/// it is that run's.
///
/// # Errors
/// Another file of questions than the proof's (exit code 2).
fn inputs(args: &AuditArgs, evaluation: &Evaluation, loaded: &Loaded) -> Result<Option<Vec<Input>>> {
    if let Some(file) = &args.tasks {
        let (expected, found) = (evaluation.source, tasks::hash_of(file)?);
        if expected != found {
            return Err(usage(format!(
                "--tasks {}: the proof was made with another file: expected the hash {expected}, found {found}",
                file.display()
            )));
        }
        let items = tasks::read(file, &loaded.vocabulary)?;
        return Ok(Some(items.into_iter().map(Input::Question).collect()));
    }
    if args.source.model.is_some() || evaluation.kind() != Kind::Loss {
        return Ok(None);
    }
    let (root, data) = eval::data_of(&PeerDir::find(args.source.dir.dir.as_deref())?)?;
    if root != evaluation.source {
        return Ok(None);
    }
    let texts = held_out_sequences(&data, evaluation.count as u64);
    Ok(Some(texts.into_iter().map(Input::Text).collect()))
}

/// The beginning of a text, quoted, or of its ids.
fn shown(vocabulary: &Vocabulary, tokens: &[u32]) -> String {
    let cut = |text: String| match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    };
    match vocabulary.decode(tokens) {
        Some(text) => format!("{:?}", cut(text)),
        None => cut(tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        let vocabulary = Vocabulary::own(datasets::TokenizerKind::Bytes);
        let tokens = vocabulary.encode(&"é".repeat(70)).unwrap();
        assert_eq!(shown(&vocabulary, &tokens), format!("{:?}", "é".repeat(60) + "…"));
        assert_eq!(shown(&Vocabulary::None(String::new()), &[7, 8]), "7,8");
    }
}
