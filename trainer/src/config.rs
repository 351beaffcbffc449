//! What all peers of a run agree on about the model and its training: part of the run configuration, identical everywhere and hashed.
//!
//! Every field says its purpose, its unit, its bound and where its default comes from. Relations between fields are checked once, by
//! [`ModelConfig::validate`] and [`TrainingConfig::validate_with`], at the border; the code behind it relies on them. A configuration may
//! come from a stranger's ticket, so the bounds also keep every size computed from it free of overflow.

use serde::{Deserialize, Serialize};

use crate::aggregate::Rule;
use crate::compress::Quantizer;

mod model;
mod presets;

pub use model::{Family, ModelConfig, RopeScaling};

/// A value outside its bound: which, what was found, what is allowed, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}, but must be {bound}; {fix}")]
pub struct ConfigError {
    /// The field, as written in the run file (`model.dim`).
    pub field: &'static str,
    /// The value found.
    pub found: String,
    /// What is allowed.
    pub bound: String,
    /// How to mend it.
    pub fix: &'static str,
}

/// Accepts `value` when `allowed`, and says what is wrong otherwise.
fn require(
    allowed: bool,
    field: &'static str,
    value: impl ToString,
    bound: impl Into<String>,
    fix: &'static str,
) -> Result<(), ConfigError> {
    if allowed {
        return Ok(());
    }
    Err(ConfigError {
        field,
        found: value.to_string(),
        bound: bound.into(),
        fix,
    })
}

/// Which optimizer takes the inner steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Orthogonalised momentum on the blocks' matrices, AdamW on embedding, head and norms.
    Muon,
    /// AdamW on everything.
    AdamW,
    /// Stochastic gradient descent with momentum on everything.
    Sgd,
}

/// What matrix products and attention compute in. Parameters, gradients, optimizer state, residual stream, norms, softmax and loss are single
/// precision in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    #[default]
    Fp32,
    /// Single precision, but CUDA devices may round the factors of products to TF32 (10 bits of mantissa), which their tensor cores take.
    /// Elsewhere it is `fp32`.
    Tf32,
    /// bfloat16, as under PyTorch's autocast: about twice as fast where the machine has instructions for it, with less memory for activations.
    Bf16,
}

impl Precision {
    /// What products and attention take and give.
    pub(crate) fn kind(self) -> tch::Kind {
        match self {
            Self::Fp32 | Self::Tf32 => tch::Kind::Float,
            Self::Bf16 => tch::Kind::BFloat16,
        }
    }

    /// Its name, as in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Whether a value is its type's default, which files leave out: run files from before there was a choice keep their hashes.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What the inner optimizer starts a round from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InnerState {
    /// Zero: a round is a function of agreed state alone, which anyone can replay.
    #[default]
    Reset,
    /// What the peer's last counted round left. It is the peer's own, so no audit can replay its rounds.
    Carry,
}

/// The inner optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The rule; Muon learns more per round than AdamW when state is reset.
    pub kind: OptimizerKind,
    /// Peak learning rate, before the schedule. Bound: above 0, at most 1. For Muon it is that of AdamW too: its update is scaled by
    /// `0.2 * sqrt(max(rows, columns))` to the root mean square of an AdamW step (Moonlight, arXiv 2502.16982, section 2.2). The default suits the demo: with an outer rate of 2, 2e-3 learns slowly
    /// at first, and at 5e-3 the agreed model overshoots from round to round until the cosine calms it.
    pub lr: f64,
    /// Decoupled decay per step, times the learning rate; not for norms. Bound: 0 to 1. With SGD it is added to the gradient, as in PyTorch.
    pub weight_decay: f64,
    /// AdamW's decay of the mean gradient. Bound: 0 to below 1.
    pub beta1: f64,
    /// AdamW's decay of the mean square. Bound: 0 to below 1; .95 forgets fast enough for rounds of tens of steps.
    pub beta2: f64,
    /// Muon's (Nesterov) and SGD's momentum. Bound: 0 to below 1. In short runs less does more (`trainer/README.md`); 0.95 is usual in long ones.
    pub momentum: f64,
    /// Added to AdamW's root mean square. Bound: above 0, at most 1e-2.
    pub eps: f64,
    /// What its moments are at the beginning of a round; `reset` where it is left out.
    #[serde(skip_serializing_if = "is_default")]
    pub state: InnerState,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Muon,
            lr: 3e-3,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            momentum: 0.8,
            eps: 1e-8,
            state: InnerState::Reset,
        }
    }
}

