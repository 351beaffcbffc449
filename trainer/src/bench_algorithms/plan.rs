//! What is compared: settings, arms, troubles, and the presets.

use serde::{Deserialize, Serialize};

use super::attack::Attack;
use crate::aggregate::Rule;
use crate::config::{
    CompressionConfig, ConfigError, ModelConfig, OptimizerConfig, OptimizerKind, Precision, ScheduleConfig,
    TrainingConfig,
};

/// What all runs of a series have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// A preset of [`ModelConfig`], byte-level.
    pub model: String,
    /// Honest workers.
    pub workers: usize,
    /// Inner steps of a round, H.
    pub inner_steps: u32,
    /// Sequences of a step of one worker.
    pub batch_sequences: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Rounds if nobody is missing; sets the tokens of every run.
    pub rounds: u64,
    /// What products and attention compute in.
    pub precision: Precision,
    /// Seed of parameters, order of data and absences.
    pub seed: u64,
}

impl Setting {
    /// Tokens of every run.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.rounds * self.workers as u64 * u64::from(self.inner_steps) * self.step_tokens()
    }

    /// Tokens of a step of one worker.
    #[must_use]
    pub fn step_tokens(&self) -> u64 {
        (self.batch_sequences * self.seq_len) as u64
    }

    /// The model.
    ///
    /// # Errors
    /// A preset that does not exist.
    pub fn model(&self) -> Result<ModelConfig, ConfigError> {
        ModelConfig::preset(&self.model).ok_or_else(|| ConfigError {
            field: "model.preset",
            found: self.model.clone(),
            bound: "a known preset".to_owned(),
            fix: "see `murmur new --help`",
        })
    }

    /// The training settings of a run at learning rate `lr`.
    #[must_use]
    pub fn training(&self, lr: f64) -> TrainingConfig {
        TrainingConfig {
            optimizer: OptimizerConfig {
                lr,
                ..OptimizerConfig::default()
            },
            schedule: ScheduleConfig {
                warmup_tokens: self.tokens() / 30,
                total_tokens: self.tokens(),
                ..ScheduleConfig::default()
            },
            seq_len: self.seq_len,
            batch_sequences: self.batch_sequences,
            precision: self.precision,
            max_inner_steps: self.inner_steps,
            init_seed: self.seed,
            ..TrainingConfig::default()
        }
    }
}

/// An algorithm with its knobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "algorithm", rename_all = "lowercase")]
pub enum Kind {
    /// Dense, every step.
    Ddp {
        /// The agreed optimizer.
        optimizer: OptimizerKind,
    },
    /// Every value, every round, outer momentum.
    Diloco {
        /// The private optimizer.
        optimizer: OptimizerKind,
        /// Whether values travel in eight bits.
        int8: bool,
    },
    /// Few cosine coefficients, every step.
    Demo {
        /// Coefficients of 4096.
        k: usize,
    },
    /// Few values, every round.
    Sparse {
        /// The inner optimizer.
        optimizer: OptimizerKind,
        /// Whether its state is kept between rounds.
        carry: bool,
        /// Whether what was not sent is kept.
        accumulator: bool,
        /// Values of 4096.
        k: usize,
        /// Decay of the accumulator.
        beta: f64,
        /// Outer rate.
        outer_rate: f64,
    },
}

impl Kind {
    /// Whether sums can be passed round a ring, each peer receiving twice the vector instead of everyone's.
    #[must_use]
    pub fn ring(&self) -> bool {
        matches!(self, Self::Ddp { .. } | Self::Diloco { .. })
    }

    /// Steps between two exchanges, of the `inner_steps` of a round.
    #[must_use]
    pub fn exchange_steps(&self, inner_steps: u32) -> u32 {
        match self {
            Self::Ddp { .. } | Self::Demo { .. } => 1,
            Self::Diloco { .. } | Self::Sparse { .. } => inner_steps,
        }
    }

    /// The compression settings of a sparse arm.
    #[must_use]
    pub fn compression(k: usize, beta: f64) -> CompressionConfig {
        CompressionConfig {
            k,
            beta,
            ..CompressionConfig::default()
        }
    }
}

