//! Direct links to members: votes, proposals, commits and heartbeats go over these.
//!
//! One QUIC connection per pair, one long-lived stream each way, frames in order behind a length. Both sides dial, with growing
//! pauses; should two connections be made at once, both keep the one dialled by the smaller id, so that they agree without a word.
//! Otherwise the newest wins: who dials again has lost the old one.
//!
//! ```text
//! frame = length u32 LE | kind u8 (0 message, 1 address card) | bytes
//! ```
//! Reading a frame waits for the driver, which is what holds back a peer that sends too much; writing never waits for anyone but
//! the one peer that the queue is for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use iroh::Endpoint;
use iroh::endpoint::{Connection, RecvStream, SendStream};
use iroh::protocol::{AcceptError, ProtocolHandler};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::NetEvent;
use super::book::{Book, MAX_CARD};
use super::endpoint::{address, peer_id, public_key};
use super::queue::{Kind, Queue};
use crate::types::PeerId;
use crate::wire::{HEADER, MAX_RECORD};

/// Bytes before each frame.
pub(crate) const FRAME_HEADER: usize = 5;
/// The longest message on a link.
pub(super) const MAX_FRAME: usize = HEADER + MAX_RECORD;
/// Most peers linked or waited for; further strangers are turned away.
const MAX_LINKS: usize = 256;
/// First and longest pause between dials.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long one dial may take.
const DIAL: Duration = Duration::from_secs(4);
/// How long the rest of a frame may take once it has begun, either way.
const FRAME: Duration = Duration::from_secs(30);
/// Connections made within this time of each other were dialled at once.
const AT_ONCE: Duration = Duration::from_secs(3);
/// How long a connection that lost to another is still read.
const GRACE: Duration = Duration::from_secs(4);
/// How long a shutdown may take to send what waits.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long a stranger is dialled for what is sent to it.
const STRANGER: Duration = Duration::from_secs(10);
/// How much is read at a time, so that memory grows with what arrives and not with what is announced.
const CHUNK: usize = 64 << 10;

/// All links of this peer. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Links {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoint: Endpoint,
    me: PeerId,
    alpn: Vec<u8>,
    book: Arc<Book>,
    events: mpsc::Sender<NetEvent>,
    links: Mutex<BTreeMap<PeerId, Arc<Link>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Tells writers to send what waits, and end.
    drain: CancellationToken,
    writers: TaskTracker,
    dropped: AtomicU64,
    serial: AtomicU64,
}

/// One peer.
#[derive(Debug)]
struct Link {
    peer: PeerId,
    queue: Queue,
    member: AtomicBool,
    dialling: AtomicBool,
    /// Dial a stranger until then.
    until: Mutex<Option<Instant>>,
    current: Mutex<Option<Current>>,
    lost: Notify,
    /// What the driver was last told: whether there is a connection.
    told: tokio::sync::Mutex<bool>,
}

/// The connection written to.
#[derive(Debug)]
struct Current {
    connection: Connection,
    dialled: bool,
    since: Instant,
    serial: u64,
    /// Tells the writer to leave the queue to its successor.
    retire: CancellationToken,
}

