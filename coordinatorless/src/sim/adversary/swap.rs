//! What several cheats share: one record said in place of another, to everyone, and voted for.

use super::{Stage, own};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

/// The record said last, and the honest one that it stands for.
#[derive(Default)]
pub(super) struct Swap {
    said: Option<(Hash, Proposal)>,
}

impl Swap {
    /// Says what `make` makes of each record that this peer proposes; a proposal that is repeated is repeated as it was said.
    pub fn turn(
        &mut self,
        stage: &mut Stage<'_>,
        effect: Effect,
        make: impl FnOnce(&mut Stage<'_>, &Record) -> Record,
    ) -> Vec<Effect> {
        let others = stage.others();
        let body = match own(stage, &effect).map(|message| &message.body) {
            Some(Body::Proposal(proposal)) => {
                let again = self.said.as_ref().filter(|(_, said)| said.slot == proposal.slot);
                let said = match again {
                    Some((_, said)) => said.clone(),
                    None => Proposal {
                        record: make(stage, &proposal.record),
                        ..proposal.as_ref().clone()
                    },
                };
                self.said = Some((proposal.record.hash(), said.clone()));
                Body::Proposal(Box::new(said))
            }
            Some(Body::Vote(vote)) => match &self.said {
                Some((honest, said)) if vote.record == Some(*honest) => Body::Vote(Vote {
                    record: Some(said.record.hash()),
                    ..vote.clone()
                }),
                _ => return vec![effect],
            },
            _ => return vec![effect],
        };
        stage.tell(&others, &body)
    }
}
