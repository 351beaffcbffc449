//! The protocol, as a state machine without sockets, clocks or disks: [`State::handle`] takes what happened and returns what to do.
//! The same code runs under the seeded simulator ([`crate::sim`]) and under iroh ([`crate::node`]).
//!
//! # The rules, and where each is kept
//!
//! | rule | | where |
//! |---|---|---|
//! | R1 | signatures cover run, branch, round, view; canonical bytes only | [`crate::wire`] |
//! | R2 | one configuration, hashed into the run's id | [`crate::config`] |
//! | R3 | a ticket is the joiner's trusted checkpoint | [`crate::ticket`], [`crate::node`] |
//! | R4 | tokens are a prefix of the assigned order, in whole batches | [`chain`] |
//! | R5 | weight is work, counted some rounds ago, capped, fading | [`membership`] |
//! | R6 | ledger sums are u128 | [`crate::ledger`] |
//! | R7 | assignment by quota from one stream, returned data first | [`assignment`], [`membership`] |
//! | R8 | train until the quota is done or time is up, then commit | `training` |
//! | R9 | fetch committed blobs as they appear, say what one holds; who tells what to whom | `availability`, [`roster`] |
//! | R10 | the proposer names what more than 2/3 hold | `round` |
//! | R11 | a prevote says: I hold it all, and it follows the rules | `round` |
//! | R12 | a record that leaves out what is widely held gets no vote in views 0 and 1 | `round` |
//! | R13 | decide, apply; what is not counted never happened | `round` |
//! | R14 | whose model differs doesn't vote, and heals | `round` |
//! | R15 | uncounted rounds shrink the quota; silence to most, a lapse | [`membership`], [`chain`], `round` |
//! | R16 | overlap: train a round while the one before it is agreed | [`overlap`], `training` |
//! | R17, R18 | snapshots; joining | [`crate::node`] |
//! | R19 | a restarted peer goes on; without its log it listens first | `log`, [`State::new`] |
//! | | of two processes with one key one stops; clocks that leap | [`doubled`], [`clock`] |
//! | R20 | survivors regroup | `regroup` |
//! | R21 | meeting another branch | `sync` |
//! | R22 | two votes in one slot bar their voter; evidence counts within one branch | [`chain`], `evidence` |
//! | R23 | the seed is a chain of VRF outputs | [`beacon`] |
//! | R24, R25, R27 | private draw of auditors, verdicts, accusations before all voters | [`audit`], [`beacon`] |
//! | | proof of speed: asked for, claimed in time, opened, agreed | [`speed`] |
//! | R25 | who says that work agrees shows that it replayed it, and is paid | [`replayed`] |
//! | R28 | cheating does not pay, or the run isn't created | [`crate::economics`] |
//! | R29 | points | [`crate::ledger`] |
//!
//! # Where this differs from the first plan, and why
//! - Records carry signed commits whole instead of their hashes, so that a record can be checked, replayed and audited by itself.
//! - A member that delivered nothing last round goes last as a proposer, like one whose view failed: a dead peer costs one
//!   deadline, not one for each time the draw falls on it.
//! - A returned range counts towards poison (R7) only when its member delivered nothing; the tail of a slow member's quota is no
//!   sign of poison.
//! - At most a fifth of the weight *or one member* lapses in a record (R15): of four members, each has more than a fifth.
//! - The record of the highest polka can't be proposed again on the new branch as it is: its slot, state and proposers are the old
//!   branch's. The branch's first record counts the same contributions instead, and proves why (R20, `regroup`). A certified record
//!   of the old branch still wins (R21a).
//! - A new branch is numbered by a hash of who goes on from where, so that two sides of a split never share a number.
//! - Of two messages for one slot, votes alone are evidence (R22): they are logged before they are sent, while an honest peer that
//!   starts again in the middle of a round may commit anew, and a second proposal would have to be shown whole. Two processes that
//!   vote with one key are barred like any double voter, unless one of them stops first ([`doubled`]).
//! - A regroup that a peer was no part of is followed only once it has heard no quorum for half the time after which it would
//!   regroup itself (R21): who has just started hears nobody yet, and liars are quick to say that they alone are left.
//! - The cap on a weight (R5) binds a key, not a machine: who does more than a quarter of all work keeps its full weight by splitting
//!   it over several keys. Below the cap splitting gains nothing.
//! - With overlap (R16) the commit is still signed after the record before it, and names it as its parent: the accumulator step has to wait
//!   for that record anyway, and nothing signed can be counted on two branches. Work in flight of a member that has gone is not counted.

