//! RUN.toml: what a person writes to create a run, and how it becomes the [`RunConfig`] that all peers agree on.
//!
//! The file is small because nearly everything has a default, and defaults that follow from other values are filled in here
//! (`timing.collect_secs` from `timing.train_secs`, `membership.max_quota` from `training.max_inner_steps`, …). Every value
//! can be overridden with `--set key=value`. Relations are checked once, here, before anything is written.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::config::{DataConfig, GenesisMember, PROTOCOL, RunConfig};
use coordinatorless::economics::{Assumptions, Economics};
use coordinatorless::types::Hash;
use datasets::TokenizerKind;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use trainer::arms::{self, Algorithm};
use trainer::compress::{Codec, accumulator_zero_root};
use trainer::config::{InnerState, ModelConfig, OptimizerKind, Precision, TrainingConfig, Way};
use trainer::memory::Need;

use crate::failure::usage;
use crate::start_model;
use crate::units::{Bytes, thousands};

/// The text of a run: the built-in demo text or the user's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// The plays that the demo trains on, fetched once.
    Demo,
    /// Files and folders.
    Paths(Vec<PathBuf>),
}

/// A run as its author wrote it, with defaults filled in, checked; all but what only its data can tell.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// Its name for people.
    pub name: String,
    /// What it is trained on.
    pub text: Text,
    /// How text becomes tokens.
    pub tokenizer: TokenizerKind,
    /// Thousandths of the text kept for evaluation.
    pub held_out_permille: u32,
    /// The model's shape.
    pub model: ModelConfig,
    /// The folder or file it starts from; at random where there is none.
    pub from: Option<PathBuf>,
    /// How it is trained.
    pub training: TrainingConfig,
    /// What its author takes for granted where it is checked that cheating does not pay; not agreed, for nobody could.
    assumed: Assumptions,
    /// The parts that [`RunConfig`] takes as they are.
    shared: Shared,
}

/// The tables that are [`RunConfig`]'s own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shared {
    timing: coordinatorless::config::TimingConfig,
    membership: coordinatorless::config::MembershipConfig,
    verification: coordinatorless::config::VerificationConfig,
    rewards: coordinatorless::config::RewardConfig,
    storage: coordinatorless::config::StorageConfig,
}

/// The file's own shape.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RunFile {
    #[serde(default = "default_name")]
    name: String,
    #[serde(default = "default_text")]
    text: Vec<String>,
    #[serde(default = "default_tokenizer")]
    tokenizer: String,
    #[serde(default = "default_held_out")]
    held_out_permille: u32,
    #[serde(default = "default_model")]
    model: Value,
    #[serde(default)]
    training: TrainingConfig,
    #[serde(default)]
    timing: Table,
    #[serde(default)]
    membership: Table,
    #[serde(default)]
    verification: Table,
    #[serde(default)]
    rewards: Table,
    #[serde(default)]
    storage: Table,
    #[serde(default)]
    economics: Assumptions,
}

fn default_name() -> String {
    "murmur".to_owned()
}

fn default_text() -> Vec<String> {
    vec!["demo".to_owned()]
}

fn default_tokenizer() -> String {
    "bytes".to_owned()
}

fn default_held_out() -> u32 {
    20
}

fn default_model() -> Value {
    Value::String("demo".to_owned())
}

