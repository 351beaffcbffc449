//! Asks to join under ever new names, none of which will ever work.

use super::{Adversary, Stage};
use crate::protocol::beacon::VrfKeys;
use crate::protocol::event::{Effect, Event, Timer};
use crate::types::*;
use crate::wire::{Body, Keys};

/// New names a second.
const NAMES: u64 = 20;
/// Names in all: what is left to the others must still be seen within a test.
const MAX_NAMES: u64 = 400;

#[derive(Default)]
pub(in crate::sim) struct JoinFlooder {
    names: u64,
    due: bool,
}

impl Adversary for JoinFlooder {
    fn hears(&mut self, _stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        self.due |= matches!(event, Event::Timer(Timer::Beat));
        vec![event]
    }

    fn says(&mut self, stage: &mut Stage<'_>, mut effects: Vec<Effect>) -> Vec<Effect> {
        if !std::mem::take(&mut self.due) || self.names >= MAX_NAMES {
            return effects;
        }
        let chain = stage.chain();
        let slot = Slot {
            round: chain.agreed.round,
            ..chain.next_slot()
        };
        for name in self.names..self.names + NAMES {
            let secret = blake3::derive_key("murmur/v1/sim-name", &[&stage.me().0[..], &name.to_le_bytes()].concat());
            let keys = Keys::new(secret, stage.keys.scheme());
            let join = Join {
                slot,
                vrf_key: VrfKeys::derive(&keys).public(),
                payout_address: String::new(),
            };
            effects.push(Effect::Broadcast(keys.sign(&Body::Join(join))));
        }
        self.names += NAMES;
        effects
    }
}
