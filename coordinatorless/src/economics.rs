//! Whether honesty pays in a run (R28): the proof-of-sampling condition and what follows from it, with the numbers of a configuration.
//!
//! Everything is counted in rounds' rewards: an honest member is granted 1 a round, and its work costs it `cost_share` of that. Who
//! cheats in a round saves that cost, and is caught with the chance `q = 1 - e^(-p(1-r))`, at least: auditors are drawn one by one, `p` of
//! them for a contribution on average, of whom one must be honest when a share `r` of the weight colludes. The other voters confirm it, of
//! whom more than a third are honest. A caught cheat loses the round's own points and everything unvested, the points of `vesting_rounds` rounds, and its
//! place. (Who does the work of a cheat by not opening its accumulators has three rounds to be drawn in before it is barred.)
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
//!
//! The share that colludes, the cost and `alpha` are [`Assumptions`]: they stand in no configuration, as nobody could agree on them.

use std::fmt;

use crate::config::{RewardConfig, VerificationConfig};

/// The surety with which a cheat is said to be caught within some rounds.
const SURETY: f64 = 0.99;

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

    /// What is left of honest work, less what accomplices are paid; nothing, if that is all of it.
    fn margin(&self, audit_rate: f64) -> f64 {
        (1.0 - self.assumed.cost_share - self.accomplices(audit_rate)).max(0.0)
    }

    /// The least audit rate with which conditions 1 and 2 hold at this vesting. Above 1: there is none.
    #[must_use]
    pub fn audits_needed(&self) -> f64 {
        let once = self.assumed.cost_share / (1.0 + self.vesting_rounds);
        // More audits also pay accomplices more; that is a small part of it, so this comes to rest soon.
        (0..64).fold(0.0, |rate, _| {
            let names = 1.0 - self.margin(rate).powf(1.0 / self.vesting_rounds);
            -(-once.max(names)).ln_1p() / (1.0 - self.assumed.colluding_share)
        })
    }

    /// The least rounds of vesting with which conditions 1 to 3 hold at this audit rate. Infinite without audits.
    #[must_use]
    pub fn vesting_needed(&self) -> f64 {
        let once = self.assumed.cost_share / self.caught() - 1.0;
        let names = self.margin(self.audit_rate).ln() / (-self.caught()).ln_1p();
        once.max(names).max(2.0 * self.verdict_rounds).ceil()
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
        } else if errors > honest {
            Some(Objection::Errors { lost: errors, honest })
        } else {
            None
        }
    }

    /// What the author of a run can change so that cheating does not pay.
    #[must_use]
    pub fn remedy(&self) -> String {
        let (audits, vesting) = (self.audits_needed(), self.vesting_needed());
        let more = format!("audit at least {} of the work", Percent(audits));
        let longer = format!("let points vest after {vesting} rounds");
        if matches!(self.objection(), Some(Objection::Audits { .. })) {
            return format!(
                "let a proven audit pay more than the replay costs (rewards.audit_bounty_permille above {:.0})",
                1000.0 * self.assumed.cost_share
            );
        }
        match (audits <= 1.0, vesting.is_finite()) {
            (true, true) => format!("{more}, or {longer}"),
            (true, false) => more,
            (false, true) => longer,
            (false, false) => "audit the work, and let points vest late".to_owned(),
        }
    }
}