impl RunPlan {
    /// Reads RUN.toml, then lays `--set key=value` over it. Paths in the file are relative to the file.
    ///
    /// # Errors
    /// One message (exit code 2) that names the value, its bound and the fix.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            usage(format!(
                "cannot read the run file {}: {error}; give the path of a RUN.toml (launch/runs has examples)",
                path.display()
            ))
        })?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Self::parse(&text, sets, folder).with_context(|| format!("in {}", path.display()))
    }

    /// As [`Self::load`], from the text itself.
    pub fn parse(text: &str, sets: &[String], folder: &Path) -> Result<Self> {
        let mut table: Table = text
            .parse()
            .map_err(|error| usage(format!("the run file is not valid TOML: {error}")))?;
        for set in sets {
            lay_over(&mut table, set)?;
        }
        defaults_of_the_way(&mut table);
        let file: RunFile = Value::Table(table).try_into().map_err(|error| usage(plain(&error)))?;
        Self::from_file(file, folder)
    }

    fn from_file(file: RunFile, folder: &Path) -> Result<Self> {
        let tokenizer: TokenizerKind = file.tokenizer.parse().map_err(|_| {
            usage(format!(
                "tokenizer = {:?}: not a tokenizer; use \"bytes\" or \"gpt2\"",
                file.tokenizer
            ))
        })?;
        let (model, from) = model_of(file.model, tokenizer, file.training.seq_len, folder)?;
        file.training.validate_with(&model).map_err(usage)?;
        if !(1..=500).contains(&file.held_out_permille) {
            let found = file.held_out_permille;
            return Err(usage(format!(
                "held_out_permille = {found}: 1 to 500; 20 keeps 2% of the text for evaluation"
            )));
        }
        if let Some(wrong) = file.economics.out_of_bounds() {
            return Err(usage(wrong));
        }
        let shared = shared(
            &model,
            &file.training,
            [
                file.timing,
                file.membership,
                file.verification,
                file.rewards,
                file.storage,
            ],
        )?;
        let plan = Self {
            name: file.name,
            text: text_of(file.text, folder)?,
            tokenizer,
            held_out_permille: file.held_out_permille,
            model,
            from,
            training: file.training,
            assumed: file.economics,
            shared,
        };
        // Every bound of the agreed configuration, with stand-ins for what is not known yet.
        let stand_in = GenesisMember {
            id: Default::default(),
            vrf_key: Hash::default(),
            weight: 1,
            payout_address: String::new(),
        };
        plan.agree(Hash::default(), 1, None, vec![stand_in])?;
        Ok(plan)
    }

    /// The configuration that all peers will share, checked: with the data's root and number of training sequences, the root of the model
    /// that it starts from (at random: none), and the first members.
    ///
    /// # Errors
    /// A value out of bounds (exit code 2).
    pub fn agree(
        &self,
        manifest: Hash,
        sequences: u64,
        start: Option<Hash>,
        mut genesis: Vec<GenesisMember>,
    ) -> Result<RunConfig> {
        genesis.sort();
        let mut model = Table::try_from(&self.model).context("the model cannot be written as TOML")?;
        model.extend(start.map(|root| (start_model::KEY.to_owned(), Value::String(root.to_string()))));
        let shared = self.shared.clone();
        let config = RunConfig {
            protocol: PROTOCOL,
            name: self.name.clone(),
            nonce: Hash(rand::random()).short(),
            data: DataConfig {
                manifest,
                sequences,
                // Bounded by the trainer's own check.
                seq_len: u32::try_from(self.training.seq_len).unwrap_or(u32::MAX),
                batch_sequences: u32::try_from(self.training.batch_sequences).unwrap_or(u32::MAX),
                tokenizer: self.tokenizer.to_string(),
            },
            timing: shared.timing,
            membership: shared.membership,
            verification: shared.verification,
            rewards: shared.rewards,
            storage: shared.storage,
            model,
            training: Table::try_from(&self.training).context("the training cannot be written as TOML")?,
            genesis,
        };
        config.validate().map_err(usage)?;
        Ok(config)
    }
}

impl RunPlan {
    /// How large the model is, what a token costs, and what training takes, in one line.
    pub fn size(&self) -> String {
        let params = self.model.param_count() as u64;
        let flops = self.model.flops_per_token_at(self.training.seq_len) as f64;
        let need = Need::of_training(&self.model, &self.training);
        let state = Bytes(need.total() - need.activations);
        format!(
            "the model has {} parameters; training takes {:.1} MFLOP a token, {state} for parameters, gradient and moments, and about {} for a batch of {} x {} tokens",
            thousands(params),
            flops / 1e6,
            Bytes(need.activations),
            self.training.batch_sequences,
            self.training.seq_len
        )
    }

    /// Whether honesty pays in the run (R28), in a few lines.
    ///
    /// # Errors
    /// It does not, with the numbers and what would help (exit code 2), unless that is all the same to its author.
    pub fn economics(&self, even_if_unsafe: bool) -> Result<String> {
        let found = Economics::of(&self.shared.verification, &self.shared.rewards, self.assumed);
        match found.objection() {
            None => Ok(found.to_string()),
            Some(objection) if even_if_unsafe => Ok(format!("cheating pays in this run: {objection}")),
            Some(objection) => Err(usage(format!(
                "cheating would pay in this run: {objection}. To mend it, {}; or give --unsafe-economics if you trust \
                 everyone who will join",
                found.remedy()
            ))),
        }
    }

    /// Whether this plan is the one that a run was created from.
    ///
    /// # Errors
    /// What differs first (exit code 2).
    pub fn must_fit(&self, config: &RunConfig) -> Result<()> {
        let (model, training) = trainer_of(config)?;
        let same = [
            ("name", self.name == config.name),
            ("[model]", self.model == model),
            ("[training]", self.training == training),
        ];
        match same.iter().find(|(_, same)| !same) {
            Some((what, _)) => Err(usage(format!(
                "its {what} differs from the run file's; choose another --dir, or the run file it was made from"
            ))),
            None => Ok(()),
        }
    }
}

