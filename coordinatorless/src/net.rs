//! The network of a peer, over iroh: links to members, gossip, questions, blobs. Everything comes in as a [`NetEvent`] on one
//! bounded channel; everything that goes out is a call on [`Net`].
//!
//! | file | what |
//! |---|---|
//! | `endpoint.rs` | the socket; who may be dialled through what |
//! | `book.rs` | who is reachable where, in signed cards that peers spread |
//! | `links.rs`, `queue.rs` | one connection per member, frames in order, a bounded queue each |
//! | `gossip.rs` | announcements to the whole run |
//! | `sync.rs`, `pool.rs` | questions and answers |
//! | `blobs.rs`, `blobs/pieces.rs`, `rate.rs` | contributions and snapshots by hash; long ones from many at once; bandwidth caps |
//! | `at_rest.rs` | blobs as a directory holds them, without a network |
//! | `gate.rs` | how many connections strangers may have, and how long in silence |
//! | `relay.rs` | a relay server of one's own |
//! | `meter.rs` | bytes sent and received |
//!
//! Nothing here knows what a frame means, and nothing received is believed: frames are handed on as bytes, lengths are checked
//! before anything is allocated for them, and whoever breaks a rule is named in [`NetEvent::Rejected`].

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iroh::address_lookup::MemoryLookup;
use iroh::protocol::Router;
use iroh::{Endpoint, EndpointAddr, SecretKey};
use iroh_gossip::net::Gossip;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::types::{Hash, PeerId, RunId};
use crate::wire::VERSION;

mod at_rest;
mod blobs;
mod book;
mod endpoint;
mod gate;
mod gossip;
mod links;
mod meter;
mod pool;
mod queue;
mod rate;
mod relay;
mod sync;

pub use at_rest::BlobsAtRest;
pub use blobs::{FetchCounters, FetchError};
pub(crate) use links::FRAME_HEADER;
pub use relay::RelayServer;
pub use sync::{Request, Response, SnapshotInfo, StatusInfo};

use blobs::Blobs;
use book::Book;
use gate::Gate;
use gossip::Announcer;
use links::Links;
use meter::Meter;
use pool::Pool;
use sync::Answerer;

/// Events waiting for the driver; when it is full, peers are held back.
const EVENTS: usize = 1024;

/// Which relays to use (`--relay`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Relay {
    /// None, and no address lookup either: direct addresses alone.
    #[default]
    None,
    /// iroh's public relays and address lookup.
    Default,
    /// A relay of one's own, and nothing else of what iroh runs: addresses come from tickets and from other peers.
    Url(String),
}

/// What a peer's network needs to know.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The peer's ed25519 secret key (R1).
    pub secret: [u8; 32],
    /// The run: peers of other runs are not understood.
    pub run: RunId,
    /// Where to listen; `None`: any port on all interfaces. Loopback runs pass `127.0.0.1:0`.
    pub bind: Option<SocketAddr>,
    /// Relays.
    pub relay: Relay,
    /// The peer's directory; blobs go to `<dir>/blobs`.
    pub dir: PathBuf,
    /// Most bytes of blobs sent per second.
    pub max_upload: Option<u64>,
    /// Most bytes of blobs received per second.
    pub max_download: Option<u64>,
    /// Addresses known beforehand: of the ticket, of earlier.
    pub known: Vec<EndpointAddr>,
}

