//! `murmur eval`: how well a model reads, and what it expects next.

use std::path::Path;

use anyhow::{Context, Result, bail};
use coordinatorless::types::Hash;
use datasets::Dataset;
use gradient_verify::evaluation::{Evaluation, Input, Item, Total};
use gradient_verify::proof::Statement;
use serde_json::{Value, json};
use trainer::config::Precision;
use trainer::eval::{Reading, read};
use trainer::model::Model;

use super::generate::{Speaker, tokens_of};
use super::{print_json, tasks};
use crate::cli::EvalArgs;
use crate::device::device;
use crate::failure::usage;
use crate::held_out::{HeldOut, bits_per_byte, held_out_sequences};
use crate::loaded::Loaded;
use crate::peer_dir::PeerDir;
use crate::proofs::{self, Written};
use crate::vocabulary::Vocabulary;

/// Reads what was given, or the run's held-out data.
pub fn run(args: &EvalArgs) -> Result<()> {
    if let Some(file) = &args.tasks {
        return tasks::run(args, file);
    }
    if let Some(file) = &args.prove {
        return prove_loss(args, file);
    }
    match &args.text {
        None if args.ids.is_empty() => held_out(args),
        text => on_tokens(args, text.as_deref()),
    }
}

/// Loss on a text, on ids or on held-out data, and a proof of it.
fn prove_loss(args: &EvalArgs, file: &Path) -> Result<()> {
    let loaded = Loaded::open(&args.source)?;
    let (source, texts) = match &args.text {
        None if args.ids.is_empty() => held_out_texts(args)?,
        text => (
            Hash::default(),
            vec![tokens_of(&loaded.vocabulary, text.as_deref(), &args.ids)?],
        ),
    };
    let (evaluation, written) = prove(args, file, loaded, source, texts.into_iter().map(Input::Text).collect())?;
    if args.json {
        let Total::Loss(loss) = evaluation.total else {
            unreachable!("texts add up to a loss")
        };
        return print_json(&json!({
            "loss": loss, "perplexity": loss.exp(), "sequences": evaluation.count, "root": evaluation.root, "proof": written.report(),
        }));
    }
    let texts = if evaluation.count == 1 { "text" } else { "texts" };
    println!("{} on {} {texts}", evaluation.total, evaluation.count);
    eprintln!("{written}");
    Ok(())
}

/// The held-out sequences of a peer's directory that are read, and the root of its data.
fn held_out_texts(args: &EvalArgs) -> Result<(Hash, Vec<Vec<u32>>)> {
    let dir = held_out_dir(args)?;
    let (root, data) = data_of(&dir)?;
    let all = data.held_out_sequences().max(1);
    Ok((root, held_out_sequences(&data, args.sequences.clamp(1, all))))
}

/// A peer's data by its root.
///
/// # Errors
/// Damaged.
pub fn data_of(dir: &PeerDir) -> Result<(Hash, Dataset)> {
    let root = dir.run_config()?.data.manifest;
    let data = Dataset::open(&dir.data(), &root.0).context("the run's data in this directory cannot be used")?;
    Ok((root, data))
}

/// Evaluates `inputs` and writes the proof.
///
/// # Errors
/// Inputs that the model does not read (exit code 2), or likelihoods that are no numbers.
pub fn prove(
    args: &EvalArgs,
    file: &Path,
    loaded: Loaded,
    source: Hash,
    inputs: Vec<Input>,
) -> Result<(Evaluation, Written)> {
    let identity = loaded.identity();
    let loaded = loaded.for_tokens(inputs.iter().map(Input::tokens).max().unwrap_or(0));
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    model.load_flat(&loaded.theta)?;
    let scores = Input::all_scores(&model, &inputs, Precision::Fp32).map_err(usage)?;
    if let Some(item) = scores
        .iter()
        .position(|scores| !scores.iter().all(|score| score.is_finite()))
    {
        bail!(
            "the likelihood of item {} is not a finite number; the model's parameters are broken",
            item + 1
        );
    }
    let items = inputs.into_iter().zip(scores);
    let evaluation = Evaluation::new(source, items.map(|(input, scores)| Item { input, scores }).collect());
    let kept = match args.open {
        Some(open) => evaluation.opened(open as usize),
        None => evaluation,
    };
    let statement = Statement::Evaluation(kept);
    let written = proofs::write(file, &identity, &statement, &args.source)?;
    match statement {
        Statement::Evaluation(evaluation) => Ok((evaluation, written)),
        Statement::Inference(_) => unreachable!("an evaluation was made"),
    }
}

