#![allow(clippy::unwrap_used)]
use rand::{RngExt, SeedableRng};

use super::rewriter::Rewriter;
use super::rule_breaker::Breach;
use super::*;
use crate::config::VerificationConfig;
use crate::protocol::beacon::VrfKeys;
use crate::protocol::membership::Standing;
use crate::protocol::sync::{fork_share, verify_next};
use crate::protocol::{SECOND, Setup};
use crate::sim::world::World;
use crate::sim::{Fault, FaultKind, Link, Report, Scenario, run};

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
    // In a short run a liar may have no turn to propose.
    let reports = survives(LiarKind::EquivocatingProposer);
    assert!(reports.iter().any(|report| !report.slashed.is_empty()));
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
    // In a short run a liar may have no turn to propose.
    let reports = survives(LiarKind::RuleBreaker);
    assert!(reports.iter().any(|report| report.noticed.contains_key("proposal")));
}

#[test]
fn a_silent_proposer_costs_a_deadline_and_no_more() {
    survives(LiarKind::SilentProposer);
}

#[test]
fn garbage_is_not_counted_and_holds_up_nobody() {
    for report in survives(LiarKind::GarbageBlobs) {
        assert!(report.noticed["contribution"] > 0);
    }
}

#[test]
fn old_work_is_not_counted_again() {
    for report in survives(LiarKind::StaleCommitter) {
        assert!(report.noticed["commit"] > 0);
    }
}

#[test]
fn what_is_played_again_changes_nothing_and_condemns_nobody() {
    for report in survives(LiarKind::Replayer) {
        assert!(report.refused["signature"] > 0);
    }
}

#[test]
fn nobody_speaks_in_the_name_of_another() {
    for report in survives(LiarKind::Impersonator) {
        assert!(report.refused["signature"] > 0);
    }
}

#[test]
fn bytes_that_are_no_message_are_refused_each_for_its_reason() {
    for report in survives(LiarKind::Malformed) {
        for reason in ["short", "oversized", "version", "kind", "malformed", "signature"] {
            assert!(report.refused.contains_key(reason), "{reason}: {:?}", report.refused);
        }
    }
}

/// Two liars who serve records, and an honest peer that must catch up beside them.
fn serving(kind: LiarKind, seed: u64) -> Scenario {
    let fault = |at_secs, kind| Fault {
        at_secs,
        peers: vec![1],
        kind,
        ..Fault::default()
    };
    let peers = vec![5, 6];
    Scenario {
        faults: vec![fault(12.0, FaultKind::Crash), fault(40.0, FaultKind::Restart)],
        rounds: 20,
        ..seven(seed, vec![Liars { kind, peers }])
    }
}

#[test]
fn records_that_were_never_decided_are_not_followed() {
    for seed in 1..=4 {
        let report = holds(&serving(LiarKind::LyingServer, seed));
        assert!(report.noticed["record"] > 0);
    }
}

#[test]
fn a_history_that_a_minority_wrote_replaces_nothing() {
    for seed in 1..=4 {
        let report = holds(&serving(LiarKind::Rewriter, seed));
        assert!(!report.noticed.contains_key("switched"));
    }
}

#[test]
fn a_flood_of_joins_stops_nobody_and_outgrows_nothing() {
    for report in survives(LiarKind::JoinFlooder) {
        assert!(report.noticed["joined"] > 100);
    }
}

/// Liars of one kind in runs of seven peers and sixty rounds in which a contribution can expect 0.2 auditors, over many seeds. Gives how many of them
/// were barred, of how many, after how many rounds on average, and the share of what they claimed that they kept.
fn audited(kind: LiarKind, liars: &[usize]) -> (usize, usize, f64, f64) {
    const SEEDS: u64 = 12;
    let (mut barred, mut rounds, mut kept) = (0, 0, 0.0);
    for seed in 1..=SEEDS {
        let mut scenario = seven(
            seed,
            vec![Liars {
                kind,
                peers: liars.to_vec(),
            }],
        );
        scenario.rounds = 60;
        scenario.limit_secs = 3600.0;
        scenario.verification.audit_permille = 200;
        let report = holds(&scenario);
        barred += report.slashed.len();
        rounds += report.slashed_after.values().sum::<u64>();
        kept += report.kept.values().sum::<f64>();
    }
    let of = SEEDS as usize * liars.len();
    let mean = rounds as f64 / barred.max(1) as f64;
    println!(
        "| {kind:?} | {} of 7 | {barred} of {of} | {mean:.1} | {:.0}% |",
        liars.len(),
        100.0 * kept / of as f64
    );
    (barred, of, mean, kept / of as f64)
}

