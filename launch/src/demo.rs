//! `murmur demo`: the main job on one machine, end to end.
//!
//! Several peers, each a process of its own, none of them special, train one model on real text. A third of the way one of
//! them is killed (SIGKILL) and started again some rounds later; at half a newcomer joins by ticket. What the demo tells at its end it reads
//! from the files that the peers leave behind: their event logs ([`crate::figures`]), their ledgers, their model.

mod prepare;
mod report;
mod swarm;
mod watch;

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cli::DemoArgs;
use crate::progress::Progress;

/// Runs it, tells it, judges it.
pub fn run(args: &DemoArgs) -> Result<()> {
    let progress = Progress::new(args.json);
    let mut stage = prepare::stage(args, &progress)?;
    let outcome = watch::run(args, &mut stage, &progress);
    let stubborn = swarm::stop(&mut stage.peers, Duration::from_secs(30));
    for id in &stubborn {
        progress.note(&format!(
            "{} did not end within 30 s of being asked to; it was killed",
            id.short()
        ));
    }
    if let Err(error) = outcome {
        progress.line(&format!("everything is kept in {}", stage.folder.display()));
        return Err(error);
    }
    let report = report::report(args, &stage, &progress)?;
    if args.json {
        crate::commands::print_json(&report)?;
    }
    if !report.ok {
        bail!("the demo did not do all that it should: {}", report.faults.join("; "));
    }
    Ok(())
}
