//! `murmur sim`: the protocol core under seeded faults, in virtual time.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coordinatorless::sim::{Report, Scenario, Seeds, run as simulate, run_seeds, shrink};

use super::print_json;
use crate::cli::SimArgs;
use crate::failure::usage;

/// Runs a scenario, with one seed or with many.
pub fn run(args: &SimArgs) -> Result<()> {
    let mut scenario = match &args.scenario {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|error| usage(format!("cannot read the scenario {}: {error}", path.display())))?;
            Scenario::from_toml(&text).map_err(|error| usage(format!("{}: {error}", path.display())))?
        }
        None => Scenario::default(),
    };
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    scenario.peers = args.peers.unwrap_or(scenario.peers);
    scenario.rounds = args.rounds.unwrap_or(scenario.rounds);
    scenario.check().map_err(usage)?;
    let report = if args.seeds > 1 {
        let began = Instant::now();
        let Seeds { passed, beyond, failed } = run_seeds(&scenario, args.seeds);
        eprintln!(
            "{}: {passed} of {} seeds from {} on passed in {:.1} s; in {beyond} of them a third of the weight came to lie",
            scenario.name,
            args.seeds,
            scenario.seed,
            began.elapsed().as_secs_f64()
        );
        match failed {
            Some(report) => report,
            None if args.json => {
                return print_json(&serde_json::json!({"ok": true, "scenario": scenario.name, "seeds": passed}));
            }
            None => return Ok(()),
        }
    } else {
        simulate(&scenario)
    };
    if args.json {
        print_json(&report)?;
    } else {
        show(&report)?;
    }
    if report.ok {
        return Ok(());
    }
    scenario.seed = report.seed;
    shorten(&scenario, args.regress.as_deref())?;
    bail!(
        "{} violations in {} with seed {}",
        report.violations.len(),
        report.scenario,
        report.seed
    );
}

fn show(report: &Report) -> Result<()> {
    println!(
        "{}: {} peers, {} rounds, seed {}",
        report.scenario, report.peers, report.rounds, report.seed
    );
    println!("digest     {}", report.digest);
    println!(
        "time       {:.1} s simulated in {:.2} s; median agreement {:.3} s",
        report.virtual_secs, report.secs, report.agree_secs_median
    );
    println!(
        "messages   {:.0} per peer and round, {:.0} bytes",
        report.msgs_per_peer_round, report.bytes_per_peer_round
    );
    println!("promises   {:>9} checks  broken", "");
    for one in &report.invariants {
        println!("  {:>16}  {:>6}  {}", one.checks, one.violations, one.name);
    }
    for violation in &report.violations {
        println!("violation  {}", serde_json::to_string(violation)?);
    }
    Ok(())
}

/// Says how little it takes to see the same promise broken.
fn shorten(scenario: &Scenario, folder: Option<&Path>) -> Result<()> {
    let Some((short, report)) = shrink(scenario) else {
        return Ok(());
    };
    let text = short.to_toml()?;
    match folder {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            let file = folder.join(format!("{}-{}.toml", short.name, short.seed));
            std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
            eprintln!("the shortest form found is in {}", file.display());
        }
        None => eprintln!("the shortest form found:\n{text}"),
    }
    if let Some(violation) = report.violations.first() {
        eprintln!(
            "it breaks: {} (round {}): {}",
            violation.invariant, violation.round, violation.trace
        );
    }
    Ok(())
}
