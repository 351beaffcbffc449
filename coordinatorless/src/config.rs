//! What all peers of a run share (R2), and nothing else: what is local to a peer is the launcher's business.
//!
//! The agreed file is TOML. Its bytes are canonical (parsed and written again they are the same), and their hash is the
//! [`RunId`]; so the file a person reads is the file that was agreed. `model` and `training` are opaque here: this crate never
//! sees a tensor.

use serde::{Deserialize, Serialize};

use crate::types::{Hash, MAX_STEPS, PeerId, RunId};

/// The protocol version that this build speaks.
pub const PROTOCOL: u32 = 8;
/// The largest configuration accepted from a peer, in bytes.
pub const MAX_CONFIG: usize = 256 << 10;

/// A run's configuration, identical for all its members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Protocol version ([`PROTOCOL`]).
    pub protocol: u32,
    /// A name for people; 1 to 64 characters.
    pub name: String,
    /// Random hexadecimal, so that two runs of the same settings are two runs.
    pub nonce: String,
    /// Where the tokens come from.
    pub data: DataConfig,
    /// Deadlines.
    #[serde(default)]
    pub timing: TimingConfig,
    /// Weights, quotas, lapses, regroups.
    #[serde(default)]
    pub membership: MembershipConfig,
    /// Audits.
    #[serde(default)]
    pub verification: VerificationConfig,
    /// Points.
    #[serde(default)]
    pub rewards: RewardConfig,
    /// Snapshots.
    #[serde(default)]
    pub storage: StorageConfig,
    /// The model, as the trainer defines it; opaque here.
    pub model: toml::Table,
    /// Optimization and compression, as the trainer defines them; opaque here.
    pub training: toml::Table,
    /// Members of record 0, sorted by id; at least one.
    pub genesis: Vec<GenesisMember>,
}

/// The run's data, as the protocol needs it: a stream of numbered batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// BLAKE3 of the manifest; the manifest names the shards.
    pub manifest: Hash,
    /// Sequences for training; more than 0.
    pub sequences: u64,
    /// Tokens trained on per sequence.
    pub seq_len: u32,
    /// Sequences in a batch, the unit of assignment: one inner step.
    pub batch_sequences: u32,
    /// The tokenizer's name.
    pub tokenizer: String,
}

impl DataConfig {
    /// Tokens in a batch.
    pub fn batch_tokens(&self) -> u64 {
        u64::from(self.seq_len) * u64::from(self.batch_sequences)
    }
}

/// Deadlines, as durations since a peer saw the last decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimingConfig {
    /// Seconds of training after which a member stops and commits what it has; 0.1 to 86400.
    pub train_secs: f64,
    /// Seconds after which a proposer proposes what it has, at the latest; at least `train_secs`.
    pub collect_secs: f64,
    /// Seconds granted beyond that to fetch what is missing before the first view times out.
    pub fetch_secs: f64,
    /// The timeout of views after the first, in seconds; half a second is added per view.
    pub view_secs: f64,
    /// Seconds that a valid commit must have been held widely before its omission is censorship (R12).
    pub censor_secs: f64,
    /// Records by which training runs ahead of agreement (R16): 0 trains each round from the last record's model, 1 from the model of
    /// the record before that, while the last round is still exchanged. 0 or 1; 0 by default, because 1 trains from an older model.
    pub overlap: u32,
}

impl Default for TimingConfig {
    fn default() -> Self {
        Self {
            train_secs: 60.0,
            collect_secs: 75.0,
            fetch_secs: 15.0,
            view_secs: 3.0,
            censor_secs: 2.0,
            overlap: 0,
        }
    }
}

/// Weights, quotas, lapses and regroups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MembershipConfig {
    /// Batches assigned per round over all members; more than 0.
    pub round_batches: u64,
    /// Most batches for one member in a round (the trainer's `max_inner_steps`); at most [`MAX_STEPS`], which auditors can show.
    pub max_quota: u64,
    /// Rounds before counted tokens weigh (R5).
    pub weight_delay: u64,
    /// Rounds that weight looks back (R5).
    pub weight_window: u64,
    /// Rounds of silence before a member may lapse (R15).
    pub lapse_rounds: u64,
    /// Seconds overdue before survivors regroup (R20).
    pub regroup_secs: f64,
    /// The same where less than half of the weight is heard, as a multiple.
    pub regroup_minority_factor: f64,
    /// `"regroup"` or `"halt"`: what to do when the quorum is lost (R20).
    pub on_quorum_loss: QuorumLoss,
    /// Rounds on a branch after which it is never left (R21b).
    pub finality_rounds: u64,
}

