//! Every way of training together learns, is the same again when run again, and survives what it should.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Mutex;

use datasets::{Dataset, PrepareOptions, prepare};
use trainer::aggregate::{Rule, Weighted, aggregate_by};
use trainer::arms::{agreed_layout, algorithm};
use trainer::bench_algorithms::{
    Arm, Attack, Bench, Data, Kind, Plan, Preset, Progress, Report, Series, Setting, Task, Trouble, simulate,
};
use trainer::checkpoint::{from_safetensors, model_root, to_safetensors};
use trainer::compress::{Codec, Quantizer};
use trainer::config::{ModelConfig, OptimizerKind, TrainingConfig, Way};
use trainer::model::init_flat;

/// A language that can be learned in seconds: a few words in a fixed grammar.
fn text(folder: &tempfile::TempDir) -> PathBuf {
    let words = [
        "light ", "over ", "the ", "slow ", "river ", "and ", "under ", "stones ",
    ];
    let mut state = 7u32;
    let sentence = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!(
            "{}{}{}\n",
            words[(state >> 29) as usize],
            words[2],
            words[(state >> 26 & 7) as usize]
        )
    };
    let path = folder.path().join("text.txt");
    std::fs::write(&path, (0..6000).map(sentence).collect::<String>()).unwrap();
    path
}

fn data(folder: &tempfile::TempDir) -> Data {
    // libtorch's threads would wait for one another when many tests run at once.
    trainer::local::set_threads(1);
    let out = folder.path().join("data");
    let options = PrepareOptions {
        seq_len: 32,
        held_out_permille: 50,
        ..PrepareOptions::default()
    };
    let manifest = prepare(&[text(folder)], &out, &options).unwrap();
    Data::new(Dataset::open(&out, &manifest.root()).unwrap(), 1, 20)
}

fn setting() -> Setting {
    Setting {
        model: "demo".to_owned(),
        workers: 3,
        inner_steps: 5,
        batch_sequences: 2,
        seq_len: 32,
        rounds: 6,
        precision: trainer::config::Precision::Fp32,
        seed: 1,
        momentum: None,
    }
}

fn task(kind: Kind, lr: f64, trouble: Trouble) -> Task {
    Task {
        setting: setting(),
        arm: "arm".to_owned(),
        kind,
        lr,
        trouble,
    }
}

fn sparse() -> Kind {
    Kind::Sparse {
        optimizer: OptimizerKind::Muon,
        carry: false,
        accumulator: true,
        k: 256,
        k_last: None,
        beta: 0.95,
        outer_rate: 2.0,
        outer_momentum: 0.0,
        quantizer: Quantizer::Sign,
    }
}

/// As many values on the whole, most of them in the first rounds.
fn thinning() -> Kind {
    match sparse() {
        Kind::Sparse {
            optimizer,
            carry,
            accumulator,
            beta,
            outer_rate,
            outer_momentum,
            quantizer,
            ..
        } => Kind::Sparse {
            optimizer,
            carry,
            accumulator,
            k: 448,
            k_last: Some(64),
            beta,
            outer_rate,
            outer_momentum,
            quantizer,
        },
        other => other,
    }
}

#[test]
fn fewer_values_are_sent_in_later_rounds_where_the_run_says_so() {
    let task = task(thinning(), 4e-3, Trouble::default());
    let training = task.training();
    let model = ModelConfig::demo();
    let way = algorithm(&model, &training).unwrap();
    let params = model.param_count();
    let delta: Vec<f32> = (0..params).map(|i| ((i * 37 % 1001) as f32 - 500.0) * 1e-4).collect();
    let len = |round: u64| {
        let codec = way.codec_of(round);
        let shards = codec.encode(&vec![0.0; params], &delta).unwrap().shards;
        codec.check(&shards).unwrap();
        // Another round's codec takes none of it: the number of values is agreed, not told.
        assert!(way.codec_of(round + 1).check(&shards).is_err() || round >= 6, "{round}");
        shards.iter().map(Vec::len).sum::<usize>()
    };
    let lens: Vec<usize> = (1..=8).map(len).collect();
    assert!(lens.windows(2).take(5).all(|two| two[0] > two[1]), "{lens:?}");
    assert!(lens[5] == lens[6] && lens[6] == lens[7], "{lens:?}");
    assert!(lens[0] as u64 <= way.codec().max_total_bytes());
}

