#![allow(clippy::unwrap_used)]
mod overlap;

use std::collections::BTreeSet;

use super::*;
use crate::config::*;
use crate::protocol::beacon::VrfKeys;
use crate::protocol::replayed;
use crate::wire::{Body, Keys};

const SCHEME: Scheme = Scheme::Ed25519;

/// A run of four equal members, at its genesis, with a root for the model that all of them hold.
struct Run {
    config: RunConfig,
    keys: Vec<Keys>,
    chain: ChainState,
    model_root: Hash,
}

impl Run {
    fn new() -> Self {
        let mut keys: Vec<Keys> = (1..=4).map(|n| Keys::new([n; 32], SCHEME)).collect();
        keys.sort_by_key(Keys::id);
        let genesis = keys
            .iter()
            .map(|keys| GenesisMember {
                id: keys.id(),
                vrf_key: Hash(VrfKeys::derive(keys).public()),
                weight: 1,
                payout_address: String::new(),
            })
            .collect();
        let config = RunConfig {
            protocol: PROTOCOL,
            name: "chain".into(),
            nonce: "1".into(),
            data: DataConfig {
                manifest: Hash::of(b"m"),
                sequences: 1000,
                seq_len: 8,
                batch_sequences: 2,
                tokenizer: "bytes".into(),
            },
            timing: TimingConfig::default(),
            membership: MembershipConfig::default(),
            verification: VerificationConfig {
                audit_permille: 1000,
                ..VerificationConfig::default()
            },
            rewards: RewardConfig {
                vesting_rounds: 8,
                flops_per_token: 1_000_000_000,
                nominal_round_secs: 60,
                audit_bounty_permille: 500,
            },
            storage: StorageConfig::default(),
            model: toml::Table::new(),
            training: toml::Table::new(),
            genesis,
        };
        config.validate().unwrap();
        let chain = ChainState::genesis(&config);
        Self {
            config,
            keys,
            chain,
            model_root: Hash::of(b"model"),
        }
    }

    fn commit(&self, member: usize, batches: u64) -> Commit {
        let shards = vec![Hash::of(&[member as u8])];
        Commit {
            slot: self.chain.next_slot(),
            base: self.chain.base(),
            parent: self.chain.agreed.record,
            model_root: self.chain.base_root(self.model_root),
            blob: Hash::of(&shards[0].0),
            shards,
            len: 10,
            tokens: batches * self.config.data.batch_tokens(),
            loss_micros: 1,
            trace_root: steps(self.keys[member].id()).root(),
            accumulator_before: self.chain.member(&self.keys[member].id()).unwrap().accumulator,
            accumulator_after: Hash::of(&[member as u8, self.chain.agreed.round.0 as u8]),
        }
    }

    fn sign(&self, member: usize, commit: Commit) -> Contribution {
        let signed = self.keys[member].sign(&Body::Commit(commit.clone()));
        Contribution {
            member: signed.signer,
            commit,
            signature: signed.signature,
        }
    }

    fn record_of(
        &self,
        contributions: Vec<Contribution>,
        changes: Vec<Change>,
        verdicts: Vec<SignedVerdict>,
    ) -> Record {
        let round = self.chain.agreed.round.next();
        let proposer = self.chain.voters().proposer(round, 0);
        let keys = self.keys.iter().find(|keys| keys.id() == proposer).unwrap();
        let beacon = VrfKeys::derive(keys).beacon(proposer, &self.chain.agreed.seed, round, 0);
        let model_root = self.model_root;
        let draft = Draft {
            parent_view: 0,
            changes,
            contributions,
            model_root,
            verdicts,
            evidence: Vec::new(),
            beacon,
            carried: None,
        };
        self.chain.draft(&self.config, draft)
    }

    /// A record that counts one batch of each member.
    fn record(&self) -> Record {
        let all = (0..4).map(|member| self.sign(member, self.commit(member, 1))).collect();
        self.record_of(all, Vec::new(), Vec::new())
    }

    fn apply(&self, record: &Record) -> Result<(ChainState, Vec<Notice>), RuleViolation> {
        self.chain.apply(&self.config, record, SCHEME)
    }

    fn advance(&mut self, record: &Record) -> Vec<Notice> {
        let (next, notices) = self.apply(record).unwrap();
        self.chain = next;
        notices
    }

    fn index(&self, id: PeerId) -> usize {
        self.keys.iter().position(|keys| keys.id() == id).unwrap()
    }

    /// The last round's first auditor by lot, whom it audits, and its lot.
    fn drawn(&self) -> (usize, PeerId, Lot) {
        self.all_drawn().into_iter().next().unwrap()
    }

    /// All of them.
    fn all_drawn(&self) -> Vec<(usize, PeerId, Lot)> {
        let auditable = self.chain.agreed.auditable.last().unwrap();
        let mut all = Vec::new();
        for (by, keys) in self.keys.iter().enumerate() {
            for member in self.keys.iter().map(Keys::id) {
                let hit = |lot| auditable.draws(&self.config.verification, &keys.id(), &member, lot);
                let lot = VrfKeys::derive(keys).lot(&auditable.seed, auditable.round, &member, hit);
                all.extend(lot.map(|lot| (by, member, lot)));
            }
        }
        all
    }

