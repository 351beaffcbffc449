//! Whether honesty pays in a run (R28): the proof-of-sampling condition and what follows from it, with the numbers of a configuration.
//!
//! Everything is counted in rounds' rewards: an honest member is granted 1 a round, and its work costs it `cost_share` of that. Who
//! cheats in a round saves that cost, and is caught with the chance `q = 1 - e^(-p(1-r))`, at least: auditors are drawn one by one, `p` of
//! them for a contribution on average, of whom one must be honest when a share `r` of the weight colludes. The other voters confirm it, of
//! whom more than a third are honest. A caught cheat loses the round's own points and everything unvested, the points of `vesting_rounds` rounds, and its
//! place.
//!
//! 1. **One round.** Who has always been honest and cheats once must lose more than it saves: `q * (1 + vesting_rounds) > cost_share`.
//! 2. **Ever new names.** A name costs nothing. Who cheats in every round, and comes back under another name when it is caught, is paid
//!    for a round only if it is not caught in the `vesting_rounds` rounds after it: `(1-q)^vesting_rounds` of what it claims. That must
//!    be less than what honest work leaves, `1 - cost_share`. Who cheats in a part of its rounds gains less: what it saves grows with
//!    the part, and the chance to be caught faster than that.
//! 3. **In time.** A verdict comes within `verdict_rounds`, and its confirmation within as many again. Points must not vest before.
//! 4. **The honest.** A replay that is wrong about honest work, with the chance `alpha`, must not make honest work a loss:
//!    `p * alpha * vesting_rounds <= 1 - cost_share`.
//! 5. **The auditors.** A replay costs what the work costs. A proven audit must pay more than that, or silence pays better: `bounty > cost_share`, the
//!    bounty `rewards.audit_bounty_permille` thousandths of the work's reward. All audits together take `p * bounty` of what work is paid. Who is
//!    drawn to audit an accomplice is paid for no replay, whether it vouches for it or gives it away, if nobody else catches it in that round, and keeps
//!    that. Condition 2 counts it among what a cheat is paid: `(1-q)^vesting_rounds + (1-q) * p * r * bounty`.
//! 6. **Opening nothing.** Who does no work and opens its accumulators to nobody, or is away whenever it is asked, loses with each round that was drawn
//!    the pay of `n = 4/p` rounds ([`VerificationConfig::unopened_costs`]) that have not vested when that is agreed, `2 verdict_rounds` later. So it is
//!    paid for a round at most if none of the `min(n, vesting_rounds - 2 verdict_rounds)` rounds from it on falls to someone honest, which all but
//!    `(1-q)` to that power do. If it takes a new name each time someone honest asks, a name is paid if `k` accomplices vouch for it before
//!    ([`PROOFS`]), which of all names `r^k` see. These have claimed `k` rounds where others claimed `1 + r + .. + r^(k-1)` on average, so that
//!    `k r^k / (1 + r + .. + r^(k-1))` of the claims are paid. The more of the two, and what accomplices are paid, must be less than honest work leaves.
//!
//! What no condition covers: how much of the swarm's work a name claims. Who lets many names work honestly, but little, until their points vest, and
//! claims much with each of them now and then, has less to lose by it than who claims as much all the time (this crate's README has the numbers).
//!
//! The share that colludes, the cost and `alpha` are [`Assumptions`]: they stand in no configuration, as nobody could agree on them.

use std::fmt;

use crate::config::{RewardConfig, VerificationConfig, unopened_costs};
use crate::ledger::PROOFS;

/// The surety with which a cheat is said to be caught within some rounds.
const SURETY: f64 = 0.99;
/// Where the search for rounds that are enough ends.
const MOST_ROUNDS: u32 = 1 << 16;

/// What is taken for granted about people and machines.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Assumptions {
    /// The share of the weight that colludes: 0 to 0.5. A third is what agreement bears.
    pub colluding_share: f64,
    /// What honest work costs, as a share of its reward: 0 to 0.99. The more, the more there is to save.
    pub cost_share: f64,
    /// The chance that audits are wrong about honest work: 0 to 1. `murmur audit calibrate` measures what a bound gives on a machine.
    pub false_positives: f64,
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            colluding_share: 1.0 / 3.0,
            cost_share: 0.8,
            false_positives: 1e-4,
        }
    }
}