pub mod assignment;
pub mod audit;
mod availability;
pub mod beacon;
pub mod chain;
pub mod clock;
pub mod doubled;
pub mod event;
mod evidence;
mod log;
pub mod membership;
pub mod overlap;
pub(crate) mod planted;
mod regroup;
pub mod replayed;
pub mod roster;
mod round;
pub mod speed;
pub mod sync;
mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::agreement::{Agreement, Timeouts, Voters};
use crate::config::RunConfig;
use crate::types::*;
use crate::wire::{Body, Keys, Scheme, Signed};
use assignment::Assignment;
use beacon::VrfKeys;
use chain::{ChainState, RuleViolation, Step, Steps};
use event::{Effect, Event, Notice, Timer};
pub use overlap::train_order;

/// A second, in the core's ticks.
pub const SECOND: Micros = 1_000_000;
/// Heartbeats and repair happen this often.
const BEAT: Micros = SECOND;
/// A member not heard for this long is not waited for: three heartbeats in a row were lost, or it is gone. With one beat's delay
/// everyone has noticed within five seconds.
const SILENCE: Micros = 7 * SECOND / 2;
/// A member that this peer has heard within this is told to others as alive: what others make of it comes up to two beats later,
/// and everyone should have noticed within five seconds all the same.
const FRESH: Micros = 9 * SECOND / 4;
/// What one holds is told at most this often.
const HAVE_PAUSE: Micros = SECOND / 20;
/// Views grow longer, so that nobody honest comes to this one in years. A third of the weight together can call the others to any view
/// (the engine follows so many), and the engine counts on from there.
const MAX_VIEW: View = 1 << 16;
/// Join and leave requests, and verdicts, kept at most.
const MAX_REQUESTS: usize = 256;

/// What a state machine starts from.
pub struct Setup {
    /// The run.
    pub config: Arc<RunConfig>,
    /// This peer.
    pub keys: Keys,
    /// The state after the last decided record (or the genesis).
    pub chain: ChainState,
    /// Older states with the records that led to `chain`, oldest first, for meeting other branches (R21); may be short.
    pub history: Vec<(ChainState, Arc<Decided>)>,
    /// The write-ahead log of the height in progress; `None` if it was lost, and then this peer listens for a round (R19).
    pub wal: Option<Vec<Vec<u8>>>,
    /// Where this peer wants its tokens; it asks to join whenever it is no member. `None`: never asks.
    pub join: Option<String>,
    /// A number above any that this peer used for `Have` messages before ([`doubled::first_sequence`]).
    pub sequence: u64,
    /// Take part up to this round and then only serve others; local, not agreed.
    pub last_round: Option<Round>,
    /// Steps shared with other peers in this process; a peer of its own has none.
    pub steps: Option<Arc<Steps>>,
}