/// Model and training as a run agreed on them.
///
/// # Errors
/// A configuration that this build's trainer refuses (exit code 2: it came from a stranger's ticket or a damaged file).
pub fn trainer_of(config: &RunConfig) -> Result<(ModelConfig, TrainingConfig)> {
    let mut model = config.model.clone();
    model.remove(start_model::KEY);
    let model: ModelConfig = model
        .try_into()
        .map_err(|error| usage(format!("[model] of the run: {}", plain(&error))))?;
    let training: TrainingConfig = config
        .training
        .clone()
        .try_into()
        .map_err(|error| usage(format!("[training] of the run: {}", plain(&error))))?;
    training.validate_with(&model).map_err(usage)?;
    let (seq, batch) = (config.data.seq_len as usize, config.data.batch_sequences as usize);
    if (training.seq_len, training.batch_sequences) != (seq, batch) {
        return Err(usage(format!(
            "the run contradicts itself: training has batches of {} x {} tokens, its data {batch} x {seq}; ask its author for another ticket",
            training.batch_sequences, training.seq_len
        )));
    }
    must_be_auditable(&training, config.verification.audit_permille)?;
    must_be_exact(&training)?;
    must_bear_overlap(&training, config.timing.overlap)?;
    Ok((model, training))
}

/// An audit replays a round from agreed state; a peer that begins with its own moments cannot be held to it.
fn must_be_auditable(training: &TrainingConfig, audit_permille: u32) -> Result<()> {
    if training.optimizer.state == InnerState::Carry && audit_permille > 0 {
        return Err(usage(format!(
            "training.optimizer.state is \"carry\" and verification.audit_permille {audit_permille}, expected 0: an audit cannot replay a round that began with a peer's own moments. Write audit_permille = 0 under [verification] where you trust all peers (`murmur new` then wants --unsafe-economics), or state = \"reset\""
        )));
    }
    Ok(())
}

/// Replicas of `ddp` take the optimizer's step each for itself, so it must have the same bits on all machines.
fn must_be_exact(training: &TrainingConfig) -> Result<()> {
    if training.algorithm == Way::Ddp && training.optimizer.kind != OptimizerKind::AdamW {
        return Err(usage(
            "training.optimizer.kind: with training.algorithm = \"ddp\" it must be \"adamw\", whose steps have the same bits on every machine; leave it out",
        ));
    }
    Ok(())
}

/// R16: with overlap a round begins before it is known whether the one before it counts, from a model that is a record old. Ways that send
/// one gradient and go on from there would apply each to another model than it was taken at; and moments that a peer carries are those of
/// its last counted round.
fn must_bear_overlap(training: &TrainingConfig, overlap: u32) -> Result<()> {
    if overlap == 0 {
        return Ok(());
    }
    if training.algorithm.sends_gradients() {
        return Err(usage(format!(
            "timing.overlap = {overlap}: with training.algorithm = \"demo\" or \"ddp\" it must be 0, or every gradient would be applied one step late; take \"sparse\" or \"diloco\", or leave it out"
        )));
    }
    if training.optimizer.state == InnerState::Carry {
        return Err(usage(format!(
            "timing.overlap = {overlap}: with training.optimizer.state = \"carry\" it must be 0, for a round begins before it is known whether the one whose moments it would carry counts; take state = \"reset\", or leave it out"
        )));
    }
    Ok(())
}

