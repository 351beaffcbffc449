//! Agreement on one record a round: malachite's Tendermint engine (`arc-malachitebft-core-consensus`) behind one sans-IO door.
//!
//! Nothing else in Murmur knows the engine. It is given messages, timeouts and records; it gives [`Output`]s. It holds no clock, no
//! socket and no randomness: the same calls give the same outputs.
//!
//! - **A1** A height is a branch and a round. One runs at a time, from [`Agreement::start`] to [`Output::Decided`] or
//!   [`Agreement::stop`]. Of the next height a bounded number of messages is kept; of all others none.
//! - **A2** Only voters are heard, and a proposal only from the proposer of its view. Signatures are verified by the caller. A prevote
//!   with this peer's key that it did not sign is another process's, and counts in polkas as any double vote does.
//! - **A3** A proposal carries its record. This peer prevotes it only after [`Agreement::valid`] has said that R11 holds; until then
//!   it is silent, and prevotes nil at the timeout of the view.
//! - **A4** Whatever the engine must not forget comes out as [`Output::Persist`], before the [`Output::Publish`] that follows from
//!   it. A peer that replays these entries signs nothing that contradicts what it signed before (R19).
//! - **A5** Nothing is assumed to arrive. [`Agreement::repeat`], called about once a second, gives what others may have missed.
//!   Certificates travel as the votes they are made of.
//! - **A6** A certificate holds our own canonical precommits, so that anyone can check it ([`Agreement::certificate_valid`]) and a
//!   laggard can apply its record without this engine.
//!
//! Files: [`voters`](Voters) (weights, order of proposing), `context` (the engine's nouns), `effects` (what it asks of its host),
//! `running` (one height), `gathered` (votes the engine would drop), `doubles` (two votes in one slot), `wal` (the log's entries), `certificate` (the check).

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_malachitebft_core_consensus as core;
use arc_malachitebft_core_types as bft;
use core::{Input, LocallyProposedValue};

use crate::protocol::event::AgreementTimer;
use crate::types::*;
use crate::wire::{Body, Keys, Scheme, Signed};

mod certificate;
mod context;
mod doubles;
mod effects;
mod gathered;
mod running;
mod voters;
mod wal;

pub use certificate::CertificateError;
pub use voters::Voters;

use context::{Height, Value, view_of};
use effects::{Host, Part};
use running::Running;

/// The longest a step waits, however many views have failed.
const MAX_TIMEOUT: Micros = 60_000_000;
/// Messages kept for the next height, for each voter and part it plays.
const EARLY_VOTES: usize = 4;
/// Proposals kept for the next height, of all voters: they can be large, and only one of them will be wanted first.
const EARLY_PROPOSALS: usize = 16;

/// How long the steps of a view wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the proposal of view 0: it covers collecting contributions and fetching them.
    pub propose_first: Micros,
    /// For the proposal of a later view, and for votes of any.
    pub view: Micros,
    /// How much longer each view waits than the one before (0.5 s by default).
    pub view_delta: Micros,
}

impl Timeouts {
    fn duration(&self, kind: bft::TimeoutKind, view: View) -> Micros {
        match kind {
            bft::TimeoutKind::Propose if view == 0 => self.propose_first,
            _ => self
                .view
                .saturating_add(self.view_delta.saturating_mul(u64::from(view)))
                .min(MAX_TIMEOUT),
        }
    }
}

/// What the agreement wants done, in this order.
#[derive(Clone, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "outputs are few and moved once; a box for each vote costs more"
)]
pub enum Output {
    /// This peer proposes in this view: answer with [`Agreement::propose`] before the view's timeout.
    GetRecord {
        /// The round.
        round: Round,
        /// The view.
        view: View,
    },
    /// The proposer of a view proposes this: hold its blobs, check the rules, then call [`Agreement::valid`] with its hash.
    Check {
        /// The view.
        view: View,
        /// Who proposes it now, not necessarily its first proposer.
        proposer: PeerId,
        /// The record.
        record: Arc<Record>,
        /// The view in which it had more than 2/3 of the prevotes already, as the proposer says.
        polka_view: Option<View>,
    },
    /// Append to the log of this height and sync it, before anything that comes after.
    Persist(Vec<u8>),
    /// Send to all.
    Publish(Signed),
    /// Call [`Agreement::timeout`] at this time. A timer that is set again moves.
    SetTimer(AgreementTimer, Micros),
    /// Never mind.
    CancelTimer(AgreementTimer),
    /// The round is decided. Always the last output, and the height's last.
    Decided {
        /// The record.
        record: Arc<Record>,
        /// The proof.
        certificate: Certificate,
    },
    /// A voter said two things in one slot, or this peer's own log contradicts itself.
    Equivocation {
        /// Who.
        peer: PeerId,
        /// What.
        what: &'static str,
        /// The proof, where both were votes.
        evidence: Option<Box<Evidence>>,
    },
}