/// One peer's view of the run.
pub struct State {
    config: Arc<RunConfig>,
    keys: Keys,
    vrf: VrfKeys,
    scheme: Scheme,
    join: Option<String>,
    leaving: bool,
    sequence: u64,
    last_round: Option<Round>,
    steps: Option<Arc<Steps>>,
    /// What was signed since the last decision, as the log on disk holds it.
    wal: Vec<Vec<u8>>,
    log_whole: bool,
    /// R19: the log is gone or damaged, and this peer signs nothing until the next decision.
    listening: bool,
    /// After the last decided record.
    chain: Arc<ChainState>,
    /// States before each of the last records, with that record: `(state after round r-1, record r)` under `r`.
    history: BTreeMap<Round, (Arc<ChainState>, Arc<Decided>)>,
    voters: Arc<Voters>,
    roster: roster::Roster,
    assignment: Assignment,
    /// This peer's own local rounds.
    training: training::Training,
    agreement: Agreement,
    /// Root of the model after `chain`'s round, once it is applied.
    model: Option<Hash>,
    parent_view: View,
    round: round::RoundState,
    haves: BTreeMap<PeerId, Have>,
    /// Those of `haves`.
    have_signatures: BTreeMap<PeerId, Signature>,
    /// Another process has this peer's key.
    doubled: bool,
    last_have: Option<Signed>,
    /// When, and in which round, each peer was last heard.
    heard: BTreeMap<PeerId, (Micros, Round)>,
    requests: BTreeMap<PeerId, Change>,
    verdicts: BTreeMap<audit::Key, SignedVerdict>,
    /// This peer's own that it is too early to tell: one an audit at most.
    sealed: Vec<Verdict>,
    /// Proofs of double votes that no record has yet, one a culprit.
    evidence: BTreeMap<PeerId, Evidence>,
    /// Audits this peer was ordered to do already.
    auditing: BTreeSet<audit::Key>,
    /// Whom this peer's lots drew it to audit, by branch and round: nobody else can know.
    lots: BTreeMap<(Branch, Round), Vec<(PeerId, Lot)>>,
    regroup: regroup::RegroupState,
    /// Proofs of speed, as this peer has seen them.
    speeds: speed::SpeedState,
    sync: sync::SyncState,
    out: Vec<Effect>,
}

impl State {
    /// A peer at the end of `setup.chain`; call [`State::start`] next.
    pub fn new(setup: Setup) -> Self {
        let Setup {
            config,
            keys,
            chain,
            history,
            join,
            sequence,
            ..
        } = &setup;
        let vrf = VrfKeys::derive(keys);
        let time = &config.timing;
        let timeouts = Timeouts {
            propose_first: micros(time.collect_secs + time.fetch_secs),
            view: micros(time.view_secs),
            view_delta: SECOND / 2,
        };
        let agreement = Agreement::new(chain.agreed.run, keys.clone(), timeouts);
        let share = |state: &ChainState| match &setup.steps {
            Some(steps) => steps.share(state),
            None => Arc::new(state.clone()),
        };
        let states = history
            .iter()
            .map(|(state, decided)| (decided.record.slot.round, (share(state), decided.clone())));
        let log = log::read(setup.wal.as_deref().unwrap_or_default());
        let mut state = Self {
            scheme: keys.scheme(),
            vrf,
            join: join.clone(),
            leaving: false,
            sequence: *sequence,
            last_round: setup.last_round,
            steps: setup.steps.clone(),
            wal: log.agreement,
            log_whole: setup.wal.is_some() && log.whole,
            listening: false,
            history: states.collect(),
            voters: Arc::new(chain.voters()),
            roster: roster::Roster::default(),
            assignment: chain.assignment(config),
            training: training::Training::default(),
            agreement,
            model: None,
            parent_view: history.last().map_or(0, |(_, decided)| decided.certificate.slot.view),
            round: round::RoundState::default(),
            haves: BTreeMap::new(),
            have_signatures: BTreeMap::new(),
            doubled: false,
            last_have: None,
            heard: BTreeMap::new(),
            requests: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            sealed: Vec::new(),
            evidence: BTreeMap::new(),
            auditing: BTreeSet::new(),
            lots: BTreeMap::new(),
            regroup: regroup::RegroupState::default(),
            speeds: speed::SpeedState::default(),
            sync: sync::SyncState::default(),
            out: Vec::new(),
            chain: share(chain),
            config: config.clone(),
            keys: keys.clone(),
        };
        state.recall_regroup(log.statements, log.began);
        state.voters = Arc::new(state.chain.voters());
        state
    }

