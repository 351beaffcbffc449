//! The first vote of each voter in each slot, so that a second one is noticed and both can be shown (R22).

use std::collections::BTreeMap;

use super::gathered::LOOKAHEAD;
use crate::types::*;

/// Views behind the one in progress whose votes are still compared.
const LOOKBACK: View = 2;

/// The books. Bounded: two votes of each voter for each view within reach.
#[derive(Default)]
pub(super) struct Doubles {
    first: BTreeMap<(View, VoteKind, PeerId), (Vote, Signature)>,
}

impl Doubles {
    /// Notes a vote whose signature is verified, while the height is in view `now`. Gives the proof where the voter said something
    /// else before.
    pub(super) fn vote(&mut self, now: View, voter: PeerId, vote: &Vote, signature: Signature) -> Option<Evidence> {
        let view = vote.slot.view;
        if view.saturating_add(LOOKBACK) < now || view > now.saturating_add(LOOKAHEAD) {
            return None;
        }
        let said = (vote.clone(), signature);
        let first = self
            .first
            .entry((view, vote.kind, voter))
            .or_insert_with(|| said.clone());
        (first.0 != *vote).then(|| Evidence::new(voter, first.clone(), said))
    }

    /// Forgets what is too far behind.
    pub(super) fn reached(&mut self, view: View) {
        let oldest = view.saturating_sub(LOOKBACK);
        self.first.retain(|(view, _, _), _| *view >= oldest);
    }
}