/// An arm: a name, an algorithm, the learning rates to try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Its name in tables.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Learning rates; the best one counts.
    pub lrs: Vec<f64>,
}

/// What goes wrong in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trouble {
    /// Chance that a worker misses a round, in thousandths.
    pub dropout_permille: u32,
    /// Liars, beside the honest workers.
    pub attackers: usize,
    /// What they do.
    pub attack: Option<Attack>,
    /// How contributions are held to one another.
    pub rule: Rule,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// What it has in common with others.
    pub setting: Setting,
    /// The arm's name.
    pub arm: String,
    /// The algorithm.
    pub kind: Kind,
    /// The learning rate.
    pub lr: f64,
    /// What goes wrong.
    pub trouble: Trouble,
}

/// Arms in one setting, and troubles for some of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The setting.
    pub setting: Setting,
    /// The arms.
    pub arms: Vec<Arm>,
    /// Troubles, each for the arm of that name at its best learning rate.
    pub troubles: Vec<(String, Trouble)>,
}

impl Series {
    /// Every arm at every learning rate, without trouble.
    #[must_use]
    pub fn trials(&self) -> Vec<Task> {
        let task = |arm: &Arm, lr: f64| Task {
            setting: self.setting.clone(),
            arm: arm.name.clone(),
            kind: arm.kind.clone(),
            lr,
            trouble: Trouble::default(),
        };
        self.arms
            .iter()
            .flat_map(|arm| arm.lrs.iter().map(|lr| task(arm, *lr)).collect::<Vec<_>>())
            .collect()
    }
}

/// A whole bench.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Its series, one after the other.
    pub series: Vec<Series>,
}

/// Plans by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Every arm and trouble on a small model; a quarter of an hour on two idle cores.
    Short,
    /// More tokens and learning rates, then larger models; some hours.
    Long,
}

impl Plan {
    /// The plan of a preset.
    #[must_use]
    pub fn preset(preset: Preset) -> Self {
        let series = match preset {
            Preset::Short => vec![whole(setting("demo", 4, 24), &[2e-3, 4e-3], FEW_ATTACKS)],
            Preset::Long => vec![
                whole(setting("demo", 8, 60), &[1e-3, 2e-3, 4e-3], &Attack::ALL),
                whole(setting("demo", 4, 60), &[1e-3, 2e-3, 4e-3], &Attack::ALL),
                few(setting("1m", 4, 60), &[1e-3, 2e-3]),
                few(setting("5m", 4, 60), &[1e-3, 2e-3]),
                few(setting("16m", 4, 60), &[5e-4, 1e-3]),
            ],
        };
        Self { series }
    }

    /// Only the arms whose names contain one of `words`, and their troubles; everything if there are none.
    #[must_use]
    pub fn only(mut self, words: &[String]) -> Self {
        let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
        for series in &mut self.series {
            series.arms.retain(|arm| wanted(&arm.name));
            series.troubles.retain(|(name, _)| wanted(name));
        }
        self
    }
}

fn setting(model: &str, workers: usize, rounds: u64) -> Setting {
    Setting {
        model: model.to_owned(),
        workers,
        inner_steps: 15,
        batch_sequences: 4,
        seq_len: 128,
        rounds,
        precision: Precision::Fp32,
        seed: 1,
    }
}

