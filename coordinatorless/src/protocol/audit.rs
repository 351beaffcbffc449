//! Who is audited by whom, and what a verdict does (R24, R25, R27).
//!
//! **The first draw is private.** After record `r`, auditor `i` audits member `j` of that record iff its VRF over the seed of `r`, the round
//! and `j` falls below `p * w_i / (W - w_j)`: `w` the weights that voted on `r`, `W` their sum. The chances of all auditors add up to `p` for each
//! member, and nobody knows who was drawn but the auditor itself, until it asks the member to open its accumulators. The output and its proof
//! ([`Lot`]) travel in the verdict, and every voter checks them. So the chain knows no open audit; it keeps of each of the last
//! `verification.verdict_rounds` rounds what a verdict is checked against ([`Auditable`]): the seed, the weights, who has answered.
//!
//! **What cannot be known** is whether somebody was drawn and keeps silent. It follows that
//! - a round is settled for everyone alike, once `verdict_rounds` have passed or an accusation that came before is settled;
//! - who went away before its round could have been audited is not paid for that round, drawn or not. So leaving is no way out;
//! - a round that was drawn and not opened, for whatever reason, stands for those that were not drawn: it costs the pay of `4/p` rounds
//!   ([`VerificationConfig::unopened_costs`]). Nobody can tell who hides from who lost its power, so hiding must not pay more than losing power. Someone honest that is
//!   gone for so long has sent one or two rounds that nobody could ask it for yet, which it loses about as many times four rounds by. A third that lies
//!   can make that three times as much: it asks for nothing while the member is there, and says of its last rounds that nothing was opened once it is gone;
//! - a name is paid once three audits have proven work of its own, and anew after it failed to open something ([`crate::ledger::PROOFS`]): names
//!   cost nothing, and one that is left whenever someone asks would be paid for what it did not do between;
//! - silence costs an auditor no more than its pay. A verdict that agrees is paid what the work itself is (`rewards.audit_bounty_permille`), and
//!   counts only with what shows that its author replayed the round ([`super::replayed`]): who says "agrees" without it is not heard.
//!
//! **No lot can be bought.** A key is bound to its member before the seed is known: it is announced with the join, weighs only
//! `membership.weight_delay` rounds later, and a member that comes back must bring the same key. Whoever could choose among seeds gains
//! nothing against auditors whose lots it cannot compute. Weight, not names, is drawn: ten names of one machine draw as much as one.
//!
//! **An accusation goes before everyone who votes.** A verdict that differs, or that says the member opened nothing, asks all other voters to audit
//! that round again, by the leaves that the accuser opened. If the member is said to have told no steps ([`super::replayed`]), the others only ask it for
//! them. More than a third of the weight decides, since someone honest is among them: less than a third
//! that lies can neither convict an honest member nor clear a cheat, nor make an honest accuser look false. It takes two at least, so that of two
//! members neither can convict the other. That costs a replay of one round for each voter; who accuses falsely can do so three times. To say that nothing was
//! opened costs nobody a strike, as a line may fail between two; of that a few are looked into at a time, and the others wait.
//!
//! | more than a third says | |
//! |---|---|
//! | differs | everything unvested is taken, the member barred; an accuser that said so is paid like one who found that it agrees |
//! | agrees | the accuser has a strike, if it said that it differs or showed other steps; that a line fails between two is nobody's fault |
//! | untold | the round is not paid; a strike, if the member was there; an accuser that showed other steps is paid |
//! | not opened | the round and what it stands for are not paid, its name is unproven; a strike, if the member was counted in the last record and in the accusation's, so that it was there |
//! | nothing within `verdict_rounds` | the round is not paid |
//!
//! Three strikes within `rewards.vesting_rounds` cost what a proven cheat costs. Voters may have the openings from the accuser, who had them from
//! the member under the same hashes: withholding helps only before the first has them.

use rkyv::{Archive, Deserialize, Serialize};

use super::chain::{ChainState, MAX_REPLAYED, MAX_VERDICTS};
use super::event::{Accused, Notice};
use super::membership::{Member, Standing};
use crate::agreement::Voters;
use crate::config::{RunConfig, VerificationConfig};
use crate::types::*;

/// False accusations, or openings refused, that cost membership.
pub const MAX_STRIKES: u32 = 3;
/// Accusations of having opened or told nothing that are before everyone at a time; others wait.
const MAX_SILENT: usize = 8;