    fn verdict(&self, finding: Finding, round: Round, member: PeerId, lot: Option<Lot>, by: usize) -> SignedVerdict {
        let slot = Slot {
            round,
            ..self.chain.next_slot()
        };
        let verdict = Verdict {
            slot,
            member,
            draw: u8::from(lot.is_none()),
            lot,
            finding,
            distance_nanos: 1,
            bound_nanos: 1,
            replayed: None,
        };
        self.say(verdict, by)
    }

    /// The first verdict of who replayed, asked and was answered.
    fn agreeing(&self, round: Round, member: PeerId, lot: Lot, by: usize) -> SignedVerdict {
        let unproven = self.verdict(Finding::Agrees, round, member, Some(lot), by);
        let shown = self.shown(&unproven, steps(member), [7; 32]);
        self.say(
            Verdict {
                replayed: Some(shown),
                ..unproven.verdict
            },
            by,
        )
    }

    /// What an auditor with this trace has to show once the member has answered it.
    fn shown(&self, of: &SignedVerdict, trace: Trace, salt: [u8; 32]) -> Replayed {
        let (slot, member) = (of.verdict.slot, of.verdict.member);
        let commitment = replayed::commitment(&slot, &member, &of.auditor, &trace, &salt);
        let claimed = steps(member);
        let keys = &self.keys[self.index(member)];
        let answer = replayed::signed(keys, &slot, &of.auditor, &commitment, &claimed.root());
        Replayed {
            salt,
            trace,
            claimed,
            answer,
        }
    }

    fn say(&self, verdict: Verdict, by: usize) -> SignedVerdict {
        let signed = self.keys[by].sign(&Body::Verdict(verdict.clone()));
        SignedVerdict {
            auditor: signed.signer,
            verdict,
            signature: signed.signature,
        }
    }

    /// Lets an auditor that was drawn say this of the last round, in a record that counts everyone. Gives the accused, and its round.
    fn accused(&mut self, finding: Finding) -> Accusation {
        let (by, member, lot) = self.drawn();
        let accusation = self.verdict(finding, self.chain.agreed.round, member, Some(lot), by);
        let record = Record {
            verdicts: vec![accusation],
            ..self.record()
        };
        self.advance(&record);
        let open = self.chain.agreed.accusations.last().unwrap().clone();
        assert_eq!((open.member, open.accuser), (member, self.keys[by].id()));
        let asked: Vec<PeerId> = self.asked(&open).into_iter().map(|by| self.keys[by].id()).collect();
        assert!(asked.len() == 2 && !asked.contains(&member) && !asked.contains(&open.accuser));
        open
    }

    /// Who is asked about an accusation and has not spoken.
    fn asked(&self, open: &Accusation) -> Vec<usize> {
        (0..4).filter(|by| open.asks(&self.keys[*by].id())).collect()
    }

    /// Lets everyone who is asked say this, in a record that counts everyone.
    fn answered(&mut self, open: &Accusation, finding: Finding) -> Vec<Notice> {
        let asked = self.asked(open).into_iter();
        let mut verdicts: Vec<SignedVerdict> = asked
            .map(|by| self.verdict(finding, open.round, open.member, None, by))
            .collect();
        verdicts.sort_by_key(audit::key);
        let record = Record {
            verdicts,
            ..self.record()
        };
        self.advance(&record)
    }
}

/// The steps of a member's rounds.
fn steps(member: PeerId) -> Trace {
    Trace::of((0..8u8).map(|step| (2.0 + f32::from(member.0[usize::from(step)]), 1.0 + f64::from(step))))
}

#[test]
fn a_record_that_follows_the_rules_counts_work_and_grants_points() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let batch = run.config.data.batch_tokens();
    assert_eq!(run.chain.agreed.tokens, 4 * batch);
    for keys in &run.keys {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        assert_eq!(
            (account.tokens, account.provisional_points()),
            (batch, u128::from(batch))
        );
    }
    // 60 batches were handed out, four done: 56 go out again first.
    let waiting: u64 = run.chain.agreed.pool.iter().map(|range| range.len).sum();
    assert_eq!((run.chain.agreed.cursor, waiting), (60, 56));
    assert_eq!(ChainState::from_bytes(&run.chain.to_bytes()).unwrap(), run.chain);
}

