//! The rules that follow from the chain alone, each checked by itself: what a record may count, change, decide and draw.

use super::{ChainState, EVIDENCE_ROUNDS, JOIN_ROUNDS, MAX_CARRIED, MAX_CHANGES, MAX_EVIDENCE, subject};
use crate::agreement::Agreement;
use crate::config::RunConfig;
use crate::protocol::assignment::Assignment;
use crate::protocol::membership::{self, Member, Standing};
use crate::protocol::round::CENSORSHIP_VIEWS;
use crate::protocol::{audit, beacon, replayed, speed};
use crate::types::*;
use crate::wire::{Body, Canonical, Scheme, Signed};

/// The rule that a record breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleViolation {
    /// Something that follows from the chain differs.
    #[error("{what}: expected {expected}, found {found}")]
    Differs {
        /// What.
        what: &'static str,
        /// As the chain says.
        expected: String,
        /// As the record says.
        found: String,
    },
    /// A part of the record is not allowed.
    #[error("{what} of {member}: {why}")]
    Refused {
        /// Which part.
        what: &'static str,
        /// Whose.
        member: PeerId,
        /// Why.
        why: &'static str,
    },
    /// Too long, unsorted, repeated.
    #[error("{0}")]
    Shape(&'static str),
}

impl ChainState {
    /// Whether this commit may be counted in the next record.
    pub fn check_commit(
        &self,
        config: &RunConfig,
        assignment: &Assignment,
        contribution: &Contribution,
        scheme: Scheme,
    ) -> Result<(), RuleViolation> {
        let Contribution {
            member,
            commit,
            signature,
        } = contribution;
        let refuse = |why| {
            Err(RuleViolation::Refused {
                what: "commit",
                member: *member,
                why,
            })
        };
        let batch = config.data.batch_tokens();
        let Some(known) = self.member(member) else {
            return refuse("not a member");
        };
        // O4: it may have left with work in flight.
        if known.standing != Standing::Active {
            return refuse("not a member any more");
        }
        if commit.slot != self.next_slot() || commit.parent != self.agreed.record || commit.base != self.base() {
            return refuse("for another round, branch, parent or base");
        }
        // R4: a prefix of the assigned order, in whole batches.
        if commit.tokens == 0 || commit.tokens % batch != 0 || commit.tokens / batch > assignment.quota(member) {
            return refuse("tokens are not a prefix of its batches");
        }
        let shards = commit.shards.iter().flat_map(|shard| shard.0).collect::<Vec<u8>>();
        if commit.shards.is_empty() || commit.shards.len() > 4096 || Hash::of(&shards) != commit.blob {
            return refuse("blob is not the hash sequence of its shards");
        }
        if commit.len > config.storage.max_contribution_bytes {
            return refuse("longer than the run allows");
        }
        // R19: what was counted last, or declared lost.
        if commit.accumulator_before != known.accumulator
            && commit.accumulator_before != config.verification.accumulator_zero
        {
            return refuse("accumulator does not continue the last counted one");
        }
        let signed = Signed {
            signer: *member,
            body: Body::Commit(commit.clone()),
            signature: *signature,
        };
        if signed.verify(scheme).is_err() {
            return refuse("signature does not fit");
        }
        Ok(())
    }

