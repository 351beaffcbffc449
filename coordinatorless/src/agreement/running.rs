//! One height in progress: the engine, its host, and what both are fed with.

use std::collections::{BTreeMap, BTreeSet};

use arc_malachitebft_core_consensus as core;
use arc_malachitebft_core_types as bft;
use core::{Error, Input, Params, State, ValuePayload};

use super::context::{Ballot, Members, Motion, Murmur, Value, signed_proposal, view_of};
use super::doubles::Doubles;
use super::effects::{Host, Part};
use super::gathered::{Gathered, LOOKAHEAD};
use super::{Output, wal};
use crate::types::*;
use crate::wire::{Body, Signed};

/// One height in progress.
pub(super) struct Running {
    pub(super) engine: State<Murmur>,
    pub(super) host: Host,
    pub(super) gathered: Gathered,
    doubles: Doubles,
    accused: BTreeSet<(PeerId, &'static str)>,
}

impl Running {
    pub(super) fn new(host: Host) -> Self {
        let params = Params {
            address: host.keys.id(),
            threshold_params: Default::default(),
            value_payload: ValuePayload::ProposalAndParts,
            enabled: true,
        };
        // The engine's own queue stays empty: the door gives it messages of the running height only (trap 10).
        let engine = State::new(Murmur, host.height, Members(host.voters.clone()), params, 1, 1);
        Self {
            engine,
            host,
            gathered: Gathered::default(),
            doubles: Doubles::default(),
            accused: BTreeSet::new(),
        }
    }

    /// Starts the height, and brings it to where the log ends (trap 11).
    pub(super) fn begin(&mut self, wal: &[Vec<u8>]) {
        let height = self.host.height;
        let replay = wal::read(self.host.run, self.host.keys.id(), height, wal);
        let restart = !replay.inputs.is_empty();
        self.engine.params.enabled = replay.whole;
        replay.inputs.iter().for_each(|input| self.host.recall(input));
        self.host.logged = wal.iter().map(|entry| Hash::of(entry)).collect();
        if restart {
            self.engine.index_wal_entries(&replay.inputs);
        }
        let members = Members(self.host.voters.clone());
        self.feed(Input::StartHeight(
            height,
            members,
            restart,
            None,
            bft::VoteExtensionPolicy::Disabled,
        ));
        for input in replay.inputs {
            self.feed(input);
        }
        self.engine.reset_entries_index();
        self.host.logged.clear();
        self.settle();
        self.forget_the_past();
    }

    /// Of what a replay asked for, only what still matters is passed on.
    fn forget_the_past(&mut self) {
        let now = view_of(self.engine.round());
        let proposing = self.engine.driver.step_is_propose() && !self.host.own.contains_key(&(now, Part::Proposal));
        let valid = &self.host.valid;
        self.host.out.retain(|output| match output {
            Output::GetRecord { view, .. } => proposing && *view == now,
            Output::Check { record, .. } => !valid.contains(&record.hash()),
            _ => true,
        });
    }

    /// Runs the engine on one input.
    pub(super) fn feed(&mut self, input: Input<Murmur>) {
        let Self { engine, host, .. } = self;
        let result: Result<(), Error<Murmur>> =
            core::process!(input: input, state: engine, metrics: &(), with: effect => host.handle(effect));
        match result {
            Ok(()) => {}
            Err(error @ Error::ReplayDivergence(..)) => {
                // Signing on could contradict what others have from before the crash: listen until the next height.
                tracing::error!(%error, "the log does not lead to what it records");
                self.engine.params.enabled = false;
                self.accuse(
                    self.host.keys.id(),
                    "the log contradicts itself; silent until the next round",
                    None,
                );
            }
            Err(error) => tracing::warn!(%error, "the agreement refused an input"),
        }
    }

    fn accuse(&mut self, peer: PeerId, what: &'static str, evidence: Option<Evidence>) {
        if self.accused.insert((peer, what)) {
            let evidence = evidence.map(Box::new);
            self.host.out.push(Output::Equivocation { peer, what, evidence });
        }
    }

    pub(super) fn proposal(&mut self, signer: PeerId, proposal: &Proposal, signature: Signature) {
        let slot = proposal.slot;
        let reach = view_of(self.engine.round()).saturating_add(LOOKAHEAD);
        let proposer = self.host.voters.proposer(slot.round, slot.view);
        if slot.view > reach || signer != proposer || proposal.record.slot.run != slot.run {
            return;
        }
        let value = Value::new(proposal.record.clone());
        let said = (value.hash, proposal.polka_view);
        let seen = self.host.proposed.get(&slot.view).map_or(&[][..], Vec::as_slice);
        if seen.contains(&said) {
            return;
        }
        if !seen.is_empty() {
            self.accuse(signer, "two proposals in one view", None);
        }
        let motion = Motion::new(signer, proposal, value);
        self.feed(Input::Proposal(bft::SignedMessage::new(motion, signature)));
    }

