//! Proofs of evaluations from end to end: honest machines pass, every lie is found, and the distances of both are printed and held apart.
#![allow(clippy::unwrap_used)]

use coordinatorless::types::Hash;
use coordinatorless::wire::{Keys, Scheme};
use gradient_verify::evaluation::measure::{inputs_of, measure};
use gradient_verify::evaluation::{Evaluation, Flaw, Input, Item, Tolerance, Total};
use gradient_verify::proof::{Identity, Proof, Statement, encode, shape_of};
use proptest::prelude::*;
use tch::Device;
use trainer::config::{Family, ModelConfig, Precision};
use trainer::local::set_threads;
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
        max_seq_len: 96,
        ..ModelConfig::demo()
    }
}

/// Parameters far from their start, so that likelihoods differ.
fn theta(config: &ModelConfig, seed: u64) -> Vec<f32> {
    init_flat(config, seed).iter().map(|value| value * 3.0).collect()
}

fn tokens() -> Vec<u32> {
    (0..120).map(|i| (i * i + 3 * i) % 61).collect()
}

#[test]
fn honest_machines_pass_and_every_lie_is_found() {
    for family in [Family::Llama, Family::Gpt2] {
        for questions in [false, true] {
            let config = config(family);
            let mut model = Model::new(&config, Device::Cpu).unwrap();
            let (own, other) = (theta(&config, 5), theta(&config, 6));
            let near: Vec<f32> = own.iter().zip(&other).map(|(own, other)| own + 1e-4 * other).collect();
            let others = [
                ("another model".to_owned(), other),
                ("a model 1e-4 away".to_owned(), near),
            ];
            let tolerance = Tolerance::default();
            let cases = measure(
                &mut model,
                &own,
                &inputs_of(&tokens(), questions),
                &others,
                2,
                &tolerance,
            )
            .unwrap();
            println!("{family:?}, questions {questions}: largest, mean");
            for case in &cases {
                println!(
                    "{:<50} {:>9.1e} {:>9.1e} {}",
                    case.name, case.largest, case.mean, case.why
                );
                assert!(case.right(), "{family:?}: {case:?}");
                assert!(
                    !case.honest || (case.largest < tolerance.one / 3.0 && case.mean < tolerance.mean / 3.0),
                    "{case:?}"
                );
            }
        }
    }
    set_threads(1);
}

/// Fifty texts of a model, as items, and the model.
fn items(questions: bool) -> (Vec<Item>, Model) {
    // So small a model gains nothing from threads that wait for each other.
    set_threads(1);
    let config = config(Family::Llama);
    let mut model = Model::new(&config, Device::Cpu).unwrap();
    model.load_flat(&theta(&config, 1)).unwrap();
    let shifted = |by: u32| {
        inputs_of(
            &tokens().iter().map(|token| (token + by) % 64).collect::<Vec<_>>(),
            questions,
        )
    };
    let inputs: Vec<Input> = (0..7).flat_map(shifted).take(50).collect();
    let scores = Input::all_scores(&model, &inputs, Precision::Fp32).unwrap();
    let items = inputs
        .into_iter()
        .zip(scores)
        .map(|(input, scores)| Item { input, scores });
    (items.collect(), model)
}

fn identity() -> Identity {
    Identity {
        model_root: Hash([1; 32]),
        shape: shape_of(&config(Family::Llama)),
        tokenizer: Hash([2; 32]),
        round: None,
    }
}

#[test]
fn a_proof_comes_back_whole_and_opened() {
    let keys = Keys::new([9; 32], Scheme::Ed25519);
    for questions in [false, true] {
        let (items, model) = items(questions);
        let inputs: Vec<Input> = items.iter().map(|item| item.input.clone()).collect();
        let whole = Evaluation::new(Hash([3; 32]), items);
        let opened = whole.clone().opened(5);
        assert_eq!(
            (opened.items().len(), opened.root, opened.total),
            (5, whole.root, whole.total)
        );
        let mut lengths = Vec::new();
        for proof in [whole, opened] {
            for keys in [None, Some(&keys)] {
                let statement = Statement::Evaluation(proof.clone());
                let bytes = encode(&identity(), &statement, keys);
                assert_eq!(Proof::decode(&bytes).unwrap().statement, statement);
                lengths.push(bytes.len());
            }
            let report = proof.check(&model, 10, b"mine", Some(&inputs), &Tolerance::default());
            assert!(report.holds(), "{report:?}");
            assert_eq!(report.added_up, proof.items().len() == 50);
            assert_eq!(report.checked.len(), proof.items().len().min(10));
        }
        assert!(lengths[2] * 3 < lengths[0], "{lengths:?}");
    }
}

