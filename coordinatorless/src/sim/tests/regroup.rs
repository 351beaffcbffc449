//! R19 to R22: what was signed is never contradicted, and those who are left go on.

use std::collections::BTreeSet;

use super::super::Scenario;
use super::bench::Bench;
use crate::protocol::event::{Event, Notice};
use crate::types::*;
use crate::wire::{Body, Signed};

fn bench(seed: u64, peers: usize) -> Bench {
    Bench::new(Scenario {
        seed,
        peers,
        ..Scenario::default()
    })
}

fn all(bench: &Bench, round: u64) -> bool {
    (0..bench.peers.len()).all(|peer| bench.peers[peer].state.is_none() || bench.round(peer) >= Round(round))
}

#[test]
fn all_restart_at_once_and_go_on_with_what_they_signed() {
    // Each seed tears every peer's log somewhere else, in the middle of a round's votes.
    for seed in 0..24u64 {
        let mut bench = bench(seed, 4);
        assert!(bench.until(60, |bench| all(bench, 2)), "seed {seed}");
        let mut goal = 2;
        for again in 0..3 {
            for peer in 0..4usize {
                bench.tear(peer, (seed as usize * 7 + peer * 5 + again * 3) % 23);
            }
            // Some tear late or never, with a quorum gone: they fail the hard way.
            bench.until(4, |bench| bench.peers.iter().all(|peer| peer.state.is_none()));
            (0..4).for_each(|peer| bench.crash(peer));
            // One may have lost its log altogether.
            (0..4).for_each(|peer| bench.start(peer, again != 2 || peer as u64 != seed % 4));
            goal += 3;
            assert!(
                bench.until(300, |bench| all(bench, goal)),
                "seed {seed}, restart {again}: {}",
                bench.tell()
            );
        }
        assert_eq!(bench.branch(0), 0, "seed {seed}: all were there, so nobody regroups");
    }
}

#[test]
fn two_of_four_without_their_logs_are_left_behind_and_come_back() {
    let mut bench = bench(1, 4);
    assert!(bench.until(60, |bench| all(bench, 2)));
    (0..4).for_each(|peer| bench.crash(peer));
    (0..4).for_each(|peer| bench.start(peer, peer < 2));
    // Two votes of four decide nothing, and whoever forgot what it signed must not help: the other two regroup.
    assert!(bench.until(300, |bench| all(bench, 6)), "{}", bench.tell());
    assert_ne!(bench.branch(0), 0);
    let forgetful: BTreeSet<PeerId> = [2, 3].map(|peer| bench.peers[peer].keys.id()).into();
    assert!(bench.statements.iter().all(|(signer, ..)| !forgetful.contains(signer)));
    let members: Vec<PeerId> = bench.peers[0].state.as_ref().unwrap().chain().active().collect();
    assert_eq!(members.len(), 4, "who was left behind has joined again");
}

/// Peers 0 and 1 of four, cut off in round 3; stops when peer 0 has begun a branch that has no record yet.
fn begun(seed: u64) -> Bench {
    let mut bench = bench(seed, 4);
    assert!(bench.until(60, |bench| all(bench, 2)));
    bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
    assert!(bench.until(120, |bench| bench.branch(0) != 0));
    bench
}

#[test]
fn a_statement_is_said_again_after_a_crash_and_never_another_for_its_attempt() {
    // The bench fails when anyone says two things for one attempt. Peers crash while they write a statement, after it, and later; in a run or
    // two they crash too often to make one.
    let mut stated = 0;
    for seed in 0..12u64 {
        let mut bench = bench(seed, 4);
        assert!(bench.until(60, |bench| all(bench, 2)));
        bench.groups = vec![[0, 1].into(), [2, 3].into()];
        for step in 0..6usize {
            let peer = (seed as usize + step) % 4;
            bench.tear(peer, step % 3);
            bench.until(6 + seed % 5, |bench| bench.peers[peer].state.is_none());
            bench.crash(peer);
            bench.start(peer, true);
        }
        stated += usize::from(!bench.statements.is_empty());
        bench.groups = vec![(0..4).collect()];
        assert!(bench.until(600, |bench| all(bench, 6)), "seed {seed}: {}", bench.tell());
    }
    assert!(stated >= 9, "{stated}");
}

#[test]
fn who_crashes_before_the_first_record_of_its_branch_is_on_that_branch_again() {
    let mut bench = begun(3);
    let branch = bench.branch(0);
    // Some votes of the branch are cast, none decides: its other half is gone.
    bench.until(3, |bench| !bench.peers[0].wal.is_empty() && bench.branch(1) == branch);
    bench.crash(0);
    bench.start(0, true);
    assert_eq!(bench.branch(0), branch);
    assert!(bench.until(120, |bench| bench.round(0) >= Round(5)));
    assert_eq!(bench.peers[0].records.last().unwrap().record.slot.branch, branch);
}

