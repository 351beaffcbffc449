//! Catching up by certificates, and meeting another branch (R21).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::chain::ChainState;
use super::event::{Effect, Notice};
use super::roster::Roster;
use super::{SECOND, State, micros, regroup};
use crate::agreement::Agreement;
use crate::types::*;

/// A peer is asked for records at most this often.
const ASK_PAUSE: Micros = SECOND / 2;
/// A branch certified by more than 2/3 of the weights at the fork outweighs every regroup (R21a).
const CERTIFIED: u64 = 1001;

#[derive(Default)]
pub(super) struct SyncState {
    /// When each peer was last asked.
    asked: BTreeMap<PeerId, Micros>,
    /// How far back each peer on another branch was asked for the fork.
    probes: BTreeMap<PeerId, u64>,
}

impl SyncState {
    /// Whether this peer may be asked again. Bounded: what strangers made it grow to is forgotten.
    fn may_ask(&mut self, now: Micros, peer: PeerId) -> bool {
        if self.asked.len() > 256 {
            self.asked.clear();
        }
        self.asked.get(&peer).is_none_or(|at| now >= at + ASK_PAUSE)
    }
}

impl State {
    /// A message from ahead, or from another branch: ask its signer for the records in between.
    pub(super) fn maybe_behind(&mut self, now: Micros, peer: PeerId, slot: Slot) {
        let (branch, round) = self.height();
        if slot.branch == branch && slot.round <= round {
            return;
        }
        if slot.branch == branch {
            self.ask(now, peer, round);
        } else {
            self.probe(now, peer);
        }
    }

    /// What another peer says of its tip.
    pub(super) fn compare_tips(&mut self, now: Micros, peer: PeerId, have: &Have) {
        let mine = &self.chain.agreed;
        if have.slot.branch == mine.branch && have.tip_round > mine.round {
            self.ask(now, peer, mine.round.next());
        } else if have.tip != mine.record && (have.slot.branch != mine.branch || have.tip_round == mine.round) {
            self.probe(now, peer);
        }
    }

    fn ask(&mut self, now: Micros, peer: PeerId, from: Round) {
        if self.sync.may_ask(now, peer) {
            self.sync.asked.insert(peer, now);
            self.out.push(Effect::AskRecords { peer, from });
        }
    }

    /// Asks a peer on another branch for records from further and further back, until one continues a record known here.
    fn probe(&mut self, now: Micros, peer: PeerId) {
        if !self.sync.may_ask(now, peer) {
            return;
        }
        if self.sync.probes.len() > 256 {
            self.sync.probes.clear();
        }
        let back = self.sync.probes.entry(peer).or_insert(0);
        let from = Round(self.chain.agreed.round.next().0.saturating_sub(*back).max(1));
        *back = (*back * 2 + 1).min(self.config.membership.finality_rounds + 1);
        self.ask(now, peer, from);
    }

    /// Decided records from another peer.
    pub(super) fn records(&mut self, now: Micros, from: PeerId, records: Vec<Arc<Decided>>) {
        let known = |decided: &Arc<Decided>| {
            let mine = self.history.get(&decided.record.slot.round);
            mine.is_some_and(|(_, mine)| mine.record == decided.record)
        };
        let fresh: Vec<Arc<Decided>> = records.into_iter().skip_while(|decided| known(decided)).collect();
        let Some(first) = fresh.first() else { return };
        let base_round = first.record.slot.round.previous();
        let Some(base) = self
            .state_after(base_round)
            .filter(|state| state.agreed.record == first.record.parent)
        else {
            return; // not a continuation of anything known: the next probe asks further back
        };
        let tip = self.chain.agreed.round;
        if base_round == tip && self.chain.agreed.record == first.record.parent {
            return self.follow(now, from, base, fresh);
        }
        self.meet_branch(now, from, base, fresh);
    }

    /// The state after a round, as far back as this peer remembers; where a branch begins, that is its fork.
    fn state_after(&self, round: Round) -> Option<Arc<ChainState>> {
        let state = match self.history.get(&round.next()) {
            _ if round == self.chain.agreed.round => &self.chain,
            Some((before, _)) => before,
            None => return None,
        };
        Some(state.fork.clone().unwrap_or_else(|| state.clone()))
    }

