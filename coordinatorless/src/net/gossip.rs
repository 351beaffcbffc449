//! Announcements by gossip: what even those should hear to whom there is no link. The topic is the run.
//!
//! Gossip is best effort: a message may be lost, or come late, or twice; what matters is repeated by its author. Two traps of
//! `iroh-gossip` are met here: a subscriber that lags is closed (so we subscribe again), and a partition that outlasts the idle
//! time never heals by itself (so known members that are no neighbours are asked again from time to time).

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
/// How often members that are no neighbours are asked to be.
const REJOIN: Duration = Duration::from_secs(10);
/// How many of them at a time.
const REJOIN_MEMBERS: usize = 2;

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
        let keys = members.iter().filter_map(|&peer| public_key(peer).ok()).collect();
        self.members.send_replace(keys);
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
        let members = self.members.borrow_and_update().clone();
        let topic = self
            .gossip
            .subscribe(self.topic, members)
            .await
            .map_err(|error| NetError::Gossip(error.to_string()))?;
        let (sender, mut receiver) = topic.split();
        let mut rejoin = tokio::time::interval(REJOIN);
        loop {
            tokio::select! {
                event = receiver.next() => match event {
                    Some(Ok(event)) => self.received(event, &sender).await,
                    Some(Err(error)) => return Err(NetError::Gossip(error.to_string())),
                    None => return Ok(()),
                },
                Some((kind, frame)) = self.outbox.recv() => send(&sender, kind, &frame).await?,
                Ok(()) = self.members.changed() => {
                    let members = self.members.borrow_and_update().clone();
                    join(&sender, members).await?;
                }
                _ = rejoin.tick() => {
                    let absent = self.absent(&receiver);
                    join(&sender, absent).await?;
                }
            }
        }
    }

    /// A few members that are no neighbours, others each time.
    fn absent(&self, receiver: &GossipReceiver) -> Vec<PublicKey> {
        let members = self.members.borrow();
        let neighbors: Vec<PublicKey> = receiver.neighbors().collect();
        let mut absent: Vec<PublicKey> = members
            .iter()
            .filter(|member| !neighbors.contains(member))
            .copied()
            .collect();
        if !absent.is_empty() {
            let start = rand::random_range(0..absent.len());
            absent.rotate_left(start);
            absent.truncate(REJOIN_MEMBERS);
        }
        absent
    }

    async fn received(&self, event: Event, sender: &GossipSender) {
        match event {
            Event::Received(message) => self.deliver(peer_id(message.delivered_from), message.content).await,
            Event::Lagged => {
                self.lagged.fetch_add(1, Ordering::Relaxed);
            }
            Event::NeighborUp(_) => {
                let card = self.book.own_card(&address(&self.endpoint).await);
                if let Err(error) = send(sender, Kind::Card, &card).await {
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

async fn send(sender: &GossipSender, kind: Kind, frame: &[u8]) -> Result<(), NetError> {
    let mut message = BytesMut::with_capacity(1 + frame.len());
    message.put_u8(kind as u8);
    message.put_slice(frame);
    sender
        .broadcast(message.freeze())
        .await
        .map_err(|error| NetError::Gossip(error.to_string()))
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
