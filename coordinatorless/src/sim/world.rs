//! The world of a simulated run: one queue of things to come, one random source, a disk for each peer.
//!
//! Here are the queue and what stands in it. `life` starts and stops processes, `effects` carries out what a core asks for, `links`
//! carries messages, `transfers` blobs, `work` plays the trainer, `speeds` what proofs of speed take; `faults` is what goes wrong, `doubles` a key in two processes, `liars`
//! who lies, `watch` who is taken for dead.

mod doubles;
mod effects;
mod faults;
mod liars;
mod life;
mod links;
mod speeds;
mod transfers;
mod watch;
mod work;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use self::faults::Plight;
use self::liars::Gang;
use self::watch::Watch;
use self::work::Asking;
use super::check::{Checker, Invariant, Violation};
use super::scenario::Scenario;
use crate::config::RunConfig;
use crate::protocol::State;
use crate::protocol::chain::{ChainState, Steps};
use crate::protocol::clock::Clock;
use crate::protocol::event::{AuditOrder, Event, Timer, TrainOrder};
use crate::protocol::replayed::{Traces, Window};
use crate::protocol::speed::Key;
use crate::types::*;
use crate::wire::{Keys, Signed};

/// Promises broken after which nothing more is to be learnt.
const ENOUGH: usize = 8;

/// What survives a crash.
#[derive(Clone, Default)]
struct Disk {
    wal: Vec<Vec<u8>>,
    /// The log was lost, and nothing has been written to a new one.
    wal_lost: bool,
    records: BTreeMap<Round, Arc<Decided>>,
    states: BTreeMap<Round, Arc<ChainState>>,
    models: BTreeMap<Round, Hash>,
    blobs: BTreeSet<Hash>,
    /// Own traces, and which auditors were answered.
    traces: Traces,
    /// The first number of the last start's `Have` messages.
    sequence: u64,
}

struct Peer {
    keys: Keys,
    disk: Disk,
    /// `None` while it is down.
    state: Option<State>,
    /// Counts starts, so that what was meant for an earlier life is dropped.
    life: u32,
    /// Of each timer, which setting of it counts, and when it is due by the core's time.
    timers: BTreeMap<Timer, (u64, Micros)>,
    /// What the core takes for the time.
    clock: Clock,
    training: Option<TrainOrder>,
    /// What was trained and may still be encoded, with the batches done.
    trained: Vec<(TrainOrder, u64)>,
    /// Records decided whose contributions are still being fetched, oldest first.
    applying: Vec<Arc<Decided>>,
    fetching: BTreeSet<Hash>,
    /// What it computed last for a proof of its speed, and in which life.
    computed: Option<(u32, Round)>,
    /// Openings of proofs of speed that it has, and those that it is looking at.
    openings: BTreeSet<Key>,
    looking: BTreeSet<Key>,
    joiner: bool,
    plight: Plight,
    /// When it was last started.
    since: Micros,
}

