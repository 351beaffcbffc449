//! Claims work that it did not do, and is gone whenever an auditor asks, until no record can have the verdict: it might have lost its power.

use rand::RngExt;

use super::false_work::{FalseWork, shows};
use super::{Adversary, Stage};
use crate::protocol::event::{Effect, Event};
use crate::types::*;

/// It listens while it is away.
pub(in crate::sim) struct Dodger {
    /// Of so many rounds it does all but one.
    of: u32,
    away_until: Round,
    away: bool,
}

impl Dodger {
    pub(super) fn new(of: u32) -> Self {
        Self {
            of,
            away_until: Round(0),
            away: false,
        }
    }
}

impl Adversary for Dodger {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        self.away = stage.chain().agreed.round <= self.away_until;
        match stage.rng.random_ratio(1, self.of) {
            true => FalseWork::Unopened.hears(stage, event),
            false => vec![event],
        }
    }

    fn turn(&mut self, _stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let told = matches!(
            effect,
            Effect::Broadcast(_) | Effect::Multicast { .. } | Effect::Send(..)
        );
        if told && self.away { Vec::new() } else { vec![effect] }
    }

    fn is_asked(&mut self, commit: &Commit, until: Round) {
        if shows(commit) == Finding::Unanswered {
            self.away_until = self.away_until.max(until);
            self.away = true;
        }
    }

    fn is_away(&self) -> bool {
        self.away
    }

    fn serves(&self, _blob: &Hash, _to: &PeerId) -> bool {
        !self.away
    }
}