#[test]
fn every_broken_rule_is_named() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let good = run.record();
    assert!(run.apply(&good).is_ok());
    let broken = |change: &dyn Fn(&mut Record)| {
        let mut record = good.clone();
        change(&mut record);
        run.apply(&record).unwrap_err().to_string()
    };
    assert!(broken(&|r| r.parent = Hash::of(b"other")).starts_with("parent"));
    assert!(broken(&|r| r.slot.branch = 9).starts_with("slot"));
    assert!(broken(&|r| r.state_root = Hash::of(b"other")).starts_with("state_root"));
    assert!(broken(&|r| r.ledger_root = Hash::of(b"other")).starts_with("ledger_root"));
    assert!(broken(&|r| r.returned.clear()).starts_with("returned"));
    assert!(
        broken(&|r| r.retired.push(DataRange {
            start: 0,
            len: 1,
            returns: 3
        }))
        .starts_with("retired")
    );
    assert!(broken(&|r| r.contributions.swap(0, 1)).contains("not sorted"));
    assert!(broken(&|r| r.contributions.push(r.contributions[3].clone())).contains("repeated"));
    assert!(broken(&|r| r.contributions[0].commit.loss_micros += 1).contains("signature"));
    assert!(broken(&|r| r.model_root = Hash::of(b"other")).starts_with("model_root"));
    assert!(broken(&|r| r.beacon.output[0] ^= 1).contains("proof does not fit"));
    assert!(broken(&|r| r.beacon.proposer = PeerId([9; 32])).starts_with("beacon proposer"));
    assert!(broken(&|r| r.changes.push(Change::Lapse(r.contributions[0].member))).contains("counted lately"));
}

#[test]
fn a_commit_must_be_a_prefix_of_whole_batches_on_the_agreed_model_and_accumulator() {
    let run = Run::new();
    let quota = run.chain.assignment(&run.config).quota(&run.keys[0].id());
    let refused = |change: &dyn Fn(&mut Commit)| {
        let mut commit = run.commit(0, 1);
        change(&mut commit);
        let record = run.record_of(vec![run.sign(0, commit)], Vec::new(), Vec::new());
        run.apply(&record).unwrap_err().to_string()
    };
    assert!(refused(&|c| c.tokens += 1).contains("prefix"));
    assert!(refused(&|c| c.tokens = 0).contains("prefix"));
    assert!(refused(&|c| c.tokens = (quota + 1) * 16).contains("prefix"));
    assert!(refused(&|c| c.base = Round(7)).contains("another round"));
    assert!(refused(&|c| c.blob = Hash::of(b"x")).contains("hash sequence"));
    assert!(refused(&|c| c.len = u64::MAX).contains("longer"));
    assert!(refused(&|c| c.accumulator_before = Hash::of(b"x")).contains("accumulator"));
    assert!(refused(&|c| c.model_root = Hash::of(b"x")).contains("model_root"));
    let stranger = Keys::new([99; 32], SCHEME).sign(&Body::Commit(run.commit(0, 1)));
    let foreign = Contribution {
        member: stranger.signer,
        commit: run.commit(0, 1),
        signature: stranger.signature,
    };
    let record = run.record_of(vec![foreign], Vec::new(), Vec::new());
    assert!(run.apply(&record).unwrap_err().to_string().contains("not a member"));
}

#[test]
fn a_lost_accumulator_may_be_declared_and_no_other_root_will_do() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let mut commit = run.commit(0, 1);
    assert_ne!(commit.accumulator_before, run.config.verification.accumulator_zero);
    commit.accumulator_before = run.config.verification.accumulator_zero;
    let record = run.record_of(vec![run.sign(0, commit)], Vec::new(), Vec::new());
    assert!(run.apply(&record).is_ok());
}

#[test]
fn a_cheat_is_barred_only_when_more_than_a_third_finds_a_difference() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    let cheat = open.member;
    // A quarter of the weight said so.
    assert_eq!(run.chain.member(&cheat).unwrap().standing, Standing::Active);
    assert!(run.chain.ledger.get(&cheat).unwrap().provisional_points() > 0);
    // Its own word is not asked for, nor the accuser's again.
    for by in [run.index(cheat), run.index(open.accuser)] {
        let verdict = run.verdict(Finding::Agrees, open.round, cheat, None, by);
        assert!(run.chain.check_verdict(&run.config, &verdict, SCHEME).is_err());
    }
    // Half of it says so. The cheat delivers in the very round that bars it.
    let by = run.asked(&open)[0];
    let record = Record {
        verdicts: vec![run.verdict(Finding::Differs, open.round, cheat, None, by)],
        ..run.record()
    };
    let notices = run.advance(&record);
    assert!(
        notices
            .iter()
            .any(|notice| matches!(notice, Notice::Slashed { member, .. } if *member == cheat))
    );
    let account = run.chain.ledger.get(&cheat).unwrap();
    assert_eq!((account.provisional_points(), account.vested), (0, 0));
    assert_eq!(run.chain.member(&cheat).unwrap().standing, Standing::Banned);
    assert_eq!(run.chain.voters().weight_of(&cheat), 0);
}