/// The agreement of one peer. See the module's rules.
pub struct Agreement {
    run: RunId,
    keys: Keys,
    timeouts: Timeouts,
    running: Option<Running>,
    /// The last height started, and its voters.
    last: Option<(Height, Arc<Voters>)>,
    early: BTreeMap<(PeerId, Part), Vec<Signed>>,
}

impl Agreement {
    /// An agreement in which nothing has started.
    pub fn new(run: RunId, keys: Keys, timeouts: Timeouts) -> Self {
        Self {
            run,
            keys,
            timeouts,
            running: None,
            last: None,
            early: BTreeMap::new(),
        }
    }

    /// Starts a height; the one in progress, if any, is given up. `wal` holds what [`Output::Persist`] gave for this very height
    /// before a restart, in order, and is empty otherwise. A log with an unreadable entry that isn't its last makes this peer
    /// listen without signing until the next height. Without voters nothing starts.
    pub fn start(
        &mut self,
        now: Micros,
        branch: Branch,
        round: Round,
        voters: Arc<Voters>,
        wal: &[Vec<u8>],
    ) -> Vec<Output> {
        let height = Height { branch, round };
        let early = std::mem::take(&mut self.early);
        let mut out = self.halt();
        self.last = Some((height, voters.clone()));
        if voters.is_empty() {
            tracing::error!(%height, "nobody has a vote");
            return out;
        }
        let host = Host::new(self.run, self.keys.clone(), self.timeouts, height, voters, now);
        let running = self.running.insert(Running::new(host));
        running.begin(wal);
        out.extend(running.host.drain());
        for message in early.into_values().flatten() {
            out.extend(self.message(now, &message));
        }
        out
    }

    /// The height in progress is over, decided elsewhere or given up: everything is ignored until the next start.
    pub fn stop(&mut self) {
        self.running = None;
    }

    /// The answer to [`Output::GetRecord`]. An own record is valid by construction. Ignored if the view is past, if this peer isn't
    /// its proposer, or if it has proposed already.
    pub fn propose(&mut self, now: Micros, round: Round, view: View, record: Record) -> Vec<Output> {
        self.act(now, |running| {
            let Host { height, own, .. } = &running.host;
            if height.round != round || own.contains_key(&(view, Part::Proposal)) {
                return;
            }
            let (height, value) = (*height, Value::new(record));
            running.feed(Input::Propose(LocallyProposedValue::new(
                height,
                bft::Round::new(view),
                value,
            )));
        })
    }

    /// A message whose signature is verified. Those that are no proposal or vote, of another run or height, or of somebody without a
    /// vote change nothing, and of this peer's own key only prevotes count (A1, A2).
    pub fn message(&mut self, now: Micros, message: &Signed) -> Vec<Output> {
        let Some(part) = Part::of(&message.body) else {
            return Vec::new();
        };
        let Some((height, voters)) = &self.last else {
            return Vec::new();
        };
        let slot = message.body.slot();
        if slot.run != self.run || voters.weight_of(&message.signer) == 0 {
            return Vec::new();
        }
        let own = message.signer == self.keys.id();
        if Height::of(&slot) == height.next() && !own {
            self.keep_early(part, message);
            return Vec::new();
        }
        if Height::of(&slot) != *height {
            return Vec::new();
        }
        self.act(now, |running| match &message.body {
            Body::Vote(vote) if own => running.own_vote(vote, message.signature),
            _ if own => {}
            Body::Proposal(proposal) => running.proposal(message.signer, proposal, message.signature),
            Body::Vote(vote) => running.vote(message.signer, vote, message.signature),
            _ => {}
        })
    }

    /// R11 holds for this record, announced by [`Output::Check`] at this height. May be said again.
    pub fn valid(&mut self, now: Micros, record: Hash) -> Vec<Output> {
        self.act(now, |running| {
            if running.host.valid.contains(&record) {
                return;
            }
            let Some(known) = running.host.known.get(&record) else {
                return;
            };
            let value = wal::proposed(running.host.height, known.round, known.proposer, known.value.clone());
            running.feed(Input::ProposedValue(value, bft::ValueOrigin::Consensus));
        })
    }

    /// A timer is due. One that was cancelled or belongs to another height changes nothing (trap 6 of the engine).
    pub fn timeout(&mut self, now: Micros, timer: AgreementTimer) -> Vec<Output> {
        self.act(now, |running| {
            if let (true, Some(kind)) = (running.host.timers.remove(&timer), effects::timeout_of(timer.kind)) {
                running.feed(Input::TimeoutElapsed(bft::Timeout::new(
                    bft::Round::new(timer.view),
                    kind,
                )));
            }
        })
    }

