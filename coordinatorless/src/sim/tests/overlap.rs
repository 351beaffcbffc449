//! R16: the same promises where a round is trained while the one before it is agreed. Besides what the checker looks at in every run, each audit
//! here compares what a member trained on with what its auditor would replay, and slashes an honest member where they differ.

use super::bench::Bench;
use super::*;
use crate::config::TimingConfig;
use crate::protocol::event::Notice;
use crate::sim::world::World;
use crate::types::*;

pub(super) fn overlapped(scenario: Scenario) -> Scenario {
    let timing = TimingConfig {
        overlap: 1,
        ..scenario.timing.clone()
    };
    Scenario { timing, ..scenario }
}

fn shipped(text: &str) -> Scenario {
    overlapped(Scenario::from_toml(text).unwrap())
}

#[test]
fn overlap_keeps_every_promise_of_the_shipped_scenarios() {
    for scenario in scenarios::seven() {
        scenarios::all_hold(&overlapped(scenario), 5);
    }
}

#[test]
fn overlap_breaks_no_promise_in_two_hundred_storms() {
    scenarios::all_hold(&shipped(include_str!("../../../scenarios/storm.toml")), 200);
}

#[test]
fn overlap_breaks_no_promise_in_a_hundred_storms_of_liars() {
    scenarios::all_hold(&shipped(include_str!("../../../scenarios/storm_of_liars.toml")), 100);
}

#[test]
fn what_failed_once_does_not_fail_with_overlap() {
    for text in scenarios::REGRESSIONS {
        holds(shipped(text));
    }
}

#[test]
fn overlap_holds_where_members_come_go_crash_and_lose_their_logs() {
    for seed in 0..20 {
        let faults = vec![
            fault(9.0, &[5], FaultKind::Join),
            fault(14.0, &[1], FaultKind::Crash),
            fault(20.0, &[0], FaultKind::Leave),
            fault(26.0, &[1], FaultKind::Restart),
            fault(34.0, &[2], FaultKind::Crash),
            fault(36.0, &[2], FaultKind::RestartWithoutWal),
        ];
        let link = Link {
            loss: 0.05,
            duplicate: 0.02,
            ..Link::default()
        };
        holds(overlapped(Scenario {
            name: format!("seed {seed}"),
            seed,
            peers: 6,
            rounds: 30,
            link,
            faults,
            ..Scenario::default()
        }));
    }
}

#[test]
fn a_round_takes_as_long_as_the_longer_of_training_and_exchange() {
    // Four seconds of training; blobs take two to get through, the votes a good part of another.
    let scenario = Scenario {
        rounds: 30,
        batch_secs: 0.25,
        link: Link {
            latency_ms: 150.0,
            bandwidth: 25_000.0,
            ..Link::default()
        },
        ..Scenario::default()
    };
    let (apart, together) = (holds(scenario.clone()), holds(overlapped(scenario)));
    let each = |report: &Report| report.virtual_secs / 30.0;
    println!("{:.2} s a round, {:.2} s with overlap", each(&apart), each(&together));
    assert!(
        each(&apart) > 6.0 && each(&together) < 4.4,
        "{} {}",
        each(&apart),
        each(&together)
    );
}

/// Blobs by who sent them, as the records of a peer count them in a round.
fn counted(bench: &Bench, at: usize, round: u64) -> Vec<(PeerId, Hash)> {
    let record = &bench.peers[at].records[round as usize - 1].record;
    assert_eq!(record.slot.round, Round(round));
    let each = record.contributions.iter();
    each.map(|one| (one.member, one.commit.blob)).collect()
}

fn all(bench: &Bench, round: u64) -> bool {
    (0..bench.peers.len()).all(|peer| bench.peers[peer].state.is_none() || bench.round(peer) >= Round(round))
}

fn bench(seed: u64) -> Bench {
    Bench::new(overlapped(Scenario {
        seed,
        ..Scenario::default()
    }))
}

#[test]
fn survivors_of_a_regroup_promise_again_what_they_had_trained() {
    for seed in 0..6 {
        let mut bench = bench(seed);
        assert!(bench.until(60, |bench| all(bench, 2)), "{}", bench.tell());
        // Everyone's work for round 3 is sent when the others vanish, and nobody has proposed it.
        bench.lost = |_, _, message| matches!(message.body, crate::wire::Body::Proposal(_));
        bench.until(3, |_| false);
        let trained = bench.trained_of(0, Round(3));
        assert_eq!(trained.len(), 1, "seed {seed}");
        bench.groups = vec![[0, 1].into(), [2].into(), [3].into()];
        assert!(bench.until(200, |bench| bench.branch(0) != 0), "{}", bench.tell());
        bench.lost = |_, _, _| false;
        assert!(bench.until(200, |bench| bench.round(0) >= Round(4)), "{}", bench.tell());
        assert_ne!(bench.peers[0].records[2].record.slot.branch, 0);
        // It was trained once, on the old branch, and counted on the new one; what the others had went back.
        assert_eq!(bench.trained_of(0, Round(3)), trained, "seed {seed}: trained again");
        let members: Vec<PeerId> = counted(&bench, 0, 3).into_iter().map(|(member, _)| member).collect();
        let mut survivors = vec![bench.peers[0].keys.id(), bench.peers[1].keys.id()];
        survivors.sort();
        assert_eq!(members, survivors, "seed {seed}");
        assert!(!bench.peers[0].records[2].record.returned.is_empty());
        assert!(
            bench.peers[0].records[2]
                .record
                .returned
                .iter()
                .all(|range| range.returns == 0)
        );
        bench.groups = vec![(0..4).collect()];
        assert!(
            bench.until(900, |bench| all(bench, 10)),
            "seed {seed}: {}",
            bench.tell()
        );
    }
}

