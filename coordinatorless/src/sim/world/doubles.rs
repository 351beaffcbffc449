//! Two processes with one key: a second one, started from a copy of a peer's directory.
//!
//! To the others both are the same peer. They take the newest connection from it and let the last one go, so what is sent to it
//! reaches one of the two, now this, now that one; what either sends arrives.

use rand::RngExt;

use super::{Peer, World};
use crate::types::PeerId;

impl World {
    /// Copies the peer's disk and starts a process from it, once.
    pub(super) fn double(&mut self, peer: usize) {
        if self.gang.has(peer) || self.doubles.contains_key(&peer) {
            return;
        }
        let (at, first) = (self.peers.len(), &self.peers[peer]);
        let second = Peer::new(first.keys.clone(), first.disk.clone(), first.joiner);
        let wal_whole = !first.disk.wal_lost;
        self.peers.push(second);
        self.side.push(self.side[peer]);
        self.doubles.insert(peer, at);
        // Two processes say two things: nothing is promised to them.
        self.checker.liars.extend([peer, at]);
        self.start(at, wal_whole);
    }

    /// Whether nothing is promised to this peer: it lies, or its key is in two processes.
    pub(super) fn is_faulty(&self, peer: usize) -> bool {
        self.gang.has(peer)
            || self
                .doubles
                .iter()
                .any(|(first, second)| [first, second].contains(&&peer))
    }

    /// The process saw that another has its key, and ends.
    pub(super) fn gives_way(&mut self, peer: usize) {
        *self.noticed.entry("key in use".to_owned()).or_default() += 1;
        self.crash(peer);
    }

    /// Which process of this peer is reached.
    pub(super) fn reached(&mut self, peer: usize) -> usize {
        let up = |at: usize| self.peers[at].state.is_some();
        match self.doubles.get(&peer).copied() {
            Some(second) if up(second) && (!up(peer) || self.rng.random_bool(0.5)) => second,
            _ => peer,
        }
    }

    /// All processes of the peer with this id.
    pub(super) fn processes(&self, id: &PeerId) -> impl Iterator<Item = usize> + use<> {
        let first = self.index.get(id).copied();
        let second = first.and_then(|first| self.doubles.get(&first).copied());
        first.into_iter().chain(second)
    }
}