/// How the learning rate goes from its peak to its floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleShape {
    /// Half a cosine from the end of the warm-up on (SGDR, arXiv 1608.03983).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the peak, then straight down over the last `decay_tokens` (MiniCPM, arXiv 2404.06395).
    Wsd,
    /// The peak for good; `total_tokens` and `min_ratio` play no part.
    Constant,
}

/// The learning rate over the run, by tokens counted over all peers: a late joiner has the same as everyone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Its course after the warm-up; the cosine where it is left out.
    #[serde(skip_serializing_if = "is_default")]
    pub shape: ScheduleShape,
    /// Global tokens of the last decay of `wsd`. Bound: with `wsd` 1 to `total_tokens - warmup_tokens`, else 0.
    #[serde(skip_serializing_if = "is_default")]
    pub decay_tokens: u64,
    /// Global tokens over which the rate rises linearly. Bound: at most `total_tokens`.
    pub warmup_tokens: u64,
    /// Global tokens at which the rate reaches its floor; it stays there afterwards. Bound: 1 to 2^53 (exact in a double).
    pub total_tokens: u64,
    /// The floor, as a share of the peak. Bound: 0 to 1.
    pub min_ratio: f64,
}

impl Default for ScheduleConfig {
    /// Thirty rounds of 61,440 tokens: the demo's whole run, after a warm-up of about one round.
    fn default() -> Self {
        Self {
            shape: ScheduleShape::Cosine,
            decay_tokens: 0,
            warmup_tokens: 61_440,
            total_tokens: 1_843_200,
            min_ratio: 0.1,
        }
    }
}

/// The way of training together, see [`crate::arms`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Inner steps, then the mean of what all found, at the outer rate: Murmur's own with the `sparse` codec, local SGD with the others.
    #[default]
    Sparse,
    /// Inner steps, every value sent, outer Nesterov momentum that all agree on.
    Diloco,
    /// One gradient a round: the largest coefficients of its cosine transform, then a step by the sign.
    Demo,
    /// One gradient a round, every value, and one AdamW that all agree on.
    Ddp,
}

impl Way {
    /// Its name, as in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sparse => "sparse",
            Self::Diloco => "diloco",
            Self::Demo => "demo",
            Self::Ddp => "ddp",
        }
    }

    /// Whether a peer sends the gradient of one batch, not the way that inner steps went.
    pub fn sends_gradients(self) -> bool {
        matches!(self, Self::Demo | Self::Ddp)
    }
}

/// How a pseudo-gradient becomes bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressionConfig {
    /// The codec: `sparse` sends the largest values of each chunk, `dense` all of them, `int8` all of them in eight bits (with either, `chunk`, `k` and
    /// `beta` say nothing, and an `outer_rate` of 1 is the usual one).
    pub algorithm: String,
    /// Parameters per chunk. Bound: 64 to 65536.
    pub chunk: usize,
    /// Values kept per chunk. Bound: 1 to `chunk`. More for small models: 256 of 4096 learns markedly more than 64 there.
    pub k: usize,
    /// With `k_rounds`: the values kept per chunk from that round on, to which `k` goes evenly from round 1; always `k` where it is left out. Fewer at the
    /// end than at the beginning learn more than as many throughout. Bound: 1 to `chunk`; with algorithm `sparse` alone.
    #[serde(skip_serializing_if = "is_default")]
    pub k_last: Option<usize>,
    /// The round from which on `k_last` values are kept. Bound: at least 2 with `k_last`, else 0.
    #[serde(skip_serializing_if = "is_default")]
    pub k_rounds: u64,
    /// Decay of the accumulator (error feedback). Bound: 0 to below 1.
    pub beta: f64,
    /// What `sparse` says of each value: its `sign`, with one scale a chunk; `sign2`, a sign and one of two levels; `raw`, all of it. The others are here to
    /// compare with: they send more, and are slower to read.
    #[serde(skip_serializing_if = "is_default")]
    pub quantizer: Quantizer,
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self {
            algorithm: "sparse".to_owned(),
            chunk: 4096,
            k: 256,
            k_last: None,
            k_rounds: 0,
            beta: 0.9,
            quantizer: Quantizer::Sign,
        }
    }
}

