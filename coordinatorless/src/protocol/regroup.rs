//! Regrouping after the quorum is lost (R20): those who still hear each other sign that they go on together.
//!
//! - **G1** A peer signs one [`Regroup`] statement for each attempt at a fork and never another, whatever happens in between: it is
//!   in the log before it is sent, and a restarted peer says the same again. A peer without its log signs none (R19).
//! - **G2** The fork is the last certified record, also where a branch was begun from it that has no record yet: a group that
//!   shrinks again before its first decision makes another attempt at the same fork, which anyone can check against the chain.
//! - **G3** A peer acts on the statements of an attempt when it holds the same one from every survivor named, and never on an
//!   attempt below one it has acted on. What it acts on is in its log before it signs anything on the branch, so that it is on
//!   that branch again after a crash.
//! - **G4** Locks are kept. A statement names the highest polka of the stuck round with the prevotes that prove it. The branch's
//!   first record carries over a polka at least as high as the highest that a survivor named: the same contributions on the same
//!   model, with the old record and its prevotes inside, so that anyone can check it ([`Carried`]). Whoever has precommitted the
//!   old record never votes for a first record without; others insist for [`CARRY_VIEWS`] views, since a liar may name a polka
//!   whose record it keeps to itself. Nobody trains meanwhile: the work is done.
//! - **G5** So a record that some peer knows to be decided, and the survivors do not, is counted again rather than contradicted, if
//!   an honest survivor saw its polka. It is still another record: where the old one turns out to be certified, R21a holds.
//!   A polka seen on a branch that ends before its first record is not carried on: nothing there was certified.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::chain::{ChainState, MAX_CARRIED};
use super::event::{Effect, Notice};
use super::roster::Roster;
use super::{SECOND, State, log, micros};
use crate::agreement::Agreement;
use crate::config::{QuorumLoss, RunConfig};
use crate::types::*;
use crate::wire::{Body, Canonical, Scheme, Signed};

/// How long one attempt is given before a new one narrows it down.
const ATTEMPT: Micros = 3 * SECOND;

/// Attempts remembered, of this peer and of others; one further ahead is not believed.
const REMEMBERED: u32 = 8;

/// Views of a branch's first round in which a polka named by others is insisted on.
const CARRY_VIEWS: View = 8;

/// What belongs to the fork: it stays from the last decision to the next, over every branch begun in between.
#[derive(Default)]
pub(super) struct RegroupState {
    /// This peer's statements by attempt: one for each, never another.
    mine: BTreeMap<u32, Signed>,
    /// When the latest was first made.
    since: Micros,
    /// Statements of members by attempt.
    statements: Statements,
    /// The attempt that this branch began with; 0 where none did.
    acted: u32,
    /// The statements that this branch began with, until its first record is decided.
    proof: Vec<(PeerId, Regroup, Signature)>,
    /// The highest polka of the fork that this peer saw itself, with its record.
    carry: Option<(Polka, Arc<Record>)>,
    /// The view of the highest polka that anyone's statement proves.
    named: Option<View>,
}

impl RegroupState {
    /// The contributions that the first record of this branch must count, where this peer knows them.
    pub fn carries(&self) -> impl Iterator<Item = &Contribution> {
        self.carry.iter().flat_map(|(_, record)| &record.contributions)
    }

    /// Whether the work of this round was done at the fork already.
    pub fn is_carrying(&self) -> bool {
        self.carry.is_some() || self.named.is_some()
    }

    /// G4: the lowest view of a polka that this view's proposal must carry over.
    pub fn insists(&self, view: View) -> Option<View> {
        let own = self.carry.as_ref().map(|(polka, _)| polka.view);
        own.max(self.named.filter(|_| view < CARRY_VIEWS))
    }

    /// What this peer would carry over.
    pub fn carried(&self) -> Option<Carried> {
        let (polka, record) = self.carry.clone()?;
        let record = Record::to_canonical(&record);
        Some(Carried { polka, record })
    }

