//! Questions and answers: what a newcomer or a laggard asks of one peer.
//!
//! One bidirectional stream per question, on a protocol of its own: `length u32 LE | canonical rkyv` each way. Questions are small,
//! answers are bounded by [`wire::MAX_RECORDS`](crate::wire::MAX_RECORDS), a peer has at most four in work here, and whoever
//! dawdles is cut off: nobody can hold a stream open for nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use iroh::endpoint::{Connection, RecvStream, SendStream};
use iroh::protocol::{AcceptError, ProtocolHandler};
use rkyv::{Archive, Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::pool::Pool;
use super::{NetError, NetEvent};
use crate::protocol::replayed::{Answer, Ask};
use crate::types::{Branch, Decided, Hash, PeerId, Round, RunId};
use crate::wire::{Canonical, MAX_RECORDS};

/// The longest question.
const MAX_REQUEST: usize = 4096;
/// Questions of one peer in work at once.
const MAX_AT_ONCE: usize = 4;
/// Peers with questions in work at once: more than there can be strangers, so that those alone cannot take every place.
const MAX_PEERS: usize = 2 * super::gate::MAX_GUESTS;
/// How long a question may take to arrive.
const ASKING: Duration = Duration::from_secs(5);
/// How long the driver may think, and how long the answer may take to leave.
const ANSWERING: Duration = Duration::from_secs(60);
/// How long a connection may take to open.
const OPENING: Duration = Duration::from_secs(4);
/// How much is read at a time.
const CHUNK: usize = 64 << 10;

/// A question to one peer.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Where do you stand?
    Status,
    /// The run's configuration, by the run's id (R2).
    RunConfig,
    /// Decided records on your branch.
    Records {
        /// The first round.
        from: Round,
        /// At most so many.
        max: u32,
    },
    /// What is your newest snapshot (R17) that I can use?
    Snapshot {
        /// The asker's round: where rounds are short, the newest of all is always ahead of it.
        at_most: Round,
    },
    /// The record with this hash.
    Record {
        /// Its hash.
        hash: Hash,
    },
    /// Your trace of a round that I was drawn to audit (R25).
    Trace(Ask),
    /// The opening of a proof of speed.
    Speed {
        /// The branch.
        branch: Branch,
        /// The record that asked for it.
        asked: Round,
        /// Whose it is.
        member: PeerId,
    },
}

/// Where a peer stands.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusInfo {
    /// The run.
    pub run: RunId,
    /// Its branch.
    pub branch: Branch,
    /// The round in progress.
    pub round: Round,
    /// The newest decided record.
    pub tip: Hash,
    /// Its round.
    pub tip_round: Round,
}

/// A snapshot's contents, to be fetched as blobs. Believed only as far as the roots stand in certified records.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    /// The branch.
    pub branch: Branch,
    /// The round after which it was taken.
    pub round: Round,
    /// The model.
    pub model_root: Hash,
    /// Bytes of the model.
    pub model_len: u64,
}

/// An answer.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Response {
    /// To [`Request::Status`].
    Status(StatusInfo),
    /// To [`Request::RunConfig`]: the agreed bytes.
    RunConfig(Vec<u8>),
    /// To [`Request::Records`]: consecutive, oldest first; fewer than asked for if they would not fit.
    Records(Vec<Decided>),
    /// To [`Request::Snapshot`].
    Snapshot(SnapshotInfo),
    /// To [`Request::Record`].
    Record(Option<Box<Decided>>),
    /// To [`Request::Trace`].
    Trace(Answer),
    /// To [`Request::Speed`].
    Speed(Vec<u8>),
    /// I cannot say.
    Unknown,
}

impl Response {
    /// The answer's bytes; a list of records is halved until they fit.
    fn fitting(mut self) -> Vec<u8> {
        loop {
            let bytes = self.to_canonical();
            if bytes.len() <= MAX_RECORDS {
                return bytes;
            }
            self = match self {
                Self::Records(mut records) if records.len() > 1 => {
                    records.truncate(records.len() / 2);
                    Self::Records(records)
                }
                _ => Self::Unknown,
            };
        }
    }
}

/// Asks `peer` and waits for its answer, `deadline` in all.
pub(super) async fn ask(
    pool: &Pool,
    peer: PeerId,
    request: &Request,
    deadline: Duration,
) -> Result<Response, NetError> {
    let question = request.to_canonical();
    let exchange = async {
        let connection = pool.get(peer, OPENING.min(deadline)).await?;
        let lost = |reason: String| NetError::Unreachable { peer, reason };
        let (mut send, mut receive) = connection.open_bi().await.map_err(|error| lost(error.to_string()))?;
        write(&mut send, &question).await.map_err(lost)?;
        let bytes = read(&mut receive, MAX_RECORDS)
            .await
            .map_err(|error| error.into_net(peer))?;
        let response = Response::from_canonical(&bytes).map_err(|error| NetError::BadAnswer {
            peer,
            reason: error.to_string(),
        })?;
        match (&response, request) {
            (Response::Records(records), Request::Records { max, .. }) if records.len() > *max as usize => {
                let reason = format!("expected at most {max} records, found {}", records.len());
                Err(NetError::BadAnswer { peer, reason })
            }
            _ => Ok(response),
        }
    };
    timeout(deadline, exchange)
        .await
        .map_err(|_| NetError::Timeout { peer, limit: deadline })?
}