/// Everything agreed about training; with [`ModelConfig`], the trainer's half of a run configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// The way of training together; `sparse` where it is left out.
    #[serde(skip_serializing_if = "is_default")]
    pub algorithm: Way,
    /// The inner optimizer; with `ddp`, the one that all agree on.
    pub optimizer: OptimizerConfig,
    /// Its learning rate over the run.
    pub schedule: ScheduleConfig,
    /// Largest L2 norm of a step's gradient; longer ones are scaled down to it. Bound: above 0, finite.
    pub grad_clip: f64,
    /// Tokens predicted per sequence (a sequence holds one more). Bound: 1 to the model's `max_seq_len`.
    pub seq_len: usize,
    /// Sequences per inner step. Bound: 1 to 65536.
    pub batch_sequences: usize,
    /// Sequences that go through the model at once; the gradients of a step's pieces are added. Less memory, the same step within rounding. The whole
    /// step where it is left out. Bound: a divisor of `batch_sequences`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// Whether blocks run again in the backward pass instead of keeping what they computed: the same bits, about a third more time, and activations
    /// of one block instead of all.
    #[serde(skip_serializing_if = "is_default")]
    pub recompute: bool,
    /// What products and attention compute in; `fp32` where it is left out.
    #[serde(skip_serializing_if = "is_default")]
    pub precision: Precision,
    /// Most inner steps in a round; a slow peer's round is cut shorter by time. Bound: 1 to 65536.
    pub max_inner_steps: u32,
    /// Seed of the initial parameters.
    pub init_seed: u64,
    /// How contributions are encoded.
    pub compression: CompressionConfig,
    /// Outer learning rate on the mean of the decoded pseudo-gradients. Bound: above 0, at most 16. About 3, because the sum
    /// of sparse contributions is divided by everyone's weight, also of those who sent nothing at an index.
    pub outer_rate: f64,
    /// Outer Nesterov momentum, agreed by all. Bound: 0 to below 1; 0, which is none, where it is left out. Not with `demo` and `ddp`.
    #[serde(skip_serializing_if = "is_default")]
    pub outer_momentum: f64,
    /// How contributions are held to one another before they are summed; `agreement` where it is left out.
    #[serde(skip_serializing_if = "is_default")]
    pub rule: Rule,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            algorithm: Way::Sparse,
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            grad_clip: 1.0,
            seq_len: 128,
            batch_sequences: 8,
            micro_batch: None,
            recompute: false,
            precision: Precision::Fp32,
            max_inner_steps: 15,
            init_seed: 0,
            compression: CompressionConfig::default(),
            outer_rate: 3.0,
            outer_momentum: 0.0,
            rule: Rule::default(),
        }
    }
}

impl TrainingConfig {
    /// Tokens of one inner step of one peer.
    pub fn tokens_per_step(&self) -> u64 {
        (self.seq_len as u64) * (self.batch_sequences as u64)
    }

    /// Numbers of the inner optimizer's state that a peer carries from round to round; none where it starts anew.
    pub fn carried(&self, model: &ModelConfig) -> usize {
        match self.optimizer.state {
            InnerState::Reset => 0,
            InnerState::Carry => crate::optimizer::Optimizer::state_len(&self.optimizer, model),
        }
    }

    /// Sequences that go through the model at once.
    pub fn sequences_at_once(&self) -> usize {
        self.micro_batch.unwrap_or(self.batch_sequences)
    }