#[test]
fn a_group_that_shrinks_before_its_first_record_makes_another_attempt_at_the_same_fork() {
    let mut bench = begun(5);
    let first = bench.branch(0);
    bench.crash(1);
    assert!(bench.until(300, |bench| bench.round(0) >= Round(5)));
    assert_ne!(bench.branch(0), first);
    // What it decided alone can be checked from the fork by anyone, itself after a restart included.
    bench.crash(0);
    bench.start(0, true);
    bench.start(1, true);
    bench.groups = vec![(0..4).collect()];
    assert!(bench.until(600, |bench| all(bench, 9)), "{}", bench.tell());
    let branches: BTreeSet<Branch> = (0..4).map(|peer| bench.branch(peer)).collect();
    assert_eq!(branches.len(), 1);
    let refused = |notice: &Notice| matches!(notice, Notice::Rejected { kind: "record", .. });
    assert!(!bench.peers.iter().flat_map(|peer| &peer.notices).any(refused));
}

fn is_vote(message: &Signed, kind: VoteKind) -> bool {
    matches!(&message.body, Body::Vote(vote) if vote.slot.branch == 0 && vote.slot.round == Round(3) && vote.kind == kind)
}

/// The first record that peer 0 decided on its branch: that of round 3.
fn first_on_branch(bench: &Bench) -> Record {
    bench.peers[0].records[2].record.clone()
}

#[test]
fn locks_are_kept_over_a_regroup() {
    for seed in 0..8u64 {
        // Everyone prevotes and precommits the record of round 3, and nobody hears of the others' precommits: perhaps it is decided.
        let mut bench = bench(seed, 4);
        assert!(bench.until(60, |bench| all(bench, 2)));
        bench.lost = |_, _, message| is_vote(message, VoteKind::Precommit);
        bench.until(5, |_| false);
        bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
        if seed % 2 == 1 {
            // The lock is in the log, and found there again on the branch.
            assert!(bench.until(120, |bench| bench.branch(0) != 0), "{}", bench.tell());
            (0..2).for_each(|peer| bench.crash(peer));
            (0..2).for_each(|peer| bench.start(peer, true));
        }
        assert!(
            bench.until(200, |bench| bench.round(0) >= Round(4)),
            "seed {seed}: {}",
            bench.tell()
        );
        let record = first_on_branch(&bench);
        assert_ne!(record.slot.branch, 0);
        let carried = record.carried.clone().unwrap();
        assert!(carried.polka.prevotes.len() >= 3, "seed {seed}");
        // All four had worked for it, and all four are paid, those who are cut off too.
        assert_eq!(record.contributions.len(), 4, "seed {seed}");
        assert!(record.contributions.iter().all(|one| one.commit.slot.branch == 0));
        let chain = bench.peers[0].state.as_ref().unwrap().chain().clone();
        let rounds = |peer: usize| chain.ledger.get(&bench.peers[peer].keys.id()).unwrap().rounds;
        assert_eq!((rounds(2), rounds(3)), (3, 3), "seed {seed}");
        // Only the first record of a branch carries anything.
        assert!(bench.peers[0].records[3].record.carried.is_none());
        bench.groups = vec![(0..4).collect()];
        assert!(
            bench.until(900, |bench| all(bench, 12)),
            "seed {seed}: {}",
            bench.tell()
        );
    }
}

#[test]
fn a_polka_that_only_one_survivor_saw_is_carried_over_by_all() {
    for seed in 0..4u64 {
        let mut bench = bench(seed, 4);
        assert!(bench.until(60, |bench| all(bench, 2)));
        bench.lost =
            |_, to, message| is_vote(message, VoteKind::Precommit) || (to != 0 && is_vote(message, VoteKind::Prevote));
        bench.until(5, |_| false);
        bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
        assert!(
            bench.until(200, |bench| bench.round(0) >= Round(3)),
            "seed {seed}: {}",
            bench.tell()
        );
        assert!(first_on_branch(&bench).carried.is_some(), "seed {seed}");
    }
}

#[test]
fn a_record_decided_before_the_regroup_wins_over_the_one_that_carries_it() {
    let mut bench = bench(2, 4);
    assert!(bench.until(60, |bench| all(bench, 2)));
    // Peer 3 alone sees the decision, and can tell nobody.
    bench.lost = |from, to, message| {
        (to != 3 && is_vote(message, VoteKind::Precommit)) || (from == 3 && message.body.slot().round >= Round(4))
    };
    assert!(bench.until(20, |bench| bench.round(3) == Round(3)), "{}", bench.tell());
    bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
    assert!(bench.until(200, |bench| bench.round(0) >= Round(3)), "{}", bench.tell());
    let (carrying, decided) = (first_on_branch(&bench), bench.peers[3].records[2].record.clone());
    assert_eq!(carrying.carried.unwrap().polka.record, decided.hash());
    assert_eq!(carrying.contributions, decided.contributions);
    bench.groups = vec![(0..4).collect()];
    bench.lost = |_, _, _| false;
    assert!(bench.until(900, |bench| all(bench, 8)), "{}", bench.tell());
    assert!((0..4).all(|peer| bench.peers[peer].records[2].record == decided));
}

