//! The end of the demo: what the peers left behind, read again from their files and judged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::types::{Hash, PeerId};
use datasets::Dataset;
use serde::Serialize;
use trainer::generate::GenerateOptions;

use super::prepare::Stage;
use crate::cheat::Cheat;
use crate::cli::DemoArgs;
use crate::commands::generate::Speaker;
use crate::commands::ledger::{self, Verified};
use crate::events::{self, Event, EventLog, Line};
use crate::figures::{Caught, Figures, PeerFigures, proven};
use crate::held_out::HeldOut;
use crate::peer_dir::PeerDir;
use crate::plot::{Axis, Mark, Plot, Series};
use crate::progress::Progress;
use crate::units::{Bytes, thousands};

/// Held-out sequences that the demo evaluates on.
const EVALUATED: u64 = 200;

/// `murmur demo --json`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether everything is as it should be.
    pub ok: bool,
    rounds: u64,
    tokens: u64,
    loss_first: Option<f64>,
    loss_last: Option<f64>,
    val_loss: f64,
    seconds: f64,
    peers: Vec<PeerFigures>,
    killed: Vec<PeerId>,
    rejoined: Vec<PeerId>,
    joined: Vec<PeerId>,
    roots_equal: bool,
    plot: PathBuf,
    dir: PathBuf,
    sample: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cheats: Option<BTreeSet<PeerId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caught: Option<Vec<CaughtCheat>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accused_honest: Option<BTreeSet<PeerId>>,
    /// What is not as it should be, in words.
    pub faults: Vec<String>,
}

/// A cheat that was found.
#[derive(Debug, Serialize)]
struct CaughtCheat {
    id: PeerId,
    cheat: String,
    round: u64,
    rel_l2: f64,
    bound: f64,
}

/// Reads everything again, writes the plot, tells the story.
///
/// # Errors
/// Files that a demo which came this far has written are absent or damaged.
pub fn report(args: &DemoArgs, stage: &Stage, progress: &Progress) -> Result<Report> {
    // Whoever decided the last round has the final model.
    let source = stage
        .peers
        .iter()
        .find(|peer| last_round(&peer.dir) >= args.rounds)
        .context("no peer has the last round")?;
    let mut speaker = Speaker::open(&source.dir, Some("cpu"))?;
    let found = evaluate(&source.dir, &mut speaker)?;
    let val_loss = found.loss;
    let round = speaker.stamp.map_or(0, |stamp| stamp.round);
    EventLog::open(source.dir.path())?.write(Event::eval(round, found))?;
    let logs: Vec<(PeerId, Vec<Line>)> = stage
        .peers
        .iter()
        .map(|peer| (peer.id, events::read(peer.dir.path())))
        .collect();
    let figures = Figures::of(&logs);
    let verified: Vec<(PeerId, Result<Verified>)> = stage
        .peers
        .iter()
        .map(|peer| (peer.id, ledger::verify(&peer.dir)))
        .collect();
    let plot = write_plot(&stage.folder, &figures, &stage.config.name)?;
    let options = GenerateOptions {
        max_tokens: 300,
        seed: args.seed,
        ..GenerateOptions::default()
    };
    let sample = speaker.say("KING.", &options, false)?;
    let cheats: BTreeSet<PeerId> = stage.peers[stage.cheats.clone()].iter().map(|peer| peer.id).collect();
    let proven = proven(&figures, &logs);
    let faults = faults(args, &figures, &verified, &cheats, &proven);
    tell(progress, &figures, &verified, val_loss, &sample, &plot);
    let losses = figures.losses();
    Ok(Report {
        ok: faults.is_empty(),
        rounds: figures.rounds.keys().next_back().copied().unwrap_or(0),
        tokens: figures.tokens(),
        loss_first: losses.first().map(|point| point.1),
        loss_last: losses.last().map(|point| point.1),
        val_loss,
        seconds: figures.seconds,
        killed: figures.killed.clone(),
        rejoined: figures.rejoined.clone(),
        joined: figures.joined.clone(),
        roots_equal: figures.roots_equal(),
        plot,
        dir: stage.folder.clone(),
        sample,
        caught: args
            .cheat
            .map(|cheat| proven.iter().map(|caught| told(caught, cheat.name())).collect()),
        accused_honest: args.cheat.map(|_| honest_accused(&figures, &cheats)),
        cheats: args.cheat.map(|_| cheats),
        peers: figures.peers,
        faults,
    })
}

