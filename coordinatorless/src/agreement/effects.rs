//! The host's side of the engine: each effect the engine asks for becomes an [`Output`], a signature, or an answer.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::sync::Arc;

use arc_malachitebft_core_consensus as core;
use arc_malachitebft_core_types as bft;
use bft::TimeoutKind;
use core::{Effect, Input, LivenessMsg, Resumable, Resume, SignedConsensusMsg};

use super::context::{Ballot, Height, Motion, Murmur, Value, signed_proposal, signed_vote, view_of};
use super::voters::Voters;
use super::{Output, Timeouts, wal};
use crate::protocol::event::AgreementTimer;
use crate::types::*;
use crate::wire::{Body, Keys, Signed};

/// What a message of this peer's own is, for finding it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Proposal,
    Prevote,
    Precommit,
}

impl Part {
    /// The part a message plays in the agreement, if any.
    pub(super) fn of(body: &Body) -> Option<Self> {
        match body {
            Body::Proposal(_) => Some(Self::Proposal),
            Body::Vote(Vote {
                kind: VoteKind::Prevote,
                ..
            }) => Some(Self::Prevote),
            Body::Vote(Vote {
                kind: VoteKind::Precommit,
                ..
            }) => Some(Self::Precommit),
            _ => None,
        }
    }
}

/// Something else was signed for this slot before.
#[derive(Debug)]
pub(super) struct DoubleSign {
    #[allow(dead_code, reason = "read by the engine's log line through Debug")]
    slot: Slot,
}

/// A record seen at this height, and the first view and proposer it was seen with.
pub(super) struct Known {
    pub(super) value: Value,
    pub(super) round: bft::Round,
    pub(super) proposer: PeerId,
}

/// Everything about one height that is not inside the engine.
pub(super) struct Host {
    pub(super) run: RunId,
    pub(super) keys: Keys,
    pub(super) timeouts: Timeouts,
    pub(super) height: Height,
    pub(super) voters: Arc<Voters>,
    /// The caller's time, set before the engine runs.
    pub(super) now: Micros,
    /// Records by hash; the engine names decided records by hash alone (trap 7).
    pub(super) known: BTreeMap<Hash, Known>,
    /// Records that follow the rules (R11).
    pub(super) valid: BTreeSet<Hash>,
    /// The records proposed in each view, at most two kept: the engine keeps no more.
    pub(super) proposed: BTreeMap<View, Vec<(Hash, Option<View>)>>,
    /// This peer's own messages, for sending again.
    pub(super) own: BTreeMap<(View, Part), Signed>,
    /// Own prevotes that have not been counted beside the engine yet.
    pub(super) uncounted: Vec<Signed>,
    pub(super) timers: BTreeSet<AgreementTimer>,
    /// Hashes of entries that are in the log already, while it is replayed.
    pub(super) logged: BTreeSet<Hash>,
    pub(super) out: Vec<Output>,
    decision: Option<Output>,
    /// The height is decided: nothing more is said about it.
    pub(super) over: bool,
}

impl Host {
    pub(super) fn new(
        run: RunId,
        keys: Keys,
        timeouts: Timeouts,
        height: Height,
        voters: Arc<Voters>,
        now: Micros,
    ) -> Self {
        Self {
            run,
            keys,
            timeouts,
            height,
            voters,
            now,
            known: BTreeMap::new(),
            valid: BTreeSet::new(),
            proposed: BTreeMap::new(),
            own: BTreeMap::new(),
            uncounted: Vec::new(),
            timers: BTreeSet::new(),
            logged: BTreeSet::new(),
            out: Vec::new(),
            decision: None,
            over: false,
        }
    }

    /// What has come out since the last call. A decision comes last, after every vote that led to it (trap 2).
    pub(super) fn drain(&mut self) -> Vec<Output> {
        if let Some(decision) = self.decision.take() {
            self.over = true;
            self.cancel_all();
            self.out.push(decision);
        }
        std::mem::take(&mut self.out)
    }

