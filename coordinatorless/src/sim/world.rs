//! The world of a simulated run: one queue of things to come, one random source, a disk for each peer.

mod faults;
mod liars;
mod watch;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;

use self::faults::Plight;
use self::liars::Gang;
use self::watch::Watch;
use super::check::{Checker, Invariant, Violation};
use super::scenario::Scenario;
use crate::config::RunConfig;
use crate::net::FRAME_HEADER;
use crate::protocol::chain::{ChainState, Steps};
use crate::protocol::event::{AuditOrder, Effect, Event, Notice, Timer, TrainOrder, Trained};
use crate::protocol::planted::{Bug, planted};
use crate::protocol::{SECOND, Setup, State};
use crate::types::*;
use crate::wire::{Keys, Signed};

/// Bytes of a simulated contribution.
const BLOB_BYTES: u64 = 50_000;
/// Promises broken after which nothing more is to be learnt.
const ENOUGH: usize = 8;
/// Records handed out in one answer.
const RECORDS_PER_ANSWER: usize = 64;

/// What survives a crash.
#[derive(Default)]
struct Disk {
    wal: Vec<Vec<u8>>,
    /// The log was lost, and nothing has been written to a new one.
    wal_lost: bool,
    records: BTreeMap<Round, Arc<Decided>>,
    states: BTreeMap<Round, Arc<ChainState>>,
    models: BTreeMap<Round, Hash>,
    blobs: BTreeSet<Hash>,
}

struct Peer {
    keys: Keys,
    disk: Disk,
    /// `None` while it is down.
    state: Option<State>,
    /// Counts starts, so that what was meant for an earlier life is dropped.
    life: u32,
    timers: BTreeMap<Timer, u64>,
    training: Option<(Round, Micros, u32)>,
    /// Records decided whose contributions are still being fetched, oldest first.
    applying: Vec<Arc<Decided>>,
    fetching: BTreeSet<Hash>,
    joiner: bool,
    plight: Plight,
    /// When it was last started.
    since: Micros,
}

/// Something to come.
enum Item {
    Deliver {
        to: usize,
        life: u32,
        from: PeerId,
        message: Arc<Signed>,
    },
    Timer {
        peer: usize,
        life: u32,
        timer: Timer,
        generation: u64,
    },
    TrainingDone {
        peer: usize,
        life: u32,
        order: Box<TrainOrder>,
    },
    Fetched {
        peer: usize,
        life: u32,
        blob: Hash,
        from: usize,
    },
    AskRecords {
        peer: usize,
        asker: usize,
        from: Round,
    },
    Event {
        peer: usize,
        life: u32,
        event: Box<Event>,
    },
    Fault(usize),
    /// The power comes back.
    Wake(usize),
    /// Who takes whom for dead is looked at.
    Look,
    Exit {
        peer: usize,
        life: u32,
    },
}

pub(super) struct World {
    scenario: Scenario,
    config: Arc<RunConfig>,
    genesis: ChainState,
    steps: Arc<Steps>,
    rng: ChaCha12Rng,
    now: Micros,
    order: u64,
    queue: BinaryHeap<Reverse<(Micros, u64, usize)>>,
    items: Vec<Option<Item>>,
    /// Places in `items` that are free.
    spare: Vec<usize>,
    peers: Vec<Peer>,
    index: BTreeMap<PeerId, usize>,
    /// Side of the partition each peer is on.
    side: Vec<usize>,
    checker: Checker,
    digest: blake3::Hasher,
    agreements: Vec<Micros>,
    faults_left: usize,
    /// Peers without power that will have it again.
    waking: usize,
    gang: Gang,
    /// Frames of liars that the codec refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// What honest peers noticed, counted, where anybody lies.
    pub noticed: BTreeMap<String, u64>,
    /// Peers that the record chain slashed.
    pub slashed: BTreeSet<usize>,
    pub watch: Watch,
    pub messages: u64,
    /// Of each kind.
    pub kinds: BTreeMap<&'static str, u64>,
    pub bytes: u64,
}