/// The honest whom an honest auditor accused.
fn honest_accused(figures: &Figures, cheats: &BTreeSet<PeerId>) -> BTreeSet<PeerId> {
    let honest = figures
        .accused
        .iter()
        .filter(|(auditor, member)| !cheats.contains(auditor) && !cheats.contains(member));
    honest.map(|(_, member)| *member).collect()
}

fn told(caught: &Caught, cheat: String) -> CaughtCheat {
    CaughtCheat {
        id: caught.id,
        cheat,
        round: caught.round,
        rel_l2: caught.rel_l2,
        bound: caught.bound,
    }
}

fn last_round(dir: &PeerDir) -> u64 {
    let rounds = events::read(dir.path())
        .into_iter()
        .filter_map(|line| match line.event {
            Event::RoundDecided { round, .. } => Some(round),
            _ => None,
        });
    rounds.max().unwrap_or(0)
}

/// The final model's loss on text that nobody trained on.
fn evaluate(dir: &PeerDir, speaker: &mut Speaker) -> Result<HeldOut> {
    let config = dir.run_config()?;
    let data = Dataset::open(&dir.data(), &config.data.manifest.0)?;
    speaker.held_out(&data, EVALUATED)
}

/// Everything that a good demo must show, and this one does not.
fn faults(
    args: &DemoArgs,
    figures: &Figures,
    verified: &[(PeerId, Result<Verified>)],
    cheats: &BTreeSet<PeerId>,
    proven: &[Caught],
) -> Vec<String> {
    let mut faults = figures.disagreements.clone();
    let mut must = |holds: bool, fault: &str| {
        if !holds {
            faults.push(fault.to_owned());
        }
    };
    must(
        figures.rounds.len() as u64 >= args.rounds,
        "not every round is in the logs",
    );
    if args.kill != crate::cli::Kill::None {
        must(figures.killed.len() == 1, "not exactly one peer was killed");
        must(figures.rejoined == figures.killed, "the killed peer did not come back");
    }
    must(figures.joined.len() == 1, "the newcomer was not counted");
    must(verified.iter().all(|(_, one)| one.is_ok()), "a ledger does not verify");
    // A cheat stops before the end, barred or gone.
    let roots: Vec<Hash> = verified
        .iter()
        .filter(|(id, _)| !cheats.contains(id) && proven.iter().all(|caught| caught.id != *id))
        .filter_map(|(_, one)| one.as_ref().ok().map(|one| one.record))
        .collect();
    must(
        roots.windows(2).all(|pair| pair[0] == pair[1]),
        "the ledgers end in different records",
    );
    must(
        proven.iter().all(|caught| cheats.contains(&caught.id)),
        "an honest peer was barred",
    );
    must(
        honest_accused(figures, cheats).is_empty() || cheats.is_empty(),
        "an honest peer was accused",
    );
    let ledger = verified
        .iter()
        .find_map(|(id, one)| one.as_ref().ok().filter(|_| !cheats.contains(id)));
    for cheat in cheats {
        // Who runs away before it is caught is not paid either.
        must(
            !args.cheat.is_some_and(Cheat::is_barred) || proven.iter().any(|caught| caught.id == *cheat),
            "the cheat was not caught",
        );
        must(
            !args.cheat.is_some_and(Cheat::is_counted) || ledger.map(|ledger| ledger.points_of(cheat)) == Some(0),
            "the cheat kept points",
        );
    }
    for (id, verified) in verified {
        if let Err(error) = verified {
            faults.push(format!("{}: {error:#}", id.short()));
        }
    }
    faults
}