#[test]
fn every_algorithm_learns_and_does_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder);
    let (muon, adamw) = (OptimizerKind::Muon, OptimizerKind::AdamW);
    let carrying = Kind::Sparse {
        optimizer: adamw,
        carry: true,
        accumulator: false,
        k: 256,
        k_last: None,
        beta: 0.95,
        outer_rate: 2.0,
        outer_momentum: 0.0,
        quantizer: Quantizer::Sign,
    };
    let kinds = [
        (Kind::Ddp { optimizer: muon }, 4e-3, 4.0),
        (
            Kind::Diloco {
                optimizer: adamw,
                int8: false,
            },
            4e-3,
            4.0,
        ),
        (
            Kind::Diloco {
                optimizer: adamw,
                int8: true,
            },
            4e-3,
            1.001,
        ),
        (Kind::Demo { k: 32 }, 1e-3, 0.02),
        (sparse(), 4e-3, 0.08),
        (carrying, 4e-3, 0.08),
        (thinning(), 4e-3, 0.08),
    ];
    for (kind, lr, most_bytes) in kinds {
        let task = task(kind, lr, Trouble::default());
        let outcome = simulate(&task, &data, &|_| ()).unwrap();
        assert!(outcome.loss() < 3.8, "{:?}: {}", task.kind, outcome.loss());
        let bytes = outcome.contribution_bytes / outcome.params as f64;
        assert!(bytes <= most_bytes * 1.01, "{:?}: {bytes}", task.kind);
        let exchanges = outcome.points.last().unwrap().exchanges;
        let steps = u64::from(task.training().max_inner_steps);
        assert_eq!(exchanges * steps, 6 * 5, "{:?}", task.kind);
        let again = simulate(&task, &data, &|_| ()).unwrap();
        assert_eq!(again.points, outcome.points, "{:?}", task.kind);
    }
}

/// A run's settings at learning rate .01, for a model so small that state and updates fit a test.
fn way(algorithm: Way, change: impl FnOnce(&mut TrainingConfig)) -> (ModelConfig, TrainingConfig) {
    let model = ModelConfig {
        dim: 16,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        ffn: 32,
        ..ModelConfig::demo()
    };
    let mut training = TrainingConfig {
        algorithm,
        ..TrainingConfig::default()
    };
    training.optimizer.lr = 0.01;
    training.schedule.warmup_tokens = 0;
    change(&mut training);
    training.validate_with(&model).unwrap();
    (model, training)
}

#[test]
fn replicas_move_alike_in_any_order_and_on_any_number_of_threads() {
    let gradients = |training: &mut TrainingConfig| training.max_inner_steps = 1;
    let whole =
        |codec: &'static str| move |training: &mut TrainingConfig| training.compression.algorithm = codec.to_owned();
    let ways = [
        (way(Way::Sparse, |_| ()), "no state"),
        (
            way(Way::Diloco, |training| {
                whole("int8")(training);
                (training.outer_rate, training.outer_momentum) = (0.7, 0.9);
            }),
            "momentum",
        ),
        (way(Way::Demo, gradients), "clock"),
        (
            way(Way::Ddp, |training| {
                gradients(training);
                whole("dense")(training);
                training.optimizer.kind = OptimizerKind::AdamW;
            }),
            "optimizer",
        ),
    ];
    for ((model, training), state) in ways {
        let algorithm = algorithm(&model, &training).unwrap();
        let layout = agreed_layout(&model, algorithm.as_ref());
        let params = model.param_count();
        let found = |peer: usize| -> Vec<f32> {
            (0..params)
                .map(|i| ((i * 31 + peer * 17) % 101) as f32 / 1e4 - 5e-3)
                .collect()
        };
        let sent: Vec<Vec<Vec<u8>>> = (0..3)
            .map(|peer| {
                let vector = algorithm.vector(found(peer));
                algorithm.codec().encode(&vec![0.0; params], &vector).unwrap().shards
            })
            .collect();
        let after = |order: [usize; 3], threads: usize| {
            let mut agreed = init_flat(&model, 1);
            agreed.resize(layout.total, 0.0);
            let before = agreed.clone();
            for round in 0..3 {
                let contributions = order.map(|peer| Weighted {
                    tokens: 100 + peer as u64,
                    shards: &sent[(peer + round) % 3][..],
                });
                let update =
                    aggregate_by(algorithm.codec(), &contributions, training.rule, threads, Vec::new()).unwrap();
                algorithm.advance(&mut agreed, &update, 303, threads).unwrap();
            }
            assert_ne!(agreed[..params], before[..params], "{state}");
            (model_root(&layout, &agreed), agreed)
        };
        let (root, agreed) = after([0, 1, 2], 1);
        assert_eq!(after([2, 0, 1], 2).0, root, "{state}");
        // A joiner has all of it from the snapshot, and a state without its second half is refused.
        let snapshot = to_safetensors(&layout, &agreed);
        assert_eq!(from_safetensors(&layout, &snapshot).unwrap(), agreed);
        let nothing = aggregate_by(
            algorithm.codec(),
            &[] as &[Weighted<'_, Vec<u8>>],
            training.rule,
            1,
            Vec::new(),
        );
        let error = algorithm.advance(&mut agreed[..params - 1].to_vec(), &nothing.unwrap(), 0, 1);
        assert!(error.is_err(), "{state}");
        assert_eq!(layout.total > params, training.algorithm != Way::Sparse);
    }
}

#[test]
fn missed_rounds_are_made_up_for_and_one_liar_is_held_to_the_median() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder);
    let run = |trouble| simulate(&task(sparse(), 4e-3, trouble), &data, &|_| ()).unwrap();
    let calm = run(Trouble::default());
    let missing = run(Trouble {
        dropout_permille: 300,
        ..Trouble::default()
    });
    let (last, calm_last) = (missing.points.last().unwrap(), calm.points.last().unwrap());
    assert!(
        last.exchanges > calm_last.exchanges && last.tokens >= calm_last.tokens,
        "{last:?}"
    );
    assert!(missing.loss() < 3.8, "{}", missing.loss());
    let lie = |rule| Trouble {
        attackers: 1,
        attack: Some(Attack::Thousandfold),
        rule,
        ..Trouble::default()
    };
    let (open, held) = (run(lie(Rule::Mean)), run(lie(Rule::MedianNorm)));
    assert!(
        open.diverged.is_some(),
        "the plain mean goes where the liar wants: {}",
        open.loss()
    );
    assert!(held.loss() < 4.5, "{}", held.loss());
}

