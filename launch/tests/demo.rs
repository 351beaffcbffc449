//! `murmur demo`, short: the whole story on a text of its own.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{demo_story, events, json, murmur};
use serde_json::Value;

#[test]
fn a_short_demo_ends_well_and_its_figures_can_be_recomputed() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let sets = [
        "training.max_inner_steps=60",
        "timing.train_secs=3.0",
        "timing.collect_secs=4.0",
        "timing.fetch_secs=1.5",
    ];
    let report = demo_story(home, &["--peers", "3", "--rounds", "16"], &sets);
    assert!(Path::new(report["plot"].as_str().unwrap()).exists());
    recomputed(&home.join("demo"), &report);
}

/// Tokens, shares and roots from the peers' own files alone.
fn recomputed(demo: &Path, report: &Value) {
    let names = ["peer-1", "peer-2", "peer-3", "newcomer"];
    let mut rounds: BTreeMap<u64, Value> = BTreeMap::new();
    for line in names.iter().flat_map(|name| events(demo, name, "round_decided")) {
        let stands = rounds
            .get(&line["round"].as_u64().unwrap())
            .is_none_or(|known| known["branch"].as_u64() < line["branch"].as_u64());
        if stands {
            rounds.insert(line["round"].as_u64().unwrap(), line);
        }
    }
    assert_eq!(report["rounds"], rounds.len());
    let tokens: u64 = rounds.values().map(|line| line["tokens"].as_u64().unwrap()).sum();
    assert_eq!(report["tokens"], tokens);
    for (peer, name) in report["peers"].as_array().unwrap().iter().zip(names) {
        let id = peer["id"].as_str().unwrap();
        let counted = rounds
            .values()
            .filter(|line| line["tokens_by"].get(id).is_some())
            .count();
        assert_eq!(peer["counted"], counted, "{name}");
        let verified = json(&murmur(demo, &["ledger", "verify", "--dir", name, "--json"]));
        assert_eq!(
            verified["record"],
            rounds.values().next_back().unwrap()["record"],
            "{name}: {verified}"
        );
    }
}
