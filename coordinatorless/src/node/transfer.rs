//! Bytes in and out: contributions fetched from several providers and checked, models rebuilt from snapshots.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use rand::seq::SliceRandom;

use super::{Check, ModelSource, Opened, Step, leaf_ranges};
use crate::net::{Net, Request, Response, SnapshotInfo};
use crate::store::Store;
use crate::types::*;

/// The largest shard (R4).
pub const MAX_SHARD: u64 = 4 << 20;
/// One attempt to fetch one shard.
const SHARD_DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts to fetch what a decided record counted, and how long they go on without any of it arriving.
const PAUSE: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(30);
/// Contributions fetched at once, of one record or several: over a slow link most of the time is waiting.
const AT_ONCE: usize = 8;
/// How long a peer may take to name its snapshot, how many are asked, and what is too long to be a model.
const ANSWER: Duration = Duration::from_secs(5);
const MAX_ASKED: usize = 8;
const MAX_MODEL: u64 = 1 << 40;
/// One attempt to fetch a model, whatever length it is said to have; another one follows where at least so much arrived a second.
const ATTEMPT: Duration = Duration::from_secs(600);
const SLOWEST: u64 = 16 << 10;
/// Seconds that an attempt counts as at least.
const MOMENT: u64 = 10;
/// Rounds beyond two snapshots' distance that may still be bridged: a snapshot counts once the next record certifies it.
const SPARE: u64 = 4;

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
        // R9: others will count on it, whatever becomes of this process.
        Ok(Ok(())) => match net.flush_blobs().await {
            Ok(()) => Wanted::Held,
            Err(_) => Wanted::Missing,
        },
        Ok(Err(reason)) => Wanted::Bad(reason),
        Err(_) => Wanted::Bad("the decoder failed".into()),
    }
}

/// Gathers what a decided record counted, from its voters and anyone else. It was certified, so more than a third of the honest
/// weight held it then (R11); after two snapshots everyone may have let it go, and a snapshot is the way to get on.
pub async fn gather(net: &Net, decided: Arc<Decided>, others: &[PeerId]) -> Result<Step, String> {
    let mut steps = gather_all(net, vec![decided], others).await?;
    steps.pop().ok_or("no record".into())
}

/// The same for several records, in order. What one peer fetches at a time has a limit over all of them: the round in progress wants its
/// share of the link, too.
async fn gather_all(net: &Net, records: Vec<Arc<Decided>>, others: &[PeerId]) -> Result<Vec<Step>, String> {
    let counted = records.iter().flat_map(|decided| {
        let each = decided.record.contributions.iter();
        each.map(move |one| (decided.clone(), one.clone()))
    });
    // Named one by one beforehand: a closure that borrows from what it is given is not `Send` enough.
    let each: Vec<_> = counted
        .map(|(decided, one)| gather_one(net, decided, one, others))
        .collect();
    let gathered: Vec<_> = stream::iter(each).buffered(AT_ONCE).try_collect().await?;
    let mut gathered = gathered.into_iter();
    let step = |decided: Arc<Decided>| {
        let shards = gathered.by_ref().take(decided.record.contributions.len()).collect();
        Step { decided, shards }
    };
    Ok(records.into_iter().map(step).collect())
}