/// In one or two lines, for whoever creates the run.
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

    fn economics(permille: u32, vesting_rounds: u64, assumed: Assumptions) -> Economics {
        let verification = VerificationConfig {
            audit_permille: permille,
            verdict_rounds: 4,
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
    fn the_least_audits_and_vesting_are_those_calculated_by_hand() {
        // One round: 0.5 / 101 = 0.00495. New names: 1 - 0.5^(1/100) = 0.00691, which is more, and takes -ln(1 - 0.00691) = ln 2 / 100.
        near(economics(50, 100, PLAIN).audits_needed(), 0.006_931);
        // A third colludes, cost 0.8: -ln(0.2 - 0.00812) / 100 * 3/2: at 0.02476 accomplices are paid a third of it, times 0.9836.
        near(economics(50, 100, Assumptions::default()).audits_needed(), 0.024_764);
        // ln 2 / 0.05 = 13.86.
        assert_eq!(economics(50, 100, PLAIN).vesting_needed(), 14.0);
        // Never before the second verdict.
        assert_eq!(economics(500, 100, PLAIN).vesting_needed(), 8.0);
    }

    #[test]
    fn each_condition_is_told_apart_with_its_numbers() {
        let objection = |permille, vesting, assumed| economics(permille, vesting, assumed).objection();
        assert_eq!(objection(0, 1500, PLAIN), Some(Objection::NoAudits));
        let early = Objection::VestsEarly {
            vesting: 7.0,
            convicted: 8.0,
        };
        assert_eq!(objection(500, 7, PLAIN), Some(early));
        // 0.00995 * 11 = 0.1095 is lost, 0.5 saved.
        assert!(
            matches!(objection(10, 10, PLAIN), Some(Objection::OneRound { saved, lost }) if saved == 0.5 && (lost - 0.1095).abs() < 1e-4)
        );
        let thankless = Economics {
            bounty: 0.5,
            ..economics(50, 14, PLAIN)
        };
        let audits = Objection::Audits { bounty: 0.5, cost: 0.5 };
        assert_eq!(thankless.objection(), Some(audits));
        assert!(thankless.remedy().contains("audit_bounty_permille above 500"));
        // 0.0488 * 13 = 0.63 is more than 0.5; but e^-0.6 = 0.5488 of it all is kept.
        assert!(
            matches!(objection(50, 12, PLAIN), Some(Objection::NewNames { kept, honest }) if (kept - 0.5488).abs() < 1e-4 && honest == 0.5)
        );
        assert_eq!(objection(50, 14, PLAIN), None);
        let erring = Assumptions {
            false_positives: 0.01,
            ..PLAIN
        };
        // 0.05 * 0.01 * 1500 = 0.75 of a round's reward, of which 0.5 is left.
        assert!(
            matches!(objection(50, 1500, erring), Some(Objection::Errors { lost, .. }) if (lost - 0.75).abs() < 1e-9)
        );
    }

    #[test]
    fn what_is_said_to_be_needed_is_enough_and_barely() {
        for permille in [20, 100, 400] {
            for vesting in [16, 64, 1500] {
                let found = economics(permille, vesting, Assumptions::default());
                let needed = found.audits_needed();
                let with = |audit_rate| Economics { audit_rate, ..found }.objection();
                assert_eq!(with(needed * 1.001), None, "{permille} {vesting}");
                assert!(with(needed * 0.999).is_some(), "{permille} {vesting}");
                let needed = found.vesting_needed();
                let with = |vesting_rounds| {
                    let found = Economics {
                        vesting_rounds,
                        ..found
                    };
                    found.objection()
                };
                assert_eq!(with(needed + 1.0), None, "{permille} {vesting}");
                assert!(with(needed - 1.0).is_some(), "{permille} {vesting}");
            }
        }
    }

    #[test]
    fn cheating_a_part_of_the_time_never_gains_more() {
        let found = economics(150, 28, Assumptions::default());
        let (cost, caught) = (found.assumed.cost_share, found.caught());
        let gain = |part: f64| (1.0 - part * caught).powf(28.0) - (1.0 - part) * cost;
        let honest = 1.0 - cost;
        assert!((0..=100).all(|part| gain(f64::from(part) / 100.0) <= honest + 1e-12));
        assert_eq!(found.objection(), None);
    }

    #[test]
    fn the_defaults_of_a_run_are_sound_and_told_in_two_lines() {
        let found = Economics::of(
            &VerificationConfig::default(),
            &RewardConfig::default(),
            Assumptions::default(),
        );
        assert_eq!(found.objection(), None);
        let told = found.to_string();
        assert_eq!(told.lines().count(), 2);
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
