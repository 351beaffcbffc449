//! `murmur sim`: the protocol core under seeded faults, in virtual time.

use anyhow::{Result, bail};
use coordinatorless::sim::{Scenario, run as simulate};

use super::print_json;
use crate::cli::SimArgs;
use crate::failure::usage;

/// Runs a scenario.
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
    let report = simulate(&scenario);
    if args.json {
        print_json(&report)?;
    } else {
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
        for violation in &report.violations {
            println!("violation  {}", serde_json::to_string(violation)?);
        }
    }
    if !report.ok {
        bail!(
            "{} violations in {} with seed {}",
            report.violations.len(),
            report.scenario,
            report.seed
        );
    }
    Ok(())
}
