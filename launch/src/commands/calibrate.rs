//! `murmur audit calibrate`: how far apart honest rounds are on this machine computed in different ways, and how far those of a cheat, so that the
//! bound of a run can be set between the two.
//!
//! Each way is a process of its own, since libtorch chooses its kernels when it is loaded: thread counts, batches in one piece or several, and the
//! instruction sets that `ATEN_CPU_CAPABILITY` allows, each in fp32 and in bf16. All train the same rounds from the same models; the distances are
//! those of an audit ([`gradient_verify::tolerance`]). One machine stands for others this way: what differs between CPUs is the order of
//! sums, and that is what these differ in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use gradient_verify::tolerance::Sums;
use serde::Serialize;
use trainer::compress::ACCUMULATOR_LEAF;

use super::calibrate_replica::{Departure, delta_file, read, read_trace, theta_file, trace_file};
use super::{member, must_be_new, print_json};
use crate::cli::CalibrateArgs;
use crate::peer_dir::PeerFile;
use crate::plot::{Axis, Mark, Plot, Series};
use crate::progress::Progress;
use crate::run_file::RunPlan;

/// Standard deviations of the honest distances' logarithms between their mean and the bound.
const DEVIATIONS: f64 = 6.0;
/// The bound is never nearer than this to the largest honest distance.
const MARGIN: f64 = 3.0;

/// The least bound: where all ways give the same bits there are machines that were not tried.
const LEAST: f64 = 1e-6;

/// One way to compute a round.
struct Way {
    name: &'static str,
    threads: usize,
    /// Sequences that go through the model at once; all of a batch where it is left out.
    pieces: Option<usize>,
    /// `ATEN_CPU_CAPABILITY`.
    instructions: Option<&'static str>,
}

/// The ways that honest machines differ in. The reference has one thread, whole batches, and the best instructions that there are.
fn ways(batch: usize) -> Vec<Way> {
    let way = |name, threads, pieces, instructions| Way {
        name,
        threads,
        pieces,
        instructions,
    };
    let halves = batch.is_multiple_of(2).then_some(batch / 2).filter(|half| *half > 0);
    let mut ways = vec![
        way("two threads", 2, None, None),
        way("four threads", 4, None, None),
        way("one sequence at a time", 1, Some(1), None),
        way("no vector instructions", 1, None, Some("default")),
        way("avx2", 1, None, Some("avx2")),
        way("avx512", 1, None, Some("avx512")),
        way("avx2, one sequence at a time", 1, Some(1), Some("avx2")),
    ];
    ways.extend(halves.map(|half| way("half batches", 1, Some(half), None)));
    ways
}

/// What was found of one precision.
#[derive(Serialize)]
struct Found {
    precision: &'static str,
    /// Honest replays compared.
    replays: usize,
    /// Of their distances.
    percentiles: BTreeMap<&'static str, f64>,
    /// The largest distance of each way.
    by_way: BTreeMap<&'static str, f64>,
    /// Between honest and false.
    bound: f64,
    /// The share of honest replays beyond it, if their logarithms are normally distributed.
    false_positives: f64,
    /// That share at most, with 95%, by the count alone: three in so many replays.
    false_positives_at_most: f64,
    departures: Vec<Departed>,
    traces: Traces,
    #[serde(skip)]
    honest: Vec<f64>,
}

/// What was found of traces, which show that an auditor replayed ([`coordinatorless::protocol::replayed`]): in each round the distance that a quarter
/// of the steps go beyond.
#[derive(Serialize)]
struct Traces {
    /// Of honest replays.
    percentiles: BTreeMap<&'static str, f64>,
    /// Least `verification.trace_bound` for them.
    bound: f64,
    /// Of a trace from other data, which an auditor may have trained itself: it must not do for a replay.
    others: Departed,
}

/// What came of one departure from the protocol.
#[derive(Serialize)]
struct Departed {
    departure: &'static str,
    /// Of all rounds.
    smallest: f64,
    median: f64,
    /// Whether the bound told it apart in every round.
    caught: bool,
    #[serde(skip)]
    all: Vec<f64>,
}

impl Departed {
    fn new(departure: Departure, mut all: Vec<f64>, bound: f64) -> Self {
        all.sort_by(f64::total_cmp);
        let smallest = all.first().copied().unwrap_or(0.0);
        Self {
            departure: departure.name(),
            smallest,
            median: percentile(&all, 0.5),
            caught: smallest > bound,
            all,
        }
    }
}

/// `profile.json`.
#[derive(Serialize)]
struct Profile {
    device: String,
    model: String,
    params: usize,
    rounds: u32,
    steps: u32,
    configured_bound: f64,
    secs: f64,
    precisions: Vec<Found>,
    plot: PathBuf,
}

