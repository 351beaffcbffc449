//! Announcements by gossip: what even those should hear to whom there is no link. The topic is the run.
//!
//! Gossip is best effort: a message may be lost, or come late, or twice; what matters is repeated by its author. Three traps of
//! `iroh-gossip` are met here: a subscriber that lags is closed (so we subscribe again); a partition that outlasts the idle
//! time never heals by itself (so a member that is no neighbour is asked again from time to time); and a peer has room for five neighbours, so
//! that one more puts another out, who looks for one more itself. So only those who have few ask for more: when everyone asked for everyone,
//! sixteen peers did nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use iroh::{Endpoint, PublicKey};
use iroh_gossip::api::{Event, GossipReceiver, GossipSender};
use iroh_gossip::net::Gossip;
use iroh_gossip::proto::TopicId;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::book::Book;
use super::endpoint::{address, peer_id, public_key};
use super::queue::Kind;
use super::{NetError, NetEvent};
use crate::types::{PeerId, RunId};

/// The longest announcement, headers of the gossip protocol included.
pub(super) const MAX_MESSAGE: usize = 64 << 10;
/// The longest frame in one: room for our kind byte and the gossip protocol's headers.
pub(super) const MAX_ANNOUNCEMENT: usize = MAX_MESSAGE - 128;
/// Announcements waiting to go out.
const WAITING: usize = 256;
/// Whoever has fewer neighbours than this asks for more: below the five that `iroh-gossip` has room for, so that asking ends.
const FEW: usize = 3;
/// How often it is looked whether they are few.
const LOOK: Duration = Duration::from_secs(10);
/// One member that is no neighbour is asked this often even so: it may be in another part of a network that was cut.
const MEND: Duration = Duration::from_secs(120);
/// How often a peer tells everyone its address at most, when it has new neighbours; these are told at once.
const CARD: Duration = Duration::from_secs(30);

/// The run's topic.
#[derive(Debug)]
pub(super) struct Announcer {
    outbox: mpsc::Sender<(Kind, Bytes)>,
    members: watch::Sender<Vec<PublicKey>>,
    lagged: Arc<AtomicU64>,
}

struct Actor {
    endpoint: Endpoint,
    gossip: Gossip,
    topic: TopicId,
    book: Arc<Book>,
    events: mpsc::Sender<NetEvent>,
    outbox: mpsc::Receiver<(Kind, Bytes)>,
    members: watch::Receiver<Vec<PublicKey>>,
    lagged: Arc<AtomicU64>,
}

impl Announcer {
    /// Joins the run's topic; the actor runs until `stop`.
    pub fn start(
        endpoint: Endpoint,
        gossip: Gossip,
        run: RunId,
        book: Arc<Book>,
        events: mpsc::Sender<NetEvent>,
        stop: CancellationToken,
    ) -> Self {
        let (outbox, outbox_receiver) = mpsc::channel(WAITING);
        let (members, members_receiver) = watch::channel(Vec::new());
        let lagged = Arc::new(AtomicU64::new(0));
        let topic = TopicId::from_bytes(run.0);
        let actor = Actor {
            endpoint,
            gossip,
            topic,
            book,
            events,
            outbox: outbox_receiver,
            members: members_receiver,
            lagged: lagged.clone(),
        };
        tokio::spawn(stop.run_until_cancelled_owned(actor.run()));
        Self {
            outbox,
            members,
            lagged,
        }
    }

    /// Whom to gossip with first.
    pub fn set_members(&self, members: &[PeerId]) {
        let keys: Vec<PublicKey> = members.iter().filter_map(|&peer| public_key(peer).ok()).collect();
        self.members.send_if_modified(|known| {
            let changed = *known != keys;
            *known = keys;
            changed
        });
    }

    /// Announces a frame; `false` if it is over the limit or too many wait.
    pub fn announce(&self, frame: Bytes) -> bool {
        frame.len() <= MAX_ANNOUNCEMENT && self.outbox.try_send((Kind::Message, frame)).is_ok()
    }

    /// How often announcements were missed because the driver was too slow.
    pub fn lagged(&self) -> u64 {
        self.lagged.load(Ordering::Relaxed)
    }
}