impl Link {
    fn new(peer: PeerId) -> Self {
        Self {
            peer,
            queue: Queue::default(),
            member: AtomicBool::new(false),
            dialling: AtomicBool::new(false),
            until: Mutex::default(),
            current: Mutex::default(),
            lost: Notify::new(),
            told: tokio::sync::Mutex::default(),
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self) -> bool {
        self.current().is_some()
    }

    fn wanted(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        self.member.load(Ordering::Relaxed) || until.is_some_and(|until| Instant::now() < until)
    }
}

impl Links {
    /// Links for the endpoint; `alpn` names protocol, version and run.
    pub fn new(
        endpoint: Endpoint,
        alpn: Vec<u8>,
        book: Arc<Book>,
        events: mpsc::Sender<NetEvent>,
        stop: CancellationToken,
    ) -> Self {
        let me = peer_id(endpoint.id());
        let shared = Shared {
            endpoint,
            me,
            alpn,
            book,
            events,
            links: Mutex::default(),
            stop,
            tasks: TaskTracker::new(),
            drain: CancellationToken::new(),
            writers: TaskTracker::new(),
            dropped: AtomicU64::new(0),
            serial: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Keeps a connection to each of these, and to no one else; frames waiting for others are dropped.
    pub fn set_members(&self, members: &[PeerId]) {
        let mut links = self.shared.links();
        for link in links.values().filter(|link| !members.contains(&link.peer)) {
            if link.member.swap(false, Ordering::Relaxed) {
                link.queue.clear();
                self.shared.close_if_dialled(link);
            }
        }
        links.retain(|_, link| link.wanted() || link.connected() || members.contains(&link.peer));
        for &peer in members.iter().filter(|&&peer| peer != self.shared.me) {
            let link = links.entry(peer).or_insert_with(|| Arc::new(Link::new(peer)));
            link.member.store(true, Ordering::Relaxed);
            self.shared.dial(link);
        }
    }

    /// Queues a message for every member.
    pub fn broadcast(&self, frame: &Bytes) {
        for link in self
            .shared
            .links()
            .values()
            .filter(|link| link.member.load(Ordering::Relaxed))
        {
            self.shared.push(link, Kind::Message, frame.clone());
        }
    }

    /// Queues a message for one peer; a stranger is dialled for it.
    pub fn send(&self, peer: PeerId, frame: Bytes) {
        let mut links = self.shared.links();
        let full = links.len() >= MAX_LINKS && !links.contains_key(&peer);
        if full || peer == self.shared.me {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let link = links.entry(peer).or_insert_with(|| Arc::new(Link::new(peer)));
        *link.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + STRANGER);
        self.shared.push(link, Kind::Message, frame);
        self.shared.dial(link);
    }

    /// Peers linked at this moment.
    pub fn connected(&self) -> Vec<PeerId> {
        self.shared
            .links()
            .values()
            .filter(|link| link.connected())
            .map(|link| link.peer)
            .collect()
    }

    /// Frames dropped because a queue was full or nobody was there.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Sends what waits (for [`GOODBYE`] at most), closes every link and waits for the tasks.
    pub async fn shutdown(&self) {
        self.shared.drain.cancel();
        self.shared.writers.close();
        let _ = timeout(GOODBYE, self.shared.writers.wait()).await;
        self.shared.stop.cancel();
        for link in self.shared.links().values() {
            if let Some(current) = link.current().take() {
                current.connection.close(0u32.into(), b"goodbye");
            }
        }
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl ProtocolHandler for Links {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let peer = peer_id(connection.remote_id());
        let link = {
            let mut links = self.shared.links();
            if self.shared.stop.is_cancelled() || (links.len() >= MAX_LINKS && !links.contains_key(&peer)) {
                connection.close(2u32.into(), b"too many peers");
                return Ok(());
            }
            links.entry(peer).or_insert_with(|| Arc::new(Link::new(peer))).clone()
        };
        self.shared.adopt(&link, connection.clone(), false).await;
        connection.closed().await;
        Ok(())
    }
}

impl Shared {
    fn links(&self) -> MutexGuard<'_, BTreeMap<PeerId, Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, link: &Link, kind: Kind, frame: Bytes) {
        if frame.len() > MAX_FRAME {
            tracing::error!(bytes = frame.len(), "a frame over the limit was not sent");
            return;
        }
        self.dropped.fetch_add(link.queue.push(kind, frame), Ordering::Relaxed);
    }

    fn close_if_dialled(&self, link: &Link) {
        if let Some(current) = link.current().as_ref().filter(|current| current.dialled) {
            current.connection.close(0u32.into(), b"no longer a member");
        }
    }

    /// Starts dialling, unless that is going on. The caller holds the map's lock, as does the end of [`Shared::dialler`].
    fn dial(self: &Arc<Self>, link: &Arc<Link>) {
        if !link.dialling.swap(true, Ordering::Relaxed) {
            self.tasks.spawn(
                self.stop
                    .clone()
                    .run_until_cancelled_owned(dialler(self.clone(), link.clone())),
            );
        }
    }

    /// Takes a new connection into use, or keeps it for reading only if another is to be used (see the module's doc).
    async fn adopt(self: &Arc<Self>, link: &Arc<Link>, connection: Connection, dialled: bool) {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let retire = CancellationToken::new();
        let used = {
            let mut current = link.current();
            let at_once = current
                .as_ref()
                .is_some_and(|now| now.dialled != dialled && now.since.elapsed() < AT_ONCE);
            let by_smaller = dialled == (self.me < link.peer);
            let used = !at_once || by_smaller;
            if used {
                let since = Instant::now();
                let next = Current {
                    connection: connection.clone(),
                    dialled,
                    since,
                    serial,
                    retire: retire.clone(),
                };
                if let Some(last) = current.replace(next) {
                    last.retire.cancel();
                    self.close_later(last.connection);
                }
            }
            used
        };
        if used {
            for card in self.cards().await {
                self.push(link, Kind::Card, card);
            }
            self.writers
                .spawn(write(connection.clone(), link.clone(), retire, self.drain.clone()));
        } else {
            self.close_later(connection.clone());
        }
        self.tasks.spawn(read(self.clone(), link.clone(), connection, serial));
        self.tell_state(link).await;
    }

    /// Tells the driver that a link is up or down, if it was told otherwise; in the order in which it happened.
    async fn tell_state(&self, link: &Link) {
        let mut told = link.told.lock().await;
        let connected = link.connected();
        if *told != connected {
            *told = connected;
            let event = if connected {
                NetEvent::Connected(link.peer)
            } else {
                NetEvent::Disconnected(link.peer)
            };
            self.tell(event).await;
        }
    }

    async fn cards(&self) -> Vec<Bytes> {
        let own = self.book.own_card(&address(&self.endpoint).await);
        std::iter::once(own).chain(self.book.cards()).map(Bytes::from).collect()
    }

    fn close_later(&self, connection: Connection) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let _ = timeout(GRACE, stop.cancelled()).await;
            connection.close(0u32.into(), b"another connection is used");
        });
    }

