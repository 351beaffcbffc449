//! What is compared: settings, arms, troubles, and the presets.

use serde::{Deserialize, Serialize};

use super::attack::Attack;
use crate::aggregate::Rule;
use crate::compress::Quantizer;
use crate::config::{
    ConfigError, InnerState, ModelConfig, OptimizerConfig, OptimizerKind, Precision, ScheduleConfig, TrainingConfig,
    Way,
};

/// Workers that a bench simulates at most.
pub const MOST_WORKERS: usize = 256;

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
    /// Inner momentum of all arms; 0.95 if left out, as it was before it could be chosen.
    #[serde(default, skip_serializing_if = "is_default")]
    pub momentum: Option<f64>,
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
                momentum: self.momentum.unwrap_or(0.95),
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
        /// Values of 4096 in the last round, to which `k` goes evenly.
        #[serde(default, skip_serializing_if = "is_default")]
        k_last: Option<usize>,
        /// Decay of the accumulator.
        beta: f64,
        /// Outer rate.
        outer_rate: f64,
        /// Outer momentum, agreed by all.
        #[serde(default, skip_serializing_if = "is_default")]
        outer_momentum: f64,
        /// What is said of each value.
        #[serde(default, skip_serializing_if = "is_default")]
        quantizer: Quantizer,
    },
}

/// Settings that came later are written only where they are used, so that results of before keep their names.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Kind {
    /// Whether sums can be passed round a ring, each peer receiving twice the vector instead of everyone's.
    #[must_use]
    pub fn ring(&self) -> bool {
        matches!(self, Self::Ddp { .. } | Self::Diloco { .. })
    }

    /// Changes the settings that all arms share to those of this one.
    fn choose(&self, training: &mut TrainingConfig, rounds: u64) {
        match *self {
            Self::Ddp { optimizer } => {
                (training.algorithm, training.optimizer.kind) = (Way::Ddp, optimizer);
                training.compression.algorithm = "dense".to_owned();
                training.max_inner_steps = 1;
            }
            Self::Diloco { optimizer, int8 } => {
                (training.algorithm, training.optimizer.kind) = (Way::Diloco, optimizer);
                training.optimizer.state = InnerState::Carry;
                training.compression.algorithm = if int8 { "int8" } else { "dense" }.to_owned();
                // The paper's best (section 3).
                (training.outer_rate, training.outer_momentum) = (0.7, 0.9);
            }
            Self::Demo { k } => {
                training.algorithm = Way::Demo;
                training.compression.k = k;
                // The paper's `compression_decay`.
                training.compression.beta = 0.999;
                training.max_inner_steps = 1;
            }
            Self::Sparse {
                optimizer,
                carry,
                accumulator,
                k,
                k_last,
                beta,
                outer_rate,
                outer_momentum,
                quantizer,
            } => {
                training.optimizer.kind = optimizer;
                if carry {
                    training.optimizer.state = InnerState::Carry;
                }
                training.compression.k = k;
                (training.compression.k_last, training.compression.k_rounds) = (k_last, k_last.map_or(0, |_| rounds));
                training.compression.quantizer = quantizer;
                training.compression.beta = if accumulator { beta } else { 0.0 };
                (training.outer_rate, training.outer_momentum) = (outer_rate, outer_momentum);
            }
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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

impl Default for Trouble {
    /// None at all, with contributions held to the median norm alone.
    fn default() -> Self {
        Self {
            dropout_permille: 0,
            attackers: 0,
            attack: None,
            rule: Rule::MedianNorm,
        }
    }
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

impl Task {
    /// The settings of a run that trains this way.
    #[must_use]
    pub fn training(&self) -> TrainingConfig {
        let mut training = self.setting.training(self.lr);
        self.kind.choose(&mut training, self.setting.rounds);
        training.rule = self.trouble.rule;
        training
    }
}

/// Arms in one setting, and troubles for some of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The setting.
    pub setting: Setting,
    /// The arms.
    pub arms: Vec<Arm>,
    /// Troubles, each for the arm of that name at its best learning rate.
    #[serde(default)]
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
    /// Every arm at the better learning rate of the long plan, some troubles; a quarter of an hour on two idle cores.
    Short,
    /// More tokens, learning rates and attacks, then more workers; an hour and a half on two idle cores.
    Long,
    /// A few arms on models of 1M, 5M and 16M parameters, with the same tokens; some four hours.
    Sizes,
}

impl Plan {
    /// The plan of a preset.
    #[must_use]
    pub fn preset(preset: Preset) -> Self {
        let series = match preset {
            Preset::Short => vec![whole(setting("demo", 4, 18), FEW_ROUNDS, 1, FEW_ATTACKS)],
            Preset::Long => vec![
                whole(setting("demo", 4, 60), MANY_ROUNDS, 2, &Attack::ALL),
                few(setting("demo", 8, 30), FEW_ROUNDS),
            ],
            Preset::Sizes => ["demo", "5m", "16m"]
                .map(|model| few(setting(model, 4, 24), FEW_ROUNDS))
                .to_vec(),
        };
        Self { series }
    }

    /// Refuses what could not run: a series without arms, settings out of bounds, troubles of an arm that is not there.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field, found: &str, bound: &str, fix| ConfigError {
            field,
            found: found.to_owned(),
            bound: bound.to_owned(),
            fix,
        };
        if self.series.is_empty() {
            return Err(wrong("series", "none", "at least one", "add a [[series]]"));
        }
        for series in &self.series {
            let model = series.setting.model()?;
            if series.setting.workers == 0 || series.setting.workers > MOST_WORKERS {
                let found = series.setting.workers.to_string();
                let bound = format!("1 to {MOST_WORKERS}");
                return Err(wrong(
                    "series.setting.workers",
                    &found,
                    &bound,
                    "they take their turns on this machine",
                ));
            }
            for task in series.trials() {
                task.training().validate_with(&model)?;
            }
            for (name, _) in &series.troubles {
                if !series.arms.iter().any(|arm| arm.name == *name) {
                    return Err(wrong(
                        "series.troubles",
                        name,
                        "the name of an arm of the series",
                        "see series.arms",
                    ));
                }
            }
        }
        Ok(())
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
        momentum: Some(0.8),
    }
}

