//! Strangers at the door. Anyone may connect, since every newcomer is a stranger at first; so what strangers cost is bounded, whatever
//! they send, and above all when they send nothing or a byte now and then.
//!
//! - They have [`MAX_GUESTS`] connections between them, and each of them [`MAX_EACH`]. When all are taken the one that has been quiet
//!   longest goes, so that someone who has something to say always gets in.
//! - One that says nothing for [`QUIET`] is closed; what keeps a connection alive is not saying anything. Taking in what it asked for is.
//! - What one has sent and nobody has read yet is at most [`GUEST_WINDOW`] bytes.
//!
//! None of this touches members, nor connections that this peer opened itself.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iroh::endpoint::{AfterHandshakeOutcome, Connection, EndpointHooks, Side, WeakConnectionHandle};
use tokio::time::{Instant, timeout};

use super::endpoint::peer_id;
use crate::types::PeerId;

/// Connections of all strangers.
pub(super) const MAX_GUESTS: usize = 128;
/// Connections of one stranger: each of our four protocols twice.
const MAX_EACH: usize = 8;
/// How long a stranger may say nothing.
const QUIET: Duration = Duration::from_secs(15);
/// Frames of streams sent to it in that time, of up to 1.2 kB each, that are as good as a word: no more goes out unless it acknowledges what came.
const TAKEN: u64 = 200;
/// Bytes of a stranger's that wait to be read: a little more than the longest frame. By default there is no limit, and a connection has a
/// hundred streams to send on. Every connection begins with this much.
pub(super) const GUEST_WINDOW: u32 = (super::links::MAX_FRAME + (64 << 10)) as u32;

/// The same for everyone else: enough for 600 Mbit/s over a way of 100 ms.
const WINDOW: u32 = 8 << 20;

/// The gate; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    members: HashSet<PeerId>,
    guests: BTreeMap<u64, Guest>,
    next: u64,
}

/// A stranger's connection.
#[derive(Debug)]
struct Guest {
    peer: PeerId,
    handle: WeakConnectionHandle,
    /// Frames of streams that it has sent, when it was last looked at.
    said: u64,
    /// Frames that had been sent to it when it last said something.
    sent: u64,
    /// When it was last seen to have sent more, or to have taken enough.
    spoke: Instant,
    /// All frames, and when there were last more: who is being served is not quiet, however slow it is.
    seen: u64,
    stirred: Instant,
}

impl Guest {
    fn look(&mut self) {
        let Some(connection) = self.handle.upgrade() else {
            return;
        };
        let stats = connection.stats();
        let (said, sent) = (stats.frame_rx.stream, stats.frame_tx.stream);
        let all = said.saturating_add(sent);
        if all > self.seen {
            (self.seen, self.stirred) = (all, Instant::now());
        }
        if said > self.said || sent >= self.sent.saturating_add(TAKEN) {
            (self.said, self.sent, self.spoke) = (said, sent, Instant::now());
        }
    }

    fn close(&self, why: &[u8]) {
        if let Some(connection) = self.handle.upgrade() {
            connection.close(4u32.into(), why);
        }
    }
}

impl Gate {
    /// These are no strangers.
    pub fn set_members(&self, members: &[PeerId]) {
        let mut inner = self.inner();
        inner.members = members.iter().copied().collect();
        let Inner { members, guests, .. } = &mut *inner;
        guests.retain(|_, guest| !members.contains(&guest.peer));
    }

    /// Connections of strangers at this moment.
    pub fn guests(&self) -> usize {
        self.inner().guests.len()
    }

    /// Takes a stranger's connection in, if it has not too many; who has been quiet longest makes room.
    fn admit(&self, peer: PeerId, handle: WeakConnectionHandle) -> Option<u64> {
        let mut inner = self.inner();
        if inner.guests.values().filter(|guest| guest.peer == peer).count() >= MAX_EACH {
            return None;
        }
        if inner.guests.len() >= MAX_GUESTS {
            inner.guests.values_mut().for_each(Guest::look);
            let quietest = inner.guests.iter().min_by_key(|(_, guest)| guest.stirred);
            let quietest = quietest.map(|(key, _)| *key)?;
            inner.guests.remove(&quietest)?.close(b"too many peers");
        }
        inner.next += 1;
        let (key, spoke) = (inner.next, Instant::now());
        let guest = Guest {
            peer,
            handle,
            said: 0,
            sent: 0,
            spoke,
            seen: 0,
            stirred: spoke,
        };
        inner.guests.insert(key, guest);
        Some(key)
    }

    /// Whether the connection is still a stranger's; one that has been quiet for too long is closed.
    fn still_guest(&self, key: u64) -> bool {
        let mut inner = self.inner();
        let Some(guest) = inner.guests.get_mut(&key) else {
            return false;
        };
        guest.look();
        if guest.spoke.elapsed() >= QUIET {
            guest.close(b"nothing was said");
        }
        true
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EndpointHooks for Gate {
    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        let peer = peer_id(connection.remote_id());
        if connection.side() == Side::Client || self.inner().members.contains(&peer) {
            connection.set_receive_window(WINDOW.into());
            return AfterHandshakeOutcome::accept();
        }
        let handle = connection.weak_handle();
        let closed = handle.closed();
        let Some(key) = self.admit(peer, handle) else {
            return AfterHandshakeOutcome::Reject {
                error_code: 4u32.into(),
                reason: b"too many connections".to_vec(),
            };
        };
        let gate = self.clone();
        tokio::spawn(async move {
            tokio::pin!(closed);
            while timeout(QUIET / 3, &mut closed).await.is_err() && gate.still_guest(key) {}
            gate.inner().guests.remove(&key);
        });
        AfterHandshakeOutcome::accept()
    }
}
