//! R19 to R22: what was signed is never contradicted, and those who are left go on.

use std::collections::BTreeSet;

use super::super::Scenario;
use super::bench::Bench;
use crate::protocol::event::Notice;
use crate::types::*;

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
    // The bench fails when anyone says two things for one attempt. Peers crash while they write a statement, after it, and later.
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
        assert!(!bench.statements.is_empty());
        bench.groups = vec![(0..4).collect()];
        assert!(bench.until(600, |bench| all(bench, 6)), "seed {seed}: {}", bench.tell());
    }
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
