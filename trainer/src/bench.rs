//! How fast the trainer is: tokens per second of the ordinary inner step, beside the arithmetic peak measured on the same machine.
//!
//! The work per step is that of any PyTorch loop over the same decoder: forward, backward, clip, AdamW, on random tokens. Only the step
//! is timed, as `murmur bench trainer` promises, and the median over the steps after the warm-up is told.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, OptimizerConfig, OptimizerKind, TrainingConfig};
use crate::local::{LocalError, Stepper, set_threads};
use crate::model::{Model, init_flat};

/// Steps run before any is counted.
const WARM_UP: usize = 5;

/// What is trained: an untied decoder without grouped queries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BenchShape {
    /// Width.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Feed-forward width.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Tokens predicted per sequence.
    pub seq: usize,
    /// Sequences per step.
    pub batch: usize,
}

impl Default for BenchShape {
    /// About 4.9M parameters.
    fn default() -> Self {
        Self {
            dim: 256,
            layers: 6,
            heads: 8,
            ffn: 688,
            vocab: 256,
            seq: 256,
            batch: 8,
        }
    }
}

impl BenchShape {
    /// The model of this shape.
    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: self.vocab,
            dim: self.dim,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.heads,
            ffn: self.ffn,
            max_seq_len: self.seq,
            tied_embeddings: false,
            ..ModelConfig::demo()
        }
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig {
            optimizer: OptimizerConfig {
                kind: OptimizerKind::AdamW,
                lr: 3e-4,
                ..OptimizerConfig::default()
            },
            seq_len: self.seq,
            batch_sequences: self.batch,
            ..TrainingConfig::default()
        }
    }
}

/// One measured shape.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainerRow {
    /// What was trained.
    pub shape: BenchShape,
    /// `fp32`.
    pub precision: &'static str,
    /// Threads of libtorch.
    pub threads: usize,
    /// Median over the counted steps.
    pub tokens_per_sec: f64,
    /// Billions of floating-point operations a second that this amounts to, by [`ModelConfig::flops_per_token_at`].
    pub gflops: f64,
    /// `gflops` over the measured peak of this precision.
    pub peak_share: f64,
    /// Most memory the process has held, bytes; 0 where the system does not tell.
    pub peak_mem_bytes: u64,
}

/// The best rate of large matrix products, billions of floating-point operations a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// Single precision.
    pub fp32_gflops: f64,
    /// bfloat16.
    pub bf16_gflops: f64,
}

/// What `murmur bench trainer --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainerReport {
    /// Of this machine, at the same threads.
    pub peak: Peak,
    /// A row per shape.
    pub rows: Vec<TrainerRow>,
}

/// Measures the peak, then each shape.
///
/// # Errors
/// A shape out of bounds, or libtorch out of memory.
pub fn bench_report(shapes: &[BenchShape], threads: usize, steps: usize) -> Result<TrainerReport, LocalError> {
    let peak = measure_peak(threads);
    let rows = shapes
        .iter()
        .map(|shape| row(shape, threads, steps, peak.fp32_gflops))
        .collect::<Result<_, _>>()?;
    Ok(TrainerReport { peak, rows })
}

/// Trains a model of `shape` for `steps` counted steps (at least one) after the warm-up.
///
/// # Errors
/// A shape out of bounds, or libtorch out of memory.
pub fn bench_trainer(shape: &BenchShape, threads: usize, steps: usize) -> Result<TrainerRow, LocalError> {
    row(shape, threads, steps, measure_peak(threads).fp32_gflops)
}

fn row(shape: &BenchShape, threads: usize, steps: usize, peak_gflops: f64) -> Result<TrainerRow, LocalError> {
    set_threads(threads);
    let (config, training) = (shape.model(), shape.training());
    training.validate_with(&config)?;
    let mut model = Model::new(&config, Device::Cpu)?;
    model.load_flat(&init_flat(&config, 0))?;
    let mut stepper = Stepper::new(&model, &training, training.optimizer.lr)?;
    let mut seconds = Vec::with_capacity(steps);
    for step in 0..WARM_UP + steps.max(1) {
        let batch = random_batch(shape, step as u64);
        let start = Instant::now();
        stepper.step(&mut model, &batch)?;
        if step >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let tokens_per_sec = (shape.batch * shape.seq) as f64 / median(&mut seconds);
    let gflops = tokens_per_sec * config.flops_per_token_at(shape.seq) as f64 / 1e9;
    Ok(TrainerRow {
        shape: shape.clone(),
        precision: "fp32",
        threads,
        tokens_per_sec,
        gflops,
        peak_share: gflops / peak_gflops,
        peak_mem_bytes: peak_memory(),
    })
}

/// Uniform tokens, the same for the same step.
fn random_batch(shape: &BenchShape, step: u64) -> Vec<Vec<u32>> {
    let mut stream = blake3::Hasher::new().update(&step.to_le_bytes()).finalize_xof();
    let mut bytes = vec![0; 4 * (shape.seq + 1)];
    let mut sequence = || {
        stream.fill(&mut bytes);
        let (fours, _) = bytes.as_chunks::<4>();
        fours
            .iter()
            .map(|four| (u32::from_le_bytes(*four) as usize % shape.vocab) as u32)
            .collect()
    };
    (0..shape.batch).map(|_| sequence()).collect()
}

/// Measures products of 1024 by 1024 matrices at `threads` threads, the best of several, in both precisions.
pub fn measure_peak(threads: usize) -> Peak {
    set_threads(threads);
    let best = |kind| {
        let a = Tensor::ones([1024, 1024], (kind, Device::Cpu));
        let seconds = (0..8).map(|_| {
            let start = Instant::now();
            let _ = a.matmul(&a);
            start.elapsed().as_secs_f64()
        });
        2.0 * 1024.0_f64.powi(3) / seconds.fold(f64::INFINITY, f64::min) / 1e9
    };
    Peak {
        fp32_gflops: best(Kind::Float),
        bf16_gflops: best(Kind::BFloat16),
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        (values[middle - 1] + values[middle]) / 2.0
    } else {
        values[middle]
    }
}

/// `VmHWM` of this process, which Linux counts in KiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_row_recounts_its_own_figures() {
        let shape = BenchShape {
            dim: 32,
            layers: 1,
            heads: 2,
            ffn: 64,
            vocab: 64,
            seq: 16,
            batch: 2,
        };
        let row = row(&shape, 1, 2, 100.0).unwrap();
        let flops = shape.model().flops_per_token_at(16) as f64;
        assert!((row.gflops - row.tokens_per_sec * flops / 1e9).abs() < 1e-9 * row.gflops);
        assert_eq!(row.peak_share, row.gflops / 100.0);
    }
}
