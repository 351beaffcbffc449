//! What goes wrong in a simulated run, one by one as a scenario lists it, or drawn from the seed ([`Chaos`]).

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::adversary::{LiarKind, Liars};

/// One thing that goes wrong.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Virtual seconds after the start.
    pub at_secs: f64,
    /// The peers it concerns.
    pub peers: Vec<usize>,
    /// What.
    pub kind: FaultKind,
    /// How long it lasts, or how far a clock jumps, in seconds, where the kind says so.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub secs: f64,
    /// How fast the clock runs ([`FaultKind::Drift`]); 1 is right.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rate: f64,
}

impl Fault {
    /// Whether this mends something: without it, a run that stands still would prove nothing.
    pub fn mends(&self) -> bool {
        match self.kind {
            FaultKind::Heal | FaultKind::Restart | FaultKind::RestartWithoutWal | FaultKind::Join => true,
            FaultKind::SlowDisk => self.secs == 0.0,
            FaultKind::Drift => self.rate == 1.0,
            _ => false,
        }
    }
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The process dies; only its disk stays.
    Crash,
    /// The process starts again from its disk.
    Restart,
    /// Starts again with its write-ahead log gone.
    RestartWithoutWal,
    /// The power fails in the middle of the next write to the log: the entry is lost, nothing after it happens. It comes back after
    /// `secs`.
    PowerLoss,
    /// The process stands still for `secs`, then everything that came meanwhile comes at once.
    Pause,
    /// From now on each write to the log takes `secs`; 0 mends it.
    SlowDisk,
    /// From now on the peer's clock runs at `rate`; a rate of 1 mends it.
    Drift,
    /// The peer's clock jumps ahead by `secs`, or back where they are negative.
    ClockJump,
    /// Somebody copies the peer's directory and starts a second process from it, with the same key. Nothing is promised to either,
    /// and they count with those who lie.
    DuplicateKey,
    /// What these peers send is lost; they still hear.
    Mute,
    /// These peers are cut off from the others. Several such faults make several parts.
    Partition,
    /// All links work again.
    #[default]
    Heal,
    /// A peer outside the genesis starts and asks to join.
    Join,
    /// A member says goodbye.
    Leave,
}

/// How far clocks jump in a storm, in seconds.
const LEAPS: [f64; 6] = [3.0, -3.0, 40.0, -40.0, 7200.0, -7200.0];

/// A storm: faults drawn from the seed. When it is over everything works again, and the run must get on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chaos {
    /// How many faults.
    pub faults: usize,
    /// The first one is this many virtual seconds after the start, at the earliest.
    pub from_secs: f64,
    /// By then all are over.
    pub until_secs: f64,
    /// How many peers lie, each in a way that the seed draws; less than a third of them.
    #[serde(default)]
    pub liars: usize,
}

impl Chaos {
    /// Who lies, and how.
    pub fn draw_liars(&self, seed: u64, peers: usize) -> Vec<Liars> {
        let mut rng = ChaCha12Rng::from_seed(blake3::derive_key("murmur/v1/sim-chaos-liars", &seed.to_le_bytes()));
        let mut rest: Vec<usize> = (0..peers).collect();
        let liars = (0..self.liars.min(peers)).map(|_| Liars {
            kind: LiarKind::ALL[rng.random_range(0..LiarKind::ALL.len())],
            peers: vec![rest.swap_remove(rng.random_range(0..rest.len()))],
        });
        liars.collect()
    }

    /// The faults that this seed draws for `peers` peers.
    pub fn draw(&self, seed: u64, peers: usize) -> Vec<Fault> {
        let seed = blake3::derive_key("murmur/v1/sim-chaos", &seed.to_le_bytes());
        let mut rng = ChaCha12Rng::from_seed(seed);
        let mut all = Vec::new();
        let span = (self.until_secs - self.from_secs).max(0.0);
        for _ in 0..self.faults {
            let at_secs = self.from_secs + rng.random_range(0.0..=1.0) * span;
            let end = (at_secs + rng.random_range(1.0..30.0)).min(self.until_secs);
            let some = rng.random_range(1..=peers.div_ceil(2));
            let hit: Vec<usize> = (0..peers).filter(|_| rng.random_range(0..peers) < some).collect();
            let one = vec![rng.random_range(0..peers)];
            let fault = |at_secs: f64, peers: &[usize], kind| Fault {
                at_secs,
                peers: peers.to_vec(),
                kind,
                ..Fault::default()
            };
            match rng.random_range(0..10u32) {
                0 => all.extend([
                    fault(at_secs, &hit, FaultKind::Crash),
                    fault(end, &hit, FaultKind::Restart),
                ]),
                // Who lost its log is silent until the next decision: with liars beside it, too few may be left to decide.
                1 => all.extend([
                    fault(at_secs, &one, FaultKind::Crash),
                    fault(
                        end,
                        &one,
                        if self.liars == 0 {
                            FaultKind::RestartWithoutWal
                        } else {
                            FaultKind::Restart
                        },
                    ),
                ]),
                2 => all.push(Fault {
                    secs: (end - at_secs).min(10.0),
                    ..fault(at_secs, &one, FaultKind::PowerLoss)
                }),
                3 => all.push(Fault {
                    secs: end - at_secs,
                    ..fault(at_secs, &hit, FaultKind::Pause)
                }),
                4 => all.extend([
                    Fault {
                        secs: rng.random_range(0.05..0.5),
                        ..fault(at_secs, &hit, FaultKind::SlowDisk)
                    },
                    fault(end, &hit, FaultKind::SlowDisk),
                ]),
                5 => all.push(Fault {
                    rate: rng.random_range(0.8..1.25),
                    ..fault(at_secs, &one, FaultKind::Drift)
                }),
                6 => all.push(fault(at_secs, &one, FaultKind::Mute)),
                7 => all.push(Fault {
                    secs: LEAPS[rng.random_range(0..LEAPS.len())],
                    ..fault(at_secs, &hit, FaultKind::ClockJump)
                }),
                // One such key: it counts with the liars, and must not make them a third.
                8 if self.liars == 0 && !all.iter().any(|one| one.kind == FaultKind::DuplicateKey) => {
                    all.push(fault(at_secs, &one, FaultKind::DuplicateKey));
                }
                _ => all.push(fault(at_secs, &hit, FaultKind::Partition)),
            }
            if rng.random_bool(0.3) {
                all.push(fault(end, &[], FaultKind::Heal));
            }
        }
        let everyone: Vec<usize> = (0..peers).collect();
        for kind in [
            FaultKind::Heal,
            FaultKind::Restart,
            FaultKind::SlowDisk,
            FaultKind::Drift,
        ] {
            all.push(Fault {
                at_secs: self.until_secs + 0.001,
                peers: everyone.clone(),
                kind,
                secs: 0.0,
                rate: 1.0,
            });
        }
        all.sort_by(|a, b| a.at_secs.total_cmp(&b.at_secs));
        all
    }
}
