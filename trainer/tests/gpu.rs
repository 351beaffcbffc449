//! On a CUDA device: gradients, rounds and sums are those of the CPU, within what each precision may differ by. Without one, each test says so and
//! passes.
#![allow(clippy::unwrap_used)]

use tch::Device;
use trainer::config::{Family, ModelConfig, OptimizerKind, Precision, TrainingConfig};
use trainer::eval::validation_loss;
use trainer::local::{LocalRound, RoundInputs, local_round};
use trainer::model::{Model, init_flat};

/// Whether there is a GPU; says so if not.
fn gpu() -> bool {
    let there = trainer::device::gpus() > 0;
    if !there {
        println!("skipped: {}", trainer::device::why_no_gpu());
    }
    there
}

fn model(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        vocab_size: 512,
        dim: 128,
        layers: 3,
        heads: 4,
        kv_heads: if family == Family::Gpt2 { 4 } else { 2 },
        ffn: 256,
        max_seq_len: 128,
        ..ModelConfig::demo()
    }
}

fn training(kind: OptimizerKind, precision: Precision) -> TrainingConfig {
    let mut training = TrainingConfig {
        seq_len: 128,
        batch_sequences: 8,
        max_inner_steps: 15,
        precision,
        ..TrainingConfig::default()
    };
    training.optimizer.kind = kind;
    training.optimizer.lr = 2e-3;
    training.schedule.warmup_tokens = 0;
    training
}

fn batch(step: u32) -> Vec<Vec<u32>> {
    let token = |i: u32, j: u32| (step * 17 + i * 31 + j * j * (i + 3) + j) % 97 * 5;
    (0..8).map(|i| (0..129).map(|j| token(i, j)).collect()).collect()
}

fn round(config: &ModelConfig, training: &TrainingConfig, device: Device) -> LocalRound {
    let mut model = Model::new(config, device).unwrap();
    let inputs = RoundInputs {
        theta: &init_flat(config, 1),
        state: &[],
        global_tokens: 0,
        batches: &mut |step| Some(batch(step)),
        keep_going: &mut |_| true,
        observe: &mut |_, _| (),
    };
    local_round(&mut model, training, inputs).unwrap()
}

/// `|a - b| / |b|`
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn a_round_on_a_gpu_is_that_of_the_cpu_within_its_precision() {
    if !gpu() {
        return;
    }
    for family in [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gpt2] {
        for kind in [OptimizerKind::Muon, OptimizerKind::AdamW, OptimizerKind::Sgd] {
            for (precision, bound) in [
                (Precision::Fp32, 1e-3),
                (Precision::Tf32, 2e-2),
                (Precision::Bf16, 2e-1),
            ] {
                let (config, training) = (model(family), training(kind, precision));
                let here = round(&config, &training, Device::Cpu);
                let there = round(&config, &training, Device::Cuda(0));
                let again = round(&config, &training, Device::Cuda(0));
                let (apart, own) = (
                    distance(&there.delta, &here.delta),
                    distance(&there.delta, &again.delta),
                );
                println!(
                    "{family:?} {kind:?} {precision:?}: loss {:.4} and {:.4}, apart {apart:.1e}, from its own repetition {own:.1e}",
                    here.last_loss, there.last_loss
                );
                assert!(apart < bound, "{family:?} {kind:?} {precision:?}: {apart:e}");
            }
        }
    }
}

#[test]
fn the_loss_on_a_gpu_is_that_of_the_cpu() {
    if !gpu() {
        return;
    }
    for family in [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gpt2] {
        let config = model(family);
        let theta = init_flat(&config, 2);
        let loss = |device| validation_loss(&mut Model::new(&config, device).unwrap(), &theta, &batch(0)).unwrap();
        let (here, there) = (loss(Device::Cpu), loss(Device::Cuda(0)));
        assert!((here - there).abs() < 1e-5 * here, "{family:?}: {here} {there}");
    }
}

#[cfg(feature = "nccl")]
#[test]
fn ranks_on_gpus_get_the_sum() {
    use tch::{Kind, Tensor};
    use trainer::collective::Collective;
    use trainer::collective::nccl::Nccl;

    if !gpu() {
        return;
    }
    let devices: Vec<usize> = (0..trainer::device::gpus()).collect();
    let ranks = match Nccl::group(&devices) {
        Ok(ranks) => ranks,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let size = ranks.len() as i64;
    println!("{size} ranks");
    let sum = move |rank: Nccl| {
        let own = (Kind::Float, Device::Cuda(rank.rank()));
        for _ in 0..20 {
            let brought = Tensor::arange(100_000, own) * (rank.rank() as i64 + 1);
            let mut sum = brought.copy();
            rank.sum(&mut sum).unwrap();
            assert_eq!(sum, Tensor::arange(100_000, own) * (size * (size + 1) / 2));
        }
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || sum(rank))).collect();
        all.into_iter().for_each(|one| one.join().unwrap());
    });
}
