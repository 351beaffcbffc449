//! A peer, from start to end: the whole story of a run.
//!
//! ```text
//!             Work: train, encode, apply, audit, speed    frames, blobs, records
//!   worker <------------------------------------- node <-----------------------> other peers
//!   (tensors)   Done: shards, roots, verdicts      |  (the protocol; no tensors)
//!    |  |                                          | notices, status
//!    |  `--> training (steps, proofs of speed)     |
//!    v                                             v
//!   side (audits, evaluations)  --evals-->  reporter: events.jsonl, status.json, a line a round
//! ```

use std::sync::{Arc, mpsc as std_mpsc};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use coordinatorless::net::{Net, NetEvent};
use coordinatorless::node::{Command, Done, Host, Node, NodeConfig, Stop, Work, run as run_node};
use coordinatorless::store::Store;
use coordinatorless::types::{PeerId, Round};
use coordinatorless::wire::Keys;
use tokio::sync::{mpsc, watch};
use trainer::compress::Codec;

use crate::cheat::{self, Cheat};
use crate::device::{devices, threads};
use crate::events::{Event, EventLog};
use crate::held_out::HeldOut;
use crate::keeper::{Keeper, Policy};
use crate::kit::Kit;
use crate::peer_dir::{PeerDir, PeerFile};
use crate::progress::Progress;
use crate::reporter::Reporter;
use crate::side::{self, Backlog};
use crate::{accumulators, disk, speed, training, worker};

/// How far computing threads stand back (nice; 0 is usual, 19 the most): a third of a contended core instead of half.
#[cfg(target_os = "linux")]
const NICE: i32 = 5;

/// What a peer is started with. Its directory holds the run's configuration and data.
pub struct Start {
    /// The directory.
    pub dir: PeerDir,
    /// Its store, which holds the directory's lock.
    pub store: Store,
    /// Who it is.
    pub keys: Keys,
    /// What is local to it.
    pub local: PeerFile,
    /// The network.
    pub net: Net,
    /// What that brings.
    pub events: mpsc::Receiver<NetEvent>,
    /// Take part up to this round.
    pub last_round: Option<u64>,
    /// Cheat, to be caught.
    pub cheat: Option<Cheat>,
}

/// Runs a peer until it is told to leave or its last round is done.
///
/// # Errors
/// The disk, the network or the model fails; or the configuration contradicts itself (exit code 2).
pub async fn run(start: Start) -> Result<()> {
    let Start {
        dir,
        store,
        keys,
        local,
        net,
        events,
        last_round,
        cheat,
    } = start;
    let config = dir.run_config()?;
    let kit = Arc::new(Kit::open(config.clone(), &dir, threads(local.threads)?)?);
    disk::must_fit(&config, kit.data.manifest(), local.max_disk)?;
    let mut log = EventLog::open(dir.path())?;
    log.write(Event::Started {
        peer: keys.id(),
        pid: std::process::id(),
    })?;

    let (done_sender, done) = mpsc::channel(64);
    let (evals_sender, evals) = mpsc::channel(16);
    let stop = Stop::default();
    let computing = Computing {
        kit: kit.clone(),
        dir: dir.clone(),
        me: keys.id(),
        local: local.clone(),
        cheat,
        stop: stop.clone(),
    };
    let Threads { work, handles } = computing.start(done_sender, evals_sender)?;

    let (notices_sender, notices) = mpsc::channel(4096);
    let (status_sender, status) = watch::channel(None);
    let (commands_sender, commands) = mpsc::channel(4);
    let reporter = Reporter::new(
        dir.clone(),
        keys.id(),
        config.clone(),
        net.clone(),
        log,
        Progress::new(false),
        local.max_disk.map(|bytes| bytes.0),
    );
    let reporting = tokio::spawn(reporter.run(notices, evals, status));
    let listening = tokio::spawn(leave_on_signal(commands_sender));

    let mut opened = accumulators::all(&dir.accumulators());
    for (_, file) in &mut opened {
        *file = cheat::opened(cheat, std::mem::take(file))?;
    }
    let node = Node {
        config: NodeConfig {
            run: Arc::new(config),
            secret: keys.secret(),
            payout_address: local.payout_address.unwrap_or_default(),
            accumulator_bytes: 4 * kit.algorithm.codec().params() as u64,
            opens_leaves: kit.opens_leaves(),
            shared_files: shared_files(&dir, &kit),
            snapshots: dir.snapshots(),
            accumulators: opened,
            last_round: last_round.map(Round),
            // The reporter tells, once, when the disk's limit is passed; nothing could be dropped for it.
            disk_budget: None,
        },
        store: Arc::new(store),
        net,
        events,
        host: Host {
            work,
            done,
            stop,
            check: kit.check(),
            check_speed: speed::checker(&kit),
        },
        commands,
        notices: notices_sender,
        status: status_sender,
    };
    let outcome = run_node(node).await;
    listening.abort();
    // The channel to the worker is closed now: it writes the model out and ends.
    let computed = tokio::task::spawn_blocking(move || handles.into_iter().try_for_each(join)).await?;
    let mut log = reporting.await.context("the reporter failed")?;
    let reason = match &outcome {
        Ok(()) => "left in good order".to_owned(),
        Err(error) => error.to_string(),
    };
    log.write(Event::Stopped { reason })?;
    computed?;
    Ok(outcome?)
}

