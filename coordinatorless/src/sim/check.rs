//! What must hold after every step, whatever the faults.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::State;
use crate::protocol::chain::ChainState;
use crate::types::*;
use crate::wire::{Body, Canonical, Signed};

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

/// A promise, and how it was kept.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Invariant {
    /// What is promised.
    pub name: &'static str,
    /// How often it was looked at.
    pub checks: u64,
    /// How often it was found broken.
    pub violations: usize,
}

const ONE_RECORD: &str = "one certified record per branch and round";
const ONE_ROOT: &str = "equal model roots at equal records";
const BOUNDED: &str = "nothing grows past its bound";
const NO_BOAST: &str = "no speed is agreed that a member does not have";
const NOBODY_SLASHED: &str = "no honest peer slashed";
const CHAIN_KEPT: &str = "no peer loses the chain";
const COUNTED_ONCE: &str = "data is counted exactly once or returned";
const PROGRESS: &str = "progress";
const ONE_WORD: &str = "no honest peer says two things in one slot";
const LOGGED: &str = "what is signed is logged first";
const HELD_VOTED: &str = "a prevote is for blobs that are held";
const HELD_WIDELY: &str = "more than a third of the weight, honest, holds what was decided";
/// All of them, in the order in which they are shown.
const ALL: [&str; 12] = [
    ONE_RECORD,
    ONE_ROOT,
    ONE_WORD,
    LOGGED,
    HELD_VOTED,
    HELD_WIDELY,
    COUNTED_ONCE,
    NOBODY_SLASHED,
    NO_BOAST,
    CHAIN_KEPT,
    BOUNDED,
    PROGRESS,
];

/// What a signed message is one of: its signer may say one thing for each.
type Said = (Round, usize, u8, Branch, u64);

/// Rounds for which what was said is remembered.
const REMEMBERED: u64 = 16;

/// Remembers what the peers have said of each round.
#[derive(Default)]
pub(super) struct Checker {
    checks: BTreeMap<&'static str, u64>,
    said: BTreeMap<Said, Hash>,
    /// Votes that each peer has sent since its log was last cleared.
    unlogged: BTreeMap<usize, BTreeSet<Said>>,
    /// The blobs that each proposed record names.
    named: BTreeMap<(Round, Hash), Vec<Hash>>,
    records: BTreeMap<(Branch, Round), (Hash, usize)>,
    roots: BTreeMap<Hash, (Hash, usize)>,
    /// Peers to whom nothing is promised.
    pub liars: BTreeSet<usize>,
    /// A third of the weight or more came to lie: from then on nothing is promised to anyone.
    pub beyond: bool,
    pub violations: Vec<Violation>,
}