/// Trains the rounds in every way, and writes profile, table and plot.
///
/// # Errors
/// A run file that is none, a folder that is taken (exit code 2), or a process that fails.
pub fn run(args: &CalibrateArgs) -> Result<()> {
    let plan = RunPlan::load(&args.run, &args.sets)?;
    must_be_new(&args.out, "--out")?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let progress = Progress::new(args.json);
    let began = Instant::now();
    let (dir, config) = member::create(&plan, Some(&args.out.join("peer")), &PeerFile::default())?;
    let folder = args.out.join("rounds");
    std::fs::create_dir_all(&folder)?;
    let trial = Trial {
        peer: dir.path(),
        folder: &folder,
        args,
        batch: plan.training.batch_sequences,
    };
    let mut precisions = Vec::new();
    for precision in ["fp32", "bf16"] {
        progress.head(&format!("{precision}: {} rounds of {} steps", args.rounds, args.steps));
        precisions.push(trial.of(precision, &progress)?);
    }
    let plot = write_plot(&args.out, &precisions)?;
    let profile = Profile {
        device: device_class(),
        model: config.name.clone(),
        params: plan.model.param_count(),
        rounds: args.rounds,
        steps: args.steps,
        configured_bound: config.verification.bound,
        secs: began.elapsed().as_secs_f64(),
        precisions,
        plot,
    };
    let path = args.out.join("profile.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&profile)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    // The models and pseudo-gradients were means to an end.
    std::fs::remove_dir_all(&folder)?;
    if args.json {
        return print_json(&profile);
    }
    profile.precisions.iter().for_each(tell);
    println!(
        "\nprofile {}, plot {}; the run's own verification.bound is {}",
        path.display(),
        profile.plot.display(),
        profile.configured_bound
    );
    Ok(())
}

/// Where, and how much.
struct Trial<'a> {
    peer: &'a Path,
    folder: &'a Path,
    args: &'a CalibrateArgs,
    batch: usize,
}

impl Trial<'_> {
    fn of(&self, precision: &'static str, progress: &Progress) -> Result<Found> {
        let reference = Way {
            name: "reference",
            threads: 1,
            pieces: None,
            instructions: None,
        };
        self.train(&reference, precision, None)?;
        let (mut honest, mut by_way, mut traces) = (Vec::new(), BTreeMap::new(), Vec::new());
        for way in ways(self.batch) {
            self.train(&way, precision, None)?;
            let distances = self.distances(way.name, precision)?;
            let largest = distances.iter().copied().fold(0.0, f64::max);
            progress.line(&format!("  honest, {:<34} at most {largest:.2e}", way.name));
            by_way.insert(way.name, largest);
            honest.extend(distances);
            traces.extend(self.trace_distances(way.name, precision)?);
        }
        honest.sort_by(f64::total_cmp);
        traces.sort_by(f64::total_cmp);
        // Heavy tails: too few extremes to know their distribution by.
        let bound_of_traces = MARGIN * percentile(&traces, 1.0);
        let bound = bound(&honest);
        let mut departures = Vec::new();
        for departure in Departure::ALL.into_iter().filter(|one| one.makes_sense_in(precision)) {
            self.train(&reference, precision, Some(departure))?;
            let departed = Departed::new(departure, self.distances(departure.name(), precision)?, bound);
            progress.line(&format!(
                "  {:<42} at least {:.2e}",
                departed.departure, departed.smallest
            ));
            departures.push(departed);
        }
        let others = self.trace_distances(Departure::Data.name(), precision)?;
        Ok(Found {
            precision,
            replays: honest.len(),
            percentiles: percentiles(&honest),
            traces: Traces {
                percentiles: percentiles(&traces),
                bound: bound_of_traces,
                others: Departed::new(Departure::Data, others, bound_of_traces),
            },
            by_way,
            bound,
            false_positives: beyond(&honest, bound),
            false_positives_at_most: 3.0 / honest.len().max(1) as f64,
            departures,
            honest,
        })
    }

    /// A process that trains all rounds in this way.
    fn train(&self, way: &Way, precision: &str, departure: Option<Departure>) -> Result<()> {
        let mut command = Command::new(std::env::current_exe().context("this program's own file is gone")?);
        let name = departure.map_or(way.name, Departure::name);
        command.args(["audit", "replica", "--precision", precision, "--name", name]);
        command.arg("--peer").arg(self.peer).arg("--folder").arg(self.folder);
        for (option, value) in [
            ("--rounds", u64::from(self.args.rounds)),
            ("--steps", u64::from(self.args.steps)),
            ("--threads", way.threads as u64),
        ] {
            command.args([option, &value.to_string()]);
        }
        if let Some(pieces) = way.pieces {
            command.args(["--pieces", &pieces.to_string()]);
        }
        if let Some(departure) = departure {
            command.args(["--departure", departure.word()]);
        }
        command.env_remove("ATEN_CPU_CAPABILITY");
        // More threads than idle cores must not spin while they wait for one another.
        command.env("OMP_WAIT_POLICY", "passive");
        command.envs(way.instructions.map(|set| ("ATEN_CPU_CAPABILITY", set)));
        let output = command.output().context("cannot start a process of its own")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{name} in {precision} failed: {}", said.trim());
        }
        Ok(())
    }

    /// From the reference, by round.
    fn distances(&self, name: &str, precision: &str) -> Result<Vec<f64>> {
        let each = (0..self.args.rounds).map(|round| {
            let theta = read(&theta_file(self.folder, precision, round))?;
            let replay = read(&delta_file(self.folder, "reference", precision, round))?;
            let claim = read(&delta_file(self.folder, name, precision, round))?;
            Ok(distance(&claim, &replay, &theta))
        });
        each.collect()
    }

    /// From the reference's trace, by round.
    fn trace_distances(&self, name: &str, precision: &str) -> Result<Vec<f64>> {
        let each = (0..self.args.rounds).map(|round| {
            let replay = read_trace(&trace_file(self.folder, "reference", precision, round))?;
            let claimed = read_trace(&trace_file(self.folder, name, precision, round))?;
            Ok(replay.distance(&claimed))
        });
        each.collect()
    }
}

