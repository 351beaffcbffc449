//! The contribution ledger (R6, R29): points per peer, provisional until they vest, gone when a cheat is proven. All integers,
//! all from the record chain, so anyone who replays the chain has the same balances and the same root.
//!
//! Points vest by the round while vesting is short. Where it is long, grants that no audit can single out any more are added up in spans
//! of a sixteenth of `vesting_rounds`, and a span vests with its last round. So an account stays within some dozens of entries
//! whatever the policy, and so does every state of the chain that a peer keeps.
//!
//! **Only proven names are paid.** A name costs nothing, and one that leaves before its work was looked at could have done anything. So the points of an
//! account vest only once [`PROOFS`] audits have proven work of its own; until then they wait, however long, and nothing else is lost. Who fails to open
//! something that was drawn loses what [`Ledger::fail`] says, and begins anew with what it earns from then on.

use rkyv::{Archive, Deserialize, Serialize};

use crate::config::RewardConfig;
use crate::types::*;
use crate::wire::Canonical;

/// Into so many parts the time until points vest is divided at most: a grant vests late by less than one of them.
const SPANS: u64 = 16;

/// Audits that must have proven an account's work before its points vest: one or two may have been its accomplices'.
pub const PROOFS: u32 = 3;

/// Points of one counted round, or of several of one span, not yet vested.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// The round worked in; of several, the last.
    pub round: Round,
    /// Points: verified training FLOPs in billions, and those of proven audits, times the liveness multiplier.
    pub points: u128,
}

/// One peer's account. It outlives membership.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Account {
    /// Whose.
    pub id: PeerId,
    /// Where its tokens are to be paid; empty if nowhere.
    pub address: String,
    /// Tokens counted so far.
    pub tokens: u64,
    /// Rounds counted so far.
    pub rounds: u64,
    /// Of these, rounds in which it owed no proof of speed: those that the liveness multiplier grows with.
    pub lived: u64,
    /// Proven audits so far.
    pub audits: u64,
    /// What was earned up to this round vests though there are fewer proofs: there were enough when it last failed to open something.
    pub proven_until: Round,
    /// Audits that have proven its work since it last failed to open what was drawn; [`PROOFS`] at most.
    pub proofs: u32,
    /// Grants that have not vested, oldest first.
    pub provisional: Vec<Grant>,
    /// Points that can no longer be taken.
    pub vested: u128,
    /// Of these, what was earned since survivors with at most half of a fork's weight went on alone (R21): the rest of the run may
    /// have gone on elsewhere, so a payout of these points is not final.
    pub contested: u128,
    /// Points taken.
    pub slashed: u128,
    /// Points of rounds that are not paid, without blame: nobody could have audited them, or two members could not settle who is right.
    pub unpaid: u128,
    /// Failures that are no proof of cheating: accusations not confirmed, accumulators not opened.
    pub strikes: u32,
    /// When the last of them was given.
    pub struck: Round,
}

impl Account {
    /// What training on so many tokens is worth to this account now.
    fn worth(&self, rewards: &RewardConfig, tokens: u64) -> u128 {
        let seconds = self.lived.saturating_mul(rewards.nominal_round_secs);
        let flops = u128::from(tokens).saturating_mul(u128::from(rewards.flops_per_token));
        (flops / 1_000_000_000).saturating_mul(u128::from(liveness_millionths(seconds))) / 1_000_000
    }

    /// One grant a round: its audits and its work together.
    fn receive(&mut self, round: Round, points: u128) {
        match self.provisional.last_mut().filter(|last| last.round == round) {
            Some(last) => last.points = last.points.saturating_add(points),
            None => self.provisional.push(Grant { round, points }),
        }
    }

    /// Points that have not vested.
    pub fn provisional_points(&self) -> u128 {
        self.provisional
            .iter()
            .map(|grant| grant.points)
            .fold(0, u128::saturating_add)
    }
}