    /// Begins the round after the chain's last.
    pub fn start(&mut self, now: Micros) -> Vec<Effect> {
        self.out.push(Effect::SetTimer(Timer::Beat, now + BEAT));
        let roster = roster::Roster::new(&self.chain, &self.voters, &self.keys.id());
        self.out.push(Effect::Members(roster.neighbours()));
        // Who votes alone has nobody to listen to, and nobody to deceive.
        let vote = self.log_whole || self.chain.voters().len() == 1;
        if !vote {
            self.out.push(Effect::Persist(log::lost()));
        }
        self.training.take_spent(now);
        self.recall_polka(now);
        self.start_round(now, vote);
        if vote {
            self.order_audits();
        }
        std::mem::take(&mut self.out)
    }

    /// Takes one event, returns what to do about it.
    pub fn handle(&mut self, now: Micros, event: Event) -> Vec<Effect> {
        if self.doubled {
            return Vec::new(); // the other process speaks now
        }
        match event {
            Event::Message { from, message } => self.message(now, from, &message),
            Event::Timer(Timer::Beat) => self.beat(now),
            Event::Timer(Timer::Collect) => self.try_propose(now),
            Event::Timer(Timer::Settled) => self.tell_have(now),
            Event::Timer(Timer::Agreement(timer)) => {
                if (timer.branch, timer.round) == self.height() {
                    let outputs = self.agreement.timeout(now, timer);
                    self.agreed(now, outputs);
                }
            }
            Event::TrainingEnded {
                branch,
                round,
                fruitful,
            } => self.training_ended(now, branch, round, fruitful),
            Event::Trained(trained) => self.trained(now, trained),
            Event::BlobHeld { blob } => self.blob_held(now, blob),
            Event::BlobBad { blob, reason } => self.blob_bad(now, blob, reason),
            Event::Applied {
                branch,
                round,
                model_root,
            } => self.applied(now, branch, round, model_root),
            Event::Resynced { round, model_root } => self.applied(now, self.chain.agreed.branch, round, model_root),
            Event::Audited(verdict) => self.audited(verdict),
            Event::SpeedAnswered(answer) => self.speed_answered(now, answer),
            Event::SpeedChecked { key, outcome } => self.speed_checked(now, key, outcome),
            Event::Records { from, records } => self.records(now, from, records),
            Event::Leave => self.leave(),
        }
        std::mem::take(&mut self.out)
    }

    /// The state after the last decided record.
    pub fn chain(&self) -> &Arc<ChainState> {
        &self.chain
    }

    /// The root of the model after the chain's last round, once applied.
    pub fn model_root(&self) -> Option<Hash> {
        self.model
    }

    /// This peer.
    pub fn id(&self) -> PeerId {
        self.keys.id()
    }

    /// Members heard within the last seconds, this peer included.
    pub fn alive(&self, now: Micros) -> Vec<PeerId> {
        self.chain.active().filter(|id| self.is_alive(now, id)).collect()
    }

