//! Regrouping after the quorum is lost (R20): those who still hear each other sign that they go on together.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::chain::ChainState;
use super::event::{Effect, Notice};
use super::{SECOND, State, membership, micros};
use crate::config::{QuorumLoss, RunConfig};
use crate::types::*;
use crate::wire::{Body, Scheme, Signed};

/// How long one attempt is given before a new one narrows it down.
const ATTEMPT: Micros = 3 * SECOND;

/// What belongs to the stuck round.
#[derive(Default)]
pub(super) struct RegroupState {
    /// This peer's latest statement, and when it was first made.
    mine: Option<(Signed, Micros)>,
    /// The latest statement of each member.
    statements: BTreeMap<PeerId, (Regroup, Signature)>,
    /// The statements that this branch began with, until its first record is decided.
    proof: Vec<(PeerId, Regroup, Signature)>,
}

impl RegroupState {
    pub fn take_proof(&mut self) -> Vec<(PeerId, Regroup, Signature)> {
        std::mem::take(&mut self.proof)
    }
    pub fn load(&self) -> usize {
        self.statements.len() + self.proof.len()
    }
}

impl State {
    /// Once a second: is the decision overdue, and is too little weight left to ever decide?
    pub(super) fn maybe_regroup(&mut self, now: Micros) {
        let me = self.keys.id();
        if self.config.membership.on_quorum_loss == QuorumLoss::Halt
            || !self.is_member(&me)
            || self.leaving
            || self.is_finished()
        {
            return;
        }
        let alive = self.alive(now);
        let weight: u64 = alive.iter().map(|id| self.voters.weight_of(id)).sum();
        let prompted = !self.regroup.statements.is_empty();
        if self.voters.quorum(weight) {
            self.regroup.mine = None;
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
        let patience = if prompted { overdue / 2 } else { overdue };
        if now < self.round.began + patience {
            return;
        }
        self.state_survivors(now, alive);
        self.try_regroup(now);
    }

    /// Signs who is left: again each second, narrowed down when others name others.
    fn state_survivors(&mut self, now: Micros, alive: Vec<PeerId>) {
        let me = self.keys.id();
        let attempts = self
            .regroup
            .statements
            .iter()
            .filter(|(id, _)| alive.contains(id))
            .map(|(_, (s, _))| s.attempt);
        let highest = attempts.max().unwrap_or(0);
        let current = match &self.regroup.mine {
            Some((message, since)) => match &message.body {
                Body::Regroup(mine) if mine.attempt >= highest && now < since + ATTEMPT => Some(message.clone()),
                Body::Regroup(mine) => {
                    let attempt = if now < since + ATTEMPT {
                        highest
                    } else {
                        highest.max(mine.attempt) + 1
                    };
                    return self.sign_survivors(now, attempt, alive);
                }
                _ => None,
            },
            None => None,
        };
        match current {
            Some(message) => self.out.push(Effect::Broadcast(message)),
            None => {
                let attempt = highest.max(1);
                debug_assert!(alive.contains(&me));
                self.sign_survivors(now, attempt, alive);
            }
        }
    }

    /// One statement for each attempt: survivors are those alive whom no other survivor leaves out.
    fn sign_survivors(&mut self, now: Micros, attempt: u32, alive: Vec<PeerId>) {
        let me = self.keys.id();
        let named_by_all = |id: &PeerId| {
            let mut others = self.regroup.statements.iter().filter(|(other, (statement, _))| {
                alive.contains(other) && statement.survivors.contains(&me) && statement.attempt + 1 >= attempt
            });
            *id == me || others.all(|(_, (statement, _))| statement.survivors.contains(id))
        };
        let survivors: Vec<PeerId> = alive.iter().copied().filter(named_by_all).collect();
        let statement = Regroup {
            slot: self.chain.next_slot(),
            attempt,
            tip: self.chain.agreed.record,
            polka: self.agreement.valid_record().map(|record| record.hash()),
            survivors,
        };
        let message = self.broadcast(Body::Regroup(statement));
        self.regroup.mine = Some((message, now));
    }

    pub(super) fn regroup_statement(&mut self, now: Micros, message: Signed) {
        let Body::Regroup(statement) = message.body else { return };
        if statement.slot != self.chain.next_slot() || statement.tip != self.chain.agreed.record {
            return self.maybe_behind(now, message.signer, statement.slot);
        }
        let members = statement.survivors.iter().all(|id| self.is_member(id));
        if !members || !statement.survivors.is_sorted() || !statement.survivors.contains(&message.signer) {
            return self.reject(message.signer, "regroup", "names strangers, or not its signer".into());
        }
        // Never back to a lower attempt.
        if self
            .regroup
            .statements
            .get(&message.signer)
            .is_some_and(|(known, _)| known.attempt > statement.attempt)
        {
            return;
        }
        self.regroup
            .statements
            .insert(message.signer, (statement, message.signature));
        self.try_regroup(now);
    }

    /// Goes on as a new branch once every survivor has signed the same.
    fn try_regroup(&mut self, now: Micros) {
        let Some((message, _)) = &self.regroup.mine else { return };
        let Body::Regroup(mine) = message.body.clone() else {
            return;
        };
        let mut proof = vec![(self.keys.id(), mine.clone(), message.signature)];
        for id in mine.survivors.iter().filter(|id| **id != self.keys.id()) {
            match self.regroup.statements.get(id) {
                Some((other, signature)) if agrees(other, &mine) => proof.push((*id, other.clone(), *signature)),
                _ => return,
            }
        }
        proof.sort_by_key(|(id, _, _)| *id);
        let branch = branch_number(&mine);
        self.chain = Arc::new(self.chain.regrouped(&self.config, branch, &mine.survivors));
        self.out.push(Effect::StopTraining(self.height().1));
        // The log stays: after a crash this peer is on the old branch again, and must remember what it signed there.
        self.out.push(Effect::Members(self.chain.active().collect()));
        let round = self.height().1;
        self.out.push(Effect::Notice(Notice::Regrouped {
            branch,
            round,
            survivors: mine.survivors,
        }));
        self.parent_view = 0;
        self.start_round(now, Some(&[]));
        self.regroup.proof = proof;
        if let Some(root) = self.model {
            let (branch, round) = (self.chain.agreed.branch, self.chain.agreed.round);
            self.applied(now, branch, round, root);
        }
    }
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
        let member = fork
            .member(id)
            .is_some_and(|member| member.standing == membership::Standing::Active);
        if !member || !agrees(statement, first) || signed.verify(scheme).is_err() {
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
