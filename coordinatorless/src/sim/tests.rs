#![allow(clippy::unwrap_used)]
use super::*;

mod bench;
mod overlap;
mod regroup;
mod scenarios;
mod speeds;

fn fault(at_secs: f64, peers: &[usize], kind: FaultKind) -> Fault {
    Fault {
        at_secs,
        peers: peers.to_vec(),
        kind,
        ..Fault::default()
    }
}

#[track_caller]
fn holds(scenario: Scenario) -> Report {
    let report = run(&scenario);
    assert!(report.ok, "{}: {:#?}", scenario.name, report.violations);
    report
}

#[test]
fn four_peers_go_through_twenty_rounds() {
    let report = holds(Scenario::default());
    assert!(report.agree_secs_median < 0.6, "{}", report.agree_secs_median);
}

#[test]
fn one_peer_alone_goes_on() {
    holds(Scenario {
        peers: 1,
        rounds: 5,
        ..Scenario::default()
    });
}

#[test]
fn real_signatures_and_vrfs_do_the_same() {
    holds(Scenario {
        real_signatures: true,
        rounds: 5,
        ..Scenario::default()
    });
}

#[test]
fn the_same_seed_gives_the_same_digest_and_another_seed_another() {
    let link = Link {
        loss: 0.1,
        duplicate: 0.05,
        ..Link::default()
    };
    let scenario = Scenario {
        peers: 8,
        rounds: 10,
        link,
        ..Scenario::default()
    };
    let (one, two) = (holds(scenario.clone()), holds(scenario.clone()));
    assert_eq!(one.digest, two.digest);
    assert_ne!(one.digest, holds(Scenario { seed: 2, ..scenario }).digest);
}

#[test]
fn a_crashed_peer_costs_one_deadline_and_comes_back() {
    let faults = vec![
        fault(12.0, &[1], FaultKind::Crash),
        fault(40.0, &[1], FaultKind::Restart),
    ];
    let report = holds(Scenario {
        rounds: 25,
        faults,
        ..Scenario::default()
    });
    assert!(report.virtual_secs < 120.0, "{}", report.virtual_secs);
}

#[test]
fn a_peer_without_its_log_listens_first_and_goes_on() {
    let faults = vec![
        fault(12.0, &[2], FaultKind::Crash),
        fault(20.0, &[2], FaultKind::RestartWithoutWal),
    ];
    holds(Scenario {
        rounds: 20,
        faults,
        ..Scenario::default()
    });
}

#[test]
fn a_newcomer_is_taken_in_and_a_member_may_leave() {
    let faults = vec![fault(10.0, &[4], FaultKind::Join), fault(30.0, &[0], FaultKind::Leave)];
    holds(Scenario {
        peers: 5,
        rounds: 30,
        faults,
        ..Scenario::default()
    });
}

#[test]
fn two_of_three_regroup_when_the_third_is_gone_and_it_rejoins() {
    let faults = vec![
        fault(9.0, &[0], FaultKind::Crash),
        fault(90.0, &[0], FaultKind::Restart),
    ];
    holds(Scenario {
        peers: 3,
        rounds: 30,
        faults,
        ..Scenario::default()
    });
}

#[test]
fn all_but_one_die_and_it_goes_on_alone() {
    let faults = vec![
        fault(9.0, &[0, 1, 2], FaultKind::Crash),
        fault(200.0, &[0, 1, 2], FaultKind::Restart),
    ];
    holds(Scenario {
        rounds: 30,
        faults,
        ..Scenario::default()
    });
}

#[test]
fn a_minority_cut_off_waits_or_regroups_and_returns_to_the_certified_branch() {
    let faults = vec![
        fault(9.0, &[3], FaultKind::Partition),
        fault(150.0, &[], FaultKind::Heal),
    ];
    holds(Scenario {
        rounds: 60,
        faults,
        ..Scenario::default()
    });
}

#[test]
fn a_slow_peer_gets_less_work_and_holds_up_nobody() {
    let report = holds(Scenario {
        speeds: vec![1.0, 1.0, 1.0, 0.1],
        rounds: 30,
        ..Scenario::default()
    });
    assert!(report.virtual_secs < 30.0 * 6.5, "{}", report.virtual_secs);
}

#[test]
fn sixteen_peers_survive_loss_and_two_crashes_over_many_seeds() {
    for seed in 0..6 {
        let faults = vec![
            fault(15.0, &[3], FaultKind::Crash),
            fault(25.0, &[9], FaultKind::Crash),
            fault(60.0, &[3, 9], FaultKind::Restart),
        ];
        let link = Link {
            loss: 0.1,
            duplicate: 0.02,
            ..Link::default()
        };
        holds(Scenario {
            name: format!("seed {seed}"),
            seed,
            peers: 16,
            rounds: 15,
            link,
            faults,
            ..Scenario::default()
        });
    }
}

#[test]
fn the_shipped_scenarios_hold_and_repeat_themselves() {
    for text in [
        include_str!("../../scenarios/lossy16.toml"),
        include_str!("../../scenarios/regroup.toml"),
        include_str!("../../scenarios/newcomers.toml"),
    ] {
        let scenario = Scenario::from_toml(text).unwrap();
        assert_eq!(holds(scenario.clone()).digest, holds(scenario).digest);
    }
}

/// What somebody honest loses by each of its outages of so many seconds, in rounds' pay, over many seeds; a round takes 4.5 seconds.
fn lost_by_an_outage(secs: f64) -> f64 {
    const OUTAGES: usize = 8;
    const SEEDS: u64 = 3;
    let (mut lost, mut earned) = (0.0, 0.0);
    for seed in 1..=SEEDS {
        let faults = (0..OUTAGES).flat_map(|at| {
            let from = 150.0 + 200.0 * at as f64;
            [
                fault(from, &[6], FaultKind::Crash),
                fault(from + secs, &[6], FaultKind::Restart),
            ]
        });
        let scenario = Scenario {
            seed,
            peers: 7,
            rounds: 420,
            faults: faults.collect(),
            vesting_rounds: 1500,
            ..Scenario::default()
        };
        let mut world = world::World::new(&scenario);
        world.run();
        let ledger = &world.chain(0).unwrap().ledger;
        let account = |peer: usize| ledger.get(&scenario.keys(peer).id()).unwrap();
        assert!((0..7).all(|peer| account(peer).strikes == 0));
        lost += account(6).unpaid as f64;
        earned += account(6).provisional_points() as f64 / account(6).rounds as f64;
    }
    lost / (earned / SEEDS as f64) / (OUTAGES as u64 * SEEDS) as f64
}

#[test]
fn an_outage_costs_the_honest_a_few_rounds() {
    for (secs, most) in [(10.0, 3.0), (90.0, 20.0)] {
        let lost = lost_by_an_outage(secs);
        println!("{secs} s of outage cost {lost:.1} rounds' pay");
        assert!(lost < most, "{secs} s: {lost}");
    }
}