impl World {
    pub fn new(scenario: &Scenario) -> Self {
        let scenario = &scenario.spelled_out();
        let config = Arc::new(scenario.config());
        let genesis: BTreeSet<PeerId> = config.genesis.iter().map(|member| member.id).collect();
        let peers: Vec<Peer> = (0..scenario.peers)
            .map(|peer| {
                let keys = scenario.keys(peer);
                let joiner = !genesis.contains(&keys.id());
                let (life, timers) = (0, BTreeMap::new());
                let (applying, fetching) = (Vec::new(), BTreeSet::new());
                Peer {
                    keys,
                    disk: Disk::default(),
                    state: None,
                    life,
                    timers,
                    training: None,
                    applying,
                    fetching,
                    joiner,
                    plight: Plight::default(),
                    since: 0,
                }
            })
            .collect();
        let index = peers
            .iter()
            .enumerate()
            .map(|(at, peer)| (peer.keys.id(), at))
            .collect();
        let mut world = Self {
            genesis: ChainState::genesis(&config),
            config,
            steps: Arc::default(),
            rng: ChaCha12Rng::seed_from_u64(scenario.seed),
            now: 1,
            order: 0,
            queue: BinaryHeap::new(),
            items: Vec::new(),
            spare: Vec::new(),
            side: vec![0; scenario.peers],
            index,
            peers,
            checker: Checker::default(),
            gang: Gang::new(scenario),
            refused: BTreeMap::new(),
            noticed: BTreeMap::new(),
            slashed: BTreeSet::new(),
            digest: blake3::Hasher::new(),
            agreements: Vec::new(),
            faults_left: 0,
            waking: 0,
            watch: Watch::default(),
            messages: 0,
            kinds: BTreeMap::new(),
            bytes: 0,
            scenario: scenario.clone(),
        };
        world.faults_left = world.scenario.faults.len();
        world.checker.liars = world.gang.peers().collect();
        let times: Vec<f64> = world.scenario.faults.iter().map(|fault| fault.at_secs).collect();
        for (at, secs) in times.into_iter().enumerate() {
            world.push((secs * 1e6) as Micros + 1, Item::Fault(at));
        }
        let founders: Vec<usize> = (0..scenario.peers).filter(|peer| !world.peers[*peer].joiner).collect();
        founders.into_iter().for_each(|peer| world.start(peer, true));
        if world.scenario.watch {
            world.push(1, Item::Look);
        }
        world
    }

    pub fn now(&self) -> Micros {
        self.now
    }

    pub fn median_agreement(&self) -> Micros {
        let mut all = self.agreements.clone();
        all.sort();
        all.get(all.len() / 2).copied().unwrap_or(0)
    }

    /// Runs until everyone alive has reached the last round and no fault is left, or virtual time is up.
    pub fn run(&mut self) {
        let limit = (self.scenario.limit_secs * 1e6) as Micros;
        while let Some(Reverse((at, _, key))) = self.queue.pop() {
            let Some(item) = self.items.get_mut(key).and_then(Option::take) else {
                continue;
            };
            self.spare.push(key);
            self.now = at;
            if at > limit || self.done() || self.checker.violations.len() >= ENOUGH {
                break;
            }
            self.step(item);
        }
    }

    /// Whether so much of the weight came to lie that nothing was promised any more.
    pub fn is_beyond(&self) -> bool {
        self.checker.beyond
    }

    /// How each promise was kept.
    pub fn invariants(&self) -> Vec<Invariant> {
        self.checker.invariants()
    }

    pub fn finish(&mut self) -> (Hash, Vec<Violation>) {
        let batch = self.config.data.batch_tokens();
        for at in 0..self.peers.len() {
            let peer = &self.peers[at];
            if let Some(state) = &peer.state {
                let round = state.chain().agreed.round;
                self.checker.arrived(at, round, self.scenario.rounds);
                if peer.disk.records.len() as u64 == round.0 {
                    self.checker.data(at, state.chain(), &peer.disk.records, batch);
                }
            }
        }
        (
            Hash(*self.digest.finalize().as_bytes()),
            self.checker.violations.clone(),
        )
    }

