//! The commands, one file each; this one only leads to them.

mod audit_file;
mod audit_round;
mod bench;
mod bench_algorithms;
mod bench_audits;
mod bench_exchange;
mod bench_flops;
mod bench_proofs;
mod bench_rounds;
mod calibrate;
mod calibrate_replica;
pub mod data;
mod eval;
mod export;
pub mod generate;
pub mod ledger;
mod member;
mod relay;
mod sim;
mod status;
mod tasks;
pub mod wait;

use std::path::Path;

use anyhow::Result;

use crate::cli::{AuditCommand, Command};
use crate::failure::usage;

/// Does what was asked.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Peer(args) => member::peer(&args),
        Command::Demo(args) => crate::demo::run(&args),
        Command::New(args) => member::new(&args),
        Command::Join(args) => member::join(&args),
        Command::Train(args) => member::train(&args),
        Command::Status(args) => status::status(&args),
        Command::Ticket(args) => status::ticket(&args),
        Command::Wait(args) => wait::wait(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Data(command) => data::run(command),
        Command::Ledger(command) => ledger::run(&command),
        Command::Audit(args) => match (&args.what, &args.file, args.round, &args.member) {
            (Some(AuditCommand::Calibrate(args)), ..) => calibrate::run(args),
            (Some(AuditCommand::Replica(args)), ..) => calibrate_replica::run(args),
            (None, Some(file), ..) => audit_file::run(file, &args),
            (None, None, Some(round), Some(member)) => audit_round::run(round, member, &args),
            _ => Err(usage("name a proof, or a round and a member")),
        },
        Command::Relay(args) => relay::run(&args),
        Command::Sim(args) => sim::run(&args),
        Command::Bench(command) => bench::run(command),
    }
}

/// Refuses a folder that holds something already.
///
/// # Errors
/// It is not empty, or not a folder (exit code 2).
pub fn must_be_new(path: &Path, option: &str) -> Result<()> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(usage(format!(
                "{option} {}: the folder is not empty; name a new one, or remove it",
                path.display()
            ))),
            None => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(usage(format!("{option} {}: {error}; name a folder", path.display()))),
    }
}

/// One JSON object, on a line of its own, on stdout.
///
/// # Errors
/// It cannot be written.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