impl Actor {
    async fn run(mut self) {
        loop {
            if let Err(error) = self.subscription().await {
                tracing::debug!(%error, "gossip subscription ended");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// One subscription, until it ends.
    async fn subscription(&mut self) -> Result<(), NetError> {
        let first = some(self.members.borrow_and_update().clone(), FEW);
        let topic = self
            .gossip
            .subscribe(self.topic, first)
            .await
            .map_err(|error| NetError::Gossip(error.to_string()))?;
        let (sender, mut receiver) = topic.split();
        let mut look = tokio::time::interval(LOOK);
        let mut mend = tokio::time::interval_at(Instant::now() + MEND, MEND);
        let mut told = None;
        loop {
            tokio::select! {
                event = receiver.next() => match event {
                    Some(Ok(event)) => self.received(event, &sender, &mut told).await,
                    Some(Err(error)) => return Err(NetError::Gossip(error.to_string())),
                    None => return Ok(()),
                },
                Some((kind, frame)) = self.outbox.recv() => send(&sender, kind, &frame).await?,
                Ok(()) = self.members.changed() => {
                    self.members.mark_unchanged();
                    join(&sender, self.lacking(&receiver)).await?;
                }
                _ = look.tick() => join(&sender, self.lacking(&receiver)).await?,
                _ = mend.tick() => join(&sender, self.absent(&receiver, 1)).await?,
            }
        }
    }

    /// Members that are no neighbours: as many as there are too few of.
    fn lacking(&self, receiver: &GossipReceiver) -> Vec<PublicKey> {
        self.absent(receiver, FEW.saturating_sub(receiver.neighbors().count()))
    }

    /// Up to `count` members that are no neighbours, drawn anew each time.
    fn absent(&self, receiver: &GossipReceiver, count: usize) -> Vec<PublicKey> {
        let neighbors: Vec<PublicKey> = receiver.neighbors().collect();
        let mut absent = self.members.borrow().clone();
        absent.retain(|member| !neighbors.contains(member));
        some(absent, count)
    }

    /// `told` is when everyone was last told this peer's address.
    async fn received(&self, event: Event, sender: &GossipSender, told: &mut Option<Instant>) {
        match event {
            Event::Received(message) => self.deliver(peer_id(message.delivered_from), message.content).await,
            Event::Lagged => {
                self.lagged.fetch_add(1, Ordering::Relaxed);
            }
            Event::NeighborUp(_) => {
                let card = self.book.own_card(&address(&self.endpoint).await);
                let everyone = told.is_none_or(|at| at.elapsed() >= CARD);
                let sent = if everyone {
                    *told = Some(Instant::now());
                    send(sender, Kind::Card, &card).await
                } else {
                    send_to_neighbors(sender, Kind::Card, &card).await
                };
                if let Err(error) = sent {
                    tracing::debug!(%error, "own address not announced");
                }
            }
            Event::NeighborDown(_) => {}
        }
    }

    async fn deliver(&self, from: PeerId, mut content: Bytes) {
        let refuse = |kind, reason| NetEvent::Rejected { from, kind, reason };
        let event = match content.split_first() {
            Some((0, _)) => Some(NetEvent::Frame {
                from,
                bytes: content.split_off(1),
            }),
            Some((1, card)) => self.book.learn(card).err().map(|reason| refuse("address", reason)),
            Some((kind, _)) => Some(refuse("announcement", format!("unknown kind: {kind}"))),
            None => Some(refuse("announcement", "empty".to_owned())),
        };
        if let Some(event) = event {
            // Nobody receives any more when the driver has gone.
            let _ = self.events.send(event).await;
        }
    }
}

/// `count` of these, drawn at random; all, if there are no more.
fn some(mut peers: Vec<PublicKey>, count: usize) -> Vec<PublicKey> {
    for place in 0..count.min(peers.len()) {
        let other = rand::random_range(place..peers.len());
        peers.swap(place, other);
    }
    peers.truncate(count);
    peers
}

fn message(kind: Kind, frame: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(1 + frame.len());
    message.put_u8(kind as u8);
    message.put_slice(frame);
    message.freeze()
}

async fn send(sender: &GossipSender, kind: Kind, frame: &[u8]) -> Result<(), NetError> {
    let sent = sender.broadcast(message(kind, frame)).await;
    sent.map_err(|error| NetError::Gossip(error.to_string()))
}

async fn send_to_neighbors(sender: &GossipSender, kind: Kind, frame: &[u8]) -> Result<(), NetError> {
    let sent = sender.broadcast_neighbors(message(kind, frame)).await;
    sent.map_err(|error| NetError::Gossip(error.to_string()))
}

async fn join(sender: &GossipSender, peers: Vec<PublicKey>) -> Result<(), NetError> {
    if peers.is_empty() {
        return Ok(());
    }
    sender
        .join_peers(peers)
        .await
        .map_err(|error| NetError::Gossip(error.to_string()))
}