/// One contribution. Whoever is gone costs seconds each time it is asked, so those to whom a connection is open come first, as they are
/// when it is asked, each attempt with another of them at the head; every third attempt begins with the others. Its author and the voters, all of
/// whom had it, come before anyone else, in an order that nobody can foresee: whoever lets others wait must not be first each time.
async fn gather_one(
    net: &Net,
    decided: Arc<Decided>,
    one: Contribution,
    others: &[PeerId],
) -> Result<Vec<Bytes>, String> {
    let voters = decided.certificate.votes.iter().map(|(id, _)| *id);
    let mut all: Vec<PeerId> = std::iter::once(one.member).chain(voters).collect();
    all.shuffle(&mut rand::rng());
    all.extend(others);
    let (mut turn, mut held, mut arrived) = (0, 0, Instant::now());
    let at_most = PATIENCE + patience_for(one.commit.len.saturating_mul(AT_ONCE as u64));
    let began = Instant::now();
    loop {
        let providers = in_turn(net, all.iter().copied(), turn);
        let reason = match fetch_contribution(net, &one.commit, &providers).await {
            Ok(bytes) => return Ok(bytes),
            Err(reason) => reason,
        };
        let before = std::mem::replace(&mut held, held_of(net, &one.commit).await);
        if held > before {
            arrived = Instant::now();
        }
        if arrived.elapsed() > PATIENCE || began.elapsed() > at_most {
            let (round, member) = (decided.record.slot.round, one.member.short());
            return Err(format!(
                "the contribution of {member} to round {round} cannot be had: {reason}"
            ));
        }
        turn += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// Bytes here of a contribution.
async fn held_of(net: &Net, commit: &Commit) -> u64 {
    let each = commit.shards.iter().map(|hash| net.held(*hash));
    futures::future::join_all(each).await.into_iter().sum()
}

/// Each peer once and without this one, in the order given, but those to whom a connection is open at this moment first.
pub(super) fn there_first(net: &Net, peers: impl IntoIterator<Item = PeerId>) -> Vec<PeerId> {
    in_turn(net, peers, 0)
}

/// The same, with another one at the head each turn; in every third turn the others come first, lest those who are there and silent take all
/// the time there is.
fn in_turn(net: &Net, peers: impl IntoIterator<Item = PeerId>, turn: usize) -> Vec<PeerId> {
    turned(net.id(), &net.reached(), peers, turn)
}

fn turned(me: PeerId, reached: &HashSet<PeerId>, peers: impl IntoIterator<Item = PeerId>, turn: usize) -> Vec<PeerId> {
    let mut seen = BTreeSet::from([me]);
    let once = peers.into_iter().filter(|id| seen.insert(*id));
    let (mut there, mut others): (Vec<PeerId>, Vec<PeerId>) = once.partition(|id| reached.contains(id));
    // Each by as often as it came first before.
    for (group, turns) in [(&mut there, turn - turn / 3), (&mut others, turn / 3)] {
        let by = turns.checked_rem(group.len()).unwrap_or(0);
        group.rotate_left(by);
    }
    let (first, then) = if turn % 3 == 2 {
        (others, there)
    } else {
        (there, others)
    };
    [first, then].concat()
}

/// Rounds that may be bridged by contributions: everyone keeps those since the last snapshot but one (R17).
pub fn reach(spacing: u64) -> u64 {
    spacing.saturating_mul(2).saturating_add(SPARE)
}

/// The model after `round`: from the newest snapshot at or before it that can be had, and the counted bytes since. First with what
/// is known here, unless a nearer snapshot must exist by now; else with those that others offer and the chain certifies. `spacing` is the
/// run's `snapshot_rounds`: everyone keeps what was counted since the last snapshot but one (R17), so a longer way is not worth trying.
pub async fn model_source(
    net: &Net,
    store: &Store,
    round: Round,
    others: &[PeerId],
    spacing: u64,
) -> Result<ModelSource, String> {
    let newest = |usable: &[SnapshotEntry]| usable.last().map_or(Round(0), |newest| newest.round);
    let away = |base: Round| round.0.saturating_sub(base.0);
    let mut usable = usable(store, round, snapshots(store));
    if away(newest(&usable)) <= spacing {
        match source_from(net, store, round, others, usable.clone(), spacing).await {
            Ok(source) => return Ok(source),
            Err(reason) => tracing::debug!(reason, "not from what is known here"),
        }
    }
    // A snapshot counts once the record after it is known.
    let certified = store.record(round.next()).ok().flatten().is_some();
    let at_most = if certified { round } else { round.previous() };
    usable.extend(offered_snapshots(net, store, at_most, others, spacing).await);
    let usable = self::usable(store, round, usable);
    source_from(net, store, round, others, usable, spacing).await
}

/// Those snapshots at or before `round` that the chain certifies, oldest first.
fn usable(store: &Store, round: Round, mut entries: Vec<SnapshotEntry>) -> Vec<SnapshotEntry> {
    entries.retain(|entry| entry.round <= round && on_chain(store, entry));
    entries.sort_by_key(|entry| (entry.round, entry.model_len));
    entries.dedup();
    entries
}

async fn source_from(
    net: &Net,
    store: &Store,
    round: Round,
    others: &[PeerId],
    mut usable: Vec<SnapshotEntry>,
    spacing: u64,
) -> Result<ModelSource, String> {
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
    if round.0.saturating_sub(base.0.0) > reach(spacing) {
        return Err(format!(
            "the newest snapshot to be had is of round {}, and round {round} is too far from it",
            base.0
        ));
    }
    let since = (base.0.next().0..=round.0).map(Round).map(|at| {
        let decided = store.record(at).map_err(|error| error.to_string())?;
        Ok(Arc::new(decided.ok_or(format!("record {at} is missing"))?))
    });
    let steps = gather_all(net, since.collect::<Result<_, String>>()?, others).await?;
    Ok(ModelSource {
        snapshot: base.1,
        round: base.0,
        steps,
    })
}

/// The newest snapshot up to `at_most` of each peer that answers; only roots that a certified record names, of rounds that everyone keeps
/// one of, are worth anything.
pub async fn offered_snapshots(
    net: &Net,
    store: &Store,
    at_most: Round,
    peers: &[PeerId],
    spacing: u64,
) -> Vec<SnapshotEntry> {
    let asked = there_first(net, peers.iter().copied()).into_iter().take(MAX_ASKED);
    let asked = asked.map(|peer| net.request(peer, Request::Snapshot { at_most }, ANSWER));
    let mut offered = Vec::new();
    for answer in futures::future::join_all(asked).await {
        let Ok(Response::Snapshot(info)) = answer else {
            continue;
        };
        let after = Round(info.round.0.saturating_add(1));
        let certifying = store.record(after).ok().flatten();
        let certified = certifying.is_some_and(|next| next.record.model_root == info.model_root);
        if certified && info.round.0.is_multiple_of(spacing) && info.model_len <= MAX_MODEL {
            let SnapshotInfo {
                branch,
                round,
                model_root,
                model_len,
            } = info;
            offered.push(SnapshotEntry {
                branch,
                round,
                model_root,
                model_len,
            });
        }
    }
    offered.sort_by_key(|entry| (entry.round, entry.model_len));
    offered.dedup();
    offered
}

/// Whether the record after the snapshot certifies it.
pub(super) fn on_chain(store: &Store, entry: &SnapshotEntry) -> bool {
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

/// How long so many bytes may take: 20 s, and what a link of 128 KiB a second needs.
pub fn patience_for(bytes: u64) -> Duration {
    Duration::from_secs(20 + bytes / (1 << 17))
}

async fn snapshot_bytes(net: &Net, entry: &SnapshotEntry, others: &[PeerId]) -> Result<Bytes, String> {
    let deadline = patience_for(entry.model_len).min(ATTEMPT);
    while !net.has(entry.model_root).await {
        let (began, before) = (Instant::now(), net.held(entry.model_root).await);
        let fetched = net.fetch(entry.model_root, entry.model_len, others.to_vec(), deadline);
        let Err(error) = fetched.await else { break };
        let grown = net.held(entry.model_root).await.saturating_sub(before);
        // All may have given up long before the deadline.
        if grown < began.elapsed().as_secs().max(MOMENT) * SLOWEST {
            return Err(error.to_string());
        }
    }
    net.get(entry.model_root)
        .await
        .map_err(|error| error.to_string())?
        .ok_or("it vanished from the store".into())
}

/// An audited member's accumulators, by the roots it committed to: all of them, of at most `limit` bytes each, or of exactly `limit` bytes these
/// `leaves`.
pub async fn accumulators(
    net: &Net,
    commit: &Commit,
    zero: Hash,
    providers: &[PeerId],
    limit: u64,
    leaves: Option<Vec<u64>>,
    patience: Duration,
) -> Option<Opened> {
    let ranges = leaves.map(|leaves| leaf_ranges(&leaves, limit));
    let mut found = Vec::new();
    for root in [commit.accumulator_before, commit.accumulator_after] {
        if root == zero {
            // Zeros need no fetching; the host knows how many.
            found.push(Bytes::new());
            continue;
        }
        if let Some(ranges) = &ranges {
            let proof = net.fetch_ranges(root, limit, ranges, providers, patience).await;
            found.push(proof.ok()?);
            continue;
        }
        if !net.has(root).await {
            net.fetch(root, limit, providers.to_vec(), patience).await.ok()?;
        }
        found.push(net.get(root).await.ok()??);
    }
    let (after, before) = (found.pop()?, found.pop()?);
    Some(match ranges {
        Some(_) => Opened::Leaves(before, after),
        None => Opened::Whole(before, after),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_there_is_asked_first_and_everyone_comes_first_at_some_time() {
        let id = |i: u8| PeerId([i; 32]);
        let reached = HashSet::from([id(2), id(4), id(5)]);
        let named = [1, 2, 3, 4, 2, 5, 9].map(id);
        let order = |turn| turned(id(9), &reached, named, turn);
        assert_eq!(order(0), [2, 4, 5, 1, 3].map(id));
        assert_eq!(order(1), [4, 5, 2, 1, 3].map(id));
        assert_eq!(order(2), [1, 3, 5, 2, 4].map(id));
        let heads: BTreeSet<PeerId> = (0..6).map(|turn| order(turn)[0]).collect();
        assert_eq!(heads, [1, 2, 3, 4, 5].map(id).into());
        assert!(turned(id(9), &reached, [id(9)], 7).is_empty());
    }
}