fn tell(
    progress: &Progress,
    figures: &Figures,
    verified: &[(PeerId, Result<Verified>)],
    val_loss: f64,
    sample: &str,
    plot: &Path,
) {
    let ledger = verified.iter().find_map(|(_, verified)| verified.as_ref().ok());
    progress.head("\nwho contributed what");
    progress.line("  peer        rounds counted      tokens    points       sent  training  last root");
    for peer in &figures.peers {
        let points = ledger.map_or(0, |ledger| ledger.points_of(&peer.id));
        progress.line(&format!(
            "  {}  {:>14}  {:>10}  {:>8}  {:>9}  {:>7.0}%  {}",
            peer.id.short(),
            peer.counted,
            thousands(peer.tokens),
            thousands(points),
            Bytes(peer.bytes_sent).to_string(),
            100.0 * peer.utilisation,
            peer.model_root.short()
        ));
    }
    let whole = verified.iter().filter(|(_, verified)| verified.is_ok()).count();
    progress.line(&format!(
        "  {whole} of {} ledgers verified from genesis, record by record",
        verified.len()
    ));
    if figures.roots_equal() {
        progress.line("  all peers hold the same model, bit for bit, after every round");
    }
    progress.head("\nwhat the model has learned to write");
    progress.line(&format!("KING.{sample}"));
    progress.head("\nloss");
    progress.line(&format!(
        "  held-out text: {val_loss:.4} nats per token after {:.0} s",
        figures.seconds
    ));
    progress.line(&format!("  plot: {}", plot.display()));
}

/// `loss.svg` and `loss.png`; the path of the PNG.
fn write_plot(folder: &Path, figures: &Figures, name: &str) -> Result<PathBuf> {
    let mut series = vec![Series {
        name: "training".to_owned(),
        points: figures.losses(),
    }];
    let held_out: Vec<(f64, f64)> = figures
        .evals
        .iter()
        .map(|(round, loss)| (*round as f64, *loss))
        .collect();
    if !held_out.is_empty() {
        series.push(Series {
            name: "held out".to_owned(),
            points: held_out,
        });
    }
    let plot = Plot {
        title: format!("{name}: {} peers, one model, no master", figures.peers.len()),
        subtitle: format!(
            "{} rounds, {} tokens, {:.0} s",
            figures.rounds.len(),
            thousands(figures.tokens()),
            figures.seconds
        ),
        axis: Axis::Rounds,
        series,
        marks: marks(figures),
    };
    let (svg, png) = (folder.join("loss.svg"), folder.join("loss.png"));
    std::fs::write(&svg, plot.svg()).with_context(|| format!("cannot write {}", svg.display()))?;
    std::fs::write(&png, plot.png()?).with_context(|| format!("cannot write {}", png.display()))?;
    Ok(png)
}

/// The rounds in which members went missing, came back, and first counted.
fn marks(figures: &Figures) -> Vec<Mark> {
    let rounds_of = |id: &PeerId| -> Vec<u64> {
        figures
            .rounds
            .iter()
            .filter(|(_, round)| round.tokens_by.contains_key(id))
            .map(|(number, _)| *number)
            .collect()
    };
    let mut marks = Vec::new();
    for id in &figures.killed {
        let gap = rounds_of(id)
            .windows(2)
            .map(|pair| (pair[0], pair[1]))
            .max_by_key(|(before, after)| after - before);
        if let Some((before, after)) = gap {
            marks.push(Mark {
                at: before as f64,
                label: format!("{} killed", id.short()),
            });
            marks.push(Mark {
                at: after as f64,
                label: format!("{} counts again", id.short()),
            });
        }
    }
    for id in &figures.joined {
        if let Some(first) = rounds_of(id).first() {
            marks.push(Mark {
                at: *first as f64,
                label: format!("newcomer {} counts", id.short()),
            });
        }
    }
    marks
}