    /// Checks every bound of its own; see [`Self::validate_with`] for the relation to the model.
    ///
    /// # Errors
    /// The first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.optimizer.validate()?;
        self.schedule.validate()?;
        self.compression.validate()?;
        let clip = self.grad_clip.is_finite() && self.grad_clip > 0.0;
        require(
            clip,
            "training.grad_clip",
            self.grad_clip,
            "finite and above 0",
            "1.0 is the usual value",
        )?;
        let seq = (1..=1 << 20).contains(&self.seq_len);
        require(
            seq,
            "training.seq_len",
            self.seq_len,
            "1 to 1048576",
            "choose a length in that range",
        )?;
        let batch = (1..=65_536).contains(&self.batch_sequences);
        require(
            batch,
            "training.batch_sequences",
            self.batch_sequences,
            "1 to 65536",
            "choose a number in that range",
        )?;
        let micro = self.sequences_at_once();
        require(
            micro > 0 && self.batch_sequences.is_multiple_of(micro),
            "training.micro_batch",
            micro,
            format!("a divisor of batch_sequences = {}", self.batch_sequences),
            "choose one, or leave it out",
        )?;
        let steps = (1..=65_536).contains(&self.max_inner_steps);
        require(
            steps,
            "training.max_inner_steps",
            self.max_inner_steps,
            "1 to 65536",
            "choose a number in that range",
        )?;
        let outer = self.outer_rate > 0.0 && self.outer_rate <= 16.0;
        require(
            outer,
            "training.outer_rate",
            self.outer_rate,
            "above 0, at most 16",
            "2 is the usual value",
        )?;
        let momentum = (0.0..1.0).contains(&self.outer_momentum);
        require(
            momentum,
            "training.outer_momentum",
            self.outer_momentum,
            "0 to below 1",
            "0.9 is usual with diloco",
        )?;
        self.validate_way()
    }

    /// What a way of training asks of the other settings.
    fn validate_way(&self) -> Result<(), ConfigError> {
        let way = self.algorithm;
        let codecs: &[&str] = match way {
            Way::Sparse => &["sparse", "dense", "int8"],
            Way::Diloco | Way::Ddp => &["dense", "int8"],
            Way::Demo => &["sparse"],
        };
        require(
            codecs.contains(&self.compression.algorithm.as_str()),
            "training.compression.algorithm",
            &self.compression.algorithm,
            format!("{} with training.algorithm = {}", codecs.join(" or "), way.name()),
            "leave it out",
        )?;
        require(
            self.compression.k_last.is_none() || (way == Way::Sparse && self.compression.algorithm == "sparse"),
            "training.compression.k_last",
            self.compression.k_last.unwrap_or(0),
            "left out with every other algorithm than sparse",
            "leave it out",
        )?;
        if !way.sends_gradients() {
            return Ok(());
        }
        let with = |what: &str| format!("{what} with training.algorithm = {}", way.name());
        require(
            self.max_inner_steps == 1,
            "training.max_inner_steps",
            self.max_inner_steps,
            with("1"),
            "leave it out",
        )?;
        require(
            self.optimizer.state == InnerState::Reset,
            "training.optimizer.state",
            "carry",
            with("reset"),
            "leave it out: no peer has an optimizer of its own there",
        )?;
        require(
            self.outer_momentum == 0.0,
            "training.outer_momentum",
            self.outer_momentum,
            with("0"),
            "leave it out",
        )
    }

    /// [`Self::validate`], [`ModelConfig::validate`], and that the model reads sequences of `seq_len`.
    ///
    /// # Errors
    /// The first field that breaks a bound.
    pub fn validate_with(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        model.validate()?;
        self.validate()?;
        let fits = self.seq_len <= model.max_seq_len;
        let bound = format!("at most model.max_seq_len = {}", model.max_seq_len);
        require(
            fits,
            "training.seq_len",
            self.seq_len,
            bound,
            "shorten it or raise model.max_seq_len",
        )
    }
}

impl OptimizerConfig {
    /// Checks every bound.
    ///
    /// # Errors
    /// The first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let share = |x: f64| (0.0..1.0).contains(&x);
        let rate = self.lr > 0.0 && self.lr <= 1.0;
        require(
            rate,
            "training.optimizer.lr",
            self.lr,
            "above 0, at most 1",
            "3e-3 suits small models",
        )?;
        let decay = (0.0..=1.0).contains(&self.weight_decay);
        require(
            decay,
            "training.optimizer.weight_decay",
            self.weight_decay,
            "0 to 1",
            "0.1 is the usual value",
        )?;
        let below = "0 to below 1";
        require(
            share(self.beta1),
            "training.optimizer.beta1",
            self.beta1,
            below,
            "0.9 is the usual value",
        )?;
        require(
            share(self.beta2),
            "training.optimizer.beta2",
            self.beta2,
            below,
            "0.95 is the usual value",
        )?;
        require(
            share(self.momentum),
            "training.optimizer.momentum",
            self.momentum,
            below,
            "0.95 is the usual value",
        )?;
        let eps = self.eps > 0.0 && self.eps <= 1e-2;
        require(
            eps,
            "training.optimizer.eps",
            self.eps,
            "above 0, at most 1e-2",
            "1e-8 is the usual value",
        )
    }
}