#[test]
fn who_claims_work_that_it_did_not_do_is_barred_and_keeps_little() {
    println!("| attack | share | barred within 60 rounds | rounds until barred | points kept |");
    // Drawn by six others with 0.2 auditors between them: in one round of 5.5; then a few rounds for the verdicts.
    let (barred, of, mean, kept) = audited(LiarKind::FalseWork, &[5, 6]);
    assert!(
        barred == of && mean < 14.0 && kept < 0.1,
        "{barred} of {of}, {mean}, {kept}"
    );
    let (barred, of, _, kept) = audited(LiarKind::FalseWorkNowAndThen, &[5, 6]);
    assert!(barred * 2 > of && kept < 0.8, "{barred} of {of}, {kept}");
    // Three strikes take three times as long, and cost the pay until then.
    let (barred, of, mean, kept) = audited(LiarKind::WithheldOpening, &[5, 6]);
    assert!(
        barred * 10 >= of * 9 && mean < 40.0 && kept < 0.1,
        "{barred} of {of}, {mean}, {kept}"
    );
}

#[test]
fn who_is_away_whenever_it_is_asked_is_never_paid_and_not_paid_more_for_honest_work_between() {
    for kind in [LiarKind::Dodger, LiarKind::DodgerNowAndThen] {
        let (mut vested, mut claimed) = (0, 0);
        for seed in 1..=6 {
            let peers = vec![5, 6];
            let mut scenario = seven(seed, vec![Liars { kind, peers }]);
            (scenario.rounds, scenario.limit_secs) = (200, 7200.0);
            scenario.verification.audit_permille = 200;
            // Twenty rounds that one stands for, and sixteen until that is agreed.
            scenario.vesting_rounds = 40;
            let world = played(&scenario);
            assert!(world.slashed.is_empty(), "it may have lost its power");
            for liar in scenario.liars() {
                let account = world.chain(0).unwrap().ledger.get(&scenario.keys(liar).id()).unwrap();
                vested += account.vested;
                claimed += account.vested + account.unpaid;
            }
        }
        let paid = vested as f64 / claimed as f64;
        println!("{kind:?}: {:.1}% of what it claimed is paid", 100.0 * paid);
        match kind {
            LiarKind::Dodger => assert_eq!(vested, 0),
            // It does three quarters of its work.
            _ => assert!(paid < 0.5, "{paid}"),
        }
    }
}

#[test]
fn who_keeps_its_steps_to_itself_or_tells_others_is_barred_and_an_auditor_that_shows_it_is_paid() {
    // Three strikes within the vesting rounds, as with accumulators; nobody honest is slashed, as every record is looked at.
    for kind in [LiarKind::UntoldSteps, LiarKind::OtherSteps] {
        let (barred, of, mean, kept) = audited(kind, &[5, 6]);
        assert!(
            barred * 10 >= of * 9 && mean < 40.0 && kept < 0.5,
            "{kind:?}: {barred} of {of}, {mean}, {kept}"
        );
    }
}

#[test]
fn colluders_below_a_third_convict_no_honest_member_and_save_no_cheat() {
    // That no honest peer is slashed is looked at in every record.
    let (barred, of, mean, kept) = audited(LiarKind::Colluder, &[5, 6]);
    assert!(
        barred == of && mean < 16.0 && kept < 0.2,
        "{barred} of {of}, {mean}, {kept}"
    );
}

#[test]
fn a_false_accuser_pays_with_its_place_and_a_lazy_auditor_with_nothing() {
    let (barred, of, mean, _) = audited(LiarKind::FalseAccuser, &[5, 6]);
    assert!(barred == of && mean < 25.0, "{barred} of {of}, {mean}");
    // Nobody can tell silence from not having been drawn: what is not audited by one is by others.
    let (barred, _, _, kept) = audited(LiarKind::LazyAuditor, &[5, 6]);
    assert!(barred == 0 && kept == 1.0, "{barred}, {kept}");
}