    fn done(&self) -> bool {
        let there = |peer: &Peer| {
            peer.state
                .as_ref()
                .is_none_or(|state| state.chain().agreed.round.0 >= self.scenario.rounds)
        };
        let mut honest = self.peers.iter().enumerate().filter(|(at, _)| !self.gang.has(*at));
        self.faults_left == 0 && self.waking == 0 && honest.all(|(_, peer)| there(peer))
    }

    fn push(&mut self, at: Micros, item: Item) {
        self.order += 1;
        let key = self.spare.pop().unwrap_or(self.items.len());
        if key == self.items.len() {
            self.items.push(None);
        }
        self.items[key] = Some(item);
        self.queue.push(Reverse((at, self.order, key)));
    }

    fn step(&mut self, item: Item) {
        if let Some(until) = self.paused(&item) {
            return self.push(until, item);
        }
        match item {
            Item::Deliver {
                to,
                life,
                from,
                message,
            } => {
                let event = Event::Message { from, message };
                self.event(to, life, event);
            }
            Item::Timer {
                peer,
                life,
                timer,
                generation,
            } => {
                if self.peers[peer].timers.get(&timer) == Some(&generation) {
                    self.peers[peer].timers.remove(&timer);
                    self.event(peer, life, Event::Timer(timer));
                }
            }
            Item::TrainingDone { peer, life, order } => self.training_done(peer, life, *order),
            Item::Fetched { peer, life, blob, from } => self.fetched(peer, life, blob, from),
            Item::AskRecords { peer, asker, from } => self.answer_records(peer, asker, from),
            Item::Event { peer, life, event } => self.event(peer, life, *event),
            Item::Fault(at) => self.fault(at),
            Item::Wake(peer) => self.wake(peer),
            Item::Look => self.look(),
            Item::Exit { peer, life } if self.peers[peer].life == life => self.crash(peer),
            Item::Exit { .. } => {}
        }
    }

    fn event(&mut self, peer: usize, life: u32, event: Event) {
        if self.peers[peer].life != life {
            return;
        }
        if self.gang.has(peer) {
            return self.lie(peer, event);
        }
        let now = self.peers[peer].plight.local(self.now);
        let Some(state) = self.peers[peer].state.as_mut() else {
            return;
        };
        let effects = state.handle(now, event);
        self.checker.bounded(peer, state);
        self.carry_out(peer, effects);
    }

    /// Starts a peer from its disk.
    fn start(&mut self, at: usize, wal_whole: bool) {
        let config = self.config.clone();
        let peer = &mut self.peers[at];
        peer.life += 1;
        peer.since = self.now;
        (peer.training, peer.timers) = (None, BTreeMap::new());
        peer.fetching.clear();
        let tip = peer.disk.states.last_key_value().map(|(_, state)| (**state).clone());
        let chain = tip.unwrap_or_else(|| self.genesis.clone());
        let mut history = Vec::new();
        for (round, decided) in &peer.disk.records {
            let before = match round.previous() {
                Round(0) => Some(self.genesis.clone()),
                previous => peer.disk.states.get(&previous).map(|state| (**state).clone()),
            };
            // A branch's first record follows from the regrouped state.
            let before = before.map(|before| match decided.regroup.first() {
                Some((_, statement, _)) => before.regrouped(&config, decided.record.slot.branch, &statement.survivors),
                None => before,
            });
            history.extend(before.map(|before| (before, decided.clone())));
        }
        let join = Some(String::new());
        let setup = Setup {
            config,
            keys: peer.keys.clone(),
            chain: chain.clone(),
            history,
            wal: wal_whole.then(|| peer.disk.wal.clone()),
            join,
            sequence: self.now,
            last_round: None,
            steps: Some(self.steps.clone()),
        };
        let mut state = State::new(setup);
        let effects = state.start(peer.plight.local(self.now));
        peer.state = Some(state);
        peer.applying = peer
            .disk
            .records
            .range(chain.agreed.round.next()..)
            .map(|(_, one)| one.clone())
            .collect();
        let (branch, round) = (chain.agreed.branch, chain.agreed.round);
        let life = peer.life;
        self.carry_out(at, effects);
        let model_root = self.model(at, round);
        self.event(
            at,
            life,
            Event::Applied {
                branch,
                round,
                model_root,
            },
        );
    }

