//! Contributions whose bytes have the right hash and decode to nothing.

use std::collections::BTreeSet;

use super::{Adversary, Stage, own};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

#[derive(Default)]
pub(in crate::sim) struct GarbageBlobs {
    made: BTreeSet<Hash>,
}

impl Adversary for GarbageBlobs {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        if let Some(Body::Commit(commit)) = own(stage, &effect).map(|message| &message.body) {
            self.made.insert(commit.blob);
        }
        vec![effect]
    }

    fn garbage(&self, blob: &Hash) -> bool {
        self.made.contains(blob)
    }
}
