//! A relay of a run's own: iroh's relay server, for peers that no other can dial.
//!
//! It passes on what it cannot read, since connections are sealed from end to end, and knows who talks to whom and how much. It speaks
//! plain HTTP: behind a proxy that speaks TLS it has an `https` URL. It answers everyone who knows where it is; what it takes from
//! one peer in a second can be capped. Finding a way past address translation needs iroh's address discovery, which is part of a
//! relay with a certificate; through this one everything between such peers goes the long way.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use iroh_relay::server::{ClientRateLimit, RelayConfig, Server, ServerConfig};

use super::NetError;

/// Peers whose keys are remembered as valid.
const KEYS: usize = 1024;

/// A relay at work; dropping it ends it.
#[derive(Debug)]
pub struct RelayServer(Server);

impl RelayServer {
    /// Listens at `bind`, and takes at most `max_rate` bytes a second from one peer.
    ///
    /// # Errors
    /// [`NetError::PortTaken`], [`NetError::Bind`].
    pub async fn start(bind: SocketAddr, max_rate: Option<u64>) -> Result<Self, NetError> {
        // Asked first, because the server's own answer does not say what is wrong with the address.
        drop(std::net::TcpListener::bind(bind).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => NetError::PortTaken { address: bind },
            _ => NetError::Bind(error.to_string()),
        })?);
        let mut relay = RelayConfig::new(bind);
        relay.key_cache_capacity = Some(KEYS);
        let rate = max_rate.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX));
        relay.limits.client_rx = rate.and_then(NonZeroU32::new).map(ClientRateLimit::new);
        let mut config = ServerConfig::default();
        config.relay = Some(relay);
        let server = Server::spawn(config).await;
        server.map(Self).map_err(|error| NetError::Bind(error.to_string()))
    }

    /// Where it listens.
    pub fn addr(&self) -> Option<SocketAddr> {
        self.0.http_addr()
    }

    /// Says goodbye to everyone and ends.
    ///
    /// # Errors
    /// It had ended already, and why.
    pub async fn shutdown(self) -> Result<(), NetError> {
        self.0
            .shutdown()
            .await
            .map_err(|error| NetError::Bind(error.to_string()))
    }
}
