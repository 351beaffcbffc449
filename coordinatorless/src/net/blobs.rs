//! Blobs: contributions and snapshots, addressed by BLAKE3 and verified as they stream in. `iroh-blobs` stays behind this door.
//!
//! Its own downloader tries providers in turn without deadline or size cap; this one ([`Blobs::fetch`]) gives up on a provider that
//! stalls, goes on with the next from where the last one left off, and refuses content longer than was promised before taking
//! any of it. What is longer than a shard comes from several at once (`pieces`). What nobody wants any more is collected as garbage after [`Blobs::retain`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use iroh::Endpoint;
use iroh::endpoint::Connection;
use iroh_blobs::api::blobs::{AddPathOptions, BlobStatus, ImportMode};
use iroh_blobs::get::fsm::{self, BlobContentNext, ConnectedNext};
use iroh_blobs::get::request::get_verified_size;
use iroh_blobs::protocol::{ChunkRanges, ChunkRangesExt, GetRequest};
use iroh_blobs::provider::events::{EventMask, EventSender, ProviderMessage, ThrottleMode};
use iroh_blobs::store::fs::FsStore;
use iroh_blobs::store::fs::options::Options;
use iroh_blobs::store::{GcConfig, ProtectCb, ProtectOutcome};
use iroh_blobs::{BlobFormat, BlobsProtocol};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

mod pieces;

use super::pool::Pool;
use super::rate::Rate;
use super::{NetConfig, NetError};
use crate::types::{Hash, PeerId};

/// How long a provider may take to answer, or be silent in the middle.
const STALL: Duration = Duration::from_secs(3);
/// Providers that have their turn within the deadline of a fetch, however slowly those before them give what they have.
const TURNS: u32 = 3;
/// Transfers at once.
const MAX_TRANSFERS: usize = 32;
/// How often garbage is looked for, if there may be some.
const COLLECT: Duration = Duration::from_secs(2);
/// A blob that came within this time is no garbage yet: whoever called [`Blobs::retain`] may not have known of it.
const FRESH: Duration = Duration::from_secs(30);
/// The store's transactions are committed this often.
const COMMIT: Duration = Duration::from_millis(20);

/// Why a blob could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Longer than promised.
    #[error("blob {hash} is too long: expected at most {expected} bytes, found {found}")]
    TooLong {
        /// The blob.
        hash: Hash,
        /// The limit.
        expected: u64,
        /// The length that was proven, or is held.
        found: u64,
    },
    /// No provider gave it in full.
    #[error("blob {hash} was not to be had from {} providers: {}", attempts.len(), list(attempts))]
    NotFound {
        /// The blob.
        hash: Hash,
        /// What each provider did.
        attempts: Vec<(PeerId, String)>,
    },
    /// The deadline came first.
    #[error("blob {hash} did not arrive within {limit:?}: {}", list(attempts))]
    Timeout {
        /// The blob.
        hash: Hash,
        /// The deadline.
        limit: Duration,
        /// What each provider asked so far did.
        attempts: Vec<(PeerId, String)>,
    },
    /// This peer's own store failed (a full disk).
    #[error("blob store: {0}")]
    Store(String),
}

fn list(attempts: &[(PeerId, String)]) -> String {
    attempts
        .iter()
        .map(|(peer, reason)| format!("{}: {reason}", peer.short()))
        .collect::<Vec<_>>()
        .join("; ")
}

/// What became of fetches since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchCounters {
    /// Blobs fetched in full.
    pub fetched: u64,
    /// Payload bytes received.
    pub bytes: u64,
    /// Providers given up on.
    pub failed_providers: u64,
    /// Blobs refused for their length.
    pub too_long: u64,
}

#[derive(Debug, Default)]
struct Counters {
    fetched: AtomicU64,
    bytes: AtomicU64,
    failed_providers: AtomicU64,
    too_long: AtomicU64,
}

