//! Every way of training together, and training ahead of agreement, in a swarm of real processes: one is killed and comes back, one joins, all end with
//! the same bits, and honest work passes its audits.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{decided, demo_story, events, json, murmur, refused, stderr};
use serde_json::Value;

/// Rounds of one gradient take a tenth of a second: as many as last until a killed peer is back.
const GRADIENTS: &str = "100";

fn story(algorithm: &str, rounds: &str, sets: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    told(home.path(), algorithm, rounds, sets);
}

/// The demo's report, once everything in it was looked at.
fn told(home: &Path, algorithm: &str, rounds: &str, sets: &[&str]) -> Value {
    let mut all = vec![
        "timing.train_secs=1.5",
        "timing.collect_secs=3.0",
        "timing.fetch_secs=1.5",
        "verification.audit_permille=400",
    ];
    all.extend(sets);
    let report = demo_story(
        home,
        &["--peers", "4", "--rounds", rounds, "--algorithm", algorithm],
        &all,
    );
    let demo = home.join("demo");
    let mut agreed = 0;
    for name in ["peer-1", "peer-2", "peer-3", "peer-4", "newcomer"] {
        for audit in events(&demo, name, "audit") {
            assert_eq!(audit["verdict"], "agrees", "{name}: {audit}");
            agreed += 1;
        }
        let verified = json(&murmur(&demo, &["ledger", "verify", "--dir", name, "--json"]));
        assert_eq!(verified["ok"], true, "{name}: {verified}");
        let model = murmur(&demo, &["eval", "--dir", name, "--json"]);
        assert!(model.status.success(), "{name}: {}", stderr(&model));
    }
    assert!(agreed > 0, "no audit was heard of");
    report
}

#[test]
fn diloco_with_every_value_in_fp32() {
    story("diloco", "12", &["training.max_inner_steps=20"]);
}

#[test]
fn diloco_with_every_value_in_eight_bits() {
    story(
        "diloco",
        "12",
        &["training.max_inner_steps=20", "training.compression.algorithm=int8"],
    );
}

#[test]
fn demo_with_a_few_coefficients_of_every_gradient() {
    story("demo", GRADIENTS, &[]);
}

#[test]
fn ddp_with_every_gradient() {
    story("ddp", GRADIENTS, &[]);
}

/// R16: every round is trained while the one before it is agreed. What a member replays by hand afterwards is what it was paid for.
fn ahead(algorithm: &str, sets: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    // Speed is shown between the steps.
    let asked = [
        "timing.overlap=1",
        "verification.speed_secs=1.5",
        "verification.speed_every=2",
    ];
    let all = [&asked, sets].concat();
    let report = told(home.path(), algorithm, "16", &all);
    let demo = home.path().join("demo");
    all_heard_the_same_speeds(&demo);
    for peer in report["peers"].as_array().unwrap() {
        let share = peer["utilisation"].as_f64().unwrap();
        assert!((0.05..=1.0).contains(&share), "{peer}");
    }
    for name in ["peer-1", "newcomer"] {
        let rounds = decided(&demo, name);
        let shares = rounds.iter().map(|line| line["utilisation"].as_f64().unwrap());
        assert!(shares.clone().all(|share| (0.0..=1.0).contains(&share)), "{name}");
        assert!(shares.sum::<f64>() > 0.0, "{name}");
    }
    // A round that was replayed by an auditor, which therefore has all that it takes, replayed again from files.
    let told = events(&demo, "peer-2", "audit").pop().unwrap();
    let (round, member) = (told["round"].to_string(), told["member"].as_str().unwrap().to_owned());
    let holders = ["peer-1", "peer-2", "peer-3", "peer-4", "newcomer"];
    let again: Vec<Value> = holders
        .iter()
        .map(|dir| {
            let args = [
                "audit",
                "--round",
                &round,
                "--member",
                &member,
                "--dir",
                dir,
                "--threads",
                "1",
                "--json",
            ];
            murmur(&demo, &args)
        })
        .filter(|output| output.status.success())
        .map(|output| json(&output))
        .collect();
    assert!(!again.is_empty(), "nobody can replay round {round} of {member}");
    assert!(again.iter().all(|one| one["verdict"] == "agrees"), "{again:?}");
}

#[test]
fn sparse_ahead_of_agreement() {
    // Fewer values from round to round, too: whoever encodes, decodes, applies and audits must agree on how many.
    let thinning = ["compression.k=160", "compression.k_last=32", "compression.k_rounds=12"];
    let sets = thinning.map(|set| format!("training.{set}"));
    let mut sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    sets.push("training.max_inner_steps=20");
    ahead("sparse", &sets);
}

#[test]
fn diloco_ahead_of_agreement() {
    ahead("diloco", &["training.max_inner_steps=20"]);
}

#[test]
fn single_gradients_are_not_trained_ahead() {
    let home = tempfile::tempdir().unwrap();
    common::text(home.path());
    for algorithm in ["demo", "ddp"] {
        let set = [
            "--text",
            "text.txt",
            "--dir",
            "demo",
            "--algorithm",
            algorithm,
            "--set",
            "timing.overlap=1",
        ];
        let words = ["timing.overlap = 1", algorithm, "leave it out"];
        refused(home.path(), &[&["demo"], &set[..]].concat(), 2, &words);
    }
}

/// What members have shown, asked by records: the same for everyone who heard of it. Whether each of five processes on one busy machine is in time is not
/// for a test to say; all are asked again and again.
fn all_heard_the_same_speeds(demo: &Path) {
    let of = |name: &str| {
        let lines = events(demo, name, "speed");
        let told = lines.iter().map(|line| {
            let asked = line["asked"].as_u64().unwrap();
            let gflops = line["gflops"].as_f64();
            assert!(gflops.is_none_or(|shown| shown > 0.0 && shown < 100_000.0), "{line}");
            ((asked, line["member"].as_str().unwrap().to_owned()), gflops)
        });
        told.collect::<std::collections::BTreeMap<_, _>>()
    };
    let names = ["peer-1", "peer-2", "peer-3", "peer-4", "newcomer"];
    let heard: Vec<_> = names.iter().map(|name| of(name)).collect();
    let all: std::collections::BTreeMap<_, _> = heard.iter().flatten().collect();
    for one in &heard {
        assert!(one.iter().all(|(key, shown)| all[key] == shown), "{heard:?}");
    }
    let proofs = all.values().filter(|shown| shown.is_some()).count();
    println!("{proofs} of {} proofs were given", all.len());
    assert!(proofs >= 1, "{all:?}");
}

#[test]
fn members_show_their_speed_and_all_agree_on_it() {
    let home = tempfile::tempdir().unwrap();
    let sets = [
        "timing.train_secs=2.5",
        "timing.collect_secs=4.0",
        "verification.speed_secs=2.0",
        "verification.speed_every=3",
        "training.max_inner_steps=20",
    ];
    told(home.path(), "sparse", "16", &sets);
    let demo = home.path().join("demo");
    all_heard_the_same_speeds(&demo);
    let status = murmur(&demo, &["status", "--dir", "newcomer"]);
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(said.contains("GFLOP/s shown"), "{said}");
}