/// All accounts, sorted by id.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    /// Points ever granted.
    pub issued: u128,
    /// The accounts.
    pub accounts: Vec<Account>,
}

impl Ledger {
    /// The root that records carry: BLAKE3 of the canonical bytes, so that a snapshot's ledger is a blob addressed by it.
    pub fn root(&self) -> Hash {
        Hash::of(&self.to_canonical())
    }

    /// An account, if there is one.
    pub fn get(&self, id: &PeerId) -> Option<&Account> {
        self.accounts
            .binary_search_by_key(id, |account| account.id)
            .ok()
            .map(|at| &self.accounts[at])
    }

    /// An account, opened if there is none.
    pub fn open(&mut self, id: PeerId) -> &mut Account {
        let at = match self.accounts.binary_search_by_key(&id, |account| account.id) {
            Ok(at) => at,
            Err(at) => {
                let account = Account {
                    id,
                    address: String::new(),
                    tokens: 0,
                    rounds: 0,
                    lived: 0,
                    audits: 0,
                    proven_until: Round(0),
                    proofs: 0,
                    provisional: Vec::new(),
                    vested: 0,
                    contested: 0,
                    slashed: 0,
                    unpaid: 0,
                    strikes: 0,
                    struck: Round(0),
                };
                self.accounts.insert(at, account);
                at
            }
        };
        &mut self.accounts[at]
    }

    /// Grants points for a counted round (R29); the liveness multiplier grows by it if the member `lives`, that is, owes no proof of its speed.
    pub fn grant(&mut self, rewards: &RewardConfig, id: PeerId, round: Round, tokens: u64, lives: bool) {
        let account = self.open(id);
        let points = account.worth(rewards, tokens);
        account.tokens = account.tokens.saturating_add(tokens);
        account.rounds = account.rounds.saturating_add(1);
        account.lived = account.lived.saturating_add(u64::from(lives));
        account.receive(round, points);
        self.issued = self.issued.saturating_add(points);
    }

    /// Grants the bounty for a proven audit of work of so many tokens. It stands and falls with what the auditor earns in `round`, whose record has the
    /// verdict.
    pub fn bounty(&mut self, rewards: &RewardConfig, id: PeerId, round: Round, tokens: u64) {
        let account = self.open(id);
        let whole = account.worth(rewards, tokens);
        let points = whole.saturating_mul(u128::from(rewards.audit_bounty_permille)) / 1000;
        account.audits = account.audits.saturating_add(1);
        account.receive(round, points);
        self.issued = self.issued.saturating_add(points);
    }

    /// Adds up what was granted before `settled` in one span: no audit asks for a round before that. What was earned from `minority` on
    /// stays apart from what was earned before (R21).
    pub fn add_up(&mut self, rewards: &RewardConfig, settled: Round, minority: Option<Round>) {
        let span = (rewards.vesting_rounds / SPANS).max(1);
        let place = |grant: &Grant| (grant.round.0 / span, minority.is_some_and(|since| grant.round >= since));
        for account in &mut self.accounts {
            account.provisional.dedup_by(|next, grant| {
                let together = next.round < settled && place(next) == place(grant);
                if together {
                    grant.round = next.round;
                    grant.points = grant.points.saturating_add(next.points);
                }
                together
            });
        }
    }

    /// Vests what is old enough after `now` of those whose work has been proven as often as `needed` says; what was earned from `minority` on
    /// is contested (R21).
    pub fn vest(
        &mut self,
        rewards: &RewardConfig,
        now: Round,
        minority: Option<Round>,
        needed: impl Fn(&PeerId) -> u32,
    ) {
        let contested = |grant: &Grant| minority.is_some_and(|since| grant.round >= since);
        for account in &mut self.accounts {
            let ripe = account
                .provisional
                .partition_point(|grant| grant.round.0.saturating_add(rewards.vesting_rounds) <= now.0);
            let mut ripe: Vec<Grant> = account.provisional.drain(..ripe).collect();
            if account.proofs < needed(&account.id) {
                let proven = ripe.partition_point(|grant| grant.round <= account.proven_until);
                let mut waiting = ripe.split_off(proven);
                // However long they wait, they are two entries at most.
                waiting.dedup_by(|next, grant| {
                    let together = contested(next) == contested(grant);
                    if together {
                        grant.round = next.round;
                        grant.points = grant.points.saturating_add(next.points);
                    }
                    together
                });
                account.provisional.splice(..0, waiting);
            }
            for grant in ripe {
                account.vested = account.vested.saturating_add(grant.points);
                if contested(&grant) {
                    account.contested = account.contested.saturating_add(grant.points);
                }
            }
        }
    }