#[test]
fn of_two_members_neither_convicts_the_other() {
    let mut run = Run::new();
    // The points must not vest first.
    run.config.rewards.vesting_rounds = 20;
    let record = run.record();
    run.advance(&record);
    let mut open = run.accused(Finding::Differs);
    // All the others are gone: the accuser has half of what weight there is.
    let two = [open.member, open.accuser];
    run.chain.agreed.weights.retain(|(id, _)| two.contains(id));
    open = run.chain.agreed.accusations[0].clone();
    for _ in 0..run.config.verification.verdict_rounds {
        let before = run.chain.agreed.weights.clone();
        let record = run.record();
        run.advance(&record);
        run.chain.agreed.weights = before;
    }
    let account = run.chain.ledger.get(&open.member).unwrap();
    assert!(
        account.slashed == 0 && account.unpaid > 0,
        "the round is not paid, and that is all"
    );
    assert!(run.chain.agreed.accusations.is_empty());
}

#[test]
fn an_accusation_that_is_not_confirmed_costs_the_accuser() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    run.answered(&open, Finding::Agrees);
    assert!(run.chain.ledger.get(&open.member).unwrap().provisional_points() > 0);
    assert_eq!(run.chain.ledger.get(&open.accuser).unwrap().strikes, 1);
    assert!(run.chain.agreed.accusations.is_empty());
}

#[test]
fn only_who_was_drawn_is_heard_once_and_with_its_own_lot() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, all) = (run.chain.agreed.round, run.all_drawn());
    let refused = |run: &Run, verdict: SignedVerdict| {
        let record = run.record_of(Vec::new(), Vec::new(), vec![verdict]);
        run.apply(&record).unwrap_err().to_string()
    };
    let (by, member, lot) = all[0].clone();
    let good = run.verdict(Finding::Differs, round, member, Some(lot.clone()), by);
    assert!(
        run.apply(&run.record_of(Vec::new(), Vec::new(), vec![good.clone()]))
            .is_ok()
    );
    // Another's lot, a member that the lot did not draw, a lot bent into place, none.
    let other = (0..4)
        .find(|other| *other != by && run.keys[*other].id() != member)
        .unwrap();
    let stolen = run.verdict(Finding::Differs, round, member, Some(lot.clone()), other);
    assert!(refused(&run, stolen).contains("does not prove that it was drawn"));
    let undrawn = |id: &PeerId| *id != run.keys[by].id() && !all.iter().any(|(at, one, _)| (*at, *one) == (by, *id));
    if let Some(id) = run.keys.iter().map(Keys::id).find(undrawn) {
        let auditable = run.chain.agreed.auditable.last().unwrap();
        let vrf = VrfKeys::derive(&run.keys[by]);
        let honest_but_too_high = vrf.lot(&auditable.seed, round, &id, |_| true);
        let uninvited = run.verdict(Finding::Differs, round, id, honest_but_too_high, by);
        assert!(refused(&run, uninvited).contains("does not prove that it was drawn"));
    }
    let mut bent = lot.clone();
    bent.output[3] ^= 1;
    let bent = run.verdict(Finding::Differs, round, member, Some(bent), by);
    assert!(refused(&run, bent).contains("does not prove that it was drawn"));
    let unproven = run.verdict(Finding::Differs, round, member, None, by);
    assert!(refused(&run, unproven).contains("nobody awaits it"));
    // Work that was not counted, a round to come, a signature that does not fit.
    let vrf = VrfKeys::derive(&run.keys[by]);
    let nobody = PeerId([9; 32]);
    let auditable = run.chain.agreed.auditable.last().unwrap().clone();
    let on_nobody = vrf.lot(&auditable.seed, round, &nobody, |_| true);
    let on_nobody = run.verdict(Finding::Differs, round, nobody, on_nobody, by);
    assert!(refused(&run, on_nobody).contains("not counted"));
    let early = run.verdict(Finding::Differs, round.next(), member, Some(lot.clone()), by);
    assert!(refused(&run, early).contains("nobody awaits it"));
    let mut forged = good.clone();
    forged.verdict.distance_nanos += 1;
    assert!(refused(&run, forged).contains("signature"));
    // The same auditor has one word on a round.
    run.advance(&run.record_of(Vec::new(), Vec::new(), vec![good]));
    let again = run.verdict(Finding::Agrees, round, member, Some(lot), by);
    assert!(refused(&run, again).contains("nobody awaits it"));
}

#[test]
fn a_round_can_be_audited_for_as_long_as_the_run_says_and_no_longer() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    for _ in 1..run.config.verification.verdict_rounds {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    let said = |run: &Run| {
        let verdict = run.agreeing(round, member, lot.clone(), by);
        run.apply(&run.record_of(Vec::new(), Vec::new(), vec![verdict]))
    };
    assert!(said(&run).is_ok());
    let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
    run.advance(&record);
    assert!(said(&run).unwrap_err().to_string().contains("too late"));
}