    /// Records that continue this peer's own chain (the usual way to catch up).
    fn follow(&mut self, now: Micros, from: PeerId, mut base: Arc<ChainState>, records: Vec<Arc<Decided>>) {
        let start = base.agreed.round.next();
        for decided in records {
            // The state to check against is mine, or what the survivors of the fork made of it. The first record of the branch that
            // this peer itself began is no other branch, whatever proof comes with it.
            let on_mine = decided.record.slot.branch == self.chain.agreed.branch;
            let started = if on_mine && decided.regroup.is_empty() {
                Ok(((*self.chain).clone(), CERTIFIED))
            } else {
                self.branch_start(&base, &decided)
            };
            // A few who went on alone don't take along those who can still decide where they are. What the weights at the
            // fork certified always counts (R21a).
            if let Ok((_, share)) = &started
                && *share < CERTIFIED
                && !on_mine
                && !self.may_leave_for(now, *share)
            {
                return;
            }
            let state = started.map(|(state, _)| state);
            let checked = state.and_then(|state| {
                check_certificate(&state, &decided, self.scheme)?;
                Ok(state)
            });
            match checked {
                Ok(state) => {
                    if !on_mine {
                        let (branch, survivors) = (state.agreed.branch, state.active().collect());
                        let round = decided.record.slot.round;
                        self.out.push(Effect::Notice(Notice::Regrouped {
                            branch,
                            round,
                            survivors,
                        }));
                        self.chain = Arc::new(state);
                    }
                    self.decided(now, decided);
                    base = self.chain.clone();
                }
                Err(reason) => return self.reject(from, "record", reason),
            }
        }
        self.sync.probes.remove(&from);
        let (to, tip) = (self.chain.agreed.round, start);
        if to > tip {
            self.out.push(Effect::Notice(Notice::CaughtUp { from: start, to }));
        }
    }

    /// Whether a regroup of this share of the fork weight may take this peer along: not while a quorum is heard on its own branch,
    /// not before it has listened for as long as one who is asked to regroup (one that has just started hears nobody yet, and a few
    /// liars are quick to say that they alone are left), and never on the word of those who weigh nothing against one who weighs
    /// something.
    fn may_leave_for(&self, now: Micros, share: u64) -> bool {
        let time = &self.config.timing;
        let overdue = micros(time.collect_secs + time.fetch_secs + self.config.membership.regroup_secs);
        if now < self.round.began + overdue / 2 {
            return false;
        }
        let (me, branch) = (self.keys.id(), self.chain.agreed.branch);
        let here = |id: &PeerId| {
            let same = self.haves.get(id).is_some_and(|have| have.slot.branch == branch);
            *id == me || (self.is_alive(now, id) && same)
        };
        let weight: u64 = self
            .voters
            .iter()
            .filter(|(id, _)| here(id))
            .map(|(_, weight)| weight)
            .sum();
        !self.voters.quorum(weight) && (share > 0 || self.voters.weight_of(&me) == 0)
    }

    /// The state a branch starts from, and its fork weight in thousandths.
    fn branch_start(&self, fork: &ChainState, decided: &Decided) -> Result<(ChainState, u64), String> {
        if decided.regroup.is_empty() {
            return Ok((fork.clone(), CERTIFIED));
        }
        regroup::check_proof(fork, &self.config, &decided.regroup, self.scheme).map_err(str::to_owned)
    }