#[test]
fn all_restart_at_once_and_train_the_round_in_flight_again() {
    for seed in 0..12u64 {
        let mut bench = bench(seed);
        assert!(bench.until(60, |bench| all(bench, 3)), "{}", bench.tell());
        bench.until(seed % 4, |_| false);
        let round = (0..4).map(|peer| bench.round(peer)).max().unwrap();
        (0..4).for_each(|peer| bench.crash(peer));
        (0..4).for_each(|peer| bench.start(peer, true));
        assert!(bench.until(300, |bench| all(bench, round.0 + 3)), "{}", bench.tell());
        for next in [round.0 + 1, round.0 + 2, round.0 + 3] {
            assert_eq!(counted(&bench, 0, next).len(), 4, "seed {seed}, round {next}");
        }
    }
}

#[test]
fn who_rolls_back_drops_what_it_trained_on_the_branch_that_lost() {
    for seed in 0..8 {
        let mut bench = bench(seed);
        assert!(bench.until(60, |bench| all(bench, 2)), "{}", bench.tell());
        // One alone regroups, goes on for a while, and comes back to three who decided all along.
        bench.groups = vec![[0, 1, 2].into(), [3].into()];
        assert!(bench.until(400, |bench| bench.round(3) >= Round(6)), "{}", bench.tell());
        bench.groups = vec![(0..4).collect()];
        assert!(
            bench.until(200, |bench| bench.branch(3) == bench.branch(0)),
            "seed {seed}: {}",
            bench.tell()
        );
        let goal = bench.round(0).0 + 6;
        assert!(
            bench.until(300, |bench| all(bench, goal)),
            "seed {seed}: {}",
            bench.tell()
        );
        let back = bench.peers[3].keys.id();
        let counts = |round: u64| counted(&bench, 0, round).iter().any(|(member, _)| *member == back);
        assert!((goal - 2..=goal).any(counts), "seed {seed}: it works again");
        let refused = |notice: &Notice| matches!(notice, Notice::Rejected { kind: "commit", .. });
        let noticed = bench.peers.iter().flat_map(|peer| &peer.notices);
        assert_eq!(noticed.filter(|notice| refused(notice)).count(), 0, "seed {seed}");
    }
}

#[test]
fn what_was_trained_from_a_model_that_went_astray_is_dropped_and_trained_again() {
    for seed in 0..6 {
        let mut bench = bench(seed);
        let (astray, wrong) = (2, Hash::of(b"another model"));
        bench.astray = Some((astray, Round(3)));
        assert!(bench.until(120, |bench| all(bench, 8)), "seed {seed}: {}", bench.tell());
        let records = &bench.peers[0].records;
        let counted = records.iter().flat_map(|decided| &decided.record.contributions);
        assert!(counted.clone().all(|one| one.commit.model_root != wrong));
        // Round 5 was begun from the wrong model of round 3, stopped when the record of round 4 told so, and begun again from the right one.
        assert!(bench.trained_of(astray, Round(5)).len() == 2, "seed {seed}");
        let me = bench.peers[astray].keys.id();
        let rounds = counted
            .filter(|one| one.member == me)
            .map(|one| one.commit.slot.round.0);
        assert_eq!(
            rounds.take(8).collect::<Vec<_>>(),
            [1, 2, 3, 4, 5, 6, 7, 8],
            "seed {seed}"
        );
        let told = |notice: &Notice| matches!(notice, Notice::Warning(text) if text.contains("fetched anew"));
        assert_eq!(
            bench.peers[astray].notices.iter().filter(|one| told(one)).count(),
            1,
            "seed {seed}"
        );
    }
}

#[test]
fn the_first_two_rounds_are_trained_from_the_genesis_and_each_later_one_from_the_record_before_the_last() {
    let mut world = World::new(&overlapped(Scenario::default()));
    world.run();
    let mut seen = 0;
    for decided in world.records(0) {
        let record = &decided.record;
        let base = record.slot.round.previous().previous();
        assert_eq!(record.contributions.len(), 4);
        assert!(record.contributions.iter().all(|one| one.commit.base == base));
        assert!(
            record
                .contributions
                .iter()
                .all(|one| one.commit.parent == record.parent)
        );
        seen += 1;
    }
    assert!(seen >= 20);
}