    /// Carries out one effect.
    pub(super) fn handle(&mut self, effect: Effect<Murmur>) -> Result<Resume<Murmur>, DoubleSign> {
        match effect {
            Effect::CancelAllTimeouts(_) => self.cancel_all(),
            Effect::CancelTimeout(timeout, _) => self.cancel(timeout),
            Effect::ScheduleTimeout(timeout, _) => self.schedule(timeout),
            Effect::PublishConsensusMsg(message, _) => self.publish(message),
            Effect::PublishLivenessMsg(message, _) => self.publish_liveness(&message),
            Effect::RepublishVote(vote, _) => self.out.push(Output::Publish(signed_vote(self.run, &vote))),
            Effect::RepublishRoundCertificate(certificate, _) => self.publish_each(certificate.votes(&Murmur)),
            Effect::GetValue(_, round, _, _) => {
                self.out.push(Output::GetRecord {
                    round: self.height.round,
                    view: view_of(round),
                });
            }
            Effect::Decide(certificate, _, _) => self.decide(&certificate),
            Effect::WalAppend(height, input, _) => self.append(height, &input),
            // A proposal carries its record whole, so publishing the proposal, which comes next, is all there is to restream
            // (trap 4). Laggards apply decided records by their certificates, so nothing of a sync ever gets here.
            Effect::StartRound(..)
            | Effect::RestreamProposal(..)
            | Effect::CertVerifiedSyncValue(..)
            | Effect::CertRejectedSyncValue(..)
            | Effect::Finalize(..) => {}
            Effect::SignVote(vote, r) => return Ok(r.resume_with(self.sign_vote(vote)?)),
            Effect::SignProposal(motion, r) => return Ok(r.resume_with(self.sign_proposal(motion)?)),
            // The door takes only messages whose signatures the caller has verified, and own ones (trap 1).
            Effect::VerifySignature(_, _, r) => return Ok(r.resume_with(true)),
            // Certificates here are made by this peer of votes that were verified one by one (trap 8).
            Effect::VerifyCommitCertificate(_, _, _, r)
            | Effect::VerifyExtendedCommitCertificate(_, _, _, _, r)
            | Effect::VerifyPolkaCertificate(_, _, _, r)
            | Effect::VerifyRoundCertificate(_, _, _, r) => return Ok(r.resume_with(Ok(()))),
            // Votes carry no extensions.
            Effect::ExtendVote(_, _, _, _, r) => return Ok(r.resume_with(None)),
            Effect::VerifyVoteExtension(_, _, _, _, _, _, r) => {
                return Ok(r.resume_with(Err(core::VoteExtensionError::InvalidVoteExtension)));
            }
        }
        Ok(Resume::Continue)
    }

    fn timer(&self, timeout: bft::Timeout) -> AgreementTimer {
        AgreementTimer {
            branch: self.height.branch,
            round: self.height.round,
            kind: kind_of(timeout.kind),
            view: view_of(timeout.round),
        }
    }

    fn schedule(&mut self, timeout: bft::Timeout) {
        let timer = self.timer(timeout);
        self.timers.insert(timer);
        let due = self
            .now
            .saturating_add(self.timeouts.duration(timeout.kind, timer.view));
        self.out.push(Output::SetTimer(timer, due));
    }

    fn cancel(&mut self, timeout: bft::Timeout) {
        let timer = self.timer(timeout);
        if self.timers.remove(&timer) {
            self.out.push(Output::CancelTimer(timer));
        }
    }

    fn cancel_all(&mut self) {
        let timers = std::mem::take(&mut self.timers);
        self.out.extend(timers.into_iter().map(Output::CancelTimer));
    }

    fn publish(&mut self, message: SignedConsensusMsg<Murmur>) {
        let signed = match &message {
            SignedConsensusMsg::Vote(vote) => signed_vote(self.run, vote),
            SignedConsensusMsg::Proposal(proposal) => signed_proposal(self.run, proposal),
        };
        self.keep(&signed);
        self.out.push(Output::Publish(signed));
    }

    /// A certificate travels as the votes it is made of: each bears its voter's signature, so no other kind of message is needed.
    fn publish_liveness(&mut self, message: &LivenessMsg<Murmur>) {
        match message {
            LivenessMsg::Vote(vote) => self.out.push(Output::Publish(signed_vote(self.run, vote))),
            LivenessMsg::PolkaCertificate(polka) => self.publish_each(polka.votes(&Murmur)),
            LivenessMsg::SkipRoundCertificate(certificate) => self.publish_each(certificate.votes(&Murmur)),
        }
    }

    fn publish_each(&mut self, votes: impl Iterator<Item = bft::SignedVote<Murmur>>) {
        let run = self.run;
        self.out
            .extend(votes.map(|vote| Output::Publish(signed_vote(run, &vote))));
    }

    /// Remembers an own message for [`super::Agreement::repeat`].
    fn keep(&mut self, signed: &Signed) {
        let Some(part) = Part::of(&signed.body).filter(|_| signed.signer == self.keys.id()) else {
            return;
        };
        if let Entry::Vacant(place) = self.own.entry((signed.body.slot().view, part)) {
            place.insert(signed.clone());
            if part == Part::Prevote {
                self.uncounted.push(signed.clone());
            }
        }
    }