    async fn tell(&self, event: NetEvent) {
        // The driver has gone when nobody receives: then nobody is to be told.
        let _ = self.stop.run_until_cancelled(self.events.send(event)).await;
    }

    /// A connection ended.
    async fn lost(&self, link: &Link, serial: u64) {
        let was_used = link.current().take_if(|current| current.serial == serial);
        let Some(current) = was_used else { return };
        current.retire.cancel();
        link.lost.notify_waiters();
        {
            let mut links = self.links();
            if !link.wanted() && !link.connected() {
                links.remove(&link.peer);
            }
        }
        self.tell_state(link).await;
    }
}

/// Keeps a wanted peer connected.
async fn dialler(shared: Arc<Shared>, link: Arc<Link>) {
    let mut pause = BACKOFF.0;
    if link.peer < shared.me {
        // The smaller id dials first: most often the other need not dial at all.
        tokio::time::sleep(BACKOFF.0 / 2).await;
    }
    loop {
        if link.connected() {
            pause = BACKOFF.0;
            let _ = timeout(Duration::from_secs(1), link.lost.notified()).await;
        } else if let Some(connection) = dial_once(&shared, link.peer).await {
            shared.adopt(&link, connection, true).await;
        } else {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
        let mut links = shared.links();
        if !link.wanted() {
            link.dialling.store(false, Ordering::Relaxed);
            if !link.connected() {
                links.remove(&link.peer);
            }
            return;
        }
    }
}

async fn dial_once(shared: &Shared, peer: PeerId) -> Option<Connection> {
    let key = public_key(peer).ok()?;
    match timeout(DIAL, shared.endpoint.connect(key, &shared.alpn)).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::debug!(peer = %peer.short(), %error, "dial failed");
            None
        }
        Err(_) => None,
    }
}

