//! `murmur status` and `murmur ticket`.

use anyhow::Result;

use super::print_json;
use crate::cli::{DirArg, ReportArgs};
use crate::peer_dir::PeerDir;
use crate::status::Status;
use crate::units::{Bytes, thousands};

/// Tells how a peer stands.
pub fn status(args: &ReportArgs) -> Result<()> {
    let dir = PeerDir::find(args.dir.dir.as_deref())?;
    let mut status = Status::of(&dir)?;
    let live = status.is_live();
    if !live {
        // Nobody answers there any more.
        status.ticket = None;
    }
    if args.json {
        print_json(&status)
    } else {
        tell(&status, live)
    }
}

fn tell(status: &Status, live: bool) -> Result<()> {
    let state = if live { "live" } else { "not running; as it was last" };
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    println!("run      {} ({}), {state}", status.name, status.run.short());
    println!("round    {}, branch {}", status.round, status.branch);
    println!(
        "loss     {} training, {} held out, nats per token",
        number(status.loss),
        number(status.val_loss)
    );
    println!(
        "tokens   {}, {:.0} a second",
        thousands(status.tokens),
        status.tokens_per_sec
    );
    println!(
        "me       {}: {} points, {:.1} an hour",
        status.me.id.short(),
        thousands(status.me.points),
        status.me.earning_per_hour
    );
    if let Some(share) = status.me.utilisation {
        println!(
            "busy     {:.0}% of the time training, over the last rounds",
            100.0 * share
        );
    }
    println!(
        "traffic  {} sent, {} received; {} on disk",
        Bytes(status.me.upload),
        Bytes(status.me.download),
        Bytes(status.me.disk)
    );
    println!("members");
    for member in &status.members {
        let last = member
            .last_round
            .map_or("never".to_owned(), |round| format!("round {round}"));
        let shown = member
            .gflops
            .map_or(String::new(), |shown| format!("  {shown:.1} GFLOP/s shown"));
        println!(
            "  {}  weight {:>5.1}%  {:>12} tokens  {:>10} points  counted {last}{shown}  {}",
            member.id.short(),
            100.0 * member.weight,
            thousands(member.tokens),
            thousands(member.points),
            member.state
        );
    }
    Ok(())
}

/// Prints a live peer's ticket.
pub fn ticket(args: &DirArg) -> Result<()> {
    let dir = PeerDir::find(args.dir.as_deref())?;
    println!("{}", Status::of(&dir)?.fresh_ticket(&dir)?);
    Ok(())
}