    /// Checks that a certificate proves what it says: its voters are sorted, each one a member with a valid precommit to this very
    /// record in this very slot, together more than 2/3 of the weight (A6). Whether the slot is the one asked about is for the
    /// caller to compare.
    pub fn certificate_valid(
        voters: &Voters,
        certificate: &Certificate,
        scheme: Scheme,
    ) -> Result<(), CertificateError> {
        certificate::check(voters, certificate, scheme)
    }

    /// Whether this is an entry that [`Output::Persist`] may have given, of whatever height.
    pub fn reads(entry: &[u8]) -> bool {
        wal::readable(entry)
    }

    /// Checks that a polka is one, in the round that `slot` names.
    pub fn polka_valid(voters: &Voters, slot: Slot, polka: &Polka, scheme: Scheme) -> Result<(), CertificateError> {
        certificate::check_polka(voters, slot, polka, scheme)
    }

    /// The highest polka seen at this height whose record is valid here, and the record: what a branch that begins from here must
    /// not pass over (R20). Whoever has precommitted a record has such a polka.
    pub fn polka(&self) -> Option<(Polka, Arc<Record>)> {
        let running = self.running.as_ref()?;
        let record = running.engine.driver.valid_value()?.value.record.clone();
        let polka = running.polka()?;
        Some((polka, record))
    }

    /// The view in progress, 0 where no height is.
    pub fn view(&self) -> View {
        self.running
            .as_ref()
            .map_or(0, |running| view_of(running.engine.round()))
    }

    /// Who proposed in the views of this height that came to nothing, in the order of the views (R10). The caller computes the same
    /// for a decided view from [`Voters::proposer`].
    pub fn failed_proposers(&self) -> Vec<PeerId> {
        let Some((height, voters)) = &self.last else {
            return Vec::new();
        };
        (0..self.view())
            .take(voters.len())
            .map(|view| voters.proposer(height.round, view))
            .collect()
    }

    /// Whether more than 2/3 of the weight is seen to have prevoted this record in one view of the height in progress.
    pub fn has_polka(&self, record: &Hash) -> bool {
        let Some(running) = self.running.as_ref() else {
            return false;
        };
        let valid = running.engine.driver.valid_value();
        running.gathered.has_polka(record, &running.host.voters)
            || valid.is_some_and(|valid| valid.value.hash == *record)
    }

    /// What to send again, about once a second (A5): this peer's proposal and votes of this view and the one before. From view 1 on
    /// also the record that has a polka, with its prevotes: whoever is locked on it can't vote for another, and the others can
    /// follow only if they see why.
    pub fn repeat(&self) -> Vec<Signed> {
        let Some(running) = self.running.as_ref().filter(|running| !running.host.over) else {
            return Vec::new();
        };
        let view = view_of(running.engine.round());
        let own = running.host.own.range((view.saturating_sub(1), Part::Proposal)..);
        let mut messages: Vec<Signed> = own
            .filter(|((of, part), _)| *of == view || *part != Part::Proposal)
            .map(|(_, message)| message.clone())
            .collect();
        if view > 0 && running.engine.is_active_validator() {
            for message in running.polka_messages() {
                if !messages.contains(&message) {
                    messages.push(message);
                }
            }
        }
        messages
    }

    /// Runs one step of the height in progress and collects its outputs.
    fn act(&mut self, now: Micros, step: impl FnOnce(&mut Running)) -> Vec<Output> {
        let Some(running) = self.running.as_mut().filter(|running| !running.host.over) else {
            return Vec::new();
        };
        running.host.now = now;
        step(running);
        running.settle();
        running.host.drain()
    }

    /// Gives up the height in progress with its timers.
    fn halt(&mut self) -> Vec<Output> {
        let timers = self
            .running
            .take()
            .map(|running| running.host.timers)
            .unwrap_or_default();
        timers.into_iter().map(Output::CancelTimer).collect()
    }

    fn keep_early(&mut self, part: Part, message: &Signed) {
        let proposals = self.early.keys().filter(|(_, part)| *part == Part::Proposal).count();
        let kept = self.early.get(&(message.signer, part)).map_or(&[][..], Vec::as_slice);
        let room = match part {
            Part::Proposal => kept.is_empty() && proposals < EARLY_PROPOSALS,
            Part::Prevote | Part::Precommit => kept.len() < EARLY_VOTES,
        };
        if room && !kept.contains(message) {
            self.early
                .entry((message.signer, part))
                .or_default()
                .push(message.clone());
        }
    }
}

#[cfg(test)]
mod net;
#[cfg(test)]
mod tests;
