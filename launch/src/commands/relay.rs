//! `murmur relay`: a relay of a run's own.

use anyhow::{Context, Result};
use coordinatorless::net::RelayServer;

use crate::cli::RelayArgs;
use crate::failure::usage;

/// Serves until Ctrl-C.
pub fn run(args: &RelayArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = RelayServer::start(args.bind, args.max_rate.map(|rate| rate.0))
            .await
            .map_err(|error| usage(format!("cannot listen on {}: {error}", args.bind)))?;
        let at = server.addr().context("the relay has no address")?;
        println!("http://{at}");
        eprintln!("a relay for peers that no other can dial; give them --relay http://{at}, or the name by which they reach this machine");
        tokio::signal::ctrl_c().await?;
        Ok(server.shutdown().await?)
    })
}
