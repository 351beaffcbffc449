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
    // Two proposals are no evidence by themselves; the votes that go with them are.
    for report in survives(LiarKind::EquivocatingProposer) {
        assert!(!report.slashed.is_empty());
    }
}

#[test]
fn a_double_voter_splits_nobody_and_is_barred() {
    for report in survives(LiarKind::DoubleVoter) {
        assert_eq!(report.slashed, [5, 6].into());
    }
}

#[test]
fn who_withholds_its_blob_is_not_counted_and_holds_up_nobody() {
    survives(LiarKind::Withholder);
}

#[test]
fn what_is_handed_to_some_reaches_all_who_need_it() {
    survives(LiarKind::SelectiveWithholder);
}

#[test]
fn claiming_to_hold_everything_gets_nothing_counted_that_honest_peers_lack() {
    survives(LiarKind::HaveEverything);
}

#[test]
fn claiming_to_hold_nothing_keeps_nothing_from_being_counted() {
    survives(LiarKind::HaveNothing);
}

#[test]
fn claiming_to_hear_nobody_lapses_nobody() {
    survives(LiarKind::HearsNobody);
}

#[test]
fn records_that_break_a_rule_are_never_decided() {
    survives(LiarKind::RuleBreaker);
}
