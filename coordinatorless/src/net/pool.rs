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
#[derive(Debug, Default)]
struct Slot {
    open: Mutex<Option<Connection>>,
    dialling: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    fn open(&self) -> Option<Connection> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.as_ref().filter(|open| open.close_reason().is_none()).cloned()
    }
}

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
        if let Some(open) = slot.open() {
            return Ok(open);
        }
        let opened = tokio::time::timeout(limit, async {
            let turn = slot.dialling.clone().lock_owned().await;
            if let Some(open) = slot.open() {
                return Ok(open);
            }
            let (endpoint, alpn, key, slot) = (
                self.endpoint.clone(),
                self.alpn.clone(),
                public_key(peer)?,
                slot.clone(),
            );
            // It goes on for those who wait when whoever began it has no time left.
            let dialled = tokio::spawn(async move {
                let _turn = turn;
                let dialled = tokio::time::timeout(limit, endpoint.connect(key, &alpn)).await;
                let connection = dialled
                    .map_err(|error| error.to_string())?
                    .map_err(|error| error.to_string())?;
                *slot.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.clone());
                Ok(connection)
            });
            let dialled = dialled.await.unwrap_or_else(|error| Err(error.to_string()));
            dialled.map_err(|reason| NetError::Unreachable { peer, reason })
        });
        opened.await.unwrap_or(Err(NetError::Timeout { peer, limit }))
    }

    /// Peers with an open connection.
    pub fn connected(&self) -> Vec<PeerId> {
        let open = |(peer, slot): (&PeerId, &Arc<Slot>)| slot.open().map(|_| *peer);
        self.slots().iter().filter_map(open).collect()
    }

    fn slot(&self, peer: PeerId) -> Arc<Slot> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&peer) {
            return slot.clone();
        }
        if slots.len() >= MAX_KEPT {
            // Whoever dials or waits holds a second reference.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.open().is_some());
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
