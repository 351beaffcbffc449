//! What a replay needs besides the records: what a directory holds and, if that was asked for, what peers of the run give to anyone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use coordinatorless::config::RunConfig;
use coordinatorless::net::{BlobsAtRest, Net};
use coordinatorless::node::{MAX_SHARD, ModelSource, Opened, Step, leaf_count, leaf_ranges, model_source};
use coordinatorless::store::Store;
use coordinatorless::types::{Commit, Decided, Hash, PeerId, Round};
use tempfile::TempDir;

use super::Found;
use crate::kit::Kit;
use crate::peer_dir::PeerDir;
use crate::{accumulators, network};

/// How long one blob may take to come from others.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many are asked.
const MAX_ASKED: usize = 16;

enum Blobs {
    /// Those of the directory.
    Here(BlobsAtRest),
    /// Those, and what these peers give.
    Run(Net, Vec<PeerId>),
}

pub(super) struct Held<'a> {
    dir: &'a PeerDir,
    spacing: u64,
    runtime: tokio::runtime::Runtime,
    blobs: Blobs,
    // Goes after the store that reads it.
    _copy: TempDir,
}

impl<'a> Held<'a> {
    /// Opens a copy of the blobs' index: the peer may be live, and what is only read must stay as it is. What is fetched from `others` comes
    /// into the copy.
    pub(super) fn open(dir: &'a PeerDir, config: &RunConfig, others: Option<Vec<PeerId>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let copy = tempfile::tempdir().context("no temporary folder for a copy of the blobs' index")?;
        let blobs = copy.path().join("blobs");
        std::fs::create_dir_all(&blobs)?;
        copy_folder(&dir.path().join("blobs"), &blobs).context("the blobs cannot be read")?;
        let blobs = match others {
            None => Blobs::Here(runtime.block_on(BlobsAtRest::open(&blobs))?),
            Some(mut others) => {
                let net = runtime.block_on(network::visit(dir, copy.path(), config.id()))?;
                others.truncate(MAX_ASKED);
                Blobs::Run(net, others)
            }
        };
        Ok(Self {
            dir,
            spacing: config.storage.snapshot_rounds,
            runtime,
            blobs,
            _copy: copy,
        })
    }

    /// A blob that is here.
    fn here(&self, hash: Hash) -> Option<Bytes> {
        self.runtime.block_on(async {
            match &self.blobs {
                Blobs::Here(blobs) => blobs.get(hash).await,
                Blobs::Run(net, _) => net.get(hash).await.ok().flatten(),
            }
        })
    }

    /// A blob of at most `limit` bytes, from here or from others.
    fn blob(&self, hash: Hash, limit: u64) -> Result<Bytes> {
        if let Some(bytes) = self.here(hash) {
            return Ok(bytes);
        }
        let Blobs::Run(net, others) = &self.blobs else {
            bail!(
                "blob {} is not in this directory (any more): peers keep what was counted for two snapshots",
                hash.short()
            )
        };
        self.runtime
            .block_on(net.fetch(hash, limit, others.clone(), PATIENCE))?;
        self.here(hash)
            .with_context(|| format!("blob {} vanished", hash.short()))
    }

    /// What a member sent.
    pub(super) fn shards(&self, commit: &Commit) -> Result<Vec<Bytes>> {
        let limit = MAX_SHARD.min(commit.len);
        commit.shards.iter().map(|hash| self.blob(*hash, limit)).collect()
    }