    pub fn take_proof(&mut self) -> Vec<(PeerId, Regroup, Signature)> {
        std::mem::take(&mut self.proof)
    }
    pub fn load(&self) -> usize {
        self.statements.len() + self.proof.len()
    }
}

impl State {
    /// G1, G3: what was signed at this fork before a restart, and the branch that was begun from it.
    pub(super) fn recall_regroup(&mut self, statements: Vec<log::Statement>, began: Option<Vec<log::Statement>>) {
        let (slot, tip) = (self.chain.next_slot(), self.chain.agreed.record);
        for (signer, statement, signature) in statements {
            // The log may be older than the chain: a crash came between storing a record and emptying it.
            if signer == self.keys.id() && statement.slot == slot && statement.tip == tip {
                let (attempt, body) = (statement.attempt, Body::Regroup(statement));
                self.regroup.mine.insert(
                    attempt,
                    Signed {
                        signer,
                        body,
                        signature,
                    },
                );
            }
        }
        let Some(proof) = began else { return };
        let Ok((state, _)) = check_proof(&self.chain, &self.config, &proof, self.scheme) else {
            return;
        };
        self.regroup.acted = proof.first().map_or(0, |(_, statement, _)| statement.attempt);
        self.regroup.proof = proof;
        self.chain = Arc::new(state);
        self.parent_view = 0;
    }

    /// The highest polka of the fork that this peer has seen itself, if it can be carried over.
    fn seen_polka(&self) -> Option<(Polka, Arc<Record>)> {
        let seen = match self.chain.fork {
            Some(_) => self.regroup.carry.clone(),
            None => self.agreement.polka(),
        };
        seen.filter(|(_, record)| Record::to_canonical(record).len() <= MAX_CARRIED)
    }

    /// After a restart on a branch without a record: finds the polka of the fork in the log again. What the replay would say is
    /// over and said to nobody.
    pub(super) fn recall_polka(&mut self, now: Micros) {
        let Some(fork) = self.chain.fork.clone() else { return };
        let (branch, round) = (fork.agreed.branch, fork.agreed.round.next());
        let _said = self
            .agreement
            .start(now, branch, round, Arc::new(fork.voters()), &self.wal);
        let seen = self.agreement.polka();
        self.agreement.stop();
        self.carry_over(seen);
    }

    /// G4: from now on, this branch's first record must carry over what was seen here, or what the statements name.
    fn carry_over(&mut self, seen: Option<(Polka, Arc<Record>)>) {
        self.regroup.carry = seen.filter(|(_, record)| Record::to_canonical(record).len() <= MAX_CARRIED);
        self.regroup.named = named_view(&self.regroup.proof);
    }

    /// On a branch without a record, says again why it began: who missed a statement may still be waiting on the old one.
    pub(super) fn repeat_proof(&mut self) {
        for (signer, statement, signature) in self.regroup.proof.clone() {
            let body = Body::Regroup(statement);
            self.out.push(Effect::Broadcast(Signed {
                signer,
                body,
                signature,
            }));
        }
    }

    /// Once a second: is the decision overdue, and is too little weight left to ever decide?
    pub(super) fn maybe_regroup(&mut self, now: Micros) {
        let me = self.keys.id();
        let halt = self.config.membership.on_quorum_loss == QuorumLoss::Halt;
        if halt || self.listening || !self.is_member(&me) || self.leaving || self.is_finished() {
            return;
        }
        let alive = self.alive(now);
        // Whoever says that it is on another branch is heard, may go on with this peer, and decides nothing on this branch.
        let branch = self.chain.agreed.branch;
        let here = |id: &&PeerId| self.haves.get(id).is_none_or(|have| have.slot.branch == branch);
        let weight: u64 = alive.iter().filter(here).map(|id| self.voters.weight_of(id)).sum();
        if self.voters.quorum(weight) {
            return;
        }
        let time = &self.config.timing;
        let minority = weight.saturating_mul(2) < self.voters.total();
        let factor = if minority {
            self.config.membership.regroup_minority_factor
        } else {
            1.0
        };
        let overdue = micros(time.collect_secs + time.fetch_secs + self.config.membership.regroup_secs * factor);
        // Whoever is asked to regroup, and has lost the quorum too, needn't wait out the rest of its own patience.
        let acted = self.regroup.acted;
        let prompted = self.regroup.statements.keys().any(|(attempt, _)| *attempt > acted);
        let patience = if prompted { overdue / 2 } else { overdue };
        if now < self.round.began + patience {
            return;
        }
        self.state_survivors(now, alive);
        self.try_regroup(now);
    }

