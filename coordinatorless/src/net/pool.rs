//! Connections of one protocol, opened when first needed and used again while they live.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
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
    open: Mutex<HashMap<PeerId, Connection>>,
}

impl Pool {
    /// A pool for the protocol named by `alpn`.
    pub fn new(endpoint: Endpoint, alpn: Vec<u8>) -> Self {
        Self {
            endpoint,
            alpn,
            open: Mutex::default(),
        }
    }

    /// A live connection to `peer`, opened within `limit`.
    pub async fn get(&self, peer: PeerId, limit: Duration) -> Result<Connection, NetError> {
        let kept = self
            .open()
            .get(&peer)
            .filter(|connection| connection.close_reason().is_none())
            .cloned();
        if let Some(connection) = kept {
            return Ok(connection);
        }
        let connection = tokio::time::timeout(limit, self.endpoint.connect(public_key(peer)?, &self.alpn))
            .await
            .map_err(|_| NetError::Timeout { peer, limit })?
            .map_err(|error| NetError::Unreachable {
                peer,
                reason: error.to_string(),
            })?;
        let mut open = self.open();
        if open.len() >= MAX_KEPT {
            open.retain(|_, connection| connection.close_reason().is_none());
        }
        if open.len() < MAX_KEPT {
            open.insert(peer, connection.clone());
        }
        Ok(connection)
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<PeerId, Connection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
