//! `murmur audit`: anyone with a directory that holds the openings replays a round, an honest one or a disputed one.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{SMALL, events, json, leave, murmur, refused, stderr, up};
use serde_json::Value;

/// Rounds so short that a dispute takes seconds, every contribution audited, everything kept from the genesis on.
const DISPUTED: [&str; 7] = [
    "training.max_inner_steps=20",
    "timing.train_secs=3.0",
    "timing.collect_secs=4.0",
    "timing.fetch_secs=1.5",
    "membership.round_batches=40",
    "verification.audit_permille=1000",
    "storage.snapshot_rounds=64",
];

/// A short demo in which one peer cheats in this way, and its report.
fn cheated(home: &Path, kind: &str) -> Value {
    cheated_among(home, kind, "4", "16")
}

fn cheated_among(home: &Path, kind: &str, peers: &str, rounds: &str) -> Value {
    common::text(home);
    let mut args = vec![
        "demo", "--json", "--peers", peers, "--rounds", rounds, "--text", "text.txt", "--dir", "demo", "--kill",
        "none", "--cheat", kind,
    ];
    for set in SMALL.iter().chain(&DISPUTED) {
        args.extend(["--set", set]);
    }
    let output = murmur(home, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    json(&output)
}

fn audit(demo: &Path, dir: &str, round: &Value, member: &str, more: &[&str]) -> (Option<i32>, Value, String) {
    let round = round.to_string();
    let args = [
        "audit",
        "--round",
        &round,
        "--member",
        member,
        "--dir",
        dir,
        "--device",
        "cpu",
        "--threads",
        "1",
        "--json",
    ];
    let output = murmur(demo, &[&args, more].concat());
    let code = output.status.code();
    let found = if output.stdout.is_empty() {
        Value::Null
    } else {
        json(&output)
    };
    (code, found, stderr(&output))
}

#[test]
fn a_dispute_is_replayed_by_those_who_hold_what_was_opened_and_an_honest_round_by_its_member() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (report, demo) = (cheated(home, "skip"), home.join("demo"));
    let caught = &report["caught"][0];
    let (cheat, round) = (caught["id"].as_str().unwrap(), &caught["round"]);

    // Who said so: the first drawn by its lot, the second to confirm.
    let names = ["peer-1", "peer-2", "peer-3", "peer-4", "newcomer"];
    let peers = report["peers"].as_array().unwrap();
    let name_of = |id: &Value| names[peers.iter().position(|peer| peer["id"] == *id).unwrap()];
    let lines = events(&demo, "peer-1", "audit");
    let about = |line: &&Value| line["member"] == cheat && line["round"] == *round && line["verdict"] == "differs";
    let mut auditors: Vec<&str> = lines
        .iter()
        .filter(about)
        .map(|line| name_of(&line["auditor"]))
        .collect();
    auditors.dedup();
    assert!(auditors.len() >= 2, "{lines:?}");
    for dir in &auditors {
        let (code, found, said) = audit(&demo, dir, round, &cheat[..12], &[]);
        assert_eq!(
            (code, found["verdict"].as_str()),
            (Some(1), Some("differs")),
            "{dir}: {found} {said}"
        );
        assert_eq!(found["member"], cheat);
        let distance = found["rel_l2"].as_f64().unwrap();
        assert!(distance > 5.0 * found["bound"].as_f64().unwrap(), "{found}");
        // The same machine, so the same distance as stands in the records, whoever looks.
        let recorded = found["recorded"].as_array().unwrap();
        assert!(recorded.len() >= 2, "{found}");
        for one in recorded {
            assert!((one["rel_l2"].as_f64().unwrap() - distance).abs() < 1e-3, "{found}");
        }
        // Its second batch was another, and the accusation shows it: who was drawn asked for the steps before it spoke.
        let steps: Vec<&Value> = recorded
            .iter()
            .filter(|one| one["draw"] == 0)
            .map(|one| &one["steps_agree"])
            .collect();
        assert!(steps.contains(&&Value::from(1)), "{found}");
        assert_eq!(found["steps_agree"], 1, "{found}");
    }
    // The newcomer came too late to have audited it, lacks what was opened, and says so; it gets that from an auditor that runs.
    if !auditors.contains(&"newcomer") {
        let (code, found, said) = audit(&demo, "newcomer", round, cheat, &[]);
        assert_eq!((code, &found), (Some(1), &Value::Null), "{said}");
        for words in ["accumulator", "whoever has audited", "--fetch"] {
            assert!(said.contains(words), "{said}");
        }
        let (code, found, said) = audit(&demo, "newcomer", round, cheat, &["--fetch"]);
        assert_eq!((code, &found), (Some(1), &Value::Null), "{said}");
        assert!(said.contains("0 answered") && said.contains("while they run"), "{said}");
        let running = up(&demo, auditors[0], &["peer"]);
        let begun = Instant::now();
        while events(&demo, auditors[0], "started").len() < 2 && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(100));
        }
        let (code, found, said) = audit(&demo, "newcomer", round, cheat, &["--fetch"]);
        let verdict = (code, found["verdict"].as_str());
        assert_eq!(verdict, (Some(1), Some("differs")), "{found} {said}");
        let recorded = found["recorded"][0]["rel_l2"].as_f64().unwrap();
        assert!((recorded - found["rel_l2"].as_f64().unwrap()).abs() < 1e-3, "{found}");
        // Records are all that one needs to have.
        let blobs = demo.join("newcomer/blobs");
        std::fs::remove_dir_all(&blobs).unwrap();
        std::fs::create_dir(&blobs).unwrap();
        let own = peers[names.iter().position(|name| *name == auditors[0]).unwrap()]["id"].as_str();
        let (own, lines) = (own.unwrap(), events(&demo, "newcomer", "round_decided"));
        let counted = |line: &&Value| line["tokens_by"].get(own).is_some();
        let last = &lines.iter().rev().find(counted).unwrap()["round"];
        let (code, _, said) = audit(&demo, "newcomer", last, own, &[]);
        assert!(code == Some(1) && said.contains("cannot be built"), "{said}");
        let (code, found, said) = audit(&demo, "newcomer", last, own, &["--fetch"]);
        let verdict = (code, found["verdict"].as_str());
        assert_eq!(verdict, (Some(0), Some("agrees")), "{found} {said}");
        leave(&demo, auditors[0], running);
    }
    // An honest member's own round agrees, in words too.
    let honest = peers[0]["id"].as_str().unwrap();
    let last = events(&demo, "peer-1", "round_decided");
    let last = &last
        .iter()
        .rev()
        .find(|line| line["tokens_by"].get(honest).is_some())
        .unwrap()["round"];
    let (code, found, said) = audit(&demo, "peer-1", last, honest, &[]);
    assert_eq!(
        (code, found["verdict"].as_str()),
        (Some(0), Some("agrees")),
        "{found} {said}"
    );
    assert!(found["words"].as_str().unwrap().contains("did the work it claimed"));

    let wrong =
        |args: &[&str], words: &[&str]| refused(&demo, &[&["audit", "--dir", "peer-1"], args].concat(), 2, words);
    wrong(
        &["--round", "999", "--member", honest],
        &["--round 999", "go from round 1 to"],
    );
    wrong(
        &["--round", "3", "--member", "zz"],
        &["--member zz", "no member", &honest[..10]],
    );
    wrong(&["--round", "0", "--member", honest], &["0 is not in 1.."]);
}