/// `key.path=value`: the value as TOML where it reads as such, else as a string.
fn lay_over(table: &mut Table, set: &str) -> Result<()> {
    let wrong = || {
        usage(format!(
            "--set {set}: expected key=value, for example --set training.optimizer.lr=0.001"
        ))
    };
    let (key, text) = set.split_once('=').ok_or_else(wrong)?;
    let (key, text) = (key.trim(), text.trim());
    let value = format!("v = {text}")
        .parse::<Table>()
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("v"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty()).ok_or_else(wrong)?;
    let mut at = table;
    for part in parts {
        // `model = "demo"` and `--set model.dim=64`: the named preset is the base.
        let entry = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        if part == "model" && entry.is_str() {
            let mut preset = Table::new();
            preset.insert("preset".to_owned(), entry.clone());
            *entry = Value::Table(preset);
        }
        at = entry.as_table_mut().ok_or_else(|| {
            usage(format!(
                "--set {set}: {part} is a value, not a table; name one of its own keys"
            ))
        })?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

/// What follows from the way of training unless it is given: its codec, its steps, and the outer rate and momentum that its authors found best.
/// Where every value is sent without momentum there is nothing for an outer rate to make up for: it is 1.
///
/// With overlap (R16) a round steps from where the model was a record ago. A step that goes a share `a` of the way to where it leads then goes too
/// far at an outer rate of `1/a`, instead of `2/a`, and momentum adds to it; so the rate is at most half as large, and there is no momentum.
fn defaults_of_the_way(table: &mut Table) {
    let timing = table.get("timing").and_then(|timing| timing.get("overlap"));
    let ahead = timing.and_then(Value::as_integer) == Some(1);
    if ahead {
        table.entry("training").or_insert_with(|| Value::Table(Table::new()));
    }
    let Some(training) = table.get_mut("training").and_then(Value::as_table_mut) else {
        return;
    };
    let way = training
        .get("algorithm")
        .and_then(Value::as_str)
        .unwrap_or("sparse")
        .to_owned();
    let (whole, fixed): (bool, &[(&str, &str, Value)]) = match way.as_str() {
        "diloco" => (
            true,
            &[
                ("", "outer_rate", Value::Float(0.7)),
                ("", "outer_momentum", Value::Float(0.9)),
            ],
        ),
        "demo" => (
            false,
            &[
                ("", "max_inner_steps", Value::Integer(1)),
                ("compression", "k", Value::Integer(32)),
                ("compression", "beta", Value::Float(0.999)),
                ("optimizer", "lr", Value::Float(1e-3)),
            ],
        ),
        "ddp" => (true, &[("", "max_inner_steps", Value::Integer(1))]),
        _ => (false, &[]),
    };
    if whole {
        default(training, "compression", "algorithm", Value::String("dense".to_owned()));
    }
    if ["demo", "ddp"].contains(&way.as_str()) {
        // Gradients of single batches are too noisy to be held to the rest.
        default(training, "", "rule", Value::String("median-norm".to_owned()));
    }
    if way == "ddp" {
        default(training, "optimizer", "kind", Value::String("adamw".to_owned()));
    }
    let codec = training.get("compression").and_then(|it| it.get("algorithm"));
    let dense = matches!(codec.and_then(Value::as_str), Some("dense" | "int8"));
    if ahead {
        let rate = if dense { 0.5 } else { 1.0 };
        default(training, "", "outer_rate", Value::Float(rate));
        default(training, "", "outer_momentum", Value::Float(0.0));
    }
    for (inside, key, value) in fixed {
        default(training, inside, key, value.clone());
    }
    if dense {
        default(training, "", "outer_rate", Value::Float(1.0));
    }
}

/// Lays `value` under `inside.key`, or `key` where `inside` is empty, unless something is there.
fn default(table: &mut Table, inside: &str, key: &str, value: Value) {
    let table = match inside {
        "" => Some(table),
        inside => table
            .entry(inside)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut(),
    };
    if let Some(table) = table {
        table.entry(key).or_insert(value);
    }
}

/// A preset's name, or a table that may start from one (`preset = "5m"`) or from a model (`from = "PATH"`, relative to `folder`), which is then
/// returned too. Vocabulary and longest sequence follow from tokenizer and training unless they are given.
fn model_of(
    value: Value,
    tokenizer: TokenizerKind,
    seq_len: usize,
    folder: &Path,
) -> Result<(ModelConfig, Option<PathBuf>)> {
    let mut given = match value {
        Value::String(preset) => Table::from_iter([("preset".to_owned(), Value::String(preset))]),
        Value::Table(table) => table,
        other => return Err(usage(format!("model = {other}: expected \"demo\" or a table [model]"))),
    };
    let vocab = datasets::Tokenizer::new(tokenizer).vocab_size();
    let model = match given.remove("from") {
        Some(from) => {
            let path = from.as_str().map(|path| folder.join(path)).ok_or_else(|| {
                usage(format!(
                    "model.from = {from}: expected the path of a Hugging Face folder or a GGUF file"
                ))
            })?;
            (started(given, &path)?, Some(path))
        }
        None => (shaped(given, vocab, seq_len)?, None),
    };
    if model.0.vocab_size < vocab {
        let found = model.0.vocab_size;
        return Err(usage(format!(
            "model.vocab_size = {found}: at least {vocab} for tokenizer \"{tokenizer}\"; leave it out"
        )));
    }
    Ok(model)
}

/// The shape of a preset with what was `given` over it.
fn shaped(mut given: Table, vocab: usize, seq_len: usize) -> Result<ModelConfig> {
    let preset = given.remove("preset").unwrap_or_else(default_model);
    let mut base = preset.as_str().and_then(ModelConfig::preset).ok_or_else(|| {
        let names: Vec<&str> = ModelConfig::presets().map(|(name, _)| name).collect();
        let names = names.join(", ");
        usage(format!(
            "model = {preset}: no such preset; there are {names}, or give a table [model]"
        ))
    })?;
    base.vocab_size = vocab;
    base.max_seq_len = base.max_seq_len.max(seq_len);
    // A width alone changes the number of heads of keys with it.
    if let (Some(heads), None) = (given.get("heads").cloned(), given.get("kv_heads")) {
        given.insert("kv_heads".to_owned(), heads);
    }
    laid_over(&base, given)
}

/// The shape of the model at `path` with what was `given` over it: only what leaves its parameters as they are.
fn started(given: Table, path: &Path) -> Result<ModelConfig> {
    let base = start_model::shape(path)?;
    if let Some(key) = given
        .keys()
        .find(|key| !["max_seq_len", "rope_theta", "rope_scaling"].contains(&key.as_str()))
    {
        return Err(usage(format!(
            "model.{key}: with model.from, the shape is that of the model; leave it out (max_seq_len, rope_theta and rope_scaling may be given)"
        )));
    }
    let model = laid_over(&base, given)?;
    if model.param_count() != base.param_count() {
        let found = model.max_seq_len;
        return Err(usage(format!(
            "model.max_seq_len = {found}: the model has {} learned positions; leave it out",
            base.max_seq_len
        )));
    }
    Ok(model)
}

fn laid_over(base: &ModelConfig, given: Table) -> Result<ModelConfig> {
    let mut table = Table::try_from(base).context("a preset cannot be written as TOML")?;
    table.extend(given);
    table
        .try_into()
        .map_err(|error| usage(format!("[model]: {}", plain(&error))))
}

/// The tables that are `RunConfig`'s own, with the defaults that follow from other values.
fn shared(model: &ModelConfig, training: &TrainingConfig, tables: [Table; 5]) -> Result<Shared> {
    let [mut timing, mut membership, mut verification, mut rewards, mut storage] = tables;
    let train_secs = number(&timing, "train_secs").unwrap_or(60.0);
    timing.entry("collect_secs").or_insert(Value::Float(1.25 * train_secs));
    timing
        .entry("fetch_secs")
        .or_insert(Value::Float((0.25 * train_secs).max(3.0)));
    let collect_secs = number(&timing, "collect_secs").unwrap_or(1.25 * train_secs);
    membership
        .entry("max_quota")
        .or_insert(Value::Integer(i64::from(training.max_inner_steps)));
    rewards
        .entry("flops_per_token")
        .or_insert(integer(model.flops_per_token_at(training.seq_len)));
    rewards
        .entry("nominal_round_secs")
        .or_insert(Value::Integer(collect_secs.clamp(1.0, 1e6).ceil() as i64));
    // Measured (`gradient-verify/calibration`): honest rounds in bf16 up to 0.067 apart, by a distribution that leaves five in ten million beyond the
    // bound, their traces up to 0.094 (other data: 2.2 at least). Rounds in TF32 on a GPU and a CPU 7.4e-3; its traces, with numbers eight times
    // finer than bf16's, were not. In fp32 the defaults leave room for other devices.
    let bounds = match training.precision {
        Precision::Bf16 => Some((0.12, 0.3)),
        Precision::Tf32 => Some((0.02, 0.04)),
        Precision::Fp32 => None,
    };
    if let Some((bound, trace_bound)) = bounds {
        verification.entry("bound").or_insert(Value::Float(bound));
        verification.entry("trace_bound").or_insert(Value::Float(trace_bound));
    }
    // Where rounds are shorter, what messages take would be a large part of the time.
    let asks = if train_secs < 10.0 {
        0.0
    } else {
        (train_secs / 10.0).min(3.0)
    };
    verification.entry("speed_secs").or_insert(Value::Float(asks));
    let kept = model.param_count() + training.carried(model);
    verification.insert(
        "accumulator_zero".to_owned(),
        Value::String(Hash(accumulator_zero_root(kept)).to_string()),
    );
    let longest = algorithm(model, training)?.codec().max_total_bytes();
    storage.entry("max_contribution_bytes").or_insert(integer(longest));
    let tables = [
        ("timing", timing),
        ("membership", membership),
        ("verification", verification),
        ("rewards", rewards),
        ("storage", storage),
    ];
    let table = Table::from_iter(tables.map(|(name, table)| (name.to_owned(), Value::Table(table))));
    let shared: Shared = table.try_into().map_err(|error| usage(plain(&error)))?;
    must_be_auditable(training, shared.verification.audit_permille)?;
    must_be_exact(training)?;
    must_bear_overlap(training, shared.timing.overlap)?;
    let (quota, steps) = (shared.membership.max_quota, u64::from(training.max_inner_steps));
    if quota > steps {
        return Err(usage(format!(
            "membership.max_quota = {quota}: at most training.max_inner_steps = {steps}; leave it out, or raise training.max_inner_steps"
        )));
    }
    Ok(shared)
}

/// The way in which a run trains together.
///
/// # Errors
/// Settings that it refuses (exit code 2).
pub fn algorithm(model: &ModelConfig, training: &TrainingConfig) -> Result<Box<dyn Algorithm>> {
    arms::algorithm(model, training).map_err(|error| {
        usage(format!(
            "[training]: {error}; leave [training.compression] and outer_rate out for the defaults"
        ))
    })
}

fn integer(value: u64) -> Value {
    Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

fn number(table: &Table, key: &str) -> Option<f64> {
    let value = table.get(key)?;
    value
        .as_float()
        .or_else(|| value.as_integer().map(|value| value as f64))
}

fn text_of(text: Vec<String>, folder: &Path) -> Result<Text> {
    match text.as_slice() {
        [] => Err(usage(
            "text = []: at least one file or folder; or \"demo\" for the plays that the demo trains on",
        )),
        [demo] if demo == "demo" => Ok(Text::Demo),
        paths => Ok(Text::Paths(paths.iter().map(|path| folder.join(path)).collect())),
    }
}

/// A TOML error in one line.
fn plain(error: &toml::de::Error) -> String {
    let place = error.to_string();
    let within = place
        .lines()
        .find_map(|line| line.trim().strip_prefix("in `"))
        .map(|rest| rest.trim_end_matches('`'));
    match within {
        Some(field) => format!("{field}: {}", error.message()),
        None => error.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use trainer::config::Family;

    use super::*;
    use crate::failure::exit_code;

    fn parse(text: &str, sets: &[&str]) -> Result<RunPlan> {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        RunPlan::parse(text, &sets, Path::new("/runs"))
    }

    fn refused(text: &str, sets: &[&str]) -> String {
        let error = parse(text, sets).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    }

    #[test]
    fn an_empty_file_is_the_demos_run() {
        let plan = parse("", &[]).unwrap();
        assert_eq!((plan.text, plan.tokenizer), (Text::Demo, TokenizerKind::Bytes));
        assert_eq!(plan.model, ModelConfig::demo());
    }

    #[test]
    fn values_follow_from_others_unless_they_are_given() {
        let plan = parse("[timing]\ntrain_secs = 8.0\n[training]\nmax_inner_steps = 20", &[]).unwrap();
        assert_eq!(plan.shared.timing.collect_secs, 10.0);
        assert_eq!(plan.shared.membership.max_quota, 20);
        let plan = parse(
            "[timing]\ntrain_secs = 8",
            &["timing.collect_secs=9.5", "membership.max_quota=5"],
        )
        .unwrap();
        assert_eq!(
            (plan.shared.timing.collect_secs, plan.shared.membership.max_quota),
            (9.5, 5)
        );
        let gpt2 = parse("tokenizer = \"gpt2\"", &[]).unwrap();
        assert_eq!(gpt2.model.vocab_size, 50_257);
    }

    #[test]
    fn a_dense_run_has_an_outer_rate_of_one_unless_it_is_given() {
        let dense = "training.compression.algorithm=dense";
        let plan = parse("", &[dense]).unwrap();
        assert_eq!(plan.training.outer_rate, 1.0);
        assert_eq!(
            plan.shared.storage.max_contribution_bytes,
            2 * 4 + 4 * 885_888,
            "two shards"
        );
        let given = parse("[training]\nouter_rate = 0.5", &[dense]).unwrap();
        assert_eq!(given.training.outer_rate, 0.5);
        assert_eq!(parse("", &[]).unwrap().training.outer_rate, 3.0);
        let rule = |way: &str| {
            parse(&format!("[training]\nalgorithm = \"{way}\""), &[])
                .unwrap()
                .training
                .rule
        };
        assert_eq!(["sparse", "diloco"].map(rule), [trainer::aggregate::Rule::Agreement; 2]);
        assert_eq!(["demo", "ddp"].map(rule), [trainer::aggregate::Rule::MedianNorm; 2]);
    }

    #[test]
    fn training_ahead_steps_less_far_and_without_momentum_unless_that_is_given() {
        let of = |text: &str, sets: &[&str]| {
            let training = parse(text, sets).unwrap().training;
            (training.outer_rate, training.outer_momentum)
        };
        let ahead = "timing.overlap=1";
        assert_eq!(of("", &[ahead]), (1.0, 0.0));
        assert_eq!(of("[training]\nalgorithm = \"diloco\"", &[ahead]), (0.5, 0.0));
        assert_eq!(of("", &[ahead, "training.compression.algorithm=int8"]), (0.5, 0.0));
        let given = ["training.outer_rate=0.9", "training.outer_momentum=0.3", ahead];
        assert_eq!(of("", &given), (0.9, 0.3));
        assert_eq!(of("", &["timing.overlap=0"]), (3.0, 0.0));
    }

    #[test]
    fn a_way_of_training_brings_its_usual_settings_and_refuses_what_it_cannot_do() {
        let diloco = parse(
            "",
            &["training.algorithm=diloco", "training.compression.algorithm=int8"],
        )
        .unwrap();
        let training = &diloco.training;
        assert_eq!((training.outer_rate, training.outer_momentum), (0.7, 0.9));
        assert_eq!(training.compression.algorithm, "int8");
        let demo = parse("[training]\nalgorithm = \"demo\"", &[]).unwrap().training;
        assert_eq!(
            (demo.max_inner_steps, demo.compression.k, demo.optimizer.lr),
            (1, 32, 1e-3)
        );
        let ddp = parse("[training]\nalgorithm = \"ddp\"", &[]).unwrap();
        assert_eq!(ddp.training.optimizer.kind, OptimizerKind::AdamW);
        assert_eq!(ddp.shared.membership.max_quota, 1);
        for (way, set, words) in [
            ("ddp", "training.optimizer.kind=muon", &["adamw", "every machine"][..]),
            (
                "ddp",
                "training.max_inner_steps=15",
                &["max_inner_steps", "15", "must be 1"],
            ),
            (
                "demo",
                "training.compression.algorithm=dense",
                &["dense", "sparse with training.algorithm = demo"],
            ),
            ("demo", "training.optimizer.state=carry", &["carry", "reset"]),
            (
                "diloco",
                "training.compression.algorithm=sparse",
                &["sparse", "dense or int8"],
            ),
            ("diloco", "training.outer_momentum=1.5", &["outer_momentum", "1.5"]),
            ("gossip", "name=x", &["gossip", "diloco"]),
        ] {
            let message = refused("", &[&format!("training.algorithm={way}"), set]);
            assert!(
                words.iter().all(|word| message.contains(word)),
                "{words:?} in: {message}"
            );
        }
    }

    #[test]
    fn a_preset_can_be_changed_value_by_value() {
        let plan = parse("model = \"demo\"", &["model.dim=64", "model.heads=2"]).unwrap();
        assert_eq!(
            (plan.model.dim, plan.model.kv_heads, plan.model.layers),
            (64, 2, ModelConfig::demo().layers)
        );
    }

    #[test]
    fn presets_go_by_name_take_the_tokenizers_vocabulary_and_tell_their_size() {
        let plan = parse("tokenizer = \"gpt2\"\n[model]\npreset = \"135m\"\nlayers = 2", &[]).unwrap();
        assert_eq!(
            (plan.model.dim, plan.model.layers, plan.model.vocab_size),
            (576, 2, 50_257)
        );
        let told = parse("model = \"5m\"", &[]).unwrap().size();
        assert!(
            told.contains("5,230,336 parameters") && told.contains("MFLOP a token"),
            "{told}"
        );
    }

    #[test]
    fn the_tables_of_every_family_read_back_as_agreed() {
        for (text, family) in [
            ("family = \"qwen2\"", Family::Qwen2),
            ("family = \"gpt2\"", Family::Gpt2),
            ("preset = \"1b\"\nlayers = 1", Family::Llama),
        ] {
            let plan = parse(&format!("[model]\n{text}"), &[]).unwrap();
            assert_eq!(plan.model.family, family);
            let table = Table::try_from(&plan.model).unwrap();
            let again: ModelConfig = table.to_string().parse::<Table>().unwrap().try_into().unwrap();
            assert_eq!(again, plan.model);
        }
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let plan = parse("text = [\"a.txt\", \"/b\"]", &[]).unwrap();
        assert_eq!(plan.text, Text::Paths(vec!["/runs/a.txt".into(), "/b".into()]));
    }

    #[test]
    fn a_bad_value_gets_one_message_with_value_bound_and_fix() {
        for (text, sets, words) in [
            (
                "",
                &["training.optimizer.lr=7"][..],
                &["training.optimizer.lr", "7", "at most 1"][..],
            ),
            ("", &["training.optimizer.lr=abc"], &["lr", "abc", "f64"]),
            ("", &["trainign.lr=1"], &["trainign", "expected one of", "training"]),
            ("", &["training"], &["--set training", "key=value"]),
            ("", &["name.x=1", "name.y=2", "name=3"], &["name", "string"]),
            ("model = \"huge\"", &[], &["huge", "demo", "135m", "8b"]),
            (
                "[model]\nvocab_size = 100",
                &[],
                &["vocab_size = 100", "at least 256", "leave it out"],
            ),
            ("tokenizer = \"words\"", &[], &["words", "bytes", "gpt2"]),
            ("text = []", &[], &["text", "demo"]),
            ("", &["timing.train_secs=-1"], &["timing.train_secs", "-1"]),
            ("", &["membership.max_quota=99999"], &["max_quota", "max_inner_steps"]),
            ("", &["timing.overlap=2"], &["timing.overlap = 2", "0 or 1"]),
            (
                "",
                &["timing.overlap=1", "training.algorithm=demo"],
                &["timing.overlap = 1", "\"demo\"", "leave it out"],
            ),
            (
                "",
                &["timing.overlap=1", "training.algorithm=ddp"],
                &["timing.overlap = 1", "\"ddp\"", "leave it out"],
            ),
            (
                "",
                &[
                    "timing.overlap=1",
                    "training.optimizer.state=carry",
                    "verification.audit_permille=0",
                ],
                &["timing.overlap = 1", "\"carry\"", "reset"],
            ),
            ("", &["held_out_permille=0"], &["held_out_permille = 0", "1 to 500"]),
            ("name = [", &[], &["TOML"]),
        ] {
            let message = refused(text, sets);
            assert!(
                words.iter().all(|word| message.contains(word)),
                "{words:?} in: {message}"
            );
        }
    }

    #[test]
    fn the_runs_that_ship_do_not_pay_cheats() {
        let demo = include_str!("../runs/demo.toml");
        // As `murmur demo --cheat` has it, too.
        let caught = ["verification.audit_permille=400"];
        for (text, sets) in [
            ("", &[][..]),
            (demo, &[]),
            (demo, &caught),
            (include_str!("../runs/small.toml"), &[]),
        ] {
            let told = parse(text, sets).unwrap().economics(false).unwrap();
            assert!(told.contains("a cheat in every round is caught within"), "{told}");
        }
    }

    #[test]
    fn a_run_that_pays_cheats_is_refused_with_the_numbers_unless_that_is_wanted() {
        let plan = parse("", &["rewards.vesting_rounds=32"]).unwrap();
        let error = plan.economics(false).unwrap_err();
        assert_eq!(exit_code(&error), 2);
        let told = error.to_string();
        for words in [
            "opens nothing to auditors",
            "is paid 0.375 of what it claims",
            "honest work leaves 0.200",
            "set verification.audit_permille = 180, or rewards.vesting_rounds = 43;",
            "--unsafe-economics",
        ] {
            assert!(told.contains(words), "{words:?} in: {told}");
        }
        assert!(plan.economics(true).unwrap().starts_with("cheating pays"));
        let trusting = parse("", &["rewards.vesting_rounds=32", "economics.cost_share=0.02"]).unwrap();
        assert!(trusting.economics(false).is_ok(), "who assumes otherwise may");
        assert!(refused("", &["economics.cost_share=1.5"]).contains("economics.cost_share = 1.5: 0 to 0.99"));
        let unchecked = parse("", &["verification.audit_permille=0"]).unwrap();
        assert!(
            unchecked
                .economics(false)
                .unwrap_err()
                .to_string()
                .contains("no work is audited")
        );
    }

    #[test]
    fn what_was_agreed_reads_back_as_the_same_trainer() {
        let plan = parse("", &[]).unwrap();
        let member = GenesisMember {
            id: Default::default(),
            vrf_key: Hash::default(),
            weight: 1,
            payout_address: String::new(),
        };
        let config = plan
            .agree(Hash::of(b"m"), 10, Some(Hash::of(b"start")), vec![member])
            .unwrap();
        let bytes = config.to_canonical_toml();
        let again = RunConfig::from_agreed(bytes.as_bytes(), Some(config.id())).unwrap();
        assert_eq!(trainer_of(&again).unwrap(), (plan.model, plan.training));
        assert_eq!(start_model::root_of(&again).unwrap(), Some(Hash::of(b"start")));
    }
}