    fn decide(&mut self, certificate: &bft::CommitCertificate<Murmur>) {
        let Some(known) = self.known.get(&certificate.value_id) else {
            // The engine decides only what it was given by a proposal, and `append` notes each of those.
            unreachable!("decided {}, which was never proposed", certificate.value_id);
        };
        let mut votes: Vec<_> = certificate
            .commit_signatures
            .iter()
            .map(|commit| (commit.address, commit.signature))
            .collect();
        votes.sort_unstable();
        votes.dedup_by_key(|(voter, _)| *voter);
        let slot = certificate.height.slot(self.run, view_of(certificate.round));
        let certificate = Certificate {
            slot,
            record: certificate.value_id,
            votes,
        };
        self.decision = Some(Output::Decided {
            record: known.value.record.clone(),
            certificate,
        });
    }

    fn sign_vote(&self, vote: Ballot) -> Result<bft::SignedVote<Murmur>, DoubleSign> {
        let signature = self.sign(Body::Vote(vote.to_vote(self.run)))?;
        Ok(bft::SignedMessage::new(vote, signature))
    }

    fn sign_proposal(&self, motion: Motion) -> Result<bft::SignedProposal<Murmur>, DoubleSign> {
        let signature = self.sign(Body::Proposal(Box::new(motion.to_proposal(self.run))))?;
        Ok(bft::SignedMessage::new(motion, signature))
    }

    /// Signs, unless something else was signed for the same slot. The engine takes care of that itself; this is the last gate.
    fn sign(&self, body: Body) -> Result<Signature, DoubleSign> {
        let slot = body.slot();
        let before = Part::of(&body).and_then(|part| self.own.get(&(slot.view, part)));
        match before {
            Some(before) if before.body != body => Err(DoubleSign { slot }),
            Some(before) => Ok(before.signature),
            None => Ok(self.keys.sign(&body).signature),
        }
    }

    /// Takes an own message out of the log, before anything is replayed.
    pub(super) fn recall(&mut self, input: &Input<Murmur>) {
        match input {
            Input::Vote(vote) => self.keep(&signed_vote(self.run, vote)),
            Input::Proposal(proposal) => self.keep(&signed_proposal(self.run, proposal)),
            _ => {}
        }
    }

    /// Logs what the engine has taken in. This is also where the host learns of it: a proposal that is logged has been
    /// authenticated, so its blobs can be fetched (trap 3).
    fn append(&mut self, height: Height, input: &Input<Murmur>) {
        let Some(entry) = wal::encode(self.run, height, input) else {
            return;
        };
        if self.logged.is_empty() || !self.logged.contains(&Hash::of(&entry)) {
            self.out.push(Output::Persist(entry));
        }
        match input {
            Input::Proposal(proposal) => self.note_proposal(proposal),
            Input::ProposedValue(value, _) => {
                self.note(&value.value, value.round, value.proposer);
                self.valid.insert(value.value.hash);
            }
            _ => {}
        }
    }

    fn note(&mut self, value: &Value, round: bft::Round, proposer: PeerId) {
        self.known.entry(value.hash).or_insert_with(|| Known {
            value: value.clone(),
            round,
            proposer,
        });
    }

    fn note_proposal(&mut self, proposal: &bft::SignedProposal<Murmur>) {
        let Motion {
            round,
            value,
            polka,
            proposer,
            ..
        } = &proposal.message;
        self.note(value, *round, *proposer);
        let seen = self.proposed.entry(view_of(*round)).or_default();
        seen.push((value.hash, polka.as_u32()));
        if *proposer == self.keys.id() {
            self.keep(&signed_proposal(self.run, proposal));
        } else if !self.valid.contains(&value.hash) {
            self.out.push(Output::Check {
                view: view_of(*round),
                proposer: *proposer,
                record: value.record.clone(),
                polka_view: polka.as_u32(),
            });
        }
    }
}

/// The engine's kinds of timeout as numbers. The last never fires: heights end with their decision.
pub(super) fn kind_of(kind: TimeoutKind) -> u8 {
    match kind {
        TimeoutKind::Propose => 0,
        TimeoutKind::Prevote => 1,
        TimeoutKind::Precommit => 2,
        TimeoutKind::Rebroadcast => 3,
        TimeoutKind::FinalizeHeight(_) => 4,
    }
}

/// The way back.
pub(super) fn timeout_of(kind: u8) -> Option<TimeoutKind> {
    match kind {
        0 => Some(TimeoutKind::Propose),
        1 => Some(TimeoutKind::Prevote),
        2 => Some(TimeoutKind::Precommit),
        3 => Some(TimeoutKind::Rebroadcast),
        _ => None,
    }
}
