//! Commits again what it committed one and several rounds ago, as it was, and in this round's clothes.

use super::{Adversary, Stage, own};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

/// Old commits kept.
const KEPT: usize = 8;

#[derive(Default)]
pub(in crate::sim) struct StaleCommitter {
    past: Vec<Commit>,
}

impl Adversary for StaleCommitter {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let others = stage.others();
        let Some(Body::Commit(commit)) = own(stage, &effect).map(|message| &message.body) else {
            return vec![effect];
        };
        let mut told = Vec::new();
        for (at, old) in self.past.iter().enumerate() {
            let redated = Commit {
                slot: commit.slot,
                base: commit.base,
                ..old.clone()
            };
            // Some members hear the old work before the new.
            let (ones, twos) = others.split_at(at % (others.len() + 1));
            told.extend(stage.tell(ones, &Body::Commit(redated.clone())));
            told.extend(stage.tell(twos, &Body::Commit(old.clone())));
            let dressed = Commit {
                parent: commit.parent,
                ..redated
            };
            told.extend(stage.tell(ones, &Body::Commit(dressed)));
        }
        if self.past.last() != Some(commit) {
            self.past.push(commit.clone());
        }
        if self.past.len() > KEPT {
            self.past.remove(0);
        }
        told.push(effect);
        told
    }
}