    /// Whether this change may stand in the next record (what needs no hearing; R15's silence is the voter's own to judge).
    pub fn check_change(&self, config: &RunConfig, change: &Change, scheme: Scheme) -> Result<(), RuleViolation> {
        let slot = self.next_slot();
        match change {
            Change::Join(join, id, signature) => {
                let refuse = |why| {
                    Err(RuleViolation::Refused {
                        what: "join",
                        member: *id,
                        why,
                    })
                };
                let member = self.member(id);
                if member.is_some_and(|member| member.standing != Standing::Away) {
                    return refuse("already a member, or banned");
                }
                // R24: it may still weigh, and a key chosen now would choose whom it audits.
                if member.is_some_and(|member| member.vrf_key != join.vrf_key) {
                    return refuse("announces another VRF key than before");
                }
                if member.is_none() && self.agreed.members.len() >= membership::MAX_MEMBERS {
                    return refuse("the run is full");
                }
                if join.slot.run != slot.run
                    || join.slot.branch != slot.branch
                    || join.slot.round > slot.round
                    || join.slot.round.0.saturating_add(JOIN_ROUNDS) < slot.round.0
                {
                    return refuse("for another run or branch, or too old");
                }
                if join.payout_address.len() > 64 || !join.payout_address.is_ascii() {
                    return refuse("payout address is not up to 64 ASCII characters");
                }
                let signed = Signed {
                    signer: *id,
                    body: Body::Join(join.clone()),
                    signature: *signature,
                };
                if signed.verify(scheme).is_err() {
                    refuse("signature does not fit")
                } else {
                    Ok(())
                }
            }
            Change::Leave(leave, id, signature) => {
                let refuse = |why| {
                    Err(RuleViolation::Refused {
                        what: "leave",
                        member: *id,
                        why,
                    })
                };
                let joined = match self.member(id) {
                    Some(member) if member.standing == Standing::Active => member.joined,
                    _ => return refuse("not an active member"),
                };
                let fresh = leave.slot.round >= joined
                    && leave.slot.round <= slot.round
                    && leave.slot.round.0.saturating_add(JOIN_ROUNDS) >= slot.round.0;
                if leave.slot.run != slot.run || leave.slot.branch != slot.branch || !fresh {
                    return refuse("for another run or branch, or too old");
                }
                let signed = Signed {
                    signer: *id,
                    body: Body::Leave(leave.clone()),
                    signature: *signature,
                };
                if signed.verify(scheme).is_err() {
                    refuse("signature does not fit")
                } else {
                    Ok(())
                }
            }
            Change::Lapse(id) => {
                let enough = |member: &Member| {
                    member.standing == Standing::Active && u64::from(member.uncounted) >= config.membership.lapse_rounds
                };
                if self.member(id).is_some_and(enough) {
                    Ok(())
                } else {
                    Err(RuleViolation::Refused {
                        what: "lapse",
                        member: *id,
                        why: "was counted lately, or is no member",
                    })
                }
            }
        }
    }

    pub(super) fn check_record(
        &self,
        config: &RunConfig,
        record: &Record,
        scheme: Scheme,
    ) -> Result<(), RuleViolation> {
        equal("slot", &self.next_slot(), &record.slot)?;
        equal("parent", &self.agreed.record, &record.parent)?;
        equal("state_root", &self.state_root(), &record.state_root)?;
        equal("ledger_root", &self.ledger.root(), &record.ledger_root)?;
        if record.changes.len() > MAX_CHANGES
            || self.fitting(&record.verdicts).len() < record.verdicts.len()
            || record.evidence.len() > MAX_EVIDENCE
            || record.speeds.len() > speed::MAX_TESTS
        {
            return Err(RuleViolation::Shape(
                "too many changes, verdicts, pieces of evidence or proofs of speed",
            ));
        }
        let sorted = record
            .contributions
            .windows(2)
            .all(|pair| pair[0].member < pair[1].member)
            && record
                .changes
                .windows(2)
                .all(|pair| subject(&pair[0]) < subject(&pair[1]))
            && record
                .verdicts
                .windows(2)
                .all(|pair| audit::key(&pair[0]) < audit::key(&pair[1]))
            && record.evidence.windows(2).all(|pair| pair[0].culprit < pair[1].culprit)
            && record.speeds.windows(2).all(|pair| pair[0].member() < pair[1].member());
        if !sorted {
            return Err(RuleViolation::Shape(
                "contributions, changes, verdicts, evidence or proofs of speed are not sorted, or repeated",
            ));
        }
        let worked_from = self.check_carried(config, record, scheme)?;
        let assignment = worked_from.assignment(config);
        for contribution in &record.contributions {
            equal(
                "model_root of a commit",
                &worked_from.base_root(record.model_root),
                &contribution.commit.model_root,
            )?;
            worked_from.check_commit(config, &assignment, contribution, scheme)?;
        }
        let (returned, retired) = worked_from.leftovers(config, &assignment, &record.contributions);
        equal("returned", &returned, &record.returned)?;
        equal("retired", &retired, &record.retired)?;
        for change in &record.changes {
            self.check_change(config, change, scheme)?;
        }
        self.check_lapsed_weight(&record.changes)?;
        for verdict in &record.verdicts {
            self.check_verdict(config, verdict, scheme)?;
        }
        for evidence in &record.evidence {
            self.check_evidence(evidence, scheme)?;
        }
        // Whether a claim came in time is looked at in the first views only, so that nobody can be locked on what others will never agree to.
        if !record.speeds.is_empty() && record.beacon.view >= CENSORSHIP_VIEWS {
            return Err(RuleViolation::Shape("names steps of proofs of speed in a later view"));
        }
        for step in &record.speeds {
            self.check_speed(step, scheme)?;
        }
        self.check_beacon(record, scheme)
    }

