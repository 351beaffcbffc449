//! What must hold after every step, whatever the faults.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::State;
use crate::protocol::chain::ChainState;
use crate::types::*;

/// Entries that messages may have grown in one peer, per member: commits, haves, statements and so on, one each, and a few spare.
const LOAD_PER_PEER: usize = 16;
/// And whatever the number of members.
const LOAD_BASE: usize = 1024;

/// A promise broken.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Violation {
    /// Which.
    pub invariant: &'static str,
    /// In which round.
    pub round: u64,
    /// Who saw it.
    pub peers: Vec<usize>,
    /// What was seen.
    pub trace: String,
}

/// Remembers what the peers have said of each round.
#[derive(Default)]
pub(super) struct Checker {
    records: BTreeMap<(Branch, Round), (Hash, usize)>,
    roots: BTreeMap<Hash, (Hash, usize)>,
    /// Peers to whom nothing is promised.
    pub liars: BTreeSet<usize>,
    pub violations: Vec<Violation>,
}

impl Checker {
    fn broken(&mut self, invariant: &'static str, round: u64, peers: Vec<usize>, trace: String) {
        if peers.iter().any(|peer| self.liars.contains(peer)) {
            return;
        }
        // One of each kind is enough to act on; a broken run can break it a million times.
        if self
            .violations
            .iter()
            .filter(|violation| violation.invariant == invariant)
            .count()
            < 8
        {
            self.violations.push(Violation {
                invariant,
                round,
                peers,
                trace,
            });
        }
    }

    /// One certified record for each branch and round.
    pub fn decided(&mut self, peer: usize, decided: &Decided) {
        if self.liars.contains(&peer) {
            return; // what it says was decided binds nobody
        }
        let slot = decided.record.slot;
        let hash = decided.record.hash();
        let (known, first) = *self.records.entry((slot.branch, slot.round)).or_insert((hash, peer));
        if known != hash {
            let trace = format!("expected {known}, found {hash}");
            self.broken(
                "one certified record per branch and round",
                slot.round.0,
                vec![first, peer],
                trace,
            );
        }
    }

    /// Equal model roots at equal records.
    pub fn applied(&mut self, peer: usize, round: Round, record: Hash, root: Hash) {
        if self.liars.contains(&peer) {
            return;
        }
        let (known, first) = *self.roots.entry(record).or_insert((root, peer));
        if known != root {
            let trace = format!("expected {known}, found {root}");
            self.broken("equal model roots at equal records", round.0, vec![first, peer], trace);
        }
    }

    /// Nothing grows past its bound.
    pub fn bounded(&mut self, peer: usize, state: &State) {
        let members = state.chain().agreed.members.len();
        let (load, bound) = (state.load(), LOAD_BASE + LOAD_PER_PEER * members);
        if load > bound {
            let trace = format!("expected at most {bound} entries, found {load}");
            self.broken(
                "nothing grows past its bound",
                state.chain().agreed.round.0,
                vec![peer],
                trace,
            );
        }
    }

    /// Something that only honest peers took part in must slash nobody.
    pub fn slashed(&mut self, peer: usize, round: Round, member: PeerId) {
        self.broken(
            "no honest peer slashed",
            round.0,
            vec![peer],
            format!("{member} was slashed"),
        );
    }

    /// A peer said something about itself that should not happen.
    pub fn warned(&mut self, peer: usize, round: Round, warning: &str) {
        self.broken("no peer loses the chain", round.0, vec![peer], warning.to_owned());
    }

    /// Every batch handed out so far was counted once, retired, or waits to be handed out again.
    pub fn data(
        &mut self,
        peer: usize,
        chain: &ChainState,
        records: &BTreeMap<Round, std::sync::Arc<Decided>>,
        batch: u64,
    ) {
        let counted: u64 = records
            .values()
            .flat_map(|one| &one.record.contributions)
            .map(|one| one.commit.tokens / batch)
            .sum();
        let retired: u64 = records
            .values()
            .flat_map(|one| &one.record.retired)
            .map(|range| range.len)
            .sum();
        let waiting: u64 = chain.agreed.pool.iter().map(|range| range.len).sum();
        if counted + retired + waiting != chain.agreed.cursor {
            let trace = format!(
                "handed out {}, counted {counted}, retired {retired}, waiting {waiting}",
                chain.agreed.cursor
            );
            self.broken(
                "data is counted exactly once or returned",
                chain.agreed.round.0,
                vec![peer],
                trace,
            );
        }
    }

    /// Progress: after the faults, everyone alive arrives.
    pub fn stuck(&mut self, peer: usize, round: Round, goal: u64) {
        let trace = format!("expected round {goal}, still in {round}");
        self.broken("progress", round.0, vec![peer], trace);
    }
}
