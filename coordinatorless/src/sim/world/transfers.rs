//! Blobs and models: contributions fetched from who has them, decided records applied in order.

use super::{Item, World};
use crate::protocol::event::Event;
use crate::protocol::planted::{Bug, planted};
use crate::types::*;

impl World {
    pub(super) fn fetch(&mut self, at: usize, commit: &Commit, providers: &[PeerId]) {
        if self.peers[at].disk.blobs.contains(&commit.blob) {
            let (life, event) = (self.peers[at].life, Box::new(Event::BlobHeld { blob: commit.blob }));
            return self.push(self.now + 1, Item::Event { peer: at, life, event });
        }
        if !self.peers[at].fetching.insert(commit.blob) {
            return;
        }
        let mut known = providers.iter().flat_map(|id| self.processes(id));
        let holder = known.find(|holder| {
            self.peers[*holder].state.is_some()
                && self.side[*holder] == self.side[at]
                && self.peers[*holder].disk.blobs.contains(&commit.blob)
                && self.gang.serves(*holder, &commit.blob, &self.peers[at].keys.id())
        });
        let transfer = (commit.len as f64 / self.scenario.link.bandwidth * 1e6) as Micros;
        let life = self.peers[at].life;
        // QUIC repairs loss by itself; it costs time.
        let slow = 1.0 + 4.0 * self.scenario.link.loss;
        let delay = ((2.0 * self.scenario.link.latency_ms * 1000.0 + transfer as f64) * slow) as Micros;
        let from = holder.unwrap_or(usize::MAX);
        self.push(
            self.now + delay + 1,
            Item::Fetched {
                peer: at,
                life,
                blob: commit.blob,
                from,
            },
        );
    }

    /// Whether this peer is up, reachable from `at`, has the blob, and hands it over.
    pub(super) fn holds(&self, id: &PeerId, blob: &Hash, at: usize) -> bool {
        self.processes(id).any(|holder| {
            let peer = &self.peers[holder];
            let reached = peer.state.is_some() && self.side[holder] == self.side[at];
            let serves = || self.gang.serves(holder, blob, &self.peers[at].keys.id());
            reached && peer.disk.blobs.contains(blob) && serves()
        })
    }

    pub(super) fn fetched(&mut self, at: usize, life: u32, blob: Hash, from: usize) {
        if self.peers[at].life != life {
            return;
        }
        self.peers[at].fetching.remove(&blob);
        let came =
            self.peers.get(from).is_some_and(|holder| holder.state.is_some()) && self.side[from] == self.side[at];
        if came && self.gang.garbage(&blob) {
            let reason = "does not decode".to_owned();
            self.event(at, life, Event::BlobBad { blob, reason });
        } else if came {
            self.peers[at].disk.blobs.insert(blob);
            self.event(at, life, Event::BlobHeld { blob });
        }
        if self.peers[at].fetching.is_empty() {
            self.apply(at);
        }
    }

    /// Applies decided records in order, as far as their blobs are here; fetches what is missing from anyone who has it.
    pub(super) fn apply(&mut self, at: usize) {
        while let Some(decided) = self.peers[at].applying.first().cloned() {
            let missing: Vec<(PeerId, Commit)> = decided
                .record
                .contributions
                .iter()
                .filter(|one| !self.peers[at].disk.blobs.contains(&one.commit.blob))
                .map(|one| (one.member, one.commit.clone()))
                .collect();
            if !missing.is_empty() {
                for (author, commit) in &missing {
                    let others = self.peers.iter().map(|peer| peer.keys.id());
                    let holders: Vec<PeerId> = match self.holds(author, &commit.blob, at) {
                        true => vec![*author],
                        false => others.collect(),
                    };
                    self.fetch(at, commit, &holders);
                }
                return;
            }
            self.peers[at].applying.remove(0);
            let (slot, record) = (decided.record.slot, decided.record.hash());
            let model_root = self.model(at, slot.round);
            self.checker.applied(at, slot.round, record, model_root);
            let (branch, round, life) = (slot.branch, slot.round, self.peers[at].life);
            let event = Box::new(Event::Applied {
                branch,
                round,
                model_root,
            });
            self.push(self.now + 1000, Item::Event { peer: at, life, event });
        }
    }

    pub(super) fn rollback(&mut self, at: usize, round: Round) {
        let disk = &mut self.peers[at].disk;
        disk.records.split_off(&round.next());
        disk.states.split_off(&round.next());
        disk.models.split_off(&round.next());
        self.peers[at].applying.clear();
    }

    /// The simulated model after a round: a hash of all that was applied, in order.
    pub(super) fn model(&mut self, peer: usize, round: Round) -> Hash {
        let disk = &mut self.peers[peer].disk;
        if round == Round(0) {
            return Hash::of(b"genesis model");
        }
        if let Some(root) = disk.models.get(&round) {
            return *root;
        }
        let mut root = Hash::of(b"genesis model");
        for (at, decided) in disk.records.range(..=round) {
            root = *disk
                .models
                .entry(*at)
                .or_insert_with(|| after(root, &decided.record, peer));
        }
        root
    }
}

/// The stand-in for the integer sum: what was counted, in the record's order, whoever computes it.
fn after(root: Hash, record: &Record, peer: usize) -> Hash {
    let mut counted: Vec<&Contribution> = record.contributions.iter().collect();
    if planted(Bug::SumInArrivalOrder) && !counted.is_empty() {
        // Each peer has its own order of arrival.
        let first = peer % counted.len();
        counted.rotate_left(first);
    }
    let mut bytes = root.0.to_vec();
    for one in counted {
        bytes.extend(one.commit.blob.0);
        bytes.extend(one.commit.tokens.to_le_bytes());
    }
    Hash::of(&bytes)
}
