//! Two real peers over loopback: they train one model, hold the same ledger, notice what was changed on disk, and heal.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{Running, copy, ends_within, events, json, murmur, refused, said, start, stderr, wait};
use serde_json::Value;

/// Rounds take about a second, so that a newcomer has time to come in.
const RUN: &str = r#"
name = "two"
text = ["text.txt"]
[model]
dim = 64
layers = 2
heads = 2
ffn = 128
[training]
seq_len = 64
batch_sequences = 4
max_inner_steps = 60
[membership]
round_batches = 80
regroup_secs = 4.0
[timing]
train_secs = 4.0
[storage]
snapshot_rounds = 2
"#;

/// The last round of the first act, and of the second.
const ROUNDS: [&str; 2] = ["20", "26"];

fn ends_well(home: &Path, name: &str, mut peer: Running) {
    assert_eq!(ends_within(&mut peer.0, 90), Some(0), "{name}: {}", said(home, name));
}

/// (round, branch) -> (record, model root), as a peer tells it.
fn told(home: &Path, name: &str) -> Vec<(u64, Value, Value)> {
    let rounds = events(home, name, "round_decided").into_iter();
    rounds
        .map(|line| {
            (
                line["round"].as_u64().unwrap(),
                line["record"].clone(),
                line["model_root"].clone(),
            )
        })
        .collect()
}

#[test]
fn two_peers_hold_one_model_and_one_ledger_and_what_was_changed_is_found() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::text(home);
    fs::write(home.join("run.toml"), RUN).unwrap();
    let ports = [common::free_port(), common::free_port()];
    let first = start(
        home,
        "a",
        &ports[0],
        &["new", "run.toml", "--dir", "a", "--rounds", ROUNDS[0]],
    );
    wait(home, "a", &["round>=1"]);
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "a"]).stdout).unwrap();
    let ticket = ticket.trim();
    let second = start(
        home,
        "b",
        &ports[1],
        &["join", ticket, "--dir", "b", "--rounds", ROUNDS[0]],
    );
    wait(home, "a", &["members>=2"]);
    wait(home, "b", &["members>=2", "tokens>=1"]);
    for name in ["a", "b"] {
        let status = json(&murmur(home, &["status", "--dir", name, "--json"]));
        assert_eq!(
            (&status["name"], status["members"].as_array().unwrap().len()),
            (&Value::from("two"), 2)
        );
    }
    ends_well(home, "a", first);
    ends_well(home, "b", second);

    both_trained(home);
    let roots = both_verify(home);
    a_changed_byte_is_named(home);
    another_run_is_refused(home, ticket);
    a_changed_snapshot_heals(home, &ports);
    assert_ne!(both_verify(home), roots, "the second act brought new records");
}

/// At least three rounds count both, and what they tell of a round is the same.
fn both_trained(home: &Path) {
    let (a, b) = (told(home, "a"), told(home, "b"));
    let shared = b.iter().filter(|line| a.contains(line)).count();
    assert_eq!(shared, b.len(), "a: {a:?}\nb: {b:?}");
    let together = events(home, "b", "round_decided")
        .iter()
        .filter(|line| line["contributors"].as_array().unwrap().len() == 2)
        .count();
    assert!(together >= 3, "only {together} rounds count both: {}", said(home, "b"));
}

fn both_verify(home: &Path) -> Value {
    let [mut a, mut b] = ["a", "b"].map(|name| json(&murmur(home, &["ledger", "verify", "--dir", name, "--json"])));
    for report in [&mut a, &mut b] {
        assert_eq!(report["ok"], true, "{report}");
        report["secs"] = Value::Null;
    }
    assert_eq!(a, b);
    a
}