#[test]
fn who_opens_nothing_to_two_auditors_is_not_paid_and_the_third_time_barred() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let withholder = run.drawn().1;
    let mut strikes = 0;
    // Until the lots have fallen on it three times.
    for _ in 0..100 {
        let drawn = run.all_drawn().into_iter().find(|(_, member, _)| *member == withholder);
        let round = run.chain.agreed.round;
        let Some((by, member, lot)) = drawn else {
            let record = run.record();
            run.advance(&record);
            continue;
        };
        let record = Record {
            verdicts: vec![run.verdict(Finding::Unanswered, round, member, Some(lot), by)],
            ..run.record()
        };
        run.advance(&record);
        let open = run.chain.agreed.accusations[0].clone();
        let before = run.chain.ledger.get(&withholder).unwrap().unpaid;
        let notices = run.answered(&open, Finding::Unanswered);
        strikes += 1;
        let account = run.chain.ledger.get(&withholder).unwrap();
        assert!(account.unpaid > before);
        let slashed = |one: &Notice| matches!(one, Notice::Slashed { member, .. } if *member == withholder);
        assert_eq!(notices.iter().any(slashed), strikes == 3);
        if strikes == 3 {
            break;
        }
    }
    assert_eq!(strikes, 3);
    assert_eq!(run.chain.member(&withholder).unwrap().standing, Standing::Banned);
    assert!(run.keys.iter().all(|keys| {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        keys.id() == withholder || account.strikes == 0
    }));
}

#[test]
fn who_is_gone_and_opens_nothing_is_not_paid_and_has_no_strike() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Unanswered);
    // It delivered nothing in the last record.
    let rest = (0..4).filter(|member| run.keys[*member].id() != open.member);
    let contributions = rest.map(|member| run.sign(member, run.commit(member, 1))).collect();
    let record = run.record_of(contributions, Vec::new(), Vec::new());
    run.advance(&record);
    run.answered(&open, Finding::Unanswered);
    let account = run.chain.ledger.get(&open.member).unwrap();
    assert!(account.unpaid > 0 && account.strikes == 0 && account.slashed == 0);
}

#[test]
fn an_auditor_that_could_not_reach_who_is_honest_harms_nobody() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Unanswered);
    run.answered(&open, Finding::Agrees);
    for keys in &run.keys {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        assert_eq!((account.strikes, account.unpaid, account.slashed), (0, 0, 0));
    }
    // Had the others found a difference, that would count, whatever the accuser could not open.
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Unanswered);
    run.answered(&open, Finding::Differs);
    assert_eq!(run.chain.member(&open.member).unwrap().standing, Standing::Banned);
}

#[test]
fn only_a_few_who_are_said_to_open_nothing_are_before_everyone_at_a_time() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (mut said, mut rounds) = (BTreeSet::new(), 0);
    while said.len() < 8 {
        let round = run.chain.agreed.round;
        let mut drawn = run.all_drawn();
        drawn.retain(|(_, member, _)| said.insert((round, *member)));
        let each = drawn.into_iter();
        let mut verdicts: Vec<SignedVerdict> = each
            .map(|(by, member, lot)| run.verdict(Finding::Unanswered, round, member, Some(lot), by))
            .collect();
        verdicts.sort_by_key(audit::key);
        let record = Record {
            verdicts,
            ..run.record()
        };
        run.advance(&record);
        rounds += 1;
    }
    assert!(rounds < run.config.verification.verdict_rounds, "none has run out");
    assert_eq!(run.chain.agreed.accusations.len(), 4);
}

#[test]
fn an_accusation_to_which_too_few_speak_costs_the_round_and_nothing_else() {
    let mut run = Run::new();
    // The points must not vest first.
    run.config.rewards.vesting_rounds = 20;
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    for _ in 0..run.config.verification.verdict_rounds {
        let record = run.record();
        run.advance(&record);
    }
    assert!(run.chain.agreed.accusations.is_empty());
    for keys in &run.keys {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        assert_eq!((account.strikes, account.slashed), (0, 0));
        assert_eq!(account.unpaid > 0, keys.id() == open.member);
    }
}

#[test]
fn the_word_of_an_auditor_that_was_barred_meanwhile_is_let_go_of() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (by, member, lot) = run.drawn();
    let verdict = run.verdict(Finding::Agrees, run.chain.agreed.round, member, Some(lot), by);
    assert!(run.chain.awaits(&verdict));
    let evidence = two_votes(&run, by, run.chain.next_slot());
    let record = with_evidence(&run, vec![evidence]);
    run.advance(&record);
    // Whoever keeps such a verdict would never propose anything lawful again.
    assert!(!run.chain.awaits(&verdict));
    assert!(run.chain.check_verdict(&run.config, &verdict, SCHEME).is_err());
}

