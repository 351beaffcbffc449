//! A run that is killed again and again ends with the very model of one that was left alone: no batch is lost, none is trained twice.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Running, copy, decided, ends_within, run_file, said, up};
use serde_json::Value;

/// A round takes about a sixth of a second here, most of it training.
const RUN: &str = r#"
max_inner_steps = 40
[membership]
round_batches = 40
[timing]
train_secs = 20.0
[storage]
snapshot_rounds = 4
"#;
const ROUNDS: &str = "40";
const KILLS: u64 = 10;

fn train(home: &Path, name: &str, rounds: &str) -> Running {
    up(home, name, &["train", "run.toml", "--rounds", rounds])
}

fn ends_well(home: &Path, name: &str, mut peer: Running) {
    assert_eq!(ends_within(&mut peer.0, 90), Some(0), "{name}: {}", said(home, name));
}

/// The model after each round, once: a round that was decided but not yet told when the process died is told again.
fn models(home: &Path, name: &str) -> Vec<(u64, Value)> {
    let lines = decided(home, name);
    let model = |line: &Value| (line["round"].as_u64().unwrap(), line["model_root"].clone());
    let mut models: Vec<_> = lines.iter().map(model).collect();
    models.dedup();
    models
}

/// As `train` is used alone: every value sent, moments carried from round to round, no audits.
const ALONE: &str = r#"
max_inner_steps = 40
outer_rate = 1.0
[training.optimizer]
kind = "adamw"
state = "carry"
[training.compression]
algorithm = "dense"
[membership]
round_batches = 40
[timing]
train_secs = 20.0
[verification]
audit_permille = 0
[storage]
snapshot_rounds = 4
"#;

#[test]
fn a_run_killed_ten_times_ends_with_the_model_of_one_left_alone() {
    ends_alike("sparse", RUN);
}

#[test]
fn so_does_one_that_carries_its_moments() {
    ends_alike("carry", ALONE);
}

fn ends_alike(what: &str, run: &str) {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    run_file(home, what, run);
    // A run's id, and with it the order of its data, is drawn when it is created: both go on from the same beginning.
    ends_well(home, "calm", train(home, "calm", "2"));
    copy(&home.join("calm"), &home.join("killed"));
    ends_well(home, "calm", train(home, "calm", ROUNDS));

    for kill in 0..KILLS {
        let mut peer = train(home, "killed", ROUNDS);
        // From before the first round to well into it, at no moment that recurs.
        std::thread::sleep(Duration::from_millis(300 + kill * 397 % 1300));
        peer.0.kill().unwrap();
        peer.0.wait().unwrap();
    }
    ends_well(home, "killed", train(home, "killed", ROUNDS));

    let calm = models(home, "calm");
    assert_eq!(calm.len(), 40);
    assert_eq!(calm, models(home, "killed"), "{}", said(home, "killed"));
}