/// Every arm, every trouble.
fn whole(setting: Setting, lrs: &[f64], attacks: &[Attack]) -> Series {
    let (muon, adamw) = (OptimizerKind::Muon, OptimizerKind::AdamW);
    let arm = |name: &str, kind: Kind| Arm {
        name: name.to_owned(),
        kind,
        lrs: lrs.to_vec(),
    };
    let demo = Arm {
        // A step by the sign moves every parameter by the whole rate; AdamW's root mean square is some .2 to .4 of it.
        lrs: lrs.iter().map(|lr| lr / 4.0).collect(),
        ..arm("demo k=32", Kind::Demo { k: 32 })
    };
    let arms = vec![
        arm("ddp Muon", Kind::Ddp { optimizer: muon }),
        arm("ddp AdamW", Kind::Ddp { optimizer: adamw }),
        arm("diloco AdamW fp32", diloco(adamw, false)),
        arm("diloco AdamW int8", diloco(adamw, true)),
        arm("diloco Muon fp32", diloco(muon, false)),
        demo,
        arm(PLAIN, sparse(muon, false, true, 64)),
        arm("sparse Muon reset k=256", sparse(muon, false, true, 256)),
        arm("sparse Muon carry k=64", sparse(muon, true, true, 64)),
        arm("sparse AdamW carry k=64", sparse(adamw, true, true, 64)),
        arm("sparse AdamW reset k=64", sparse(adamw, false, true, 64)),
        arm("sparse Muon reset k=64, no accumulator", sparse(muon, false, false, 64)),
    ];
    Series {
        troubles: troubles(setting.workers, attacks),
        setting,
        arms,
    }
}

/// The arms that tell how the distance to dense training changes with the model's size.
fn few(setting: Setting, lrs: &[f64]) -> Series {
    let muon = OptimizerKind::Muon;
    let arm = |name: &str, kind: Kind| Arm {
        name: name.to_owned(),
        kind,
        lrs: lrs.to_vec(),
    };
    Series {
        setting,
        arms: vec![
            arm("ddp Muon", Kind::Ddp { optimizer: muon }),
            arm(PLAIN, sparse(muon, false, true, 64)),
            arm("sparse Muon reset k=256", sparse(muon, false, true, 256)),
        ],
        troubles: Vec::new(),
    }
}

/// The attacks of the short preset.
const FEW_ATTACKS: &[Attack] = &[Attack::SignFlip, Attack::Thousandfold, Attack::UniqueIndex];

/// The arm that troubles are tried on.
const PLAIN: &str = "sparse Muon reset k=64";

fn diloco(optimizer: OptimizerKind, int8: bool) -> Kind {
    Kind::Diloco { optimizer, int8 }
}

fn sparse(optimizer: OptimizerKind, carry: bool, accumulator: bool, k: usize) -> Kind {
    Kind::Sparse {
        optimizer,
        carry,
        accumulator,
        k,
        beta: 0.95,
        outer_rate: 2.0,
    }
}

/// Absences; each attack by a fifth of all, under the median norm alone and with agreement, one under the plain mean, too; and agreement where
/// all are honest.
fn troubles(workers: usize, attacks: &[Attack]) -> Vec<(String, Trouble)> {
    let mut troubles = vec![Trouble {
        dropout_permille: 300,
        ..Trouble::default()
    }];
    let mut against = |attack, rule| {
        troubles.push(Trouble {
            attackers: workers.div_ceil(4),
            attack: Some(attack),
            rule,
            ..Trouble::default()
        });
    };
    against(Attack::Thousandfold, Rule::Mean);
    for attack in attacks {
        against(*attack, Rule::MedianNorm);
        against(*attack, Rule::Agreement);
    }
    troubles.push(Trouble {
        rule: Rule::Agreement,
        ..Trouble::default()
    });
    troubles
        .into_iter()
        .map(|trouble| (PLAIN.to_owned(), trouble))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_made_of_valid_settings_and_names_that_exist_once() {
        for preset in [Preset::Short, Preset::Long] {
            for series in Plan::preset(preset).series {
                let model = series.setting.model().unwrap();
                for arm in &series.arms {
                    assert_eq!(series.arms.iter().filter(|other| other.name == arm.name).count(), 1);
                    for lr in &arm.lrs {
                        series.setting.training(*lr).validate_with(&model).unwrap();
                    }
                }
                for (name, _) in &series.troubles {
                    assert!(series.arms.iter().any(|arm| arm.name == *name), "{name}");
                }
            }
        }
    }

    #[test]
    fn a_plan_can_be_cut_to_some_arms() {
        let plan = Plan::preset(Preset::Short).only(&["diloco".to_owned()]);
        assert_eq!(plan.series[0].arms.len(), 3);
        assert!(plan.series[0].troubles.is_empty());
    }
}
