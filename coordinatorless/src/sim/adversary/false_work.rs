//! Claims work that it did not do, or other steps than it took: what a replay would show stands in the commit's trace root, for the simulator's
//! auditors.

use rand::RngExt;

use super::{Adversary, Stage};
use crate::protocol::event::Event;
use crate::protocol::replayed::{self, Answer, Ask};
use crate::types::*;
use crate::wire::Keys;

/// How often, and what it does when it is audited.
pub(in crate::sim) enum FalseWork {
    /// In every round.
    Always,
    /// In one round of ten.
    Tenth,
    /// In every round, and opens its accumulators to nobody.
    Unopened,
    /// Never, but it tells nobody its steps.
    Untold,
    /// Never, but it commits to steps that it did not take.
    Mistold,
}

/// What an honest auditor finds of a simulated commit.
pub(in crate::sim) fn shows(commit: &Commit) -> Finding {
    match commit.trace_root {
        root if root == undone() => Finding::Differs,
        root if root == unopened() => Finding::Unanswered,
        _ => Finding::Agrees,
    }
}

/// The steps of work that was not done: all liars know them.
pub(super) fn undone_steps() -> Trace {
    Trace::of([(1.0, 1.0)])
}

/// The steps that a liar tells of work that it did.
pub(in crate::sim) fn other_steps() -> Trace {
    Trace::of([(2.0, 1.0)])
}

/// What a liar answers who did other steps than it committed to.
pub(in crate::sim) fn answer(keys: &Keys, ask: &Ask, auditor: &PeerId) -> Answer {
    let trace = other_steps();
    let signature = replayed::signed(keys, &ask.slot, auditor, &ask.commitment, &trace.root());
    Answer {
        commitment: ask.commitment,
        trace,
        signature,
    }
}

fn undone() -> Hash {
    undone_steps().root()
}

fn unopened() -> Hash {
    Hash::of(b"work that nobody may look at")
}

impl Adversary for FalseWork {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        let Event::Trained(mut trained) = event else {
            return vec![event];
        };
        match self {
            Self::Tenth if !stage.rng.random_ratio(1, 10) => {}
            Self::Always | Self::Tenth => trained.trace_root = undone(),
            Self::Unopened => trained.trace_root = unopened(),
            Self::Untold => trained.trace_root = Hash::of(b"steps that nobody is told"),
            Self::Mistold => trained.trace_root = other_steps().root(),
        }
        vec![Event::Trained(trained)]
    }
}