    /// Signs who is left: said again each second, narrowed down in a new attempt when others name others.
    fn state_survivors(&mut self, now: Micros, alive: Vec<PeerId>) {
        let acted = self.regroup.acted;
        let highest = highest_attempt(acted, &alive, &self.regroup.statements);
        match self.regroup.mine.last_key_value() {
            Some((attempt, message)) if *attempt >= highest && now < self.regroup.since + ATTEMPT => {
                let message = message.clone();
                self.out.push(Effect::Broadcast(message));
            }
            last => {
                let next = next_attempt(last.map(|(attempt, _)| *attempt), highest);
                self.sign_survivors(now, next, alive);
            }
        }
    }

    /// One statement for each attempt.
    fn sign_survivors(&mut self, now: Micros, attempt: u32, alive: Vec<PeerId>) {
        let me = self.keys.id();
        let before = self
            .regroup
            .mine
            .last_key_value()
            .and_then(|(_, message)| match &message.body {
                Body::Regroup(statement) => Some(statement),
                _ => None,
            });
        let survivors = surviving(&me, attempt, &alive, before, &self.regroup.statements);
        let statement = Regroup {
            slot: self.chain.certified().next_slot(),
            attempt,
            tip: self.chain.agreed.record,
            polka: self.seen_polka().map(|(polka, _)| polka),
            survivors,
        };
        let message = self.keys.sign(&Body::Regroup(statement.clone()));
        // G1: on disk before it leaves.
        self.out
            .push(Effect::Persist(log::statement((me, statement, message.signature))));
        self.out.push(Effect::Broadcast(message.clone()));
        self.regroup.mine.insert(attempt, message);
        self.regroup.since = now;
        while self.regroup.mine.len() as u32 > REMEMBERED {
            self.regroup.mine.pop_first();
        }
    }

    pub(super) fn regroup_statement(&mut self, now: Micros, message: Signed) {
        let Body::Regroup(statement) = message.body else { return };
        let fork = self.chain.certified();
        if statement.slot != fork.next_slot() || statement.tip != fork.agreed.record {
            return self.maybe_behind(now, message.signer, statement.slot);
        }
        let members = statement.survivors.iter().all(|id| fork.is_active(id));
        if !members || !statement.survivors.is_sorted() || !statement.survivors.contains(&message.signer) {
            return self.reject(message.signer, "regroup", "names strangers, or not its signer".into());
        }
        if let Some(polka) = &statement.polka
            && let Err(error) = Agreement::polka_valid(&fork.voters(), fork.next_slot(), polka, self.scheme)
        {
            return self.reject(message.signer, "regroup", format!("its polka proves nothing: {error}"));
        }
        let known = self.regroup.mine.last_key_value().map_or(1, |(attempt, _)| *attempt);
        if statement.attempt == 0 || statement.attempt > known.saturating_add(REMEMBERED) {
            return self.reject(message.signer, "regroup", "an attempt far ahead of any other".into());
        }
        let key = (statement.attempt, message.signer);
        let (mine, known) = (self.regroup.mine.get(&key.0), self.regroup.statements.get(&key));
        if replaces(mine, known, &statement) {
            self.regroup.statements.insert(key, (statement, message.signature));
        }
        // Old attempts of the same peer make room: so many of each at most.
        let of_signer = self
            .regroup
            .statements
            .keys()
            .filter(|(_, id)| *id == message.signer)
            .copied();
        let surplus: Vec<_> = of_signer.collect();
        for key in surplus.iter().rev().skip(REMEMBERED as usize) {
            self.regroup.statements.remove(key);
        }
        self.try_regroup(now);
    }

