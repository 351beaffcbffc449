//! One peer's driver over a real store and a real endpoint, with a host that only says what it was asked for.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coordinatorless::config::{
    DataConfig, GenesisMember, MembershipConfig, PROTOCOL, RewardConfig, RunConfig, StorageConfig, TimingConfig,
    VerificationConfig,
};
use coordinatorless::net::{Net, NetConfig, Relay};
use coordinatorless::node::{self, Done, Host, Node, NodeConfig, Stop, Work};
use coordinatorless::protocol::beacon::VrfKeys;
use coordinatorless::protocol::chain::ChainState;
use coordinatorless::protocol::event::{Effect, Event, Timer};
use coordinatorless::protocol::{Setup, State};
use coordinatorless::store::Store;
use coordinatorless::types::{Branch, Decided, Hash, Micros, Round};
use coordinatorless::wire::{Keys, Scheme};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const SECRET: [u8; 32] = [7; 32];
const SOON: Duration = Duration::from_secs(20);

fn keys() -> Keys {
    Keys::new(SECRET, Scheme::Ed25519)
}

/// A run of one founder, whose rounds end after a second.
fn run(overlap: u32) -> RunConfig {
    let keys = keys();
    RunConfig {
        protocol: PROTOCOL,
        name: "node".into(),
        nonce: "0".into(),
        data: DataConfig {
            manifest: Hash::of(b"data"),
            sequences: 1 << 30,
            seq_len: 256,
            batch_sequences: 4,
            tokenizer: "bytes".into(),
        },
        timing: TimingConfig {
            train_secs: 0.5,
            collect_secs: 1.0,
            fetch_secs: 0.5,
            overlap,
            ..TimingConfig::default()
        },
        membership: MembershipConfig::default(),
        verification: VerificationConfig {
            speed_secs: 0.0,
            ..VerificationConfig::default()
        },
        rewards: RewardConfig::default(),
        storage: StorageConfig::default(),
        model: toml::Table::new(),
        training: toml::Table::new(),
        genesis: vec![GenesisMember {
            id: keys.id(),
            vrf_key: Hash(VrfKeys::derive(&keys).public()),
            weight: 1,
            payout_address: String::new(),
        }],
    }
}

/// The root that this host gives for the model after a round.
fn root(round: Round) -> Hash {
    Hash::of(&round.0.to_le_bytes())
}

/// What a peer has on disk that is killed between two writes: records, and the log of what it signed since.
struct Left {
    records: Vec<(Arc<Decided>, Arc<ChainState>)>,
    log: Vec<Vec<u8>>,
}

/// The founder after these records, with this log.
fn founder(config: &RunConfig, chain: ChainState, log: Vec<Vec<u8>>) -> State {
    State::new(Setup {
        config: Arc::new(config.clone()),
        keys: keys(),
        chain,
        history: Vec::new(),
        wal: Some(log),
        join: None,
        sequence: 1,
        last_round: None,
        steps: None,
    })
}

/// Plays the founder until it decides `round`, and leaves what was on disk just before that record.
fn killed_while_deciding(config: &RunConfig, round: Round) -> Left {
    let mut state = founder(config, ChainState::genesis(config), Vec::new());
    let mut left = Left {
        records: Vec::new(),
        log: Vec::new(),
    };
    let mut timers: BTreeMap<Timer, Micros> = BTreeMap::new();
    let mut now = 0;
    let mut effects: VecDeque<Effect> = state.start(now).into();
    effects.extend(state.handle(now, applied(Branch::default(), Round(0))));
    loop {
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Persist(entry) => left.log.push(entry),
                Effect::Store { decided, .. } if decided.record.slot.round == round => return left,
                Effect::Store { decided, state } => left.records.push((decided, state)),
                Effect::ClearWal => left.log.clear(),
                Effect::SetTimer(timer, at) => drop(timers.insert(timer, at)),
                Effect::CancelTimer(timer) => drop(timers.remove(&timer)),
                Effect::Apply(decided) => {
                    let slot = decided.record.slot;
                    effects.extend(state.handle(now, applied(slot.branch, slot.round)));
                }
                _ => {}
            }
        }
        let (timer, at) = timers
            .iter()
            .min_by_key(|(_, at)| **at)
            .map(|(timer, at)| (*timer, *at))
            .unwrap();
        timers.remove(&timer);
        now = at.max(now);
        assert!(now < 60_000_000, "{round} rounds of a second take no minute");
        effects.extend(state.handle(now, Event::Timer(timer)));
    }
}

