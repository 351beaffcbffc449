//! The record chain: what all peers agree on after each record, and the one function that takes a record to the next state.
//!
//! Everything here is pure. [`ChainState::draft`] writes a record, [`ChainState::apply`] checks one against every rule that follows
//! from the chain alone and returns the state after it; a voter, a laggard, a joiner and `ledger verify` all call the same function.

mod rules;
mod steps;

use std::sync::Arc;

use rkyv::{Archive, Deserialize, Serialize};

use super::assignment::Assignment;
use super::audit::{self, Accusation, Auditable};
use super::beacon;
use super::event::Notice;
use super::membership::{self, MEAN_SPEED, Member, Standing};
use super::overlap::InFlight;
use super::speed::{self, SpeedTest};
use crate::agreement::Voters;
use crate::config::RunConfig;
use crate::ledger::{Ledger, PROOFS};
use crate::types::*;
use crate::wire::{Canonical, MAX_RECORD, Scheme};

pub use rules::RuleViolation;
pub use steps::{Step, Steps};

/// Most changes of membership in a record.
pub const MAX_CHANGES: usize = 8;
/// Most verdicts in a record: a third of the voters have to fit into few, as those who ask in vain say so at the same time.
pub const MAX_VERDICTS: usize = 64;
/// Of these, those that show a replay, which are larger.
pub const MAX_REPLAYED: usize = 16;
/// Most pieces of evidence in a record.
pub const MAX_EVIDENCE: usize = 8;
/// Votes older than this many rounds prove nothing any more.
pub const EVIDENCE_ROUNDS: u64 = 64;
/// The longest record that a branch carries over: it travels within one that counts the same contributions once more.
pub const MAX_CARRIED: usize = MAX_RECORD * 7 / 16;
/// A join request is valid for this many rounds after the one it names.
pub const JOIN_ROUNDS: u64 = 16;
/// Proposers whose views failed go last for this many rounds (R10).
const DEMOTED_ROUNDS: u64 = 2;
/// How many views' proposers a state remembers.
const REMEMBERED_VIEWS: View = 16;

/// Everything agreed but the balances; its hash is `state_root`.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// The run.
    pub run: RunId,
    /// The branch.
    pub branch: Branch,
    /// The last round decided.
    pub round: Round,
    /// Its record.
    pub record: Hash,
    /// The seed after it.
    pub seed: [u8; 32],
    /// The next batch of the stream that nobody was given yet.
    pub cursor: BatchIndex,
    /// Returned data, sorted.
    pub pool: Vec<DataRange>,
    /// With overlap (R16), the work that the next record counts, handed out a record ago.
    pub in_flight: Option<InFlight>,
    /// Tokens counted so far.
    pub tokens: u64,
    /// Members, sorted by id.
    pub members: Vec<Member>,
    /// The last weights that were not all zero (R5).
    pub weights: Vec<(PeerId, u64)>,
    /// Proposers whose views failed, with the last round for which they go last.
    pub failed: Vec<(PeerId, Round)>,
    /// Proposers of the first views of the round decided last, and of the one to come.
    pub proposers: [Vec<PeerId>; 2],
    /// The last rounds, whose work can still be audited, oldest first (R24).
    pub auditable: Vec<Auditable>,
    /// Accusations that too few have spoken to yet, sorted.
    pub accusations: Vec<Accusation>,
    /// Proofs of speed that are open, sorted by member.
    pub speeds: Vec<SpeedTest>,
    /// The first round after a regroup whose survivors held at most half of the weight at their fork; the first such one (R21).
    pub minority: Option<Round>,
}

/// The agreed state after a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChainState {
    /// All but the balances.
    pub agreed: Agreed,
    /// The balances.
    pub ledger: Ledger,
    /// Where a branch without a record of its own began: the state after the last certified record. Neither agreed nor stored; it
    /// follows from the statements that began the branch.
    pub fork: Option<Arc<ChainState>>,
}