#[test]
fn a_sample_follows_from_root_and_seed_and_finds_what_it_draws() {
    let (mut items, model) = items(false);
    let check =
        |proof: &Evaluation, sample: usize, seed: &[u8]| proof.check(&model, sample, seed, None, &Tolerance::default());
    let honest = Evaluation::new(Hash::default(), items.clone());
    let drawn = |seed: &[u8]| check(&honest, 10, seed).checked;
    assert_eq!(drawn(b"a"), drawn(b"a"));
    assert_ne!(drawn(b"a"), drawn(b"b"));
    assert_eq!(check(&honest, 99, b"a").checked.len(), 50);
    // A tenth is better than it is: found by ten of fifty items as often as chance has it.
    items.iter_mut().step_by(10).for_each(|item| item.scores[0] *= 0.9);
    let lie = Evaluation::new(Hash::default(), items);
    let finds = |i: &u32| !check(&lie, 10, &i.to_le_bytes()).holds();
    let found = (0..200).filter(finds).count() as f64 / 200.0;
    // 1 - C(45, 10) / C(50, 10)
    assert!((found - 0.689).abs() < 0.12, "{found}");
}

#[test]
fn what_differs_is_named() {
    let (items, model) = items(true);
    let inputs: Vec<Input> = items.iter().map(|item| item.input.clone()).collect();
    let honest = Evaluation::new(Hash([3; 32]), items.clone());
    let check =
        |proof: &Evaluation, inputs: Option<&[Input]>| proof.check(&model, 50, b"", inputs, &Tolerance::default());
    assert!(check(&honest, Some(&inputs)).holds());
    let mut lie = items.clone();
    lie[7].scores[2] -= 0.5;
    let told = check(&Evaluation::new(Hash([3; 32]), lie), None);
    assert!(
        matches!(told.flaw, Some(Flaw::Score { index: 7, which: 2, .. })),
        "{told:?}"
    );
    assert!(
        told.explain(50).contains("item 8") && told.explain(50).contains("choice 3"),
        "{}",
        told.explain(50)
    );
    let mut better = honest.clone();
    better.total = Total::Right(50, 50);
    let told = check(&better, None).explain(50);
    assert!(
        told.contains("add up to") && told.contains("not what is claimed"),
        "{told}"
    );
    let mut others = inputs.clone();
    others.swap(4, 5);
    assert_eq!(check(&honest, Some(&others)).flaw, Some(Flaw::Input { index: 4 }));
    assert_eq!(
        check(&honest, Some(&inputs[..49])).flaw,
        Some(Flaw::Input { index: 49 })
    );
    let mut foreign = items;
    if let Input::Question(question) = &mut foreign[3].input {
        question.question[0] = 64;
    }
    let told = check(&Evaluation::new(Hash([3; 32]), foreign), None);
    assert!(matches!(told.flaw, Some(Flaw::Unreadable { index: 3, .. })), "{told:?}");
}

#[test]
fn a_false_path_or_item_of_an_opened_proof_is_found() {
    let (items, model) = items(false);
    let opened = Evaluation::new(Hash::default(), items).opened(4);
    let bytes = encode(&identity(), &Statement::Evaluation(opened), None);
    // Head and model, kind, loss, source, counts and root; then the first path.
    let first_path = 12 + 97 + 1 + 8 + 32 + 4 + 32 + 4;
    for at in [first_path, first_path + 40, bytes.len() - 9] {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        let Ok(Proof {
            statement: Statement::Evaluation(proof),
            ..
        }) = Proof::decode(&changed)
        else {
            panic!("byte {at} is any");
        };
        assert_eq!(
            proof.check(&model, 4, b"", None, &Tolerance::default()).flaw,
            Some(Flaw::Root),
            "byte {at}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_what_it_reads_has_one_encoding(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        early in any::<bool>(),
        which in 0..4_usize,
    ) {
        static BYTES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        let all = BYTES.get_or_init(|| {
            let mut all = Vec::new();
            for questions in [false, true] {
                let whole = Evaluation::new(Hash([3; 32]), items(questions).0[..6].to_vec());
                for proof in [whole.clone().opened(2), whole] {
                    all.push(encode(&identity(), &Statement::Evaluation(proof), None));
                }
            }
            all
        });
        let mut changed = all[which].clone();
        // Most bytes are tokens, of which any will do; the head is where it gets strict.
        let within = if early { 220.min(changed.len()) } else { changed.len() };
        for (at, value) in edits {
            changed[at.index(within)] = value;
        }
        if let Ok(proof) = Proof::decode(&changed) {
            if proof.signer.is_none() {
                prop_assert_eq!(encode(&proof.model, &proof.statement, None), changed);
            }
            if let Statement::Evaluation(evaluation) = proof.statement {
                let model = Model::new(&config(Family::Llama), Device::Cpu).unwrap();
                let _ = evaluation.check(&model, 2, b"", None, &Tolerance::default());
            }
        }
    }
}