fn distance(claim: &[f32], replay: &[f32], theta: &[f32]) -> f64 {
    let (mut sums, mut wide) = (Sums::default(), Vec::new());
    let chunks = claim.chunks(ACCUMULATOR_LEAF);
    for (claim, (replay, theta)) in chunks.zip(replay.chunks(ACCUMULATOR_LEAF).zip(theta.chunks(ACCUMULATOR_LEAF))) {
        wide.clear();
        wide.extend(claim.iter().map(|value| f64::from(*value)));
        sums.add(&wide, replay, theta);
    }
    sums.distance().relative
}

/// Mean and standard deviation of the logarithms of those that were not reproduced to the bit, and which share they are; `None` if all were.
fn logarithms(distances: &[f64]) -> Option<(f64, f64, f64)> {
    let inexact = distances.iter().filter(|distance| **distance > 0.0);
    let logs: Vec<f64> = inexact.map(|distance| distance.ln()).collect();
    let count = logs.len() as f64;
    let mean = logs.iter().sum::<f64>() / count;
    let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / count;
    (!logs.is_empty()).then(|| (mean, variance.sqrt(), count / distances.len() as f64))
}

/// Beyond the honest ones (ascending) by [`DEVIATIONS`], and by [`MARGIN`] beyond the largest; to one digit, upwards.
fn bound(honest: &[f64]) -> f64 {
    let by_deviations = logarithms(honest).map_or(0.0, |(mean, deviation, _)| (mean + DEVIATIONS * deviation).exp());
    let largest = honest.last().copied().unwrap_or(0.0);
    let least = by_deviations.max(MARGIN * largest).max(LEAST);
    let digit = 10f64.powf(least.log10().floor());
    (least / digit).ceil() * digit
}

/// The share of a distribution like the honest ones, log-normal where it is not exact, that lies beyond `bound`.
fn beyond(honest: &[f64], bound: f64) -> f64 {
    let Some((mean, deviation, share)) = logarithms(honest).filter(|(_, deviation, _)| *deviation > 0.0) else {
        return 0.0;
    };
    let z = (bound.ln() - mean) / deviation;
    if z <= 0.0 {
        return share;
    }
    // The tail of the normal distribution, after Abramowitz and Stegun (7.1.13): good to a few per cent where it is small.
    let tail = (-z * z / 2.0).exp() / (z + (z * z + 8.0 / std::f64::consts::PI).sqrt());
    share * tail * (2.0 / std::f64::consts::PI).sqrt()
}

fn percentiles(sorted: &[f64]) -> BTreeMap<&'static str, f64> {
    [("50", 0.5), ("90", 0.9), ("99", 0.99), ("100", 1.0)]
        .into_iter()
        .map(|(name, share)| (name, percentile(sorted, share)))
        .collect()
}

/// Of ascending values.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((share * last as f64).round() as usize)
        .copied()
        .unwrap_or(0.0)
}