#[test]
fn a_member_that_comes_back_must_bring_the_key_it_had() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let leave = Leave {
        slot: run.chain.next_slot(),
    };
    let signed = run.keys[0].sign(&Body::Leave(leave.clone()));
    let change = Change::Leave(leave, signed.signer, signed.signature);
    run.advance(&run.record_of(Vec::new(), vec![change], Vec::new()));
    let back = |vrf_key| {
        let join = Join {
            slot: run.chain.next_slot(),
            vrf_key,
            payout_address: String::new(),
        };
        let signed = run.keys[0].sign(&Body::Join(join.clone()));
        let change = Change::Join(join, signed.signer, signed.signature);
        run.chain.check_change(&run.config, &change, SCHEME)
    };
    assert!(back([7; 32]).unwrap_err().to_string().contains("another VRF key"));
    assert!(back(VrfKeys::derive(&run.keys[0]).public()).is_ok());
}

#[test]
fn points_vest_after_their_rounds_and_not_before() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let id = run.keys[0].id();
    for round in 2..=9 {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
        let vested = run.chain.ledger.get(&id).unwrap().vested;
        assert_eq!(vested > 0, round >= 9, "round {round}");
    }
}

#[test]
fn a_newcomer_joins_trains_next_round_and_weighs_later() {
    let mut run = Run::new();
    let newcomer = Keys::new([50; 32], SCHEME);
    let slot = run.chain.next_slot();
    let join = Join {
        slot,
        vrf_key: VrfKeys::derive(&newcomer).public(),
        payout_address: "0xabc".into(),
    };
    let signed = newcomer.sign(&Body::Join(join.clone()));
    let change = Change::Join(join, newcomer.id(), signed.signature);
    let record = run.record_of(Vec::new(), vec![change.clone()], Vec::new());
    run.advance(&record);
    assert!(run.chain.assignment(&run.config).quota(&newcomer.id()) > 0);
    assert_eq!(run.chain.voters().weight_of(&newcomer.id()), 0);
    assert_eq!(run.chain.ledger.get(&newcomer.id()).unwrap().address, "0xabc");
    let again = run.record_of(Vec::new(), vec![change], Vec::new());
    assert!(run.apply(&again).unwrap_err().to_string().contains("already a member"));
}

#[test]
fn requests_from_the_end_of_time_are_refused_and_overflow_nothing() {
    let run = Run::new();
    let slot = Slot {
        round: Round(u64::MAX),
        ..run.chain.next_slot()
    };
    let leave = Leave { slot };
    let signed = run.keys[0].sign(&Body::Leave(leave.clone()));
    let change = Change::Leave(leave, signed.signer, signed.signature);
    assert!(run.chain.check_change(&run.config, &change, SCHEME).is_err());
    let newcomer = Keys::new([51; 32], SCHEME);
    let join = Join {
        slot,
        vrf_key: [0; 32],
        payout_address: String::new(),
    };
    let signed = newcomer.sign(&Body::Join(join.clone()));
    let change = Change::Join(join, signed.signer, signed.signature);
    assert!(run.chain.check_change(&run.config, &change, SCHEME).is_err());
}

#[test]
fn leaving_is_no_way_out_of_an_audit() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (by, member, lot) = run.drawn();
    let (leaver, round) = (run.index(member), run.chain.agreed.round);
    let leave = Leave {
        slot: run.chain.next_slot(),
    };
    let signed = run.keys[leaver].sign(&Body::Leave(leave.clone()));
    let change = Change::Leave(leave, signed.signer, signed.signature);
    let record = run.record_of(Vec::new(), vec![change], Vec::new());
    run.advance(&record);
    // Its auditor is heard all the same.
    let verdict = run.verdict(Finding::Differs, round, member, Some(lot), by);
    assert!(run.chain.check_verdict(&run.config, &verdict, SCHEME).is_ok());
    for _ in 0..run.config.verification.verdict_rounds {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    // Drawn or not, it was gone before it could have been audited: it isn't paid, and isn't accused.
    let account = run.chain.ledger.get(&member).unwrap();
    assert_eq!(
        (
            account.provisional_points(),
            account.vested,
            account.strikes,
            account.slashed
        ),
        (0, 0, 0, 0)
    );
    assert!(account.unpaid > 0);
    // Those who stayed are.
    assert!(run.keys.iter().filter(|keys| keys.id() != member).all(|keys| {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        account.vested > 0 && account.unpaid == 0
    }));
}

/// Two votes of a member for one slot.
fn two_votes(run: &Run, member: usize, slot: Slot) -> Evidence {
    let signed = |record| {
        let vote = Vote {
            slot,
            kind: VoteKind::Prevote,
            record,
        };
        let signature = run.keys[member].sign(&Body::Vote(vote.clone())).signature;
        (vote, signature)
    };
    Evidence::new(run.keys[member].id(), signed(Some(Hash::of(b"one"))), signed(None))
}

fn with_evidence(run: &Run, evidence: Vec<Evidence>) -> Record {
    let all = (0..4).map(|member| run.sign(member, run.commit(member, 1))).collect();
    let record = run.record_of(all, Vec::new(), Vec::new());
    Record { evidence, ..record }
}