fn applied(branch: Branch, round: Round) -> Event {
    Event::Applied {
        branch,
        round,
        model_root: root(round),
    }
}

impl Left {
    fn write(&self, dir: &Path) {
        let store = Store::open(dir).unwrap();
        for (decided, state) in &self.records {
            store.put(decided, &state.to_bytes()).unwrap();
        }
        for entry in &self.log {
            store.wal_append(entry).unwrap();
        }
    }
}

/// A host without tensors: says of each model that it is there, and tells the test its round first.
fn say_that_all_is_applied(
    orders: std::sync::mpsc::Receiver<Work>,
    done: mpsc::Sender<Done>,
    told: mpsc::Sender<Round>,
) {
    for order in orders {
        let (epoch, branch, round) = match order {
            Work::Load { epoch, branch, source } => {
                let last = source.steps.last().map(|step| step.decided.record.slot.round);
                (epoch, branch, last.unwrap_or(source.round))
            }
            Work::Apply { epoch, step, .. } => {
                let slot = step.decided.record.slot;
                (epoch, slot.branch, slot.round)
            }
            _ => continue,
        };
        let answer = Done::Applied {
            epoch,
            branch,
            round,
            model_root: root(round),
            snapshot: None,
        };
        if told.blocking_send(round).is_err() || done.blocking_send(answer).is_err() {
            return;
        }
    }
}

/// R19, O8: a log may decide a record before the peer has any model, and that record's contributions are applied, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_the_log_decides_at_the_start_is_applied() {
    for overlap in [0, 1] {
        starts_again(run(overlap)).await;
    }
}

async fn starts_again(config: RunConfig) {
    let left = killed_while_deciding(&config, Round(4));
    let last = (*left.records.last().unwrap().1).clone();
    let decides =
        |effect: &Effect| matches!(effect, Effect::Store { decided, .. } if decided.record.slot.round == Round(4));
    let begun = founder(&config, last, left.log.clone()).start(0);
    assert!(begun.iter().any(decides), "the log alone decides it");
    let dir = tempfile::tempdir().unwrap();
    left.write(dir.path());

    let net = NetConfig {
        secret: SECRET,
        run: config.id(),
        bind: Some(([127, 0, 0, 1], 0).into()),
        relay: Relay::None,
        dir: dir.path().to_owned(),
        max_upload: None,
        max_download: None,
        known: Vec::new(),
    };
    let (net, events) = Net::start(net).await.unwrap();
    let (work, orders) = std::sync::mpsc::channel();
    let (done, answers) = mpsc::channel(64);
    let (_commands, commands) = mpsc::channel(1);
    let (notices, _notices) = mpsc::channel(4096);
    let (status, _status) = watch::channel(None);
    let node = Node {
        config: NodeConfig {
            run: Arc::new(config),
            secret: SECRET,
            payout_address: String::new(),
            accumulator_bytes: 4096,
            opens_leaves: false,
            shared_files: Vec::new(),
            snapshots: dir.path().join("snapshots"),
            accumulators: Vec::new(),
            last_round: None,
            disk_budget: None,
        },
        store: Arc::new(Store::open(dir.path()).unwrap()),
        net,
        events,
        host: Host {
            work,
            done: answers,
            stop: Stop::default(),
            check: Arc::new(|_, _| Ok(())),
            check_speed: Arc::new(|_, _| Ok(())),
        },
        commands,
        notices,
        status,
    };
    let (told, mut models) = mpsc::channel(64);
    let host = std::thread::spawn(move || say_that_all_is_applied(orders, done, told));
    let mut running = tokio::spawn(node::run(node));
    let mut rounds = Vec::new();
    while rounds.last().is_none_or(|last| *last < Round(5)) {
        tokio::select! {
            round = timeout(SOON, models.recv()) => rounds.push(round.expect("a model is asked for soon").unwrap()),
            ended = &mut running => panic!("it stopped by itself: {ended:?}"),
        }
    }
    drop(models);
    running.abort();
    let _ = running.await;
    host.join().unwrap();
    let next: Vec<Round> = rounds.iter().skip(1).map(|round| round.previous()).collect();
    assert_eq!(
        rounds[..rounds.len() - 1],
        next,
        "each model is that after the one before it"
    );
    assert!(rounds[0] < Round(4), "{rounds:?}");
}