impl ScheduleConfig {
    /// Checks every bound.
    ///
    /// # Errors
    /// The first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let total = (1..=1 << 53).contains(&self.total_tokens);
        require(
            total,
            "training.schedule.total_tokens",
            self.total_tokens,
            "1 to 2^53",
            "give the run's tokens",
        )?;
        let warm = self.warmup_tokens <= self.total_tokens;
        let bound = format!("at most total_tokens = {}", self.total_tokens);
        require(
            warm,
            "training.schedule.warmup_tokens",
            self.warmup_tokens,
            bound,
            "shorten the warm-up",
        )?;
        let most = self.total_tokens - self.warmup_tokens;
        let (decay, bound, fix) = match self.shape {
            ScheduleShape::Wsd => (
                (1..=most).contains(&self.decay_tokens),
                format!("1 to total_tokens - warmup_tokens = {most}"),
                "a tenth to a fifth of the run is usual",
            ),
            ScheduleShape::Cosine | ScheduleShape::Constant => (
                self.decay_tokens == 0,
                "0 unless shape is \"wsd\"".to_owned(),
                "leave it out, or write shape = \"wsd\"",
            ),
        };
        require(decay, "training.schedule.decay_tokens", self.decay_tokens, bound, fix)?;
        let floor = (0.0..=1.0).contains(&self.min_ratio);
        require(
            floor,
            "training.schedule.min_ratio",
            self.min_ratio,
            "0 to 1",
            "0.1 is the usual value",
        )
    }
}

impl CompressionConfig {
    /// Values kept per chunk in this round, the first being 1. Rounded towards `k`.
    #[must_use]
    pub fn k_of(&self, round: u64) -> usize {
        let Some(last) = self.k_last else { return self.k };
        let span = u128::from(self.k_rounds.saturating_sub(1).max(1));
        let done = u128::from(round.saturating_sub(1)).min(span);
        // At most 2^16 by 2^64, and a share of the difference: it fits.
        let moved = (self.k.abs_diff(last) as u128 * done / span) as usize;
        if last < self.k { self.k - moved } else { self.k + moved }
    }

