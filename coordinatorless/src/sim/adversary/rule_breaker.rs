//! Proposes records that break a rule, a different one each time, and prevotes them.

use rand::RngExt;

use super::swap::Swap;
use super::{Adversary, Stage};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

/// One rule of a record, broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sim) enum Breach {
    Branch,
    Parent,
    ParentView,
    StateRoot,
    LedgerRoot,
    ModelRoot,
    Returned,
    Retired,
    Unsorted,
    Repeated,
    ForgedContribution,
    TooManyTokens,
    NoTokens,
    StaleCommit,
    WrongShards,
    TooLong,
    WrongAccumulator,
    OtherModel,
    LapseOfTheCounted,
    ForgedJoin,
    ForgedLeave,
    TooManyChanges,
    UndrawnVerdict,
    ForgedEvidence,
    SpeedUnasked,
    BeaconOutput,
    BeaconOfAnother,
    BeaconOfLaterView,
}

impl Breach {
    pub const ALL: [Self; 28] = [
        Self::Branch,
        Self::Parent,
        Self::ParentView,
        Self::StateRoot,
        Self::LedgerRoot,
        Self::ModelRoot,
        Self::Returned,
        Self::Retired,
        Self::Unsorted,
        Self::Repeated,
        Self::ForgedContribution,
        Self::TooManyTokens,
        Self::NoTokens,
        Self::StaleCommit,
        Self::WrongShards,
        Self::TooLong,
        Self::WrongAccumulator,
        Self::OtherModel,
        Self::LapseOfTheCounted,
        Self::ForgedJoin,
        Self::ForgedLeave,
        Self::TooManyChanges,
        Self::UndrawnVerdict,
        Self::ForgedEvidence,
        Self::SpeedUnasked,
        Self::BeaconOutput,
        Self::BeaconOfAnother,
        Self::BeaconOfLaterView,
    ];

    /// The record with the rule broken, as far as there is something to break.
    pub fn of(self, stage: &Stage<'_>, mut record: Record) -> Record {
        let other = Hash::of(b"other");
        let me = stage.me();
        let stranger = PeerId([7; 32]);
        let nobody = Signature([0; 64]);
        let slot = record.slot;
        match self {
            Self::Branch => record.slot.branch ^= 1,
            Self::Parent => record.parent = other,
            Self::ParentView => record.parent_view = record.parent_view.saturating_add(1),
            Self::StateRoot => record.state_root = other,
            Self::LedgerRoot => record.ledger_root = other,
            Self::ModelRoot => {
                // With every commit of other members left out, nothing in the record itself contradicts the root.
                record = stage.recount(&record, Vec::new());
                record.model_root = other;
            }
            Self::Returned => record.returned.push(DataRange {
                start: 0,
                len: 1,
                returns: 0,
            }),
            Self::Retired => record.retired.push(DataRange {
                start: 0,
                len: 1,
                returns: 3,
            }),
            Self::Unsorted => record.contributions.reverse(),
            Self::Repeated => {
                let last = record.contributions.last().cloned();
                record.contributions.extend(last);
            }
            Self::ForgedContribution => {
                if let Some(one) = record.contributions.iter_mut().find(|one| one.member != me) {
                    one.commit.accumulator_after = other;
                }
            }
            Self::TooManyTokens => {
                return Self::recommit(stage, &record, |commit| commit.tokens = u64::MAX / 4096 * 1024);
            }
            Self::NoTokens => return Self::recommit(stage, &record, |commit| commit.tokens = 0),
            Self::StaleCommit => {
                return Self::recommit(stage, &record, |commit| {
                    commit.slot.round = commit.slot.round.previous();
                    commit.base = commit.base.previous();
                });
            }
            Self::WrongShards => return Self::recommit(stage, &record, |commit| commit.blob = other),
            Self::TooLong => return Self::recommit(stage, &record, |commit| commit.len = u64::MAX),
            Self::WrongAccumulator => {
                return Self::recommit(stage, &record, |commit| commit.accumulator_before = other);
            }
            Self::OtherModel => return Self::recommit(stage, &record, |commit| commit.model_root = other),
            Self::LapseOfTheCounted => {
                let victim = record.contributions.iter().find(|one| one.member != me);
                record.changes = victim.map(|one| Change::Lapse(one.member)).into_iter().collect();
            }
            Self::ForgedJoin => {
                let join = Join {
                    slot: record.slot,
                    vrf_key: [7; 32],
                    payout_address: String::new(),
                };
                record.changes = vec![Change::Join(join, stranger, nobody)];
            }
            Self::ForgedLeave => {
                let leave = Leave { slot: record.slot };
                let victim = record.contributions.iter().find(|one| one.member != me);
                record.changes = victim
                    .map(|one| Change::Leave(leave, one.member, nobody))
                    .into_iter()
                    .collect();
            }
            Self::TooManyChanges => record.changes = (0..9).map(|n| Change::Lapse(PeerId([n; 32]))).collect(),
            Self::UndrawnVerdict => {
                let verdict = Verdict {
                    slot: record.slot,
                    member: stranger,
                    draw: 0,
                    lot: None,
                    finding: Finding::Differs,
                    distance_nanos: 1,
                    bound_nanos: 0,
                    replayed: None,
                };
                let signature = stage.keys.sign(&Body::Verdict(verdict.clone())).signature;
                record.verdicts = vec![SignedVerdict {
                    auditor: me,
                    verdict,
                    signature,
                }];
            }
            Self::ForgedEvidence => {
                // An honest member is said to have voted twice; the liar's own signature stands under both votes.
                let vote = |record| {
                    let vote = Vote {
                        slot,
                        kind: VoteKind::Precommit,
                        record,
                    };
                    let signature = stage.keys.sign(&Body::Vote(vote.clone())).signature;
                    (vote, signature)
                };
                let victim = stage.others().first().copied().unwrap_or(stranger);
                record.evidence = vec![Evidence::new(victim, vote(Some(other)), vote(None))];
            }
            Self::SpeedUnasked => record.speeds = vec![SpeedStep::Proven(stranger)],
            Self::BeaconOutput => record.beacon.output[0] ^= 1,
            Self::BeaconOfAnother => record.beacon.proposer = stage.others().first().copied().unwrap_or(stranger),
            Self::BeaconOfLaterView => record.beacon.view = record.beacon.view.saturating_add(1),
        }
        record
    }

    /// The record with the liar's own commit changed and signed again: only the commit's rule is broken.
    fn recommit(stage: &Stage<'_>, record: &Record, change: impl Fn(&mut Commit)) -> Record {
        let mut contributions = record.contributions.clone();
        if let Some(mine) = contributions.iter_mut().find(|one| one.member == stage.me()) {
            change(&mut mine.commit);
            mine.signature = stage.keys.sign(&Body::Commit(mine.commit.clone())).signature;
        }
        stage.recount(record, contributions)
    }
}

/// See the module.
#[derive(Default)]
pub(in crate::sim) struct RuleBreaker {
    swap: Swap,
}

impl Adversary for RuleBreaker {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        self.swap.turn(stage, effect, |stage, record| {
            let breach = Breach::ALL[stage.rng.random_range(0..Breach::ALL.len())];
            breach.of(stage, record.clone())
        })
    }
}