impl Assumptions {
    /// The first value out of bounds, in words.
    #[must_use]
    pub fn out_of_bounds(&self) -> Option<String> {
        let bounds = [
            ("colluding_share", self.colluding_share, 0.5),
            ("cost_share", self.cost_share, 0.99),
            ("false_positives", self.false_positives, 1.0),
        ];
        let wrong = bounds
            .into_iter()
            .find(|(_, value, most)| !(0.0..=*most).contains(value));
        wrong.map(|(name, value, most)| format!("economics.{name} = {value}: 0 to {most}"))
    }
}

/// A run's incentives, worked out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Economics {
    audit_rate: f64,
    vesting_rounds: f64,
    verdict_rounds: f64,
    bounty: f64,
    assumed: Assumptions,
}

/// Why cheating would pay, or honest work not.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Objection {
    /// Nobody is ever audited.
    #[error("no work is audited (verification.audit_permille = 0), so whoever claims work is paid for it")]
    NoAudits,
    /// Condition 3.
    #[error(
        "points vest after {vesting} rounds, before a cheat can be convicted, which takes up to {convicted} (twice verification.verdict_rounds)"
    )]
    VestsEarly {
        /// `vesting_rounds`.
        vesting: f64,
        /// Rounds until the second verdict at the latest.
        convicted: f64,
    },
    /// Condition 1.
    #[error("a member that cheats once saves {saved:.2} of a round's reward and must expect to lose {lost:.2}")]
    OneRound {
        /// Cost saved.
        saved: f64,
        /// Chance to be caught times what is at stake.
        lost: f64,
    },
    /// Condition 2.
    #[error(
        "a peer that cheats in every round, under a new name whenever it is caught, is paid {kept:.3} of what it claims, and honest work leaves {honest:.3}"
    )]
    NewNames {
        /// Share of the claims that vests.
        kept: f64,
        /// What honest work leaves.
        honest: f64,
    },
    /// Condition 6.
    #[error(
        "a peer that does no work and opens nothing to auditors, or is away when they ask, is paid {kept:.3} of what it claims, and honest work leaves \
         {honest:.3}"
    )]
    OpeningNothing {
        /// Share of the claims that vests.
        kept: f64,
        /// What honest work leaves.
        honest: f64,
    },
    /// Condition 5.
    #[error(
        "a proven audit pays {bounty:.2} of the work's reward (rewards.audit_bounty_permille), and the replay costs {cost:.2}: silence pays better"
    )]
    Audits {
        /// What it pays.
        bounty: f64,
        /// What the replay costs.
        cost: f64,
    },
    /// Condition 4.
    #[error("honest work must expect to lose {lost:.3} of its reward to audits that err, and leaves {honest:.3}")]
    Errors {
        /// Expected loss a round.
        lost: f64,
        /// What honest work leaves.
        honest: f64,
    },
}

impl Economics {
    /// Of a configuration, under these assumptions.
    #[must_use]
    pub fn of(verification: &VerificationConfig, rewards: &RewardConfig, assumed: Assumptions) -> Self {
        Self {
            audit_rate: f64::from(verification.audit_permille) / 1000.0,
            vesting_rounds: rewards.vesting_rounds as f64,
            verdict_rounds: verification.verdict_rounds as f64,
            bounty: rewards.audit_bounty_permille as f64 / 1000.0,
            assumed,
        }
    }

    /// The chance that a cheat in one round is found and confirmed.
    #[must_use]
    pub fn caught(&self) -> f64 {
        -(-self.audit_rate * (1.0 - self.assumed.colluding_share)).exp_m1()
    }

    /// Rounds until a cheat is caught with 99%, if it cheats in this share of its rounds. Infinite without audits.
    #[must_use]
    pub fn rounds_to_catch(&self, share: f64) -> f64 {
        ((1.0 - SURETY).ln() / (-self.caught() * share).ln_1p()).ceil()
    }

    /// What who cheats in every round is paid of what it claims, with what its accomplices are paid for auditing it.
    #[must_use]
    pub fn kept(&self) -> f64 {
        (1.0 - self.caught()).powf(self.vesting_rounds) + self.accomplices(self.audit_rate)
    }