/// Writes the queue's frames until the connection ends, another is used, or there is no time left for more than what waits.
async fn write(connection: Connection, link: Arc<Link>, retire: CancellationToken, drain: CancellationToken) {
    let Ok(mut stream) = connection.open_uni().await else {
        return;
    };
    loop {
        let next = tokio::select! {
            () = retire.cancelled() => break,
            _ = connection.closed() => return,
            () = drain.cancelled() => link.queue.try_pop(),
            frame = link.queue.pop() => Some(frame),
        };
        let Some((kind, frame)) = next else { break };
        match timeout(FRAME, write_frame(&mut stream, kind, frame)).await {
            Ok(Ok(())) => {}
            // A peer that takes nothing for that long is as good as gone.
            _ => return connection.close(3u32.into(), b"too slow"),
        }
    }
    if stream.finish().is_ok() {
        // Closing the connection would throw away what is not acknowledged yet.
        let _ = timeout(GOODBYE, stream.stopped()).await;
    }
}

async fn write_frame(stream: &mut SendStream, kind: Kind, frame: Bytes) -> Result<(), iroh::endpoint::WriteError> {
    let mut header = [kind as u8; FRAME_HEADER];
    header[..4].copy_from_slice(&(frame.len() as u32).to_le_bytes());
    stream
        .write_all_chunks(&mut [Bytes::copy_from_slice(&header), frame])
        .await
}

/// Why reading stopped.
enum ReadEnd {
    /// The stream or the connection ended.
    Closed,
    /// The peer broke the rules.
    Rejected(&'static str, String),
}

/// Reads frames until the connection ends; one stream at a time, so that one frame at most is held for a peer.
async fn read(shared: Arc<Shared>, link: Arc<Link>, connection: Connection, serial: u64) {
    while let Ok(mut stream) = connection.accept_uni().await {
        if let ReadEnd::Rejected(kind, reason) = read_stream(&shared, &link, &mut stream).await {
            connection.close(1u32.into(), reason.as_bytes());
            shared
                .tell(NetEvent::Rejected {
                    from: link.peer,
                    kind,
                    reason,
                })
                .await;
        }
    }
    shared.lost(&link, serial).await;
}

async fn read_stream(shared: &Shared, link: &Link, stream: &mut RecvStream) -> ReadEnd {
    loop {
        let (kind, frame) = match read_frame(stream).await {
            Ok(frame) => frame,
            Err(end) => return end,
        };
        match kind {
            Kind::Message => {
                shared
                    .tell(NetEvent::Frame {
                        from: link.peer,
                        bytes: frame,
                    })
                    .await
            }
            Kind::Card => {
                if let Err(reason) = shared.book.learn(&frame) {
                    return ReadEnd::Rejected("address", reason);
                }
            }
        }
        if shared.stop.is_cancelled() {
            return ReadEnd::Closed;
        }
    }
}

async fn read_frame(stream: &mut RecvStream) -> Result<(Kind, Bytes), ReadEnd> {
    let mut header = [0; FRAME_HEADER];
    stream.read_exact(&mut header).await.map_err(|_| ReadEnd::Closed)?;
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let (kind, limit) = match header[4] {
        0 => (Kind::Message, MAX_FRAME),
        1 => (Kind::Card, MAX_CARD),
        found => return Err(ReadEnd::Rejected("frame", format!("unknown kind of frame: {found}"))),
    };
    if length > limit {
        let reason = format!("oversized: expected at most {limit} bytes, found {length}");
        return Err(ReadEnd::Rejected("frame", reason));
    }
    let body = timeout(FRAME, read_body(stream, length)).await;
    body.map_err(|_| ReadEnd::Rejected("frame", format!("not complete within {FRAME:?}")))?
        .map(|body| (kind, body))
}

async fn read_body(stream: &mut RecvStream, length: usize) -> Result<Bytes, ReadEnd> {
    let mut body = BytesMut::with_capacity(length.min(CHUNK));
    while body.len() < length {
        let chunk = stream.read_chunk((length - body.len()).min(CHUNK)).await;
        let chunk = chunk.ok().flatten().ok_or(ReadEnd::Closed)?;
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}