/// Something that came from the network.
#[derive(Debug)]
pub enum NetEvent {
    /// A frame, unchecked.
    Frame {
        /// Who delivered it: the link's other end, or a gossip neighbour. Not necessarily its author.
        from: PeerId,
        /// At most [`wire::HEADER`](crate::wire::HEADER) + [`wire::MAX_RECORD`](crate::wire::MAX_RECORD) bytes.
        bytes: Bytes,
    },
    /// A link is up.
    Connected(PeerId),
    /// It is down.
    Disconnected(PeerId),
    /// Someone asks; dropping `reply` answers [`Response::Unknown`].
    Request {
        /// Who.
        from: PeerId,
        /// What.
        request: Request,
        /// Where the answer goes.
        reply: oneshot::Sender<Response>,
    },
    /// Someone broke a rule of the transport.
    Rejected {
        /// Who.
        from: PeerId,
        /// The kind of thing refused.
        kind: &'static str,
        /// Why.
        reason: String,
    },
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Another process listens there.
    #[error("port {} of {} is taken: stop the other process, or choose another with --bind", address.port(), address.ip())]
    PortTaken {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The socket could not be opened.
    #[error("the network could not be opened: {0}")]
    Bind(String),
    /// Not a relay.
    #[error("not the URL of a relay: {found:?}")]
    BadRelay {
        /// What was given.
        found: String,
    },
    /// Not an ed25519 key.
    #[error("{peer} is not the id of a peer")]
    NotAPeer {
        /// The id.
        peer: PeerId,
    },
    /// The blob store failed.
    #[error("blobs in {}: {reason}", folder.display())]
    Blobs {
        /// Its folder.
        folder: PathBuf,
        /// Why.
        reason: String,
    },
    /// Gossip failed.
    #[error("gossip: {0}")]
    Gossip(String),
    /// No answer in time.
    #[error("no answer from {} within {limit:?}", peer.short())]
    Timeout {
        /// Who was asked.
        peer: PeerId,
        /// How long.
        limit: Duration,
    },
    /// No connection, or a broken one.
    #[error("{} cannot be reached: {reason}", peer.short())]
    Unreachable {
        /// Who.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// An answer that breaks the rules.
    #[error("{} gave an answer that is refused: {reason}", peer.short())]
    BadAnswer {
        /// Who.
        peer: PeerId,
        /// Why.
        reason: String,
    },
}

/// What was lost on the way, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Frames dropped because a peer was too slow or not there.
    pub frames_dropped: u64,
    /// Times that gossip was missed because the driver was too slow.
    pub gossip_lagged: u64,
    /// Connections that strangers have opened here and that are open now.
    pub strangers: usize,
    /// What became of fetches.
    pub fetches: FetchCounters,
}

/// The network of a peer. Clones are the same network.
#[derive(Clone, Debug)]
pub struct Net {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    router: Router,
    gossip: Gossip,
    links: Links,
    announcer: Announcer,
    book: Arc<Book>,
    blobs: Blobs,
    questions: Pool,
    meter: Meter,
    gate: Gate,
    stop: CancellationToken,
}

impl Drop for Inner {
    /// Ends the tasks of a network that was not shut down; nothing is said to anyone.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Net {
    /// Opens the socket and starts to listen. The receiver must be drained, or peers are held back.
    ///
    /// # Errors
    /// [`NetError::PortTaken`], [`NetError::BadRelay`], [`NetError::Bind`], [`NetError::Blobs`].
    pub async fn start(config: NetConfig) -> Result<(Self, mpsc::Receiver<NetEvent>), NetError> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let stop = CancellationToken::new();
        let lookup = MemoryLookup::new();
        let book = Arc::new(Book::new(SecretKey::from_bytes(&config.secret), lookup.clone()));
        config.known.iter().cloned().for_each(|addr| book.know(addr));
        let meter = Meter::default();
        let gate = Gate::default();
        let endpoint = endpoint::bind(&config, lookup, &meter, &gate).await?;
        let blobs = match Blobs::open(&config, endpoint.clone()).await {
            Ok(blobs) => blobs,
            Err(error) => {
                endpoint.close().await;
                return Err(error);
            }
        };
        let gossip = Gossip::builder()
            .max_message_size(gossip::MAX_MESSAGE)
            .spawn(endpoint.clone());
        let (link_alpn, sync_alpn) = (alpn("link", config.run), alpn("sync", config.run));
        let links = Links::new(
            endpoint.clone(),
            link_alpn.clone(),
            book.clone(),
            events.clone(),
            stop.clone(),
        );
        let router = Router::builder(endpoint.clone())
            .accept(link_alpn, links.clone())
            .accept(&sync_alpn, Answerer::new(events.clone()))
            .accept(iroh_gossip::ALPN, gossip.clone())
            .accept(iroh_blobs::ALPN, blobs.protocol(config.max_upload))
            .spawn();
        let announcer = Announcer::start(
            endpoint.clone(),
            gossip.clone(),
            config.run,
            book.clone(),
            events,
            stop.clone(),
        );
        let questions = Pool::new(endpoint.clone(), sync_alpn);
        let inner = Inner {
            endpoint,
            router,
            gossip,
            links,
            announcer,
            book,
            blobs,
            questions,
            meter,
            gate,
            stop,
        };
        Ok((Self { inner: Arc::new(inner) }, receiver))
    }

