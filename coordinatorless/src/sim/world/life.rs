//! A peer's processes: started from its disk, killed, started again.

use std::collections::BTreeMap;

use rand::RngExt;

use super::World;
use crate::protocol::clock::Clock;
use crate::protocol::doubled::first_sequence;
use crate::protocol::event::Event;
use crate::protocol::{Setup, State};
use crate::types::*;

impl World {
    /// Starts a peer from its disk.
    pub(super) fn start(&mut self, at: usize, wal_whole: bool) {
        let (config, lot) = (self.config.clone(), self.rng.random());
        let peer = &mut self.peers[at];
        peer.life += 1;
        peer.since = self.now;
        let raw = peer.plight.local(self.now);
        peer.clock = Clock::new(raw, self.now);
        peer.disk.sequence = first_sequence(peer.disk.sequence, raw, lot);
        (peer.training, peer.timers) = (None, BTreeMap::new());
        peer.trained.clear();
        peer.fetching.clear();
        let tip = peer.disk.states.last_key_value().map(|(_, state)| (**state).clone());
        let chain = tip.unwrap_or_else(|| self.genesis.clone());
        let mut history = Vec::new();
        for (round, decided) in &peer.disk.records {
            let before = match round.previous() {
                Round(0) => Some(self.genesis.clone()),
                previous => peer.disk.states.get(&previous).map(|state| (**state).clone()),
            };
            // A branch's first record follows from the regrouped state.
            let before = before.map(|before| match decided.regroup.first() {
                Some((_, statement, _)) => before.regrouped(&config, decided.record.slot.branch, &statement.survivors),
                None => before,
            });
            history.extend(before.map(|before| (before, decided.clone())));
        }
        let join = Some(String::new());
        let setup = Setup {
            config,
            keys: peer.keys.clone(),
            chain: chain.clone(),
            history,
            wal: wal_whole.then(|| peer.disk.wal.clone()),
            join,
            sequence: peer.disk.sequence,
            last_round: None,
            steps: Some(self.steps.clone()),
        };
        let mut state = State::new(setup);
        let effects = state.start(self.now);
        peer.state = Some(state);
        peer.applying = peer
            .disk
            .records
            .range(chain.agreed.round.next()..)
            .map(|(_, one)| one.clone())
            .collect();
        let (branch, round, base) = (chain.agreed.branch, chain.agreed.round, chain.base());
        let life = peer.life;
        self.carry_out(at, effects);
        // O8: the model that the work in flight is trained from, then the last.
        for round in std::collections::BTreeSet::from([base, round]) {
            let model_root = self.model(at, round);
            self.event(
                at,
                life,
                Event::Applied {
                    branch,
                    round,
                    model_root,
                },
            );
        }
    }

    pub(super) fn crash(&mut self, peer: usize) {
        if self.peers[peer].state.take().is_some() {
            self.watch.crashed(peer, self.now);
        }
        self.peers[peer].life += 1;
    }

    pub(super) fn restart(&mut self, peer: usize, wal: bool) {
        if self.peers[peer].state.is_none() {
            if !wal {
                self.peers[peer].disk.wal.clear();
                self.peers[peer].disk.wal_lost = true;
                self.checker.log_cleared(peer);
            }
            self.start(peer, !self.peers[peer].disk.wal_lost);
        }
    }
}