    /// Goes on as a new branch once every survivor has signed the same as this peer did in some attempt.
    fn try_regroup(&mut self, now: Micros) {
        let Self { keys, regroup, .. } = &*self;
        let complete = complete(&keys.id(), regroup.acted, &regroup.mine, &regroup.statements);
        let Some(proof) = complete else { return };
        let Some((_, mine, _)) = proof.first().cloned() else {
            return;
        };
        let branch = branch_number(&mine);
        let seen = self.seen_polka();
        self.chain = Arc::new(self.chain.regrouped(&self.config, branch, &mine.survivors));
        // G3: the log stays, because what was signed on the old branch must not be forgotten while nothing is decided here.
        self.out.push(Effect::Persist(log::began(&proof)));
        self.regroup.acted = mine.attempt;
        self.regroup.proof = proof;
        self.carry_over(seen);
        self.out.push(Effect::Members(
            Roster::new(&self.chain, &self.chain.voters(), &self.keys.id()).neighbours(),
        ));
        let round = self.height().1;
        let survivors = mine.survivors;
        self.out.push(Effect::Notice(Notice::Regrouped {
            branch,
            round,
            survivors,
        }));
        self.parent_view = 0;
        self.start_round(now, true);
        if let Some(root) = self.model {
            let (branch, round) = (self.chain.agreed.branch, self.chain.agreed.round);
            self.applied(now, branch, round, root);
        }
    }
}

/// Statements of members by attempt, one for each: the first that came, or the one that agrees with this peer's own.
type Statements = BTreeMap<(u32, PeerId), (Regroup, Signature)>;

/// The attempt to take part in: the highest that anyone alive takes part in, or the one after what was acted on.
fn highest_attempt(acted: u32, alive: &[PeerId], statements: &Statements) -> u32 {
    let theirs = statements
        .keys()
        .filter(|(attempt, id)| *attempt > acted && alive.contains(id))
        .map(|(attempt, _)| *attempt);
    theirs.max().unwrap_or(acted.saturating_add(1))
}

/// G1: the attempt to sign for next: the highest there is, but never one that this peer signed for, or one below it.
fn next_attempt(last: Option<u32>, highest: u32) -> u32 {
    last.map_or(highest, |last| highest.max(last.saturating_add(1)))
}

/// Who goes on: those alive whom no other survivor leaves out, and who, after two attempts, have said anything at all. Whom this
/// peer left out in its last statement it leaves out again: else two who heed each other's last word in turn never meet.
fn surviving(
    me: &PeerId,
    attempt: u32,
    alive: &[PeerId],
    before: Option<&Regroup>,
    statements: &Statements,
) -> Vec<PeerId> {
    let kept = |id: &PeerId| {
        let before = before.filter(|before| before.attempt.saturating_add(1) >= attempt);
        before.is_none_or(|before| before.survivors.contains(id))
    };
    let recent = |at: u32| at.saturating_add(2) >= attempt;
    let stated = |id: &PeerId| statements.keys().any(|(at, other)| other == id && recent(*at));
    let named_by_all = |id: &PeerId| {
        let mut others = statements.iter().filter(|((at, other), (statement, _))| {
            at.saturating_add(1) >= attempt && alive.contains(other) && statement.survivors.contains(me)
        });
        others.all(|(_, (statement, _))| statement.survivors.contains(id))
    };
    let goes_on = |id: &PeerId| id == me || ((attempt <= 2 || stated(id)) && kept(id) && named_by_all(id));
    alive.iter().copied().filter(goes_on).collect()
}

/// G3: the statements to act on: of the highest attempt, above the one acted on, in which every survivor has signed the same.
fn complete(
    me: &PeerId,
    acted: u32,
    mine: &BTreeMap<u32, Signed>,
    statements: &Statements,
) -> Option<Vec<log::Statement>> {
    let mut attempts = mine.range(acted.saturating_add(1)..).rev();
    attempts.find_map(|(_, message)| proof_of(me, message, statements))
}

