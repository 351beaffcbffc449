//! Lies about what it holds and whom it hears, by deceiving its own honest state, which then says it with conviction.

use super::{Adversary, Stage};
use crate::protocol::event::{Effect, Event};
use crate::types::*;

/// What it claims.
pub(in crate::sim) enum LyingHave {
    /// To hold every blob the moment it hears of it; these are the blobs it has not told itself of yet. It votes accordingly.
    Everything(Vec<Hash>),
    /// To hold nothing but its own.
    Nothing,
    /// To hear nobody.
    HearsNobody,
}

impl Adversary for LyingHave {
    fn hears(&mut self, _stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        match (self, event) {
            (Self::Everything(claims), event) => {
                let held = claims.drain(..).map(|blob| Event::BlobHeld { blob });
                held.chain([event]).collect()
            }
            (Self::Nothing, Event::BlobHeld { .. }) => Vec::new(),
            // Only what a member hands over itself shows that it lives.
            (Self::HearsNobody, Event::Message { message, .. }) => {
                let from = PeerId::default();
                vec![Event::Message { from, message }]
            }
            (_, event) => vec![event],
        }
    }

    fn turn(&mut self, _stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        if let (Self::Everything(claims), Effect::Fetch { commit, .. }) = (self, &effect) {
            claims.push(commit.blob);
        }
        vec![effect]
    }
}
