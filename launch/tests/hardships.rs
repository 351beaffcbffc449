//! What happens to one real peer among four on one machine: it is frozen, started twice, its disk fills up, its directory is deleted
//! or copied.
//! Each time the others go on, and what the peer says names the cause.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Running, decided, ends_within, leave, murmur, refused, said, up, wait};

/// Rounds of about two seconds, and a short patience where one that is gone held too much weight.
const RUN: &str = r#"
max_inner_steps = 8
[membership]
round_batches = 16
weight_delay = 1
weight_window = 6
regroup_secs = 3.0
regroup_minority_factor = 2.0
[timing]
train_secs = 1.5
collect_secs = 2.0
fetch_secs = 1.0
view_secs = 1.0
[storage]
snapshot_rounds = 4
"#;

/// How long a peer is frozen, unless `HARDSHIPS_FROZEN_SECS` says otherwise: longer than any connection stays open in silence.
const FROZEN: u64 = 12;

fn last_round(home: &Path, name: &str) -> u64 {
    decided(home, name)
        .last()
        .map_or(0, |line| line["round"].as_u64().unwrap())
}

fn until(home: &Path, what: &str, secs: u64, holds: impl Fn() -> bool) -> f64 {
    let begun = Instant::now();
    while !holds() {
        let logs = || {
            ["a", "b", "c", "d", "b2"]
                .map(|name| format!("{name}: {}", said(home, name)))
                .join("\n")
        };
        assert!(
            begun.elapsed().as_secs() < secs,
            "not within {secs} s: {what}\n{}",
            logs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    begun.elapsed().as_secs_f64()
}

/// `a` decides two more rounds.
fn the_others_go_on(home: &Path) {
    let from = last_round(home, "a");
    let secs = until(home, "the others go on", 40, || last_round(home, "a") >= from + 2);
    println!("the others decided two rounds more within {secs:.1} s");
}

/// `name` is counted by `a` in a round after those decided so far.
fn counts_again(home: &Path, name: &str, id: &str) {
    let from = last_round(home, "a");
    let secs = until(home, "it counts again", 60, || {
        decided(home, "a").iter().any(|line| {
            line["round"].as_u64() > Some(from)
                && line["contributors"].as_array().unwrap().iter().any(|other| other == id)
        })
    });
    println!("{name} counted again after {secs:.1} s");
}

fn id(home: &Path, name: &str) -> String {
    common::events(home, name, "started").last().unwrap()["peer"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn signal(peer: &Running, which: &str) {
    let pid = peer.0.id().to_string();
    assert!(
        Command::new("sh")
            .args(["-c", &format!("kill -{which} {pid}")])
            .status()
            .unwrap()
            .success()
    );
}

/// A small file system of its own, unmounted at the end whatever happens.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn one_of_four_is_frozen_or_loses_its_disk_and_the_others_go_on() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::run_file(home, "hard", RUN);
    let a = up(home, "a", &["new", "run.toml"]);
    wait(home, "a", &["round>=1"]);
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "a"]).stdout).unwrap();
    let ticket = ticket.trim();
    let disk = SmallDisk::mount(&home.join("d"));
    let b = up(home, "b", &["join", ticket]);
    let c = up(home, "c", &["join", ticket]);
    let d = up(home, "d", &["join", ticket]);
    for name in ["b", "c", "d"] {
        wait(home, name, &["members>=4", "tokens>=1"]);
        counts_again(home, name, &id(home, name));
    }

    // Two processes in one directory: the second is told which process has it.
    refused(
        home,
        &["join", "--dir", "c"],
        2,
        &["in use by process", &c.0.id().to_string(), "--dir"],
    );

    frozen(home, &c);
    match disk {
        Some(disk) => leave(home, "d", full(home, d, &disk)),
        None => {
            println!("skipped: a full disk (this user may not mount a file system)");
            leave(home, "d", d);
        }
    }
    // While there are four: two processes with one key count with the liars, and have to be less than a third.
    let b = copied(home, b);
    deleted(home, c);
    if let Some(b) = b {
        leave(home, "b2", b);
    }
    leave(home, "a", a);
}

/// Rounds as long as their time to train, so that the fourteen in which who is gone is asked take more than the ten seconds it has to come back.
const AUDITED: &str = r#"
max_inner_steps = 400
[membership]
round_batches = 1600
max_quota = 400
weight_delay = 1
weight_window = 6
regroup_secs = 3.0
[timing]
train_secs = 1.2
collect_secs = 1.6
fetch_secs = 0.6
view_secs = 0.5
[verification]
audit_permille = 1000
verdict_rounds = 16
[storage]
snapshot_rounds = 4
"#;

