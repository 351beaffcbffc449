//! A bench for a few real state machines with logs that a crash may tear in the middle of a write: finer than the simulator's
//! world, which crashes peers between two events only. It remembers everything that was ever signed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::super::Scenario;
use crate::config::RunConfig;
use crate::protocol::chain::ChainState;
use crate::protocol::event::{Effect, Encode, Event, Notice, Timer, TrainOrder, Trained};
use crate::protocol::replayed;
use crate::protocol::sync::{branch_base, verify_next};
use crate::protocol::{SECOND, Setup, State};
use crate::types::*;
use crate::wire::{Body, Keys, Signed};

pub struct Peer {
    pub keys: Keys,
    pub state: Option<State>,
    pub wal: Vec<Vec<u8>>,
    pub records: Vec<Arc<Decided>>,
    pub notices: Vec<Notice>,
    timers: BTreeMap<Timer, Micros>,
    blobs: BTreeSet<Hash>,
    /// What it was ordered to train, in this life.
    pub trained: Vec<TrainOrder>,
    /// Rounds whose training was stopped.
    pub stopped: Vec<Round>,
    life: u32,
    /// The last entry of the log is half written.
    torn: bool,
    /// Crashes in the middle of writing this many entries from now.
    tear: Option<usize>,
}

enum Item {
    Message(usize, u32, PeerId, Arc<Signed>),
    Event(usize, u32, Box<Event>),
    Timer(usize, u32, Timer),
}

pub struct Bench {
    pub scenario: Scenario,
    pub config: Arc<RunConfig>,
    pub now: Micros,
    pub peers: Vec<Peer>,
    /// Messages between these pass, in both directions; everyone in one set by default.
    pub groups: Vec<BTreeSet<usize>>,
    /// A peer whose model of one round comes out wrong, until it is told to get the agreed one.
    pub astray: Option<(usize, Round)>,
    /// Messages that are lost on the way from one to another, whatever the groups.
    pub lost: fn(usize, usize, &Signed) -> bool,
    rng: ChaCha12Rng,
    order: u64,
    queue: BTreeMap<(Micros, u64), Item>,
    said: BTreeMap<(PeerId, Slot, u8, u32), Hash>,
    /// What was decided first.
    pub decided: BTreeMap<(Branch, Round), Hash>,
    /// Statements ever sent.
    pub statements: BTreeSet<(PeerId, Slot, u32)>,
}

impl Bench {
    pub fn new(scenario: Scenario) -> Self {
        let config = Arc::new(scenario.config());
        let peer = |index| Peer {
            keys: scenario.keys(index),
            state: None,
            wal: Vec::new(),
            records: Vec::new(),
            notices: Vec::new(),
            timers: BTreeMap::new(),
            blobs: BTreeSet::new(),
            trained: Vec::new(),
            stopped: Vec::new(),
            life: 0,
            torn: false,
            tear: None,
        };
        let mut bench = Self {
            config,
            now: 1,
            peers: (0..scenario.peers).map(peer).collect(),
            groups: vec![(0..scenario.peers).collect()],
            astray: None,
            lost: |_, _, _| false,
            rng: ChaCha12Rng::seed_from_u64(scenario.seed),
            order: 0,
            queue: BTreeMap::new(),
            said: BTreeMap::new(),
            decided: BTreeMap::new(),
            statements: BTreeSet::new(),
            scenario,
        };
        (0..bench.peers.len()).for_each(|peer| bench.start(peer, true));
        bench
    }

    /// Starts a peer from its disk, as the node does.
    pub fn start(&mut self, at: usize, with_log: bool) {
        let (scheme, config) = (self.scenario.scheme(), self.config.clone());
        let (mut chain, mut history) = (ChainState::genesis(&config), Vec::new());
        for decided in &self.peers[at].records {
            let base = branch_base(&chain, &config, decided, scheme).unwrap();
            chain = verify_next(&chain, &config, decided, scheme).unwrap().0;
            history.push((base, decided.clone()));
        }
        if !with_log {
            self.peers[at].wal.clear();
        }
        let (branch, round, base) = (chain.agreed.branch, chain.agreed.round, chain.base());
        let peer = &mut self.peers[at];
        // The store cuts a torn tail off.
        if std::mem::take(&mut peer.torn) {
            peer.wal.pop();
        }
        peer.life += 1;
        peer.trained.clear();
        peer.timers.clear();
        let mut state = State::new(Setup {
            config,
            keys: peer.keys.clone(),
            chain,
            history,
            wal: with_log.then(|| peer.wal.clone()),
            join: Some(String::new()),
            sequence: self.now,
            last_round: None,
            steps: None,
        });
        let effects = state.start(self.now);
        peer.state = Some(state);
        self.carry_out(at, effects);
        for round in BTreeSet::from([base, round]) {
            let model_root = self.model(at, round);
            self.event(
                at,
                Event::Applied {
                    branch,
                    round,
                    model_root,
                },
            );
        }
    }