impl Peer {
    fn new(keys: Keys, disk: Disk, joiner: bool) -> Self {
        Self {
            keys,
            disk,
            state: None,
            life: 0,
            timers: BTreeMap::new(),
            clock: Clock::default(),
            training: None,
            trained: Vec::new(),
            applying: Vec::new(),
            fetching: BTreeSet::new(),
            computed: None,
            openings: BTreeSet::new(),
            looking: BTreeSet::new(),
            joiner,
            plight: Plight::default(),
            since: 0,
        }
    }
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
        done: u64,
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
    /// An audit of who may have been away so far.
    Audit {
        peer: usize,
        life: u32,
        order: Box<AuditOrder>,
        window: Window,
    },
    /// A replay that agreed, to be shown by the member's answer to it.
    Ask {
        peer: usize,
        life: u32,
        asking: Box<Asking>,
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
    /// Second processes with the key of a first, by the first.
    doubles: BTreeMap<usize, usize>,
    /// Frames of liars that the codec refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// What honest peers noticed, counted, where anybody lies.
    pub noticed: BTreeMap<String, u64>,
    /// Liars that the record chain slashed, and after which round.
    pub slashed: BTreeMap<usize, Round>,
    /// What the contribution with each blob was trained on, for those who audit it.
    worked: BTreeMap<Hash, TrainOrder>,
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
                Peer::new(keys, Disk::default(), joiner)
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
            doubles: BTreeMap::new(),
            refused: BTreeMap::new(),
            noticed: BTreeMap::new(),
            slashed: BTreeMap::new(),
            digest: blake3::Hasher::new(),
            agreements: Vec::new(),
            faults_left: 0,
            waking: 0,
            worked: BTreeMap::new(),
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
                let goal = if self.all_barred() { 0 } else { self.scenario.rounds };
                self.checker.arrived(at, round, goal);
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

    /// Whether that is what the run was to end with.
    fn all_barred(&self) -> bool {
        self.scenario.until_barred && self.slashed.len() == self.scenario.liars().count()
    }

    /// What each liar kept of the points that it claimed, as a share.
    pub fn kept(&self) -> BTreeMap<usize, f64> {
        let honest = (0..self.peers.len()).filter(|at| !self.is_faulty(*at));
        let chains = honest.filter_map(|at| self.peers[at].state.as_ref()).map(State::chain);
        // One may have decided what bars a liar, and another not yet.
        let chain = chains.max_by_key(|chain| chain.agreed.round);
        let of = |liar: usize| {
            let account = chain?.ledger.get(&self.scenario.keys(liar).id())?;
            let paid = (account.vested + account.provisional_points()) as f64;
            let all = paid + (account.slashed + account.unpaid) as f64;
            (all > 0.0).then_some((liar, paid / all))
        };
        self.scenario.liars().filter_map(of).collect()
    }

    fn done(&self) -> bool {
        if self.all_barred() {
            return true;
        }
        let there = |peer: &Peer| {
            peer.state
                .as_ref()
                .is_none_or(|state| state.chain().agreed.round.0 >= self.scenario.rounds)
        };
        let mut honest = self.peers.iter().enumerate().filter(|(at, _)| !self.is_faulty(*at));
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
                let set = self.peers[peer].timers.get(&timer);
                let Some((_, due)) = set.copied().filter(|(counts, _)| *counts == generation) else {
                    return;
                };
                if self.local(peer) < due {
                    // The clock did not come as far as the wait for it was long.
                    let at = self.global(peer, due).max(self.now + 1);
                    let item = Item::Timer {
                        peer,
                        life,
                        timer,
                        generation,
                    };
                    return self.push(at, item);
                }
                self.peers[peer].timers.remove(&timer);
                self.event(peer, life, Event::Timer(timer));
            }
            Item::TrainingDone {
                peer,
                life,
                order,
                done,
            } => self.training_done(peer, life, *order, done),
            Item::Fetched { peer, life, blob, from } => self.fetched(peer, life, blob, from),
            Item::AskRecords { peer, asker, from } => self.answer_records(peer, asker, from),
            Item::Event { peer, life, event } => self.event(peer, life, *event),
            Item::Audit {
                peer,
                life,
                order,
                window,
            } => self.ask_to_open(peer, life, *order, window),
            Item::Ask { peer, life, asking } => self.ask(peer, life, *asking),
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
        if let Event::SpeedChecked { key, outcome } = &event {
            self.looked_at_speed(peer, *key, outcome.is_ok());
        }
        if self.gang.has(peer) {
            return self.lie(peer, event);
        }
        let raw = self.peers[peer].plight.local(self.now);
        let Peer {
            state: Some(state),
            clock,
            ..
        } = &mut self.peers[peer]
        else {
            return;
        };
        let effects = state.handle(clock.read(raw), event);
        if state.is_doubled() {
            return self.gives_way(peer);
        }
        self.checker.bounded(peer, state);
        self.carry_out(peer, effects);
    }
}
