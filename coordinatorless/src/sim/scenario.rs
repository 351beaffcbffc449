//! What a simulated run looks like: peers, links, faults; read from TOML.

use serde::{Deserialize, Serialize};

use super::adversary::Liars;
use super::fault::{Chaos, Fault, FaultKind};
use crate::config::*;
use crate::protocol::beacon::VrfKeys;
use crate::types::*;
use crate::wire::{Keys, Scheme};

/// A simulated run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// The seed of everything random.
    pub seed: u64,
    /// How many peers; all are members of the genesis but those that a `join` fault brings in.
    pub peers: usize,
    /// Rounds to reach.
    pub rounds: u64,
    /// Virtual seconds after which the run counts as stuck.
    pub limit_secs: f64,
    /// Real ed25519 signatures and VRFs instead of keyed hashes (slower by far).
    pub real_signatures: bool,
    /// Seconds a peer of speed 1 needs for a batch.
    pub batch_secs: f64,
    /// Relative speeds, by peer; 1 beyond the list.
    pub speeds: Vec<f64>,
    /// Look who takes whom for dead (four times a virtual second).
    pub watch: bool,
    /// Every link.
    pub link: Link,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// And what else, as the seed draws it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chaos: Option<Chaos>,
    /// Who lies, and how.
    pub liars: Vec<Liars>,
    /// Deadlines; the defaults here are short.
    pub timing: TimingConfig,
    /// Membership rules.
    pub membership: MembershipConfig,
    /// Audits.
    pub verification: VerificationConfig,
    /// Rounds until points can no longer be taken.
    pub vesting_rounds: u64,
    /// End as soon as every liar is barred.
    pub until_barred: bool,
}

/// A link's properties, the same for all.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Link {
    /// One-way latency in milliseconds.
    pub latency_ms: f64,
    /// Uniformly added, up to this; messages overtake each other.
    pub jitter_ms: f64,
    /// Chance that a message is lost, 0 to 1.
    pub loss: f64,
    /// Chance that it comes twice.
    pub duplicate: f64,
    /// Bytes per second for blobs.
    pub bandwidth: f64,
    /// Each direction of each link has its own fixed share of this, in milliseconds, on top.
    pub asymmetry_ms: f64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            latency_ms: 50.0,
            jitter_ms: 20.0,
            loss: 0.0,
            duplicate: 0.0,
            bandwidth: 12_500_000.0,
            asymmetry_ms: 0.0,
        }
    }
}

/// A scenario that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML of this shape.
    #[error("the scenario cannot be read: {0}")]
    Parse(#[from] toml::de::Error),
    /// A value out of bounds.
    #[error("{field} = {found}: expected {expected}")]
    Value {
        /// Which.
        field: &'static str,
        /// The value.
        found: String,
        /// What holds for it.
        expected: &'static str,
    },
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: "plain".into(),
            seed: 1,
            peers: 4,
            rounds: 20,
            limit_secs: 3600.0,
            real_signatures: false,
            batch_secs: 0.1,
            speeds: Vec::new(),
            watch: false,
            link: Link::default(),
            faults: Vec::new(),
            chaos: None,
            liars: Vec::new(),
            timing: TimingConfig {
                train_secs: 4.0,
                collect_secs: 6.0,
                fetch_secs: 2.0,
                view_secs: 1.5,
                censor_secs: 2.0,
                overlap: 0,
            },
            membership: MembershipConfig {
                regroup_secs: 5.0,
                ..MembershipConfig::default()
            },
            verification: VerificationConfig::default(),
            vesting_rounds: 16,
            until_barred: false,
        }
    }
}

impl Scenario {
    /// Everyone who lies.
    pub fn liars(&self) -> impl Iterator<Item = usize> {
        self.liars.iter().flat_map(|liars| liars.peers.iter().copied())
    }

