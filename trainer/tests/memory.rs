//! Memory that a local round takes, predicted and measured, each case in a process of its own: what one leaves behind would be counted with the next.
#![allow(clippy::unwrap_used)]

use tch::Device;
use trainer::config::{ModelConfig, OptimizerKind, Precision, TrainingConfig};
use trainer::local::{RoundInputs, local_round, set_threads};
use trainer::memory::{Need, forget_peak, peak, resident};
use trainer::model::{Model, init_flat};

/// Names the case that a process is to measure.
const CASE: &str = "MURMUR_TEST_MEMORY_CASE";

/// Trains two steps; the most that the process held.
fn measured(config: &ModelConfig, training: &TrainingConfig) -> u64 {
    let batch: Vec<Vec<u32>> = (0..training.batch_sequences)
        .map(|i| {
            (0..=training.seq_len)
                .map(|j| ((i * 31 + j * j) % config.vocab_size) as u32)
                .collect()
        })
        .collect();
    let theta = init_flat(config, 1);
    forget_peak();
    let mut model = Model::new(config, Device::Cpu).unwrap();
    let inputs = RoundInputs {
        theta: &theta,
        state: &[],
        global_tokens: 0,
        batches: &mut |step| (step < 2).then(|| batch.clone()),
        keep_going: &mut |_| true,
        observe: &mut |_, _| (),
    };
    local_round(&mut model, training, inputs).unwrap();
    peak().unwrap()
}

#[test]
fn the_prediction_is_within_a_seventh_of_what_is_measured() {
    if resident().is_none() {
        return; // only Linux tells
    }
    set_threads(1); // what threads take of their own is small, and a busy machine is slow with more
    let base = ModelConfig {
        vocab_size: 256,
        dim: 256,
        layers: 4,
        heads: 8,
        kv_heads: 8,
        ffn: 688,
        max_seq_len: 256,
        ..ModelConfig::demo()
    };
    let training = |kind, batch_sequences, precision, recompute| {
        let mut training = TrainingConfig {
            seq_len: 256,
            batch_sequences,
            max_inner_steps: 2,
            precision,
            recompute,
            ..TrainingConfig::default()
        };
        training.optimizer.kind = kind;
        training
    };
    let vocabulary = ModelConfig {
        vocab_size: 32_000,
        kv_heads: 2,
        layers: 2,
        tied_embeddings: false,
        ..base.clone()
    };
    let cases = [
        (
            "activations",
            &base,
            training(OptimizerKind::AdamW, 16, Precision::Fp32, false),
        ),
        (
            "recomputed",
            &base,
            training(OptimizerKind::AdamW, 32, Precision::Fp32, true),
        ),
        (
            "bf16",
            &base,
            training(OptimizerKind::AdamW, 16, Precision::Bf16, false),
        ),
        (
            "vocabulary",
            &vocabulary,
            training(OptimizerKind::AdamW, 4, Precision::Fp32, false),
        ),
        ("muon", &base, training(OptimizerKind::Muon, 16, Precision::Fp32, false)),
    ];
    if let Ok(case) = std::env::var(CASE) {
        let (_, config, training) = cases.iter().find(|(name, ..)| *name == case).unwrap();
        // A small run first: it loads code and starts threads, which is not what is predicted.
        let tiny = ModelConfig {
            dim: 32,
            layers: 1,
            vocab_size: 256,
            ..base.clone()
        };
        let small = TrainingConfig {
            batch_sequences: 1,
            ..training.clone()
        };
        measured(&tiny, &small);
        let before = resident().unwrap();
        println!("\nmeasured {}", measured(config, training) - before);
        return;
    }
    for (name, config, training) in &cases {
        // The agreed parameters and a round's result, the pseudo-gradient, are there beside all else.
        let predicted = Need::of_training(config, training).total() + 8 * config.param_count() as u64;
        let measured = measured_apart(name);
        let off = predicted as f64 / measured as f64 - 1.0;
        let told = format!(
            "{name}: predicted {predicted}, measured {measured} bytes ({:+.1}%)",
            100.0 * off
        );
        println!("{told}");
        assert!(off.abs() < 0.15, "{told}");
    }
}

/// Runs this test once more in another process, to measure one case.
fn measured_apart(case: &str) -> u64 {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_prediction_is_within_a_seventh_of_what_is_measured",
            "--nocapture",
        ])
        .env(CASE, case)
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    let figure = told.lines().find_map(|line| line.strip_prefix("measured "));
    figure
        .unwrap_or_else(|| panic!("{case}: {told}"))
        .trim()
        .parse()
        .unwrap()
}