/// What the garbage collector must leave.
#[derive(Debug, Default)]
struct Keep {
    /// As of the last [`Blobs::retain`]; before the first, everything stays.
    wanted: HashSet<iroh_blobs::Hash>,
    fresh: HashMap<iroh_blobs::Hash, Instant>,
    /// There may be garbage until then.
    due_until: Option<Instant>,
}

/// The blobs of this peer.
#[derive(Debug)]
pub(super) struct Blobs {
    store: FsStore,
    folder: PathBuf,
    keep: Arc<Mutex<Keep>>,
    pool: Pool,
    download: Option<Rate>,
    transfers: Semaphore,
    counters: Counters,
}

impl Blobs {
    /// Opens the store in `<dir>/blobs`.
    pub async fn open(config: &NetConfig, endpoint: Endpoint) -> Result<Self, NetError> {
        let folder = config.dir.join("blobs");
        let failed = |error: String| NetError::Blobs {
            folder: folder.clone(),
            reason: error,
        };
        tokio::fs::create_dir_all(&folder)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let keep = Arc::new(Mutex::new(Keep::default()));
        let mut options = Options::new(&folder);
        options.batch.max_write_duration = COMMIT;
        options.gc = Some(collector(keep.clone(), COLLECT, FRESH));
        let store = FsStore::load_with_opts(folder.join("blobs.db"), options)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let pool = Pool::new(endpoint, iroh_blobs::ALPN.to_vec());
        let download = config.max_download.map(Rate::new);
        let transfers = Semaphore::new(MAX_TRANSFERS);
        Ok(Self {
            store,
            folder,
            keep,
            pool,
            download,
            transfers,
            counters: Counters::default(),
        })
    }

    /// The serving side, at most `max_upload` bytes per second.
    pub fn protocol(&self, max_upload: Option<u64>) -> BlobsProtocol {
        let events = max_upload.map(|limit| {
            let mask = EventMask {
                throttle: ThrottleMode::Intercept,
                ..EventMask::DEFAULT
            };
            let (events, mut messages) = EventSender::channel(256, mask);
            let rate = Arc::new(Rate::new(limit));
            tokio::spawn(async move {
                while let Some(message) = messages.recv().await {
                    if let ProviderMessage::Throttle(message) = message {
                        let rate = rate.clone();
                        tokio::spawn(async move {
                            rate.take(message.size).await;
                            // A transfer that ended meanwhile need not go on.
                            let _ = message.tx.send(Ok(())).await;
                        });
                    }
                }
            });
            events
        });
        BlobsProtocol::new(&self.store, events)
    }

    /// Stores bytes; returns their BLAKE3 hash.
    pub async fn put(&self, bytes: Bytes) -> Result<Hash, NetError> {
        let hash = Hash::of(&bytes);
        self.protect(hash);
        let _tag = self
            .store
            .add_bytes(bytes)
            .temp_tag()
            .await
            .map_err(|error| self.failed(error))?;
        self.protect(hash);
        Ok(hash)
    }

    /// Stores a file, by reference where the store can: then it must not change while it is wanted.
    pub async fn put_file(&self, path: &Path) -> Result<Hash, NetError> {
        let path = std::path::absolute(path).map_err(|error| self.failed(error))?;
        let options = AddPathOptions {
            path,
            format: BlobFormat::Raw,
            mode: ImportMode::TryReference,
        };
        let tag = self
            .store
            .add_path_with_opts(options)
            .temp_tag()
            .await
            .map_err(|error| self.failed(error))?;
        let hash = Hash(*tag.hash().as_bytes());
        self.protect(hash);
        Ok(hash)
    }

    /// Waits until what was stored so far is committed: the store does that in batches, and what was in one is gone if the process is
    /// killed first.
    pub async fn flush(&self) -> Result<(), NetError> {
        self.store.sync_db().await.map_err(|error| self.failed(error))
    }