    /// Reads and checks a scenario.
    pub fn from_toml(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Checks bounds, after command-line changes too.
    pub fn check(&self) -> Result<(), ScenarioError> {
        let value = |holds: bool, field, found: String, expected| {
            if holds {
                Ok(())
            } else {
                Err(ScenarioError::Value { field, found, expected })
            }
        };
        value(
            (1..=1000).contains(&self.peers),
            "peers",
            self.peers.to_string(),
            "1 to 1000",
        )?;
        value(
            (1..=100_000).contains(&self.rounds),
            "rounds",
            self.rounds.to_string(),
            "1 to 100000",
        )?;
        value(
            (0.0..1.0).contains(&self.link.loss),
            "link.loss",
            self.link.loss.to_string(),
            "0 or more, below 1",
        )?;
        value(
            (0.0..1.0).contains(&self.link.duplicate),
            "link.duplicate",
            self.link.duplicate.to_string(),
            "0 or more, below 1",
        )?;
        value(
            self.link.latency_ms >= 0.0
                && self.link.jitter_ms >= 0.0
                && self.link.asymmetry_ms >= 0.0
                && self.link.bandwidth > 0.0,
            "link",
            format!("{:?}", self.link),
            "nothing negative, and some bandwidth",
        )?;
        let known = self
            .faults
            .iter()
            .flat_map(|fault| &fault.peers)
            .chain(self.liars.iter().flat_map(|liars| &liars.peers))
            .all(|peer| *peer < self.peers);
        let times = self.faults.iter().all(|fault| {
            let back = fault.kind == FaultKind::ClockJump;
            fault.at_secs >= 0.0 && fault.secs.abs() <= 1e9 && (fault.secs >= 0.0 || back)
        });
        value(
            times,
            "faults.at_secs or faults.secs",
            format!("{:?}", self.faults),
            "0 to 1e9 seconds; negative ones only for a clock that jumps back",
        )?;
        value(
            known,
            "faults.peers or liars.peers",
            format!("{:?} {:?}", self.faults, self.liars),
            "indices below `peers`",
        )
    }

    /// The file that repeats it.
    ///
    /// # Errors
    /// None that is known: every scenario was TOML once.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The same with every fault of its storm named.
    pub fn spelled_out(&self) -> Self {
        let mut all = self.clone();
        if let Some(chaos) = all.chaos.take() {
            all.faults.extend(chaos.draw(self.seed, self.peers));
            all.liars.extend(chaos.draw_liars(self.seed, self.peers));
            all.faults.sort_by(|a, b| a.at_secs.total_cmp(&b.at_secs));
        }
        all
    }

    pub(super) fn scheme(&self) -> Scheme {
        if self.real_signatures {
            Scheme::Ed25519
        } else {
            Scheme::KeyedHash
        }
    }

    pub(super) fn keys(&self, peer: usize) -> Keys {
        let secret = blake3::derive_key(
            "murmur/v1/sim-key",
            &[self.seed.to_le_bytes(), (peer as u64).to_le_bytes()].concat(),
        );
        Keys::new(secret, self.scheme())
    }

    /// The run's configuration: every peer in the genesis with weight 1, unless it joins later.
    pub(super) fn config(&self) -> RunConfig {
        let joiners: Vec<usize> = self
            .faults
            .iter()
            .filter(|fault| fault.kind == FaultKind::Join)
            .flat_map(|fault| fault.peers.clone())
            .collect();
        let founders = (0..self.peers).filter(|peer| !joiners.contains(peer));
        let mut genesis: Vec<GenesisMember> = founders
            .map(|peer| {
                let keys = self.keys(peer);
                let vrf_key = Hash(VrfKeys::derive(&keys).public());
                GenesisMember {
                    id: keys.id(),
                    vrf_key,
                    weight: 1,
                    payout_address: String::new(),
                }
            })
            .collect();
        genesis.sort();
        RunConfig {
            protocol: PROTOCOL,
            name: "sim".into(),
            nonce: self.seed.to_string(),
            data: DataConfig {
                manifest: Hash::of(b"sim"),
                sequences: 1 << 30,
                seq_len: 256,
                batch_sequences: 4,
                tokenizer: "bytes".into(),
            },
            timing: self.timing.clone(),
            membership: MembershipConfig {
                round_batches: self.membership.round_batches.max(self.peers as u64 * 4),
                ..self.membership.clone()
            },
            verification: self.verification.clone(),
            rewards: RewardConfig {
                flops_per_token: 5_000_000,
                vesting_rounds: self.vesting_rounds,
                ..RewardConfig::default()
            },
            storage: StorageConfig::default(),
            model: toml::Table::new(),
            training: toml::Table::new(),
            genesis,
        }
    }
}