/// The accumulator's decay and the outer rate of sparse arms.
type Knobs = (f64, f64);

/// Few rounds want a short memory: what an accumulator still holds at the end was learned for nothing (`trainer/README.md`).
const FEW_ROUNDS: Knobs = (0.8, 3.0);

/// More rounds bear a longer one.
const MANY_ROUNDS: Knobs = (0.9, 3.0);

/// Every arm with at most `trials` learning rates, and troubles.
fn whole(setting: Setting, knobs: Knobs, trials: usize, attacks: &[Attack]) -> Series {
    let (muon, adamw) = (OptimizerKind::Muon, OptimizerKind::AdamW);
    // Learning rates in the order of how well they did; where only the largest values of a step arrive, it wants to be about twice as long, and a step by
    // the sign moves every parameter by the whole rate, AdamW's by .2 to .4 of it.
    let arm = |name: &str, kind: Kind, lrs: &[f64]| Arm {
        name: name.to_owned(),
        kind,
        lrs: lrs.iter().take(trials).copied().collect(),
    };
    let few = |optimizer, carry| sparse(optimizer, carry, true, 64, knobs);
    let arms = vec![
        arm("ddp Muon", Kind::Ddp { optimizer: muon }, &[4e-3]),
        arm("ddp AdamW", Kind::Ddp { optimizer: adamw }, &[2e-3]),
        arm(DENSE, diloco(muon, false), &[4e-3, 8e-3]),
        arm("diloco AdamW fp32", diloco(adamw, false), &[2e-3, 4e-3]),
        arm("diloco AdamW int8", diloco(adamw, true), &[2e-3]),
        arm("demo k=32", Kind::Demo { k: 32 }, &[1e-3]),
        arm(PLAIN, few(muon, false), &[8e-3, 1.6e-2]),
        arm(THINNING, thinning(knobs), &[8e-3]),
        arm(MORE, sparse(muon, false, true, 256, knobs), &[8e-3, 4e-3]),
        arm(
            "sparse Muon reset k=64, sign2",
            saying(&few(muon, false), Quantizer::Sign2),
            &[8e-3],
        ),
        arm(
            "sparse Muon reset k=64, raw",
            saying(&few(muon, false), Quantizer::Raw),
            &[8e-3],
        ),
        arm("sparse Muon carry k=64", few(muon, true), &[8e-3]),
        arm("sparse AdamW carry k=64", few(adamw, true), &[4e-3]),
        arm("sparse AdamW reset k=64", few(adamw, false), &[2e-3]),
        arm(
            "sparse Muon reset k=64, no accumulator",
            sparse(muon, false, false, 64, knobs),
            &[4e-3],
        ),
    ];
    Series {
        troubles: troubles(setting.workers, attacks),
        setting,
        arms,
    }
}