    /// A blob held in full.
    pub async fn get(&self, hash: Hash) -> Result<Option<Bytes>, NetError> {
        if !self.has(hash).await {
            return Ok(None);
        }
        self.store
            .get_bytes(iroh(hash))
            .await
            .map(Some)
            .map_err(|error| self.failed(error))
    }

    /// Whether a blob is held in full.
    pub async fn has(&self, hash: Hash) -> bool {
        self.store.has(iroh(hash)).await.unwrap_or(false)
    }

    /// Bytes held of a blob, all or some of it.
    pub async fn held(&self, hash: Hash) -> u64 {
        let observed = self.store.observe(iroh(hash)).await;
        observed.map_or(0, |bitfield| bitfield.total_bytes())
    }

    /// Peers with a connection for blobs.
    pub fn connected(&self) -> Vec<PeerId> {
        self.pool.connected()
    }

    /// Gets a blob: a long one from all providers at once, else from the first that gives it, each for as long as it keeps sending, but no
    /// longer than a [`TURNS`]th of the time while there are others. All within `deadline`.
    pub async fn fetch(
        &self,
        hash: Hash,
        max_len: u64,
        providers: &[PeerId],
        deadline: Duration,
    ) -> Result<(), FetchError> {
        let mut attempts = Vec::new();
        let fetched = self.fetch_from_any(hash, max_len, providers, deadline, &mut attempts);
        let outcome = timeout(deadline, fetched).await;
        outcome.unwrap_or(Err(FetchError::Timeout {
            hash,
            limit: deadline,
            attempts,
        }))
    }

