//! The binary `murmur`: command line, wiring, progress, pages.
//!
//! Read in this order: [`cli`] (what can be asked), [`run_file`] (RUN.toml -> what all peers agree on), [`peer_dir`] (what lies
//! where) with [`disk`] and [`heal`], [`run`] (a peer, from start to end), [`worker`] and [`side`] (its computing threads), [`reporter`], [`events`], [`status`] and
//! [`progress`] (what people and scripts see), [`demo`], then [`commands`].

mod accumulators;
mod cheat;
mod cli;
mod commands;
mod demo;
mod device;
mod disk;
mod events;
mod failure;
mod figures;
mod heal;
mod held_out;
mod keeper;
mod kit;
mod loaded;
mod model_file;
mod network;
mod peer_dir;
mod plot;
mod progress;
mod proofs;
mod reporter;
mod run;
mod run_file;
mod side;
mod speed;
mod start_model;
mod status;
mod training;
mod units;
mod vocabulary;
mod worker;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// What a shell says of a command that wrote to a reader that went away.
const READER_GONE: i32 = 128 + 13;

/// `murmur ledger show --json | head -3` ends quietly, as other commands do. Running peers write their lines otherwise, and go on.
fn end_with_the_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload_as_str().unwrap_or_default();
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(READER_GONE);
        }
        usual(info);
    }));
}

fn main() -> ExitCode {
    end_with_the_reader();
    let cli = cli::Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!(
                "murmur: --log {}: {error}; write for example --log debug or --log iroh=info,error",
                cli.log
            );
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("murmur: {}", failure::told(&error));
            ExitCode::from(failure::exit_code(&error))
        }
    }
}
