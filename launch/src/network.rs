//! A peer's way to the others: options into a [`NetConfig`], and the fetches of a newcomer.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coordinatorless::config::RunConfig;
use coordinatorless::net::{Net, NetConfig, NetEvent, Relay};
use coordinatorless::ticket::{PeerAddr, Ticket};
use coordinatorless::types::{Hash, PeerId, RunId};
use coordinatorless::wire::Keys;
use datasets::{Manifest, install_manifest, install_shard, missing};
use tokio::sync::mpsc;
use trainer::checkpoint;
use trainer::model::Layout;

use crate::failure::usage;
use crate::peer_dir::{PeerDir, PeerFile, write_whole};
use crate::progress::Progress;
use crate::run_file::trainer_of;
use crate::units::Bytes;
use crate::{disk, start_model};

/// The largest manifest that is fetched.
const MAX_MANIFEST: u64 = 64 << 20;
/// A shard that nobody gives within this long is given up.
const FETCH: Duration = Duration::from_secs(120);

/// Who this peer calls first: the ticket's peers, those named in peer.toml, those met before.
fn known(dir: &PeerDir, local: &PeerFile, ticket: Option<&Ticket>) -> Vec<PeerAddr> {
    let from_ticket = ticket.into_iter().flat_map(|ticket| ticket.peers.iter().cloned());
    let from_file = local.known.iter().cloned().chain(dir.met()).map(PeerAddr::from);
    let mut seen = BTreeSet::new();
    from_ticket
        .chain(from_file)
        .filter(|addr| seen.insert((addr.id, addr.direct.clone())))
        .collect()
}

fn relay(text: Option<&str>) -> Result<Relay> {
    match text.unwrap_or("default") {
        "default" => Ok(Relay::Default),
        "none" => Ok(Relay::None),
        url if url.starts_with("https://") || url.starts_with("http://") => Ok(Relay::Url(url.to_owned())),
        other => Err(usage(format!(
            "--relay {other}: not a relay; use default, none or a URL such as https://relay.example.org"
        ))),
    }
}

/// Starts the endpoint.
///
/// # Errors
/// A port that is taken, a relay that is no URL (exit code 2).
pub async fn start(
    dir: &PeerDir,
    keys: &Keys,
    run: RunId,
    local: &PeerFile,
    ticket: Option<&Ticket>,
) -> Result<(Net, mpsc::Receiver<NetEvent>)> {
    listen(config(dir, run, keys.secret(), local, ticket)?).await
}

/// A stranger's endpoint beside a peer that may be live, on another port: to fetch what peers of the run give to anyone. What comes lies in
/// `folder`.
///
/// # Errors
/// As for [`start`].
pub async fn visit(dir: &PeerDir, folder: &Path, run: RunId) -> Result<Net> {
    let local = dir.peer_file()?;
    let config = NetConfig {
        bind: local.bind.map(|bind| SocketAddr::new(bind.ip(), 0)),
        dir: folder.to_owned(),
        ..config(dir, run, rand::random(), &local, None)?
    };
    // Whoever calls or says anything is not heard.
    Ok(listen(config).await?.0)
}

fn config(dir: &PeerDir, run: RunId, secret: [u8; 32], local: &PeerFile, ticket: Option<&Ticket>) -> Result<NetConfig> {
    let known = known(dir, local, ticket);
    Ok(NetConfig {
        secret,
        run,
        bind: local.bind,
        relay: relay(local.relay.as_deref())?,
        dir: dir.path().to_owned(),
        max_upload: local.max_upload.map(|bytes| bytes.0),
        max_download: local.max_download.map(|bytes| bytes.0),
        known: known.iter().filter_map(PeerAddr::to_endpoint).collect(),
    })
}

async fn listen(config: NetConfig) -> Result<(Net, mpsc::Receiver<NetEvent>)> {
    let bind = config.bind;
    let at = bind.map_or("any port".to_owned(), |bind| bind.to_string());
    Net::start(config)
        .await
        .map_err(|error| usage(format!("cannot listen on {at}: {error}")))
}

/// Fetches what is missing of the run's data, from whoever has it; every shard is checked by its hash as it comes.
///
/// # Errors
/// Nobody gives a shard, the disk, or a run that does not fit `max_disk` (exit code 2).
pub async fn fetch_data(
    net: &Net,
    dir: &PeerDir,
    config: &RunConfig,
    max_disk: Option<Bytes>,
    providers: &[PeerId],
    progress: &Progress,
) -> Result<()> {
    let (data, root) = (dir.data(), config.data.manifest);
    let path = datasets::manifest_path(&data);
    let held = std::fs::read(&path).ok().filter(|bytes| Hash::of(bytes) == root);
    let manifest = match held {
        Some(bytes) => Manifest::from_bytes(&bytes)?,
        None => install_manifest(&data, &root.0, &fetch(net, root, MAX_MANIFEST, providers).await?)?,
    };
    disk::must_fit(config, &manifest, max_disk)?;
    let wanted = missing(&data, &manifest);
    let size = |hash: &[u8; 32]| {
        let tokens = manifest
            .shards
            .iter()
            .find(|shard| shard.hash == *hash)
            .map_or(0, |shard| shard.tokens);
        tokens.saturating_mul(manifest.token_bytes as u64)
    };
    let total: u64 = wanted.iter().map(size).sum();
    if total > 0 {
        progress.line(&format!(
            "fetching the run's data: {} in {} shards",
            Bytes(total),
            wanted.len()
        ));
    }
    let bar = progress.bytes_bar(total);
    for hash in wanted {
        let bytes = fetch(net, Hash(hash), size(&hash), providers).await?;
        install_shard(&data, &hash, &bytes)?;
        bar.inc(bytes.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Fetches the model that the run starts from, where there is one and it is missing.
///
/// # Errors
/// Nobody gives it, or the disk.
pub async fn fetch_start(
    net: &Net,
    dir: &PeerDir,
    config: &RunConfig,
    providers: &[PeerId],
    progress: &Progress,
) -> Result<()> {
    let Some(root) = start_model::root_of(config)? else {
        return Ok(());
    };
    let (layout, path) = (Layout::new(&trainer_of(config)?.0), dir.start_model());
    if start_model::load(&path, &layout, root).is_ok() {
        return Ok(());
    }
    let size = checkpoint::snapshot_len(&layout);
    progress.line(&format!("fetching the model that the run starts from: {}", Bytes(size)));
    write_whole(&path, &fetch(net, root, size, providers).await?)
}

async fn fetch(net: &Net, hash: Hash, limit: u64, providers: &[PeerId]) -> Result<bytes::Bytes> {
    net.fetch(hash, limit, providers.to_vec(), FETCH)
        .await
        .with_context(|| format!("nobody gives {}, a part of the run's data", hash.short()))?;
    match net.get(hash).await? {
        Some(bytes) => Ok(bytes),
        None => bail!("{} vanished from the store", hash.short()),
    }
}