    async fn fetch_from_any(
        &self,
        hash: Hash,
        max_len: u64,
        providers: &[PeerId],
        deadline: Duration,
        attempts: &mut Vec<(PeerId, String)>,
    ) -> Result<(), FetchError> {
        self.protect(hash);
        let status = self
            .store
            .status(iroh(hash))
            .await
            .map_err(|error| FetchError::Store(error.to_string()))?;
        if let BlobStatus::Complete { size } = status {
            return self.within(hash, max_len, size);
        }
        let _permit = self
            .transfers
            .acquire()
            .await
            .map_err(|error| FetchError::Store(error.to_string()))?;
        self.fetch_pieces(hash, max_len, providers, attempts).await?;
        // Whoever failed already is asked again only after everyone else.
        let failed: HashSet<PeerId> = attempts.iter().map(|(peer, _)| *peer).collect();
        let (again, first): (Vec<PeerId>, Vec<PeerId>) = providers.iter().partition(|peer| failed.contains(peer));
        let all = first.into_iter().chain(again).collect();
        match self
            .by_turns(hash, Asked::Whole { max_len }, all, deadline, attempts)
            .await
        {
            Ok(true) => {
                self.protect(hash);
                self.counters.fetched.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Ok(false) => Err(FetchError::NotFound {
                hash,
                attempts: std::mem::take(attempts),
            }),
            Err(found) => self.within(hash, max_len, found),
        }
    }

    /// Asks each in turn until one gives it; who was only late is asked again after the others, and the last who is left has all the time that is
    /// left. Whether it came; an error is the length of a blob that is too long.
    async fn by_turns(
        &self,
        hash: Hash,
        asked: Asked<'_>,
        mut providers: VecDeque<PeerId>,
        deadline: Duration,
        attempts: &mut Vec<(PeerId, String)>,
    ) -> Result<bool, u64> {
        while let Some(provider) = providers.pop_front() {
            let turn = if providers.is_empty() {
                deadline
            } else {
                deadline / TURNS
            };
            let give = async {
                match asked {
                    Asked::Whole { max_len } => self.fetch_from(hash, max_len, provider).await,
                    Asked::Part { len, wanted } => self.fetch_part(hash, len, wanted, provider).await,
                }
            };
            let failed = match timeout(turn, give).await {
                Ok(Ok(())) => return Ok(true),
                Ok(Err(Attempt::TooLong(found))) => {
                    self.gave_up();
                    return Err(found);
                }
                Ok(Err(attempt)) => attempt.to_string(),
                Err(_) => {
                    providers.push_back(provider);
                    format!("it took longer than {turn:?}")
                }
            };
            self.gave_up();
            attempts.retain(|(peer, _)| *peer != provider);
            attempts.push((provider, failed));
        }
        Ok(false)
    }

    fn within(&self, hash: Hash, max_len: u64, found: u64) -> Result<(), FetchError> {
        if found <= max_len {
            return Ok(());
        }
        self.counters.too_long.fetch_add(1, Ordering::Relaxed);
        Err(FetchError::TooLong {
            hash,
            expected: max_len,
            found,
        })
    }

    /// Gets from one provider what is missing. What has arrived stays, verified, when it fails in the middle.
    async fn fetch_from(&self, hash: Hash, max_len: u64, provider: PeerId) -> Result<(), Attempt> {
        let local = self.store.remote().local(iroh(hash)).await.map_err(failed)?;
        if local.is_complete() {
            return Ok(());
        }
        let (connection, size) = self.prove_length(hash, provider).await?;
        if size > max_len {
            return Err(Attempt::TooLong(size));
        }
        self.get_ranges(hash, size, connection, local.missing()).await?;
        if self.has(hash).await {
            Ok(())
        } else {
            Err(Attempt::Failed("it gave only a part".into()))
        }
    }

    /// Gets some ranges of chunks (1024 bytes each) of a blob whose length is known, from the first provider that gives them, and returns them
    /// with the hashes that prove them, in the format of verified streaming.
    pub async fn fetch_ranges(
        &self,
        hash: Hash,
        len: u64,
        ranges: &[std::ops::Range<u64>],
        providers: &[PeerId],
        deadline: Duration,
    ) -> Result<Bytes, FetchError> {
        self.protect(hash);
        let wanted = chunks(ranges);
        let mut attempts = Vec::new();
        let fetched = self.part_from_any(hash, len, &wanted, providers, deadline, &mut attempts);
        match timeout(deadline, fetched).await {
            Ok(true) => self.proof(hash, wanted).await,
            Ok(false) => Err(FetchError::NotFound { hash, attempts }),
            Err(_) => Err(FetchError::Timeout {
                hash,
                limit: deadline,
                attempts,
            }),
        }
    }

    /// Whether all of the part is here in the end.
    async fn part_from_any(
        &self,
        hash: Hash,
        len: u64,
        wanted: &ChunkRanges,
        providers: &[PeerId],
        deadline: Duration,
        attempts: &mut Vec<(PeerId, String)>,
    ) -> bool {
        let held = self.missing_of(hash, wanted).await;
        if held.is_ok_and(|missing| missing.is_empty()) {
            return true;
        }
        let providers = providers.iter().copied().collect();
        let part = Asked::Part { len, wanted };
        self.by_turns(hash, part, providers, deadline, attempts).await == Ok(true)
    }

    async fn missing_of(&self, hash: Hash, wanted: &ChunkRanges) -> Result<ChunkRanges, Attempt> {
        let held = self.store.observe(iroh(hash)).await.map_err(failed)?.ranges;
        Ok(wanted.clone() - &held)
    }

    async fn fetch_part(&self, hash: Hash, len: u64, wanted: &ChunkRanges, provider: PeerId) -> Result<(), Attempt> {
        let missing = self.missing_of(hash, wanted).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let (connection, size) = self.prove_length(hash, provider).await?;
        if size != len {
            return Err(Attempt::Failed(format!(
                "it proved a length of {size} bytes, expected {len}"
            )));
        }
        let request = GetRequest::blob_ranges(iroh(hash), missing);
        self.get_ranges(hash, size, connection, request).await
    }

    /// What is held of a blob, with its proof.
    async fn proof(&self, hash: Hash, wanted: ChunkRanges) -> Result<Bytes, FetchError> {
        let export = self.store.export_bao(iroh(hash), wanted).bao_to_vec().await;
        export
            .map(Bytes::from)
            .map_err(|error| FetchError::Store(error.to_string()))
    }

    async fn connect(&self, provider: PeerId) -> Result<Connection, Attempt> {
        self.pool
            .get(provider, STALL)
            .await
            .map_err(|error| Attempt::Failed(error.to_string()))
    }

    /// A provider's connection, and the length that it proves by the last chunk. Before anything else is asked for: a stream once begun
    /// would fill its window.
    async fn prove_length(&self, hash: Hash, provider: PeerId) -> Result<(Connection, u64), Attempt> {
        let connection = self.connect(provider).await?;
        let (size, _) = steady(async { get_verified_size(&connection, &iroh(hash)).await.map_err(|_| none()) }).await?;
        Ok((connection, size))
    }

    /// Gets what a request names of a blob of this length. Every chunk is verified and stored as it comes.
    async fn get_ranges(
        &self,
        hash: Hash,
        size: u64,
        connection: Connection,
        request: GetRequest,
    ) -> Result<(), Attempt> {
        let request = fsm::start(connection, request, Default::default());
        let header = steady(async {
            match request.next().await.map_err(failed)?.next().await.map_err(failed)? {
                ConnectedNext::StartRoot(root) => root.next().next().await.map_err(|_| none()),
                _ => Err(Attempt::Failed("it answered another question".into())),
            }
        });
        let (mut content, announced) = header.await?;
        let size = NonZeroU64::new(announced).filter(|_| announced == size);
        // The empty blob never comes here: every store holds it.
        let size = size
            .ok_or_else(|| Attempt::Failed(format!("it announced {announced} bytes after proving another length")))?;
        let import = self.store.import_bao(iroh(hash), size, 64).await.map_err(failed)?;
        let mut received = 0;
        let end = loop {
            match steady(async { Ok(content.next().await) }).await? {
                BlobContentNext::More((next, item)) => {
                    import.tx.send(item.map_err(failed)?).await.map_err(failed)?;
                    content = next;
                    let total = content.stats().payload_bytes_read;
                    self.received(total - received).await;
                    received = total;
                    // A long transfer must not become garbage on the way.
                    self.protect(hash);
                }
                BlobContentNext::Done(end) => break end,
            }
        };
        drop(import.tx);
        import.rx.await.map_err(failed)?.map_err(failed)?;
        if let fsm::EndBlobNext::Closing(closing) = end.next() {
            // All that was asked for is here; how the stream ends does not matter.
            let _ = timeout(STALL, closing.next()).await;
        }
        Ok(())
    }

    fn gave_up(&self) {
        self.counters.failed_providers.fetch_add(1, Ordering::Relaxed);
    }

    async fn received(&self, bytes: u64) {
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(rate) = self.download.as_ref().filter(|_| bytes > 0) {
            rate.take(bytes).await;
        }
    }

    /// Everything else is garbage from now on, except what has only just come.
    pub fn retain(&self, keep: &HashSet<Hash>) {
        let mut state = self.keep();
        state.wanted = keep.iter().map(|&hash| iroh(hash)).collect();
        // Collection runs only while everything newer than this list still counts as fresh.
        state.due_until = Some(Instant::now() + FRESH);
    }

    /// Where the store is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes that the store takes on disk.
    pub async fn disk_bytes(&self) -> u64 {
        let folder = self.folder.clone();
        tokio::task::spawn_blocking(move || folder_bytes(&folder))
            .await
            .unwrap_or(0)
    }

    /// What became of fetches.
    pub fn counters(&self) -> FetchCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FetchCounters {
            fetched: read(&self.counters.fetched),
            bytes: read(&self.counters.bytes),
            failed_providers: read(&self.counters.failed_providers),
            too_long: read(&self.counters.too_long),
        }
    }

