//! Proofs of inferences from end to end: honest machines pass, every cheat is found, the distances of both are printed and held apart, and hostile
//! bytes are refused.
#![allow(clippy::unwrap_used)]

use coordinatorless::types::Hash;
use coordinatorless::wire::{Keys, Scheme};
use gradient_verify::inference::measure::{Case, Subject, measure};
use gradient_verify::inference::{Bounds, Inference};
use gradient_verify::proof::{Identity, Proof, ProofError, Statement, encode, shape_of};
use proptest::prelude::*;
use tch::Device;
use trainer::config::{Family, ModelConfig, TrainingConfig};
use trainer::generate::GenerateOptions;
use trainer::local::{RoundInputs, local_round, set_threads};
use trainer::model::{Model, init_flat};

fn config(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        vocab_size: 64,
        dim: 64,
        layers: 2,
        heads: 4,
        kv_heads: if family.has_rope() { 2 } else { 4 },
        ffn: 128,
        max_seq_len: 192,
        ..ModelConfig::demo()
    }
}

/// A round of eight steps on sequences that can be learnt; the pseudo-gradient taken off in full.
fn trained(model: &mut Model, theta: &[f32], round: u32) -> Vec<f32> {
    let mut training = TrainingConfig {
        seq_len: 32,
        batch_sequences: 4,
        max_inner_steps: 8,
        ..TrainingConfig::default()
    };
    training.schedule.warmup_tokens = 0;
    let token = |step: u32, i: u32, j: u32| (round * 7 + step * 13 + i * 31 + j * (3 + i)) % 61;
    let mut batches = |step| Some((0..4).map(|i| (0..33).map(|j| token(step, i, j)).collect()).collect());
    let inputs = RoundInputs {
        theta,
        state: &[],
        global_tokens: 0,
        batches: &mut batches,
        keep_going: &mut |_| true,
        observe: &mut |_, _| (),
    };
    let delta = local_round(model, &training, inputs).unwrap().delta;
    theta.iter().zip(delta).map(|(theta, delta)| theta - delta).collect()
}

fn prompt() -> Vec<u32> {
    (0..45).map(|i| (i * i + 3) % 61).collect()
}

fn row(case: &Case) -> String {
    format!(
        "{:<72} {:>4} {:>8.4} {:>6.1} {:>9.5} {:>3}/{:<3} {:>9.2e} {:>3}/{:<3} {}",
        case.name,
        case.worst.exponents,
        case.worst.mean,
        case.worst.median,
        case.overall,
        case.spans.0,
        case.spans.1,
        case.slack,
        case.tokens.0,
        case.tokens.1,
        if case.holds { "holds" } else { "refused" }
    )
}

#[test]
fn honest_machines_pass_and_every_cheat_is_found() {
    let settings = [(0.0, 1.0, 1.0), (0.9, 0.95, 1.1)];
    for (family, settings) in [
        (Family::Llama, &settings[..]),
        (Family::Qwen3, &settings[..1]),
        (Family::Gpt2, &settings[1..]),
    ] {
        for &(temperature, top_p, repetition_penalty) in settings {
            let config = config(family);
            let mut model = Model::new(&config, Device::Cpu).unwrap();
            let mut theta = init_flat(&config, 5);
            for round in 0..3 {
                theta = trained(&mut model, &theta, round);
            }
            let others = [
                ("another seed".to_owned(), init_flat(&config, 6)),
                ("one round later".to_owned(), trained(&mut model, &theta, 3)),
            ];
            let options = GenerateOptions {
                max_tokens: 70,
                temperature,
                top_p,
                repetition_penalty,
                ..GenerateOptions::default()
            };
            let subject = Subject {
                theta: &theta,
                prompt: &prompt(),
                options: &options,
                others: &others,
                threads: 2,
            };
            let cases = measure(&mut model, &subject, &Bounds::default()).unwrap();
            println!(
                "{family:?}, temperature {temperature}: exponents, mean, median, overall, fingerprints off, slack, tokens off"
            );
            cases.iter().for_each(|case| println!("{}", row(case)));
            for case in &cases {
                assert!(case.right(), "{family:?}: {}", row(case));
            }
            // Not only on its side of the bounds, but well within it.
            let honest = cases.iter().filter(|case| case.honest);
            assert!(honest.clone().count() >= 6);
            for case in honest {
                assert!(
                    case.overall < Bounds::default().overall / 3.0 && case.slack < Bounds::default().slack / 3.0,
                    "{}",
                    row(case)
                );
            }
        }
    }
    set_threads(1);
}

/// A proof by a model at its start, the model, and what names it.
fn proven(max_tokens: usize) -> (Identity, Inference, Model) {
    // So small a model gains nothing from threads that wait for each other.
    set_threads(1);
    let config = config(Family::Llama);
    let mut model = Model::new(&config, Device::Cpu).unwrap();
    let options = GenerateOptions {
        max_tokens,
        ..GenerateOptions::default()
    };
    let theta = init_flat(&config, 1);
    let inference = Inference::prove(&mut model, &theta, &prompt(), &options, &mut |_| ()).unwrap();
    let identity = Identity {
        model_root: Hash([1; 32]),
        shape: shape_of(&config),
        tokenizer: Hash([2; 32]),
        round: Some((3, 12)),
    };
    (identity, inference, model)
}

