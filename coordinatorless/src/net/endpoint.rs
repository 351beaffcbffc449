//! The iroh endpoint: one UDP socket for everything, dialled by public key.
//!
//! With [`Relay::None`] nothing but the given socket is used: no relay, no address lookup, no port mapping. Such an endpoint never
//! waits for being "online", which it never will be. With a relay of one's own, that relay is used too, and nothing else.
//!
//! Whoever comes back is looked for where it was last met. So a peer that was not given a port takes the one it had before, if that is
//! still free: a whole run that was switched off finds itself again by the addresses that its peers remember.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use iroh::address_lookup::MemoryLookup;
use iroh::endpoint::{BindError, BindOpts, Builder, PortmapperConfig, QuicTransportConfig, VarInt, presets};
use iroh::{Endpoint, EndpointAddr, PublicKey, RelayConfig, RelayMode, RelayUrl, SecretKey, TransportAddr};
use iroh_relay::RelayQuicConfig;

use super::gate::{self, Gate};
use super::meter::Meter;
use super::{NetConfig, NetError, Relay};
use crate::types::PeerId;

/// A connection that says nothing for this long is gone.
const IDLE: Duration = Duration::from_secs(5);
/// What keeps a silent but living connection from being idle.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long [`address`] waits for the first direct address.
const FIRST_ADDRESS: Duration = Duration::from_secs(2);

/// The file in a peer's directory that names the port it had.
const PORT: &str = "port";

/// The key behind a peer's id.
pub(super) fn public_key(peer: PeerId) -> Result<PublicKey, NetError> {
    PublicKey::from_bytes(&peer.0).map_err(|_| NetError::NotAPeer { peer })
}

/// The id behind a key.
pub(super) fn peer_id(key: PublicKey) -> PeerId {
    PeerId(*key.as_bytes())
}

/// Binds the endpoint: where it was told to, else on the port it had before, else on any.
///
/// # Errors
/// [`NetError::PortTaken`] where another process has the port, [`NetError::BadRelay`] for a relay that is no URL.
pub(super) async fn bind(
    config: &NetConfig,
    lookup: MemoryLookup,
    meter: &Meter,
    gate: &Gate,
) -> Result<Endpoint, NetError> {
    let file = config.dir.join(PORT);
    let chosen = config.bind.map_or(0, |address| address.port());
    if let Some(port) = last_port(&file).filter(|_| chosen == 0) {
        let again = builder(config, lookup.clone(), port)?
            .hooks(meter.clone())
            .hooks(gate.clone());
        let again = again.bind().await;
        match again {
            Ok(endpoint) => return Ok(endpoint),
            Err(error) => tracing::info!(port, %error, "the port of last time is not to be had; taking another"),
        }
    }
    let builder = builder(config, lookup, chosen)?
        .hooks(meter.clone())
        .hooks(gate.clone());
    let bound = builder.bind().await;
    let endpoint = bound.map_err(|error| explain(error, config.bind))?;
    let port = endpoint
        .bound_sockets()
        .iter()
        .find(|at| at.is_ipv4() || config.bind.is_some())
        .map(SocketAddr::port);
    if let Some(Err(error)) = port.map(|port| std::fs::write(&file, port.to_string())) {
        tracing::warn!(%error, "the port could not be written down; the next start takes another");
    }
    Ok(endpoint)
}

fn last_port(file: &Path) -> Option<u16> {
    let text = std::fs::read_to_string(file).ok()?;
    text.trim().parse().ok().filter(|port| *port > 0)
}

/// An endpoint to be bound to `port` (0: any), on the address given or on all.
fn builder(config: &NetConfig, lookup: MemoryLookup, port: u16) -> Result<Builder, NetError> {
    let idle = VarInt::from_u32(IDLE.as_millis() as u32);
    let transport = QuicTransportConfig::builder()
        .max_idle_timeout(Some(idle.into()))
        .keep_alive_interval(KEEP_ALIVE)
        .default_path_max_idle_timeout(IDLE)
        .default_path_keep_alive_interval(KEEP_ALIVE)
        .receive_window(gate::GUEST_WINDOW.into())
        .build();
    let builder = match &config.relay {
        Relay::None => Endpoint::builder(presets::Minimal)
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled),
        Relay::Default => Endpoint::builder(presets::N0),
        Relay::Url(url) => {
            let relay: RelayUrl = url.parse().map_err(|_| NetError::BadRelay { found: url.clone() })?;
            // Without TLS there is no address discovery to ask.
            let quic = (relay.scheme() == "https").then(RelayQuicConfig::default);
            Endpoint::builder(presets::Minimal)
                .relay_mode(RelayMode::Custom(RelayConfig::new(relay, quic).into()))
                .portmapper_config(PortmapperConfig::Disabled)
        }
    };
    let builder = builder
        .secret_key(SecretKey::from_bytes(&config.secret))
        .transport_config(transport)
        .address_lookup(lookup);
    let bound = match config.bind {
        Some(address) => builder
            .clear_ip_transports()
            .bind_addr(SocketAddr::new(address.ip(), port)),
        // IPv6 may be missing, as without a port of one's own.
        None => builder.bind_addr((Ipv4Addr::UNSPECIFIED, port)).and_then(|builder| {
            let optional = BindOpts::default().set_is_required(false);
            builder.bind_addr_with_opts((Ipv6Addr::UNSPECIFIED, port), optional)
        }),
    };
    bound.map_err(|error| NetError::Bind(error.to_string()))
}

fn explain(error: BindError, bind: Option<SocketAddr>) -> NetError {
    let in_use = match &error {
        BindError::Sockets { source, .. } | BindError::CreateQuicEndpoint { source, .. } => in_use(source),
        _ => false,
    };
    match bind {
        Some(address) if in_use => NetError::PortTaken { address },
        _ => NetError::Bind(error.to_string()),
    }
}

/// Whether "address in use" stands anywhere in the chain of causes.
fn in_use(error: &std::io::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// This endpoint's address as others can dial it: direct addresses at once, the relay's once it is known. Waits at most two
/// seconds for the first of them.
pub(super) async fn address(endpoint: &Endpoint) -> EndpointAddr {
    let deadline = tokio::time::Instant::now() + FIRST_ADDRESS;
    loop {
        let mut addr = endpoint.addr();
        addr.addrs.extend(
            endpoint
                .bound_sockets()
                .into_iter()
                .filter(|bound| !bound.ip().is_unspecified())
                .map(TransportAddr::Ip),
        );
        if !addr.addrs.is_empty() || tokio::time::Instant::now() >= deadline {
            return addr;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
