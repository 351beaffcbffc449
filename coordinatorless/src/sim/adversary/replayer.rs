//! Plays again what it heard from others, in later rounds too, and under its own name with another signer's signature.

use rand::RngExt;

use super::{Adversary, Stage};
use crate::protocol::event::{Effect, Event};
use crate::wire::Signed;

/// Messages of others kept.
const KEPT: usize = 256;

#[derive(Default)]
pub(in crate::sim) struct Replayer {
    heard: Vec<Signed>,
}

impl Adversary for Replayer {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        if let Event::Message { message, .. } = &event {
            if self.heard.len() < KEPT {
                self.heard.push((**message).clone());
            } else {
                let at = stage.rng.random_range(0..KEPT);
                self.heard[at] = (**message).clone();
            }
        }
        vec![event]
    }

    fn says(&mut self, stage: &mut Stage<'_>, mut effects: Vec<Effect>) -> Vec<Effect> {
        if self.heard.is_empty() || !stage.rng.random_bool(0.2) {
            return effects;
        }
        let at = stage.rng.random_range(0..self.heard.len());
        let message = self.heard[at].clone();
        // Under its own name another's signature doesn't fit; the codec says so.
        let stolen = Signed {
            signer: stage.me(),
            ..message.clone()
        };
        effects.extend([Effect::Broadcast(message), Effect::Broadcast(stolen)]);
        effects
    }
}
