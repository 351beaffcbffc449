//! Who is audited by whom, and what a verdict does (R24, R25, R27).
//!
//! **The first draw is private.** After record `r`, auditor `i` audits member `j` of that record iff its VRF over the seed of `r`, the round
//! and `j` falls below `p * w_i / (W - w_j)`: `w` the weights that voted on `r`, `W` their sum. The chances of all auditors add up to `p` for each
//! member, and nobody knows who was drawn but the auditor itself, until it asks the member to open its accumulators. The output and its proof
//! ([`Lot`]) travel in the verdict, and every voter checks them. So the chain knows no open audit; it keeps of each of the last
//! `verification.verdict_rounds` rounds what a verdict is checked against ([`Auditable`]): the seed, the weights, who has answered.
//!
//! **What cannot be known** is whether somebody was drawn and keeps silent. It follows that
//! - a round is settled for everyone alike: once `verdict_rounds` have passed, or when an accusation is settled that came before;
//! - who went away before its round could have been audited is not paid for that round, drawn or not. So leaving is no way out;
//! - silence costs an auditor nothing. What holds it to its work would be errors planted on purpose, of which there are none yet.
//!
//! **No lot can be bought.** A key is bound to its member before the seed is known: it is announced with the join, weighs only
//! `membership.weight_delay` rounds later, and a member that comes back must bring the same key. Whoever could choose among seeds gains
//! nothing against auditors whose lots it cannot compute. Weight, not names, is drawn: ten names of one machine draw as much as one.
//!
//! **An accusation is confirmed in public.** A verdict that differs, or that says the member opened nothing, draws a second auditor from the
//! seed of the record that holds it, by weight. Nobody could foresee that seed when the accusation was made. What follows:
//!
//! | first says | second says | |
//! |---|---|---|
//! | differs | differs | everything unvested is taken, the member barred |
//! | differs | agrees | the accuser has a strike |
//! | differs, or not opened | not opened | the round is not paid; a strike, if the member was counted in the last record, so that it was there |
//! | not opened | agrees | nothing: a line may fail between two |
//! | not opened | differs | a third is drawn: two must have seen a difference |
//!
//! Three strikes within `rewards.vesting_rounds` cost what a proven cheat costs. The second auditor may have the openings from the first, who
//! had them from the member under the same hashes: withholding helps only before the first has them.

use rkyv::{Archive, Deserialize, Serialize};

use super::chain::ChainState;
use super::event::Notice;
use super::membership::Standing;
use crate::config::{RunConfig, VerificationConfig};
use crate::types::*;

/// Accusations not confirmed, or openings refused, that cost membership.
pub const MAX_STRIKES: u32 = 3;

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

/// An accusation that a second auditor was drawn to confirm or to clear.
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
    /// Who was drawn to audit it again.
    pub auditor: PeerId,
    /// The record that drew it.
    pub drawn: Round,
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

    /// Whether a record may still want this verdict; what came late or twice is no sign of anything.
    pub fn awaits(&self, signed: &SignedVerdict) -> bool {
        let (verdict, auditor) = (&signed.verdict, signed.auditor);
        let slot = self.next_slot();
        if (verdict.slot.run, verdict.slot.branch) != (slot.run, slot.branch) {
            return false;
        }
        if verdict.draw == 0 {
            let round = self.auditable(verdict.slot.round);
            round.is_some_and(|round| !round.has_answer(verdict.member, auditor))
        } else {
            self.accusation(verdict).is_some_and(|open| open.auditor == auditor)
        }
    }
}

/// The work that `record` counted can be audited from now on.
pub fn open(state: &mut ChainState, record: &Record) {
    let auditable = Auditable {
        round: record.slot.round,
        seed: state.agreed.seed,
        weights: state.agreed.weights.clone(),
        answered: Vec::new(),
    };
    state.agreed.auditable.push(auditable);
}

/// Carries out the verdicts of `record`, and closes what can no longer be audited.
pub fn settle(state: &mut ChainState, config: &RunConfig, record: &Record, seed: &[u8; 32], notices: &mut Vec<Notice>) {
    let now = record.slot.round;
    for signed in &record.verdicts {
        notices.push(Notice::Audit(signed.clone()));
        let (verdict, auditor) = (&signed.verdict, signed.auditor);
        let (round, member) = (verdict.slot.round, verdict.member);
        if verdict.draw == 0 {
            if let Some(auditable) = state.agreed.auditable.iter_mut().find(|one| one.round == round) {
                auditable.answer(member, auditor);
            }
            if verdict.finding != Finding::Agrees {
                accuse(state, seed, now, (round, member), verdict.finding, auditor);
            }
            continue;
        }
        let about = |one: &Accusation| (one.round, one.member, one.auditor) == (round, member, auditor);
        let Some(at) = state.agreed.accusations.iter().position(about) else {
            continue;
        };
        let open = state.agreed.accusations.remove(at);
        match (open.finding, verdict.finding) {
            (Finding::Differs, Finding::Differs) => {
                convict(state, open, "two audits differ from what it claimed", notices);
            }
            (Finding::Differs, Finding::Agrees) => {
                let why = "three of its accusations were not confirmed";
                strike(state, config, now, open.accuser, round, why, notices);
            }
            (_, Finding::Agrees) => {}
            (_, Finding::Differs) => accuse(state, seed, now, (round, member), Finding::Differs, auditor),
            (_, Finding::Unanswered) => {
                state.ledger.void(member, round);
                let there = |one: &super::membership::Member| one.standing == Standing::Active && one.uncounted == 0;
                if state.member(&member).is_some_and(there) {
                    let why = "it opened its accumulators to nobody, three times";
                    strike(state, config, now, member, round, why, notices);
                }
            }
        }
    }
    expire(state, config, seed, now);
    // Going away is no way out of an accusation; being barred already is.
    let barred = |state: &ChainState, id: &PeerId| state.member(id).is_some_and(|one| one.standing == Standing::Banned);
    let open = std::mem::take(&mut state.agreed.accusations);
    state.agreed.accusations = open.into_iter().filter(|one| !barred(state, &one.member)).collect();
    state.agreed.accusations.sort();
}

