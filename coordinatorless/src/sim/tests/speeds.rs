//! Proofs of speed: who has what it shows, and who shows nothing that it has not. The checker compares every speed that is agreed with what the
//! scenario gave the peer.

use super::*;
use crate::config::VerificationConfig;
use crate::protocol::membership::Member;
use crate::sim::adversary::{LiarKind, Liars};
use crate::sim::world::World;

fn asking(seed: u64, peers: usize, every: u64) -> Scenario {
    Scenario {
        seed,
        peers,
        rounds: 24,
        speeds: (0..peers).map(|peer| 0.5 + 0.25 * peer as f64).collect(),
        verification: VerificationConfig {
            speed_secs: 1.5,
            speed_every: every,
            ..VerificationConfig::default()
        },
        ..Scenario::default()
    }
}

/// The members as an honest peer has them in the end, and how many records it took a second view to decide.
fn played(scenario: &Scenario) -> (Vec<(usize, Member)>, usize) {
    let mut world = World::new(scenario);
    world.run();
    let (_, violations) = world.finish();
    assert!(violations.is_empty(), "{}: {violations:#?}", scenario.name);
    let later = world.records(0).filter(|one| one.certificate.slot.view > 0).count();
    let of = |peer: usize| {
        let id = scenario.keys(peer).id();
        world.chain(0)?.member(&id).map(|member| (peer, member.clone()))
    };
    ((0..scenario.peers).filter_map(of).collect(), later)
}

#[test]
fn everyone_shows_what_it_has_without_costing_a_view() {
    for seed in 1..=10 {
        let mut scenario = asking(seed, 6, 4);
        scenario.link.loss = 0.02;
        let (members, later) = played(&scenario);
        for (peer, member) in members {
            // Six tenths of the time were for computing, the rest for messages.
            let expected = 0.6 * 100_000.0 * scenario.speeds[peer];
            let shown = member.proven as f64;
            assert!(
                (shown / expected - 1.0).abs() < 0.02,
                "seed {seed}, peer {peer}: {shown} of {expected}"
            );
        }
        assert!(later <= 1, "seed {seed}: {later} records in a later view");
    }
}

#[test]
fn a_fast_newcomer_is_given_its_share_within_rounds() {
    // Eight times as fast as the four founders, all of whom have time to spare.
    let quota_after = |every: Option<u64>| {
        let mut scenario = asking(3, 5, every.unwrap_or(1 << 20));
        if every.is_none() {
            scenario.verification.speed_secs = 0.0;
        }
        scenario.speeds = vec![1.0, 1.0, 1.0, 1.0, 8.0];
        scenario.membership.round_batches = 150;
        scenario.rounds = 10;
        scenario.faults = vec![fault(12.0, &[4], FaultKind::Join)];
        let (members, _) = played(&scenario);
        let speed = |peer: usize| members.iter().find(|(at, _)| *at == peer).unwrap().1.speed as f64;
        let joined = members.iter().find(|(at, _)| *at == 4).unwrap().1.joined.0;
        assert!((2..=7).contains(&joined), "{joined}");
        speed(4) / speed(0)
    };
    let (with, without) = (quota_after(Some(1 << 20)), quota_after(None));
    println!("ten rounds in, its quota is {with:.1} times a founder's; {without:.1} where nobody asks");
    assert!(with > 6.0 && without < 2.0, "{with}, {without}");
}

#[test]
fn boasters_show_nothing_and_owe_it() {
    let kinds = [
        (LiarKind::TenfoldBoaster, true),
        (LiarKind::LateBoaster, true),
        (LiarKind::SealedBoaster, true),
        (LiarKind::HalfBoaster, false),
    ];
    for (kind, owes) in kinds {
        for seed in 1..=6 {
            let peers = vec![5, 6];
            let mut scenario = asking(seed, 7, 2);
            scenario.liars = vec![Liars { kind, peers }];
            let (members, later) = played(&scenario);
            for (peer, member) in members {
                let liar = peer >= 5;
                let expected = 0.6 * 100_000.0 * scenario.speeds[peer];
                // What is told to half of the members is passed on by them.
                if liar && owes {
                    assert_eq!((member.proven, member.owes), (0, true), "{kind:?}, seed {seed}");
                } else {
                    assert!(
                        member.proven as f64 <= expected * 1.01,
                        "{kind:?}, seed {seed}, peer {peer}"
                    );
                }
                if !liar {
                    assert!(!member.owes && member.proven > 0, "{kind:?}, seed {seed}, peer {peer}");
                }
            }
            assert!(later <= 2, "{kind:?}, seed {seed}: {later} records in a later view");
        }
    }
}

#[test]
fn who_starts_again_in_the_middle_shows_its_speed_the_next_time() {
    for seed in 1..=6 {
        let mut scenario = asking(seed, 5, 3);
        // The first record asks everyone; it is decided after some four seconds.
        scenario.faults = vec![
            fault(4.6, &[2], FaultKind::Crash),
            fault(9.0, &[2], FaultKind::Restart),
            fault(20.0, &[3], FaultKind::Crash),
            fault(22.0, &[3], FaultKind::RestartWithoutWal),
        ];
        scenario.rounds = 40;
        let (members, _) = played(&scenario);
        assert!(
            members.iter().all(|(_, member)| member.proven > 0),
            "seed {seed}: {members:?}"
        );
    }
}