    /// R21: two chains from one fork; which one lives?
    fn meet_branch(&mut self, now: Micros, from: PeerId, fork: Arc<ChainState>, theirs: Vec<Arc<Decided>>) {
        let fork_round = fork.agreed.round;
        let mine: Vec<Arc<Decided>> = self
            .history
            .range(fork_round.next()..)
            .map(|(_, (_, one))| one.clone())
            .collect();
        let Some(first) = theirs.first() else { return };
        // A branch with no record of its own yet is no branch to defend.
        let my_weight = match mine.first() {
            Some(one) => self.branch_start(&fork, one).map_or(0, |(_, weight)| weight),
            None => 0,
        };
        let (start, their_weight) = match self.branch_start(&fork, first) {
            Ok(started) => started,
            Err(reason) => return self.reject(from, "record", reason),
        };
        // R21b: what is final stays.
        if mine.len() as u64 >= self.config.membership.finality_rounds {
            let branch = first.record.slot.branch;
            return self.out.push(Effect::Notice(Notice::PermanentSplit {
                branch,
                fork: fork_round,
            }));
        }
        // R21c: more fork weight, then length, then the smaller hash.
        let first_mine = mine.first().map(|one| one.record.hash());
        let ours = (
            my_weight,
            mine.len(),
            std::cmp::Reverse(first_mine.unwrap_or(Hash([255; 32]))),
        );
        let other = (their_weight, theirs.len(), std::cmp::Reverse(first.record.hash()));
        if ours >= other {
            // R19 keeps this peer silent, and the others may know nothing of what outweighs their branch: nobody else tells them.
            if self.listening && ours > other {
                self.say_where(from);
            }
            return;
        }
        // Everything is checked before anything is given up.
        let mut state = (*fork).clone();
        for decided in &theirs {
            match verify_next(&state, &self.config, decided, self.scheme) {
                Ok((next, _)) => state = next,
                Err(reason) => return self.reject(from, "record", reason),
            }
        }
        let (was, now_on) = (self.chain.agreed.branch, start.agreed.branch);
        self.training.forget_models();
        self.out.push(Effect::Rollback {
            branch: now_on,
            round: fork_round,
        });
        self.out.push(Effect::Notice(Notice::Switched {
            from: was,
            to: now_on,
            fork: fork_round,
        }));
        self.history.split_off(&fork_round.next());
        self.chain = fork;
        self.model = None;
        self.out.push(Effect::Members(
            Roster::new(&start, &start.voters(), &self.keys.id()).neighbours(),
        ));
        for decided in theirs {
            // A chain may hold more than one regroup; all of it was checked above.
            if let Ok(base) = branch_base(&self.chain, &self.config, &decided, self.scheme) {
                self.chain = Arc::new(base);
            }
            self.decided(now, decided);
        }
        self.sync.probes.remove(&from);
    }
}

/// The state after a decided record, everything checked: who went on (where a branch begins), the certificate, every rule.
/// What a joiner, a restarting peer and `ledger verify` do with each record.
pub fn verify_next(
    state: &ChainState,
    config: &crate::config::RunConfig,
    decided: &Decided,
    scheme: crate::wire::Scheme,
) -> Result<(ChainState, Vec<Notice>), String> {
    let start = branch_base(state, config, decided, scheme)?;
    check_certificate(&start, decided, scheme)?;
    start
        .apply(config, &decided.record, scheme)
        .map_err(|violation| violation.to_string())
}

/// The share of the fork weight, in thousandths, with which a record's branch began; `None` where none begins.
pub fn fork_share(
    state: &ChainState,
    config: &crate::config::RunConfig,
    decided: &Decided,
    scheme: crate::wire::Scheme,
) -> Option<u64> {
    let begins = !decided.regroup.is_empty();
    begins.then(|| regroup::check_proof(state, config, &decided.regroup, scheme).map_or(0, |(_, share)| share))
}

/// The state that a record is checked against: the one before it, or what the survivors of a fork made of that.
pub fn branch_base(
    state: &ChainState,
    config: &crate::config::RunConfig,
    decided: &Decided,
    scheme: crate::wire::Scheme,
) -> Result<ChainState, String> {
    if decided.regroup.is_empty() {
        return Ok(state.clone());
    }
    regroup::check_proof(state, config, &decided.regroup, scheme)
        .map(|(state, _)| state)
        .map_err(str::to_owned)
}

fn check_certificate(state: &ChainState, decided: &Decided, scheme: crate::wire::Scheme) -> Result<(), String> {
    let certificate = &decided.certificate;
    let slot = Slot {
        view: certificate.slot.view,
        ..state.next_slot()
    };
    if certificate.slot != slot || certificate.record != decided.record.hash() {
        return Err("certificate for another record, round or branch".into());
    }
    Agreement::certificate_valid(&state.voters(), certificate, scheme).map_err(|error| error.to_string())
}
