//! Proofs of speed: how long a peer computes, and what its opening would show, follow from how fast the scenario says it is.

use super::{Item, World};
use crate::protocol::event::{Event, SpeedAnswer, SpeedCheck, SpeedOrder};
use crate::protocol::micros;
use crate::protocol::speed::{Key, SpeedTest, operations};
use crate::types::*;

/// Operations a microsecond of a peer of speed 1.
const OPERATIONS: f64 = 100_000.0;
/// Of the time until the claim is due, how much is computed for: the rest is for messages.
const SHARE: f64 = 0.6;
/// The products of which all is made up.
const SIDE: u32 = 256;
/// Bytes of an opening.
const OPENING_BYTES: f64 = 600_000.0;
/// How long it takes to look at one.
const LOOKING: Micros = 300_000;

impl World {
    /// Operations a microsecond that this peer has.
    fn has_speed(&self, at: usize) -> f64 {
        OPERATIONS * self.scenario.speeds.get(at).copied().unwrap_or(1.0)
    }

    pub(super) fn prove_speed(&mut self, at: usize, order: SpeedOrder) {
        let left = self.global(at, order.until).saturating_sub(self.now);
        let time = (left as f64 * SHARE) as Micros;
        let product = 2.0 * f64::from(SIDE).powi(3);
        let products = (self.has_speed(at) * time as f64 / product) as u32;
        let answer = SpeedAnswer {
            branch: order.branch,
            asked: order.asked,
            chains: vec![SpeedChain {
                side: SIDE,
                products: (products / 4 * 4).max(4),
                depth: 4,
            }],
            root: Hash::of(&order.seed),
        };
        let life = self.peers[at].life;
        let event = Box::new(Event::SpeedAnswered(answer));
        self.peers[at].computed = Some((life, order.asked));
        self.push(self.now + time, Item::Event { peer: at, life, event });
    }

    /// What was computed before a restart is gone.
    pub(super) fn open_speed(&mut self, at: usize, test: &SpeedTest) {
        let (life, key) = (self.peers[at].life, test.key());
        if self.peers[at].computed != Some((life, test.asked)) {
            return;
        }
        self.peers[at].openings.insert(key);
        let outcome = Ok(());
        let event = Box::new(Event::SpeedChecked { key, outcome });
        self.push(self.now + LOOKING, Item::Event { peer: at, life, event });
    }

    pub(super) fn look_at_speed(&mut self, at: usize, check: SpeedCheck) {
        let SpeedCheck { test, providers, .. } = check;
        let key = test.key();
        let there = |of: &usize| self.peers[*of].state.is_some() && self.side[*of] == self.side[at];
        let mut known = providers.iter().flat_map(|id| self.processes(id));
        let found = known.any(|of| there(&of) && self.peers[of].openings.contains(&key));
        if !found || !self.peers[at].looking.insert(key) {
            return;
        }
        let claimed = test.claim.as_ref().map_or(0, |claim| operations(&claim.chains));
        let window = micros(self.config.verification.speed_secs);
        let could = self
            .index
            .get(&test.member)
            .map_or(0.0, |of| self.has_speed(*of) * window as f64);
        let outcome = match claimed as f64 <= could {
            true => Ok(()),
            false => Err("rows that were not computed".to_owned()),
        };
        let transfer = OPENING_BYTES / self.scenario.link.bandwidth + 2.0 * self.scenario.link.latency_ms / 1000.0;
        let life = self.peers[at].life;
        let event = Box::new(Event::SpeedChecked { key, outcome });
        let when = self.now + (transfer * 1e6) as Micros + LOOKING;
        self.push(when, Item::Event { peer: at, life, event });
    }

    /// An opening that this peer looked at is handed on by it.
    pub(super) fn looked_at_speed(&mut self, at: usize, key: Key, holds: bool) {
        let peer = &mut self.peers[at];
        peer.looking.remove(&key);
        if holds {
            peer.openings.insert(key);
        }
    }

    /// Nobody shows more than it has.
    pub(super) fn shown_speed(&mut self, at: usize, member: PeerId, asked: Round, shown: u64) {
        let has = self.index.get(&member).map_or(0.0, |of| self.has_speed(*of));
        self.checker.shown(at, asked, shown as f64, has);
    }
}
