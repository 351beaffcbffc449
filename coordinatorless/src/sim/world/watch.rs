//! How soon a crash is noticed by everyone, and how often somebody alive is taken for dead: looked at every quarter of a virtual
//! second, where a scenario asks for it.

use std::collections::BTreeMap;

use super::{Item, World};
use crate::protocol::SECOND;
use crate::protocol::membership::Standing;
use crate::types::Micros;

/// Between two looks.
const LOOK: Micros = SECOND / 4;
/// Who has not been up for this long is neither expected to know the others nor to be known.
const SETTLED: Micros = 5 * SECOND;
/// This many peers are asked whom they take for dead.
const OBSERVERS: usize = 32;

/// What was seen.
#[derive(Default)]
pub(in crate::sim) struct Watch {
    /// Peers that crashed, and when, until everyone knows.
    gone: BTreeMap<usize, Micros>,
    /// How long each crash took to be known to everyone.
    pub noticed: Vec<Micros>,
    /// How often somebody alive was looked at, and taken for dead.
    pub looks: u64,
    pub alarms: u64,
}

impl Watch {
    /// A peer crashes.
    pub fn crashed(&mut self, peer: usize, now: Micros) {
        self.gone.insert(peer, now);
    }
}

impl World {
    pub(super) fn look(&mut self) {
        self.push(self.now + LOOK, Item::Look);
        let gone = std::mem::take(&mut self.watch.gone);
        for (peer, at) in gone {
            if self.peers[peer].state.is_some() {
                continue; // back before everyone knew
            }
            if (0..self.peers.len()).any(|by| self.takes_for(by, peer) == Some(true)) {
                self.watch.gone.insert(peer, at);
            } else {
                self.watch.noticed.push(self.now - at);
            }
        }
        let every = self.peers.len().div_ceil(OBSERVERS);
        let settled: Vec<usize> = (0..self.peers.len()).filter(|peer| self.is_settled(*peer)).collect();
        let (mut looks, mut alarms) = (0, 0);
        for by in settled.iter().step_by(every) {
            for alive in settled.iter().filter_map(|peer| self.takes_for(*by, *peer)) {
                looks += 1;
                alarms += u64::from(!alive);
            }
        }
        self.watch.looks += looks;
        self.watch.alarms += alarms;
    }

    /// Whether `by` takes `peer` for alive; `None` where it is down, lies, or knows no such member.
    fn takes_for(&self, by: usize, peer: usize) -> Option<bool> {
        let id = self.peers[peer].keys.id();
        let one = &self.peers[by];
        let state = one.state.as_ref().filter(|_| !self.gang.has(by))?;
        let member = state.chain().member(&id);
        let active = member.is_some_and(|member| member.standing == Standing::Active);
        active.then(|| state.is_alive(self.local(by), &id))
    }

    /// Whether a peer has been up, and able to speak, for long enough.
    fn is_settled(&self, peer: usize) -> bool {
        let one = &self.peers[peer];
        let up = one.state.is_some() && !one.plight.mute && !one.plight.is_paused(self.now);
        up && self.side[peer] == 0 && one.since + SETTLED <= self.now
    }
}