    pub fn crash(&mut self, at: usize) {
        self.peers[at].state = None;
        self.peers[at].life += 1;
        self.peers[at].tear = None;
    }

    /// The peer crashes while it writes the `nth` entry of its log from now on: half of it stays, and nothing after it is done.
    pub fn tear(&mut self, at: usize, nth: usize) {
        self.peers[at].tear = Some(nth);
    }

    pub fn round(&self, at: usize) -> Round {
        self.peers[at]
            .records
            .last()
            .map_or(Round(0), |decided| decided.record.slot.round)
    }

    pub fn branch(&self, at: usize) -> Branch {
        self.peers[at]
            .state
            .as_ref()
            .map_or(0, |state| state.chain().agreed.branch)
    }

    /// What a peer was ordered to train for a round, in this life.
    pub fn trained_of(&self, at: usize, round: Round) -> Vec<TrainOrder> {
        let orders = self.peers[at].trained.iter();
        orders.filter(|order| order.round == round).cloned().collect()
    }

    /// Where everyone is, and what each was told last: for a failing test.
    pub fn tell(&self) -> String {
        let peers = self.peers.iter().enumerate().map(|(at, peer)| {
            let (branch, round) = (self.branch(at), self.round(at));
            let quiet = |notice: &&Notice| !matches!(notice, Notice::Decided { .. } | Notice::Advanced { .. });
            let notices: Vec<_> = peer.notices.iter().rev().filter(quiet).take(4).collect();
            let alive = peer.state.as_ref().map_or(0, |state| state.alive(self.now).len());
            let logged = peer.wal.len();
            format!("\npeer {at}: branch {branch} round {round}, hears {alive}, logged {logged}, {notices:?}")
        });
        peers.collect()
    }

    /// Runs until it holds, for so many virtual seconds at most; whether it did.
    pub fn until(&mut self, secs: u64, holds: impl Fn(&Self) -> bool) -> bool {
        let limit = self.now + secs * SECOND;
        while !holds(self) {
            let Some((&(at, order), _)) = self.queue.first_key_value() else {
                return false;
            };
            if at > limit {
                self.now = limit;
                return false;
            }
            self.now = at;
            match self.queue.remove(&(at, order)).unwrap() {
                Item::Message(to, life, from, message) if self.peers[to].life == life => {
                    self.event(to, Event::Message { from, message });
                }
                Item::Event(to, life, event) if self.peers[to].life == life => self.event(to, *event),
                Item::Timer(to, life, timer)
                    if self.peers[to].life == life && self.peers[to].timers.get(&timer) == Some(&at) =>
                {
                    self.peers[to].timers.remove(&timer);
                    self.event(to, Event::Timer(timer));
                }
                _ => {}
            }
        }
        true
    }

    fn push(&mut self, after: Micros, item: Item) {
        self.order += 1;
        self.queue.insert((self.now + after, self.order), item);
    }

    pub fn event(&mut self, at: usize, event: Event) {
        let now = self.now;
        if let Some(state) = self.peers[at].state.as_mut() {
            let effects = state.handle(now, event);
            self.carry_out(at, effects);
        }
    }

    fn carry_out(&mut self, at: usize, effects: Vec<Effect>) {
        for effect in effects {
            // A torn write ends it all.
            if self.peers[at].state.is_none() {
                return;
            }
            self.effect(at, effect);
        }
    }

