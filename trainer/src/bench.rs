//! How fast the trainer is and what memory it takes: tokens per second of the ordinary inner step, beside the arithmetic peak measured on the
//! same machine, and the process' peak memory beside the one predicted.
//!
//! The work per step is that of any PyTorch loop over the same decoder: forward, backward, clip, AdamW, on random tokens. Only the step
//! is timed, as `murmur bench trainer` promises, and the median over the steps after the warm-up is told.

use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::config::{ModelConfig, OptimizerConfig, OptimizerKind, Precision, TrainingConfig};
use crate::kernels::product;
use crate::local::{LocalError, Stepper, set_threads};
use crate::memory;
use crate::model::autograd::allow_tf32;
use crate::model::{Model, init_flat};

/// Steps run before any is counted.
const WARM_UP: usize = 3;

/// A row that has taken this long, and counted [`FEWEST`] steps, ends.
const LONGEST: Duration = Duration::from_secs(60);
const FEWEST: usize = 3;

/// What is trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BenchShape {
    /// Width.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Feed-forward width.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
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
            kv_heads: 8,
            ffn: 688,
            vocab: 256,
            tied: false,
            seq: 256,
            batch: 8,
        }
    }
}

impl BenchShape {
    /// The shapes measured where none is asked for: a small model of bytes, one whose vocabulary weighs as much as its blocks, and that of
    /// SmolLM2-135M.
    pub fn standard() -> [Self; 3] {
        let vocabulary = Self {
            dim: 512,
            layers: 8,
            heads: 8,
            kv_heads: 8,
            ffn: 1376,
            vocab: 50_257,
            tied: false,
            seq: 512,
            batch: 4,
        };
        let smol = Self {
            dim: 576,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            ffn: 1536,
            vocab: 49_152,
            tied: true,
            seq: 512,
            batch: 1,
        };
        [Self::default(), vocabulary, smol]
    }