#[test]
fn a_proof_is_as_small_as_it_says_and_comes_back_whole() {
    let (model, inference, _) = proven(65);
    // The prompt's 45 tokens and the answer's 64 that were read: two fingerprints each.
    assert_eq!(inference.fingerprint_bytes(), 4 * 258);
    let keys = Keys::new([9; 32], Scheme::Ed25519);
    let statement = Statement::Inference(inference);
    for keys in [None, Some(&keys)] {
        let bytes = encode(&model, &statement, keys);
        // Head, signature, model, settings, tokens, fingerprints.
        let signature = if keys.is_some() { 96 } else { 0 };
        assert_eq!(
            bytes.len(),
            12 + signature + 109 + 40 + 4 * (1 + 45) + 4 * (1 + 65) + 4 * 258
        );
        let proof = Proof::decode(&bytes).unwrap();
        assert_eq!((proof.signer, proof.model), (keys.map(Keys::id), model));
        assert_eq!(proof.statement, statement);
    }
}

#[test]
fn a_signed_proof_that_was_changed_anywhere_is_refused() {
    let (model, inference, _) = proven(3);
    let keys = Keys::new([9; 32], Scheme::Ed25519);
    let bytes = encode(&model, &Statement::Inference(inference), Some(&keys));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert!(Proof::decode(&changed).is_err(), "byte {at}");
        assert!(Proof::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(Proof::decode(&longer), Err(ProofError::Signature { .. })));
    let mut other = bytes.clone();
    other[12..44].copy_from_slice(&Keys::new([8; 32], Scheme::Ed25519).id().0);
    assert!(matches!(Proof::decode(&other), Err(ProofError::Signature { .. })));
}

#[test]
fn wrong_bytes_are_named() {
    let (model, inference, _) = proven(3);
    let bytes = encode(&model, &Statement::Inference(inference), None);
    let told = |at: usize, value: u8| {
        let mut changed = bytes.clone();
        changed[at] = value;
        Proof::decode(&changed).unwrap_err().to_string()
    };
    assert!(told(0, b'X').contains("not a proof"));
    assert!(told(8, 9).contains("version 9"));
    assert!(told(10, 77).contains("the kind is 77"));
    assert!(told(11, 2).contains("0 or 1"));
    // The highest byte of the temperature, which is below zero then.
    assert!(told(12 + 109 + 7, 0xff).contains("the settings: temperature is -"));
    let longer = [&bytes[..], &[0]].concat();
    assert!(
        Proof::decode(&longer)
            .unwrap_err()
            .to_string()
            .contains("1 bytes follow")
    );
    assert!(Proof::decode(b"hello").unwrap_err().to_string().contains("hello"));
    // A count far beyond what is there asks for no memory.
    let prompt_at = 12 + 109 + 40;
    let mut huge = bytes.clone();
    huge[prompt_at..prompt_at + 4].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    assert!(
        Proof::decode(&huge)
            .unwrap_err()
            .to_string()
            .contains("the prompt: expected 4194304 more bytes")
    );
    huge[prompt_at..prompt_at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(
        Proof::decode(&huge)
            .unwrap_err()
            .to_string()
            .contains("the prompt is 4294967295")
    );
}

#[test]
fn a_proof_that_no_such_model_could_have_made_is_refused() {
    let (_, mut inference, model) = proven(3);
    let check = |inference: &Inference| inference.check(&model, &Bounds::default());
    assert!(check(&inference).unwrap().holds());
    inference.answer[1] = 64;
    assert!(
        check(&inference)
            .unwrap_err()
            .to_string()
            .contains("token 64 in a vocabulary of 64")
    );
    inference.answer[1] = 1;
    inference.prompt = vec![0; 500];
    assert!(
        check(&inference)
            .unwrap_err()
            .to_string()
            .contains("at most 193 tokens")
    );
    let wider = ModelConfig {
        dim: 128,
        ..config(Family::Llama)
    };
    let (_, inference, _) = proven(3);
    let told = inference.check(&Model::new(&wider, Device::Cpu).unwrap(), &Bounds::default());
    assert!(told.unwrap_err().to_string().contains("width 64; this one's is 128"));
}

#[test]
fn another_model_is_told_apart_by_its_name() {
    let (identity, ..) = proven(2);
    assert_eq!(identity.differs_from(&identity), None);
    let later = Identity {
        model_root: Hash([7; 32]),
        round: Some((3, 13)),
        ..identity
    };
    let told = identity.differs_from(&later).unwrap();
    assert!(
        told.contains("(after round 12)") && told.contains("(after round 13)"),
        "{told}"
    );
    let turned = ModelConfig {
        rope_theta: 5000.0,
        ..config(Family::Llama)
    };
    let longer = ModelConfig {
        max_seq_len: 100,
        ..config(Family::Llama)
    };
    assert_ne!(shape_of(&turned), identity.shape);
    assert_eq!(shape_of(&longer), identity.shape);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_what_it_reads_has_one_encoding(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        static BYTES: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let bytes = BYTES.get_or_init(|| {
            let (model, inference, _) = proven(3);
            encode(&model, &Statement::Inference(inference), None)
        });
        let mut changed = bytes.clone();
        for (at, value) in edits {
            let at = at.index(changed.len());
            changed[at] = value;
        }
        if cuts {
            changed.truncate(cut.index(changed.len()));
        }
        if let Ok(proof) = Proof::decode(&changed) {
            if proof.signer.is_none() {
                prop_assert_eq!(encode(&proof.model, &proof.statement, None), changed);
            }
            // Whatever it claims, a check ends in a report or an error.
            let model = Model::new(&config(Family::Llama), Device::Cpu).unwrap();
            if let Statement::Inference(inference) = proof.statement {
                drop(inference.check(&model, &Bounds::default()));
            }
        }
    }
}
