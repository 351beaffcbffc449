//! `status.json`: how a peer stands, written by it every round and second, so that `murmur status`, `ticket` and `wait` need no socket;
//! also of a peer that is no more.

use std::path::Path;

use anyhow::{Context, Result};
use coordinatorless::types::{Hash, PeerId, RunId};
use serde::{Deserialize, Serialize};

use crate::events::now;
use crate::failure::usage;
use crate::peer_dir::{PeerDir, write_whole};

/// Seconds after which a peer that wrote nothing is not believed to be live.
const STALE_SECS: f64 = 30.0;

/// How a peer stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The run.
    pub run: RunId,
    /// Its name.
    pub name: String,
    /// The branch.
    pub branch: u32,
    /// The last round decided and applied here.
    pub round: u64,
    /// Its record.
    pub record: Hash,
    /// The model's root after it.
    pub model_root: Hash,
    /// Mean training loss of that round, nats per token.
    pub loss: Option<f64>,
    /// The latest loss on held-out text.
    pub val_loss: Option<f64>,
    /// Tokens counted since the beginning.
    pub tokens: u64,
    /// Tokens counted per second, over the last rounds that this peer lived through.
    pub tokens_per_sec: f64,
    /// The members.
    pub members: Vec<MemberStatus>,
    /// This peer.
    pub me: OwnStatus,
    /// A ticket to join with; absent without a network.
    pub ticket: Option<String>,
    /// The process.
    pub pid: u32,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// When this was written, Unix seconds.
    pub updated: f64,
}

/// How a member stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Who.
    pub id: PeerId,
    /// Its share of the voting weight, 0 to 1.
    pub weight: f64,
    /// Its tokens counted since the beginning.
    pub tokens: u64,
    /// Its points, provisional and vested.
    pub points: u64,
    /// The last round in which it was counted.
    pub last_round: Option<u64>,
    /// What it showed last that it computes, at least, in billions of operations a second, where the run asks.
    #[serde(default)]
    pub gflops: Option<f64>,
    /// `training` (counted in the last round) or `silent`.
    pub state: String,
}

/// How this peer stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwnStatus {
    /// Who it is.
    pub id: PeerId,
    /// Its points, provisional and vested.
    pub points: u64,
    /// Points earned an hour, at the pace of the last rounds.
    pub earning_per_hour: f64,
    /// The share of its time that it spent training in the last rounds, 0 to 1; absent before the first.
    #[serde(default)]
    pub utilisation: Option<f64>,
    /// Bytes sent by this process.
    pub upload: u64,
    /// Bytes received by this process.
    pub download: u64,
    /// Bytes of its directory.
    pub disk: u64,
}

/// The file's name in a peer's directory.
pub const FILE: &str = "status.json";

impl Status {
    /// Writes it aside, then in place.
    ///
    /// # Errors
    /// The disk.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string(self).context("a status cannot be written as JSON")?;
        write_whole(&dir.join(FILE), text.as_bytes())
    }

    /// What a directory holds; `None` before the first is written.
    pub fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// What a directory holds.
    ///
    /// # Errors
    /// The peer has not got that far (exit code 1).
    pub fn of(dir: &PeerDir) -> Result<Self> {
        Self::read(dir.path()).with_context(|| {
            format!(
                "the peer in {} has no status yet; wait for it to start, or start it",
                dir.path().display()
            )
        })
    }

    /// Whether the process that wrote this is there and writing.
    pub fn is_live(&self) -> bool {
        now() - self.updated < STALE_SECS && Path::new("/proc").join(self.pid.to_string()).exists()
    }

    /// The ticket of a live peer.
    ///
    /// # Errors
    /// The peer is not running, or has no network.
    pub fn fresh_ticket(&self, dir: &PeerDir) -> Result<&str> {
        if !self.is_live() {
            return Err(usage(format!(
                "the peer in {} is not running; a ticket comes from a live peer: start it with `murmur join`, or ask another",
                dir.path().display()
            )));
        }
        self.ticket
            .as_deref()
            .ok_or_else(|| usage("this peer trains alone (`murmur train`); nobody can join it"))
    }
}