/// The arms that tell how distances change with the number of workers and the model's size.
fn few(setting: Setting, knobs: Knobs) -> Series {
    let muon = OptimizerKind::Muon;
    let arm = |name: &str, kind: Kind, lr: f64| Arm {
        name: name.to_owned(),
        kind,
        lrs: vec![lr],
    };
    Series {
        setting,
        arms: vec![
            arm("ddp Muon", Kind::Ddp { optimizer: muon }, 4e-3),
            arm(DENSE, diloco(muon, false), 4e-3),
            arm(PLAIN, sparse(muon, false, true, 64, knobs), 8e-3),
            arm(THINNING, thinning(knobs), 8e-3),
            arm(MORE, sparse(muon, false, true, 256, knobs), 8e-3),
        ],
        troubles: Vec::new(),
    }
}

/// The attacks of the short preset.
const FEW_ATTACKS: &[Attack] = &[Attack::SignFlip, Attack::Thousandfold, Attack::UniqueIndex];

/// The arm that troubles are tried on.
const PLAIN: &str = "sparse Muon reset k=64";
/// As many values on the whole, sent early.
const THINNING: &str = "sparse Muon reset k=112 to 16";
/// The same with four times the values.
const MORE: &str = "sparse Muon reset k=256";
/// Every value, and private state.
const DENSE: &str = "diloco Muon fp32";

fn diloco(optimizer: OptimizerKind, int8: bool) -> Kind {
    Kind::Diloco { optimizer, int8 }
}

fn sparse(optimizer: OptimizerKind, carry: bool, accumulator: bool, k: usize, (beta, outer_rate): Knobs) -> Kind {
    Kind::Sparse {
        optimizer,
        carry,
        accumulator,
        k,
        k_last: None,
        beta,
        outer_rate,
        outer_momentum: 0.0,
        quantizer: Quantizer::Sign,
    }
}

/// 64 values on average, from 112 in the first round to 16 in the last.
fn thinning(knobs: Knobs) -> Kind {
    let mut kind = sparse(OptimizerKind::Muon, false, true, 112, knobs);
    if let Kind::Sparse { k_last, .. } = &mut kind {
        *k_last = Some(16);
    }
    kind
}

/// An arm that says more of each value, else alike.
fn saying(kind: &Kind, quantizer: Quantizer) -> Kind {
    let mut kind = kind.clone();
    if let Kind::Sparse { quantizer: said, .. } = &mut kind {
        *said = quantizer;
    }
    kind
}

/// Absences; each attack by a fifth of all with agreement, two under the median norm alone and one under the plain mean, too; and agreement where all are
/// honest.
fn troubles(workers: usize, attacks: &[Attack]) -> Vec<(String, Trouble)> {
    let mut troubles = vec![
        Trouble {
            dropout_permille: 300,
            ..Trouble::default()
        },
        Trouble {
            rule: Rule::Agreement,
            ..Trouble::default()
        },
    ];
    let mut against = |attack, rule| {
        troubles.push(Trouble {
            attackers: workers.div_ceil(4),
            attack: Some(attack),
            rule,
            ..Trouble::default()
        });
    };
    against(Attack::Thousandfold, Rule::Mean);
    for attack in [Attack::SignFlip, Attack::Thousandfold] {
        against(attack, Rule::MedianNorm);
    }
    for attack in attacks {
        against(*attack, Rule::Agreement);
    }
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
        for preset in [Preset::Short, Preset::Long, Preset::Sizes] {
            let plan = Plan::preset(preset);
            plan.check().unwrap();
            for series in plan.series {
                for arm in &series.arms {
                    assert_eq!(series.arms.iter().filter(|other| other.name == arm.name).count(), 1);
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
