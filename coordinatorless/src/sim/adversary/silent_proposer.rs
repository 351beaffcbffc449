//! Never says what it has to propose: each of its turns costs the others a deadline.

use super::{Adversary, Stage, own};
use crate::protocol::event::Effect;
use crate::wire::Body;

pub(in crate::sim) struct SilentProposer;

impl Adversary for SilentProposer {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        match own(stage, &effect).map(|message| &message.body) {
            Some(Body::Proposal(_)) => Vec::new(),
            _ => vec![effect],
        }
    }
}
