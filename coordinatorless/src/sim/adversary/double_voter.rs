//! Two votes for one slot: towards different members, or both towards all.

use rand::RngExt;

use super::{Adversary, Stage, own};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

pub(in crate::sim) struct DoubleVoter;

impl Adversary for DoubleVoter {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let Some(Body::Vote(vote)) = own(stage, &effect).map(|message| &message.body) else {
            return vec![effect];
        };
        // Nil beside a record; a record that nobody proposed beside nil.
        let other = match vote.record {
            Some(_) => None,
            None => Some(Hash::of(&stage.me().0)),
        };
        let second = Body::Vote(Vote {
            record: other,
            ..vote.clone()
        });
        let others = stage.others();
        if stage.rng.random_bool(0.3) {
            let mut both = stage.tell(&others, &second);
            both.push(effect);
            return both;
        }
        let (ones, twos) = others.split_at(stage.rng.random_range(0..=others.len()));
        let mut told = stage.tell(ones, &Body::Vote(vote.clone()));
        told.extend(stage.tell(twos, &second));
        told
    }
}