/// What a proposer puts into a record besides what follows from the chain.
#[derive(Clone, Debug)]
pub struct Draft {
    /// The view in which the parent was decided.
    pub parent_view: View,
    /// Changes of membership.
    pub changes: Vec<Change>,
    /// Contributions.
    pub contributions: Vec<Contribution>,
    /// The model after the parent.
    pub model_root: Hash,
    /// Verdicts.
    pub verdicts: Vec<SignedVerdict>,
    /// Evidence of double votes.
    pub evidence: Vec<Evidence>,
    /// Steps of proofs of speed.
    pub speeds: Vec<SpeedStep>,
    /// The beacon.
    pub beacon: Beacon,
    /// What the first record of a branch carries over.
    pub carried: Option<Carried>,
}

impl ChainState {
    /// The state before round 1.
    pub fn genesis(config: &RunConfig) -> Self {
        let run = config.id();
        let total: u128 = config
            .genesis
            .iter()
            .map(|member| u128::from(member.weight))
            .sum::<u128>()
            .max(1);
        let round_tokens = u128::from(config.membership.round_batches) * u128::from(config.data.batch_tokens());
        let mut ledger = Ledger::default();
        let members = config.genesis.iter().map(|member| {
            ledger.open(member.id).address = member.payout_address.clone();
            let share = (round_tokens * u128::from(member.weight) / total).max(1);
            Member {
                id: member.id,
                vrf_key: member.vrf_key.0,
                standing: Standing::Active,
                joined: Round(0),
                genesis_tokens: u64::try_from(share).unwrap_or(u64::MAX),
                work: Vec::new(),
                speed: MEAN_SPEED,
                uncounted: 0,
                accumulator: config.verification.accumulator_zero,
                proven: 0,
                owes: false,
            }
        });
        let members = members.collect();
        let agreed = Agreed {
            run,
            branch: 0,
            round: Round(0),
            record: Hash::derive("murmur/v1/genesis", &run.0),
            seed: blake3::derive_key("murmur/v1/genesis-seed", &run.0),
            cursor: 0,
            pool: Vec::new(),
            in_flight: None,
            tokens: 0,
            members,
            weights: Vec::new(),
            failed: Vec::new(),
            proposers: [Vec::new(), Vec::new()],
            auditable: Vec::new(),
            accusations: Vec::new(),
            speeds: Vec::new(),
            minority: None,
        };
        let mut state = Self {
            agreed,
            ledger,
            fork: None,
        };
        state.settle_voters(config);
        if config.timing.overlap > 0 {
            // O1: the first round's work is in flight from the beginning, so that the second's can be handed out.
            let first = state.hand_out_for(config, Round(1));
            state.agreed.in_flight = Some(InFlight::freeze(&state, &first, None));
            (state.agreed.cursor, state.agreed.pool) = (first.cursor, first.pool);
        }
        state
    }

    /// Reads a state from its two blobs, which must be those that a record's roots name.
    pub fn from_blobs(agreed: &[u8], ledger: &[u8]) -> Result<Self, crate::wire::WireError> {
        Ok(Self {
            agreed: Agreed::from_canonical(agreed)?,
            ledger: Ledger::from_canonical(ledger)?,
            fork: None,
        })
    }