/// The demo judges itself: the cheat is caught and keeps nothing, nobody honest is accused, and all hold the same model.
#[track_caller]
fn is_caught(kind: &str, least: f64) {
    is_caught_within("16", kind, least);
}

#[track_caller]
fn is_caught_within(rounds: &str, kind: &str, least: f64) {
    let home = tempfile::tempdir().unwrap();
    let report = cheated_among(home.path(), kind, "4", rounds);
    let caught = &report["caught"][0];
    println!("{kind}: {caught}");
    assert_eq!(
        (&caught["cheat"], &report["ok"]),
        (&Value::from(kind), &Value::from(true)),
        "{report}"
    );
    assert!(caught["rel_l2"].as_f64().unwrap() > least, "{report}");
    assert_eq!(report["accused_honest"].as_array().unwrap().len(), 0);
}

#[test]
fn one_step_fewer_is_caught_in_a_swarm() {
    is_caught("step", 0.02);
}

#[test]
fn the_work_of_the_round_before_is_caught_in_a_swarm() {
    is_caught("stale", 0.1);
}

#[test]
fn a_thousand_times_the_work_is_caught_in_a_swarm() {
    is_caught("blowup", 900.0);
}

#[test]
fn an_accumulator_that_holds_twice_what_it_should_is_caught_in_a_swarm() {
    is_caught("forge", 0.1);
}