/// What to do when more than 1/3 of the weight is gone (R20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuorumLoss {
    /// Survivors go on together as a new branch.
    Regroup,
    /// Wait for the others.
    Halt,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self {
            round_batches: 60,
            max_quota: 64,
            weight_delay: 4,
            weight_window: 16,
            lapse_rounds: 3,
            regroup_secs: 30.0,
            regroup_minority_factor: 5.0,
            on_quorum_loss: QuorumLoss::Regroup,
            finality_rounds: 64,
        }
    }
}

/// Audits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerificationConfig {
    /// Auditors that a counted contribution can expect, in thousandths; 0 to 1000. Each is drawn by itself, so at 100 one of ten
    /// contributions is audited, and some twice.
    pub audit_permille: u32,
    /// Largest relative L2 distance between claim and replay that passes.
    pub bound: f64,
    /// Largest relative difference of a step's gradient norm between the member's trace and its auditor's; of its loss, a hundredth of that. A quarter
    /// of the steps may be farther apart.
    pub trace_bound: f64,
    /// Rounds within which a verdict may enter a record, after the round audited or the accusation to be confirmed.
    pub verdict_rounds: u64,
    /// The accumulator root of a newcomer: that of zeros for this model (R19).
    pub accumulator_zero: Hash,
    /// Seconds from a record to the claim of whoever it asks for a proof of speed; 0: nobody is asked. At most `timing.train_secs`.
    pub speed_secs: f64,
    /// Rounds, on average, from one to the next in which members are asked.
    pub speed_every: u64,
}

impl VerificationConfig {
    /// What a round that was drawn and not opened costs, in what it claimed ([`unopened_costs`]).
    pub fn unopened_costs(&self) -> u64 {
        unopened_costs(self.audit_permille)
    }
}

/// What a round that was drawn and not opened costs, in what it claimed: it stands for those that were not drawn, of which there are `1/p` for
/// each that was, four times over, as not every lot falls to who is honest and looks.
pub fn unopened_costs(audit_permille: u32) -> u64 {
    match audit_permille {
        0 => 1,
        permille => 4000_u64.div_ceil(u64::from(permille)),
    }
}

impl Default for VerificationConfig {
    fn default() -> Self {
        Self {
            audit_permille: 100,
            bound: 0.01,
            trace_bound: 1e-3,
            verdict_rounds: 8,
            accumulator_zero: Hash::default(),
            speed_secs: 0.0,
            speed_every: 64,
        }
    }
}

/// Points (R29).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Rounds before points vest; at least `verification.verdict_rounds`.
    pub vesting_rounds: u64,
    /// Training FLOPs per token of this model; points are tokens times this, in billions (GFLOP).
    pub flops_per_token: u64,
    /// Nominal seconds of a round, for the liveness multiplier.
    pub nominal_round_secs: u64,
    /// What a proven audit pays, in thousandths of what the audited work pays; 0 to 10000.
    pub audit_bounty_permille: u64,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            vesting_rounds: 1500,
            flops_per_token: 1,
            nominal_round_secs: 60,
            audit_bounty_permille: 1000,
        }
    }
}

/// Snapshots (R17).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorageConfig {
    /// Rounds between snapshots; at least 1.
    pub snapshot_rounds: u64,
    /// Bytes of one contribution at most, over all shards.
    pub max_contribution_bytes: u64,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            snapshot_rounds: 32,
            max_contribution_bytes: 1 << 30,
        }
    }
}

/// A member of record 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenesisMember {
    /// Its id.
    pub id: PeerId,
    /// Its VRF key, in hexadecimal.
    pub vrf_key: Hash,
    /// Its share of the starting weight; 1 to 1000000.
    pub weight: u32,
    /// Where its tokens are to be paid; may be empty.
    #[serde(default)]
    pub payout_address: String,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not TOML, or not of this shape.
    #[error("the run's configuration cannot be read: {0}")]
    Parse(String),
    /// Readable, but not in the one form that is hashed.
    #[error("the run's configuration is not in canonical form")]
    NotCanonical,
    /// Over [`MAX_CONFIG`].
    #[error("the run's configuration is {found} bytes long, at most {MAX_CONFIG} are allowed")]
    TooLong {
        /// Its length.
        found: usize,
    },
    /// Another run's.
    #[error("this is the configuration of another run: expected {expected}, found {found}")]
    OtherRun {
        /// The run asked for.
        expected: RunId,
        /// The run found.
        found: RunId,
    },
    /// A value out of bounds.
    #[error("{field} = {found}: {bound}; {fix}")]
    Value {
        /// The field's path.
        field: &'static str,
        /// Its value.
        found: String,
        /// What holds for it.
        bound: String,
        /// What to do.
        fix: &'static str,
    },
}

