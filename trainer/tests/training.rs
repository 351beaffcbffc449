//! The trainer as others see it: a round learns, repeats itself bit for bit, stops when told, and refuses what it cannot use.
#![allow(clippy::unwrap_used)]

use tch::{Device, Tensor};
use trainer::config::{Family, InnerState, ModelConfig, OptimizerKind, RopeScaling, TrainingConfig};
use trainer::eval::validation_loss;
use trainer::generate::{GenerateOptions, generate};
use trainer::local::{LocalError, LocalRound, RoundInputs, local_round, set_threads, trace_root};
use trainer::model::{Layout, Model, init_flat};

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 64,
        dim: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        ffn: 64,
        max_seq_len: 32,
        ..ModelConfig::demo()
    }
}

fn training(kind: OptimizerKind, steps: u32) -> TrainingConfig {
    let mut training = TrainingConfig {
        seq_len: 16,
        batch_sequences: 4,
        max_inner_steps: steps,
        ..TrainingConfig::default()
    };
    training.optimizer.kind = kind;
    training.optimizer.lr = 5e-3;
    training.schedule.warmup_tokens = 0;
    training
}

/// Four sequences of 17 tokens, other ones for another `salt`.
fn batch(salt: u32) -> Vec<Vec<u32>> {
    (0..4)
        .map(|i| (0..17).map(|j| (salt + i * 31 + j * j * (i + 3) + j) % 64).collect())
        .collect()
}

/// A round from `theta` with no limit of time and a fresh optimizer.
fn round(
    training: &TrainingConfig,
    theta: &[f32],
    batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
) -> Result<LocalRound, LocalError> {
    round_with(training, theta, &[], batches)
}

fn round_with(
    training: &TrainingConfig,
    theta: &[f32],
    state: &[f32],
    batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
) -> Result<LocalRound, LocalError> {
    set_threads(1);
    let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
    let (mut keep_going, mut observe) = (|_| true, |_, _| ());
    let inputs = RoundInputs {
        theta,
        state,
        global_tokens: 0,
        batches,
        keep_going: &mut keep_going,
        observe: &mut observe,
    };
    local_round(&mut model, training, inputs)
}

fn trained(theta: &[f32], round: &LocalRound) -> Vec<f32> {
    theta
        .iter()
        .zip(&round.delta)
        .map(|(theta, delta)| theta - delta)
        .collect()
}

#[test]
fn with_carry_many_rounds_are_one_long_one() {
    for kind in [OptimizerKind::Muon, OptimizerKind::AdamW, OptimizerKind::Sgd] {
        let mut training = training(kind, 5);
        training.optimizer.state = InnerState::Carry;
        let start = init_flat(&tiny(), 1);
        let run = |training: &TrainingConfig, rounds: u32, carried: bool| {
            let (mut theta, mut state, mut first) = (start.clone(), Vec::new(), 0);
            for _ in 0..rounds {
                let mut batches = |step| Some(batch(first + step));
                let round = round_with(training, &theta, &state, &mut batches).unwrap();
                first += round.steps;
                theta = trained(&theta, &round);
                if carried {
                    state = round.state;
                }
            }
            theta
        };
        let long = run(
            &TrainingConfig {
                max_inner_steps: 20,
                ..training.clone()
            },
            1,
            true,
        );
        let apart = |theta: Vec<f32>| theta.iter().zip(&long).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let (carried, reset) = (apart(run(&training, 4, true)), apart(run(&training, 4, false)));
        assert!(carried < 1e-4, "{kind:?}: {carried:e}");
        assert!(reset > 10.0 * carried && reset > 1e-3, "{kind:?}: {reset:e} without");
    }
}

#[test]
fn a_state_of_another_optimizer_is_refused() {
    let mut training = training(OptimizerKind::AdamW, 2);
    training.optimizer.state = InnerState::Carry;
    let theta = init_flat(&tiny(), 1);
    let expected = training.carried(&tiny());
    let error = round_with(&training, &theta, &vec![0.0; expected - 1], &mut |_| Some(batch(0))).unwrap_err();
    let told = format!("an optimizer state of {} numbers, expected {expected}", expected - 1);
    assert!(error.to_string().contains(&told), "{error}");
    training.optimizer.state = InnerState::Reset;
    assert_eq!(training.carried(&tiny()), 0);
    assert!(
        round(&training, &theta, &mut |_| Some(batch(0)))
            .unwrap()
            .state
            .is_empty()
    );
}