    /// The simulated model after a round: a hash of all that was applied, in order.
    fn model(&mut self, peer: usize, round: Round) -> Hash {
        let disk = &mut self.peers[peer].disk;
        if round == Round(0) {
            return Hash::of(b"genesis model");
        }
        if let Some(root) = disk.models.get(&round) {
            return *root;
        }
        let mut root = Hash::of(b"genesis model");
        for (at, decided) in disk.records.range(..=round) {
            root = *disk
                .models
                .entry(*at)
                .or_insert_with(|| after(root, &decided.record, peer));
        }
        root
    }

    fn carry_out(&mut self, peer: usize, effects: Vec<Effect>) {
        self.peers[peer].plight.lag = 0;
        for effect in effects {
            if matches!(effect, Effect::Persist(_)) && self.loses_power(peer) {
                return;
            }
            self.effect(peer, effect);
        }
    }

    fn effect(&mut self, at: usize, effect: Effect) {
        let life = self.peers[at].life;
        match effect {
            Effect::Persist(entry) => {
                let peer = &mut self.peers[at];
                peer.disk.wal.push(entry);
                peer.disk.wal_lost = false;
                peer.plight.lag += peer.plight.disk;
            }
            Effect::ClearWal => {
                self.peers[at].disk.wal.clear();
                self.peers[at].disk.wal_lost = false;
                self.checker.log_cleared(at);
            }
            Effect::Store { decided, state } => {
                let round = decided.record.slot.round;
                self.weigh_holders(at, &decided);
                self.weigh_liars(at, &state.voters());
                self.checker.decided(at, &decided);
                let (slot, view) = (decided.record.slot, decided.certificate.slot.view);
                let (counted, changes) = (decided.record.contributions.len(), decided.record.changes.len());
                tracing::debug!(secs = self.now as f64 / 1e6, peer = at, branch = slot.branch, round = %slot.round, view, counted, changes, "decided");
                let line = [
                    &(at as u64).to_le_bytes()[..],
                    &self.now.to_le_bytes(),
                    &decided.record.hash().0,
                ]
                .concat();
                self.digest.update(&line);
                let disk = &mut self.peers[at].disk;
                disk.records.insert(round, decided);
                disk.states.insert(round, state);
            }
            Effect::Broadcast(message) => {
                self.leaves(at, &message);
                let message = Arc::new(message);
                let size = self.link_bytes(at, &message);
                let members: Vec<usize> = self.audience(at);
                members
                    .into_iter()
                    .for_each(|to| self.send(at, to, message.clone(), size));
            }
            Effect::Multicast { to, message } => {
                self.leaves(at, &message);
                let message = Arc::new(message);
                let size = self.link_bytes(at, &message);
                for to in to
                    .iter()
                    .filter_map(|id| self.index.get(id).copied())
                    .collect::<Vec<_>>()
                {
                    self.send(at, to, message.clone(), size);
                }
            }
            Effect::Send(to, message) => {
                self.leaves(at, &message);
                let size = self.link_bytes(at, &message);
                if let Some(to) = self.index.get(&to).copied() {
                    self.send(at, to, Arc::new(message), size);
                }
            }
            Effect::SetTimer(timer, when) => {
                self.order += 1;
                let generation = self.order;
                self.peers[at].timers.insert(timer, generation);
                let when = self.peers[at].plight.global(when).max(self.now + 1);
                self.push(
                    when,
                    Item::Timer {
                        peer: at,
                        life,
                        timer,
                        generation,
                    },
                );
            }
            Effect::CancelTimer(timer) => drop(self.peers[at].timers.remove(&timer)),
            Effect::Train(order) => self.train(at, order),
            Effect::StopTraining(round) => {
                if self.peers[at]
                    .training
                    .is_some_and(|(training, _, _)| training <= round)
                {
                    self.peers[at].training = None;
                }
            }
            Effect::Fetch { commit, providers, .. } => self.fetch(at, &commit, &providers),
            Effect::Apply(decided) => {
                self.peers[at].applying.push(decided);
                self.apply(at);
            }
            Effect::Rollback { round, .. } => self.rollback(at, round),
            Effect::Resync { round, model_root, .. } => {
                self.checker.warned(at, round, &format!("resync to {model_root}"));
            }
            Effect::Audit(order) => self.audit(at, order),
            Effect::AskRecords { peer, from } => {
                if let Some(peer) = self.index.get(&peer).copied()
                    && let Some(delay) = self.delay(at, peer)
                {
                    self.push(self.now + delay, Item::AskRecords { peer, asker: at, from });
                }
            }
            Effect::Members(_) => {}
            Effect::Notice(notice) => self.notice(at, notice),
        }
    }

