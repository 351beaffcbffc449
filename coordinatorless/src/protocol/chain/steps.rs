//! Steps taken already, shared by peers that live in one process: a thousand simulated peers that check the same record on the same
//! state need to do so once, and need one copy of what it leads to. A peer of its own does without.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ChainState, RuleViolation};
use crate::config::RunConfig;
use crate::protocol::event::Notice;
use crate::types::*;
use crate::wire::Scheme;

/// Steps remembered; a run takes one a round on each branch.
const REMEMBERED: usize = 128;

/// A state after a record, with what people may want to know of it.
pub type Step = (Arc<ChainState>, Vec<Notice>);
/// What was the state before (its branch and last record, which determine it), and the record.
type Key = (Branch, Hash, Hash);

/// The memory of a process.
#[derive(Default)]
pub struct Steps {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    steps: BTreeMap<Key, Result<Step, RuleViolation>>,
    order: std::collections::VecDeque<Key>,
    states: BTreeMap<(Branch, Hash), Arc<ChainState>>,
}

impl Steps {
    /// [`ChainState::apply`] for a record with this hash, or what it gave before.
    ///
    /// # Errors
    /// Those of [`ChainState::apply`].
    pub fn apply(
        &self,
        base: &ChainState,
        config: &RunConfig,
        record: &Record,
        hash: Hash,
        scheme: Scheme,
    ) -> Result<Step, RuleViolation> {
        let key = (base.agreed.branch, base.agreed.record, hash);
        if let Some(known) = self.known().steps.get(&key) {
            return known.clone();
        }
        let step = base
            .apply(config, record, scheme)
            .map(|(next, notices)| (Arc::new(next), notices));
        let mut known = self.known();
        known.steps.insert(key, step.clone());
        known.order.push_back(key);
        if known.order.len() > REMEMBERED
            && let Some(oldest) = known.order.pop_front()
        {
            known.steps.remove(&oldest);
        }
        step
    }

    /// The one copy of a state.
    pub fn share(&self, state: &ChainState) -> Arc<ChainState> {
        let mut known = self.known();
        if known.states.len() > REMEMBERED {
            known.states.clear();
        }
        let key = (state.agreed.branch, state.agreed.record);
        let shared = known.states.entry(key).or_insert_with(|| Arc::new(state.clone()));
        if **shared == *state {
            shared.clone()
        } else {
            Arc::new(state.clone())
        }
    }

    /// What a panic elsewhere may have left is whole: nothing is half-inserted.
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