/// The last record by which an audited member tells its trace. From the one after on verdicts that agree may be told, which show it to everyone:
/// what an auditor committed itself to before cannot have been read there.
pub fn asked_until(verification: &VerificationConfig, round: Round) -> Round {
    Round(
        round
            .0
            .saturating_add(verification.verdict_rounds.saturating_sub(2) / 2),
    )
}

/// A round whose work can still be audited, with what verdicts on it are checked against.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Auditable {
    /// The round.
    pub round: Round,
    /// The seed after its record.
    pub seed: [u8; 32],
    /// The weights that voted on it, sorted.
    pub weights: Vec<(PeerId, u64)>,
    /// Member and auditor of every verdict that a record has, sorted.
    pub answered: Vec<(PeerId, PeerId)>,
    /// What was counted, sorted by member.
    pub work: Vec<Claim>,
    /// Whose of it more than a third has judged: nobody is judged twice for one round.
    pub judged: Vec<PeerId>,
    /// Whose of it was accused by who showed its steps, which others were to find for themselves: nobody is paid for vouching any more.
    pub accused: Vec<PeerId>,
}

/// A counted commit, as far as a verdict on it is checked against it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Claim {
    /// Whose.
    pub member: PeerId,
    /// The root over its steps.
    pub trace_root: Hash,
    /// Tokens counted.
    pub tokens: u64,
}

impl Auditable {
    /// Whether `lot` draws `auditor` to audit `member`. `u128`: 64 bits of lot, 10 of thousandths, at most 48 of weight.
    pub fn draws(&self, verification: &VerificationConfig, auditor: &PeerId, member: &PeerId, lot: u64) -> bool {
        let of = |id: &PeerId| {
            let at = self.weights.binary_search_by_key(id, |(other, _)| *other);
            at.map_or(0, |at| u128::from(self.weights[at].1))
        };
        let others = self
            .weights
            .iter()
            .map(|(_, weight)| u128::from(*weight))
            .sum::<u128>()
            .saturating_sub(of(member));
        let chance = u128::from(verification.audit_permille).saturating_mul(of(auditor));
        // lot / 2^64 < permille/1000 * weight/others, without dividing.
        auditor != member && (u128::from(lot) * 1000).saturating_mul(others) < chance << 64
    }

    /// What this member's commit claimed.
    pub fn claim(&self, member: &PeerId) -> Option<&Claim> {
        let at = self.work.binary_search_by_key(member, |claim| claim.member);
        at.ok().map(|at| &self.work[at])
    }

    /// Whether this peer can be drawn at all.
    pub fn weighs(&self, auditor: &PeerId) -> bool {
        self.weights.binary_search_by_key(auditor, |(id, _)| *id).is_ok()
    }

    /// Whether a record has this auditor's word on the member's round.
    pub fn has_answer(&self, member: PeerId, auditor: PeerId) -> bool {
        self.answered.binary_search(&(member, auditor)).is_ok()
    }

    fn answer(&mut self, member: PeerId, auditor: PeerId) {
        if let Err(at) = self.answered.binary_search(&(member, auditor)) {
            self.answered.insert(at, (member, auditor));
        }
    }
}

/// An accusation that all voters were asked to look into.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Accusation {
    /// The audited round.
    pub round: Round,
    /// The member accused.
    pub member: PeerId,
    /// Of what: a difference, or not having opened its accumulators.
    pub finding: Finding,
    /// Who said so.
    pub accuser: PeerId,
    /// Whether the accuser showed steps that the member told and its replay did not take: then it takes a replay to tell.
    pub shown: bool,
    /// What the member's commit claimed.
    pub claim: Claim,
    /// The record that has it.
    pub since: Round,
    /// The accuser's lot, from which follows what all open: the very leaves that it says are false.
    pub lot: [u8; 32],
    /// What has been said since and by the accuser, sorted by who said it.
    pub said: Vec<(PeerId, Finding)>,
}

impl Accusation {
    /// Whether this peer may still say something about it.
    pub fn asks(&self, voter: &PeerId) -> bool {
        *voter != self.member && self.said.binary_search_by_key(voter, |(id, _)| *id).is_err()
    }