#[test]
fn who_says_that_the_honest_opened_nothing_costs_them_nothing() {
    for seed in 1..=4 {
        let kind = LiarKind::DeafAuditor;
        let mut scenario = seven(
            seed,
            vec![Liars {
                kind,
                peers: vec![5, 6],
            }],
        );
        (scenario.rounds, scenario.limit_secs) = (60, 3600.0);
        scenario.verification.audit_permille = 500;
        let world = played(&scenario);
        let said = |decided: &Decided| {
            let silent = |one: &&SignedVerdict| one.verdict.draw == 0 && one.verdict.finding == Finding::Unanswered;
            decided.record.verdicts.iter().filter(silent).count()
        };
        assert!(
            world.records(0).map(said).sum::<usize>() > 20,
            "seed {seed}: it was heard"
        );
        for peer in 0..5 {
            let account = world.chain(0).unwrap().ledger.get(&scenario.keys(peer).id()).unwrap();
            assert_eq!((account.unpaid, account.strikes), (0, 0), "seed {seed}, peer {peer}");
            assert!(account.vested > 0, "seed {seed}, peer {peer}");
        }
    }
}

#[test]
fn who_says_that_all_agrees_without_a_look_is_neither_heard_nor_paid() {
    let (mut refused, mut honest) = (0, 0);
    for seed in 1..=4 {
        let kind = LiarKind::GuessingAuditor;
        let mut scenario = seven(seed, vec![Liars { kind, peers: vec![6] }]);
        scenario.rounds = 30;
        scenario.verification.audit_permille = 500;
        let mut world = World::new(&scenario);
        world.run();
        let (_, violations) = world.finish();
        assert!(violations.is_empty(), "{violations:#?}");
        let ledger = &world.chain(0).unwrap().ledger;
        let audits = |peer: usize| ledger.get(&scenario.keys(peer).id()).unwrap().audits;
        assert_eq!(audits(6), 0);
        honest += (0..6).map(audits).sum::<u64>();
        refused += world.noticed.get("verdict").copied().unwrap_or(0);
        assert!(world.slashed.is_empty(), "it harms nobody, and nobody harms it");
        let unanswered = |decided: &Decided| {
            let mut all = decided.record.verdicts.iter();
            all.any(|one| matches!(one.verdict.finding, Finding::Unanswered | Finding::Untold))
        };
        assert!(!world.records(0).any(unanswered), "everyone answers");
    }
    println!("{honest} audits proven by honest auditors; {refused} times a guess was refused");
    assert!(honest > 100 && refused > 20, "{honest}, {refused}");
}

#[test]
fn any_mix_of_liars_below_a_third_breaks_no_promise() {
    for seed in 1..=24u64 {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        // Three of ten.
        let liars = (7..10).map(|peer| Liars {
            kind: LiarKind::ALL[rng.random_range(0..LiarKind::ALL.len())],
            peers: vec![peer],
        });
        let liars = liars.collect();
        let loss = if seed % 2 == 0 { 0.05 } else { 0.0 };
        let link = Link {
            loss,
            duplicate: 0.02,
            ..Link::default()
        };
        let verification = VerificationConfig {
            speed_secs: 1.5,
            speed_every: 4,
            ..VerificationConfig::default()
        };
        holds(&Scenario {
            peers: 10,
            link,
            verification,
            ..seven(seed, liars)
        });
    }
}

#[test]
fn the_shipped_scenario_of_liars_holds_and_repeats_itself() {
    let scenario = Scenario::from_toml(include_str!("../../../scenarios/liars.toml")).unwrap();
    let report = holds(&scenario);
    assert_eq!(report.digest, holds(&scenario).digest);
    assert_eq!(report.slashed, [7].into());
    assert!(Scenario::from_toml("peers = 4\n[[liars]]\nkind = \"censor\"\npeers = [4]\n").is_err());
}

/// The peer of an id.
fn peer_of(scenario: &Scenario, id: PeerId) -> usize {
    (0..scenario.peers)
        .find(|peer| scenario.keys(*peer).id() == id)
        .unwrap()
}

/// Honest peers of seven, by ascending id.
fn honest(scenario: &Scenario) -> Vec<usize> {
    let mut honest: Vec<usize> = (0..5).collect();
    honest.sort_by_key(|peer| scenario.keys(*peer).id());
    honest
}

fn played(scenario: &Scenario) -> World {
    let mut world = World::new(scenario);
    world.run();
    let (_, violations) = world.finish();
    assert!(violations.is_empty(), "{}: {violations:#?}", scenario.name);
    world
}

