//! A proposer that leaves one member out of every record, however widely its work is held.

use super::swap::Swap;
use super::{Adversary, Stage};
use crate::protocol::event::Effect;

/// The victim is the first honest member, so that all censors agree on it.
#[derive(Default)]
pub(in crate::sim) struct Censor {
    swap: Swap,
}

impl Adversary for Censor {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let victim = stage.honest().first().copied();
        self.swap.turn(stage, effect, |stage, record| {
            let mut kept = record.contributions.clone();
            kept.retain(|one| Some(one.member) != victim);
            stage.recount(record, kept)
        })
    }
}
