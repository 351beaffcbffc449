//! `murmur bench proofs`: how far honest machines and cheats are from a proof of an inference and of an evaluation, with a model of your own.
//!
//! Besides what [`gradient_verify::inference::measure`] does in this process, the text is written by processes of its own that are kept to older
//! instructions, which is honest other hardware on one machine.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use gradient_verify::evaluation::measure::inputs_of;
use gradient_verify::evaluation::{self, Tolerance};
use gradient_verify::inference::measure::{Case, Subject, measure};
use gradient_verify::inference::{Bounds, Inference};
use gradient_verify::proof::Statement;
use serde_json::json;
use trainer::config::{OptimizerKind, TrainingConfig};
use trainer::generate::GenerateOptions;
use trainer::local::{RoundInputs, local_round, set_threads};
use trainer::model::{Model, init_flat};

use super::print_json;
use crate::cli::BenchProofsArgs;
use crate::device::{device, threads};
use crate::failure::usage;
use crate::loaded::Loaded;
use crate::proofs;

/// Instructions that libtorch's own kernels, those of MKL and those of oneDNN are kept to: values of `ATEN_CPU_CAPABILITY`, `MKL_CBWR` and
/// `ONEDNN_MAX_CPU_ISA` on x86-64.
const CAPABILITIES: [[&str; 3]; 3] = [
    ["default", "COMPATIBLE", "SSE41"],
    ["avx2", "AVX2", "AVX2"],
    ["avx512", "AUTO", "ALL"],
];
/// Learning rates of the step of training that follows.
const STEPS: [f64; 3] = [1e-3, 1e-4, 1e-5];

/// Measures, prints the table, and fails if a case is judged wrongly.
pub fn run(args: &BenchProofsArgs) -> Result<()> {
    let loaded = Loaded::open(&args.source)?;
    let prompt = loaded.vocabulary.encode(&args.prompt)?;
    if prompt.len() < 2 {
        return Err(usage("the prompt has 1 token at most; give at least 2"));
    }
    let loaded = loaded.for_tokens(prompt.len() + args.max_tokens as usize);
    let threads = threads(args.threads)?;
    set_threads(threads);
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens as usize,
        temperature: args.temperature,
        ..GenerateOptions::default()
    };
    let others = others(&mut model, &loaded, &prompt)?;
    let subject = Subject {
        theta: &loaded.theta,
        prompt: &prompt,
        options: &options,
        others: &others,
        threads,
    };
    let bounds = Bounds::default();
    let mut cases = measure(&mut model, &subject, &bounds).map_err(usage)?;
    model.load_flat(&loaded.theta)?;
    let mut text = Vec::new();
    for capability in CAPABILITIES {
        let proof = elsewhere(args, capability)?;
        let report = proof.check(&model, &bounds)?;
        let [aten, ..] = capability;
        cases.push(Case::new(format!("honest: kernels up to {aten}"), true, &report));
        text = [&proof.prompt[..], &proof.answer[..]].concat();
    }
    let mut evaluations = Vec::new();
    for (what, questions) in [("texts", false), ("questions", true)] {
        let inputs = inputs_of(&text, questions);
        let tolerance = Tolerance::default();
        let found = evaluation::measure::measure(&mut model, &loaded.theta, &inputs, &others, threads, &tolerance);
        evaluations.extend(found.map_err(usage)?.into_iter().map(|case| (what, case)));
    }
    tell(args, &bounds, &cases, &evaluations)?;
    let wrong = cases.iter().filter(|case| !case.right()).count();
    let wrong = wrong + evaluations.iter().filter(|(_, case)| !case.right()).count();
    match wrong {
        0 => Ok(()),
        wrong => bail!(
            "{wrong} of {} cases were judged wrongly",
            cases.len() + evaluations.len()
        ),
    }
}

/// Models that someone might use instead: of another seed, and this one after a step of training on the prompt.
fn others(model: &mut Model, loaded: &Loaded, prompt: &[u32]) -> Result<Vec<(String, Vec<f32>)>> {
    let mut others = vec![(
        "another model of the same shape".to_owned(),
        init_flat(&loaded.config, 1),
    )];
    for lr in STEPS {
        let mut training = TrainingConfig {
            seq_len: prompt.len() - 1,
            batch_sequences: 1,
            max_inner_steps: 1,
            ..TrainingConfig::default()
        };
        training.schedule.warmup_tokens = 0;
        (training.optimizer.kind, training.optimizer.lr) = (OptimizerKind::AdamW, lr);
        let inputs = RoundInputs {
            theta: &loaded.theta,
            state: &[],
            global_tokens: 0,
            batches: &mut |_| Some(vec![prompt.to_vec()]),
            keep_going: &mut |_| true,
            observe: &mut |_, _| (),
        };
        let delta = local_round(model, &training, inputs)
            .context("a step of training failed")?
            .delta;
        let moved = loaded
            .theta
            .iter()
            .zip(delta)
            .map(|(theta, delta)| theta - delta)
            .collect();
        others.push((format!("one step of AdamW later, at a rate of {lr:.0e}"), moved));
    }
    Ok(others)
}

