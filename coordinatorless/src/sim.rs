//! The protocol core under seeded faults, in virtual time: the same [`crate::protocol::State`] that runs under iroh, with links that
//! lose, delay, reorder and duplicate, and peers that crash and come back with nothing but their disks.
//!
//! After every step a checker (`check`) holds the run to its promises. The same scenario and seed give the same digest on every
//! machine: there is one clock, one random source, and ordered maps throughout.

mod adversary;
mod check;
mod fault;
mod scenario;
mod shrink;
mod world;

pub use adversary::{LiarKind, Liars};
pub use check::{Invariant, Violation};
pub use fault::{Chaos, Fault, FaultKind};
pub use scenario::{Link, Scenario, ScenarioError};
pub use shrink::shrink;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::types::Hash;

/// What a simulated run came to (`murmur sim --json`).
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// No invariant was broken and every live peer reached the last round.
    pub ok: bool,
    /// The scenario's name.
    pub scenario: String,
    /// The seed.
    pub seed: u64,
    /// Peers.
    pub peers: usize,
    /// Rounds asked for.
    pub rounds: u64,
    /// BLAKE3 over everything that was decided and applied, by whom and when.
    pub digest: Hash,
    /// Promises broken.
    pub violations: Vec<Violation>,
    /// Frames of liars that the wire's codec refused, by reason.
    pub refused: std::collections::BTreeMap<String, u64>,
    /// How often honest peers noticed what (a refusal by its kind), where anybody lies.
    pub noticed: std::collections::BTreeMap<String, u64>,
    /// Liars that the record chain slashed.
    pub slashed: std::collections::BTreeSet<usize>,
    /// And after which round.
    pub slashed_after: std::collections::BTreeMap<usize, u64>,
    /// What each liar kept of the points that it claimed, as a share.
    pub kept: std::collections::BTreeMap<usize, f64>,
    /// A third of the weight or more came to lie (honest peers that are away lose weight): from then on nothing was promised.
    pub beyond_model: bool,
    /// What was held to, how often, and how often it broke.
    pub invariants: Vec<Invariant>,
    /// Wall-clock seconds the simulation took.
    pub secs: f64,
    /// Virtual seconds it covered.
    pub virtual_secs: f64,
    /// Median virtual seconds from the last counted commit to the decision.
    pub agree_secs_median: f64,
    /// Virtual seconds until everyone knew of a crash: the longest (`watch`).
    pub crash_noticed_secs: Option<f64>,
    /// How often somebody alive was taken for dead, of so many looks (`watch`).
    pub false_alarms: (u64, u64),
    /// Messages sent per peer and round.
    pub msgs_per_peer_round: f64,
    /// Their bytes.
    pub bytes_per_peer_round: f64,
    /// Messages of each kind per peer and round.
    pub kinds_per_peer_round: std::collections::BTreeMap<&'static str, f64>,
    /// The process's peak resident memory in bytes, where the system tells.
    pub peak_mem_bytes: u64,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario) -> Report {
    let began = std::time::Instant::now();
    let mut world = world::World::new(scenario);
    world.run();
    let (digest, violations) = world.finish();
    let per = (scenario.peers as f64 * scenario.rounds as f64).max(1.0);
    Report {
        ok: violations.is_empty(),
        scenario: scenario.name.clone(),
        seed: scenario.seed,
        peers: scenario.peers,
        rounds: scenario.rounds,
        digest,
        violations,
        beyond_model: world.is_beyond(),
        invariants: world.invariants(),
        refused: std::mem::take(&mut world.refused),
        noticed: std::mem::take(&mut world.noticed),
        slashed: world.slashed.keys().copied().collect(),
        slashed_after: world.slashed.iter().map(|(liar, round)| (*liar, round.0)).collect(),
        kept: world.kept(),
        secs: began.elapsed().as_secs_f64(),
        virtual_secs: world.now() as f64 / 1e6,
        agree_secs_median: world.median_agreement() as f64 / 1e6,
        crash_noticed_secs: world.watch.noticed.iter().max().map(|secs| *secs as f64 / 1e6),
        false_alarms: (world.watch.alarms, world.watch.looks),
        msgs_per_peer_round: world.messages as f64 / per,
        bytes_per_peer_round: world.bytes as f64 / per,
        kinds_per_peer_round: world
            .kinds
            .iter()
            .map(|(kind, count)| (*kind, *count as f64 / per))
            .collect(),
        peak_mem_bytes: peak_memory(),
    }
}

/// What many seeds came to.
#[derive(Debug)]
pub struct Seeds {
    /// How many kept every promise.
    pub passed: u64,
    /// Of these, how many went beyond what is promised anything.
    pub beyond: u64,
    /// The first that did not.
    pub failed: Option<Report>,
}

/// Runs `count` seeds from the scenario's own on, on all cores; stops soon after one fails.
pub fn run_seeds(scenario: &Scenario, count: u64) -> Seeds {
    let next = AtomicU64::new(0);
    let (passed, beyond) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed: Mutex<Option<Report>> = Mutex::new(None);
    let worker = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let failed = || failed.lock().unwrap_or_else(PoisonError::into_inner);
            if at >= count || failed().is_some() {
                return;
            }
            let seed = scenario.seed.wrapping_add(at);
            let report = run(&Scenario {
                seed,
                ..scenario.clone()
            });
            if report.ok {
                passed.fetch_add(1, Ordering::Relaxed);
                beyond.fetch_add(u64::from(report.beyond_model), Ordering::Relaxed);
                continue;
            }
            let mut first = failed();
            if first.as_ref().is_none_or(|first| seed < first.seed) {
                *first = Some(report);
            }
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores {
            scope.spawn(worker);
        }
    });
    Seeds {
        passed: passed.into_inner(),
        beyond: beyond.into_inner(),
        failed: failed.into_inner().unwrap_or_else(PoisonError::into_inner),
    }
}

/// `VmHWM` of this process; 0 where there is no `/proc`.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests;