#[test]
fn a_statement_with_a_polka_that_proves_nothing_is_refused() {
    let mut bench = bench(1, 4);
    assert!(bench.until(60, |bench| all(bench, 2)));
    let chain = bench.peers[0].state.as_ref().unwrap().chain().clone();
    let keys = &bench.peers[1].keys;
    let (me, liar) = (bench.peers[0].keys.id(), keys.id());
    let mut survivors = vec![me, liar];
    survivors.sort();
    let prevotes = vec![(liar, Signature([1; 64]))];
    let body = Body::Regroup(Regroup {
        slot: chain.next_slot(),
        attempt: 1,
        tip: chain.agreed.record,
        polka: Some(Polka {
            view: 7,
            record: Hash::of(b"never proposed"),
            prevotes,
        }),
        survivors,
    });
    let message = std::sync::Arc::new(keys.sign(&body));
    bench.event(0, Event::Message { from: liar, message });
    let refused = |notice: &Notice| matches!(notice, Notice::Rejected { kind: "regroup", reason, .. } if reason.contains("polka"));
    assert!(bench.peers[0].notices.iter().any(refused));
}

#[test]
fn a_view_that_nobody_can_have_come_to_is_refused() {
    let mut bench = bench(1, 4);
    assert!(bench.until(60, |bench| all(bench, 2)));
    let chain = bench.peers[0].state.as_ref().unwrap().chain().clone();
    // Half of the weight: the engine would follow that to any view, and cannot count on from the last.
    for liar in [1, 2] {
        let keys = bench.peers[liar].keys.clone();
        let slot = Slot {
            view: View::MAX,
            ..chain.next_slot()
        };
        for kind in [VoteKind::Prevote, VoteKind::Precommit] {
            let message = std::sync::Arc::new(keys.sign(&Body::Vote(Vote {
                slot,
                kind,
                record: None,
            })));
            let from = keys.id();
            bench.event(0, Event::Message { from, message });
        }
    }
    let refused = |notice: &&Notice| matches!(notice, Notice::Rejected { kind: "vote", reason, .. } if reason.contains("4294967295"));
    assert_eq!(bench.peers[0].notices.iter().filter(refused).count(), 4);
    let goal = bench.round(0).0 + 3;
    assert!(bench.until(60, |bench| all(bench, goal)), "{}", bench.tell());
}

#[test]
fn a_founder_who_rewrites_history_is_refused() {
    let mut scenario = Scenario {
        seed: 7,
        ..Scenario::default()
    };
    scenario.membership.finality_rounds = 5;
    // The same run without peer 3: what three founders' keys, more than 2/3 of the weight of the genesis, can make of its past.
    let mut forged = Bench::new(scenario.clone());
    forged.crash(3);
    assert!(forged.until(300, |forged| all(forged, 20)), "{}", forged.tell());
    let records = forged.peers[0].records.clone();
    let meet = |rounds: u64| {
        let mut bench = Bench::new(scenario.clone());
        assert!(bench.until(300, |bench| all(bench, rounds)), "{}", bench.tell());
        let (from, records) = (bench.peers[0].keys.id(), records.clone());
        bench.decided.clear();
        bench.event(3, Event::Records { from, records });
        bench
    };
    // What was applied `finality_rounds` ago stays, however heavy and long the other chain is, and people are told.
    let bench = meet(6);
    assert_eq!(bench.branch(3), 0);
    assert!(bench.round(3) < Round(20));
    let split = Notice::PermanentSplit {
        branch: 0,
        fork: Round(0),
    };
    assert!(bench.peers[3].notices.contains(&split), "{}", bench.tell());
    // Before that, it is the longer of two certified chains.
    let bench = meet(2);
    assert_eq!(bench.round(3), Round(20));
}

#[test]
fn points_earned_since_a_minority_regroup_are_marked_as_not_final() {
    let mut scenario = Scenario {
        seed: 4,
        ..Scenario::default()
    };
    scenario.membership.regroup_minority_factor = 1.0;
    let mut bench = Bench::new(scenario);
    assert!(bench.until(60, |bench| all(bench, 2)));
    bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
    assert!(bench.until(900, |bench| bench.round(0) >= Round(40) && bench.round(2) >= Round(40)));
    for peer in [0, 2] {
        // Half of the weight at the fork is no majority.
        let chain = bench.peers[peer].state.as_ref().unwrap().chain().clone();
        assert_eq!(chain.agreed.minority, Some(Round(3)));
        let account = chain.ledger.get(&bench.peers[peer].keys.id()).unwrap();
        assert!(
            account.contested > 0 && account.contested < account.vested,
            "{account:?}"
        );
    }
}
