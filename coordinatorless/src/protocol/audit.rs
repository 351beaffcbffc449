//! Who is audited by whom, and what a verdict does (R24, R25, R27; thin: the draw is public once the record is decided, and one
//! second auditor confirms or clears).

use rkyv::{Archive, Deserialize, Serialize};

use super::chain::ChainState;
use super::event::Notice;
use crate::config::RunConfig;
use crate::types::*;

/// Accusations not confirmed that cost membership.
pub const MAX_STRIKES: u32 = 3;

/// An audit that was drawn and not answered.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct OpenAudit {
    /// The audited round.
    pub round: Round,
    /// The member audited.
    pub member: PeerId,
    /// 0 first draw, 1 confirmation.
    pub draw: u8,
    /// Who was drawn to audit.
    pub auditor: PeerId,
    /// The record that drew it.
    pub drawn: Round,
    /// Who found a difference in the first draw.
    pub accuser: Option<PeerId>,
}

/// What identifies an audit within a branch.
pub type Key = (Round, PeerId, u8);

impl OpenAudit {
    /// Its key.
    pub fn key(&self) -> Key {
        (self.round, self.member, self.draw)
    }
}

/// The audit that a verdict answers.
pub fn key(verdict: &Verdict) -> Key {
    (verdict.slot.round, verdict.member, verdict.draw)
}

/// Draws audits of the contributions that `record` counted, by the seed after it: commits were fixed before anyone but the proposer
/// knew it.
pub fn draw(state: &mut ChainState, config: &RunConfig, record: &Record) {
    let (round, seed) = (record.slot.round, state.agreed.seed);
    for contribution in &record.contributions {
        let lot = lot(&seed, "member", round, &contribution.member, 0);
        // Thousandths of 2^64, without dividing first.
        if u128::from(lot) * 1000 >= u128::from(config.verification.audit_permille) << 64 {
            continue;
        }
        if let Some(auditor) = auditor(state, &seed, round, &contribution.member, 0, None) {
            let (member, drawn) = (contribution.member, round);
            state.agreed.audits.push(OpenAudit {
                round,
                member,
                draw: 0,
                auditor,
                drawn,
                accuser: None,
            });
        }
    }
    state.agreed.audits.sort();
}

/// Carries out the verdicts of `record`, and closes audits that nobody answered in time.
pub fn settle(state: &mut ChainState, config: &RunConfig, record: &Record, seed: &[u8; 32], notices: &mut Vec<Notice>) {
    let now = record.slot.round;
    for signed in &record.verdicts {
        notices.push(Notice::Audit(signed.clone()));
        let verdict = &signed.verdict;
        let Some(at) = state.agreed.audits.iter().position(|open| open.key() == key(verdict)) else {
            continue;
        };
        let open = state.agreed.audits.remove(at);
        let member = verdict.member;
        match (verdict.finding, open.accuser) {
            (Finding::Agrees, None) => {}
            // Cleared: the accuser pays with a strike.
            (Finding::Agrees, Some(accuser)) => strike(state, accuser),
            // One auditor's word: it costs the round's points and no more.
            (Finding::Unanswered, _) => drop(state.ledger.void(member, open.round)),
            (Finding::Differs, None) => {
                let accuser = Some(signed.auditor);
                match auditor(state, seed, open.round, &member, 1, accuser) {
                    Some(auditor) => {
                        let round = open.round;
                        state.agreed.audits.push(OpenAudit {
                            round,
                            member,
                            draw: 1,
                            auditor,
                            drawn: now,
                            accuser,
                        });
                    }
                    // Two members alone cannot settle who is right: the round is simply not paid.
                    None => drop(state.ledger.void(member, open.round)),
                }
            }
            (Finding::Differs, Some(_)) => {
                let points = state.ledger.slash(member);
                state.ban(&member);
                notices.push(Notice::Slashed {
                    member,
                    points,
                    round: open.round,
                    proof: "two audits differ from what it claimed",
                });
            }
        }
    }
    let horizon = config.verification.verdict_rounds;
    let open = std::mem::take(&mut state.agreed.audits);
    let (expired, open): (Vec<_>, Vec<_>) = open.into_iter().partition(|open| open.drawn.0 + horizon <= now.0);
    state.agreed.audits = open;
    for audit in expired {
        // Work is paid only after it could have been audited: who went away before that is not paid for it.
        let gone = state
            .member(&audit.member)
            .is_none_or(|member| member.standing == super::membership::Standing::Away);
        if gone {
            state.ledger.void(audit.member, audit.round);
            continue;
        }
        // An accusation whose second auditor was lost is drawn again, so that outlasting one auditor is no way out.
        if audit.draw == 1
            && let Some(auditor) = auditor(
                state,
                seed,
                audit.round,
                &audit.member,
                now.0.min(255) as u8,
                audit.accuser,
            )
        {
            state.agreed.audits.push(OpenAudit {
                auditor,
                drawn: now,
                ..audit
            });
        }
    }
    // Going away is no way out of an audit; being barred already is.
    let members = std::mem::take(&mut state.agreed.members);
    state.agreed.audits.retain(|open| {
        let member = members.iter().find(|member| member.id == open.member);
        member.is_none_or(|member| member.standing != super::membership::Standing::Banned)
    });
    state.agreed.members = members;
    state.agreed.audits.sort();
}

fn strike(state: &mut ChainState, id: PeerId) {
    let account = state.ledger.open(id);
    account.strikes += 1;
    if account.strikes >= MAX_STRIKES {
        state.ledger.slash(id);
        state.ban(&id);
    }
}

/// The active member with the lowest lot, other than the audited, the accuser, and those who have been silent lately.
fn auditor(
    state: &ChainState,
    seed: &[u8; 32],
    round: Round,
    member: &PeerId,
    salt: u8,
    accuser: Option<PeerId>,
) -> Option<PeerId> {
    let known = state
        .agreed
        .members
        .iter()
        .filter(|other| other.standing == super::membership::Standing::Active);
    known
        .filter(|other| other.uncounted == 0 && other.id != *member && Some(other.id) != accuser)
        .map(|other| {
            let bytes = [&member.0[..], &other.id.0[..]].concat();
            (
                lot(seed, "auditor", round, &PeerId(*blake3::hash(&bytes).as_bytes()), salt),
                other.id,
            )
        })
        .min()
        .map(|(_, id)| id)
}

fn lot(seed: &[u8; 32], what: &str, round: Round, id: &PeerId, salt: u8) -> u64 {
    let bytes = [&seed[..], what.as_bytes(), &round.0.to_le_bytes(), &id.0[..], &[salt]].concat();
    let hash = blake3::derive_key("murmur/v1/audit-draw", &bytes);
    u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
}