    /// What accomplices are paid for audits of a round that they need not replay, at this audit rate.
    fn accomplices(&self, audit_rate: f64) -> f64 {
        let uncaught = (-audit_rate * (1.0 - self.assumed.colluding_share)).exp();
        uncaught * audit_rate * self.assumed.colluding_share * self.bounty
    }

    /// What who opens nothing is paid of what it claims (condition 6).
    #[must_use]
    pub fn hidden(&self) -> f64 {
        let costs = unopened_costs((self.audit_rate * 1000.0).round() as u32);
        let unvested = (self.vesting_rounds - 2.0 * self.verdict_rounds).max(0.0);
        let rounds = unvested.min(costs as f64);
        let one_name = (1.0 - self.caught()).powf(rounds);
        one_name.max(self.names()) + self.accomplices(self.audit_rate)
    }

    /// What who takes a new name whenever someone honest asks is paid, as a share of what its names claim (condition 6).
    fn names(&self) -> f64 {
        let share = self.assumed.colluding_share;
        let claimed: f64 = (0..PROOFS).map(|seen| share.powf(f64::from(seen))).sum();
        f64::from(PROOFS) * share.powf(f64::from(PROOFS)) / claimed
    }

    /// The least audit rate, a multiple of a thousandth, with which nothing is wrong. Infinite if there is none.
    #[must_use]
    pub fn audits_needed(&self) -> f64 {
        let rates = (1..=1000).map(|permille| f64::from(permille) / 1000.0);
        self.least(rates, |audit_rate| Self { audit_rate, ..*self })
    }

    /// The least rounds of vesting with which nothing is wrong. Infinite if there are none.
    #[must_use]
    pub fn vesting_needed(&self) -> f64 {
        let rounds = (1..=MOST_ROUNDS).map(f64::from);
        self.least(rounds, |vesting_rounds| Self {
            vesting_rounds,
            ..*self
        })
    }

    /// The first of these values with which nothing is wrong.
    fn least(&self, mut values: impl Iterator<Item = f64>, with: impl Fn(f64) -> Self) -> f64 {
        let sound = |value: &f64| with(*value).objection().is_none();
        values.find(sound).unwrap_or(f64::INFINITY)
    }

    /// What is wrong first, if anything is.
    #[must_use]
    pub fn objection(&self) -> Option<Objection> {
        let (saved, honest) = (self.assumed.cost_share, 1.0 - self.assumed.cost_share);
        let convicted = 2.0 * self.verdict_rounds;
        let lost = self.caught() * (1.0 + self.vesting_rounds);
        let kept = self.kept();
        let errors = self.audit_rate * self.assumed.false_positives * self.vesting_rounds;
        let vesting = self.vesting_rounds;
        let hidden = self.hidden();
        if self.audit_rate <= 0.0 {
            Some(Objection::NoAudits)
        } else if self.bounty <= saved {
            let bounty = self.bounty;
            Some(Objection::Audits { bounty, cost: saved })
        } else if vesting < convicted {
            Some(Objection::VestsEarly { vesting, convicted })
        } else if lost <= saved {
            Some(Objection::OneRound { saved, lost })
        } else if kept >= honest {
            Some(Objection::NewNames { kept, honest })
        } else if hidden >= honest {
            Some(Objection::OpeningNothing { kept: hidden, honest })
        } else if errors > honest {
            Some(Objection::Errors { lost: errors, honest })
        } else {
            None
        }
    }

    /// What the author of a run can change so that cheating does not pay.
    #[must_use]
    pub fn remedy(&self) -> String {
        if matches!(self.objection(), Some(Objection::Audits { .. })) {
            return format!(
                "let a proven audit pay more than the replay costs (rewards.audit_bounty_permille above {:.0})",
                1000.0 * self.assumed.cost_share
            );
        }
        let found = [
            (self.audits_needed(), "verification.audit_permille", 1000.0),
            (self.vesting_needed(), "rewards.vesting_rounds", 1.0),
        ];
        let ways: Vec<String> = found
            .into_iter()
            .filter(|(value, ..)| value.is_finite())
            .map(|(value, name, unit)| format!("{name} = {:.0}", value * unit))
            .collect();
        match ways.is_empty() {
            true => "audit more of the work, and let points vest later".to_owned(),
            false => format!("set {}", ways.join(", or ")),
        }
    }
}