    /// The newest round that each member says it has decided.
    pub fn tips(&self) -> impl Iterator<Item = (PeerId, Round)> + '_ {
        self.haves.iter().map(|(id, have)| (*id, have.tip_round))
    }

    /// Whether a member says that it has this round of this branch: who is on another branch, or behind, cannot answer for it.
    pub fn has_decided(&self, member: &PeerId, slot: &Slot) -> bool {
        let of = |have: &Have| have.slot.branch == slot.branch && have.tip_round >= slot.round;
        self.haves.get(member).is_some_and(of)
    }

    /// The agreed weights of the round in progress.
    pub fn voters(&self) -> &Voters {
        &self.voters
    }

    /// Shards of the commits of the round in progress.
    pub fn current_shards(&self) -> impl Iterator<Item = Hash> + '_ {
        let carried = self.regroup.carries().flat_map(|one| one.commit.shards.iter().copied());
        self.round.shards().chain(carried)
    }

    /// Whether this peer has done all that it was asked to do.
    pub fn is_finished(&self) -> bool {
        self.last_round.is_some_and(|last| self.chain.agreed.round >= last)
    }

    /// Entries in every collection that messages can grow, for the simulator's bound.
    pub fn load(&self) -> usize {
        self.round.load()
            + self.haves.len()
            + self.have_signatures.len()
            + self.heard.len()
            + self.requests.len()
            + self.verdicts.len()
            + self.sealed.len()
            + self.evidence.len()
            + self.regroup.load()
            + self.speeds.load()
    }

    fn height(&self) -> (Branch, Round) {
        (self.chain.agreed.branch, self.chain.agreed.round.next())
    }

    /// Whether this peer itself has heard the member within the last seconds.
    fn hears_now(&self, now: Micros, id: &PeerId) -> bool {
        self.hears_within(now, id, SILENCE)
    }

    fn hears_within(&self, now: Micros, id: &PeerId, time: Micros) -> bool {
        *id == self.keys.id() || self.heard.get(id).is_some_and(|(at, _)| at + time > now)
    }

    /// Whether this peer, or who listens for it, has.
    pub(crate) fn is_alive(&self, now: Micros, id: &PeerId) -> bool {
        let place = || self.roster.place(id);
        self.hears_now(now, id) || place().is_some_and(|place| self.told_alive(now, place))
    }

    /// The state after the record with this hash, everything that follows from the chain checked.
    fn step(&self, record: &Record, hash: Hash) -> Result<Step, RuleViolation> {
        if let Some(steps) = &self.steps {
            return steps.apply(&self.chain, &self.config, record, hash, self.scheme);
        }
        let (next, notices) = self.chain.apply(&self.config, record, self.scheme)?;
        Ok((Arc::new(next), notices))
    }

    fn is_member(&self, id: &PeerId) -> bool {
        self.chain.is_active(id)
    }

    /// Every message goes through here, its signature already verified.
    fn message(&mut self, now: Micros, from: PeerId, message: &Signed) {
        let (signer, slot) = (message.signer, message.body.slot());
        if signer == self.keys.id() {
            return self.own(now, message);
        }
        if slot.run != self.chain.agreed.run {
            return self.reject(signer, message.body.name(), "for another run".into());
        }
        if slot.view > MAX_VIEW {
            let reason = format!("expected a view up to {MAX_VIEW}, found {}", slot.view);
            return self.reject(signer, message.body.name(), reason);
        }
        if !self.is_member(&signer) && !matches!(message.body, Body::Join(_) | Body::Have(_)) {
            // A member of a branch, or of a future, that this peer doesn't know yet: worth asking, not worth believing.
            return self.maybe_behind(now, signer, slot);
        }
        // Only what a member hands over itself shows that it lives: others pass its messages on, or play them again.
        if from == signer && self.is_member(&signer) {
            self.heard.insert(signer, (now, self.height().1));
        }
        match &message.body {
            Body::Have(_) => self.have(now, from, message),
            Body::Commit(_) => self.commit(now, message),
            Body::Proposal(_) | Body::Vote(_) => self.ballot(now, message),
            Body::Join(_) | Body::Leave(_) => self.request(from, message.clone()),
            Body::Verdict(_) => self.verdict(message.clone()),
            Body::Evidence(_) => self.evidence(message.clone()),
            Body::Speed(_) => self.speed_claim(now, message.clone()),
            Body::Regroup(_) => self.regroup_statement(now, message.clone()),
        }
    }

    fn reject(&mut self, from: PeerId, kind: &'static str, reason: String) {
        self.out.push(Effect::Notice(Notice::Rejected { from, kind, reason }));
    }

    fn broadcast(&mut self, body: Body) -> Signed {
        let message = self.keys.sign(&body);
        self.spread(message.clone());
        message
    }

    /// To everyone whom it concerns.
    fn spread(&mut self, message: Signed) {
        self.out.push(match self.roster.audience(&message.body) {
            Some(to) => Effect::Multicast { to, message },
            None => Effect::Broadcast(message),
        });
    }

    /// Once a second: the heartbeat, and the repair of whatever was lost.
    fn beat(&mut self, now: Micros) {
        self.out.push(Effect::SetTimer(Timer::Beat, now + BEAT));
        self.ask_in(now);
        self.tell_have(now);
        self.reach_out();
        self.repair(now);
        self.try_propose(now);
        self.repeat_proof();
        self.repeat_evidence();
        self.repeat_speeds(now);
        self.maybe_regroup(now);
    }

    /// A peer that is no member, and wants to be, asks (R18).
    fn ask_in(&mut self, _now: Micros) {
        let Some(address) = self.join.clone().filter(|_| !self.leaving) else {
            return;
        };
        let banned = self
            .chain
            .member(&self.keys.id())
            .is_some_and(|me| me.standing == membership::Standing::Banned);
        if self.is_member(&self.keys.id()) || banned {
            return;
        }
        let slot = Slot {
            round: self.chain.agreed.round,
            ..self.chain.next_slot()
        };
        self.broadcast(Body::Join(Join {
            slot,
            vrf_key: self.vrf.public(),
            payout_address: address,
        }));
    }

    fn leave(&mut self) {
        self.leaving = true;
        if self.is_member(&self.keys.id()) {
            let slot = self.chain.next_slot();
            self.broadcast(Body::Leave(Leave { slot }));
        }
    }

    /// A join or leave request: kept for the next record that this peer proposes, passed on once.
    fn request(&mut self, _from: PeerId, message: Signed) {
        let id = message.signer;
        let change = match message.body.clone() {
            Body::Join(join) => Change::Join(join, id, message.signature),
            Body::Leave(leave) => Change::Leave(leave, id, message.signature),
            _ => return,
        };
        if self.chain.check_change(&self.config, &change, self.scheme).is_err() {
            return; // already done, or stale: requests are repeated, so this is no sign of anything
        }
        let known = self.requests.contains_key(&id);
        if !known && self.requests.len() >= MAX_REQUESTS {
            return self.reject(id, "join", "too many requests are waiting".into());
        }
        self.requests.insert(id, change);
        if !known {
            self.relay(message);
        }
    }

    /// A verdict that is awaited: kept for the next record, passed on once. One whose auditor was not drawn is refused and counted.
    fn verdict(&mut self, message: Signed) {
        let Body::Verdict(verdict) = message.body.clone() else {
            return;
        };
        let signed = SignedVerdict {
            auditor: message.signer,
            verdict,
            signature: message.signature,
        };
        let key = audit::key(&signed);
        // Of a peer that is a record ahead; it says so again.
        if self.chain.is_early(&self.config.verification, &signed.verdict) {
            return;
        }
        if self.verdicts.contains_key(&key) || self.verdicts.len() >= MAX_REQUESTS || !self.chain.awaits(&signed) {
            return;
        }
        match self.chain.check_verdict(&self.config, &signed, self.scheme) {
            Ok(()) => {
                self.verdicts.insert(key, signed);
                self.relay(message);
            }
            Err(violation) => self.reject(message.signer, "verdict", violation.to_string()),
        }
    }

    fn audited(&mut self, verdict: Verdict) {
        self.sealed.push(verdict);
        self.tell_verdicts();
    }

    /// Tells what this peer found, once it shows no other auditor what that one has yet to find for itself.
    fn tell_verdicts(&mut self) {
        let chain = self.chain.clone();
        let (early, due): (Vec<_>, Vec<_>) = std::mem::take(&mut self.sealed)
            .into_iter()
            .partition(|verdict| chain.is_early(&self.config.verification, verdict));
        self.sealed = early;
        self.sealed.retain(|verdict| {
            verdict.slot.branch == chain.agreed.branch && chain.auditable(verdict.slot.round).is_some()
        });
        for verdict in due {
            let message = self.keys.sign(&Body::Verdict(verdict));
            self.verdict(message);
        }
    }

    /// Orders the audits that this peer's own lots draw, and those that everyone who votes is asked for.
    fn order_audits(&mut self) {
        self.tell_verdicts();
        self.draw_lots();
        let (chain, me) = (self.chain.clone(), self.keys.id());
        let mut wanted = Vec::new();
        for ((_, round), lots) in &self.lots {
            let Some(auditable) = chain.auditable(*round) else {
                continue;
            };
            // Of what is before everyone, everyone is asked.
            let before_all = |member: &PeerId| {
                let about = |open: &audit::Accusation| (open.round, open.member) == (*round, *member);
                chain.agreed.accusations.iter().any(about)
            };
            let open = lots
                .iter()
                .filter(|(member, _)| !auditable.has_answer(*member, me) && !before_all(member));
            let orders =
                open.map(|(member, lot)| self.audit_order((*round, *member, 0, me), lot.output, Some(lot), None));
            wanted.extend(orders.flatten());
        }
        let votes = chain.agreed.weights.binary_search_by_key(&me, |(id, _)| *id).is_ok();
        for open in chain.agreed.accusations.iter().filter(|open| votes && open.asks(&me)) {
            // Whom nobody but auditors may ask yet.
            if open.finding == Finding::Untold
                && chain.agreed.round <= audit::asked_until(&self.config.verification, open.round)
            {
                continue;
            }
            wanted.extend(self.audit_order((open.round, open.member, 1, me), open.lot, None, Some(open.accused())));
        }
        let keys: BTreeSet<audit::Key> = wanted.iter().map(|(key, _)| *key).collect();
        self.auditing.retain(|key| keys.contains(key));
        for (key, order) in wanted {
            if self.auditing.insert(key) {
                self.out.push(Effect::Audit(order));
            }
        }
    }

    /// A member's round to be replayed, as far back as this peer remembers what led to it.
    fn audit_order(
        &self,
        key: audit::Key,
        leaf_seed: [u8; 32],
        lot: Option<&Lot>,
        accusation: Option<event::Accused>,
    ) -> Option<(audit::Key, event::AuditOrder)> {
        let (round, member, draw, _) = key;
        let (before, decided) = self.history.get(&round)?;
        let found = decided.record.contributions.iter().find(|one| one.member == member);
        let order = event::AuditOrder {
            work: train_order(before, &self.config, &member, 0),
            contribution: found?.clone(),
            draw,
            leaf_seed,
            lot: lot.cloned(),
            accusation,
        };
        Some((key, order))
    }

    /// R24: this peer's lots for each round that can still be audited, drawn once.
    fn draw_lots(&mut self) {
        let (chain, branch, me) = (self.chain.clone(), self.chain.agreed.branch, self.keys.id());
        self.lots
            .retain(|(of, round), _| *of == branch && chain.auditable(*round).is_some());
        for auditable in &chain.agreed.auditable {
            let round = auditable.round;
            let known = self.lots.contains_key(&(branch, round));
            let Some((_, decided)) = self.history.get(&round).filter(|_| !known) else {
                continue;
            };
            let mut lots = Vec::new();
            let here = chain.member(&me).is_some_and(|member| member.joined <= round);
            for one in decided
                .record
                .contributions
                .iter()
                .filter(|_| here && auditable.weighs(&me))
            {
                let drawn = |lot| auditable.draws(&self.config.verification, &me, &one.member, lot);
                let lot = self.vrf.lot(&auditable.seed, round, &one.member, drawn);
                lots.extend(lot.map(|lot| (one.member, lot)));
            }
            self.lots.insert((branch, round), lots);
        }
    }
}

/// Seconds of the configuration in the core's ticks.
pub fn micros(secs: f64) -> Micros {
    // Configured seconds are finite, positive and at most a few days (`RunConfig::validate`).
    (secs * SECOND as f64).round() as Micros
}