/// Every contribution is audited there, so what is not opened costs four rounds' pay, those before it included.
#[test]
fn who_is_killed_and_stays_away_is_not_paid_for_rounds_before_what_it_opened_to_nobody() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::run_file(home, "audited", AUDITED);
    let a = up(home, "a", &["new", "run.toml", "--unsafe-economics"]);
    wait(home, "a", &["round>=1"]);
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "a"]).stdout).unwrap();
    let others = ["b", "c"].map(|name| up(home, name, &["join", ticket.trim()]));
    let d = up(home, "d", &["join", ticket.trim()]);
    wait(home, "d", &["members>=4", "tokens>=1"]);
    let gone = id(home, "d");
    let counts_in = |rounds: usize| {
        let from = last_round(home, "a");
        until(home, &format!("it counts in {rounds} rounds"), 60, || {
            let after = |line: &&serde_json::Value| line["round"].as_u64() > Some(from);
            let counted =
                |line: &serde_json::Value| line["contributors"].as_array().unwrap().iter().any(|id| *id == gone);
            decided(home, "a")
                .iter()
                .filter(after)
                .filter(|line| counted(line))
                .count()
                >= rounds
        })
    };
    // Honest for so long that it is still there when the first of these rounds can no longer be audited: those after are not paid in any case.
    counts_in(10);
    drop(d);
    // From here on its accumulators are lost to it, and no auditor of these rounds gets any; then its power is, before anyone took that for a refusal.
    let d = up(home, "d", &["peer", "--cheat", "hide"]);
    counts_in(4);
    drop(d);

    until(home, "it is said to have opened nothing", 90, || {
        let mut lines = common::events(home, "a", "unpaid").into_iter();
        lines.any(|line| line["points"].as_u64() > Some(0))
    });
    for line in common::events(home, "a", "unpaid") {
        assert_eq!(
            (&line["member"], line["finding"].as_str()),
            (&gone.clone().into(), Some("unanswered")),
            "{line}"
        );
    }
    assert!(
        said(home, "a").contains("did not open to its auditors what it sent"),
        "{}",
        said(home, "a")
    );
    let shown = common::json(&murmur(home, &["ledger", "show", "--json", "--dir", "a"]));
    for one in shown["members"].as_array().unwrap() {
        let (points, strikes) = (one["unpaid"].as_u64().unwrap(), one["strikes"].as_u64());
        assert_eq!((points > 0, strikes), (one["id"] == gone.as_str(), Some(0)), "{shown}");
    }
    for (name, peer) in ["b", "c"].into_iter().zip(others) {
        leave(home, name, peer);
    }
    leave(home, "a", a);
}

/// Whoever is frozen and thawed catches up, and holds the same models as the others.
fn frozen(home: &Path, c: &Running) {
    let secs = std::env::var("HARDSHIPS_FROZEN_SECS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(FROZEN);
    let before = last_round(home, "a");
    signal(c, "STOP");
    std::thread::sleep(Duration::from_secs(secs));
    the_others_go_on(home);
    let missed = last_round(home, "a");
    signal(c, "CONT");
    assert!(missed >= before + 3, "rounds {before} to {missed}");
    println!("rounds {before} to {missed} went on while one was frozen for {secs} s");
    counts_again(home, "c", &id(home, "c"));
    let root = |name: &str, round: u64| {
        let lines = decided(home, name).into_iter().rev();
        lines
            .filter(|line| line["round"].as_u64() == Some(round))
            .map(|line| line["model_root"].clone())
            .next()
    };
    let round = last_round(home, "c");
    until(home, "a is there too", 20, || root("a", round).is_some());
    assert_eq!(root("a", round), root("c", round));
}

/// A disk without room ends the peer with a message that says so; with room again it is the same member.
fn full(home: &Path, mut d: Running, disk: &SmallDisk) -> Running {
    let me = id(home, "d");
    let filler = disk.0.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    drop(file);
    let ended = ends_within(&mut d.0, 40);
    assert!(ended.is_some_and(|code| code != 0), "{ended:?}: {}", said(home, "d"));
    let words = said(home, "d");
    assert!(
        words.contains("No space left") && !words.contains("panicked"),
        "{words}"
    );
    println!(
        "a full disk ended the peer: {}",
        words.lines().last().unwrap_or_default()
    );
    the_others_go_on(home);
    fs::remove_file(&filler).unwrap();
    let again = up(home, "d", &["join"]);
    counts_again(home, "d", &me);
    assert_eq!(id(home, "d"), me);
    again
}

/// A copied directory makes two processes of one peer. The one started first stops, and says why; the other goes on as that peer.
/// Unless they voted apart before the first learnt of the second: then their key is barred, and both stop. What still runs is returned.
fn copied(home: &Path, b: Running) -> Option<Running> {
    let me = id(home, "b");
    signal(&b, "KILL");
    drop(b);
    common::copy(&home.join("b"), &home.join("b2"));
    let mut first = up(home, "b", &["join"]);
    counts_again(home, "b", &me);
    let mut second = up(home, "b2", &["join"]);
    let ended = ends_within(&mut first.0, 60);
    let words = said(home, "b");
    assert!(
        ended.is_some_and(|code| code != 0),
        "{ended:?}: {words}\n{}",
        said(home, "b2")
    );
    the_others_go_on(home);
    let barred = common::events(home, "a", "slashed")
        .iter()
        .any(|line| line["member"] == *me);
    if barred {
        println!("both had voted in one slot: the key is barred");
        let ended = ends_within(&mut second.0, 60);
        let words = said(home, "b2");
        assert!(ended.is_some_and(|code| code != 0), "{ended:?}: {words}");
        assert!(words.contains("this peer is barred"), "{words}");
        return None;
    }
    assert!(
        words.contains("another process takes part with this peer's key"),
        "{words}"
    );
    counts_again(home, "b2", &me);
    Some(second)
}

/// A directory deleted under a running peer ends it; there is nothing to go on with, and that is what a second start says.
fn deleted(home: &Path, mut c: Running) {
    // It goes on writing meanwhile, so once may not be enough.
    let gone = || fs::remove_dir_all(home.join("c")).is_ok() || !home.join("c").exists();
    until(home, "the directory is gone", 10, gone);
    let ended = ends_within(&mut c.0, 40);
    assert!(ended.is_some_and(|code| code != 0), "{ended:?}: {}", said(home, "c"));
    let words = said(home, "c");
    assert!(!words.contains("panicked"), "{words}");
    println!(
        "a deleted directory ended the peer: {}",
        words.lines().last().unwrap_or_default()
    );
    the_others_go_on(home);
    refused(home, &["join", "--dir", "c"], 2, &["holds no peer yet", "ticket"]);
}