    /// R20: what a record carries over from the fork of its branch is a record that could have been decided there, by a polka that
    /// anyone can check, and the same contributions on the same model. They keep their signatures, for the fork's slot, and the
    /// fork's assignment. Gives the state that the record's work is checked against.
    fn check_carried(&self, config: &RunConfig, record: &Record, scheme: Scheme) -> Result<&Self, RuleViolation> {
        let Some(carried) = &record.carried else {
            return Ok(self);
        };
        let Some(fork) = self.fork.as_deref() else {
            return Err(RuleViolation::Shape("carries a record over where no branch begins"));
        };
        if carried.record.len() > MAX_CARRIED {
            return Err(RuleViolation::Shape("the record carried over is too long"));
        }
        let old = Record::from_canonical(&carried.record)
            .map_err(|_| RuleViolation::Shape("the record carried over cannot be read"))?;
        equal("record carried over", &carried.polka.record, &old.hash())?;
        Agreement::polka_valid(&fork.voters(), fork.next_slot(), &carried.polka, scheme)
            .map_err(|_| RuleViolation::Shape("the polka of the record carried over does not hold"))?;
        fork.check_record(config, &old, scheme)?;
        equal("model_root", &old.model_root, &record.model_root)?;
        if old.contributions != record.contributions {
            return Err(RuleViolation::Shape(
                "does not count what the record carried over counts",
            ));
        }
        Ok(fork)
    }

    /// R15: at most a fifth of the weight lapses in one record, or one member (of few members, each has more than a fifth).
    fn check_lapsed_weight(&self, changes: &[Change]) -> Result<(), RuleViolation> {
        let voters = self.voters();
        let lapsing = changes.iter().filter_map(|change| match change {
            Change::Lapse(id) => Some(voters.weight_of(id)),
            _ => None,
        });
        let (count, weight) = lapsing.fold((0u32, 0u64), |(n, sum), weight| (n + 1, sum.saturating_add(weight)));
        if count > 1 && weight.saturating_mul(5) > voters.total() {
            return Err(RuleViolation::Shape(
                "more than a fifth of the weight would lapse at once",
            ));
        }
        Ok(())
    }