    fn say(&mut self, voter: PeerId, finding: Finding) {
        if let Err(at) = self.said.binary_search_by_key(&voter, |(id, _)| *id) {
            self.said.insert(at, (voter, finding));
        }
    }

    /// What more than a third of the weight says, two members at least.
    fn outcome(&self, voters: &Voters) -> Option<Finding> {
        let says = |finding: Finding| {
            let who = self.said.iter().filter(move |(_, said)| *said == finding);
            let weight = who.clone().map(|(id, _)| voters.weight_of(id)).sum();
            who.count() > 1 && voters.honest(weight)
        };
        [Finding::Differs, Finding::Agrees, Finding::Untold, Finding::Unanswered]
            .into_iter()
            .find(|finding| says(*finding))
    }

    /// What a voter who is asked is told of it.
    pub(super) fn accused(&self) -> Accused {
        Accused {
            finding: self.finding,
            by: self.accuser,
            replay: self.finding != Finding::Untold || self.shown,
        }
    }

    /// Whether the accuser replayed, if it is right.
    fn took_a_replay(&self) -> bool {
        self.finding == Finding::Differs || self.shown
    }
}

/// What identifies a verdict within a branch: round, member, draw, auditor.
pub type Key = (Round, PeerId, u8, PeerId);

/// The key of a verdict.
pub fn key(signed: &SignedVerdict) -> Key {
    let verdict = &signed.verdict;
    (verdict.slot.round, verdict.member, verdict.draw, signed.auditor)
}

impl ChainState {
    /// The round as it can be audited, if it still can.
    pub fn auditable(&self, round: Round) -> Option<&Auditable> {
        self.agreed.auditable.iter().find(|one| one.round == round)
    }

    /// The accusation that this verdict would confirm or clear.
    pub fn accusation(&self, verdict: &Verdict) -> Option<&Accusation> {
        let about = |one: &&Accusation| (one.round, one.member) == (verdict.slot.round, verdict.member);
        self.agreed.accusations.iter().find(about)
    }

    /// What of these verdicts the next record has room for, in their order. To say that nothing was opened costs nobody a strike, and has everyone
    /// ask, so of such accusations only some are open at a time; the others wait for as long as they may come.
    pub(super) fn fitting<'a>(&self, verdicts: impl IntoIterator<Item = &'a SignedVerdict>) -> Vec<&'a SignedVerdict> {
        let silent = self.agreed.accusations.iter().filter(|one| !one.took_a_replay());
        let (mut silent, mut replayed, mut all) = (silent.count(), 0, 0);
        let fits = |signed: &&SignedVerdict| {
            let verdict = &signed.verdict;
            let shows = verdict.replayed.is_some();
            let accuses = verdict.draw == 0 && matches!(verdict.finding, Finding::Unanswered | Finding::Untold);
            let opens = accuses && !shows && self.accusation(verdict).is_none();
            let room = all < MAX_VERDICTS && (!shows || replayed < MAX_REPLAYED) && (!opens || silent < MAX_SILENT);
            if room {
                all += 1;
                replayed += usize::from(shows);
                silent += usize::from(opens);
            }
            room
        };
        verdicts.into_iter().filter(fits).collect()
    }

    /// Whether a record may still want this verdict, lot and signature aside; what came late or twice is no sign of anything.
    pub fn awaits(&self, signed: &SignedVerdict) -> bool {
        self.may_have(signed).is_ok()
    }

    /// Whether this verdict would show a trace that other auditors may still ask for. Once work is said to differ, nobody is paid for vouching for it.
    pub fn is_early(&self, verification: &VerificationConfig, verdict: &Verdict) -> bool {
        let shows = match verdict.finding {
            Finding::Agrees => true,
            Finding::Differs => false,
            Finding::Unanswered | Finding::Untold => verdict.replayed.is_some(),
        };
        verdict.draw == 0 && shows && self.agreed.round <= asked_until(verification, verdict.slot.round)
    }

    /// Everything about a verdict that may change from record to record: a proposer that keeps one which was good once must let go of it when it
    /// is not any more, or nobody votes for its records.
    pub(super) fn may_have(&self, signed: &SignedVerdict) -> Result<(), &'static str> {
        const NOBODY: &str = "nobody awaits it: another branch or auditor, too late, or said before";
        let (verdict, auditor) = (&signed.verdict, signed.auditor);
        let (slot, round) = (self.next_slot(), verdict.slot.round);
        if self
            .member(&verdict.member)
            .is_some_and(|one| one.standing == Standing::Banned)
        {
            return Err("about a member that is barred already");
        }
        if (verdict.slot.run, verdict.slot.branch) != (slot.run, slot.branch) {
            return Err(NOBODY);
        }
        if verdict.draw > 0 {
            let votes = self
                .agreed
                .weights
                .binary_search_by_key(&auditor, |(id, _)| *id)
                .is_ok();
            let asked = votes && self.accusation(verdict).is_some_and(|open| open.asks(&auditor));
            return if asked { Ok(()) } else { Err(NOBODY) };
        }
        if self
            .auditable(round)
            .is_none_or(|open| open.has_answer(verdict.member, auditor))
        {
            return Err(NOBODY);
        }
        let counted = self
            .member(&verdict.member)
            .is_some_and(|member| member.worked_in(round));
        if !counted {
            return Err("on work that was not counted");
        }
        // Who came back since may have come with another key.
        let known = self.member(&auditor).filter(|member| member.joined <= round);
        match known.is_some_and(|member| member.standing != Standing::Banned) {
            true => Ok(()),
            false => Err("not a member when the seed came to be, or barred"),
        }
    }
}