    /// The model of this shape.
    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            vocab_size: self.vocab,
            dim: self.dim,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            ffn: self.ffn,
            max_seq_len: self.seq,
            tied_embeddings: self.tied,
            ..ModelConfig::demo()
        }
    }

    /// AdamW at a constant rate.
    fn training(&self, precision: Precision) -> TrainingConfig {
        TrainingConfig {
            precision,
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
    /// `fp32` or `bf16`.
    pub precision: &'static str,
    /// Threads of libtorch.
    pub threads: usize,
    /// Median over the counted steps.
    pub tokens_per_sec: f64,
    /// Billions of floating-point operations a second that this amounts to, by [`ModelConfig::flops_per_token_at`].
    pub gflops: f64,
    /// `gflops` over the measured peak of this precision.
    pub peak_share: f64,
    /// `cpu`, or `cuda:N`.
    pub device: String,
    /// Most memory the process held, bytes, not counting that of other devices; 0 where the system does not tell.
    pub peak_mem_bytes: u64,
    /// What was predicted: what the process held before, and what [`memory::Need`] says.
    pub predicted_mem_bytes: u64,
}

/// The best rate of large matrix products, billions of floating-point operations a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// Single precision.
    pub fp32_gflops: f64,
    /// Single precision with factors in TF32; the same where the device has no such thing.
    pub tf32_gflops: f64,
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

/// Measures the peak, then each shape in each precision.
///
/// # Errors
/// A shape out of bounds, or too little memory.
pub fn bench_report(
    shapes: &[BenchShape],
    precisions: &[Precision],
    device: Device,
    threads: usize,
    steps: usize,
) -> Result<TrainerReport, LocalError> {
    let peak = measure_peak(device, threads);
    // Before the first row: what the allocator keeps of one row, the next one uses.
    let held = memory::resident().unwrap_or(0);
    let each = shapes
        .iter()
        .flat_map(|shape| precisions.iter().map(move |precision| (shape, *precision)));
    let rows = each
        .map(|(shape, precision)| row(shape, precision, (device, threads), steps, (peak.of(precision), held)))
        .collect::<Result<_, _>>()?;
    Ok(TrainerReport { peak, rows })
}

impl Peak {
    fn of(&self, precision: Precision) -> f64 {
        match precision {
            Precision::Fp32 => self.fp32_gflops,
            Precision::Tf32 => self.tf32_gflops,
            Precision::Bf16 => self.bf16_gflops,
        }
    }
}

fn row(
    shape: &BenchShape,
    precision: Precision,
    (device, threads): (Device, usize),
    steps: usize,
    (peak_gflops, held): (f64, u64),
) -> Result<TrainerRow, LocalError> {
    set_threads(threads);
    let (config, training) = (shape.model(), shape.training(precision));
    training.validate_with(&config)?;
    memory::forget_peak();
    let predicted_mem_bytes = held + memory::Need::of_training(&config, &training).total();
    let mut model = Model::new(&config, device)?;
    model.load_flat(&init_flat(&config, 0))?;
    let mut stepper = Stepper::new(&model, &training, training.optimizer.lr)?;
    let began = Instant::now();
    let mut seconds = Vec::with_capacity(steps);
    for step in 0..WARM_UP + steps.max(1) {
        let batch = random_batch(shape, step as u64);
        let start = Instant::now();
        stepper.step(&mut model, &batch)?;
        wait_for(device);
        if step >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
        if seconds.len() >= FEWEST && began.elapsed() > LONGEST {
            break;
        }
    }
    let tokens_per_sec = (shape.batch * shape.seq) as f64 / median(&mut seconds);
    let gflops = tokens_per_sec * config.flops_per_token_at(shape.seq) as f64 / 1e9;
    Ok(TrainerRow {
        shape: shape.clone(),
        precision: precision.name(),
        device: match device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".to_owned(),
        },
        threads,
        tokens_per_sec,
        gflops,
        peak_share: gflops / peak_gflops,
        peak_mem_bytes: memory::peak().unwrap_or(0),
        predicted_mem_bytes,
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

/// Measures products of square matrices (of 1024 rows on a CPU at `threads` threads, of 8192 elsewhere), the best of several, in each precision,
/// by libtorch's operator and as the trainer multiplies.
pub fn measure_peak(device: Device, threads: usize) -> Peak {
    set_threads(threads);
    let side: i64 = if device == Device::Cpu { 1024 } else { 8192 };
    let best = |kind, tf32| {
        allow_tf32(tf32);
        let a = Tensor::randn([side, side], (Kind::Float, device)).to_kind(kind);
        let out = a.zeros_like();
        let seconds = (0..16).map(|i| {
            let start = Instant::now();
            let done = match i % 2 {
                0 => a.f_matmul(&a).map(drop),
                _ => product(&out, &a, &a, false),
            };
            if done.is_err() {
                return f64::INFINITY;
            }
            wait_for(device);
            start.elapsed().as_secs_f64()
        });
        2.0 * (side as f64).powi(3) / seconds.fold(f64::INFINITY, f64::min) / 1e9
    };
    Peak {
        fp32_gflops: best(Kind::Float, false),
        tf32_gflops: best(Kind::Float, true),
        bf16_gflops: best(Kind::BFloat16, false),
    }
}

/// Returns when the device has done what it was given.
fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
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
            kv_heads: 1,
            ffn: 64,
            vocab: 64,
            tied: true,
            seq: 16,
            batch: 2,
        };
        let row = row(&shape, Precision::Bf16, (Device::Cpu, 1), 2, (100.0, 0)).unwrap();
        assert_eq!((row.precision, row.threads), ("bf16", 1));
        let flops = shape.model().flops_per_token_at(16) as f64;
        assert!((row.gflops - row.tokens_per_sec * flops / 1e9).abs() < 1e-9 * row.gflops);
        assert_eq!(row.peak_share, row.gflops / 100.0);
    }
}