    /// Who this is.
    pub fn id(&self) -> PeerId {
        endpoint::peer_id(self.inner.endpoint.id())
    }

    /// Where this peer can be dialled; waits at most two seconds for a first address.
    pub async fn addr(&self) -> EndpointAddr {
        endpoint::address(&self.inner.endpoint).await
    }

    /// Takes an address into the book. Signed ones, which peers spread by themselves, are not replaced.
    pub fn know(&self, addr: EndpointAddr) {
        self.inner.book.know(addr);
    }

    /// Every address in the book: worth keeping for the next start, and for tickets.
    pub fn known(&self) -> Vec<EndpointAddr> {
        self.inner.book.known()
    }

    /// Keeps a link to each of these, gossips with them, and drops what waits for others. This peer's own id is ignored.
    pub fn set_members(&self, members: Vec<PeerId>) {
        self.inner.gate.set_members(&members);
        self.inner.links.set_members(&members);
        let others: Vec<PeerId> = members.into_iter().filter(|&member| member != self.id()).collect();
        self.inner.announcer.set_members(&others);
    }

    /// Peers linked at this moment.
    pub fn connected(&self) -> Vec<PeerId> {
        self.inner.links.connected()
    }

    /// Peers to whom some connection is open at this moment: a link, or one for questions or blobs.
    pub fn reached(&self) -> HashSet<PeerId> {
        let asked = self.inner.questions.connected().into_iter();
        let blobs = self.inner.blobs.connected().into_iter();
        self.connected().into_iter().chain(asked).chain(blobs).collect()
    }

    /// Queues a frame for every member. Never waits; a slow peer loses its oldest frames (1024 frames or 16 MiB wait at most).
    pub fn broadcast(&self, frame: Bytes) {
        self.inner.links.broadcast(&frame);
    }

    /// Queues a frame for one peer; one that is no member is dialled for it, for ten seconds.
    pub fn send(&self, to: PeerId, frame: Bytes) {
        self.inner.links.send(to, frame);
    }

    /// Gossips a frame to the whole run; `false` if it is longer than an announcement may be (64 KiB less headers) or too many
    /// wait. Best effort: repeat what matters.
    pub fn announce(&self, frame: Bytes) -> bool {
        self.inner.announcer.announce(frame)
    }

    /// Asks one peer.
    ///
    /// # Errors
    /// [`NetError::Timeout`], [`NetError::Unreachable`], [`NetError::BadAnswer`].
    pub async fn request(&self, to: PeerId, request: Request, deadline: Duration) -> Result<Response, NetError> {
        sync::ask(&self.inner.questions, to, &request, deadline).await
    }

    /// Stores and serves bytes; returns their BLAKE3 hash.
    pub async fn put(&self, bytes: Bytes) -> Result<Hash, NetError> {
        self.inner.blobs.put(bytes).await
    }

    /// Stores and serves a file, by reference if it is large: then it must not change while it is retained.
    pub async fn put_file(&self, path: &Path) -> Result<Hash, NetError> {
        self.inner.blobs.put_file(path).await
    }