    pub(super) fn vote(&mut self, signer: PeerId, vote: &Vote, signature: Signature) {
        let height = self.host.height;
        if vote.slot.view > view_of(self.engine.round()).saturating_add(LOOKAHEAD) {
            if let Some(skip) = self.gathered.ahead(height, &self.host.voters, signer, vote, signature) {
                self.feed(Input::RoundCertificate(skip));
            }
            return;
        }
        let ballot = bft::SignedMessage::new(Ballot::new(signer, vote), signature);
        if let Some(evidence) = self.doubles.vote(view_of(self.engine.round()), signer, vote, signature) {
            self.accuse(signer, "two votes in one slot", Some(evidence));
        }
        self.feed(Input::Vote(ballot));
        if vote.kind == VoteKind::Prevote && !self.host.over {
            self.count_prevote(signer, vote, signature);
        }
    }

    /// A vote with this peer's own key: an echo, or said by another process that has the key. The engine knows what this one signed;
    /// but the others may be locked by a polka that the other process's prevote is part of, and follow nobody who can't see it.
    pub(super) fn own_vote(&mut self, vote: &Vote, signature: Signature) {
        let reach = view_of(self.engine.round()).saturating_add(LOOKAHEAD);
        if vote.kind == VoteKind::Prevote && vote.slot.view <= reach {
            self.count_prevote(self.host.keys.id(), vote, signature);
        }
    }

    /// Hands over a polka that the engine could not see for double votes.
    fn count_prevote(&mut self, signer: PeerId, vote: &Vote, signature: Signature) {
        let Host {
            height, voters, known, ..
        } = &self.host;
        let known = vote.record.is_some_and(|record| known.contains_key(&record));
        let Some(polka) = self.gathered.prevote(*height, voters, signer, vote, signature, known) else {
            return;
        };
        if self.engine.polka_certificate(polka.round, &polka.value_id).is_none() {
            self.feed(Input::PolkaCertificate(polka));
        }
    }

    /// After each step: own prevotes count too, and votes that are no longer far ahead are forgotten.
    pub(super) fn settle(&mut self) {
        while let Some(own) = self.host.uncounted.pop() {
            if let (Body::Vote(vote), false) = (&own.body, self.host.over) {
                self.count_prevote(own.signer, vote, own.signature);
            }
        }
        let view = view_of(self.engine.round());
        self.gathered.reached(view);
        self.doubles.reached(view);
    }

    /// The highest polka with a valid record, with all prevotes that were seen: by the engine, in the log, or beside it.
    pub(super) fn polka(&self) -> Option<Polka> {
        let valid = self.engine.driver.valid_value()?;
        let (round, record) = (valid.round, valid.value.hash);
        let wanted = |vote: &&bft::SignedVote<Murmur>| {
            vote.message.kind == bft::VoteType::Prevote && vote.message.value == bft::NilOrVal::Val(record)
        };
        let counted = self.engine.driver.votes().per_round(round).into_iter();
        let counted = counted.flat_map(|votes| votes.received_votes()).filter(wanted);
        let handed = self.engine.polka_certificate(round, &record).into_iter();
        let handed = handed.flat_map(|polka| &polka.polka_signatures);
        let view = view_of(round);
        let prevotes: BTreeMap<PeerId, Signature> = counted
            .map(|vote| (vote.message.voter, vote.signature))
            .chain(handed.map(|one| (one.address, one.signature)))
            .chain(self.gathered.prevotes(view, record))
            .collect();
        let weight = prevotes.keys().map(|id| self.host.voters.weight_of(id)).sum();
        let prevotes = prevotes.into_iter().collect();
        self.host
            .voters
            .quorum(weight)
            .then_some(Polka { view, record, prevotes })
    }

    /// The proposal that has the highest polka, and the prevotes for it.
    pub(super) fn polka_messages(&self) -> impl Iterator<Item = Signed> + '_ {
        let valid = self.engine.driver.valid_value();
        let proposal = valid.and_then(|valid| {
            self.engine
                .driver
                .valid_proposal_for_round_and_value(valid.round, valid.value.hash)
        });
        let run = self.host.run;
        let votes = valid.into_iter().flat_map(move |valid| {
            let (view, record) = (view_of(valid.round), valid.value.hash);
            let slot = self.host.height.slot(run, view);
            let vote = Vote {
                slot,
                kind: VoteKind::Prevote,
                record: Some(record),
            };
            self.gathered
                .prevotes(view, record)
                .map(move |(signer, signature)| Signed {
                    signer,
                    body: Body::Vote(vote.clone()),
                    signature,
                })
        });
        proposal
            .into_iter()
            .map(move |proposal| signed_proposal(run, proposal))
            .chain(votes)
    }
}