#[test]
fn who_votes_twice_in_a_slot_is_barred_and_loses_what_has_not_vested() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let culprit = run.keys[2].id();
    let evidence = two_votes(&run, 2, run.chain.next_slot());
    let record = with_evidence(&run, vec![evidence.clone()]);
    let notices = run.advance(&record);
    let batch = u128::from(run.config.data.batch_tokens());
    let slashed = |notice: &Notice| matches!(notice, Notice::Slashed { member, points, .. } if *member == culprit && *points == batch);
    assert!(notices.iter().any(slashed), "{notices:?}");
    let account = run.chain.ledger.get(&culprit).unwrap();
    assert_eq!((account.provisional_points(), account.slashed), (0, batch));
    assert_eq!(run.chain.member(&culprit).unwrap().standing, Standing::Banned);
    assert_eq!(run.chain.voters().weight_of(&culprit), 0);
    assert_eq!(run.chain.assignment(&run.config).quota(&culprit), 0);
    // Once is enough.
    assert!(
        run.chain
            .check_evidence(&evidence, SCHEME)
            .unwrap_err()
            .to_string()
            .contains("barred already")
    );
}

#[test]
fn evidence_that_proves_nothing_spoils_its_record() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let slot = run.chain.next_slot();
    let good = two_votes(&run, 2, slot);
    let refused = |evidence: Vec<Evidence>| run.apply(&with_evidence(&run, evidence)).unwrap_err().to_string();
    let changed = |change: &dyn Fn(&mut Evidence)| {
        let mut evidence = good.clone();
        change(&mut evidence);
        refused(vec![evidence])
    };
    assert!(run.apply(&with_evidence(&run, vec![good.clone()])).is_ok());
    assert!(refused(vec![good.clone(), good.clone()]).contains("repeated"));
    assert!(refused(vec![good.clone(); 9]).contains("too many"));
    assert!(changed(&|e| e.second = e.first.clone()).contains("shown twice"));
    assert!(changed(&|e| std::mem::swap(&mut e.first, &mut e.second)).contains("not sorted"));
    assert!(changed(&|e| e.culprit = PeerId([9; 32])).contains("not a member"));
    assert!(changed(&|e| e.culprit = run.keys[1].id()).contains("signature"));
    assert!(changed(&|e| e.second.1 = e.first.1).contains("signature"));
    assert!(changed(&|e| e.second.0.kind = VoteKind::Precommit).contains("contradict nothing"));
    assert!(changed(&|e| e.second.0.slot.view += 1).contains("contradict nothing"));
    // R22: evidence counts within one branch only; and not for ever, nor before its time.
    let of = |slot| refused(vec![two_votes(&run, 2, slot)]);
    assert!(of(Slot { branch: 9, ..slot }).contains("branch"));
    assert!(
        of(Slot {
            run: RunId([1; 32]),
            ..slot
        })
        .contains("run")
    );
    assert!(
        of(Slot {
            round: slot.round.next(),
            ..slot
        })
        .contains("to come")
    );
    let mut old = Run::new();
    old.chain = run.chain.clone();
    old.chain.agreed.round = Round(200);
    let error = old.chain.check_evidence(&good, SCHEME).unwrap_err().to_string();
    assert!(error.contains("too old"), "{error}");
}

#[test]
fn a_goodbye_in_the_record_that_bars_is_no_way_back_in() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let culprit = run.keys[2].id();
    let leave = Leave {
        slot: run.chain.next_slot(),
    };
    let signed = run.keys[2].sign(&Body::Leave(leave.clone()));
    let mut record = with_evidence(&run, vec![two_votes(&run, 2, run.chain.next_slot())]);
    record.changes = vec![Change::Leave(leave, culprit, signed.signature)];
    run.advance(&record);
    assert_eq!(run.chain.member(&culprit).unwrap().standing, Standing::Banned);
}

