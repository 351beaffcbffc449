//! What a replay needs besides the records: what a directory holds and, if that was asked for, what peers of the run give to anyone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use coordinatorless::config::RunConfig;
use coordinatorless::net::{BlobsAtRest, Net, Request};
use coordinatorless::node::{
    MAX_SHARD, ModelSource, Opened, Step, leaf_count, leaf_ranges, model_source, patience_for, reach, snapshots,
};
use coordinatorless::store::Store;
use coordinatorless::types::{Commit, Decided, Hash, PeerId, Round};
use futures::stream::{self, StreamExt};
use tempfile::TempDir;

use super::Found;
use crate::kit::Kit;
use crate::peer_dir::PeerDir;
use crate::{accumulators, network};

/// How many peers are asked for blobs, how many at once whether they are there, how often, and how long they may take to say so.
const MAX_ASKED: usize = 16;
const AT_ONCE: usize = 32;
const TRIES: usize = 2;
const ANSWER: Duration = Duration::from_secs(10);
/// How long one peer may take for some leaves of an accumulator, at least.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Held<'a> {
    dir: &'a PeerDir,
    spacing: u64,
    runtime: tokio::runtime::Runtime,
    blobs: BlobsAtRest,
    visit: Option<Visit>,
    // Goes after the stores that read it.
    _copy: TempDir,
}

/// An endpoint of its own, and whom to ask: those who said that they are there (for what was counted, its member and the voters, too). What is
/// fetched has its own store as well: the directory's may list what has been deleted since, and what is listed is not fetched.
struct Visit {
    net: Net,
    others: Vec<PeerId>,
    /// How many were asked whether they are there, and how many said so.
    asked: usize,
    answered: usize,
}

impl<'a> Held<'a> {
    /// Opens a copy of the blobs' index: the peer may be live, and what is only read must stay as it is. What the directory lacks is fetched
    /// from `others`, if there are any.
    pub(super) fn open(dir: &'a PeerDir, config: &RunConfig, others: Option<Vec<PeerId>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let copy = tempfile::tempdir().context("no temporary folder for a copy of the blobs' index")?;
        let [blobs, fetched] = ["blobs", "fetched"].map(|name| copy.path().join(name));
        for folder in [&blobs, &fetched] {
            std::fs::create_dir_all(folder)?;
        }
        copy_folder(&dir.path().join("blobs"), &blobs).context("the blobs cannot be read")?;
        let visit = others.map(|others| runtime.block_on(Visit::begin(dir, &fetched, config, others)));
        Ok(Self {
            dir,
            spacing: config.storage.snapshot_rounds,
            blobs: runtime.block_on(BlobsAtRest::open(&blobs))?,
            visit: visit.transpose()?,
            runtime,
            _copy: copy,
        })
    }

    /// A blob that is here.
    fn here(&self, hash: Hash) -> Option<Bytes> {
        self.runtime.block_on(self.blobs.get(hash))
    }

    fn own(&self, hash: Hash) -> Result<Bytes> {
        self.here(hash).with_context(|| {
            format!(
                "blob {} is not in this directory (any more): peers keep what was counted for two snapshots",
                hash.short()
            )
        })
    }

    /// A blob of at most `limit` bytes, from here or from others.
    fn blob(&self, hash: Hash, limit: u64) -> Result<Bytes> {
        let own = self.own(hash);
        let visit = self
            .visit
            .as_ref()
            .filter(|visit| own.is_err() && !visit.others.is_empty());
        let Some(Visit { net, others, .. }) = visit else {
            return own;
        };
        self.runtime.block_on(async {
            net.fetch(hash, limit, others.clone(), patience_for(limit)).await?;
            let bytes = net.get(hash).await?;
            bytes.with_context(|| format!("blob {} vanished", hash.short()))
        })
    }

    /// What a member sent.
    pub(super) fn shards(&self, commit: &Commit) -> Result<Vec<Bytes>> {
        let limit = MAX_SHARD.min(commit.len);
        commit.shards.iter().map(|hash| self.blob(*hash, limit)).collect()
    }

    /// The model that `round` was trained from, which is that after `base`: the newest snapshot up to there that the chain certifies, and
    /// what was counted since.
    pub(super) fn model_after(&self, store: &Store, base: Round, round: Round) -> Result<ModelSource> {
        let from_here = self.model_from_here(store, base);
        let source = match &self.visit {
            Some(visit) if from_here.is_err() && !visit.others.is_empty() => self.runtime.block_on(async {
                self.lend(&visit.net, store, base).await?;
                let source = model_source(&visit.net, store, base, &visit.others, self.spacing).await;
                source.map_err(|why| anyhow!(why))
            }),
            _ => from_here,
        };
        source.with_context(|| {
            format!(
                "the model that round {round} was trained from cannot be built{}",
                self.who_answered()
            )
        })
    }

    fn model_from_here(&self, store: &Store, base: Round) -> Result<ModelSource> {
        let mut source = ModelSource {
            snapshot: None,
            round: Round(0),
            steps: Vec::new(),
        };
        let mut at = base;
        while at > Round(0) {
            let root = record(store, at.next())?.record.model_root;
            let file = std::fs::read(self.snapshot(root)).ok();
            if let Some(bytes) = file.filter(|bytes| Hash::of(bytes) == root) {
                (source.snapshot, source.round) = (Some(Bytes::from(bytes)), at);
                break;
            }
            at = at.previous();
        }
        while at < base {
            at = at.next();
            let decided = Arc::new(record(store, at)?);
            let counted = decided.record.contributions.iter();
            let own = |commit: &Commit| commit.shards.iter().map(|hash| self.own(*hash)).collect();
            let shards = counted.map(|one| own(&one.commit)).collect::<Result<_>>();
            let shards = shards.with_context(|| format!("what round {at} counted"))?;
            source.steps.push(Step { decided, shards });
        }
        Ok(source)
    }