    /// The most values kept per chunk in any round.
    #[must_use]
    pub fn most_k(&self) -> usize {
        self.k.max(self.k_last.unwrap_or(0))
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// The first field that breaks one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require(
            ["sparse", "dense", "int8"].contains(&self.algorithm.as_str()),
            "training.compression.algorithm",
            &self.algorithm,
            "sparse, dense or int8",
            "write \"sparse\"",
        )?;
        require(
            self.algorithm == "sparse" || self.quantizer == Quantizer::Sign,
            "training.compression.quantizer",
            format!("{:?}", self.quantizer).to_lowercase(),
            "left out with every other algorithm than sparse",
            "leave it out",
        )?;
        let chunk = (64..=65_536).contains(&self.chunk);
        require(
            chunk,
            "training.compression.chunk",
            self.chunk,
            "64 to 65536",
            "4096 is the usual value",
        )?;
        let k = (1..=self.chunk).contains(&self.k);
        require(
            k,
            "training.compression.k",
            self.k,
            format!("1 to chunk = {}", self.chunk),
            "64 to 256 are usual",
        )?;
        let last = self.k_last.is_none_or(|last| (1..=self.chunk).contains(&last));
        require(
            last,
            "training.compression.k_last",
            self.k_last.unwrap_or(0),
            format!("1 to chunk = {}", self.chunk),
            "a seventh of k is a good choice; or leave it out",
        )?;
        let rounds = self.k_last.is_some() == (self.k_rounds > 1) && (self.k_last.is_some() || self.k_rounds == 0);
        require(
            rounds,
            "training.compression.k_rounds",
            self.k_rounds,
            "at least 2 with k_last, left out without it",
            "write both, k_rounds being the rounds that you plan",
        )?;
        let beta = (0.0..1.0).contains(&self.beta);
        require(
            beta,
            "training.compression.beta",
            self.beta,
            "0 to below 1",
            "0.9 is the usual value",
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_longer_than_the_model_reads_is_refused() {
        let training = TrainingConfig {
            seq_len: 257,
            ..TrainingConfig::default()
        };
        training.validate().unwrap();
        assert_eq!(
            training.validate_with(&ModelConfig::demo()).unwrap_err().field,
            "training.seq_len"
        );
    }

    #[test]
    fn not_a_number_is_never_within_bounds() {
        for broken in [
            TrainingConfig {
                grad_clip: f64::NAN,
                ..TrainingConfig::default()
            },
            TrainingConfig {
                outer_rate: f64::NAN,
                ..TrainingConfig::default()
            },
            TrainingConfig {
                optimizer: OptimizerConfig {
                    lr: f64::NAN,
                    ..OptimizerConfig::default()
                },
                ..TrainingConfig::default()
            },
        ] {
            assert!(broken.validate().is_err());
        }
    }

    #[test]
    fn choices_left_at_their_defaults_are_not_written_so_older_runs_keep_their_hashes() {
        let written = serde_json::to_string(&TrainingConfig::default()).unwrap();
        for later in [
            "precision",
            "micro_batch",
            "recompute",
            "shape",
            "decay_tokens",
            "\"algorithm\":\"diloco",
            "outer_momentum",
            "rule",
        ] {
            assert!(!written.contains(later), "{later} in {written}");
        }
        let chosen = TrainingConfig {
            precision: Precision::Bf16,
            micro_batch: Some(2),
            recompute: true,
            ..TrainingConfig::default()
        };
        let written = serde_json::to_string(&chosen).unwrap();
        assert!(written.contains(r#""precision":"bf16""#), "{written}");
        assert_eq!(serde_json::from_str::<TrainingConfig>(&written).unwrap(), chosen);
    }

    #[test]
    fn the_values_of_a_round_go_evenly_from_the_first_number_to_the_last() {
        let config = |k, k_last, k_rounds| CompressionConfig {
            k,
            k_last,
            k_rounds,
            ..CompressionConfig::default()
        };
        let of = |config: &CompressionConfig| [0, 1, 2, 3, 5, 6, u64::MAX].map(|round| config.k_of(round));
        let falling = config(112, Some(16), 5);
        falling.validate().unwrap();
        assert_eq!(of(&falling), [112, 112, 88, 64, 16, 16, 16]);
        let rising = config(10, Some(20), 4);
        assert_eq!((of(&rising), rising.most_k()), ([10, 10, 13, 16, 20, 20, 20], 20));
        assert_eq!(of(&config(64, None, 0)), [64; 7]);
        for (wrong, field) in [
            (config(64, Some(0), 5), "k_last"),
            (config(64, Some(5000), 5), "k_last"),
            (config(64, Some(16), 1), "k_rounds"),
            (config(64, None, 5), "k_rounds"),
        ] {
            assert_eq!(
                wrong.validate().unwrap_err().field,
                format!("training.compression.{field}")
            );
        }
        let dense = TrainingConfig {
            compression: CompressionConfig {
                algorithm: "dense".to_owned(),
                ..falling
            },
            ..TrainingConfig::default()
        };
        assert_eq!(dense.validate().unwrap_err().field, "training.compression.k_last");
    }

    #[test]
    fn pieces_of_a_step_must_fill_it() {
        let with = |micro_batch| TrainingConfig {
            micro_batch,
            ..TrainingConfig::default()
        };
        with(Some(4)).validate().unwrap();
        for wrong in [0, 3, 16] {
            let error = with(Some(wrong)).validate().unwrap_err();
            assert_eq!((error.field, error.found), ("training.micro_batch", wrong.to_string()));
        }
    }

    #[test]
    fn only_a_last_decay_takes_tokens() {
        let with = |shape, decay_tokens| ScheduleConfig {
            shape,
            decay_tokens,
            ..ScheduleConfig::default()
        };
        with(ScheduleShape::Wsd, 200_000).validate().unwrap();
        with(ScheduleShape::Constant, 0).validate().unwrap();
        for wrong in [
            with(ScheduleShape::Wsd, 0),
            with(ScheduleShape::Wsd, 1_800_000),
            with(ScheduleShape::Cosine, 5),
        ] {
            assert_eq!(wrong.validate().unwrap_err().field, "training.schedule.decay_tokens");
        }
    }
}