/// Whoever gives no answer is asked again for seconds, which are many of these rounds: it is barred in round 11 to 19.
#[test]
fn who_opens_its_accumulators_to_nobody_is_barred_in_a_swarm() {
    is_caught_within("32", "hide", 0.02);
}

/// There is no distance of its own work.
#[test]
fn who_accuses_the_honest_is_barred_in_a_swarm() {
    is_caught("accuse", -1.0);
}

/// What it did not replay it takes for other steps than the member's, and accuses.
#[test]
fn who_vouches_for_what_it_did_not_replay_is_barred_in_a_swarm() {
    is_caught("guess", -1.0);
}

/// They vouch for each other with what an auditor has to show, and accuse the rest: five of seven judge.
#[test]
fn two_that_cover_each_other_are_both_barred_in_a_swarm() {
    let home = tempfile::tempdir().unwrap();
    let report = cheated_among(home.path(), "collude", "7", "16");
    let caught: std::collections::BTreeSet<&str> = report["caught"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["id"].as_str().unwrap())
        .collect();
    assert_eq!((caught.len(), &report["ok"]), (2, &Value::from(true)), "{report}");
    assert_eq!(report["cheats"].as_array().unwrap().len(), 2);
    assert_eq!(report["accused_honest"].as_array().unwrap().len(), 0);
}

/// Barred or gone: its rounds could not all have been audited, so they are not paid.
#[test]
fn who_runs_away_before_it_is_caught_is_not_paid_in_a_swarm() {
    let home = tempfile::tempdir().unwrap();
    let report = cheated(home.path(), "exit");
    assert_eq!(report["ok"], true, "{report}");
    let cheat = report["cheats"][0].as_str().unwrap();
    let demo = home.path().join("demo");
    let shown = json(&murmur(&demo, &["ledger", "show", "--json", "--dir", "peer-1"]));
    let mut members = shown["members"].as_array().unwrap().iter();
    let account = members.find(|one| one["id"] == cheat).unwrap();
    assert_eq!(
        (&account["provisional"], &account["vested"]),
        (&Value::from(0), &Value::from(0)),
        "{shown}"
    );
    let lost = account["slashed"].as_u64().unwrap() + account["unpaid"].as_u64().unwrap();
    assert!(account["tokens"].as_u64().unwrap() > 0 && lost > 0, "{account}");
}

#[test]
fn who_commits_to_steps_that_it_did_not_take_is_barred_though_its_work_passes() {
    let home = tempfile::tempdir().unwrap();
    let report = cheated(home.path(), "trace");
    let cheat = report["caught"][0]["id"].as_str().unwrap();
    assert_eq!(report["accused_honest"].as_array().unwrap().len(), 0, "{report}");
    let said = events(&home.path().join("demo"), "peer-1", "audit");
    let about: Vec<&Value> = said.iter().filter(|line| line["member"] == cheat).collect();
    assert!(about.iter().all(|line| line["verdict"] == "untold"), "{about:?}");
    // Three rounds at least, each by an auditor and by another who confirmed it.
    assert!(about.len() >= 6, "{about:?}");
}