    /// Everyone a broadcast goes to: members as the sender knows them; a newcomer reaches those it knows.
    fn audience(&self, at: usize) -> Vec<usize> {
        let Some(state) = &self.peers[at].state else {
            return Vec::new();
        };
        let members = state.chain().active().filter_map(|id| self.index.get(&id).copied());
        // Newcomers on the way in listen too, as they do over gossip.
        let newcomers = self
            .peers
            .iter()
            .enumerate()
            .filter(|(_, peer)| peer.joiner && peer.state.is_some())
            .map(|(i, _)| i);
        members
            .chain(newcomers)
            .filter(|to| *to != at)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// What a message takes on a real link.
    fn link_bytes(&self, at: usize, message: &Signed) -> u64 {
        let frame = message.to_link(self.peers[at].keys.id(), self.genesis.agreed.run);
        (FRAME_HEADER + frame.len()) as u64
    }

    fn send(&mut self, at: usize, to: usize, message: Arc<Signed>, size: u64) {
        self.messages += 1;
        *self.kinds.entry(message.body.name()).or_default() += 1;
        self.bytes += size;
        if self.gang.has(at) {
            let frame = message.to_link(self.peers[at].keys.id(), self.genesis.agreed.run);
            return self.send_frame(at, to, &frame);
        }
        let copies = 1 + u32::from(self.rng.random_bool(self.scenario.link.duplicate));
        for _ in 0..copies {
            if let Some(delay) = self.delay(at, to) {
                let (life, from) = (self.peers[to].life, self.peers[at].keys.id());
                self.push(
                    self.now + delay,
                    Item::Deliver {
                        to,
                        life,
                        from,
                        message: message.clone(),
                    },
                );
            }
        }
    }

    /// How long a message takes, if it arrives.
    fn delay(&mut self, from: usize, to: usize) -> Option<Micros> {
        let link = &self.scenario.link;
        let lost = self.rng.random_bool(link.loss);
        let jitter = self.rng.random_range(0.0..=link.jitter_ms.max(f64::MIN_POSITIVE));
        let share = ((from * 31 + to * 17) % 97) as f64 / 96.0;
        let delay = ((link.latency_ms + jitter + link.asymmetry_ms * share) * 1000.0) as Micros;
        let plight = &self.peers[from].plight;
        let cut = plight.mute || self.side[from] != self.side[to];
        (!lost && !cut && self.peers[to].state.is_some()).then_some(delay.max(1) + plight.lag)
    }

    fn train(&mut self, at: usize, order: TrainOrder) {
        let quota: u64 = order.batches.iter().map(|range| range.len).sum();
        let speed = self.scenario.speeds.get(at).copied().unwrap_or(1.0);
        let batch = (self.scenario.batch_secs / speed * 1e6) as Micros;
        let time = self.peers[at].plight.global(order.until).saturating_sub(self.now);
        let done = quota.min(time / batch.max(1));
        let life = self.peers[at].life;
        self.peers[at].training = Some((order.round, done, order.branch));
        self.push(
            self.now + done * batch.max(1) + 1,
            Item::TrainingDone {
                peer: at,
                life,
                order: Box::new(order),
            },
        );
    }

    fn training_done(&mut self, at: usize, life: u32, order: TrainOrder) {
        let peer = &mut self.peers[at];
        let running = peer
            .training
            .is_some_and(|(round, _, branch)| (round, branch) == (order.round, order.branch));
        if peer.life != life || !running {
            return;
        }
        let Some((_, done, _)) = peer.training.take().filter(|(_, done, _)| *done > 0) else {
            return;
        };
        let mut seed = order.parent.0.to_vec();
        seed.extend(peer.keys.id().0);
        seed.extend(order.branch.to_le_bytes());
        let shard = Hash::of(&seed);
        let blob = Hash::of(&shard.0);
        peer.disk.blobs.insert(blob);
        let trained = Trained {
            branch: order.branch,
            round: order.round,
            shards: vec![shard],
            len: BLOB_BYTES,
            tokens: done * self.config.data.batch_tokens(),
            loss_micros: 2_000_000,
            trace_root: Hash::default(),
            accumulator_before: order.accumulator,
            accumulator_after: Hash::of(&blob.0),
        };
        self.event(at, life, Event::Trained(trained));
    }

    fn fetch(&mut self, at: usize, commit: &Commit, providers: &[PeerId]) {
        if self.peers[at].disk.blobs.contains(&commit.blob) {
            let (life, event) = (self.peers[at].life, Box::new(Event::BlobHeld { blob: commit.blob }));
            return self.push(self.now + 1, Item::Event { peer: at, life, event });
        }
        if !self.peers[at].fetching.insert(commit.blob) {
            return;
        }
        let mut known = providers.iter().filter_map(|id| self.index.get(id).copied());
        let holder = known.find(|holder| {
            self.peers[*holder].state.is_some()
                && self.side[*holder] == self.side[at]
                && self.peers[*holder].disk.blobs.contains(&commit.blob)
                && self.gang.serves(*holder, &commit.blob, &self.peers[at].keys.id())
        });
        let transfer = (commit.len as f64 / self.scenario.link.bandwidth * 1e6) as Micros;
        let life = self.peers[at].life;
        // QUIC repairs loss by itself; it costs time.
        let slow = 1.0 + 4.0 * self.scenario.link.loss;
        let delay = ((2.0 * self.scenario.link.latency_ms * 1000.0 + transfer as f64) * slow) as Micros;
        let from = holder.unwrap_or(usize::MAX);
        self.push(
            self.now + delay + 1,
            Item::Fetched {
                peer: at,
                life,
                blob: commit.blob,
                from,
            },
        );
    }

    /// Whether this peer is up, reachable from `at`, and has the blob.
    fn holds(&self, id: &PeerId, blob: &Hash, at: usize) -> bool {
        self.index.get(id).is_some_and(|holder| {
            let peer = &self.peers[*holder];
            peer.state.is_some() && self.side[*holder] == self.side[at] && peer.disk.blobs.contains(blob)
        })
    }

    fn fetched(&mut self, at: usize, life: u32, blob: Hash, from: usize) {
        if self.peers[at].life != life {
            return;
        }
        self.peers[at].fetching.remove(&blob);
        let came =
            self.peers.get(from).is_some_and(|holder| holder.state.is_some()) && self.side[from] == self.side[at];
        if came && self.gang.garbage(&blob) {
            let reason = "does not decode".to_owned();
            self.event(at, life, Event::BlobBad { blob, reason });
        } else if came {
            self.peers[at].disk.blobs.insert(blob);
            self.event(at, life, Event::BlobHeld { blob });
        }
        if self.peers[at].fetching.is_empty() {
            self.apply(at);
        }
    }

    /// Applies decided records in order, as far as their blobs are here; fetches what is missing from anyone who has it.
    fn apply(&mut self, at: usize) {
        while let Some(decided) = self.peers[at].applying.first().cloned() {
            let missing: Vec<(PeerId, Commit)> = decided
                .record
                .contributions
                .iter()
                .filter(|one| !self.peers[at].disk.blobs.contains(&one.commit.blob))
                .map(|one| (one.member, one.commit.clone()))
                .collect();
            if !missing.is_empty() {
                for (author, commit) in &missing {
                    let others = self.peers.iter().map(|peer| peer.keys.id());
                    let holders: Vec<PeerId> = match self.holds(author, &commit.blob, at) {
                        true => vec![*author],
                        false => others.collect(),
                    };
                    self.fetch(at, commit, &holders);
                }
                return;
            }
            self.peers[at].applying.remove(0);
            let (slot, record) = (decided.record.slot, decided.record.hash());
            let model_root = self.model(at, slot.round);
            self.checker.applied(at, slot.round, record, model_root);
            let (branch, round, life) = (slot.branch, slot.round, self.peers[at].life);
            let event = Box::new(Event::Applied {
                branch,
                round,
                model_root,
            });
            self.push(self.now + 1000, Item::Event { peer: at, life, event });
        }
    }

    fn rollback(&mut self, at: usize, round: Round) {
        let disk = &mut self.peers[at].disk;
        disk.records.split_off(&round.next());
        disk.states.split_off(&round.next());
        disk.models.split_off(&round.next());
        self.peers[at].applying.clear();
    }

    fn audit(&mut self, at: usize, order: AuditOrder) {
        let slot = order.contribution.commit.slot;
        let member = order.contribution.member;
        let finding = Finding::Agrees;
        let verdict = Verdict {
            slot,
            member,
            draw: order.draw,
            finding,
            distance_nanos: 0,
            bound_nanos: 20_000_000,
        };
        let (life, event) = (self.peers[at].life, Box::new(Event::Audited(verdict)));
        self.push(self.now + SECOND / 2, Item::Event { peer: at, life, event });
    }

    fn answer_records(&mut self, at: usize, asker: usize, from: Round) {
        let peer = &self.peers[at];
        if peer.state.is_none() {
            return;
        }
        let records: Vec<Arc<Decided>> = peer
            .disk
            .records
            .range(from..)
            .take(RECORDS_PER_ANSWER)
            .map(|(_, one)| one.clone())
            .collect();
        let id = peer.keys.id();
        let records = self.lie_of_records(at, records);
        if let Some(delay) = self.delay(at, asker).filter(|_| !records.is_empty()) {
            let life = self.peers[asker].life;
            let event = Box::new(Event::Records { from: id, records });
            self.push(
                self.now + delay,
                Item::Event {
                    peer: asker,
                    life,
                    event,
                },
            );
        }
    }

    fn notice(&mut self, at: usize, notice: Notice) {
        self.count_notice(at, &notice);
        tracing::debug!(secs = self.now as f64 / 1e6, peer = at, ?notice, "notices");
        match notice {
            Notice::Advanced {
                agree,
                round,
                model_root,
                ..
            } => {
                self.agreements.push(agree);
                self.digest
                    .update(&[&round.0.to_le_bytes()[..], &model_root.0].concat());
            }
            Notice::Slashed { member, round, .. } => match self.index.get(&member) {
                Some(liar) if self.gang.has(*liar) => drop(self.slashed.insert(*liar)),
                _ => self.checker.slashed(at, round, member),
            },
            Notice::Warning(warning) => {
                let round = self.peers[at]
                    .state
                    .as_ref()
                    .map_or(Round(0), |state| state.chain().agreed.round);
                self.checker.warned(at, round, &warning);
            }
            _ => {}
        }
    }

    fn crash(&mut self, peer: usize) {
        if self.peers[peer].state.take().is_some() {
            self.watch.crashed(peer, self.now);
        }
        self.peers[peer].life += 1;
    }

    fn restart(&mut self, peer: usize, wal: bool) {
        if self.peers[peer].state.is_none() {
            if !wal {
                self.peers[peer].disk.wal.clear();
                self.peers[peer].disk.wal_lost = true;
                self.checker.log_cleared(peer);
            }
            self.start(peer, !self.peers[peer].disk.wal_lost);
        }
    }
}

/// The stand-in for the integer sum: what was counted, in the record's order, whoever computes it.
fn after(root: Hash, record: &Record, peer: usize) -> Hash {
    let mut counted: Vec<&Contribution> = record.contributions.iter().collect();
    if planted(Bug::SumInArrivalOrder) && !counted.is_empty() {
        // Each peer has its own order of arrival.
        let first = peer % counted.len();
        counted.rotate_left(first);
    }
    let mut bytes = root.0.to_vec();
    for one in counted {
        bytes.extend(one.commit.blob.0);
        bytes.extend(one.commit.tokens.to_le_bytes());
    }
    Hash::of(&bytes)
}
