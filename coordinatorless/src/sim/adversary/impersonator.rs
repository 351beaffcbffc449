//! Speaks in the name of others without their keys: votes, heartbeats, goodbyes and commits that they never signed. And says what
//! it signs itself for other runs, branches and rounds.

use rand::RngExt;

use super::{Adversary, Stage};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::{Body, Signed};

pub(in crate::sim) struct Impersonator;

impl Impersonator {
    fn foreign(slot: Slot) -> [Slot; 4] {
        [
            Slot {
                run: RunId([9; 32]),
                ..slot
            },
            Slot { branch: 77, ..slot },
            Slot {
                round: Round(u64::MAX),
                ..slot
            },
            Slot {
                view: View::MAX,
                ..slot
            },
        ]
    }
}

impl Adversary for Impersonator {
    fn says(&mut self, stage: &mut Stage<'_>, mut effects: Vec<Effect>) -> Vec<Effect> {
        let others = stage.others();
        if others.is_empty() || !stage.rng.random_bool(0.2) {
            return effects;
        }
        let victim = others[stage.rng.random_range(0..others.len())];
        let slot = stage.chain().next_slot();
        let vote = |slot| {
            Body::Vote(Vote {
                slot,
                kind: VoteKind::Precommit,
                record: None,
            })
        };
        for body in [vote(slot), Body::Leave(Leave { slot })] {
            let mine = stage.keys.sign(&body);
            effects.push(Effect::Broadcast(Signed { signer: victim, ..mine }));
        }
        let strange = Self::foreign(slot)[stage.rng.random_range(0..4)];
        effects.extend(stage.tell(&others, &vote(strange)));
        effects
    }
}
