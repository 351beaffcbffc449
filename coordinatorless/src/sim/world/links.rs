//! Links: who is reached, what is lost on the way, how long the rest takes.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::RngExt;

use super::{Item, World};
use crate::net::FRAME_HEADER;
use crate::protocol::event::Event;
use crate::types::*;
use crate::wire::Signed;

/// Records handed out in one answer.
const RECORDS_PER_ANSWER: usize = 64;

impl World {
    /// Everyone a broadcast goes to: members as the sender knows them; a newcomer reaches those it knows.
    pub(super) fn audience(&self, at: usize) -> Vec<usize> {
        let Some(state) = &self.peers[at].state else {
            return Vec::new();
        };
        let members = state.chain().active().filter_map(|id| self.index.get(&id).copied());
        // Newcomers on the way in listen too, as they do over gossip.
        let newcomers = self
            .peers
            .iter()
            .enumerate()
            .filter(|(_, peer)| peer.joiner && peer.state.is_some())
            .map(|(i, _)| i);
        members
            .chain(newcomers)
            .filter(|to| self.peers[*to].keys.id() != self.peers[at].keys.id())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// What a message takes on a real link.
    pub(super) fn link_bytes(&self, at: usize, message: &Signed) -> u64 {
        let frame = message.to_link(self.peers[at].keys.id(), self.genesis.agreed.run);
        (FRAME_HEADER + frame.len()) as u64
    }

    pub(super) fn send(&mut self, at: usize, to: usize, message: Arc<Signed>, size: u64) {
        let to = self.reached(to);
        self.messages += 1;
        *self.kinds.entry(message.body.name()).or_default() += 1;
        self.bytes += size;
        if self.gang.has(at) {
            let frame = message.to_link(self.peers[at].keys.id(), self.genesis.agreed.run);
            return self.send_frame(at, to, &frame);
        }
        let copies = 1 + u32::from(self.rng.random_bool(self.scenario.link.duplicate));
        for _ in 0..copies {
            if let Some(delay) = self.delay(at, to) {
                let (life, from) = (self.peers[to].life, self.peers[at].keys.id());
                self.push(
                    self.now + delay,
                    Item::Deliver {
                        to,
                        life,
                        from,
                        message: message.clone(),
                    },
                );
            }
        }
    }

    /// How long a message takes, if it arrives.
    pub(super) fn delay(&mut self, from: usize, to: usize) -> Option<Micros> {
        let link = &self.scenario.link;
        let lost = self.rng.random_bool(link.loss);
        let jitter = self.rng.random_range(0.0..=link.jitter_ms.max(f64::MIN_POSITIVE));
        let share = ((from * 31 + to * 17) % 97) as f64 / 96.0;
        let delay = ((link.latency_ms + jitter + link.asymmetry_ms * share) * 1000.0) as Micros;
        let plight = &self.peers[from].plight;
        let cut = plight.mute || self.side[from] != self.side[to];
        (!lost && !cut && self.peers[to].state.is_some()).then_some(delay.max(1) + plight.lag)
    }

    pub(super) fn answer_records(&mut self, at: usize, asker: usize, from: Round) {
        let peer = &self.peers[at];
        if peer.state.is_none() {
            return;
        }
        let records: Vec<Arc<Decided>> = peer
            .disk
            .records
            .range(from..)
            .take(RECORDS_PER_ANSWER)
            .map(|(_, one)| one.clone())
            .collect();
        let id = peer.keys.id();
        let records = self.lie_of_records(at, records);
        if let Some(delay) = self.delay(at, asker).filter(|_| !records.is_empty()) {
            let life = self.peers[asker].life;
            let event = Box::new(Event::Records { from: id, records });
            self.push(
                self.now + delay,
                Item::Event {
                    peer: asker,
                    life,
                    event,
                },
            );
        }
    }
}
