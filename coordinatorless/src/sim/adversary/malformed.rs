//! Bytes that are no message: cut short, oversized, of another version or kind, flipped, with something behind the end.

use rand::RngExt;

use super::{Adversary, Stage};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::{HEADER, MAX_SMALL, Signed};

#[derive(Default)]
pub(in crate::sim) struct Malformed {
    last: Option<Signed>,
}

impl Adversary for Malformed {
    fn turn(&mut self, _stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        if let Effect::Broadcast(message) = &effect {
            self.last = Some(message.clone());
        }
        vec![effect]
    }

    fn frames(&mut self, stage: &mut Stage<'_>) -> Vec<(PeerId, Vec<u8>)> {
        let others = stage.others();
        let (Some(message), false) = (&self.last, others.is_empty()) else {
            return Vec::new();
        };
        let mut frame = match stage.rng.random_bool(0.5) {
            true => message.to_frame(),
            false => message.to_link(stage.keys.id(), stage.chain().agreed.run),
        };
        match stage.rng.random_range(0..7) {
            0 => frame.truncate(stage.rng.random_range(0..frame.len())),
            1 => frame.truncate(stage.rng.random_range(0..HEADER)),
            2 => frame[0] ^= 1,
            3 => frame[2] = stage.rng.random_range(0..=u8::MAX),
            4 => frame.extend([0; 16]),
            5 => frame.resize(HEADER + MAX_SMALL + 4096, 0),
            _ => {
                let at = stage.rng.random_range(0..frame.len());
                frame[at] ^= 1 << stage.rng.random_range(0..8);
            }
        }
        let to = others[stage.rng.random_range(0..others.len())];
        vec![(to, frame)]
    }
}