/// Record r + 1 carries the model root of round r: wherever those bytes lie on disk, changing one of them is found, by its round.
fn a_changed_byte_is_named(home: &Path) {
    let (round, _, root) = told(home, "b").into_iter().nth(2).unwrap();
    let root: Vec<u8> = (0..32)
        .map(|i| u8::from_str_radix(&root.as_str().unwrap()[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    let bytes = fs::read(home.join("b/records.redb")).unwrap();
    let places: Vec<usize> = (0..bytes.len() - 32).filter(|at| bytes[*at..at + 32] == root).collect();
    let mut named = 0;
    copy(&home.join("b"), &home.join("copy"));
    for place in places {
        let mut changed = bytes.clone();
        changed[place + 7] ^= 1;
        fs::write(home.join("copy/records.redb"), &changed).unwrap();
        let output = murmur(home, &["ledger", "verify", "--dir", "copy", "--json"]);
        let report = json(&output);
        // A page that the database has let go of may hold the bytes too; nobody reads it.
        if report["ok"] == true {
            continue;
        }
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(report["first_bad"]["round"], round + 1, "{report}");
        assert!(
            stderr(&output).contains(&format!("record {}", round + 1)),
            "{}",
            stderr(&output)
        );
        named += 1;
    }
    assert!(named > 0, "no byte of record {} was found", round + 1);

    // The same of a directory whose process was killed: the database calls itself unfinished, and is not repaired away.
    let place = bytes.windows(32).position(|window| window == root).unwrap();
    let mut changed = bytes;
    changed[9] |= 2;
    fs::write(home.join("copy/records.redb"), &changed).unwrap();
    let whole = json(&murmur(home, &["ledger", "verify", "--dir", "copy", "--json"]));
    assert_eq!(whole["ok"], true, "{whole}");
    changed[place] ^= 1;
    fs::write(home.join("copy/records.redb"), &changed).unwrap();
    let report = json(&murmur(home, &["ledger", "verify", "--dir", "copy", "--json"]));
    assert!(
        report["ok"] == true || report["first_bad"]["round"] == round + 1,
        "{report}"
    );
    fs::remove_dir_all(home.join("copy")).unwrap();
}

/// One character of run.toml makes it another run: another id, and nobody takes the directory for one of this.
fn another_run_is_refused(home: &Path, ticket: &str) {
    copy(&home.join("b"), &home.join("other"));
    let config = fs::read_to_string(home.join("other/run.toml")).unwrap();
    fs::write(home.join("other/run.toml"), config.replacen("\"two\"", "\"twp\"", 1)).unwrap();
    refused(
        home,
        &["join", ticket, "--dir", "other"],
        2,
        &["other", "another run", "--dir"],
    );
    let report = json(&murmur(home, &["ledger", "verify", "--dir", "other", "--json"]));
    assert_eq!(
        (&report["ok"], &report["first_bad"]["round"]),
        (&Value::from(false), &Value::from(1))
    );
    fs::remove_dir_all(home.join("other")).unwrap();
}

/// One byte in every snapshot that a stopped peer holds: it says so, trains on none of them, and has the others' model again.
fn a_changed_snapshot_heals(home: &Path, ports: &[String; 2]) {
    let mut changed = 0;
    for entry in fs::read_dir(home.join("b/snapshots")).unwrap().flatten() {
        if entry.path().extension().is_some_and(|ending| ending == "safetensors") {
            let mut bytes = fs::read(entry.path()).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(entry.path(), bytes).unwrap();
            changed += 1;
        }
    }
    assert!(changed >= 2, "{changed} snapshots");
    refused(home, &["generate", "--dir", "b", "x"], 1, &["current.safetensors"]);
    let first = start(home, "a", &ports[0], &["join", "--dir", "a", "--rounds", ROUNDS[1]]);
    let second = start(home, "b", &ports[1], &["join", "--dir", "b", "--rounds", ROUNDS[1]]);
    ends_well(home, "a", first);
    ends_well(home, "b", second);
    assert!(
        said(home, "b").contains("was changed since it was written"),
        "{}",
        said(home, "b")
    );
    let (a, b) = (told(home, "a"), told(home, "b"));
    assert_eq!(a.last(), b.last());
}