#[test]
fn one_batch_is_learnt_by_heart_and_recited() {
    for kind in [OptimizerKind::Muon, OptimizerKind::AdamW] {
        let theta = init_flat(&tiny(), 1);
        let result = round(&training(kind, 150), &theta, &mut |_| Some(batch(0))).unwrap();
        assert!((result.first_loss - 64.0_f64.ln()).abs() < 0.1, "{}", result.first_loss);
        assert!(result.last_loss < 0.05, "{kind:?}: {}", result.last_loss);
        let theta = trained(&theta, &result);
        let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
        assert!(validation_loss(&mut model, &theta, &batch(0)).unwrap() < 0.05);
        let options = GenerateOptions {
            max_tokens: 15,
            temperature: 0.0,
            ..GenerateOptions::default()
        };
        let mut told = Vec::new();
        let recited = generate(&mut model, &theta, &batch(0)[1][..2], &options, &mut |token| {
            told.push(token)
        })
        .unwrap();
        assert_eq!(recited, batch(0)[1][2..]);
        assert_eq!(told, recited);
    }
}

#[test]
fn the_same_round_twice_gives_the_same_bits() {
    let theta = init_flat(&tiny(), 2);
    let run = || round(&training(OptimizerKind::Muon, 6), &theta, &mut |step| Some(batch(step))).unwrap();
    let first = run();
    assert_eq!(first, run());
    assert_eq!((first.steps, first.tokens, first.trace.len()), (6, 6 * 4 * 16, 6));
    assert_eq!(first.trace_root, trace_root(&first.trace));
}

#[test]
fn another_batch_in_the_last_step_changes_only_the_last_leaf() {
    let theta = init_flat(&tiny(), 2);
    let honest = round(&training(OptimizerKind::Muon, 4), &theta, &mut |step| Some(batch(step))).unwrap();
    let swapped = round(&training(OptimizerKind::Muon, 4), &theta, &mut |step| {
        Some(batch(step / 3 * 9 + step % 3))
    })
    .unwrap();
    assert_eq!(honest.trace[..3], swapped.trace[..3]);
    assert_ne!(honest.trace[3], swapped.trace[3]);
    assert_ne!(honest.trace_root, swapped.trace_root);
}

#[test]
fn a_round_ends_when_time_or_batches_run_out() {
    let theta = init_flat(&tiny(), 3);
    let short = round(&training(OptimizerKind::AdamW, 9), &theta, &mut |step| {
        (step < 2).then(|| batch(step))
    })
    .unwrap();
    assert_eq!(short.steps, 2);
    let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
    let mut seen = Vec::new();
    let inputs = RoundInputs {
        theta: &theta,
        state: &[],
        global_tokens: 0,
        batches: &mut |step| Some(batch(step)),
        keep_going: &mut |done| done < 3,
        observe: &mut |step, loss| seen.push((step, loss)),
    };
    let timed = local_round(&mut model, &training(OptimizerKind::AdamW, 9), inputs).unwrap();
    assert_eq!((timed.steps, timed.tokens), (3, 3 * 64));
    assert_eq!(seen.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 1, 2]);
    assert!((timed.mean_loss - seen.iter().map(|(_, loss)| loss).sum::<f64>() / 3.0).abs() < 1e-12);
    let none = round(&training(OptimizerKind::AdamW, 9), &theta, &mut |_| None);
    assert!(matches!(none, Err(LocalError::NoBatch)));
}

#[test]
fn what_cannot_be_trained_on_is_refused_with_its_step() {
    let theta = init_flat(&tiny(), 3);
    let config = training(OptimizerKind::Muon, 3);
    let mut foreign = batch(0);
    foreign[2][5] = 64;
    let result = round(&config, &theta, &mut |step| {
        Some(if step == 1 { foreign.clone() } else { batch(step) })
    });
    assert!(matches!(
        result,
        Err(LocalError::Token {
            step: 1,
            found: 64,
            vocab_size: 64
        })
    ));
    let result = round(&config, &theta, &mut |_| Some(batch(0)[..3].to_vec()));
    assert_eq!(
        result.unwrap_err().to_string(),
        "step 0: the batch is 3 sequences of 17 tokens, expected 4 sequences of 17 tokens"
    );
    let mut broken = theta.clone();
    broken[Layout::new(&tiny()).norms.start] = f32::INFINITY;
    let result = round(&config, &broken, &mut |_| Some(batch(0)));
    assert!(matches!(
        result,
        Err(LocalError::NonFinite {
            step: 0,
            what: "loss",
            ..
        })
    ));
    let result = round(&config, &theta[1..], &mut |_| Some(batch(0)));
    assert!(matches!(result, Err(LocalError::Model(_))));
}

