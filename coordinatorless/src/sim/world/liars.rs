//! Where liars ([`crate::sim::adversary`]) meet the world: nothing of theirs is taken but what the wire's codec lets through.

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use super::{Item, World};
use crate::protocol::event::{Event, Notice};
use crate::sim::adversary::{Adversary, Stage};
use crate::sim::scenario::Scenario;
use crate::types::*;
use crate::wire::{Keys, Signed};

/// A liar and its own source of randomness.
pub(super) struct Liar {
    cheat: Box<dyn Adversary>,
    rng: ChaCha12Rng,
}

/// All liars of a run, by peer, and their keys.
#[derive(Default)]
pub(super) struct Gang {
    liars: std::collections::BTreeMap<usize, Liar>,
    keys: Vec<Keys>,
}

impl Gang {
    pub fn new(scenario: &Scenario) -> Self {
        let mut gang = Self::default();
        for (kind, peer) in scenario
            .liars
            .iter()
            .flat_map(|liars| liars.peers.iter().map(|peer| (liars.kind, *peer)))
        {
            let seed = blake3::derive_key(
                "murmur/v1/sim-liar",
                &[scenario.seed.to_le_bytes(), (peer as u64).to_le_bytes()].concat(),
            );
            let (cheat, rng) = (kind.adversary(), ChaCha12Rng::from_seed(seed));
            gang.liars.insert(peer, Liar { cheat, rng });
            gang.keys.push(scenario.keys(peer));
        }
        gang
    }

    pub fn has(&self, peer: usize) -> bool {
        self.liars.contains_key(&peer)
    }

    pub fn peers(&self) -> impl Iterator<Item = usize> + '_ {
        self.liars.keys().copied()
    }

    /// Whether this peer says what an audit found without one.
    pub fn is_lazy(&self, peer: usize) -> bool {
        self.liars.get(&peer).is_some_and(|liar| liar.cheat.is_lazy())
    }

    /// Whether `holder` hands this blob to that peer; honest peers always do.
    pub fn serves(&self, holder: usize, blob: &Hash, to: &PeerId) -> bool {
        self.liars.get(&holder).is_none_or(|liar| liar.cheat.serves(blob, to))
    }

    /// A liar learns that it is to open something, until this record.
    pub(super) fn is_asked(&mut self, peer: usize, commit: &Commit, until: Round) {
        if let Some(liar) = self.liars.get_mut(&peer) {
            liar.cheat.is_asked(commit, until);
        }
    }

    /// Whether a liar is away.
    pub(super) fn is_away(&self, peer: usize) -> bool {
        self.liars.get(&peer).is_some_and(|liar| liar.cheat.is_away())
    }

    /// Whether the blob's bytes have the right hash and decode to nothing.
    pub fn garbage(&self, blob: &Hash) -> bool {
        self.liars.values().any(|liar| liar.cheat.garbage(blob))
    }
}

impl World {
    /// An event for a liar: what it hears reaches its state as it likes, and what the state says goes out as it likes.
    pub(super) fn lie(&mut self, at: usize, event: Event) {
        let (now, config) = (self.now, self.config.clone());
        let Gang { liars, keys: gang } = &mut self.gang;
        let (Some(liar), peer) = (liars.get_mut(&at), &mut self.peers[at]) else {
            return;
        };
        let (keys, Some(state)) = (&peer.keys, peer.state.as_mut()) else {
            return;
        };
        macro_rules! stage {
            () => {
                &mut Stage {
                    config: &config,
                    keys,
                    state,
                    gang,
                    rng: &mut liar.rng,
                }
            };
        }
        let mut effects = Vec::new();
        for event in liar.cheat.hears(stage!(), event) {
            let said = state.handle(now, event);
            effects.extend(liar.cheat.says(stage!(), said));
        }
        let frames = liar.cheat.frames(stage!());
        self.carry_out(at, effects);
        for (to, frame) in frames {
            if let Some(to) = self.index.get(&to).copied().map(|to| self.reached(to)) {
                self.send_frame(at, to, &frame);
            }
        }
    }

    /// What a liar answers to a question for these decided records.
    pub(super) fn lie_of_records(&mut self, at: usize, records: Vec<Arc<Decided>>) -> Vec<Arc<Decided>> {
        let Gang { liars, keys: gang } = &mut self.gang;
        let peer = &self.peers[at];
        match (liars.get_mut(&at), &peer.state) {
            (Some(liar), Some(state)) => {
                let stage = &mut Stage {
                    config: &self.config,
                    keys: &peer.keys,
                    state,
                    gang,
                    rng: &mut liar.rng,
                };
                let honest = records.iter().map(|one| (**one).clone()).collect();
                liar.cheat.answers(stage, honest).into_iter().map(Arc::new).collect()
            }
            _ => records,
        }
    }

    /// Counts what an honest peer noticed: whether liars were caught at all is for tests to ask.
    pub(super) fn count_notice(&mut self, at: usize, notice: &Notice) {
        let what = match notice {
            Notice::Rejected { kind, .. } => *kind,
            Notice::Joined(..) => "joined",
            Notice::Lapsed(..) => "lapsed",
            Notice::Switched { .. } => "switched",
            _ => return,
        };
        if !self.gang.liars.is_empty() && !self.gang.has(at) {
            *self.noticed.entry(what.to_owned()).or_default() += 1;
        }
    }

    /// The records that a peer has stored.
    #[cfg(test)]
    pub(in crate::sim) fn records(&self, peer: usize) -> impl Iterator<Item = &Decided> {
        self.peers[peer].disk.records.values().map(|one| &**one)
    }

    /// The chain as a peer has it.
    pub(in crate::sim) fn chain(&self, peer: usize) -> Option<&crate::protocol::chain::ChainState> {
        self.peers[peer].state.as_ref().map(|state| &**state.chain())
    }

    /// Bytes on a link: decoded as they would be on a socket, or counted as refused.
    pub(super) fn send_frame(&mut self, at: usize, to: usize, frame: &[u8]) {
        let from = self.peers[at].keys.id();
        match Signed::from_link(frame, from, self.genesis.agreed.run, self.scenario.scheme()) {
            Ok(message) => {
                if let Some(delay) = self.delay(at, to) {
                    let life = self.peers[to].life;
                    let message = Arc::new(message);
                    self.push(
                        self.now + delay,
                        Item::Deliver {
                            to,
                            life,
                            from,
                            message,
                        },
                    );
                }
            }
            Err(error) => *self.refused.entry(error.reason().to_owned()).or_default() += 1,
        }
    }
}