    /// An auditor has shown that it replayed this member's work, and that it agrees.
    pub fn prove(&mut self, id: PeerId) {
        let account = self.open(id);
        account.proofs = account.proofs.saturating_add(1).min(PROOFS);
    }

    /// Takes everything unvested; returns how much that was.
    pub fn slash(&mut self, id: PeerId) -> u128 {
        let account = self.open(id);
        let points = account.provisional_points();
        account.provisional.clear();
        account.slashed = account.slashed.saturating_add(points);
        points
    }

    /// Takes the points of one round; returns how much that was.
    pub fn void(&mut self, id: PeerId, round: Round) -> u128 {
        let account = self.open(id);
        let (gone, kept): (Vec<Grant>, Vec<Grant>) = account.provisional.iter().partition(|grant| grant.round == round);
        account.provisional = kept;
        let points = gone.iter().map(|grant| grant.points).fold(0, u128::saturating_add);
        account.unpaid = account.unpaid.saturating_add(points);
        points
    }

    /// What was drawn of `round`, where `tokens` were claimed, was not opened: takes `times` as many points as that is worth, those of the round itself
    /// and of the rounds before it first, then of those after it, as far as they have not vested; and the name has to be proven anew. Returns how
    /// many points that was.
    pub fn fail(&mut self, rewards: &RewardConfig, id: PeerId, round: Round, tokens: u64, times: u64) -> u128 {
        let mut points = self.void(id, round);
        let account = self.open(id);
        if account.proofs >= PROOFS {
            account.proven_until = round;
        }
        account.proofs = 0;
        let owed = account.worth(rewards, tokens).saturating_mul(u128::from(times));
        let mut left = owed.saturating_sub(points);
        let after = account.provisional.partition_point(|grant| grant.round <= round);
        let (before, after) = account.provisional.split_at_mut(after);
        for grant in before.iter_mut().rev().chain(after) {
            let taken = grant.points.min(left);
            grant.points -= taken;
            left -= taken;
            points = points.saturating_add(taken);
            account.unpaid = account.unpaid.saturating_add(taken);
        }
        account.provisional.retain(|grant| grant.points > 0);
        points
    }

    /// One strike more after `now`; returns how many there are. Those of which the last is older than points take to vest are forgiven: what
    /// happens to the honest now and then must not add up over years.
    pub fn strike(&mut self, rewards: &RewardConfig, id: PeerId, now: Round) -> u32 {
        let account = self.open(id);
        if account.struck.0.saturating_add(rewards.vesting_rounds) < now.0 {
            account.strikes = 0;
        }
        account.strikes = account.strikes.saturating_add(1);
        account.struck = now;
        account.strikes
    }
}

/// The liveness multiplier `1 + ln(1 + hours/12)/5`, at most 2, in millionths (R29). Integers throughout: the same everywhere.
pub fn liveness_millionths(seconds: u64) -> u64 {
    // 1 + hours/12 in units of 2^-32.
    let seconds = u128::from(seconds.min(1 << 40));
    let x = (1u128 << 32) + (seconds << 32) / (12 * 3600);
    // ln x = log2 x * ln 2, with ln 2 in millionths.
    let ln = (log2_fixed(x) * 693_147) >> 32;
    1_000_000 + u64::try_from(ln / 5).unwrap_or(u64::MAX).min(1_000_000)
}