    fn protect(&self, hash: Hash) {
        self.keep().fresh.insert(iroh(hash), Instant::now());
    }

    fn keep(&self) -> MutexGuard<'_, Keep> {
        self.keep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: impl std::fmt::Display) -> NetError {
        NetError::Blobs {
            folder: self.folder.clone(),
            reason: error.to_string(),
        }
    }
}

/// Why one provider did not do.
#[derive(Debug, thiserror::Error)]
enum Attempt {
    #[error("it proved a length of {0} bytes")]
    TooLong(u64),
    #[error("{0}")]
    Failed(String),
}

/// What is asked of providers, of one blob.
#[derive(Clone, Copy)]
enum Asked<'a> {
    /// All of it, of at most so many bytes.
    Whole { max_len: u64 },
    /// These chunks, where its length is known.
    Part { len: u64, wanted: &'a ChunkRanges },
}

/// Ranges of chunks as the store has them.
pub(super) fn chunks(ranges: &[std::ops::Range<u64>]) -> ChunkRanges {
    let each = ranges.iter().cloned().map(ChunkRanges::chunks);
    each.fold(ChunkRanges::empty(), |all, range| all | range)
}

fn none() -> Attempt {
    Attempt::Failed("it has none of it".to_owned())
}

fn failed(error: impl std::fmt::Display) -> Attempt {
    Attempt::Failed(error.to_string())
}

