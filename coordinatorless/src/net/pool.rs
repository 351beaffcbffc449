//! Connections of one protocol, opened when first needed and used again while they live.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use iroh::Endpoint;
use iroh::endpoint::Connection;

use super::{NetError, endpoint::public_key};
use crate::types::PeerId;

/// Connections kept at most; dead ones are forgotten first.
const MAX_KEPT: usize = 256;

/// The pool.
#[derive(Debug)]
pub(super) struct Pool {
    endpoint: Endpoint,
    alpn: Vec<u8>,
    slots: Mutex<HashMap<PeerId, Arc<Slot>>>,
}

/// A peer's connection. Who wants one waits for whoever is dialling: a peer lets a stranger have only a few.
type Slot = tokio::sync::Mutex<Option<Connection>>;

impl Pool {
    /// A pool for the protocol named by `alpn`.
    pub fn new(endpoint: Endpoint, alpn: Vec<u8>) -> Self {
        Self {
            endpoint,
            alpn,
            slots: Mutex::default(),
        }
    }

    /// A live connection to `peer`, opened within `limit`.
    pub async fn get(&self, peer: PeerId, limit: Duration) -> Result<Connection, NetError> {
        let slot = self.slot(peer);
        let opened = tokio::time::timeout(limit, async {
            let mut slot = slot.lock().await;
            if let Some(connection) = slot.as_ref().filter(|open| open.close_reason().is_none()) {
                return Ok(connection.clone());
            }
            let dialled = self.endpoint.connect(public_key(peer)?, &self.alpn).await;
            let connection = dialled.map_err(|error| NetError::Unreachable {
                peer,
                reason: error.to_string(),
            })?;
            Ok(slot.insert(connection).clone())
        });
        opened.await.unwrap_or(Err(NetError::Timeout { peer, limit }))
    }

    /// Peers with an open connection.
    pub fn connected(&self) -> Vec<PeerId> {
        let open = |(peer, slot): (&PeerId, &Arc<Slot>)| is_open(slot).then_some(*peer);
        self.slots().iter().filter_map(open).collect()
    }

    fn slot(&self, peer: PeerId) -> Arc<Slot> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&peer) {
            return slot.clone();
        }
        if slots.len() >= MAX_KEPT {
            // Whoever dials or waits holds a second reference.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || is_open(slot));
        }
        let slot = Arc::<Slot>::default();
        if slots.len() < MAX_KEPT {
            slots.insert(peer, slot.clone());
        }
        slot
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<PeerId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_open(slot: &Slot) -> bool {
    let connection = slot.try_lock();
    connection.is_ok_and(|slot| slot.as_ref().is_some_and(|open| open.close_reason().is_none()))
}