/// The statements of all survivors that this one of mine names, if they are there and agree.
fn proof_of(me: &PeerId, message: &Signed, statements: &Statements) -> Option<Vec<log::Statement>> {
    let Body::Regroup(mine) = &message.body else {
        return None;
    };
    let mut proof = vec![(*me, mine.clone(), message.signature)];
    for id in mine.survivors.iter().filter(|id| *id != me) {
        let (other, signature) = statements.get(&(mine.attempt, *id))?;
        if !agrees(other, mine) {
            return None;
        }
        proof.push((*id, other.clone(), *signature));
    }
    proof.sort_by_key(|(id, _, _)| *id);
    Some(proof)
}

/// G4: the view of the highest polka that these statements prove.
fn named_view(proof: &[log::Statement]) -> Option<View> {
    let polkas = proof.iter().filter_map(|(_, statement, _)| statement.polka.as_ref());
    polkas.map(|polka| polka.view).max()
}

/// Whether a statement takes the place of the one known of the same signer and attempt. The first stays, unless this one agrees
/// with this peer's own: a liar that told the others so and this peer something else would keep it off their branch for good, and
/// them without its vote.
fn replaces(mine: Option<&Signed>, known: Option<&(Regroup, Signature)>, new: &Regroup) -> bool {
    let with_mine = |other: &Regroup| match mine.map(|mine| &mine.body) {
        Some(Body::Regroup(mine)) => agrees(mine, other),
        _ => false,
    };
    known.is_none_or(|(known, _)| with_mine(new) && !with_mine(known))
}

/// Two statements that allow to go on together; what each saw of the stuck round may differ.
fn agrees(one: &Regroup, other: &Regroup) -> bool {
    (one.slot, one.attempt, one.tip, &one.survivors) == (other.slot, other.attempt, other.tip, &other.survivors)
}

/// The number of the branch on which these survivors go on: never 0, and another for every other group, attempt or fork.
fn branch_number(statement: &Regroup) -> Branch {
    let mut bytes = statement.tip.0.to_vec();
    bytes.extend(statement.slot.branch.to_le_bytes());
    bytes.extend(statement.attempt.to_le_bytes());
    bytes.extend(statement.survivors.iter().flat_map(|id| id.0));
    let hash = blake3::derive_key("murmur/v1/branch", &bytes);
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]).max(1)
}

/// Checks the statements that begin a branch at `fork`; returns the state that the branch starts from, and the fork weight that went
/// along, in thousandths of the total.
pub fn check_proof(
    fork: &ChainState,
    config: &RunConfig,
    proof: &[(PeerId, Regroup, Signature)],
    scheme: Scheme,
) -> Result<(ChainState, u64), &'static str> {
    if config.membership.on_quorum_loss == QuorumLoss::Halt {
        return Err("this run waits for its quorum: no branch begins in it");
    }
    let Some((_, first, _)) = proof.first() else {
        return Err("no statements");
    };
    if first.slot != fork.next_slot() || first.tip != fork.agreed.record {
        return Err("statements for another fork");
    }
    if !first.survivors.iter().eq(proof.iter().map(|(id, _, _)| id)) || !first.survivors.windows(2).all(|p| p[0] < p[1])
    {
        return Err("not one statement of each survivor");
    }
    for (id, statement, signature) in proof {
        let signed = Signed {
            signer: *id,
            body: Body::Regroup(statement.clone()),
            signature: *signature,
        };
        if !fork.is_active(id) || !agrees(statement, first) || signed.verify(scheme).is_err() {
            return Err("a statement is not a member's, differs, or is not signed");
        }
    }
    let voters = fork.voters();
    let weight: u64 = first.survivors.iter().map(|id| voters.weight_of(id)).sum();
    let share = u128::from(weight) * 1000 / u128::from(voters.total().max(1));
    Ok((
        fork.regrouped(config, branch_number(first), &first.survivors),
        u64::try_from(share).unwrap_or(0),
    ))
}

#[cfg(test)]
mod model;