#[test]
fn a_bench_that_was_stopped_goes_on_with_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let setting = Setting { rounds: 2, ..setting() };
    let arm = |name: &str, kind: Kind| Arm {
        name: name.to_owned(),
        kind,
        lrs: vec![2e-3, 4e-3],
    };
    let series = Series {
        setting,
        arms: vec![
            arm(
                "ddp Muon",
                Kind::Ddp {
                    optimizer: OptimizerKind::Muon,
                },
            ),
            arm("sparse", sparse()),
        ],
        troubles: vec![(
            "sparse".to_owned(),
            Trouble {
                dropout_permille: 300,
                ..Trouble::default()
            },
        )],
    };
    let bench = Bench {
        plan: Plan { series: vec![series] },
        data: data(&folder),
        folder: folder.path().join("bench"),
        jobs: 2,
    };
    let computed = Mutex::new(Vec::new());
    let note = |news: Progress<'_>| {
        if let Progress::Point(task, _) = news {
            computed.lock().unwrap().push(task.arm.clone());
        }
    };
    let outcomes = bench.run(&note).unwrap();
    assert_eq!(outcomes[0].len(), 5);
    let files: Vec<_> = std::fs::read_dir(bench.folder.join("runs"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    assert_eq!(files.len(), 5);
    let one = files
        .iter()
        .find(|path| path.to_string_lossy().contains("ddp"))
        .unwrap();
    std::fs::write(one, "torn").unwrap();
    computed.lock().unwrap().clear();
    let again = bench.run(&note).unwrap();
    let points = |outcomes: &[Vec<trainer::bench_algorithms::Outcome>]| {
        outcomes[0].iter().map(|o| o.points.clone()).collect::<Vec<_>>()
    };
    assert_eq!(points(&again), points(&outcomes));
    let computed = computed.lock().unwrap();
    assert!(
        !computed.is_empty() && computed.iter().all(|arm| arm == "ddp Muon"),
        "{computed:?}"
    );
    let report = Report::new(&bench.plan.series[0], &again[0]);
    let markdown = report.markdown();
    assert!(
        markdown.contains("| ddp Muon | ") && markdown.contains("30% of rounds missed"),
        "{markdown}"
    );
    let points: usize = again[0].iter().map(|outcome| outcome.points.len()).sum();
    assert_eq!(report.csv().lines().count(), 1 + points);
    let [ddp, sparse] = report.best()[..] else {
        panic!("two arms")
    };
    assert!(
        report.seconds(ddp, 10.0) > 5.0 * report.seconds(sparse, 10.0),
        "slow links are what sparse is for"
    );
}

#[test]
fn presets_try_every_arm_at_one_learning_rate_or_two() {
    for preset in [Preset::Short, Preset::Long] {
        for series in Plan::preset(preset).series {
            assert!(series.arms.iter().all(|arm| (1..=2).contains(&arm.lrs.len())));
        }
    }
}