impl RunConfig {
    /// The bytes that are agreed and hashed.
    pub fn to_canonical_toml(&self) -> String {
        // Every field is a string, an integer, a finite float or a table of those (checked by `validate`), which TOML can always say.
        toml::to_string(self).unwrap_or_default()
    }

    /// The run's id.
    pub fn id(&self) -> RunId {
        RunId(blake3::derive_key(
            "murmur/v1/run-config",
            self.to_canonical_toml().as_bytes(),
        ))
    }

    /// Reads agreed bytes: canonical, valid, and of the run asked for.
    pub fn from_agreed(bytes: &[u8], expected: Option<RunId>) -> Result<Self, ConfigError> {
        if bytes.len() > MAX_CONFIG {
            return Err(ConfigError::TooLong { found: bytes.len() });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| ConfigError::Parse(error.to_string()))?;
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse(error.to_string()))?;
        if config.to_canonical_toml() != text {
            return Err(ConfigError::NotCanonical);
        }
        let found = config.id();
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(ConfigError::OtherRun { expected, found });
        }
        config.validate()?;
        Ok(config)
    }

    /// Checks every bound, and the relations between fields, once.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |holds: bool, field, found: String, bound: &str, fix| {
            if holds {
                Ok(())
            } else {
                Err(ConfigError::Value {
                    field,
                    found,
                    bound: bound.to_owned(),
                    fix,
                })
            }
        };
        let (time, member, verify) = (&self.timing, &self.membership, &self.verification);
        check(
            self.protocol == PROTOCOL,
            "protocol",
            self.protocol.to_string(),
            &format!("this build speaks protocol {PROTOCOL}"),
            "use the build of Murmur that this run was made with",
        )?;
        let length = self.name.chars().count();
        check(
            (1..=64).contains(&length),
            "name",
            self.name.clone(),
            "1 to 64 characters",
            "choose a shorter name",
        )?;
        check(
            self.data.sequences > 0 && self.data.sequences < 1 << 48,
            "data.sequences",
            self.data.sequences.to_string(),
            "at least 1",
            "give the run more text",
        )?;
        let batch = self.data.batch_tokens();
        check(
            (1..1 << 32).contains(&batch),
            "data.batch_sequences",
            batch.to_string(),
            "a batch has 1 to 2^32 tokens",
            "choose a batch of at least one sequence",
        )?;
        for (field, value, low, high) in [
            ("timing.train_secs", time.train_secs, 0.1, 86_400.0),
            ("timing.collect_secs", time.collect_secs, time.train_secs, 172_800.0),
            ("timing.fetch_secs", time.fetch_secs, 0.1, 86_400.0),
            ("timing.view_secs", time.view_secs, 0.1, 3_600.0),
            ("timing.censor_secs", time.censor_secs, 0.1, 3_600.0),
            ("membership.regroup_secs", member.regroup_secs, 0.5, 86_400.0),
            (
                "membership.regroup_minority_factor",
                member.regroup_minority_factor,
                1.0,
                1_000.0,
            ),
            ("verification.bound", verify.bound, 1e-9, 10.0),
            ("verification.trace_bound", verify.trace_bound, 1e-9, 1.0),
            ("verification.speed_secs", verify.speed_secs, 0.0, time.train_secs),
        ] {
            check(
                value.is_finite() && value >= low && value <= high,
                field,
                value.to_string(),
                "out of bounds (collect_secs is at least train_secs, speed_secs at most; all but speed_secs are positive)",
                "see `murmur new --help`",
            )?;
        }
        for (field, value, low, high) in [
            ("membership.round_batches", member.round_batches, 1, 1 << 32),
            ("membership.max_quota", member.max_quota, 1, MAX_STEPS),
            ("membership.weight_delay", member.weight_delay, 1, 1 << 16),
            ("membership.weight_window", member.weight_window, 1, 1 << 16),
            ("membership.lapse_rounds", member.lapse_rounds, 1, 1 << 16),
            ("membership.finality_rounds", member.finality_rounds, 1, 1 << 32),
            ("verification.audit_permille", u64::from(verify.audit_permille), 0, 1000),
            ("verification.verdict_rounds", verify.verdict_rounds, 2, 1 << 16),
            ("verification.speed_every", verify.speed_every, 1, 1 << 20),
            (
                "rewards.vesting_rounds",
                self.rewards.vesting_rounds,
                verify.verdict_rounds,
                1 << 20,
            ),
            ("rewards.flops_per_token", self.rewards.flops_per_token, 1, 1 << 48),
            (
                "rewards.nominal_round_secs",
                self.rewards.nominal_round_secs,
                1,
                1 << 20,
            ),
            (
                "rewards.audit_bounty_permille",
                self.rewards.audit_bounty_permille,
                0,
                10_000,
            ),
            ("storage.snapshot_rounds", self.storage.snapshot_rounds, 1, 1 << 20),
            (
                "storage.max_contribution_bytes",
                self.storage.max_contribution_bytes,
                1,
                1 << 34,
            ),
        ] {
            check(
                (low..=high).contains(&value),
                field,
                value.to_string(),
                &format!("from {low} to {high}"),
                "see `murmur new --help`",
            )?;
        }
        check(
            time.overlap <= 1,
            "timing.overlap",
            time.overlap.to_string(),
            "0 or 1: a round is trained from the model of the last record, or of the one before",
            "choose 0 or 1",
        )?;
        let sorted = self.genesis.windows(2).all(|pair| pair[0].id < pair[1].id);
        let sane = self
            .genesis
            .iter()
            .all(|member| (1..=1_000_000).contains(&member.weight) && member.payout_address.len() <= 64);
        check(
            sorted && sane && !self.genesis.is_empty() && self.genesis.len() <= 1000,
            "genesis",
            format!("{} members", self.genesis.len()),
            "1 to 1000 members, sorted by id, each of weight 1 to 1000000, addresses of at most 64 bytes",
            "let `murmur new` write this part",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RunConfig {
        RunConfig {
            protocol: PROTOCOL,
            name: "test".into(),
            nonce: "00".into(),
            data: DataConfig {
                manifest: Hash::of(b"m"),
                sequences: 10,
                seq_len: 8,
                batch_sequences: 2,
                tokenizer: "bytes".into(),
            },
            timing: TimingConfig::default(),
            membership: MembershipConfig::default(),
            verification: VerificationConfig::default(),
            rewards: RewardConfig::default(),
            storage: StorageConfig::default(),
            model: toml::Table::new(),
            training: toml::Table::new(),
            genesis: vec![GenesisMember {
                id: PeerId([1; 32]),
                vrf_key: Hash([2; 32]),
                weight: 1,
                payout_address: String::new(),
            }],
        }
    }

    #[test]
    fn agreed_bytes_read_back_to_the_same_run() {
        let config = config();
        let text = config.to_canonical_toml();
        assert!(!text.is_empty());
        assert_eq!(
            RunConfig::from_agreed(text.as_bytes(), Some(config.id())).unwrap(),
            config
        );
    }

    #[test]
    fn another_runs_config_and_a_reformatted_one_are_refused() {
        let config = config();
        let text = config.to_canonical_toml();
        let other = RunConfig::from_agreed(text.as_bytes(), Some(RunId([9; 32])));
        assert!(matches!(other, Err(ConfigError::OtherRun { .. })));
        let reformatted = text.replace("name = ", "name  =  ");
        assert_eq!(
            RunConfig::from_agreed(reformatted.as_bytes(), None),
            Err(ConfigError::NotCanonical)
        );
    }

    #[test]
    fn collecting_may_not_end_before_training_does() {
        let mut config = config();
        config.timing.collect_secs = config.timing.train_secs - 1.0;
        assert!(matches!(
            config.validate(),
            Err(ConfigError::Value {
                field: "timing.collect_secs",
                ..
            })
        ));
    }

    #[test]
    fn training_runs_ahead_by_one_record_at_most() {
        let mut config = config();
        assert_eq!(config.timing.overlap, 0, "a run that does not ask for it has none");
        config.timing.overlap = 1;
        assert_eq!(config.validate(), Ok(()));
        config.timing.overlap = 2;
        assert!(matches!(
            config.validate(),
            Err(ConfigError::Value {
                field: "timing.overlap",
                ..
            })
        ));
    }
}