/// Somebody said that a round is not what its member claimed: another is drawn to look. One accusation of a round at a time.
fn accuse(
    state: &mut ChainState,
    seed: &[u8; 32],
    now: Round,
    (round, member): (Round, PeerId),
    finding: Finding,
    accuser: PeerId,
) {
    let known = state.agreed.accusations.iter_mut();
    if let Some(open) = known.into_iter().find(|one| (one.round, one.member) == (round, member)) {
        // A difference weighs more than silence, and the auditor drawn for the one does for the other.
        if open.finding == Finding::Unanswered && finding == Finding::Differs && open.auditor != accuser {
            (open.finding, open.accuser) = (finding, accuser);
        }
        return;
    }
    match second_auditor(state, seed, round, &member, &accuser) {
        Some(auditor) => state.agreed.accusations.push(Accusation {
            round,
            member,
            finding,
            accuser,
            auditor,
            drawn: now,
        }),
        // Two members alone cannot settle who is right: the round is simply not paid.
        None => drop(state.ledger.void(member, round)),
    }
}

/// Takes a proven cheat's unvested points and its place.
fn convict(state: &mut ChainState, open: Accusation, proof: &'static str, notices: &mut Vec<Notice>) {
    let (member, round) = (open.member, open.round);
    let points = state.ledger.slash(member);
    state.ban(&member);
    notices.push(Notice::Slashed {
        member,
        points,
        round,
        proof,
    });
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
    let points = state.ledger.slash(member);
    state.ban(&member);
    notices.push(Notice::Slashed {
        member,
        points,
        round,
        proof,
    });
}

/// Closes rounds that can no longer be audited, and draws again for accusations whose second auditor was lost.
fn expire(state: &mut ChainState, config: &RunConfig, seed: &[u8; 32], now: Round) {
    let horizon = config.verification.verdict_rounds;
    let over = |since: Round| since.0.saturating_add(horizon) <= now.0;
    let away = |member: Option<&super::membership::Member>| member.is_none_or(|one| one.standing == Standing::Away);
    let rounds = std::mem::take(&mut state.agreed.auditable);
    let (closed, open): (Vec<_>, Vec<_>) = rounds.into_iter().partition(|one| over(one.round));
    state.agreed.auditable = open;
    for round in closed.iter().map(|one| one.round) {
        // Work is paid only after it could have been audited: who went away before that is not paid for it.
        let gone = state.agreed.members.iter().filter(|member| away(Some(*member)));
        let gone: Vec<PeerId> = gone.filter(|one| one.worked_in(round)).map(|one| one.id).collect();
        for member in gone {
            state.ledger.void(member, round);
        }
    }
    for open in std::mem::take(&mut state.agreed.accusations) {
        if !over(open.drawn) {
            state.agreed.accusations.push(open);
        } else if away(state.member(&open.member)) {
            state.ledger.void(open.member, open.round);
        } else {
            // Outlasting one auditor is no way out.
            accuse(state, seed, now, (open.round, open.member), open.finding, open.accuser);
        }
    }
}

/// An active member that is there, drawn by weight, other than the audited and the accuser.
fn second_auditor(
    state: &ChainState,
    seed: &[u8; 32],
    round: Round,
    member: &PeerId,
    accuser: &PeerId,
) -> Option<PeerId> {
    let there = |id: &PeerId| {
        let known = state.member(id);
        known.is_some_and(|one| one.standing == Standing::Active && one.uncounted == 0)
    };
    let weights = state.agreed.weights.iter();
    let able: Vec<(PeerId, u64)> = weights
        .filter(|(id, _)| id != member && id != accuser && there(id))
        .copied()
        .collect();
    let total: u128 = able.iter().map(|(_, weight)| u128::from(*weight)).sum();
    let bytes = [&seed[..], &round.0.to_le_bytes(), &member.0[..], &accuser.0[..]].concat();
    let hash = blake3::derive_key("murmur/v1/second-auditor", &bytes);
    let random = hash.first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
    // 128 random bits over a sum of at most 55: the bias of the remainder is nothing.
    let mut ticket = random.checked_rem(total)?;
    able.into_iter()
        .find(|(_, weight)| {
            let hit = ticket < u128::from(*weight);
            if !hit {
                ticket -= u128::from(*weight);
            }
            hit
        })
        .map(|(id, _)| id)
}

#[cfg(test)]
mod tests;