fn claim(one: &Contribution) -> Claim {
    Claim {
        member: one.member,
        trace_root: one.commit.trace_root,
        tokens: one.commit.tokens,
    }
}

/// The work that `record` counted can be audited from now on.
pub fn open(state: &mut ChainState, record: &Record) {
    let auditable = Auditable {
        round: record.slot.round,
        seed: state.agreed.seed,
        weights: state.agreed.weights.clone(),
        answered: Vec::new(),
        work: record.contributions.iter().map(claim).collect(),
        judged: Vec::new(),
        accused: Vec::new(),
    };
    state.agreed.auditable.push(auditable);
}

/// Carries out the verdicts of `record`, and closes what can no longer be audited.
pub fn settle(state: &mut ChainState, config: &RunConfig, record: &Record, notices: &mut Vec<Notice>) {
    let now = record.slot.round;
    for signed in &record.verdicts {
        notices.push(Notice::Audit(signed.clone()));
        let (verdict, auditor) = (&signed.verdict, signed.auditor);
        let about = (verdict.slot.round, verdict.member);
        if verdict.draw == 0
            && let Some(round) = state.agreed.auditable.iter_mut().find(|one| one.round == about.0)
        {
            round.answer(verdict.member, auditor);
            // Said before the others may show what they found.
            if verdict.finding == Finding::Differs && verdict.replayed.is_some() {
                round.accused.push(verdict.member);
            }
        }
        // Checked with the record: it agrees and shows that its auditor replayed. Of what others accuse, those who vouch are not paid.
        if verdict.draw == 0
            && verdict.finding == Finding::Agrees
            && state.accusation(verdict).is_none()
            && let Some(round) = state.auditable(about.0)
            && !round.accused.contains(&about.1)
            && let Some(claim) = round.claim(&about.1)
        {
            let tokens = claim.tokens;
            state.ledger.bounty(&config.rewards, auditor, now, tokens);
            state.ledger.prove(verdict.member);
        }
        let judged = state
            .auditable(about.0)
            .is_some_and(|round| round.judged.contains(&about.1));
        let accuses = verdict.draw == 0 && verdict.finding != Finding::Agrees && !judged;
        let claim = state
            .auditable(about.0)
            .and_then(|round| round.claim(&about.1))
            .copied();
        let known = state
            .agreed
            .accusations
            .iter_mut()
            .find(|one| (one.round, one.member) == about);
        match known {
            // A first verdict on a round that is before everyone is a word like any other's.
            Some(open) => open.say(auditor, verdict.finding),
            None if accuses => {
                state.agreed.accusations.extend(claim.map(|claim| Accusation {
                    round: about.0,
                    member: verdict.member,
                    finding: verdict.finding,
                    accuser: auditor,
                    shown: verdict.replayed.is_some(),
                    claim,
                    since: now,
                    lot: verdict.lot.as_ref().map_or([0; 32], |lot| lot.output),
                    said: vec![(auditor, verdict.finding)],
                }));
            }
            None => {}
        }
    }
    judge(state, config, now, notices);
    expire(state, config, now);
    // Going away is no way out of an accusation; being barred already is.
    let barred = |state: &ChainState, id: &PeerId| state.member(id).is_some_and(|one| one.standing == Standing::Banned);
    let open = std::mem::take(&mut state.agreed.accusations);
    state.agreed.accusations = open.into_iter().filter(|one| !barred(state, &one.member)).collect();
    state.agreed.accusations.sort();
}