    fn effect(&mut self, at: usize, effect: Effect) {
        let (id, life) = (self.peers[at].keys.id(), self.peers[at].life);
        match effect {
            Effect::Persist(mut entry) => match self.peers[at].tear {
                Some(0) => {
                    entry.truncate(entry.len() / 2);
                    self.peers[at].wal.push(entry);
                    self.peers[at].torn = true;
                    self.crash(at);
                }
                left => {
                    self.peers[at].tear = left.map(|left| left - 1);
                    self.peers[at].wal.push(entry);
                }
            },
            Effect::ClearWal => self.peers[at].wal.clear(),
            Effect::Store { decided, .. } => {
                let slot = decided.record.slot;
                let known = *self
                    .decided
                    .entry((slot.branch, slot.round))
                    .or_insert(decided.record.hash());
                assert_eq!(
                    known,
                    decided.record.hash(),
                    "two records decided on branch {} in round {}",
                    slot.branch,
                    slot.round
                );
                self.peers[at].records.push(decided);
            }
            Effect::Broadcast(message) | Effect::Multicast { message, .. } => {
                (0..self.peers.len()).for_each(|to| self.send(at, to, &message));
            }
            Effect::Send(to, message) => {
                let to = self.peers.iter().position(|peer| peer.keys.id() == to).unwrap();
                self.send(at, to, &message);
            }
            Effect::SetTimer(timer, when) => {
                let when = when.max(self.now + 1);
                self.peers[at].timers.insert(timer, when);
                self.push(when - self.now, Item::Timer(at, life, timer));
            }
            Effect::CancelTimer(timer) => drop(self.peers[at].timers.remove(&timer)),
            Effect::Train(order) => {
                let ended = Event::TrainingEnded {
                    branch: order.branch,
                    round: order.round,
                    fruitful: true,
                };
                self.peers[at].trained.push(order);
                self.push(SECOND / 2, Item::Event(at, life, Box::new(ended)));
            }
            Effect::Encode(encode) => {
                assert!(self.peers[at].trained.contains(&encode.work));
                let trained = trained(&self.config, id, &encode);
                self.peers[at].blobs.insert(Hash::of(&trained.shards[0].0));
                self.push(1000, Item::Event(at, life, Box::new(Event::Trained(trained))));
            }
            Effect::Fetch { commit, .. } => {
                let near = self
                    .groups
                    .iter()
                    .find(|group| group.contains(&at))
                    .cloned()
                    .unwrap_or_default();
                let there = |peer: &usize| self.peers[*peer].blobs.contains(&commit.blob);
                let up = |peer: &usize| *peer == at || self.peers[*peer].state.is_some();
                if near.iter().any(|peer| up(peer) && there(peer)) || there(&at) {
                    self.peers[at].blobs.insert(commit.blob);
                    self.push(
                        20_000,
                        Item::Event(at, life, Box::new(Event::BlobHeld { blob: commit.blob })),
                    );
                }
            }
            Effect::Apply(decided) => {
                let (branch, round) = (decided.record.slot.branch, decided.record.slot.round);
                let model_root = match self.astray {
                    Some(astray) if astray == (at, round) => Hash::of(b"another model"),
                    _ => self.model(at, round),
                };
                let event = Event::Applied {
                    branch,
                    round,
                    model_root,
                };
                self.push(1000, Item::Event(at, life, Box::new(event)));
            }
            Effect::Rollback { branch, round } => {
                self.peers[at]
                    .records
                    .retain(|decided| decided.record.slot.round <= round);
                let model_root = self.model(at, round);
                let event = Event::Applied {
                    branch,
                    round,
                    model_root,
                };
                self.push(1000, Item::Event(at, life, Box::new(event)));
            }
            Effect::AskRecords { peer, from } => {
                let of = self.peers.iter().position(|other| other.keys.id() == peer).unwrap();
                let records: Vec<_> = self.peers[of]
                    .records
                    .iter()
                    .filter(|decided| decided.record.slot.round >= from)
                    .cloned()
                    .collect();
                if self.linked(at, of) && self.peers[of].state.is_some() && !records.is_empty() {
                    let event = Event::Records { from: peer, records };
                    self.push(80_000, Item::Event(at, life, Box::new(event)));
                }
            }
            Effect::Audit(order) => {
                let (slot, member, me) = (order.contribution.commit.slot, order.contribution.member, id);
                let (salt, trace) = ([0; 32], one_step());
                let commitment = replayed::commitment(&slot, &member, &me, &trace, &salt);
                let of = self.peers.iter().find(|other| other.keys.id() == member);
                let replayed = of.filter(|_| order.draw == 0).map(|of| Replayed {
                    salt,
                    answer: replayed::signed(&of.keys, &slot, &me, &commitment, &trace.root()),
                    claimed: trace.clone(),
                    trace,
                });
                let verdict = Verdict {
                    replayed,
                    slot: order.contribution.commit.slot,
                    member: order.contribution.member,
                    draw: order.draw,
                    lot: order.lot,
                    finding: Finding::Agrees,
                    distance_nanos: 0,
                    bound_nanos: 1,
                };
                self.push(SECOND / 4, Item::Event(at, life, Box::new(Event::Audited(verdict))));
            }
            Effect::Notice(notice) => {
                let astray = self.astray.is_some_and(|(astray, _)| astray == at);
                assert!(!matches!(notice, Notice::Warning(_)) || astray, "peer {at}: {notice:?}");
                self.peers[at].notices.push(notice);
            }
            Effect::Resync { round, model_root, .. } => {
                let event = Event::Resynced { round, model_root };
                self.push(SECOND / 10, Item::Event(at, life, Box::new(event)));
            }
            Effect::StopTraining(round) => self.peers[at].stopped.push(round),
            Effect::Speed(_) | Effect::OpenSpeed(_) | Effect::CheckSpeed(_) | Effect::Members(_) => {}
        }
    }