#[test]
fn a_censored_member_is_counted_within_two_views() {
    let mut defeated = 0;
    for seed in 1..=6 {
        let kind = LiarKind::Censor;
        let peers = vec![5, 6];
        let mut scenario = seven(seed, vec![Liars { kind, peers }]);
        // One slow member makes the proposals wait, so that the victim's work is widely held before they come.
        let order = honest(&scenario);
        let (victim, slow) = (order[0], order[1]);
        scenario.speeds = vec![1.0; 7];
        scenario.speeds[slow] = 0.05;
        let world = played(&scenario);
        let id = scenario.keys(victim).id();
        for decided in world.records(order[2]) {
            let (record, view) = (&decided.record, decided.certificate.slot.view);
            let counted = record.contributions.iter().any(|one| one.member == id);
            assert!(counted, "seed {seed}: left out of round {}", record.slot.round);
            assert!(
                view <= 2,
                "seed {seed}: round {} took until view {view}",
                record.slot.round
            );
            // A censor had the first word, and another proposer's record was decided.
            defeated += u32::from(view > 0 && peer_of(&scenario, record.beacon.proposer) < 5);
        }
    }
    assert!(defeated > 0, "no censor had a turn");
}

#[test]
fn a_minority_cannot_lapse_an_honest_member() {
    let mut refused = 0;
    for seed in 1..=4 {
        let kind = LiarKind::LapseAbuser;
        let peers = vec![5, 6];
        let mut scenario = seven(seed, vec![Liars { kind, peers }]);
        // The victim is there and too slow to deliver anything: what the chain alone shows would let it lapse.
        let victim = honest(&scenario)[4];
        scenario.speeds = vec![1.0; 7];
        scenario.speeds[victim] = 0.001;
        scenario.rounds = 25;
        let world = played(&scenario);
        let member = world.chain(0).unwrap().member(&scenario.keys(victim).id()).cloned();
        let member = member.unwrap();
        assert_eq!(member.standing, Standing::Active, "seed {seed}");
        assert!(u64::from(member.uncounted) >= scenario.membership.lapse_rounds);
        refused += world.noticed.get("proposal").copied().unwrap_or(0);

        // The same member lapses where it is dead, whatever the liars say.
        scenario.faults = vec![Fault {
            at_secs: 9.0,
            peers: vec![victim],
            kind: FaultKind::Crash,
            ..Fault::default()
        }];
        assert!(played(&scenario).noticed["lapsed"] > 0, "seed {seed}");
    }
    assert!(refused > 0, "no abuser had a turn");
}

#[test]
fn ten_names_of_one_machine_weigh_no_more_than_one() {
    // One more machine joins four: under one name, or under ten that share its speed.
    let share = |names: usize| {
        let joiners: Vec<usize> = (4..4 + names).collect();
        let mut scenario = Scenario {
            peers: 4 + names,
            rounds: 30,
            faults: vec![Fault {
                at_secs: 1.0,
                peers: joiners.clone(),
                kind: FaultKind::Join,
                ..Fault::default()
            }],
            speeds: vec![1.0; 4],
            ..Scenario::default()
        };
        scenario.speeds.extend(vec![1.0 / names as f64; names]);
        // More work than anyone can do, so that speed alone decides who does how much.
        scenario.membership.round_batches = 1000;
        let world = played(&scenario);
        let voters = world.chain(0).unwrap().voters();
        let weight: u64 = joiners
            .iter()
            .map(|peer| voters.weight_of(&scenario.keys(*peer).id()))
            .sum();
        weight as f64 / voters.total() as f64
    };
    let (one, ten) = (share(1), share(10));
    assert!(one > 0.1, "{one}");
    assert!(ten <= one * 1.01, "one name {one}, ten names {ten}");
}