/// A run in which the first round may be told of: who audits whom in it.
fn told() -> (Run, Round, usize, PeerId, Lot) {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    while run.chain.agreed.round <= audit::asked_until(&run.config.verification, round) {
        let early = run.agreeing(round, member, lot.clone(), by);
        let refused = run.chain.check_verdict(&run.config, &early, SCHEME).unwrap_err();
        assert!(refused.to_string().contains("others may still ask"), "{refused}");
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    (run, round, by, member, lot)
}

#[test]
fn who_says_that_work_agrees_shows_that_it_replayed_it_or_is_not_heard() {
    let (run, round, by, member, lot) = told();
    let refused = |verdict: SignedVerdict, why: &str| {
        let found = run.chain.check_verdict(&run.config, &verdict, SCHEME).unwrap_err();
        assert!(found.to_string().contains(why), "{found}");
    };
    let good = run.agreeing(round, member, lot.clone(), by);
    run.chain.check_verdict(&run.config, &good, SCHEME).unwrap();
    let shown = good.verdict.replayed.clone().unwrap();
    let with = |shown: Option<Replayed>, finding| {
        let verdict = Verdict {
            finding,
            replayed: shown,
            ..good.verdict.clone()
        };
        run.say(verdict, by)
    };
    refused(with(None, Finding::Agrees), "does not show");
    refused(with(Some(shown.clone()), Finding::Differs), "none is to be shown");
    // A guess, to which it did bind itself before it was told.
    let guess = Trace::of((0..8).map(|_| (3.0, 2.0)));
    let guessed = run.shown(&good, guess, [7; 32]);
    refused(with(Some(guessed.clone()), Finding::Agrees), "not that of the work");
    // What it was told, which it did not bind itself to.
    let copied = Replayed {
        trace: shown.claimed.clone(),
        ..guessed
    };
    refused(with(Some(copied), Finding::Agrees), "did not answer a commitment");
    let salted = Replayed {
        salt: [8; 32],
        ..shown.clone()
    };
    refused(with(Some(salted), Finding::Agrees), "did not answer a commitment");
    // Another auditor's proof.
    let other = (0..4).find(|other| *other != by).unwrap();
    let auditor = run.keys[other].id();
    let borrowed = SignedVerdict {
        auditor,
        ..good.clone()
    };
    let borrowed = Replayed {
        answer: run.shown(&borrowed, steps(member), [7; 32]).answer,
        ..shown.clone()
    };
    refused(with(Some(borrowed), Finding::Agrees), "did not answer a commitment");
    // What it claims that the member told, and what the member cannot have committed to.
    let invented = Replayed {
        claimed: Trace::of([(1.0, 1.0)]),
        ..shown.clone()
    };
    refused(
        with(Some(invented), Finding::Agrees),
        "not the one that was committed to",
    );
    let long = Replayed {
        trace: Trace(vec![[0; 12]; 1025]),
        ..shown
    };
    refused(with(Some(long), Finding::Agrees), "more steps than a round has");
}

#[test]
fn a_proven_audit_is_paid_half_of_the_work_where_the_run_says_so() {
    let (mut run, round, by, member, lot) = told();
    let auditor = run.keys[by].id();
    let before = run.chain.ledger.get(&auditor).unwrap().provisional_points();
    let verdict = run.agreeing(round, member, lot, by);
    run.advance(&run.record_of(Vec::new(), Vec::new(), vec![verdict]));
    let account = run.chain.ledger.get(&auditor).unwrap();
    let gained = account.provisional_points() - before;
    // One batch of 16 tokens at a GFLOP each, and the liveness of one round counted.
    let of_one_round = 16 * u128::from(crate::ledger::liveness_millionths(60)) / 1_000_000;
    assert_eq!((account.audits, gained), (1, of_one_round / 2));
    let all: u128 = run
        .chain
        .ledger
        .accounts
        .iter()
        .map(|one| one.provisional_points() + one.vested)
        .sum();
    assert_eq!(all, run.chain.ledger.issued);
    // A difference pays nothing.
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    assert_eq!(run.chain.ledger.get(&open.accuser).unwrap().audits, 0);
}

#[test]
fn a_member_answers_one_commitment_of_each_auditor_that_was_drawn_and_in_time() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    let (auditor, keys) = (run.keys[by].id(), run.keys[run.index(member)].clone());
    let slot = Slot {
        round,
        ..run.chain.next_slot()
    };
    let mut traces = replayed::Traces::default();
    traces.keep(&run.config, round, steps(member));
    let salt = [7; 32];
    let commitment = replayed::commitment(&slot, &member, &auditor, &steps(member), &salt);
    let ask = replayed::Ask { slot, lot, commitment };
    let mut answer =
        |run: &Run, who: PeerId, ask: &replayed::Ask| traces.answer(&run.chain, &run.config, &keys, who, ask);
    let first = answer(&run, auditor, &ask).unwrap();
    // Asked with anything else, it says the same again.
    let again = replayed::Ask {
        commitment: Hash::of(b"another"),
        ..ask.clone()
    };
    assert_eq!(answer(&run, auditor, &again).unwrap(), first);
    let other = run
        .keys
        .iter()
        .map(Keys::id)
        .find(|id| *id != auditor && *id != member)
        .unwrap();
    assert!(answer(&run, other, &ask).unwrap_err().contains("drawn"));
    let claim = *run.chain.auditable(round).unwrap().claim(&member).unwrap();
    let hear = |trace: &Trace, answer: &replayed::Answer| {
        let question = replayed::Question {
            slot,
            member,
            auditor,
            trace: trace.clone(),
            salt,
        };
        question.hear(&claim, answer.clone(), 1e-3, SCHEME)
    };
    assert!(matches!(hear(&steps(member), &first), replayed::Heard::Proven(_)));
    assert_eq!(hear(&steps(other), &first), replayed::Heard::Before);
    let mut forged = first.clone();
    forged.trace.0.pop();
    assert_eq!(hear(&steps(member), &forged), replayed::Heard::Invalid);
    while run.chain.agreed.round <= audit::asked_until(&run.config.verification, round) {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    assert!(answer(&run, auditor, &ask).unwrap_err().contains("too late"));
}