    fn linked(&self, one: usize, other: usize) -> bool {
        self.groups
            .iter()
            .any(|group| group.contains(&one) && group.contains(&other))
    }

    fn send(&mut self, at: usize, to: usize, message: &Signed) {
        if to == at {
            return;
        }
        self.note(message);
        let jitter = self.rng.random_range(0..20_000u64);
        let (from, life) = (self.peers[at].keys.id(), self.peers[to].life);
        if self.linked(at, to) && self.peers[to].state.is_some() && !(self.lost)(at, to, message) {
            self.push(
                50_000 + jitter,
                Item::Message(to, life, from, Arc::new(message.clone())),
            );
        }
    }

    /// Nobody ever says two things in one place.
    fn note(&mut self, message: &Signed) {
        let slot = message.body.slot();
        let part = match &message.body {
            Body::Proposal(_) => 0,
            Body::Vote(vote) if vote.kind == VoteKind::Prevote => 1,
            Body::Vote(_) => 2,
            Body::Commit(_) => 3,
            Body::Regroup(_) => 4,
            _ => return,
        };
        let attempt = match &message.body {
            Body::Regroup(statement) => statement.attempt,
            _ => 0,
        };
        if part == 4 {
            self.statements.insert((message.signer, slot, attempt));
        }
        let hash = Hash::of(&message.body.payload());
        let known = *self.said.entry((message.signer, slot, part, attempt)).or_insert(hash);
        assert_eq!(
            known,
            hash,
            "{} said two things: {:?}",
            message.signer.short(),
            message.body
        );
    }

    /// The model after a round: a hash of all that was applied.
    fn model(&self, at: usize, round: Round) -> Hash {
        let mut root = Hash::of(b"genesis model");
        for decided in self.peers[at]
            .records
            .iter()
            .filter(|one| one.record.slot.round <= round)
        {
            let mut bytes = root.0.to_vec();
            bytes.extend(decided.record.contributions.iter().flat_map(|one| one.commit.blob.0));
            root = Hash::of(&bytes);
        }
        root
    }
}

fn one_step() -> Trace {
    Trace::of([(1.0, 1.0)])
}

fn trained(config: &RunConfig, id: PeerId, encode: &Encode) -> Trained {
    let order = &encode.work;
    let seed = [
        order.parent.0.to_vec(),
        id.0.to_vec(),
        order.round.0.to_le_bytes().to_vec(),
        encode.branch.to_le_bytes().to_vec(),
    ]
    .concat();
    let shard = Hash::of(&seed);
    let quota: u64 = order.batches.iter().map(|range| range.len).sum();
    Trained {
        branch: encode.branch,
        round: order.round,
        shards: vec![shard],
        len: 1000,
        tokens: quota * config.data.batch_tokens(),
        loss_micros: 1,
        trace_root: one_step().root(),
        accumulator_before: encode.accumulator,
        accumulator_after: Hash::of(&shard.0),
    }
}
