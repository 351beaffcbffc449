//! Two records in one view: each half of the members sees one, and finds the liar's votes with it.

use std::collections::BTreeMap;

use super::{Adversary, Stage, own};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

#[derive(Default)]
pub(in crate::sim) struct EquivocatingProposer {
    /// The second record of each view, by the hash of the first.
    twins: BTreeMap<Hash, Hash>,
}

impl Adversary for EquivocatingProposer {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let others = stage.others();
        let (ones, twos) = others.split_at(others.len() / 2);
        match own(stage, &effect).map(|message| &message.body) {
            Some(Body::Proposal(proposal)) => {
                let mut fewer = proposal.record.contributions.clone();
                if fewer.pop().is_none() {
                    return vec![effect];
                }
                let mut twin = proposal.as_ref().clone();
                twin.record = stage.recount(&proposal.record, fewer);
                if self.twins.len() > 64 {
                    self.twins.clear();
                }
                self.twins.insert(proposal.record.hash(), twin.record.hash());
                let mut told = stage.tell(ones, &Body::Proposal(proposal.clone()));
                told.extend(stage.tell(twos, &Body::Proposal(Box::new(twin))));
                told
            }
            Some(Body::Vote(vote)) => {
                let Some(twin) = vote.record.and_then(|record| self.twins.get(&record)) else {
                    return vec![effect];
                };
                let second = Vote {
                    record: Some(*twin),
                    ..vote.clone()
                };
                let mut told = stage.tell(ones, &Body::Vote(vote.clone()));
                told.extend(stage.tell(twos, &Body::Vote(second)));
                told
            }
            _ => vec![effect],
        }
    }
}
