//! One process of `murmur audit calibrate`: trains the given rounds in one way, honestly or with a departure, and writes the pseudo-gradients and the
//! traces.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::types::Trace;
use tch::Device;
use trainer::config::Precision;
use trainer::local::{LocalRound, RoundInputs, local_round, set_threads};
use trainer::model::Model;

use crate::cli::ReplicaArgs;
use crate::failure::usage;
use crate::kit::Kit;
use crate::peer_dir::{PeerDir, write_whole};

/// Batches by which wrong data are off.
const ELSEWHERE: u64 = 1_000_003;

/// What a cheat does otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// One sequence of the round is another.
    Sample,
    /// One sequence of each step is another.
    SampleAStep,
    /// The last step is left out.
    Step,
    /// A tenth of the steps is left out.
    Tenth,
    /// Every second step is left out.
    Half,
    /// Other data.
    Data,
    /// bf16 where the run says fp32.
    Precision,
}

impl Departure {
    /// All of them, from the least.
    pub const ALL: [Self; 7] = [
        Self::Precision,
        Self::Sample,
        Self::SampleAStep,
        Self::Step,
        Self::Tenth,
        Self::Half,
        Self::Data,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sample => "one sequence of the round swapped",
            Self::SampleAStep => "one sequence of each step swapped",
            Self::Step => "one step fewer",
            Self::Tenth => "a tenth of the steps left out",
            Self::Half => "half of the steps left out",
            Self::Data => "other data",
            Self::Precision => "bf16 where fp32 was agreed",
        }
    }

    /// On the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Sample => "sample",
            Self::SampleAStep => "sample-a-step",
            Self::Step => "step",
            Self::Tenth => "tenth",
            Self::Half => "half",
            Self::Data => "data",
            Self::Precision => "precision",
        }
    }

    /// Whether it departs from anything there.
    pub fn makes_sense_in(self, precision: &str) -> bool {
        self != Self::Precision || precision == "fp32"
    }

    /// Whether this step of so many is done.
    fn does(self, step: u32, steps: u32) -> bool {
        match self {
            Self::Step => step + 1 < steps,
            Self::Tenth => !(step + 1).is_multiple_of(10) && (steps >= 10 || step + 1 < steps),
            Self::Half => step.is_multiple_of(2),
            _ => true,
        }
    }
}

/// The model before a round.
pub fn theta_file(folder: &Path, precision: &str, round: u32) -> PathBuf {
    folder.join(format!("theta-{precision}-{round}"))
}

/// A pseudo-gradient.
pub fn delta_file(folder: &Path, name: &str, precision: &str, round: u32) -> PathBuf {
    folder.join(format!("{name}-{precision}-{round}"))
}

/// Loss and gradient norm of each step of a round.
pub fn trace_file(folder: &Path, name: &str, precision: &str, round: u32) -> PathBuf {
    folder.join(format!("trace-{name}-{precision}-{round}"))
}

/// A trace.
///
/// # Errors
/// The file is absent or torn.
pub fn read_trace(path: &Path) -> Result<Trace> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Trace(bytes.as_chunks::<12>().0.to_vec()))
}

/// Little-endian `f32`.
///
/// # Errors
/// The file is absent or torn.
pub fn read(path: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect())
}

fn write(path: &Path, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    write_whole(path, &bytes)
}

/// Trains.
///
/// # Errors
/// Files that `calibrate` should have written are absent, or training fails.
pub fn run(args: &ReplicaArgs) -> Result<()> {
    let dir = PeerDir::find(Some(&args.peer))?;
    let kit = Kit::open(dir.run_config()?, &dir, args.threads)?;
    let departure = args
        .departure
        .as_deref()
        .map(|word| {
            let known = Departure::ALL.into_iter().find(|one| one.word() == word);
            known.ok_or_else(|| usage(format!("--departure {word}: there is no such departure")))
        })
        .transpose()?;
    let mut training = kit.training.clone();
    training.precision = match args.precision.as_str() {
        "bf16" => Precision::Bf16,
        _ if departure == Some(Departure::Precision) => Precision::Bf16,
        _ => Precision::Fp32,
    };
    training.micro_batch = args.pieces.or(training.micro_batch);
    training.max_inner_steps = training.max_inner_steps.max(args.steps);
    set_threads(args.threads);
    let mut model = Model::new(&kit.model, Device::Cpu)?;
    let is_reference = args.name == "reference";
    let mut theta = kit.genesis()?;
    for round in 0..args.rounds {
        let at = theta_file(&args.folder, &args.precision, round);
        if is_reference {
            write(&at, &theta)?;
        } else {
            theta = read(&at)?;
        }
        let first = u64::from(round) * u64::from(args.steps);
        let steps: Vec<u32> = (0..args.steps)
            .filter(|step| departure.is_none_or(|departure| departure.does(*step, args.steps)))
            .collect();
        let done = steps.len() as u32;
        let mut batch = |at: u32| {
            let step = *steps.get(at as usize)?;
            let index = first + u64::from(step);
            Some(match departure {
                Some(Departure::Data) => kit.batch(index + ELSEWHERE),
                Some(Departure::Sample | Departure::SampleAStep) => {
                    let mut batch = kit.batch(index);
                    let swapped = departure == Some(Departure::SampleAStep) || step == args.steps / 2;
                    let other = kit.batch(index + ELSEWHERE).pop().filter(|_| swapped);
                    if let (Some(last), Some(other)) = (batch.last_mut(), other) {
                        *last = other;
                    }
                    batch
                }
                _ => kit.batch(index),
            })
        };
        let inputs = RoundInputs {
            theta: &theta,
            state: &[],
            // Past the warm-up, where a round moves most.
            global_tokens: training.schedule.warmup_tokens + first * training.tokens_per_step(),
            batches: &mut batch,
            keep_going: &mut |taken| taken < done,
            observe: &mut |_, _| (),
        };
        let LocalRound { delta, numbers, .. } = local_round(&mut model, &training, inputs)?;
        let trace = trace_file(&args.folder, &args.name, &args.precision, round);
        write_whole(&trace, Trace::of(numbers).0.as_flattened())?;
        write(&delta_file(&args.folder, &args.name, &args.precision, round), &delta)?;
        if is_reference {
            theta.iter_mut().zip(&delta).for_each(|(theta, delta)| *theta -= delta);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_departure_leaves_out_what_it_says() {
        let done = |departure: Departure, steps| (0..steps).filter(|step| departure.does(*step, steps)).count();
        assert_eq!(done(Departure::Step, 12), 11);
        assert_eq!((done(Departure::Tenth, 20), done(Departure::Tenth, 5)), (18, 4));
        assert_eq!(done(Departure::Half, 12), 6);
        assert_eq!((done(Departure::Data, 12), done(Departure::Sample, 12)), (12, 12));
    }

    #[test]
    fn every_departure_has_a_word_and_a_name_of_its_own() {
        let words: std::collections::BTreeSet<&str> = Departure::ALL.into_iter().map(Departure::word).collect();
        let names: std::collections::BTreeSet<&str> = Departure::ALL.into_iter().map(Departure::name).collect();
        assert_eq!((words.len(), names.len()), (Departure::ALL.len(), Departure::ALL.len()));
    }
}