    /// Whether a verdict is awaited and comes from an auditor that was drawn (R24).
    pub fn check_verdict(
        &self,
        config: &RunConfig,
        signed: &SignedVerdict,
        scheme: Scheme,
    ) -> Result<(), RuleViolation> {
        let refuse = |why| {
            Err(RuleViolation::Refused {
                what: "verdict",
                member: signed.auditor,
                why,
            })
        };
        let (verdict, auditor) = (&signed.verdict, &signed.auditor);
        if verdict.slot.view != 0 || verdict.draw > 1 {
            return refuse("for a view or a draw that there is not");
        }
        if let Err(why) = self.may_have(signed) {
            return refuse(why);
        }
        let round = verdict.slot.round;
        match (self.auditable(round), &verdict.lot) {
            (Some(auditable), Some(lot)) if verdict.draw == 0 => {
                let key = self.member(auditor).map(|member| member.vrf_key).unwrap_or_default();
                let value = beacon::verify_lot(lot, &key, &auditable.seed, round, &verdict.member, scheme);
                if !value.is_some_and(|lot| auditable.draws(&config.verification, auditor, &verdict.member, lot)) {
                    return refuse("its lot does not prove that it was drawn");
                }
            }
            (_, None) if verdict.draw == 1 => {}
            _ => return refuse("a first verdict needs a lot, and only a first one"),
        }
        if self.is_early(&config.verification, verdict) {
            return refuse("shows the member's trace while others may still ask for it");
        }
        let claim = self.auditable(round).and_then(|open| open.claim(&verdict.member));
        let bound = config.verification.trace_bound;
        if let Err(why) = replayed::check(verdict, auditor, claim, bound, scheme) {
            return refuse(why);
        }
        let whole = Signed {
            signer: signed.auditor,
            body: Body::Verdict(signed.verdict.clone()),
            signature: signed.signature,
        };
        if whole.verify(scheme).is_err() {
            refuse("signature does not fit")
        } else {
            Ok(())
        }
    }

    /// Whether two votes prove that a member said two things in one slot of this branch (R22).
    pub fn check_evidence(&self, evidence: &Evidence, scheme: Scheme) -> Result<(), RuleViolation> {
        let Evidence { culprit, first, second } = evidence;
        let refuse = |why| {
            Err(RuleViolation::Refused {
                what: "evidence",
                member: *culprit,
                why,
            })
        };
        // Going away is no way out of it.
        if self
            .member(culprit)
            .is_none_or(|member| member.standing == Standing::Banned)
        {
            return refuse("not a member, or barred already");
        }
        let (slot, next) = (first.0.slot, self.next_slot());
        if slot.run != next.run || slot.branch != next.branch {
            return refuse("for another run or branch");
        }
        if slot.round > next.round || slot.round.0.saturating_add(EVIDENCE_ROUNDS) < next.round.0 {
            return refuse("for a round to come, or too old");
        }
        if slot != second.0.slot || first.0.kind != second.0.kind {
            return refuse("votes of two slots or kinds contradict nothing");
        }
        if first.0 >= second.0 {
            return refuse("one vote shown twice, or not sorted");
        }
        let holds = |(vote, signature): &(Vote, Signature)| {
            let whole = Signed {
                signer: *culprit,
                body: Body::Vote(vote.clone()),
                signature: *signature,
            };
            whole.verify(scheme).is_ok()
        };
        if holds(first) && holds(second) {
            Ok(())
        } else {
            refuse("signature does not fit")
        }
    }

    fn check_beacon(&self, record: &Record, scheme: Scheme) -> Result<(), RuleViolation> {
        let Beacon { proposer, view, .. } = record.beacon;
        equal(
            "beacon proposer",
            &self.voters().proposer(record.slot.round, view),
            &proposer,
        )?;
        let key = self.member(&proposer).map(|member| member.vrf_key).unwrap_or_default();
        if beacon::verify(&record.beacon, &key, &self.agreed.seed, record.slot.round, scheme) {
            Ok(())
        } else {
            Err(RuleViolation::Refused {
                what: "beacon",
                member: proposer,
                why: "proof does not fit",
            })
        }
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &'static str, expected: &T, found: &T) -> Result<(), RuleViolation> {
    if expected == found {
        return Ok(());
    }
    Err(RuleViolation::Differs {
        what,
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    })
}
