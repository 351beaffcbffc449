//! The scenarios that ship with the crate: with seeds nobody chose, in storms, and against bugs planted on purpose.

use super::*;
use crate::protocol::membership::Standing;
use crate::sim::world::World;

/// The seven that every change has to pass.
const SEVEN: [&str; 7] = [
    include_str!("../../../scenarios/smoke.toml"),
    include_str!("../../../scenarios/churn.toml"),
    include_str!("../../../scenarios/partition.toml"),
    include_str!("../../../scenarios/regroup.toml"),
    include_str!("../../../scenarios/byzantine.toml"),
    include_str!("../../../scenarios/restart.toml"),
    include_str!("../../../scenarios/thousand.toml"),
];

/// What failed once.
pub(super) const REGRESSIONS: [&str; 14] = [
    include_str!("../../../scenarios/regressions/own_branch_refused.toml"),
    include_str!("../../../scenarios/regressions/lapse_locked.toml"),
    include_str!("../../../scenarios/regressions/silent_without_log.toml"),
    include_str!("../../../scenarios/regressions/branch_of_liars_under_halt.toml"),
    include_str!("../../../scenarios/regressions/log_lost_twice.toml"),
    include_str!("../../../scenarios/regressions/survivors_in_turn.toml"),
    include_str!("../../../scenarios/regressions/model_of_a_branch_left.toml"),
    include_str!("../../../scenarios/regressions/sides_that_forgot_each_other.toml"),
    include_str!("../../../scenarios/regressions/log_lost_before_it_was_said.toml"),
    include_str!("../../../scenarios/regressions/heard_on_another_branch.toml"),
    include_str!("../../../scenarios/regressions/withheld_from_those_who_came_back.toml"),
    include_str!("../../../scenarios/regressions/silent_with_the_better_branch.toml"),
    include_str!("../../../scenarios/regressions/locked_by_the_other_process.toml"),
    include_str!("../../../scenarios/regressions/claimed_while_listening.toml"),
];

/// The seven as a test can afford them: of the thousand, enough to be a crowd.
pub(super) fn seven() -> impl Iterator<Item = Scenario> {
    SEVEN.into_iter().map(|text| {
        let scenario = Scenario::from_toml(text).unwrap();
        match scenario.name.as_str() {
            "thousand" => Scenario {
                peers: 140,
                rounds: 2,
                ..scenario
            },
            _ => scenario,
        }
    })
}

#[track_caller]
pub(super) fn all_hold(scenario: &Scenario, seeds: u64) {
    let Seeds { passed, failed, .. } = run_seeds(scenario, seeds);
    if let Some(report) = failed {
        let short = shrink(&Scenario {
            seed: report.seed,
            ..scenario.clone()
        });
        let text = short.map(|(short, _)| short.to_toml().unwrap());
        panic!(
            "{} seed {}: {:#?}\nthe shortest form found:\n{}",
            scenario.name,
            report.seed,
            report.violations,
            text.unwrap_or_default()
        );
    }
    assert_eq!(passed, seeds);
}

#[test]
fn each_of_the_seven_holds_with_twenty_seeds_that_nobody_chose() {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    for scenario in seven() {
        let seed = since.as_nanos() as u64 >> 8;
        println!("{}: seeds {seed} to {}", scenario.name, seed + 19);
        all_hold(&Scenario { seed, ..scenario }, 20);
    }
}

#[test]
fn three_hundred_storms_break_no_promise() {
    all_hold(
        &Scenario::from_toml(include_str!("../../../scenarios/storm.toml")).unwrap(),
        300,
    );
}

#[test]
fn two_hundred_storms_of_liars_break_no_promise() {
    all_hold(
        &Scenario::from_toml(include_str!("../../../scenarios/storm_of_liars.toml")).unwrap(),
        200,
    );
}

#[test]
fn clocks_that_jump_for_hours_alarm_nobody_and_start_no_branch() {
    let scenario = Scenario::from_toml(include_str!("../../../scenarios/clocks.toml")).unwrap();
    all_hold(&scenario, 20);
    for seed in 1..=5 {
        let scenario = Scenario {
            seed,
            ..scenario.clone()
        };
        let report = run(&scenario);
        let (alarms, looks) = report.false_alarms;
        assert!(
            looks > 3000 && alarms * 1000 < looks,
            "seed {seed}: {alarms} of {looks}"
        );
        let mut world = World::new(&scenario);
        world.run();
        let last = world.records(0).last().unwrap();
        assert_eq!(last.record.slot.branch, 0, "seed {seed}");
        // Those who started again by a clock that was hours behind are believed.
        assert_eq!(last.record.contributions.len(), 7, "seed {seed}");
    }
}

