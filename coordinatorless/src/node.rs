//! The driver: gives the core ([`crate::protocol`]) a clock, a disk and a network, and the trainer its work.
//!
//! One task owns the state machine; nothing else touches it. It waits for one thing at a time (a frame, a timer, the host, a finished
//! transfer, a command), hands it to [`crate::protocol::State::handle`] and carries out the effects in order. Tensors are the host's:
//! it gets [`Work`] and gives [`Done`]; models and contributions pass through here as bytes.
//!
//! - `driver`: the loop. `effects`: what it does for each effect. `serve`: what others may ask, and what is kept for them.
//!   `audits`: what an auditor asks of a member. `tries`: when one that gives no answer has refused. `speeds`: openings of proofs of speed. `restore`: the chain after a restart, and own files for the others. `transfer`: blobs in, blobs out, models rebuilt from snapshots and counted contributions.
//! - [`join`]: what a newcomer does before it starts like a restarted peer (R18).

mod audits;
mod driver;
mod effects;
pub mod join;
mod restore;
mod serve;
mod speeds;
mod transfer;
mod tries;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

pub use driver::run;
pub use transfer::{MAX_SHARD, model_source, patience_for, reach, snapshots};

use crate::config::RunConfig;
use crate::net::{Net, NetError, NetEvent};
use crate::protocol::chain::ChainState;
use crate::protocol::event::{AuditOrder, Encode, Notice, SpeedAnswer, SpeedOrder, TrainOrder, Trained};
use crate::protocol::speed::{self, SpeedTest};
use crate::store::{Store, StoreError};
use crate::types::*;

/// What a node is started with.
pub struct NodeConfig {
    /// The run.
    pub run: Arc<RunConfig>,
    /// The peer's secret.
    pub secret: [u8; 32],
    /// Where its tokens are to be paid.
    pub payout_address: String,
    /// Bytes of an accumulator: 4 for each parameter. An audited member's is fetched up to this length.
    pub accumulator_bytes: u64,
    /// Whether parts of an accumulator can be audited by themselves, so that of a long one only some leaves are fetched.
    pub opens_leaves: bool,
    /// Files that joiners may fetch by hash: the manifest and the data shards.
    pub shared_files: Vec<PathBuf>,
    /// The folder of the snapshots that this peer writes. What the blob store has lost of them is put back.
    pub snapshots: PathBuf,
    /// Its accumulators likewise, each named by its BLAKE3, with their branches: oldest first. Nobody else has those, and auditors ask for them.
    pub accumulators: Vec<(Branch, PathBuf)>,
    /// Take part up to this round, then serve until the others are there too, then stop.
    pub last_round: Option<Round>,
    /// Most bytes of blobs on disk; nothing that R17 needs is dropped for it, but a warning is given.
    pub disk_budget: Option<u64>,
}

/// One decided record with the bytes that it counted, in its order.
#[derive(Clone, Debug)]
pub struct Step {
    /// The record.
    pub decided: Arc<Decided>,
    /// The shards of each contribution.
    pub shards: Vec<Vec<Bytes>>,
}

/// How to come by the model after some round: a snapshot and what was counted since.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// The snapshot's bytes (its BLAKE3 is the model root); `None`: the genesis model.
    pub snapshot: Option<Bytes>,
    /// The round of the snapshot (0: genesis).
    pub round: Round,
    /// Records since, oldest first.
    pub steps: Vec<Step>,
}

/// Work for the host. `epoch` comes back with the answer; an answer of an older epoch is dropped.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // a few a round, moved once
pub enum Work {
    /// Train until the order's batches are done, `deadline`, or [`Stop`].
    Train {
        /// Names this piece of training for [`Stop`].
        id: u64,
        /// What to train on.
        order: TrainOrder,
        /// When to stop at the latest.
        deadline: Instant,
    },
    /// Make the contribution of what was trained.
    Encode(Encode),
    /// Replace the model.
    Load {
        /// See [`Work`].
        epoch: u64,
        /// The branch.
        branch: Branch,
        /// From what.
        source: ModelSource,
    },
    /// Apply one more record to the model.
    Apply {
        /// See [`Work`].
        epoch: u64,
        /// The record and its bytes.
        step: Step,
        /// Write a snapshot afterwards.
        snapshot: bool,
    },
    /// Replay a member's round.
    Audit {
        /// What and whose.
        order: AuditOrder,
        /// The model that the round was trained from.
        source: ModelSource,
        /// The claimed contribution.
        shards: Vec<Bytes>,
        /// The member's accumulators, as it opened them.
        accumulators: Opened,
    },
    /// Compute for a proof of speed, between two steps if training is going on.
    Speed {
        /// What.
        order: SpeedOrder,
        /// When the claim has to be with the others.
        deadline: Instant,
    },
    /// Open what was drawn of this peer's own claim.
    OpenSpeed(Box<SpeedTest>),
}

/// What an audited member opened of its accumulators before and after the round. Those of zeros are empty: nobody sends them.
#[derive(Clone, Debug)]
pub enum Opened {
    /// All of both.
    Whole(Bytes, Bytes),
    /// The leaves that [`AuditOrder::leaves`] names, with the hashes that prove them.
    Leaves(Bytes, Bytes),
}

/// Bytes of an accumulator's leaf: a chunk group of verified streaming.
pub const LEAF_BYTES: u64 = 16 << 10;

/// Leaves of an accumulator of so many bytes.
pub fn leaf_count(accumulator_bytes: u64) -> u64 {
    accumulator_bytes.div_ceil(LEAF_BYTES)
}

