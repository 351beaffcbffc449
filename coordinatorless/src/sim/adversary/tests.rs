#![allow(clippy::unwrap_used)]
use super::*;
use crate::sim::{Report, Scenario, run};

/// Seven peers of equal weight, the last two of them liars: just under a third.
fn seven(seed: u64, liars: Vec<Liars>) -> Scenario {
    Scenario {
        name: format!("{liars:?} seed {seed}"),
        seed,
        peers: 7,
        rounds: 15,
        limit_secs: 600.0,
        liars,
        ..Scenario::default()
    }
}

#[track_caller]
fn holds(scenario: &Scenario) -> Report {
    let report = run(scenario);
    assert!(
        report.ok,
        "{}: {:#?} after {} s",
        scenario.name, report.violations, report.virtual_secs
    );
    report
}

/// Two liars of one kind over several seeds.
#[track_caller]
fn survives(kind: LiarKind) -> Vec<Report> {
    let peers = vec![5, 6];
    (1..=4)
        .map(|seed| {
            holds(&seven(
                seed,
                vec![Liars {
                    kind,
                    peers: peers.clone(),
                }],
            ))
        })
        .collect()
}

#[test]
fn an_equivocating_proposer_splits_nobody() {
    survives(LiarKind::EquivocatingProposer);
}

#[test]
fn a_double_voter_splits_nobody() {
    survives(LiarKind::DoubleVoter);
}