fn tell(found: &Found) {
    println!(
        "\n{}: {} honest replays, distances {:.1e} (half), {:.1e} (99%), {:.1e} (all)",
        found.precision, found.replays, found.percentiles["50"], found.percentiles["99"], found.percentiles["100"]
    );
    println!(
        "  bound {:.0e}: {:.0e} of honest replays beyond it by their distribution, less than {:.0e} by their count",
        found.bound, found.false_positives, found.false_positives_at_most
    );
    println!("  {:<34}  {:>9}  {:>9}", "departure", "smallest", "median");
    for one in &found.departures {
        let told = if one.caught { "caught" } else { "let through" };
        println!(
            "  {:<34}  {:>9.1e}  {:>9.1e}  {told}",
            one.departure, one.smallest, one.median
        );
    }
    let traces = &found.traces;
    println!(
        "  traces: honest {:.1e} (half), {:.1e} (all), least trace_bound {:.0e}; of other data {:.1e} at least: {}",
        traces.percentiles["50"],
        traces.percentiles["100"],
        traces.bound,
        traces.others.smallest,
        match traces.others.caught {
            true => "told apart",
            false => "taken for replays",
        }
    );
}

/// Honest against false distances: which share of them is below.
fn write_plot(out: &Path, precisions: &[Found]) -> Result<PathBuf> {
    let below = |sorted: &[f64]| -> Vec<(f64, f64)> {
        let count = sorted.len() as f64;
        let steps = sorted.iter().enumerate().flat_map(|(at, distance)| {
            let x = distance.max(1e-9);
            [(x, at as f64 / count), (x, (at + 1) as f64 / count)]
        });
        steps.collect()
    };
    let mut series = Vec::new();
    let mut marks = Vec::new();
    for found in precisions {
        series.push(Series {
            name: format!("{}: honest", found.precision),
            points: below(&found.honest),
        });
        let mut all: Vec<f64> = found
            .departures
            .iter()
            .flat_map(|one| one.all.iter().copied())
            .collect();
        all.sort_by(f64::total_cmp);
        series.push(Series {
            name: format!("{}: false", found.precision),
            points: below(&all),
        });
        marks.push(Mark {
            at: found.bound.log10(),
            label: format!("bound {} {:.0e}", found.precision, found.bound),
        });
    }
    let plot = Plot {
        title: "Honest and false rounds, by their distance from a replay".to_owned(),
        subtitle: device_class(),
        axis: Axis::SharesOf("relative L2 distance"),
        series,
        marks,
    };
    let (svg, png) = (out.join("distances.svg"), out.join("distances.png"));
    std::fs::write(&svg, plot.svg()).with_context(|| format!("cannot write {}", svg.display()))?;
    std::fs::write(&png, plot.png()?).with_context(|| format!("cannot write {}", png.display()))?;
    Ok(png)
}

/// What the profile holds for.
fn device_class() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or(": unknown CPU");
    let sets = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has: Vec<&str> = sets
        .into_iter()
        .filter(|set| flags.split_whitespace().any(|flag| flag == *set))
        .collect();
    format!("{} ({})", name.trim_start_matches([' ', '\t', ':']), has.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_lies_beyond_the_honest_by_margin_and_deviations() {
        // Three times the largest, upwards to one digit.
        assert!((bound(&[1.1e-6; 10]) / 4e-6 - 1.0).abs() < 1e-9);
        let spread: Vec<f64> = (0..10).map(|i| 1e-6 * 1.5f64.powi(i)).collect();
        let (mean, deviation, share) = logarithms(&spread).unwrap();
        let found = bound(&spread);
        assert!(
            found >= (mean + 6.0 * deviation).exp() && found > 3.0 * spread[9] && share == 1.0,
            "{found}"
        );
        // What is the same to the bit says nothing of how far the rest is spread.
        let half: Vec<f64> = [vec![0.0; 10], spread].concat();
        assert_eq!((bound(&half), logarithms(&half).unwrap().2), (found, 0.5));
        assert!((1e-6..=2.1e-6).contains(&bound(&[0.0; 4])) && logarithms(&[0.0; 4]).is_none());
    }

    #[test]
    fn the_share_beyond_is_that_of_the_normal_distribution() {
        // Logarithms -1 and 1: mean 0, deviation 1. One-sided tails at 2, 3 and 6 deviations.
        let two = [(-1f64).exp(), 1f64.exp()];
        for (z, tail) in [(2f64, 2.275e-2), (3.0, 1.350e-3), (6.0, 9.87e-10)] {
            let found = beyond(&two, z.exp());
            assert!((found / tail - 1.0).abs() < 0.05, "{z}: expected {tail}, found {found}");
            let half = beyond(&[two[0], two[1], 0.0, 0.0], z.exp());
            assert!((half / found - 0.5).abs() < 1e-9, "{half}");
        }
        assert_eq!(beyond(&[1e-6; 3], 1e-5), 0.0);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted() {
        let sorted: Vec<f64> = (0..101).map(f64::from).collect();
        assert_eq!(
            [0.5, 0.99, 1.0].map(|share| percentile(&sorted, share)),
            [50.0, 99.0, 100.0]
        );
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