/// In three lines, for whoever creates the run.
impl fmt::Display for Economics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "audits: {} of the work is done twice; with {} of the weight colluding, a cheat in every round is caught within {} rounds (99%), one in \
             every tenth round within {}",
            Percent(self.audit_rate),
            Percent(self.assumed.colluding_share),
            self.rounds_to_catch(1.0),
            self.rounds_to_catch(0.1),
        )?;
        let lost = self.caught() * (1.0 + self.vesting_rounds);
        write!(
            f,
            "\npoints vest after {} rounds: cheating once saves {:.2} of a round's reward and costs {:.2}; in every round it is paid {} of what it claims",
            self.vesting_rounds,
            self.assumed.cost_share,
            lost,
            Percent(self.kept()),
        )?;
        write!(
            f,
            "\nwho opens nothing to auditors is paid {} of what it claims; honest work leaves {}",
            Percent(self.hidden()),
            Percent(1.0 - self.assumed.cost_share),
        )
    }
}

/// A share, for people.
struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 * 100.0 {
            percent if percent >= 10.0 => write!(f, "{percent:.0}%"),
            percent if percent >= 0.01 => write!(f, "{percent:.2}%"),
            percent if percent > 0.0 => f.write_str("less than 0.01%"),
            _ => f.write_str("0%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With eight rounds for verdicts.
    fn economics(permille: u32, vesting_rounds: u64, assumed: Assumptions) -> Economics {
        let verification = VerificationConfig {
            audit_permille: permille,
            verdict_rounds: 8,
            ..VerificationConfig::default()
        };
        let rewards = RewardConfig {
            vesting_rounds,
            ..RewardConfig::default()
        };
        Economics::of(&verification, &rewards, assumed)
    }

    /// Nobody colludes, work costs half of its reward, audits never err.
    const PLAIN: Assumptions = Assumptions {
        colluding_share: 0.0,
        cost_share: 0.5,
        false_positives: 0.0,
    };

    #[track_caller]
    fn near(found: f64, expected: f64) {
        assert!(
            (found / expected - 1.0).abs() < 1e-3,
            "expected {expected}, found {found}"
        );
    }

    #[test]
    fn rounds_to_catch_a_cheat_are_those_calculated_by_hand() {
        let five = economics(50, 1500, PLAIN);
        // Every round is audited with 1 - e^-0.05 = 0.04877: 4.6052 / 0.05 = 92.1. A tenth of that: 4.6052 / -ln 0.995123 = 941.9.
        assert_eq!((five.rounds_to_catch(1.0), five.rounds_to_catch(0.1)), (93.0, 942.0));
        // A third colludes: 4.6052 / 0.03333 = 138.2.
        let a_third = economics(50, 1500, Assumptions::default());
        assert_eq!(a_third.rounds_to_catch(1.0), 139.0);
        assert_eq!(economics(0, 1500, PLAIN).rounds_to_catch(1.0), f64::INFINITY);
    }

    #[test]
    fn what_opening_nothing_is_paid_is_calculated_by_hand() {
        // At 40% ten rounds' pay is lost with each that is drawn: e^-(0.4 * 10); with points that vest four rounds after the verdict, e^-(0.4 * 4).
        near(economics(400, 36, PLAIN).hidden(), 0.018_316);
        near(economics(400, 20, PLAIN).hidden(), 0.201_897);
        // A third of accomplices does better by new names: 3/27 / (1 + 1/3 + 1/9) = 1/13; and e^-(0.4 * 2/3) * 0.4 * 1/3 of audits are theirs.
        let colluding = economics(400, 1500, Assumptions::default());
        near(colluding.hidden(), 1.0 / 13.0 + 0.765_928 * 0.4 / 3.0);
    }

    #[test]
    fn each_condition_is_told_apart_with_its_numbers() {
        let objection = |permille, vesting, assumed| economics(permille, vesting, assumed).objection();
        assert_eq!(objection(0, 1500, PLAIN), Some(Objection::NoAudits));
        let early = Objection::VestsEarly {
            vesting: 15.0,
            convicted: 16.0,
        };
        assert_eq!(objection(500, 15, PLAIN), Some(early));
        // 0.00995 * 21 = 0.2090 is lost, 0.5 saved.
        assert!(
            matches!(objection(10, 20, PLAIN), Some(Objection::OneRound { saved, lost }) if saved == 0.5 && (lost - 0.2090).abs() < 1e-4)
        );
        let thankless = Economics {
            bounty: 0.5,
            ..economics(50, 14, PLAIN)
        };
        let audits = Objection::Audits { bounty: 0.5, cost: 0.5 };
        assert_eq!(thankless.objection(), Some(audits));
        assert!(thankless.remedy().contains("audit_bounty_permille above 500"));
        // 0.02955 * 18 = 0.53 is more than 0.5; but e^-0.51 = 0.6005 of it all is kept.
        assert!(
            matches!(objection(30, 17, PLAIN), Some(Objection::NewNames { kept, honest }) if (kept - 0.6005).abs() < 1e-4 && honest == 0.5)
        );
        // Only the last round has not vested when it is said not to have been opened: e^-0.5.
        assert!(
            matches!(objection(500, 17, PLAIN), Some(Objection::OpeningNothing { kept, honest }) if (kept - 0.6065).abs() < 1e-4 && honest == 0.5)
        );
        assert_eq!(objection(100, 100, PLAIN), None);
        let erring = Assumptions {
            false_positives: 0.01,
            ..PLAIN
        };
        // 0.1 * 0.01 * 1500 = 1.5 of a round's reward, of which 0.5 is left.
        assert!(
            matches!(objection(100, 1500, erring), Some(Objection::Errors { lost, .. }) if (lost - 1.5).abs() < 1e-9)
        );
    }

    #[test]
    fn what_is_said_to_be_needed_is_enough_and_barely() {
        let sound = |found: Economics| found.objection().is_none();
        for (permille, vesting) in [(20, 16), (50, 64), (100, 64), (100, 1500), (400, 64)] {
            let found = economics(permille, vesting, Assumptions::default());
            let with = |audit_rate| sound(Economics { audit_rate, ..found });
            let needed = found.audits_needed();
            assert!(
                needed.is_infinite() || with(needed) && !with(needed - 0.001),
                "{permille} {vesting}: {needed}"
            );
            let with = |vesting_rounds| {
                sound(Economics {
                    vesting_rounds,
                    ..found
                })
            };
            let needed = found.vesting_needed();
            assert!(
                needed.is_infinite() || with(needed) && !with(needed - 1.0),
                "{permille} {vesting}: {needed}"
            );
        }
        let remedy = |permille, vesting| economics(permille, vesting, Assumptions::default()).remedy();
        assert_eq!(
            remedy(100, 32),
            "set verification.audit_permille = 180, or rewards.vesting_rounds = 43"
        );
        let hopeless = Assumptions {
            cost_share: 0.99,
            ..Assumptions::default()
        };
        assert!(
            economics(100, 64, hopeless)
                .remedy()
                .starts_with("audit more of the work")
        );
    }

    #[test]
    fn cheating_a_part_of_the_time_never_gains_more() {
        let found = economics(150, 28, Assumptions::default());
        let (cost, caught) = (found.assumed.cost_share, found.caught());
        let gain = |part: f64| (1.0 - part * caught).powf(28.0) - (1.0 - part) * cost;
        let honest = 1.0 - cost;
        assert!((0..=100).all(|part| gain(f64::from(part) / 100.0) <= honest + 1e-12));
    }

    #[test]
    fn the_defaults_of_a_run_are_sound_and_told_in_three_lines() {
        let found = Economics::of(
            &VerificationConfig::default(),
            &RewardConfig::default(),
            Assumptions::default(),
        );
        assert_eq!(found.objection(), None);
        let told = found.to_string();
        assert_eq!(told.lines().count(), 3);
        assert!(
            told.contains("10% of the work is done twice") && told.contains("within 70 rounds"),
            "{told}"
        );
    }

    #[test]
    fn assumptions_out_of_bounds_are_named() {
        let wrong = Assumptions {
            cost_share: f64::NAN,
            ..PLAIN
        };
        assert!(wrong.out_of_bounds().unwrap().contains("economics.cost_share = NaN"));
        assert_eq!(Assumptions::default().out_of_bounds(), None);
    }
}