    fn snapshot(&self, root: Hash) -> PathBuf {
        self.dir.snapshots().join(format!("{root}.safetensors"))
    }

    /// What is here of the way to the model after `base` need not be fetched.
    async fn lend(&self, net: &Net, store: &Store, base: Round) -> Result<()> {
        let mut at = Round(base.0.saturating_sub(reach(self.spacing)));
        for entry in snapshots(store).into_iter().rev().filter(|entry| entry.round <= base) {
            let file = self.snapshot(entry.model_root);
            // A live peer may delete it at any moment.
            if file.exists() && net.put_file(&file).await.is_ok_and(|hash| hash == entry.model_root) {
                at = at.max(entry.round);
                break;
            }
        }
        while at < base {
            at = at.next();
            for hash in record(store, at)?
                .record
                .contributions
                .iter()
                .flat_map(|one| &one.commit.shards)
            {
                if let Some(bytes) = self.blobs.get(*hash).await {
                    net.put(bytes).await?;
                }
            }
        }
        Ok(())
    }

    /// The accumulators that the commit names, as far as they can be had: all of both, or the leaves that some auditor opened.
    pub(super) fn opened(&self, kit: &Kit, found: &mut Found) -> Result<Opened> {
        let commit = found.order.contribution.commit.clone();
        let zero = kit.config.verification.accumulator_zero;
        let file = |root: Hash| std::fs::read(accumulators::find(&self.dir.accumulators(), root)?).ok();
        let whole = |root: Hash| self.here(root).or_else(|| file(root).map(Bytes::from));
        let roots = [commit.accumulator_before, commit.accumulator_after];
        let both = |one: &dyn Fn(Hash) -> Option<Bytes>| {
            let of = |root| if root == zero { Some(Bytes::new()) } else { one(root) };
            let before = of(commit.accumulator_before)?;
            Some((before, of(commit.accumulator_after)?))
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
        let lacking = |root: &Hash| *root != zero && whole(*root).is_none();
        let root = roots.into_iter().find(lacking).unwrap_or(zero);
        if self.visit.is_none() {
            bail!(
                "accumulator {} is not in this directory: the member itself and whoever has audited this round hold it, or what was opened of \
                 it; while they run, --fetch asks them",
                root.short()
            );
        }
        let lacks = |root: Hash| {
            format!(
                "accumulator {} cannot be had{}: the member itself and whoever has audited this round hold it, while they run",
                root.short(),
                self.who_answered()
            )
        };
        if self.visit.as_ref().is_some_and(|visit| visit.others.is_empty()) {
            bail!(lacks(root));
        }
        let any = |root: Hash| match whole(root) {
            None if root != zero => self.blob(root, bytes).with_context(|| lacks(root)),
            held => Ok(held.unwrap_or_default()),
        };
        let before = any(commit.accumulator_before)?;
        Ok(Opened::Whole(before, any(commit.accumulator_after)?))
    }

    fn who_answered(&self) -> String {
        let answered = |visit: &Visit| format!(" (of {} peers asked, {} answered)", visit.asked, visit.answered);
        self.visit.as_ref().map(answered).unwrap_or_default()
    }

    /// Some ranges of chunks of a blob, with the hashes that prove them.
    fn ranges(&self, root: Hash, bytes: u64, ranges: &[std::ops::Range<u64>]) -> Option<Bytes> {
        self.runtime.block_on(async {
            let here = self.blobs.ranges(root, ranges).await;
            let Some(visit) = self.visit.as_ref().filter(|_| here.is_none()) else {
                return here;
            };
            let chunks: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            let patience = PATIENCE.max(patience_for(chunks << 10));
            // Each by itself: the accused is among them, and may let others wait.
            for peer in &visit.others {
                let part = visit.net.fetch_ranges(root, bytes, ranges, &[*peer], patience).await;
                if part.is_ok() {
                    return part.ok();
                }
            }
            None
        })
    }
}

impl Visit {
    async fn begin(dir: &PeerDir, folder: &Path, config: &RunConfig, likely: Vec<PeerId>) -> Result<Self> {
        let net = network::visit(dir, folder, config.id()).await?;
        let answers = |peer: PeerId| {
            let net = &net;
            async move {
                for _ in 0..TRIES {
                    if net.request(peer, Request::Status, ANSWER).await.is_ok() {
                        return Some(peer);
                    }
                }
                None
            }
        };
        let asked = likely.len();
        let each = stream::iter(likely).map(answers).buffered(AT_ONCE);
        let there: Vec<Option<PeerId>> = each.collect().await;
        let mut others: Vec<PeerId> = there.into_iter().flatten().collect();
        let answered = others.len();
        others.truncate(MAX_ASKED);
        Ok(Self {
            net,
            others,
            asked,
            answered,
        })
    }
}

fn record(store: &Store, at: Round) -> Result<Decided> {
    store.record(at)?.with_context(|| format!("record {at} is missing"))
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(visit) = &self.visit {
            self.runtime.block_on(visit.net.shutdown());
        }
    }
}

/// Files by hard link where they are only read; the index, which the store may write to, in full. A live peer may delete some meanwhile.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let (path, target) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            std::fs::create_dir_all(&target)?;
            copy_folder(&path, &target)?;
            continue;
        }
        let is_read_only = path.extension().is_some_and(|ending| ending == "data");
        if is_read_only && std::fs::hard_link(&path, &target).is_ok() {
            continue;
        }
        match std::fs::copy(&path, &target) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound || path.exists() => {
                return Err(error).with_context(|| format!("cannot copy {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}