#[test]
fn of_two_processes_with_one_key_one_stops_and_the_run_goes_on() {
    let scenario = Scenario::from_toml(include_str!("../../../scenarios/copied.toml")).unwrap();
    let (mut stopped, mut barred) = (0, 0);
    for seed in 1..=40 {
        let mut world = World::new(&Scenario {
            seed,
            ..scenario.clone()
        });
        world.run();
        let (_, violations) = world.finish();
        assert_eq!(violations, [], "seed {seed}");
        let (first, second) = (world.chain(3), world.chain(7));
        assert!(first.is_none() || second.is_none(), "seed {seed}: both go on");
        stopped += world.noticed["key in use"];
        let member = world.chain(0).unwrap().agreed.members.iter();
        barred += member.filter(|member| member.standing == Standing::Banned).count();
    }
    println!("{stopped} processes stopped over 40 seeds; {barred} keys were barred before");
    assert!(stopped >= 40 && barred < 40, "{stopped} {barred}");
}

#[test]
fn what_failed_once_does_not_fail_again() {
    for text in REGRESSIONS {
        holds(Scenario::from_toml(text).unwrap());
    }
}

#[test]
fn a_failing_run_is_cut_down_to_what_breaks_it() {
    // Nobody mends this partition, and nobody may regroup: it can't get on. The crash has nothing to do with it.
    let scenario = Scenario {
        peers: 4,
        rounds: 12,
        limit_secs: 200.0,
        faults: vec![
            fault(3.0, &[0], FaultKind::Pause),
            fault(6.0, &[0, 1], FaultKind::Partition),
        ],
        membership: crate::config::MembershipConfig {
            on_quorum_loss: crate::config::QuorumLoss::Halt,
            ..Scenario::default().membership
        },
        ..Scenario::default()
    };
    let (short, report) = shrink(&scenario).unwrap();
    assert_eq!(report.violations[0].invariant, "progress");
    assert_eq!(short.faults.len(), 1, "{:?}", short.faults);
    assert_eq!(short.faults[0].kind, FaultKind::Partition);
    let again = Scenario::from_toml(&short.to_toml().unwrap()).unwrap();
    assert_eq!(run(&again).digest, report.digest);
}

/// Seeds in which each scenario has to catch a planted bug at least once.
const COURSES: u64 = 4;

#[test]
fn each_of_the_seven_catches_each_planted_bug() {
    use crate::protocol::planted::{Bug, plant};
    let bugs = [
        Bug::VoteWithoutHolding,
        Bug::SumInArrivalOrder,
        Bug::SkipTheLog,
        Bug::CountTwice,
    ];
    let mut missed = Vec::new();
    // With overlap too, as far as a test can afford it.
    let ahead = seven().take(2).map(super::overlap::overlapped);
    for scenario in seven().chain(ahead) {
        for bug in bugs {
            // A bug shows where something comes late, which some courses of a scenario lack; every change of what a run agrees on begins others.
            let course = |at| Scenario {
                seed: scenario.seed + at,
                ..scenario.clone()
            };
            plant(Some(bug));
            let found = (0..COURSES).find_map(|at| {
                let report = run(&course(at));
                report.violations.first().map(|violation| violation.invariant)
            });
            plant(None);
            println!("{:10} {bug:20?} {}", scenario.name, found.unwrap_or("MISSED"));
            missed.extend(found.is_none().then(|| (scenario.name.clone(), bug)));
        }
        assert!(run(&scenario).ok, "{} without any bug", scenario.name);
    }
    assert_eq!(missed, []);
}

#[test]
fn a_crash_in_a_crowd_is_known_to_all_within_five_seconds() {
    for (peers, rounds) in [(16, 12), (150, 5)] {
        let scenario = Scenario {
            peers,
            rounds,
            batch_secs: 0.5,
            watch: true,
            faults: vec![Fault {
                at_secs: 8.0,
                peers: vec![0, peers / 2, peers - 1],
                kind: FaultKind::Crash,
                ..Fault::default()
            }],
            link: Link {
                loss: 0.05,
                ..Link::default()
            },
            ..Scenario::default()
        };
        let report = run(&scenario);
        assert!(report.ok, "{:?}", report.violations);
        let noticed = report.crash_noticed_secs.unwrap();
        assert!((2.0..=5.0).contains(&noticed), "{peers} peers: {noticed} s");
        let (alarms, looks) = report.false_alarms;
        assert!(
            looks > 10_000 && alarms * 1000 < looks,
            "{peers} peers: {alarms} of {looks}"
        );
    }
}
