//! Twelve real peers on loopback lose eleven at once. The last goes on alone; the eleven come back to where they were, find each other
//! and the last, and all count again. Nobody was told a port: each takes the one it had before.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{decided, ends_within, events, json, murmur, said, stderr, up, wait};
use serde_json::Value;

/// Twelve peers on two cores: the model is tiny, and a round takes about three seconds. `regroup_secs` and its factor are short, so
/// that one of twelve is patient for 3 + 2 + 4 x 2 = 13 s; with a run's defaults (rounds of a minute) that would be four minutes.
const RUN: &str = r#"
max_inner_steps = 80
[membership]
round_batches = 240
weight_delay = 1
weight_window = 6
regroup_secs = 4.0
regroup_minority_factor = 2.0
[timing]
train_secs = 2.0
collect_secs = 3.0
fetch_secs = 2.0
view_secs = 1.0
[storage]
snapshot_rounds = 4
"#;

/// How many there are, and which of them is left: not the founder.
const PEERS: usize = 12;
const LAST: usize = 11;
/// How soon the last one must have decided a record of its own.
const ALONE: Duration = Duration::from_secs(60);

fn name(i: usize) -> String {
    format!("p{i}")
}

fn time(line: &Value) -> f64 {
    line["t"].as_f64().unwrap()
}

fn round(line: &Value) -> u64 {
    line["round"].as_u64().unwrap()
}

fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs_f64()
}

/// Waits for something to be true of the logs.
fn until(home: &Path, what: &str, limit: Duration, holds: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        if begun.elapsed() > limit {
            let heard: Vec<String> = (0..PEERS)
                .map(|i| format!("{}: {}", name(i), said(home, &name(i))))
                .collect();
            panic!("not within {limit:?}: {what}\n{}", heard.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    begun.elapsed()
}

/// Who each peer is.
fn ids(home: &Path) -> BTreeMap<usize, String> {
    let id = |i: usize| {
        events(home, &name(i), "started")[0]["peer"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    (0..PEERS).map(|i| (i, id(i))).collect()
}

/// Whether a peer's log counts all of these in rounds that it decided after `since`.
fn counts(home: &Path, i: usize, whom: &BTreeSet<String>, since: f64) -> bool {
    let counted: BTreeSet<String> = decided(home, &name(i))
        .iter()
        .filter(|line| time(line) > since)
        .flat_map(|line| line["contributors"].as_array().unwrap().clone())
        .map(|id| id.as_str().unwrap().to_owned())
        .collect();
    counted.is_superset(whom)
}

#[test]
fn one_of_twelve_survives_and_the_eleven_that_come_back_all_count_again() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::run_file(home, "twelve", RUN);
    let mut peers = vec![up(home, &name(0), &["new", "run.toml"])];
    wait(home, &name(0), &["round>=1"]);
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "p0"]).stdout).unwrap();
    peers.extend((1..PEERS).map(|i| up(home, &name(i), &["join", ticket.trim()])));
    until(home, "twelve members", Duration::from_secs(120), || {
        decided(home, &name(LAST))
            .last()
            .is_some_and(|line| line["contributors"].as_array().unwrap().len() >= 9)
    });
    let ids = ids(home);
    let all: BTreeSet<String> = ids.values().cloned().collect();
    let before = now();
    until(home, "all twelve counted", Duration::from_secs(60), || {
        counts(home, LAST, &all, before - 12.0)
    });

    let killed = now();
    for peer in &mut peers[..LAST] {
        peer.0.kill().unwrap();
    }
    for peer in &mut peers[..LAST] {
        peer.0.wait().unwrap();
    }
    let took = until(home, "the last one goes on", ALONE, || {
        decided(home, &name(LAST))
            .iter()
            .any(|line| time(line) > killed && line["contributors"].as_array().unwrap().len() == 1)
    });
    println!(
        "the last of {PEERS} decided alone {:.1} s after the others were killed (at most 60)",
        took.as_secs_f64()
    );

    let back = now();
    peers.splice(..LAST, (0..LAST).map(|i| up(home, &name(i), &["join"])));
    let took = until(home, "all twelve counted again", Duration::from_secs(90), || {
        counts(home, LAST, &all, back)
    });
    let eleven: BTreeSet<String> = (0..LAST).map(|i| ids[&i].clone()).collect();
    let rounds = rounds_to_count(home, &eleven, back);
    println!(
        "all {PEERS} counted again {:.1} s after the start of the eleven, the eleven within {rounds} rounds (at most 3)",
        took.as_secs_f64()
    );
    assert!(rounds <= 3);
    let done = decided(home, &name(LAST)).last().map(round).unwrap() + 2;
    until(home, "two rounds more", Duration::from_secs(60), || {
        (0..PEERS).all(|i| decided(home, &name(i)).last().is_some_and(|line| round(line) >= done))
    });
    for peer in &peers {
        common::interrupt(peer);
    }
    for (i, mut peer) in peers.into_iter().enumerate() {
        assert_eq!(
            ends_within(&mut peer.0, 60),
            Some(0),
            "{}: {}",
            name(i),
            said(home, &name(i))
        );
    }
    roots_are_equal(home, done);
}

/// Every peer holds the same record and model after every round since `from`, and its ledger replays from genesis.
fn roots_are_equal(home: &Path, from: u64) {
    let mut told: BTreeMap<u64, [Value; 3]> = BTreeMap::new();
    for i in 0..PEERS {
        for (round, line) in chain(home, i).split_off(&from) {
            let this = ["branch", "record", "model_root"].map(|field| line[field].clone());
            let known = told.entry(round).or_insert_with(|| this.clone());
            assert_eq!(*known, this, "{} differs in round {round}", name(i));
        }
    }
    assert!(!told.is_empty());
    for i in [0, LAST] {
        let output = murmur(home, &["ledger", "verify", "--dir", &name(i), "--json"]);
        assert_eq!(json(&output)["ok"], true, "{}", stderr(&output));
    }
}

/// What a peer's log says of each round of its chain. A round that is decided again, on another branch, voids itself and all after it.
fn chain(home: &Path, i: usize) -> BTreeMap<u64, Value> {
    let mut chain = BTreeMap::new();
    for line in decided(home, &name(i)) {
        chain.split_off(&round(&line));
        chain.insert(round(&line), line);
    }
    chain
}

/// In how many rounds all of these were counted, the first round that counts any of them being the first of those.
fn rounds_to_count(home: &Path, whom: &BTreeSet<String>, since: f64) -> usize {
    let mut missing = whom.clone();
    let lines = chain(home, LAST).into_values().filter(|line| time(line) > since);
    let counted = lines.map(|line| {
        let contributors = line["contributors"].as_array().unwrap().clone();
        let named = contributors.into_iter().map(|id| id.as_str().unwrap().to_owned());
        named.filter(|id| whom.contains(id)).collect::<BTreeSet<String>>()
    });
    let rounds = counted.skip_while(BTreeSet::is_empty).take_while(|counted| {
        let more = !missing.is_empty();
        missing.retain(|id| !counted.contains(id));
        more
    });
    rounds.count()
}
