//! Counts the bytes of every connection, whichever protocol opened it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iroh::endpoint::{AfterHandshakeOutcome, Connection, EndpointHooks, WeakConnectionHandle};

/// The counter; clones count together.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Of connections that are closed.
    sent: u64,
    received: u64,
    next: u64,
    open: HashMap<u64, WeakConnectionHandle>,
}

impl Meter {
    /// Bytes of UDP payload sent and received so far, over connections whose handshake was completed.
    pub fn totals(&self) -> (u64, u64) {
        let counts = self.counts();
        let open = counts
            .open
            .values()
            .filter_map(WeakConnectionHandle::upgrade)
            .map(|connection| connection.stats());
        open.fold((counts.sent, counts.received), |(sent, received), stats| {
            (sent + stats.udp_tx.bytes, received + stats.udp_rx.bytes)
        })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EndpointHooks for Meter {
    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        let handle = connection.weak_handle();
        let closed = handle.closed();
        let key = {
            let mut counts = self.counts();
            counts.next += 1;
            let key = counts.next;
            counts.open.insert(key, handle);
            key
        };
        let meter = self.clone();
        tokio::spawn(async move {
            let closed = closed.await;
            let mut counts = meter.counts();
            counts.open.remove(&key);
            if let Some(closed) = closed {
                counts.sent += closed.stats.udp_tx.bytes;
                counts.received += closed.stats.udp_rx.bytes;
            }
        });
        AfterHandshakeOutcome::accept()
    }
}