    /// The model that `round` was trained from, which is that after `base`: the newest snapshot up to there that the chain certifies, and
    /// what was counted since.
    pub(super) fn model_after(&self, store: &Store, base: Round, round: Round) -> Result<ModelSource> {
        let lacks = || format!("the model that round {round} was trained from cannot be built");
        if let Blobs::Run(net, others) = &self.blobs {
            let source = model_source(net, store, base, others, self.spacing);
            return self
                .runtime
                .block_on(source)
                .map_err(|why| anyhow!(why))
                .with_context(lacks);
        }
        let record =
            |at: Round| -> Result<Decided> { store.record(at)?.with_context(|| format!("record {at} is missing")) };
        let mut source = ModelSource {
            snapshot: None,
            round: Round(0),
            steps: Vec::new(),
        };
        let mut at = base;
        while at > Round(0) {
            let root = record(at.next())?.record.model_root;
            let path = self.dir.snapshots().join(format!("{root}.safetensors"));
            if let Ok(bytes) = std::fs::read(path) {
                (source.snapshot, source.round) = (Some(Bytes::from(bytes)), at);
                break;
            }
            at = at.previous();
        }
        while at < base {
            at = at.next();
            let decided = Arc::new(record(at)?);
            let counted = decided.record.contributions.iter();
            let shards = counted.map(|one| self.shards(&one.commit)).collect::<Result<_>>();
            let shards = shards.with_context(|| format!("{}: round {at}", lacks()))?;
            source.steps.push(Step { decided, shards });
        }
        Ok(source)
    }

    /// The accumulators that the commit names, as far as they can be had: all of both, or the leaves that some auditor opened.
    pub(super) fn opened(&self, kit: &Kit, found: &mut Found) -> Result<Opened> {
        let commit = found.order.contribution.commit.clone();
        let zero = kit.config.verification.accumulator_zero;
        let file = |root: Hash| std::fs::read(accumulators::find(&self.dir.accumulators(), root)?).ok();
        let whole = |root: Hash| self.here(root).or_else(|| file(root).map(Bytes::from));
        let roots = [commit.accumulator_before, commit.accumulator_after];
        let both = |one: &dyn Fn(Hash) -> Option<Bytes>| {
            let [before, after] = roots.map(|root| if root == zero { Some(Bytes::new()) } else { one(root) });
            before.zip(after)
        };
        if let Some((before, after)) = both(&whole) {
            return Ok(Opened::Whole(before, after));
        }
        let bytes = 4 * kit.layout.total as u64;
        let seeds = found.leaf_seeds.clone().into_iter();
        for seed in seeds.filter(|_| kit.opens_leaves()) {
            found.order.leaf_seed = seed;
            let Some(leaves) = found.order.leaves(leaf_count(bytes)) else {
                break;
            };
            let ranges = leaf_ranges(&leaves, bytes);
            if let Some((before, after)) = both(&|root| self.ranges(root, bytes, &ranges)) {
                return Ok(Opened::Leaves(before, after));
            }
        }
        let root = roots.into_iter().find(|root| *root != zero).unwrap_or(zero);
        if let Blobs::Here(_) = self.blobs {
            bail!(
                "accumulator {} is not in this directory: the member itself and whoever has audited this round hold it, or what was opened of \
                 it; while they run, --fetch asks them",
                root.short()
            );
        }
        let any = |root: Hash| match whole(root) {
            None if root != zero => self.blob(root, bytes),
            held => Ok(held.unwrap_or_default()),
        };
        let [before, after] = roots.map(any);
        let lacks = || {
            format!(
                "accumulator {} cannot be had: the member itself and whoever has audited this round hold it, while they run",
                root.short()
            )
        };
        Ok(Opened::Whole(before.with_context(lacks)?, after.with_context(lacks)?))
    }

    /// Some ranges of chunks of a blob, with the hashes that prove them.
    fn ranges(&self, root: Hash, bytes: u64, ranges: &[std::ops::Range<u64>]) -> Option<Bytes> {
        self.runtime.block_on(async {
            match &self.blobs {
                Blobs::Here(blobs) => blobs.ranges(root, ranges).await,
                Blobs::Run(net, others) => net.fetch_ranges(root, bytes, ranges, others, PATIENCE).await.ok(),
            }
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Blobs::Run(net, _) = &self.blobs {
            self.runtime.block_on(net.shutdown());
        }
    }
}

/// Files by hard link where they are only read; the index, which the store may write to, in full.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let (path, target) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            std::fs::create_dir_all(&target)?;
            copy_folder(&path, &target)?;
        } else if path.extension().is_none_or(|ending| ending != "data") || std::fs::hard_link(&path, &target).is_err()
        {
            std::fs::copy(&path, &target).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}