    /// Both parts in one string of bytes, as the record store keeps them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let agreed = self.agreed.to_canonical();
        let mut bytes = (agreed.len() as u64).to_le_bytes().to_vec();
        bytes.extend(agreed);
        bytes.extend(self.ledger.to_canonical());
        bytes
    }

    /// Reads what [`ChainState::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, crate::wire::WireError> {
        let invalid = crate::wire::WireError::Invalid;
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or(invalid.clone())?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| invalid.clone())?;
        let (agreed, ledger) = rest.split_at_checked(length).ok_or(invalid)?;
        Self::from_blobs(agreed, ledger)
    }

    /// `state_root` of the next record.
    pub fn state_root(&self) -> Hash {
        Hash::of(&self.agreed.to_canonical())
    }

    /// The state after the last certified record, from which every regroup begins, also one that follows another before a record
    /// was decided: on a branch that has one, this state itself.
    pub fn certified(&self) -> &Self {
        self.fork.as_deref().unwrap_or(self)
    }

    /// A member by id.
    pub fn member(&self, id: &PeerId) -> Option<&Member> {
        self.agreed
            .members
            .binary_search_by_key(id, |member| member.id)
            .ok()
            .map(|at| &self.agreed.members[at])
    }

    pub(super) fn member_mut(&mut self, id: &PeerId) -> Option<&mut Member> {
        let at = self.agreed.members.binary_search_by_key(id, |member| member.id).ok()?;
        Some(&mut self.agreed.members[at])
    }

    /// Ids of active members, sorted.
    pub fn active(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.agreed
            .members
            .iter()
            .filter(|member| member.standing == Standing::Active)
            .map(|member| member.id)
    }

    /// Who votes on the next record.
    pub fn voters(&self) -> Voters {
        let unreliable = self
            .agreed
            .members
            .iter()
            .filter(|member| member.uncounted > 0)
            .map(|member| member.id);
        let last = self.agreed.failed.iter().map(|(id, _)| *id).chain(unreliable).collect();
        Voters::new(self.agreed.weights.clone(), self.agreed.seed, last)
    }

    /// Whether this peer takes part.
    pub fn is_active(&self, id: &PeerId) -> bool {
        self.member(id)
            .is_some_and(|member| member.standing == Standing::Active)
    }

    /// Who trains on what in the next round (R7); with overlap that was handed out a record ago (R16).
    pub fn assignment(&self, config: &RunConfig) -> Assignment {
        match &self.agreed.in_flight {
            Some(work) => work.assignment(),
            None => self.hand_out(config),
        }
    }

    /// The work that this state hands out: that of the next round, or with overlap that of the one after.
    pub fn hand_out(&self, config: &RunConfig) -> Assignment {
        let next = self.agreed.round.next();
        let round = match self.agreed.in_flight {
            Some(_) => next.next(),
            None => next,
        };
        self.hand_out_for(config, round)
    }

    fn hand_out_for(&self, config: &RunConfig, round: Round) -> Assignment {
        let quotas = membership::quotas(config, &self.agreed.members, round);
        Assignment::new(&quotas, self.agreed.cursor, &self.agreed.pool)
    }

    /// Run, branch and the round to be decided next.
    pub fn next_slot(&self) -> Slot {
        Slot {
            run: self.agreed.run,
            branch: self.agreed.branch,
            round: self.agreed.round.next(),
            view: 0,
        }
    }

    /// The state from which the next record's work was assigned: where it carries a record over, that is the fork.
    fn worked_from(&self, carried: Option<&Carried>) -> &Self {
        carried.map_or(self, |_| self.certified())
    }

    /// What goes back of the work of this state's next record.
    fn leftovers(
        &self,
        config: &RunConfig,
        assignment: &Assignment,
        counted: &[Contribution],
    ) -> (Vec<DataRange>, Vec<DataRange>) {
        assignment.leftovers(done_batches(config, counted), |id| self.is_active(id))
    }

    /// Writes the next record.
    pub fn draft(&self, config: &RunConfig, draft: Draft) -> Record {
        let worked_from = self.worked_from(draft.carried.as_ref());
        let (returned, retired) = worked_from.leftovers(config, &worked_from.assignment(config), &draft.contributions);
        Record {
            slot: self.next_slot(),
            parent: self.agreed.record,
            parent_view: draft.parent_view,
            changes: draft.changes,
            contributions: draft.contributions,
            returned,
            retired,
            model_root: draft.model_root,
            state_root: self.state_root(),
            ledger_root: self.ledger.root(),
            verdicts: draft.verdicts,
            evidence: draft.evidence,
            speeds: draft.speeds,
            beacon: draft.beacon,
            carried: draft.carried,
        }
    }

    /// Checks everything that follows from the chain alone, and returns the state after the record with what people may want to know.
    /// The model root is the caller's to compare: only it has a model.
    pub fn apply(
        &self,
        config: &RunConfig,
        record: &Record,
        scheme: Scheme,
    ) -> Result<(Self, Vec<Notice>), RuleViolation> {
        self.check_record(config, record, scheme)?;
        Ok(self.advance(config, record))
    }

    /// The state after a record that follows every rule.
    fn advance(&self, config: &RunConfig, record: &Record) -> (Self, Vec<Notice>) {
        let (mut next, mut notices) = (self.clone(), Vec::new());
        next.fork = None;
        let round = record.slot.round;
        // R10: proposers of the parent's failed views go last.
        let failed = self.agreed.proposers[0].iter().take(record.parent_view as usize);
        next.agreed.failed.retain(|(_, until)| *until > round);
        next.agreed
            .failed
            .extend(failed.map(|id| (*id, Round(round.0 + DEMOTED_ROUNDS))));
        next.agreed.failed.sort();
        next.agreed.failed.dedup();

        let seed = beacon::next_seed(&self.agreed.seed, &record.beacon.output);
        next.punish(record, &mut notices);
        audit::settle(&mut next, config, record, &mut notices);
        let worked_from = self.worked_from(record.carried.as_ref());
        next.count_work(config, record, worked_from);
        next.hand_on(self, config, record, worked_from);
        next.change_members(record, config, &mut notices);

        next.agreed.round = round;
        next.agreed.record = record.hash();
        next.agreed.seed = seed;
        // R22: work of the old branch was done under its seeds and signed for its slot; no audit of it belongs here.
        if record.carried.is_none() {
            audit::open(&mut next, record);
        }
        speed::settle(&mut next, config, record, &mut notices);
        next.vest(config);
        membership::normalise_speeds(&mut next.agreed.members);
        next.settle_voters(config);
        (next, notices)
    }

    /// R29: points vest; of rounds that no audit is open for, or can be, only the sum of a span matters.
    fn vest(&mut self, config: &RunConfig) {
        let (now, minority) = (self.agreed.round, self.agreed.minority);
        let auditable = Round(now.0.saturating_sub(2 * config.verification.verdict_rounds));
        let open = self.agreed.accusations.iter().map(|open| open.round);
        let settled = open.fold(auditable, Round::min);
        self.ledger.add_up(&config.rewards, settled, minority);
        // Where nobody is audited, or nobody else is there to do it, nothing can be proven.
        let audited = config.verification.audit_permille > 0;
        let weights = &self.agreed.weights;
        let needed = |id: &PeerId| match audited && weights.iter().any(|(other, _)| other != id) {
            true => PROOFS,
            false => 0,
        };
        self.ledger.vest(&config.rewards, now, minority, needed);
    }

    /// R22: who signed two votes for one slot is barred, and loses what has not vested.
    fn punish(&mut self, record: &Record, notices: &mut Vec<Notice>) {
        for evidence in &record.evidence {
            let (member, round) = (evidence.culprit, evidence.first.0.slot.round);
            self.expel(
                member,
                round,
                "it signed two votes for one slot, as two processes with one key do",
                notices,
            );
        }
    }

    /// Takes a proven cheat's unvested points and its place.
    pub(super) fn expel(&mut self, member: PeerId, round: Round, proof: &'static str, notices: &mut Vec<Notice>) {
        // Judged of two rounds in one record: there is nothing left to take, and nothing new to tell.
        if self.member(&member).is_some_and(|one| one.standing == Standing::Banned) {
            return;
        }
        let points = self.ledger.slash(member);
        self.ban(&member);
        notices.push(Notice::Slashed {
            member,
            points,
            round,
            proof,
        });
    }

    /// Cursor, pool and the work in flight after a record that counts what `worked_from` assigned (R7, O2).
    fn hand_on(&mut self, before: &Self, config: &RunConfig, record: &Record, worked_from: &Self) {
        let handed_out = match before.agreed.in_flight {
            Some(_) => before.hand_out(config),
            None => worked_from.hand_out(config),
        };
        let frozen = before.agreed.in_flight.as_ref();
        self.agreed.in_flight = frozen.map(|_| InFlight::freeze(before, &handed_out, Some(record.model_root)));
        self.agreed.cursor = handed_out.cursor;
        self.agreed.pool = handed_out.pool;
        self.agreed.pool.extend(record.returned.iter().copied());
        self.agreed.pool.sort();
    }

    /// Work, points, quotas and accumulators (R7, R13, R29).
    fn count_work(&mut self, config: &RunConfig, record: &Record, worked_from: &Self) {
        let assignment = worked_from.assignment(config);
        let frozen = worked_from.agreed.in_flight.as_ref().map(|work| &work.shares);
        let (round, batch) = (record.slot.round, config.data.batch_tokens());
        let weighs = config.membership.weight_delay + config.membership.weight_window + 1;
        let horizon = weighs.max(config.verification.verdict_rounds + 1);
        for (place, (id, _)) in assignment.members.iter().enumerate() {
            let asked = frozen.and_then(|shares| shares.get(place)).map(|share| share.speed);
            let counted = contribution_of(&record.contributions, id);
            let tokens = counted.map_or(0, |contribution| contribution.commit.tokens);
            let quota = assignment.quota(id);
            let Some(member) = self.member_mut(id) else { continue };
            let lives = !member.owes;
            member.speed = membership::speed_after(member.speed, asked.unwrap_or(member.speed), quota, tokens / batch);
            member.uncounted = if tokens > 0 {
                0
            } else {
                member.uncounted.saturating_add(1)
            };
            member.work.retain(|(at, _)| at.0 + horizon > round.0);
            if let Some(contribution) = counted {
                member.work.push((round, tokens));
                member.accumulator = contribution.commit.accumulator_after;
                // Barred by this very record: what it delivered is in the model, but is not paid.
                if member.standing != Standing::Banned {
                    self.ledger.grant(&config.rewards, *id, round, tokens, lives);
                }
                self.agreed.tokens = self.agreed.tokens.saturating_add(tokens);
            }
        }
    }

    fn change_members(&mut self, record: &Record, config: &RunConfig, notices: &mut Vec<Notice>) {
        let round = record.slot.round;
        for change in &record.changes {
            match change {
                Change::Join(join, id, _) => {
                    self.ledger.open(*id).address = join.payout_address.clone();
                    self.admit(*id, join.vrf_key, round.next(), config.verification.accumulator_zero);
                    notices.push(Notice::Joined(*id, round));
                }
                Change::Leave(_, id, _) => {
                    self.send_away(id);
                    notices.push(Notice::Left(*id, round));
                }
                Change::Lapse(id) => {
                    self.send_away(id);
                    notices.push(Notice::Lapsed(*id, round));
                }
            }
        }
        // Who has been away for longer than weight lasts leaves no trace but its account.
        self.agreed
            .members
            .retain(|member| member.standing != Standing::Away || !member.work.is_empty());
    }

    fn admit(&mut self, id: PeerId, vrf_key: [u8; 32], from: Round, zero: Hash) {
        if let Some(member) = self.member_mut(&id) {
            (member.standing, member.vrf_key, member.joined, member.uncounted) = (Standing::Active, vrf_key, from, 0);
            member.speed = MEAN_SPEED;
            return;
        }
        let member = Member {
            id,
            vrf_key,
            standing: Standing::Active,
            joined: from,
            genesis_tokens: 0,
            work: Vec::new(),
            speed: MEAN_SPEED,
            uncounted: 0,
            accumulator: zero,
            proven: 0,
            owes: false,
        };
        let at = self.agreed.members.partition_point(|other| other.id < id);
        self.agreed.members.insert(at, member);
    }

    fn send_away(&mut self, id: &PeerId) {
        // Who is barred by this very record stays barred: a goodbye beside it is no way back in.
        if let Some(member) = self.member_mut(id).filter(|member| member.standing == Standing::Active) {
            member.standing = Standing::Away;
            member.genesis_tokens = 0;
        }
    }

    /// Bars a proven cheat for good.
    pub(super) fn ban(&mut self, id: &PeerId) {
        if let Some(member) = self.member_mut(id) {
            member.standing = Standing::Banned;
        }
    }

    /// Weights and proposers for the round to come.
    fn settle_voters(&mut self, config: &RunConfig) {
        let fresh = membership::weights(config, &self.agreed.members, self.agreed.round.next());
        if fresh.is_empty() {
            // R5: a window without work changes nothing, except that who is gone is gone.
            let active: Vec<PeerId> = self.active().collect();
            self.agreed.weights.retain(|(id, _)| active.contains(id));
            if self.agreed.weights.is_empty() {
                self.agreed.weights = active
                    .into_iter()
                    .take(membership::MAX_VOTERS)
                    .map(|id| (id, 1))
                    .collect();
            }
        } else {
            self.agreed.weights = fresh;
        }
        let (voters, round) = (self.voters(), self.agreed.round.next());
        let views = REMEMBERED_VIEWS.min(u32::try_from(self.agreed.weights.len()).unwrap_or(REMEMBERED_VIEWS));
        let order = (0..views).map(|view| voters.proposer(round, view)).collect();
        let before = std::mem::replace(&mut self.agreed.proposers[1], order);
        self.agreed.proposers[0] = before;
    }

    /// The state from which `survivors` go on as a new branch (R20): the others are away, relative weights stay.
    pub fn regrouped(&self, config: &RunConfig, branch: Branch, survivors: &[PeerId]) -> Self {
        let mut next = self.certified().clone();
        next.fork = Some(Arc::new(next.clone()));
        for member in next
            .agreed
            .members
            .iter_mut()
            .filter(|member| member.standing == Standing::Active)
        {
            if !survivors.contains(&member.id) {
                member.standing = Standing::Away;
                member.genesis_tokens = 0;
            }
        }
        next.agreed.branch = branch;
        let voters = self.certified().voters();
        let weight: u64 = survivors.iter().map(|id| voters.weight_of(id)).sum();
        if weight.saturating_mul(2) <= voters.total() {
            next.agreed.minority.get_or_insert(next.agreed.round.next());
        }
        // The old branch's audits name its rounds; evidence counts within one branch only (R22).
        next.agreed.auditable.clear();
        next.agreed.accusations.clear();
        next.agreed.speeds.clear();
        next.settle_voters(config);
        // All weights zero: one each. Newcomers among the survivors have no weight yet, and need none to keep the branch alive.
        next
    }
}

/// Tokens counted, in batches, by member.
fn done_batches<'a>(config: &RunConfig, contributions: &'a [Contribution]) -> impl Fn(&PeerId) -> u64 + 'a {
    let batch = config.data.batch_tokens();
    move |id| contribution_of(contributions, id).map_or(0, |one| one.commit.tokens / batch)
}

/// A member's contribution; they are sorted by member.
fn contribution_of<'a>(contributions: &'a [Contribution], id: &PeerId) -> Option<&'a Contribution> {
    let at = contributions.binary_search_by_key(id, |one| one.member).ok()?;
    contributions.get(at)
}

/// Whom a change is about: one change a record for each.
pub fn subject(change: &Change) -> PeerId {
    match change {
        Change::Join(_, id, _) | Change::Leave(_, id, _) | Change::Lapse(id) => *id,
    }
}

#[cfg(test)]
mod tests;