/// What a liar has at hand at the genesis of seven peers, for a liar's parts that can be looked at alone.
fn at_genesis<T>(look: impl FnOnce(&mut Stage<'_>, &[Keys]) -> T) -> T {
    let scenario = seven(1, Vec::new());
    let config = Arc::new(scenario.config());
    let keys: Vec<Keys> = (0..7).map(|peer| scenario.keys(peer)).collect();
    let chain = ChainState::genesis(&config);
    let proposer = chain.voters().proposer(Round(1), 0);
    let me = keys.iter().find(|keys| keys.id() == proposer).unwrap();
    let state = State::new(Setup {
        config: config.clone(),
        keys: me.clone(),
        chain,
        history: Vec::new(),
        wal: Some(Vec::new()),
        join: None,
        sequence: 0,
        last_round: None,
        steps: None,
    });
    let mut rng = ChaCha12Rng::seed_from_u64(1);
    let gang = vec![me.clone()];
    let stage = &mut Stage {
        config: &config,
        keys: me,
        state: &state,
        gang: &gang,
        rng: &mut rng,
    };
    look(stage, &keys)
}

#[test]
fn every_breach_but_two_is_seen_in_the_record_itself() {
    at_genesis(|stage, keys| {
        let chain = stage.chain().clone();
        let commit = |member: &Keys| {
            let shards = vec![Hash::of(&member.id().0)];
            let commit = Commit {
                slot: chain.next_slot(),
                base: Round(0),
                parent: chain.agreed.record,
                model_root: Hash::of(b"model"),
                blob: Hash::of(&shards[0].0),
                shards,
                len: 10,
                tokens: stage.config.data.batch_tokens(),
                loss_micros: 1,
                trace_root: Hash::default(),
                accumulator_before: stage.config.verification.accumulator_zero,
                accumulator_after: Hash::of(b"after"),
            };
            let signature = member.sign(&Body::Commit(commit.clone())).signature;
            Contribution {
                member: member.id(),
                commit,
                signature,
            }
        };
        let mut contributions: Vec<Contribution> = keys.iter().map(commit).collect();
        contributions.sort();
        let draft = Draft {
            parent_view: 0,
            changes: Vec::new(),
            contributions,
            model_root: Hash::of(b"model"),
            verdicts: Vec::new(),
            evidence: Vec::new(),
            speeds: Vec::new(),
            carried: None,
            beacon: VrfKeys::derive(stage.keys).beacon(stage.me(), &chain.agreed.seed, Round(1), 0),
        };
        let good = chain.draft(stage.config, draft);
        let scheme = stage.keys.scheme();
        assert!(chain.apply(stage.config, &good, scheme).is_ok());
        for breach in Breach::ALL {
            let bad = breach.of(stage, good.clone());
            assert_ne!(bad, good, "{breach:?}");
            // Of the model, and of the view in which the parent was decided, each voter judges by what it has itself.
            let seen = !matches!(breach, Breach::ModelRoot | Breach::ParentView);
            assert_eq!(chain.apply(stage.config, &bad, scheme).is_err(), seen, "{breach:?}");
        }
    });
}

#[test]
fn a_rewritten_history_is_lawful_in_itself_and_weighs_too_little() {
    at_genesis(|stage, _| {
        let branch = Rewriter::rewrite(stage, 12).unwrap();
        let (config, scheme) = (stage.config, stage.keys.scheme());
        let mut state = ChainState::genesis(config);
        assert_eq!(fork_share(&state, config, &branch[0], scheme), Some(1000 / 7));
        for decided in &branch {
            state = verify_next(&state, config, decided, scheme).unwrap().0;
        }
        assert_eq!(state.agreed.round, Round(12));
    });
}

#[test]
fn who_has_just_started_follows_no_minority_before_it_has_listened() {
    at_genesis(|stage, keys| {
        let branch = Rewriter::rewrite(stage, 12).unwrap();
        let liar = stage.me();
        let keys = keys.iter().find(|keys| keys.id() != liar).unwrap();
        let mut state = State::new(Setup {
            config: Arc::new(stage.config.clone()),
            keys: keys.clone(),
            chain: ChainState::genesis(stage.config),
            history: Vec::new(),
            wal: Some(Vec::new()),
            join: None,
            sequence: 0,
            last_round: None,
            steps: None,
        });
        state.start(1);
        let mut told = |now| {
            let records = branch.iter().cloned().map(Arc::new).collect();
            let from = liar;
            state.handle(now, Event::Records { from, records });
            state.chain().agreed.round
        };
        // Nobody else was heard yet; that isn't a lost quorum.
        assert_eq!(told(SECOND), Round(0));
        // Nobody for minutes is: regrouping helps against absence, and can't tell it from an eclipse.
        assert_eq!(told(200 * SECOND), Round(12));
    });
}