impl Checker {
    fn broken(&mut self, invariant: &'static str, round: u64, peers: Vec<usize>, trace: String) {
        if self.beyond || peers.iter().any(|peer| self.liars.contains(peer)) {
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

    fn look(&mut self, invariant: &'static str) {
        *self.checks.entry(invariant).or_default() += 1;
    }

    /// How each promise was kept.
    pub fn invariants(&self) -> Vec<Invariant> {
        let of = |name: &'static str| Invariant {
            name,
            checks: self.checks.get(name).copied().unwrap_or(0),
            violations: self.violations.iter().filter(|one| one.invariant == name).count(),
        };
        ALL.into_iter().map(of).collect()
    }

    /// A message leaves the honest peer that signed it; `logged` entries are in its log, and `holds` tells what it holds.
    pub fn says(&mut self, peer: usize, message: &Signed, logged: usize, holds: impl Fn(&Hash) -> bool) {
        if self.liars.contains(&peer) {
            return;
        }
        let slot = message.body.slot();
        let round = slot.round;
        let (extra, content) = match &message.body {
            Body::Vote(vote) => {
                let prevote = vote.kind == VoteKind::Prevote;
                let record = vote.record.filter(|_| prevote);
                let named = record.and_then(|record| self.named.get(&(round, record)));
                if let Some(missing) = named.map(|named| named.iter().filter(|blob| !holds(blob)).count()) {
                    self.look(HELD_VOTED);
                    if missing > 0 {
                        self.broken(HELD_VOTED, round.0, vec![peer], format!("{missing} blobs are not held"));
                    }
                }
                (
                    u64::from(slot.view) * 2 + u64::from(prevote),
                    vote.record.unwrap_or_default(),
                )
            }
            Body::Proposal(proposal) => (u64::from(slot.view), proposal.record.hash()),
            Body::Regroup(statement) => (u64::from(statement.attempt), Hash::of(&statement.to_canonical())),
            _ => return,
        };
        let said: Said = (round, peer, message.body.kind(), slot.branch, extra);
        self.look(ONE_WORD);
        let known = *self.said.entry(said).or_insert(content);
        if known != content {
            let what = message.body.name();
            let trace = format!("a {what} in view or attempt {extra}: first {known}, then {content}");
            self.broken(ONE_WORD, round.0, vec![peer], trace);
        }
        self.look(LOGGED);
        let sent = self.unlogged.entry(peer).or_default();
        sent.insert(said);
        let sent = sent.len();
        if sent > logged {
            let trace = format!("{sent} messages signed, {logged} entries in the log");
            self.broken(LOGGED, round.0, vec![peer], trace);
        }
        while let Some((said, _)) = self.said.first_key_value()
            && said.0.0 + REMEMBERED < round.0
        {
            self.said.pop_first();
        }
    }

    /// A peer's log was cleared, or lost.
    pub fn log_cleared(&mut self, peer: usize) {
        self.unlogged.remove(&peer);
    }

    /// Somebody proposes this record.
    pub fn proposed(&mut self, record: &Record) {
        let round = record.slot.round;
        let blobs = record.contributions.iter().map(|one| one.commit.blob).collect();
        self.named.insert((round, record.hash()), blobs);
        while let Some(((at, _), _)) = self.named.first_key_value()
            && at.0 + REMEMBERED < round.0
        {
            self.named.pop_first();
        }
    }

    /// The first time that a record is decided: the least weight of honest voters that hold one of its blobs, and that of all.
    pub fn held(&mut self, peer: usize, round: Round, least: u64, total: u64) {
        self.look(HELD_WIDELY);
        if u128::from(least) * 3 <= u128::from(total) {
            let trace = format!("a blob is held by honest voters of weight {least} of {total}");
            self.broken(HELD_WIDELY, round.0, vec![peer], trace);
        }
    }

    /// Whether nobody has decided this round of this branch before.
    pub fn is_new(&self, slot: Slot) -> bool {
        !self.records.contains_key(&(slot.branch, slot.round))
    }

    /// One certified record for each branch and round. Each could have slashed somebody (`slashed` is told) or have left a peer with
    /// a chain or model apart from the others' (`warned` is told).
    pub fn decided(&mut self, peer: usize, decided: &Decided) {
        [ONE_RECORD, NOBODY_SLASHED, CHAIN_KEPT]
            .into_iter()
            .for_each(|promise| self.look(promise));
        if self.liars.contains(&peer) {
            return; // what it says was decided binds nobody
        }
        let slot = decided.record.slot;
        let hash = decided.record.hash();
        let (known, first) = *self.records.entry((slot.branch, slot.round)).or_insert((hash, peer));
        if known != hash {
            let trace = format!("expected {known}, found {hash}");
            self.broken(ONE_RECORD, slot.round.0, vec![first, peer], trace);
        }
    }

    /// Equal model roots at equal records.
    pub fn applied(&mut self, peer: usize, round: Round, record: Hash, root: Hash) {
        self.look(ONE_ROOT);
        if self.liars.contains(&peer) {
            return;
        }
        let (known, first) = *self.roots.entry(record).or_insert((root, peer));
        if known != root {
            let trace = format!("expected {known}, found {root}");
            self.broken(ONE_ROOT, round.0, vec![first, peer], trace);
        }
    }

    /// Nothing grows past its bound.
    pub fn bounded(&mut self, peer: usize, state: &State) {
        self.look(BOUNDED);
        let members = state.chain().agreed.members.len();
        let (load, bound) = (state.load(), LOAD_BASE + LOAD_PER_PEER * members);
        if load > bound {
            let trace = format!("expected at most {bound} entries, found {load}");
            self.broken(BOUNDED, state.chain().agreed.round.0, vec![peer], trace);
        }
    }

    /// Something that only honest peers took part in must slash nobody.
    pub fn slashed(&mut self, peer: usize, round: Round, member: PeerId) {
        self.broken(NOBODY_SLASHED, round.0, vec![peer], format!("{member} was slashed"));
    }

    /// What a member is agreed to have shown, and what it has, in operations a microsecond.
    pub fn shown(&mut self, peer: usize, asked: Round, shown: f64, has: f64) {
        self.look(NO_BOAST);
        if shown > has {
            let trace = format!("expected {has} at most, found {shown}");
            self.broken(NO_BOAST, asked.0, vec![peer], trace);
        }
    }

    /// A peer said something about itself that should not happen.
    pub fn warned(&mut self, peer: usize, round: Round, warning: &str) {
        self.broken(CHAIN_KEPT, round.0, vec![peer], warning.to_owned());
    }

    /// Every batch handed out so far was counted once, retired, is in flight, or waits to be handed out again.
    pub fn data(
        &mut self,
        peer: usize,
        chain: &ChainState,
        records: &BTreeMap<Round, std::sync::Arc<Decided>>,
        batch: u64,
    ) {
        self.look(COUNTED_ONCE);
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
        let in_flight = chain.agreed.in_flight.as_ref().map_or(0, |work| work.batches());
        if counted + retired + waiting + in_flight != chain.agreed.cursor {
            let trace = format!(
                "handed out {}, counted {counted}, retired {retired}, waiting {waiting}, in flight {in_flight}",
                chain.agreed.cursor
            );
            self.broken(COUNTED_ONCE, chain.agreed.round.0, vec![peer], trace);
        }
    }

    /// Progress: after the faults, everyone alive arrives.
    pub fn arrived(&mut self, peer: usize, round: Round, goal: u64) {
        self.look(PROGRESS);
        if round.0 >= goal {
            return;
        }
        let trace = format!("expected round {goal}, still in {round}");
        self.broken(PROGRESS, round.0, vec![peer], trace);
    }
}