/// Where these leaves lie, in BLAKE3's chunks of 1024 bytes; the last one may be short.
pub fn leaf_ranges(leaves: &[u64], accumulator_bytes: u64) -> Vec<std::ops::Range<u64>> {
    let (chunks, end) = (LEAF_BYTES / 1024, accumulator_bytes.div_ceil(1024));
    let each = leaves.iter().map(|leaf| leaf.saturating_mul(chunks));
    each.map(|from| from.min(end)..from.saturating_add(chunks).min(end))
        .collect()
}

/// The host's answers.
#[derive(Debug)]
pub enum Done {
    /// The steps of a local round.
    TrainingEnded {
        /// The order's branch.
        branch: Branch,
        /// Its round.
        round: Round,
        /// Whether there is something to encode.
        fruitful: bool,
        /// What failed, if anything did.
        reason: Option<String>,
    },
    /// A local round, encoded.
    Trained {
        /// Its description.
        trained: Trained,
        /// Its bytes.
        shards: Vec<Bytes>,
        /// A file holding the accumulator after it, served to auditors.
        accumulator: PathBuf,
        /// Its steps, told to auditors that commit themselves first.
        trace: Trace,
    },
    /// What was trained could not be encoded.
    Idle {
        /// The round.
        round: Round,
        /// What failed.
        reason: String,
    },
    /// A model after [`Work::Load`] or [`Work::Apply`].
    Applied {
        /// See [`Work`].
        epoch: u64,
        /// The branch.
        branch: Branch,
        /// The round.
        round: Round,
        /// The root.
        model_root: Hash,
        /// The snapshot file, if one was asked for.
        snapshot: Option<PathBuf>,
    },
    /// The model could not be computed.
    Failed {
        /// See [`Work`].
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// An audit.
    Audited {
        /// What was found.
        verdict: Verdict,
        /// The replay's own trace, where there was a replay.
        trace: Option<Trace>,
    },
    /// What was computed for a proof of speed.
    SpeedAnswered(SpeedAnswer),
    /// What was drawn of it.
    SpeedOpened {
        /// Of which proof.
        key: speed::Key,
        /// The opening.
        opening: Bytes,
    },
}

/// Tells training to stop: pieces up to this number are no longer wanted.
#[derive(Clone, Default, Debug)]
pub struct Stop(Arc<AtomicU64>);

impl Stop {
    /// Nothing up to `id` is wanted any more.
    pub fn up_to(&self, id: u64) {
        self.0.fetch_max(id, Ordering::Relaxed);
    }
    /// Whether to go on with piece `id`.
    pub fn wants(&self, id: u64) -> bool {
        self.0.load(Ordering::Relaxed) < id
    }
}

/// Decodes a contribution strictly; called off the main task.
pub type Check = Arc<dyn Fn(&Commit, &[Bytes]) -> Result<(), String> + Send + Sync>;

/// Looks at the opening of a proof of speed; called off the main task.
pub type CheckSpeed = Arc<dyn Fn(&SpeedTest, &[u8]) -> Result<(), String> + Send + Sync>;

/// The driver's ends of the channels to the host.
pub struct Host {
    /// Work, in order. Training goes on beside it and is interrupted by `stop`; everything else is short.
    pub work: std::sync::mpsc::Sender<Work>,
    /// Answers.
    pub done: mpsc::Receiver<Done>,
    /// Stops training.
    pub stop: Stop,
    /// The strict decoder.
    pub check: Check,
    /// Whether proofs of speed hold.
    pub check_speed: CheckSpeed,
}

/// From the outside.
pub enum Command {
    /// Say goodbye and stop.
    Leave,
    /// Say so when this peer's chain reached this round (or at once).
    Nudge(oneshot::Sender<()>),
}

/// What the driver knows, for people.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// The agreed state.
    pub chain: Arc<ChainState>,
    /// The model after the last applied round.
    pub model: Option<(Round, Hash)>,
    /// The last notice of an applied round.
    pub last: Option<Notice>,
    /// Members heard lately.
    pub alive: Vec<PeerId>,
    /// Voters' weights.
    pub weights: Vec<(PeerId, u64)>,
    /// Bytes sent and received.
    pub traffic: (u64, u64),
    /// Bytes of blobs on disk.
    pub disk: u64,
}

/// Branches whose accumulators are kept for auditors: the one that the peer is on, and the one that it came from or may go back to.
pub const ACCUMULATOR_BRANCHES: usize = 2;

/// Why a node stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The disk.
    #[error("the record store failed: {0}")]
    Store(#[from] StoreError),
    /// The network.
    #[error("the network failed: {0}")]
    Net(#[from] NetError),
    /// The host's threads are gone.
    #[error("the trainer stopped: {0}")]
    Host(String),
    /// A copied directory.
    #[error(
        "another process takes part with this peer's key, and started later, so this one stops: a key is for one process, and two that vote with it are barred"
    )]
    KeyInUse,
    /// The others barred this peer.
    #[error(
        "this peer is barred: {0}; nothing that it does counts or is paid any more, so it stops. To go on, join again from another directory, with a key of its own"
    )]
    Barred(String),
    /// What is on disk contradicts itself.
    #[error("the records in this directory cannot be followed: {0}")]
    Chain(String),
}

/// Everything [`run`] needs.
pub struct Node {
    /// Settings.
    pub config: NodeConfig,
    /// The disk.
    pub store: Arc<Store>,
    /// The network.
    pub net: Net,
    /// What it brings.
    pub events: mpsc::Receiver<NetEvent>,
    /// The trainer.
    pub host: Host,
    /// From the user.
    pub commands: mpsc::Receiver<Command>,
    /// To the event log.
    pub notices: mpsc::Sender<Notice>,
    /// To the status page.
    pub status: watch::Sender<Option<NodeStatus>>,
}
