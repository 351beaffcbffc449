#![allow(clippy::unwrap_used)]
mod accusations;
mod overlap;
mod replays;
mod speeds;

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
                verdict_rounds: 8,
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
            speeds: Vec::new(),
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

    /// Lets everyone's work have been proven.
    fn prove_all(&mut self) {
        for keys in &self.keys {
            for _ in 0..crate::ledger::PROOFS {
                self.chain.ledger.prove(keys.id());
            }
        }
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
    run.prove_all();
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
    run.prove_all();
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