/// Loss on the held-out data of a peer's directory.
fn held_out(args: &EvalArgs) -> Result<()> {
    let dir = held_out_dir(args)?;
    let mut speaker = Speaker::open(&dir, Some(&args.device))?;
    let (_, data) = data_of(&dir)?;
    let sequences = args.sequences.clamp(1, data.held_out_sequences().max(1));
    let HeldOut { loss, bits_per_byte } = speaker.held_out(&data, sequences)?;
    let round = speaker.stamp.map(|stamp| stamp.round);
    if args.json {
        return print_json(
            &json!({"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits_per_byte, "sequences": sequences, "round": round}),
        );
    }
    println!(
        "loss {loss:.4} nats per token (perplexity {:.2}, {bits_per_byte:.4} bits per byte) on {sequences} held-out sequences",
        loss.exp()
    );
    Ok(())
}

fn held_out_dir(args: &EvalArgs) -> Result<PeerDir> {
    if args.source.model.is_some() {
        return Err(usage(
            "eval --model: give a TEXT or --ids to read; only a peer's directory has held-out data",
        ));
    }
    PeerDir::find(args.source.dir.dir.as_deref())
}

fn on_tokens(args: &EvalArgs, text: Option<&str>) -> Result<()> {
    let loaded = Loaded::open(&args.source)?;
    let tokens = tokens_of(&loaded.vocabulary, text, &args.ids)?;
    let context = loaded.config.max_seq_len;
    if tokens.len() > context {
        let found = tokens.len();
        return Err(usage(format!(
            "eval: {found} tokens, but the model reads {context}; shorten the text"
        )));
    }
    let loaded = loaded.for_tokens(tokens.len());
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    let reading = read(&mut model, &loaded.theta, &tokens).map_err(usage)?;
    let next: Vec<Next> = likeliest(&reading.next, args.top)
        .into_iter()
        .map(|(id, logit, probability)| Next {
            id,
            logit,
            probability,
            text: loaded.vocabulary.decode(&[id]),
        })
        .collect();
    if args.json {
        return print_json(&report(args, &tokens, &reading, &loaded.vocabulary, &next));
    }
    print!("{} tokens", tokens.len());
    if let Some(loss) = reading.loss {
        print!(", loss {loss:.4} nats per token (perplexity {:.2}", loss.exp());
        if let Some(bits) = bits_of(&loaded.vocabulary, &tokens, loss) {
            print!(", {bits:.4} bits per byte");
        }
        print!(")");
    }
    println!();
    for one in next {
        let text = one.text.map(|text| format!("{text:?}")).unwrap_or_default();
        println!(
            "{:>8}  {:>8.3}  {:>6.2}%  {text}",
            one.id,
            one.logit,
            100.0 * one.probability
        );
    }
    if let Vocabulary::None(why) = &loaded.vocabulary {
        println!("ids only: {why}");
    }
    Ok(())
}

/// One of the likeliest next tokens.
struct Next {
    id: u32,
    logit: f32,
    probability: f64,
    text: Option<String>,
}

/// Bits per byte of what was predicted: all but the first token; `None` where its text is not known.
fn bits_of(vocabulary: &Vocabulary, tokens: &[u32], loss: f64) -> Option<f64> {
    let predicted = tokens.get(1..)?;
    let bytes = vocabulary.decode(predicted)?.len();
    Some(bits_per_byte(loss, predicted.len(), bytes))
}

fn report(args: &EvalArgs, tokens: &[u32], reading: &Reading, vocabulary: &Vocabulary, next: &[Next]) -> Value {
    let next: Vec<Value> = next
        .iter()
        .map(|one| json!({"id": one.id, "text": one.text, "logit": one.logit, "probability": one.probability}))
        .collect();
    let mut report =
        json!({"ids": tokens, "loss": reading.loss, "perplexity": reading.loss.map(f64::exp), "next": next});
    if let Some(bits) = reading.loss.and_then(|loss| bits_of(vocabulary, tokens, loss)) {
        report["bits_per_byte"] = json!(bits);
    }
    if args.logits {
        report["logits"] = json!(reading.logits);
    }
    report
}

/// The `count` highest of `scores`: index, score, and probability among all.
fn likeliest(scores: &[f32], count: usize) -> Vec<(u32, f32, f64)> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    let best = order.first().map_or(0.0, |&id| f64::from(scores[id as usize]));
    let weight = |score: f32| (f64::from(score) - best).exp();
    let total: f64 = scores.iter().map(|&score| weight(score)).sum();
    let told = |id: u32| (id, scores[id as usize], weight(scores[id as usize]) / total);
    order.into_iter().take(count).map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_with_their_share() {
        let found = likeliest(&[0.0, 2.0, 1.0], 2);
        assert_eq!((found[0].0, found[1].0, found.len()), (1, 2, 2));
        let total = 1.0 + 1.0_f64.exp() + 2.0_f64.exp();
        assert!((found[0].2 - 2.0_f64.exp() / total).abs() < 1e-12);
    }
}