/// A step that must not take longer than [`STALL`].
async fn steady<T>(step: impl Future<Output = Result<T, Attempt>>) -> Result<T, Attempt> {
    timeout(STALL, step)
        .await
        .unwrap_or_else(|_| Err(Attempt::Failed(format!("silent for {STALL:?}"))))
}

fn iroh(hash: Hash) -> iroh_blobs::Hash {
    iroh_blobs::Hash::from_bytes(hash.0)
}

/// Every `interval`, collects what [`Keep`] does not name, while there may be something.
fn collector(keep: Arc<Mutex<Keep>>, interval: Duration, fresh: Duration) -> GcConfig {
    let add_protected: ProtectCb = Arc::new(move |live| {
        let outcome = mark(&mut keep.lock().unwrap_or_else(PoisonError::into_inner), live, fresh);
        Box::pin(std::future::ready(outcome))
    });
    GcConfig {
        interval,
        add_protected: Some(add_protected),
    }
}

fn mark(keep: &mut Keep, live: &mut HashSet<iroh_blobs::Hash>, fresh: Duration) -> ProtectOutcome {
    let now = Instant::now();
    keep.fresh.retain(|_, since| now.duration_since(*since) < fresh);
    live.extend(keep.wanted.iter().chain(keep.fresh.keys()).copied());
    if keep.due_until.is_some_and(|until| now < until) {
        ProtectOutcome::Continue
    } else {
        ProtectOutcome::Abort
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn only_what_is_neither_wanted_nor_fresh_is_collected() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Arc::new(Mutex::new(Keep::default()));
        let mut options = Options::new(dir.path());
        options.gc = Some(collector(keep.clone(), Duration::from_millis(50), FRESH));
        let store = FsStore::load_with_opts(dir.path().join("blobs.db"), options)
            .await
            .unwrap();
        let mut hashes = Vec::new();
        for content in [3, 4, 5] {
            let tag = store.add_bytes(vec![content; 100_000]).temp_tag().await.unwrap();
            hashes.push(tag.hash());
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(
            store.has(hashes[2]).await.unwrap(),
            "nothing goes before the first word on what is wanted"
        );
        {
            let mut keep = keep.lock().unwrap();
            keep.wanted.insert(hashes[0]);
            keep.fresh.insert(hashes[1], Instant::now());
            keep.due_until = Some(Instant::now() + FRESH);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while store.has(hashes[2]).await.unwrap() {
            assert!(Instant::now() < deadline, "garbage was not collected");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(store.has(hashes[0]).await.unwrap() && store.has(hashes[1]).await.unwrap());
        store.shutdown().await.unwrap();
    }
}