/// log2 of `x * 2^-32` (x >= 2^32) in units of 2^-32: the integer part by shifting, then 32 bits by repeated squaring.
fn log2_fixed(x: u128) -> u128 {
    let whole = x.ilog2() - 32;
    let mut mantissa = x >> whole; // in [2^32, 2^33)
    let mut log = u128::from(whole) << 32;
    for bit in (0..32).rev() {
        mantissa = (mantissa * mantissa) >> 32;
        if mantissa >= 1 << 33 {
            mantissa >>= 1;
            log |= 1 << bit;
        }
    }
    log
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_liveness_multiplier_follows_its_formula() {
        for hours in [0u64, 1, 6, 12, 24, 100, 1000, 100_000] {
            let expected = (1.0 + (1.0 + hours as f64 / 12.0).ln() / 5.0).min(2.0) * 1e6;
            let found = liveness_millionths(hours * 3600) as f64;
            assert!(
                (expected - found).abs() < 3.0,
                "{hours} h: expected {expected}, found {found}"
            );
        }
        assert_eq!(liveness_millionths(u64::MAX), 2_000_000);
    }

    #[test]
    fn a_long_vesting_keeps_few_entries_and_every_point() {
        let rewards = RewardConfig {
            vesting_rounds: 1600,
            ..RewardConfig::default()
        };
        let (id, mut ledger) = (PeerId([1; 32]), Ledger::default());
        let minority = Some(Round(4050));
        for now in (1..=5000).map(Round) {
            ledger.grant(&rewards, id, now, 1_000_000_000, true);
            ledger.add_up(&rewards, Round(now.0.saturating_sub(16)), minority);
            ledger.vest(&rewards, now, minority, |_| 0);
            let account = ledger.get(&id).unwrap();
            assert!(account.provisional.len() <= 36, "{now}: {}", account.provisional.len());
            assert_eq!(account.vested + account.provisional_points(), ledger.issued, "{now}");
        }
        let account = ledger.get(&id).unwrap();
        let last = account.provisional.iter().rev().take(16).map(|grant| grant.round.0);
        assert!(last.eq((4985..=5000).rev()), "what an audit can ask for stays apart");
        assert!(account.provisional[0].round.0 + 1600 > 5000);
        assert!(
            account.provisional[0].round.0 <= 5000 - 1600 + 100,
            "no later than by a span"
        );
        let of_both_sides = account
            .provisional
            .iter()
            .filter(|grant| grant.round.0 / 100 == 40)
            .count();
        assert_eq!(of_both_sides, 2, "the rounds before 4050, and those from it on");
    }

    #[test]
    fn points_of_a_short_vesting_stay_by_the_round() {
        let rewards = RewardConfig {
            vesting_rounds: 16,
            ..RewardConfig::default()
        };
        let (id, mut ledger) = (PeerId([1; 32]), Ledger::default());
        for round in (1..=16).map(Round) {
            ledger.grant(&rewards, id, round, 1_000_000_000, true);
        }
        let before = ledger.clone();
        ledger.add_up(&rewards, Round(100), None);
        assert_eq!(ledger, before);
    }

    #[test]
    fn slashing_takes_what_is_unvested_and_only_that() {
        let mut ledger = Ledger::default();
        let id = PeerId([1; 32]);
        ledger.open(id).vested = 7;
        ledger.open(id).provisional = vec![
            Grant {
                round: Round(1),
                points: 5,
            },
            Grant {
                round: Round(2),
                points: 6,
            },
        ];
        assert_eq!(ledger.void(id, Round(1)), 5);
        assert_eq!(ledger.slash(id), 6);
        let account = ledger.get(&id).unwrap();
        assert_eq!(
            (
                account.vested,
                account.slashed,
                account.unpaid,
                account.provisional.len()
            ),
            (7, 6, 5, 0)
        );
    }

    /// Of a run in which points vest after 16 rounds; an account with 10 points for each of the first `rounds`.
    fn earning(rounds: u64) -> (RewardConfig, PeerId, Ledger) {
        let rewards = RewardConfig {
            vesting_rounds: 16,
            flops_per_token: 1_000_000_000,
            nominal_round_secs: 0,
            ..RewardConfig::default()
        };
        let (id, mut ledger) = (PeerId([1; 32]), Ledger::default());
        for round in (1..=rounds).map(Round) {
            ledger.grant(&rewards, id, round, 10, true);
        }
        (rewards, id, ledger)
    }

    #[test]
    fn points_wait_until_three_audits_have_proven_the_name() {
        let (rewards, id, mut ledger) = earning(40);
        let minority = Some(Round(5));
        let vest = |ledger: &mut Ledger| {
            ledger.vest(&rewards, Round(40), minority, |_| PROOFS);
            let account = ledger.get(&id).unwrap();
            (account.vested, account.provisional_points(), account.provisional.len())
        };
        // Rounds up to 24 are old enough: those of before round 5 and those since are an entry each, and wait.
        assert_eq!(vest(&mut ledger), (0, 400, 2 + 16));
        for proof in 1..=PROOFS {
            assert_eq!(vest(&mut ledger).0, 0, "before proof {proof}");
            ledger.prove(id);
        }
        assert_eq!(vest(&mut ledger), (240, 160, 16));
        assert_eq!(ledger.get(&id).unwrap().contested, 200);
        ledger.prove(id);
        assert_eq!(ledger.get(&id).unwrap().proofs, PROOFS, "no more are counted");
        // It fails in round 30 and never comes back: what is left of the rounds until then is its own.
        assert_eq!(ledger.fail(&rewards, id, Round(30), 10, 3), 30);
        ledger.vest(&rewards, Round(100), minority, |_| PROOFS);
        let account = ledger.get(&id).unwrap();
        assert_eq!((account.vested, account.provisional_points()), (240 + 30, 100));
    }

    #[test]
    fn what_was_not_opened_costs_what_was_not_drawn_before_it_and_the_proofs() {
        let (rewards, id, mut ledger) = earning(12);
        ledger.prove(id);
        // Of round 8, which claimed 10: 35 points, so that of round 5 a half is left.
        assert_eq!(ledger.clone().fail(&rewards, id, Round(8), 7, 5), 35);
        assert_eq!(ledger.fail(&rewards, id, Round(8), 7, 5), 35);
        let left = |ledger: &Ledger| {
            let grants = ledger.get(&id).unwrap().provisional.iter();
            grants.map(|grant| (grant.round.0, grant.points)).collect::<Vec<_>>()
        };
        let rest = [9, 10, 11, 12].map(|round| (round, 10));
        assert_eq!(
            left(&ledger),
            [&[(1, 10), (2, 10), (3, 10), (4, 10), (5, 5)], &rest[..]].concat()
        );
        assert_eq!(ledger.get(&id).unwrap().proofs, 0);
        // Rounds before it are not enough for the next: what came after it goes, too, the first of it first.
        assert_eq!(ledger.fail(&rewards, id, Round(4), 10, 6), 60);
        assert_eq!(left(&ledger), [(10, 5), (11, 10), (12, 10)]);
        assert_eq!(ledger.fail(&rewards, id, Round(12), 1_000_000, u64::MAX), 25);
        assert_eq!(left(&ledger), []);
        assert_eq!(ledger.get(&id).unwrap().unpaid, 120);
    }

    #[test]
    fn strikes_far_apart_do_not_add_up() {
        let rewards = RewardConfig {
            vesting_rounds: 10,
            ..RewardConfig::default()
        };
        let (id, mut ledger) = (PeerId([1; 32]), Ledger::default());
        let strikes = [5, 15, 26, 26].map(|round| ledger.strike(&rewards, id, Round(round)));
        assert_eq!(strikes, [1, 2, 1, 2]);
    }
}
