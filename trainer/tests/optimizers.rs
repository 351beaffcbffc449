//! The inner optimizers against PyTorch's own, over a hundred steps: `benches/optimizer_fixture.py` says how the fixture was made, and what
//! it leaves out of PyTorch's Muon (one cast to bfloat16).
#![allow(clippy::unwrap_used)]

use serde::Deserialize;
use tch::{Device, Tensor};
use trainer::config::{ModelConfig, OptimizerConfig, OptimizerKind, Precision};
use trainer::optimizer::Optimizer;

/// Every third parameter after a hundred steps.
#[derive(Deserialize)]
struct Fixture {
    torch: String,
    adamw: Vec<f64>,
    sgd: Vec<f64>,
    muon: Vec<f64>,
}

fn model() -> ModelConfig {
    ModelConfig {
        vocab_size: 8,
        dim: 8,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ffn: 8,
        tied_embeddings: true,
        ..ModelConfig::demo()
    }
}

fn initial(i: i64) -> f32 {
    ((i * 37 + 11) % 64 - 32) as f32 / 64.0
}

fn gradient(step: i64, i: i64) -> f32 {
    ((i * 29 + step * 53 + i * i * (step + 3) % 31) % 128 - 64) as f32 / 256.0
}

/// Largest difference from PyTorch's parameters after the fixture's steps.
fn largest_difference(kind: OptimizerKind, expected: &[f64]) -> f64 {
    let config = OptimizerConfig {
        kind,
        weight_decay: 0.125,
        beta1: 0.9,
        beta2: 0.95,
        momentum: 0.95,
        eps: 1e-8,
        ..OptimizerConfig::default()
    };
    let (model, count) = (model(), model().param_count() as i64);
    let mut theta = Tensor::from_slice(&(0..count).map(initial).collect::<Vec<_>>());
    let mut optimizer = Optimizer::new(&config, Precision::Fp32, &model, Device::Cpu);
    for step in 0..100 {
        let gradient: Vec<f32> = (0..count).map(|i| gradient(step, i)).collect();
        // Scaled by a power of two and back: clipping is part of the step.
        optimizer
            .step(&mut theta, &(Tensor::from_slice(&gradient) * 4.0), 0.25, 1.0 / 256.0)
            .unwrap();
    }
    assert_eq!(expected.len(), (count as usize).div_ceil(3));
    let found = |i: usize| theta.double_value(&[3 * i as i64]);
    expected
        .iter()
        .enumerate()
        .map(|(i, expected)| (found(i) - expected).abs())
        .fold(0.0, f64::max)
}

#[test]
fn a_hundred_steps_end_where_pytorchs_do() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/optimizers.json")).unwrap();
    assert_eq!(fixture.torch, "2.13.0");
    for (kind, expected) in [
        (OptimizerKind::AdamW, &fixture.adamw),
        (OptimizerKind::Sgd, &fixture.sgd),
        (OptimizerKind::Muon, &fixture.muon),
    ] {
        let difference = largest_difference(kind, expected);
        assert!(difference < 1e-6, "{kind:?}: {difference:e} from PyTorch");
        // Not by standing still: the steps moved the parameters far more than that.
        let moved = (0..)
            .step_by(3)
            .zip(expected)
            .map(|(i, x)| (f64::from(initial(i)) - x).abs());
        assert!(moved.fold(0.0, f64::max) > 1e-2, "{kind:?}");
    }
}