    /// Waits until what was stored so far would outlive this process: before it is promised to anyone.
    pub async fn flush_blobs(&self) -> Result<(), NetError> {
        self.inner.blobs.flush().await
    }

    /// A blob that is held in full.
    pub async fn get(&self, hash: Hash) -> Result<Option<Bytes>, NetError> {
        self.inner.blobs.get(hash).await
    }

    /// Whether a blob is held in full.
    pub async fn has(&self, hash: Hash) -> bool {
        self.inner.blobs.has(hash).await
    }

    /// Bytes held of a blob, verified: all of it, or what interrupted transfers left.
    pub async fn held(&self, hash: Hash) -> u64 {
        self.inner.blobs.held(hash).await
    }

    /// Fetches a blob of at most `max_len` bytes from `providers`: from the first that gives it, or, where it is longer than a shard,
    /// from up to eight at once. What an earlier attempt got is not fetched again.
    ///
    /// # Errors
    /// See [`FetchError`]; a blob that is too long is refused before any of it is taken.
    pub async fn fetch(
        &self,
        hash: Hash,
        max_len: u64,
        providers: Vec<PeerId>,
        deadline: Duration,
    ) -> Result<(), FetchError> {
        let others: Vec<PeerId> = providers.into_iter().filter(|&peer| peer != self.id()).collect();
        self.inner.blobs.fetch(hash, max_len, &others, deadline).await
    }

    /// Gets some ranges of chunks (1024 bytes each) of a blob of `len` bytes from the first provider that gives them, with the hashes that prove
    /// them, in the format of verified streaming. What has come stays and is served on.
    ///
    /// # Errors
    /// See [`FetchError`]; a blob of another length gives none.
    pub async fn fetch_ranges(
        &self,
        hash: Hash,
        len: u64,
        ranges: &[std::ops::Range<u64>],
        providers: &[PeerId],
        deadline: Duration,
    ) -> Result<Bytes, FetchError> {
        let others: Vec<PeerId> = providers.iter().copied().filter(|&peer| peer != self.id()).collect();
        self.inner
            .blobs
            .fetch_ranges(hash, len, ranges, &others, deadline)
            .await
    }

    /// These blobs are wanted; all others are garbage, collected within a minute, except what came in the last half of one.
    pub fn retain(&self, keep: HashSet<Hash>) {
        self.inner.blobs.retain(&keep);
    }

    /// Where blobs are stored.
    pub fn blobs_folder(&self) -> &Path {
        self.inner.blobs.folder()
    }

    /// Bytes that blobs take on disk.
    pub async fn disk_bytes(&self) -> u64 {
        self.inner.blobs.disk_bytes().await
    }

    /// Bytes sent and received since the start, over all connections.
    pub fn traffic(&self) -> (u64, u64) {
        self.inner.meter.totals()
    }

    /// What was lost on the way.
    pub fn counters(&self) -> NetCounters {
        NetCounters {
            frames_dropped: self.inner.links.dropped(),
            gossip_lagged: self.inner.announcer.lagged(),
            strangers: self.inner.gate.guests(),
            fetches: self.inner.blobs.counters(),
        }
    }

    /// Sends what waits for members (a second at most), then closes everything.
    pub async fn shutdown(&self) {
        self.inner.links.shutdown().await;
        self.inner.stop.cancel();
        if let Err(error) = self.inner.gossip.shutdown().await {
            tracing::debug!(%error, "gossip was already closed");
        }
        if let Err(error) = self.inner.router.shutdown().await {
            tracing::warn!(%error, "a protocol task failed");
        }
    }
}

/// The name of one of our protocols in one run. What is left out of messages on a link stands here.
fn alpn(protocol: &str, run: RunId) -> Vec<u8> {
    format!("murmur/{protocol}/{VERSION}/{run}").into_bytes()
}