/// The answering side.
#[derive(Clone, Debug)]
pub(super) struct Answerer {
    events: mpsc::Sender<NetEvent>,
    slots: Arc<Slots>,
}

/// How many questions each peer has in work.
#[derive(Debug, Default)]
struct Slots(Mutex<HashMap<PeerId, usize>>);

impl Slots {
    fn counts(&self) -> MutexGuard<'_, HashMap<PeerId, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, peer: PeerId) -> Option<Slot> {
        let mut counts = self.counts();
        let room = counts.len() < MAX_PEERS || counts.contains_key(&peer);
        let count = room.then(|| counts.entry(peer).or_default())?;
        (*count < MAX_AT_ONCE).then(|| {
            *count += 1;
            Slot {
                slots: self.clone(),
                peer,
            }
        })
    }
}

/// One question in work.
struct Slot {
    slots: Arc<Slots>,
    peer: PeerId,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.slots.counts();
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

impl Answerer {
    /// Questions go to the driver through `events`.
    pub fn new(events: mpsc::Sender<NetEvent>) -> Self {
        Self {
            events,
            slots: Arc::default(),
        }
    }

    async fn answer(self, _slot: Slot, peer: PeerId, mut send: SendStream, mut receive: RecvStream) {
        let question = match timeout(ASKING, read(&mut receive, MAX_REQUEST)).await {
            Ok(Ok(bytes)) => Request::from_canonical(&bytes).map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not complete within {ASKING:?}")),
        };
        match question {
            Ok(request) => {
                let bytes = self.ask_driver(peer, request).await.fitting();
                // A peer that does not take its answer goes without.
                let _ = timeout(ANSWERING, write(&mut send, &bytes)).await;
            }
            Err(reason) => {
                let _ = send.reset(1u32.into());
                let _ = self
                    .events
                    .send(NetEvent::Rejected {
                        from: peer,
                        kind: "request",
                        reason,
                    })
                    .await;
            }
        }
    }

    async fn ask_driver(&self, from: PeerId, request: Request) -> Response {
        let (reply, answer) = oneshot::channel();
        if self
            .events
            .send(NetEvent::Request { from, request, reply })
            .await
            .is_err()
        {
            return Response::Unknown;
        }
        timeout(ANSWERING, answer)
            .await
            .ok()
            .and_then(Result::ok)
            .unwrap_or(Response::Unknown)
    }
}

impl ProtocolHandler for Answerer {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let peer = super::endpoint::peer_id(connection.remote_id());
        while let Ok((mut send, receive)) = connection.accept_bi().await {
            match self.slots.take(peer) {
                Some(slot) => {
                    tokio::spawn(self.clone().answer(slot, peer, send, receive));
                }
                None => {
                    let _ = send.reset(2u32.into());
                }
            }
        }
        Ok(())
    }
}

/// Why a message could not be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("oversized: expected at most {expected} bytes, found {found}")]
    Long { expected: usize, found: usize },
    #[error("cut off: {0}")]
    Cut(String),
}

impl ReadError {
    fn into_net(self, peer: PeerId) -> NetError {
        match self {
            Self::Long { .. } => NetError::BadAnswer {
                peer,
                reason: self.to_string(),
            },
            Self::Cut(reason) => NetError::Unreachable { peer, reason },
        }
    }
}

async fn write(stream: &mut SendStream, bytes: &[u8]) -> Result<(), String> {
    stream
        .write_all(&(bytes.len() as u32).to_le_bytes())
        .await
        .map_err(|error| error.to_string())?;
    stream.write_all(bytes).await.map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())
}

/// Reads a message; memory grows with what arrives, not with what is announced.
async fn read(stream: &mut RecvStream, limit: usize) -> Result<Vec<u8>, ReadError> {
    let mut header = [0; 4];
    stream
        .read_exact(&mut header)
        .await
        .map_err(|error| ReadError::Cut(error.to_string()))?;
    let length = u32::from_le_bytes(header) as usize;
    if length > limit {
        return Err(ReadError::Long {
            expected: limit,
            found: length,
        });
    }
    let mut body = BytesMut::with_capacity(length.min(CHUNK));
    while body.len() < length {
        let chunk = stream.read_chunk((length - body.len()).min(CHUNK)).await;
        let chunk = chunk.map_err(|error| ReadError::Cut(error.to_string()))?;
        body.extend_from_slice(&chunk.ok_or_else(|| ReadError::Cut("the stream ended".to_owned()))?);
    }
    Ok(body.to_vec())
}