/// The manifest, the shards and the model that the run starts from, if there is one, for joiners.
fn shared_files(dir: &PeerDir, kit: &Kit) -> Vec<std::path::PathBuf> {
    let data = dir.data();
    let shards = kit
        .data
        .manifest()
        .shards
        .iter()
        .map(|shard| datasets::shard_path(&data, &shard.hash));
    let start = kit.start.iter().map(|(path, _)| path.clone());
    std::iter::once(datasets::manifest_path(&data))
        .chain(shards)
        .chain(start)
        .collect()
}

/// What the computing threads share.
struct Computing {
    kit: Arc<Kit>,
    dir: PeerDir,
    me: PeerId,
    local: PeerFile,
    cheat: Option<Cheat>,
    stop: Stop,
}

/// The computing threads, and the way to the first.
struct Threads {
    work: std_mpsc::Sender<Work>,
    handles: Vec<JoinHandle<Result<()>>>,
}

impl Computing {
    /// Starts the worker, the thread that trains, and the side thread.
    fn start(self, done: mpsc::Sender<Done>, evals: mpsc::Sender<(u64, HeldOut)>) -> Result<Threads> {
        let devices = devices(self.local.device.as_deref())?;
        let threads = threads(self.local.threads)?;
        let keeping = Policy::of(&self.local);
        let backlog = Backlog::default();
        let (work_sender, work) = std_mpsc::channel();
        let (side_sender, tasks) = std_mpsc::channel();
        let (training_sender, jobs) = std_mpsc::channel();
        let (found_sender, found) = std_mpsc::channel();
        let aside = side::Setup {
            kit: self.kit.clone(),
            device: devices[0],
            threads,
            backlog: backlog.clone(),
            cheat: self.cheat,
            keeper: Keeper::open(&self.dir, self.kit.clone(), keeping),
            done: done.clone(),
            evals,
        };
        let setup = worker::Setup {
            kit: self.kit,
            dir: self.dir,
            me: self.me,
            threads,
            cheat: self.cheat,
            keeping,
            backlog,
            stop: self.stop.clone(),
            done: done.clone(),
            training: training_sender,
            found,
            side: side_sender,
        };
        let steps = training::Setup {
            kit: setup.kit.clone(),
            me: setup.me,
            devices,
            threads,
            cheat: self.cheat,
            stop: self.stop,
            done,
            found: found_sender,
        };
        // Its error is the one that the others follow from, so it is looked at first.
        let training = thread::Builder::new().name("training".into()).spawn(move || {
            give_way();
            training::work(steps, &jobs)
        })?;
        let worker = thread::Builder::new().name("worker".into()).spawn(move || {
            give_way();
            worker::work(setup, &work)
        })?;
        let side = thread::Builder::new().name("side".into()).spawn(move || {
            give_way();
            side::work(aside, &tasks)
        })?;
        Ok(Threads {
            work: work_sender,
            handles: vec![training, worker, side],
        })
    }
}

/// Lets the protocol's threads, and whatever else runs here, go before this one: a round that is decided late holds up everybody, a
/// gradient step that is late only this peer. libtorch's threads are made by the computing ones and inherit it.
fn give_way() {
    // On Linux this concerns the calling thread alone. Where it fails, training goes on as it is.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "could not lower a computing thread's priority");
    }
}

fn join(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread
        .join()
        .map_err(|_| anyhow!("a computing thread panicked; its message is above"))?
}

/// The first Ctrl-C (or SIGTERM) says goodbye and finishes writing; the second ends the process at once.
async fn leave_on_signal(commands: mpsc::Sender<Command>) {
    interrupted().await;
    eprintln!("murmur: leaving; what is being written is finished first (Ctrl-C again: at once)");
    let _ = commands.send(Command::Leave).await;
    interrupted().await;
    std::process::exit(130);
}

async fn interrupted() {
    let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => {
            tracing::warn!("cannot listen for SIGTERM: {error}");
            let _ = tokio::signal::ctrl_c().await;
            return;
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