/// The same text, written by a process that is kept to the instructions of `capability`.
fn elsewhere(args: &BenchProofsArgs, [aten, mkl, onednn]: [&str; 3]) -> Result<Inference> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("proof");
    let mut command = Command::new(std::env::current_exe().context("where this program lies is not known")?);
    command
        .arg("generate")
        .arg(&args.prompt)
        .arg("--prove")
        .arg(&file)
        .arg("--json");
    command.args([
        "--max-tokens",
        &args.max_tokens.to_string(),
        "--temperature",
        &args.temperature.to_string(),
    ]);
    command.args(["--device", &args.device]);
    let mut path = |option: &str, path: &Option<std::path::PathBuf>| {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    };
    path("--dir", &args.source.dir.dir);
    path("--model", &args.source.model);
    let status = command
        .env("ATEN_CPU_CAPABILITY", aten)
        .env("MKL_CBWR", mkl)
        .env("ONEDNN_MAX_CPU_ISA", onednn)
        .stdout(Stdio::null())
        .status();
    let status = status.context("this program cannot be started again")?;
    if !status.success() {
        bail!("`generate` with ATEN_CPU_CAPABILITY={aten} ended with {status}");
    }
    inference(&file)
}

fn inference(file: &Path) -> Result<Inference> {
    match proofs::read(file)?.statement {
        Statement::Inference(inference) => Ok(inference),
        Statement::Evaluation(_) => bail!("`generate` wrote another proof than that of an inference"),
    }
}

fn tell(
    args: &BenchProofsArgs,
    bounds: &Bounds,
    cases: &[Case],
    evaluations: &[(&str, evaluation::measure::Case)],
) -> Result<()> {
    if args.json {
        let row = |case: &Case| {
            json!({
                "case": case.name, "honest": case.honest, "holds": case.holds, "exponents": case.worst.exponents,
                "compared": case.worst.compared, "mean": case.worst.mean, "median": case.worst.median, "overall": case.overall,
                "fingerprints_off": case.spans.0, "fingerprints": case.spans.1,
                "slack": case.slack.is_finite().then_some(case.slack), "tokens_off": case.tokens.0, "tokens": case.tokens.1,
            })
        };
        let rows: Vec<_> = cases.iter().map(row).collect();
        let evaluation = |(what, case): &(&str, evaluation::measure::Case)| {
            json!({
                "of": what, "case": case.name, "honest": case.honest, "holds": case.holds, "largest": case.largest, "mean": case.mean,
                "why": case.why,
            })
        };
        let evaluations_ok = evaluations.iter().all(|(_, case)| case.right());
        let ok = cases.iter().all(Case::right) && evaluations_ok;
        return print_json(&json!({
            "ok": ok, "rows": rows, "evaluations": evaluations.iter().map(evaluation).collect::<Vec<_>>(),
            "bounds": {"exponents": bounds.exponents, "mean": bounds.mean, "median": bounds.median, "overall": bounds.overall, "slack": bounds.slack},
        }));
    }
    println!(
        "{:<78} {:>9} {:>8} {:>6} {:>8} {:>8} {:>9} {:>8}",
        "farthest fingerprint:", "exponents", "mean", "median", "overall", "off", "slack", "off"
    );
    for case in cases {
        println!(
            "{:<78} {:>9} {:>8.4} {:>6.1} {:>8.4} {:>8} {:>9.1e} {:>8}  {}{}",
            case.name,
            format!("{}/{}", case.worst.exponents, case.worst.compared),
            case.worst.mean,
            case.worst.median,
            case.overall,
            format!("{}/{}", case.spans.0, case.spans.1),
            case.slack,
            format!("{}/{}", case.tokens.0, case.tokens.1),
            if case.holds { "holds" } else { "refused" },
            if case.right() { "" } else { "  WRONG" }
        );
    }
    println!(
        "allowed: {:.0}% of the exponents, mean {}, median {}, overall {}, slack {:.0e}",
        100.0 * bounds.exponents,
        bounds.mean,
        bounds.median,
        bounds.overall,
        bounds.slack
    );
    println!(
        "\n{:<78} {:>9} {:>9}",
        "likelihoods, by the square root of their tokens:", "largest", "mean"
    );
    for (what, case) in evaluations {
        println!(
            "{:<78} {:>9.1e} {:>9.1e}  {}{}",
            format!("{what}: {}", case.name),
            case.largest,
            case.mean,
            if case.holds { "holds" } else { "refused" },
            if case.right() { "" } else { "  WRONG" }
        );
    }
    let tolerance = Tolerance::default();
    println!("allowed: {:.0e}, mean {:.0e}", tolerance.one, tolerance.mean);
    Ok(())
}