/// Carries out what enough voters say.
fn judge(state: &mut ChainState, config: &RunConfig, now: Round, notices: &mut Vec<Notice>) {
    let voters = Voters::new(state.agreed.weights.clone(), state.agreed.seed, Vec::new());
    for open in std::mem::take(&mut state.agreed.accusations) {
        let (member, round) = (open.member, open.round);
        let Some(outcome) = open.outcome(&voters) else {
            state.agreed.accusations.push(open);
            continue;
        };
        if let Some(round) = state.agreed.auditable.iter_mut().find(|one| one.round == round) {
            round.judged.push(member);
        }
        let barred = |one: &Member| one.standing == Standing::Banned;
        let right = outcome == open.finding && open.took_a_replay();
        if right && !state.member(&open.accuser).is_some_and(barred) {
            state
                .ledger
                .bounty(&config.rewards, open.accuser, now, open.claim.tokens);
        }
        match outcome {
            Finding::Differs => {
                let why = "it did not do the work it claimed, says more than a third of the weight";
                state.expel(member, round, why, notices);
            }
            Finding::Agrees if open.took_a_replay() => {
                let why = "three of its accusations were false";
                strike(state, config, now, open.accuser, round, why, notices);
            }
            Finding::Agrees => {}
            Finding::Unanswered | Finding::Untold => {
                let points = match outcome {
                    Finding::Unanswered => {
                        let (tokens, times) = (open.claim.tokens, config.verification.unopened_costs());
                        state.ledger.fail(&config.rewards, member, round, tokens, times)
                    }
                    _ => state.ledger.void(member, round),
                };
                notices.push(Notice::Unpaid {
                    member,
                    points,
                    round,
                    finding: outcome,
                });
                // Who was there when everyone began to ask, and is. What this record counts is noted after it.
                let there = |one: &Member| {
                    let then = open.since == now || one.worked_in(open.since);
                    one.standing == Standing::Active && one.uncounted == 0 && then
                };
                if state.member(&member).is_some_and(there) {
                    let why = "three times it opened nothing, or told no steps or others than it took, says more than a third of the weight";
                    strike(state, config, now, member, round, why, notices);
                }
            }
        }
    }
}

fn strike(
    state: &mut ChainState,
    config: &RunConfig,
    now: Round,
    member: PeerId,
    round: Round,
    proof: &'static str,
    notices: &mut Vec<Notice>,
) {
    if state.ledger.strike(&config.rewards, member, now) < MAX_STRIKES {
        return;
    }
    state.expel(member, round, proof, notices);
}

/// Closes rounds that can no longer be audited, and accusations that too few spoke to.
fn expire(state: &mut ChainState, config: &RunConfig, now: Round) {
    let horizon = config.verification.verdict_rounds;
    let over = |since: Round| since.0.saturating_add(horizon) <= now.0;
    let rounds = std::mem::take(&mut state.agreed.auditable);
    let (closed, open): (Vec<_>, Vec<_>) = rounds.into_iter().partition(|one| over(one.round));
    state.agreed.auditable = open;
    for round in closed.iter().map(|one| one.round) {
        // Work is paid only after it could have been audited: who went away before that is not paid for it.
        let gone = state
            .agreed
            .members
            .iter()
            .filter(|member| member.standing == Standing::Away);
        let gone: Vec<PeerId> = gone.filter(|one| one.worked_in(round)).map(|one| one.id).collect();
        for member in gone {
            state.ledger.void(member, round);
        }
    }
    let accusations = std::mem::take(&mut state.agreed.accusations);
    let (dead, open): (Vec<_>, Vec<_>) = accusations.into_iter().partition(|one| over(one.since));
    state.agreed.accusations = open;
    for one in dead {
        state.ledger.void(one.member, one.round);
    }
}

#[cfg(test)]
mod tests;