/// Copies the rows of every key and value head `times` times, heads apart, so that each query head has its own.
fn repeat_heads(grouped: &ModelConfig, full: &ModelConfig, flat: &[f32]) -> Vec<f32> {
    let times = full.kv_heads / grouped.kv_heads;
    let head = grouped.head_dim() * grouped.dim;
    let mut out = Vec::with_capacity(full.param_count());
    for entry in Layout::new(grouped).entries {
        let values = &flat[entry.offset..entry.offset + entry.len];
        if entry.name.contains("k_proj") || entry.name.contains("v_proj") {
            out.extend(
                values
                    .chunks(head)
                    .flat_map(|rows| std::iter::repeat_n(rows, times).flatten()),
            );
        } else {
            out.extend(values);
        }
    }
    out
}

#[test]
fn grouped_queries_equal_repeated_key_and_value_heads() {
    let (grouped, full) = (tiny(), ModelConfig { kv_heads: 4, ..tiny() });
    let flat = init_flat(&grouped, 9);
    let tokens = Tensor::from_slice(&[3_i64, 1, 4, 1, 5, 9, 2, 6, 5, 3]).view([2, 5]);
    let logits = |config: &ModelConfig, flat: &[f32]| {
        let mut model = Model::new(config, Device::Cpu).unwrap();
        model.load_flat(flat).unwrap();
        tch::no_grad(|| model.logits(&tokens))
    };
    let difference = logits(&grouped, &flat) - logits(&full, &repeat_heads(&grouped, &full, &flat));
    assert!(difference.abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn a_token_never_sees_its_future() {
    let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
    model.load_flat(&init_flat(&tiny(), 4)).unwrap();
    let logits = |tokens: &[i64]| tch::no_grad(|| model.logits(&Tensor::from_slice(tokens).view([1, -1])));
    let difference = (logits(&[1, 2, 3, 4]) - logits(&[1, 2, 3, 63]))
        .abs()
        .amax([0_i64, 2].as_slice(), false); // [4]
    let at = |place| difference.double_value(&[place]);
    assert!(
        at(0) < 1e-6 && at(1) < 1e-6 && at(2) < 1e-6 && at(3) > 1e-4,
        "{difference}"
    );
}

#[test]
fn every_family_learns_under_either_optimizer() {
    set_threads(1);
    let of = |family| ModelConfig {
        family,
        kv_heads: if family == Family::Gpt2 { 4 } else { 2 },
        ..tiny()
    };
    let shapes = [
        ModelConfig {
            rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }),
            ..of(Family::Llama)
        },
        of(Family::Qwen2),
        ModelConfig {
            head_dim: Some(12),
            ..of(Family::Qwen3)
        },
        of(Family::Gpt2),
    ];
    for shape in shapes {
        for kind in [OptimizerKind::Muon, OptimizerKind::AdamW] {
            let theta = init_flat(&shape, 1);
            let mut model = Model::new(&shape, Device::Cpu).unwrap();
            let inputs = RoundInputs {
                theta: &theta,
                state: &[],
                global_tokens: 0,
                batches: &mut |_| Some(batch(1)),
                keep_going: &mut |_| true,
                observe: &mut |_, _| (),
            };
            let learnt = local_round(&mut model, &training(kind, 25), inputs).unwrap();
            let (first, last) = (learnt.first_loss, learnt.last_loss);
            assert!(
                (first - 64.0_f64.ln()).abs() < 0.2 && last < 0.7 * first,
                "{shape:?} {kind:?}: {first} {last}"
            );
            // Every parameter that can matter moved: a piece read from the wrong place would leave another untouched. A key's bias
            // shifts all scores of a query alike, which softmax does not see; embeddings of tokens that were not met stay.
            for entry in Layout::new(&shape)
                .entries
                .iter()
                .filter(|entry| !entry.name.contains("embed"))
            {
                let moved = learnt.delta[entry.offset..entry.offset + entry.len]
                    .iter()
                    .any(|x| *x != 0.0);
                assert!(
                    moved || entry.name.ends_with("k_proj.bias"),
                    "{shape:?} {kind:?}: {} stood still",
                    entry.name
                );
            }
        }
    }
}
