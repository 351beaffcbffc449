//! Bytes in and out: contributions fetched from several providers and checked, models rebuilt from snapshots.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Check, ModelSource, Step};
use crate::net::Net;
use crate::store::Store;
use crate::types::*;

/// The largest shard (R4).
pub const MAX_SHARD: u64 = 4 << 20;
/// One attempt to fetch one shard.
const SHARD_DEADLINE: Duration = Duration::from_secs(10);
/// Attempts to fetch what a decided record needs before it is said aloud; it goes on after that.
const PAUSE: Duration = Duration::from_millis(300);

/// Where snapshots are listed in the store.
const SNAPSHOTS: &str = "snapshots";

/// A snapshot that this peer holds, or knows the root of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SnapshotEntry {
    /// Its branch.
    pub branch: Branch,
    /// Its round.
    pub round: Round,
    /// The model's root, which is the blob's hash.
    pub model_root: Hash,
    /// Bytes of the model.
    pub model_len: u64,
}

/// Snapshots known to this store, oldest first.
pub fn snapshots(store: &Store) -> Vec<SnapshotEntry> {
    let bytes = store.meta_get(SNAPSHOTS).ok().flatten().unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Replaces the list of snapshots.
pub fn set_snapshots(store: &Store, entries: &[SnapshotEntry]) -> Result<(), crate::store::StoreError> {
    store.meta_put(SNAPSHOTS, &serde_json::to_vec(entries).unwrap_or_default())
}

/// Fetches a contribution's shards; each is BLAKE3-verified by its hash, none is longer than promised.
pub async fn fetch_contribution(net: &Net, commit: &Commit, providers: &[PeerId]) -> Result<Vec<Bytes>, String> {
    let mut shards = Vec::with_capacity(commit.shards.len());
    let mut total = 0u64;
    for hash in &commit.shards {
        if !net.has(*hash).await {
            let limit = MAX_SHARD.min(commit.len);
            net.fetch(*hash, limit, providers.to_vec(), SHARD_DEADLINE)
                .await
                .map_err(|error| error.to_string())?;
        }
        let bytes = net
            .get(*hash)
            .await
            .map_err(|error| error.to_string())?
            .ok_or("a shard vanished from the store")?;
        total += bytes.len() as u64;
        if total > commit.len {
            return Err(format!("longer than promised: expected {} bytes", commit.len));
        }
        shards.push(bytes);
    }
    Ok(shards)
}

/// What became of a contribution that was wanted for the round in progress.
pub enum Wanted {
    /// Held and well-formed.
    Held,
    /// Held, but does not decode.
    Bad(String),
    /// Not to be had right now; the core asks again.
    Missing,
}

/// Fetches and checks a contribution.
pub async fn want(net: Net, commit: Commit, providers: Vec<PeerId>, check: Check) -> Wanted {
    let Ok(shards) = fetch_contribution(&net, &commit, &providers).await else {
        return Wanted::Missing;
    };
    let found: u64 = shards.iter().map(|shard| shard.len() as u64).sum();
    if found != commit.len {
        return Wanted::Bad(format!("expected {} bytes, found {found}", commit.len));
    }
    match tokio::task::spawn_blocking(move || check(&commit, &shards)).await {
        Ok(Ok(())) => Wanted::Held,
        Ok(Err(reason)) => Wanted::Bad(reason),
        Err(_) => Wanted::Bad("the decoder failed".into()),
    }
}

/// Gathers what a decided record counted, from its voters and anyone else, for as long as it takes: it was certified, so more than a
/// third of the honest weight holds it (R11).
pub async fn gather(net: &Net, decided: Arc<Decided>, others: &[PeerId]) -> Step {
    let mut shards = Vec::with_capacity(decided.record.contributions.len());
    for one in &decided.record.contributions {
        let voters = decided.certificate.votes.iter().map(|(id, _)| *id);
        let mut providers: Vec<PeerId> = std::iter::once(one.member)
            .chain(voters)
            .chain(others.iter().copied())
            .collect();
        providers.retain(|id| *id != net.id());
        loop {
            match fetch_contribution(net, &one.commit, &providers).await {
                Ok(bytes) => {
                    shards.push(bytes);
                    break;
                }
                Err(reason) => {
                    tracing::debug!(member = %one.member.short(), reason, "a counted contribution is not here yet");
                    tokio::time::sleep(PAUSE).await;
                    let by = 1.min(providers.len());
                    providers.rotate_left(by);
                }
            }
        }
    }
    Step { decided, shards }
}

/// The model after `round`: from the newest snapshot at or before it that can be had, and the counted bytes since.
pub async fn model_source(net: &Net, store: &Store, round: Round, others: &[PeerId]) -> Result<ModelSource, String> {
    let mut usable: Vec<SnapshotEntry> = snapshots(store);
    usable.retain(|entry| entry.round <= round && on_chain(store, entry));
    let mut base = (Round(0), None);
    while let Some(entry) = usable.pop() {
        match snapshot_bytes(net, &entry, others).await {
            Ok(bytes) => {
                base = (entry.round, Some(bytes));
                break;
            }
            Err(reason) => {
                tracing::warn!(round = %entry.round, reason, "a snapshot cannot be had; trying an older one")
            }
        }
    }
    let mut steps = Vec::new();
    let mut at = base.0.next();
    while at <= round {
        let decided = store
            .record(at)
            .map_err(|error| error.to_string())?
            .ok_or(format!("record {at} is missing"))?;
        steps.push(gather(net, Arc::new(decided), others).await);
        at = at.next();
    }
    Ok(ModelSource {
        snapshot: base.1,
        round: base.0,
        steps,
    })
}

/// Whether the record after the snapshot certifies it.
fn on_chain(store: &Store, entry: &SnapshotEntry) -> bool {
    match store.record(entry.round.next()) {
        Ok(Some(next)) => next.record.model_root == entry.model_root,
        // The newest round has no successor yet: then it must at least be this peer's own record of that branch.
        Ok(None) => store
            .record(entry.round)
            .ok()
            .flatten()
            .is_some_and(|own| own.record.slot.branch == entry.branch),
        Err(_) => false,
    }
}

async fn snapshot_bytes(net: &Net, entry: &SnapshotEntry, others: &[PeerId]) -> Result<Bytes, String> {
    if !net.has(entry.model_root).await {
        let deadline = Duration::from_secs(20 + entry.model_len / (1 << 17));
        let providers = others.to_vec();
        net.fetch(entry.model_root, entry.model_len, providers, deadline)
            .await
            .map_err(|error| error.to_string())?;
    }
    net.get(entry.model_root)
        .await
        .map_err(|error| error.to_string())?
        .ok_or("it vanished from the store".into())
}

/// An audited member's accumulators, by the roots it committed to.
pub async fn accumulators(net: &Net, commit: &Commit, zero: Hash, member: PeerId) -> Option<(Bytes, Bytes)> {
    let limit = 16 << 30;
    let mut found = Vec::new();
    for root in [commit.accumulator_before, commit.accumulator_after] {
        if root == zero {
            // Zeros need no fetching; the host knows how many.
            found.push(Bytes::new());
            continue;
        }
        if !net.has(root).await {
            net.fetch(root, limit, vec![member], Duration::from_secs(30))
                .await
                .ok()?;
        }
        found.push(net.get(root).await.ok()??);
    }
    let after = found.pop()?;
    Some((found.pop()?, after))
}
