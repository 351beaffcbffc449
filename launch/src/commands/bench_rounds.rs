//! `murmur bench rounds`: what rounds cost as peers grow more, how soon a crash is noticed, how soon a decision falls; all of it in
//! the simulator, so that it is the same on every machine but for wall-clock seconds and memory.

use anyhow::Result;
use coordinatorless::sim::{Fault, FaultKind, Link, Report, Scenario, run as simulate};
use serde_json::{Value, json};

use super::print_json;
use crate::cli::BenchRoundsArgs;

/// Peers of the growth table.
const SIZES: [usize; 9] = [4, 8, 16, 32, 64, 128, 256, 512, 1000];
/// Peers of everything else.
const FEW: usize = 16;

pub fn run(args: &BenchRoundsArgs) -> Result<()> {
    let growth: Vec<Report> = SIZES
        .into_iter()
        .filter(|peers| *peers <= usize::from(args.max_peers))
        .map(|peers| simulate(&working(peers)))
        .collect();
    let idle = simulate(&idle(FEW));
    let noticed: Vec<Report> = [FEW, usize::from(args.max_peers)]
        .into_iter()
        .filter(|peers| *peers >= FEW)
        .map(|peers| simulate(&crashing(peers)))
        .collect();
    if args.json {
        let noticed: Vec<Value> = noticed.iter().map(alarms).collect();
        return print_json(&json!({"growth": growth, "idle": idle, "noticed": noticed}));
    }
    println!("peers  messages  bytes      agreement  seconds    peak memory");
    println!("       per peer and round   median     per round  so far");
    growth.iter().for_each(row);
    println!(
        "idle round of {:.1} s, {FEW} peers: {:.0} messages, {:.0} bytes per peer",
        idle.virtual_secs / idle.rounds as f64,
        idle.msgs_per_peer_round,
        idle.bytes_per_peer_round
    );
    for report in &noticed {
        let (alarms, looks) = report.false_alarms;
        println!(
            "{} peers, 5% of messages lost: a crash is known to everyone after {:.2} s; taken for dead while alive: {alarms} of {looks} looks ({:.4}%)",
            report.peers,
            report.crash_noticed_secs.unwrap_or(f64::NAN),
            100.0 * alarms as f64 / looks.max(1) as f64
        );
    }
    Ok(())
}

/// 50 ms each way, nothing lost, everyone works.
fn working(peers: usize) -> Scenario {
    Scenario {
        name: "working".into(),
        peers,
        rounds: if peers > 128 { 3 } else { 10 },
        link: Link {
            jitter_ms: 10.0,
            ..Link::default()
        },
        ..Scenario::default()
    }
}

/// Nobody gets a batch done.
fn idle(peers: usize) -> Scenario {
    Scenario {
        name: "idle".into(),
        batch_secs: 1e6,
        ..working(peers)
    }
}

/// Of every sixteen one crashes; 5% of all messages are lost.
fn crashing(peers: usize) -> Scenario {
    let crash = Fault {
        at_secs: 8.0,
        peers: (0..peers).step_by(16).collect(),
        kind: FaultKind::Crash,
        ..Fault::default()
    };
    let work = working(peers);
    Scenario {
        name: "crashing".into(),
        rounds: if peers > 128 { 4 } else { 40 },
        batch_secs: 0.5,
        watch: true,
        faults: vec![crash],
        link: Link {
            loss: 0.05,
            ..work.link
        },
        ..work
    }
}

fn row(report: &Report) {
    println!(
        "{:5}  {:8.0}  {:9.0}  {:7.2} s  {:8.2} s  {:7.0} MB",
        report.peers,
        report.msgs_per_peer_round,
        report.bytes_per_peer_round,
        report.agree_secs_median,
        report.secs / report.rounds as f64,
        report.peak_mem_bytes as f64 / 1e6
    );
}

fn alarms(report: &Report) -> Value {
    let (alarms, looks) = report.false_alarms;
    json!({
        "peers": report.peers,
        "crash_noticed_secs": report.crash_noticed_secs,
        "false_alarms": alarms,
        "looks": looks,
        "ok": report.ok,
    })
}
