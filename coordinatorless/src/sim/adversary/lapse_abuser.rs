//! Says that it doesn't hear one honest member, passes on nothing of it, and proposes records that lapse it.

use super::swap::Swap;
use super::{Adversary, Stage};
use crate::protocol::event::{Effect, Event};
use crate::types::*;

/// The victim is the last honest member, so that all abusers agree on it.
#[derive(Default)]
pub(in crate::sim) struct LapseAbuser {
    swap: Swap,
}

impl Adversary for LapseAbuser {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        let victim = stage.honest().last().copied();
        match &event {
            Event::Message { from, message } if [Some(*from), Some(message.signer)].contains(&victim) => Vec::new(),
            _ => vec![event],
        }
    }

    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let victim = stage.honest().last().copied();
        self.swap.turn(stage, effect, |stage, record| {
            // Only what the chain alone allows: it is for the voters to say that they hear the victim.
            let scheme = stage.keys.scheme();
            let lawful = |change: &Change| stage.chain().check_change(stage.config, change, scheme).is_ok();
            match victim.map(Change::Lapse).filter(lawful) {
                Some(lapse) => Record {
                    changes: vec![lapse],
                    ..record.clone()
                },
                None => record.clone(),
            }
        })
    }
}
