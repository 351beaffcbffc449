//! `murmur bench audits`: how soon who cheats is barred under the audits and the vesting that runs have by default, and what it keeps; in the
//! simulator, where what a replay shows is given.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use coordinatorless::config::{RewardConfig, VerificationConfig};
use coordinatorless::sim::{LiarKind, Liars, Report, Scenario, run as simulate};
use serde::Serialize;

use super::print_json;
use crate::cli::BenchAuditsArgs;

/// Peers, and which of them cheat: less than a third of the weight.
const PEERS: usize = 7;
const LIARS: [usize; 2] = [5, 6];

/// Who is tried, in words, and the share of the runs asked for that it gets, as a divisor: who holds out longer takes longer.
const KINDS: [(LiarKind, &str, u64); 9] = [
    (LiarKind::FalseWork, "work not done, in every round", 1),
    (LiarKind::FalseWorkNowAndThen, "work not done, in one round of ten", 8),
    (LiarKind::WithheldOpening, "work not done, nothing opened to anyone", 4),
    (LiarKind::Dodger, "work not done, away when asked", 100),
    (
        LiarKind::DodgerNowAndThen,
        "a quarter not done, away when asked about it",
        100,
    ),
    (LiarKind::UntoldSteps, "work done, its steps told to nobody", 8),
    (LiarKind::OtherSteps, "work done, other steps committed to", 8),
    (LiarKind::Colluder, "two that cover each other and accuse the honest", 1),
    (LiarKind::FalseAccuser, "whoever may be audited accused", 8),
];

/// What came of one kind.
#[derive(Debug, Serialize)]
struct Row {
    kind: LiarKind,
    what: &'static str,
    liars: usize,
    barred: usize,
    /// Rounds until they were: the mean, and within how many half and 99% of them were.
    mean: f64,
    half: u64,
    nearly_all: u64,
    /// The mean share of the claimed points that was kept.
    kept: f64,
    /// Promises to honest peers that broke: that none is slashed among them.
    violations: usize,
}

/// Runs every kind to its end, and prints the table.
///
/// # Errors
/// A promise to honest peers broke.
pub fn run(args: &BenchAuditsArgs) -> Result<()> {
    let (mut verification, rewards) = (VerificationConfig::default(), RewardConfig::default());
    verification.audit_permille = args.audit_permille.unwrap_or(verification.audit_permille);
    if !args.json {
        println!(
            "{} of {PEERS} peers cheat; {:.0}% of all contributions are audited, points vest after {} rounds, when a run ends\n",
            LIARS.len(),
            verification.audit_permille as f64 / 10.0,
            rewards.vesting_rounds
        );
        println!("| cheat | barred | rounds until then: mean | half | 99% | points kept |");
        println!("|---|---|---|---|---|---|");
    }
    let mut rows = Vec::new();
    for (kind, what, divisor) in KINDS {
        let runs = (args.runs / divisor).max(1);
        let row = Row::of(kind, what, &reports(kind, runs, &verification, rewards.vesting_rounds));
        if !args.json {
            println!(
                "| {what} | {} of {} | {:.0} | {} | {} | {:.2}% |",
                row.barred,
                row.liars,
                row.mean,
                row.half,
                row.nearly_all,
                100.0 * row.kept
            );
        }
        rows.push(row);
    }
    if args.json {
        print_json(&rows)?;
    }
    let broken: usize = rows.iter().map(|row| row.violations).sum();
    ensure!(
        broken == 0,
        "{broken} promises to honest peers broke: `murmur sim` shows which"
    );
    Ok(())
}

/// Runs of one kind, each with a seed of its own, on all cores.
fn reports(kind: LiarKind, runs: u64, verification: &VerificationConfig, rounds: u64) -> Vec<Report> {
    let scenario = |seed| Scenario {
        name: format!("{kind:?}"),
        seed,
        peers: PEERS,
        rounds,
        limit_secs: 1e6,
        liars: vec![Liars {
            kind,
            peers: LIARS.to_vec(),
        }],
        verification: verification.clone(),
        vesting_rounds: rounds,
        until_barred: true,
        ..Scenario::default()
    };
    let next = AtomicU64::new(1);
    let found = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > runs {
                return;
            }
            let report = simulate(&scenario(seed));
            found.lock().unwrap_or_else(PoisonError::into_inner).push(report);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Row {
    fn of(kind: LiarKind, what: &'static str, reports: &[Report]) -> Self {
        let after = reports.iter().flat_map(|report| report.slashed_after.values());
        let mut after: Vec<u64> = after.copied().collect();
        after.sort_unstable();
        let kept: Vec<f64> = reports
            .iter()
            .flat_map(|report| report.kept.values().copied())
            .collect();
        let at = |share: f64| {
            let last = after.len().saturating_sub(1);
            after.get((share * last as f64).round() as usize).copied().unwrap_or(0)
        };
        Self {
            kind,
            what,
            liars: reports.len() * LIARS.len(),
            barred: after.len(),
            mean: after.iter().sum::<u64>() as f64 / after.len().max(1) as f64,
            half: at(0.5),
            nearly_all: at(0.99),
            kept: kept.iter().sum::<f64>() / kept.len().max(1) as f64,
            violations: reports.iter().map(|report| report.violations.len()).sum(),
        }
    }
}
