//! A peer's disk: the chain of decided records, the chain state, and the write-ahead log.
//!
//! | file | what |
//! |---|---|
//! | `records.redb` | records with certificates, chain states, voided records, small facts |
//! | `wal/log` | what was signed in the round in progress |
//! | `lock` | one process at a time |
//!
//! Every write is one durable transaction: after a power loss a record is there with its state, or neither is. One process writes;
//! any number may read beside it ([`Store::open_read_only`]), which is what `murmur status` does while a peer runs.
//! Nothing read from disk is believed: a record that does not decode is named by its round.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use redb::{
    Builder, ConcurrencyMode, Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase, ReadableTable,
    TableDefinition,
};

use crate::protocol::replayed::Traces;
use crate::types::{Branch, Decided, Hash, Round};
use crate::wire::Canonical;

mod lock;
mod wal;

use lock::DirLock;
use wal::Wal;

/// Bytes of pages kept in memory. The library's own gibibyte would fill with what is never read again.
const CACHE: usize = 4 << 20;

/// Round -> canonical [`Decided`], on the current branch.
const RECORDS: TableDefinition<u64, &[u8]> = TableDefinition::new("records");
/// Record hash -> round, on the current branch.
const INDEX: TableDefinition<[u8; 32], u64> = TableDefinition::new("index");
/// Round -> chain state after it: the latest one and those kept.
const STATES: TableDefinition<u64, &[u8]> = TableDefinition::new("states");
/// Rounds whose state outlives the next record.
const KEPT: TableDefinition<u64, ()> = TableDefinition::new("kept");
/// Record hash -> canonical [`Decided`] of a branch that lost (R21).
const VOID: TableDefinition<[u8; 32], &[u8]> = TableDefinition::new("void");
/// Small facts by name.
/// Where the small facts have this peer's traces.
const TRACES: &str = "traces";
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

/// What went wrong with a peer's directory.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process works in it.
    #[error("directory {} is in use by process {process}", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The other process's id, or "(unknown)".
        process: String,
    },
    /// Deleted under the process that works in it.
    #[error(
        "the peer's directory was deleted while the peer ran: its key and records are gone, and what is written now is lost"
    )]
    Deleted,
    /// No records there.
    #[error("no records in {}: expected the file {}", dir.display(), dir.join("records.redb").display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// A record's bytes are not those of a record.
    #[error("record {round} cannot be read: {reason}")]
    Record {
        /// Its round.
        round: Round,
        /// What is wrong.
        reason: String,
    },
    /// Records are stored in order.
    #[error("record out of order: expected round {expected}, found {found}")]
    Order {
        /// The round that may come next.
        expected: Round,
        /// The round given.
        found: Round,
    },
    /// Opened for reading alone.
    #[error("the directory was opened for reading")]
    ReadOnly,
    /// The database file is damaged.
    #[error("the record store is damaged: {0}")]
    Damaged(String),
    /// The database refused; a full disk comes here or as [`StoreError::Io`].
    #[error("record store: {0}")]
    Database(Box<redb::Error>),
    /// The file system refused.
    #[error("disk: {0}")]
    Io(#[from] std::io::Error),
}

macro_rules! from_redb {
    ($($error:ident)*) => {$(
        impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                match redb::Error::from(error) {
                    redb::Error::Corrupted(what) => Self::Damaged(what),
                    redb::Error::Io(error) => Self::Io(error),
                    error => Self::Database(Box::new(error)),
                }
            }
        }
    )*};
}
from_redb!(DatabaseError TransactionError TableError StorageError CommitError);

enum Backend {
    Writer {
        database: Database,
        wal: Mutex<Wal>,
        lock: DirLock,
    },
    Reader(ReadOnlyDatabase),
    /// A private copy of a database that a crash left unfinished; its file goes with it.
    Copy {
        database: Database,
        _folder: TemporaryFolder,
    },
}

/// The store. Calls block on the disk; from async code use `spawn_blocking` or a thread of its own.
pub struct Store {
    backend: Backend,
}

impl Store {
    /// Opens or creates the store of the peer in `dir` (created if absent) and locks the directory.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another process has it, [`StoreError::Damaged`] if the file is not a sound database (see
    /// [`Store::set_aside`]).
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir)?;
        let lock = DirLock::acquire(dir)?;
        let database = guarded(|| {
            let database = Builder::new()
                .set_concurrency_mode(ConcurrencyMode::SingleWriter)
                .set_check_integrity_on_open(true)
                .set_cache_size(CACHE)
                .create(dir.join("records.redb"))?;
            create_tables(&database)?;
            Ok(database)
        })?;
        let wal = Mutex::new(Wal::open(dir)?);
        Ok(Self {
            backend: Backend::Writer { database, wal, lock },
        })
    }

    /// Whether the directory is still there. Files that are open go on working without a name, so writing alone never tells.
    ///
    /// # Errors
    /// [`StoreError::Deleted`].
    pub fn must_be_there(&self) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Writer { lock, .. } if !lock.is_there() => Err(StoreError::Deleted),
            _ => Ok(()),
        }
    }

    /// Opens the records in `dir` for reading, also while a peer runs there. Writes nothing into `dir`; a database left unfinished
    /// by a crash is read through a private, repaired copy.
    pub fn open_read_only(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("records.redb");
        if !path.is_file() {
            return Err(StoreError::Missing { dir: dir.to_owned() });
        }
        let shared = guarded(|| {
            Ok(Builder::new()
                .set_concurrency_mode(ConcurrencyMode::SingleWriter)
                .open_read_only(&path)?)
        });
        let backend = match shared {
            Ok(database) => Backend::Reader(database),
            Err(_) => {
                let folder = TemporaryFolder::create()?;
                let copy = folder.0.join("records.redb");
                std::fs::copy(&path, &copy)?;
                let database = guarded(|| {
                    let database = Builder::new().create(&copy)?;
                    create_tables(&database)?;
                    Ok(database)
                })?;
                Backend::Copy {
                    database,
                    _folder: folder,
                }
            }
        };
        Ok(Self { backend })
    }

    /// Moves a damaged `records.redb` out of the way, so that [`Store::open`] starts afresh and the peer fetches its records from
    /// the others. Returns where it went.
    pub fn set_aside(dir: &Path) -> Result<PathBuf, StoreError> {
        let _lock = DirLock::acquire(dir)?;
        let target = (0..u32::MAX)
            .map(|number| dir.join(format!("records.redb.damaged-{number}")))
            .find(|path| !path.exists())
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::AlreadyExists))?;
        std::fs::rename(dir.join("records.redb"), &target)?;
        Ok(target)
    }

    /// Stores a decided record and the chain state after it, in one durable transaction. The state of the record before goes,
    /// unless it is kept ([`Store::keep_state`]). Storing the tip again replaces it (another certificate, the same record).
    ///
    /// # Errors
    /// [`StoreError::Order`] if it is not the round after the tip; an empty store takes any round.
    pub fn put(&self, decided: &Decided, state: &[u8]) -> Result<(), StoreError> {
        let round = decided.record.slot.round;
        let hash = decided.record.hash();
        let write = self.database()?.begin_write()?;
        {
            let mut records = write.open_table(RECORDS)?;
            let mut index = write.open_table(INDEX)?;
            if let Some(tip) = tip_of(&records)? {
                let again = round == tip.1 && hash == tip.2;
                if !again && round != tip.1.next() {
                    return Err(StoreError::Order {
                        expected: tip.1.next(),
                        found: round,
                    });
                }
            }
            records.insert(round.0, decided.to_canonical().as_slice())?;
            index.insert(hash.0, round.0)?;
            let mut states = write.open_table(STATES)?;
            let kept = write.open_table(KEPT)?;
            let mut stale = Vec::new();
            for entry in states.range(..round.0)? {
                let round = entry?.0.value();
                if kept.get(round)?.is_none() {
                    stale.push(round);
                }
            }
            for round in stale {
                states.remove(round)?;
            }
            states.insert(round.0, state)?;
        }
        Ok(write.commit()?)
    }

    /// The state after this round stays when later records come (a snapshot's).
    pub fn keep_state(&self, round: Round) -> Result<(), StoreError> {
        self.write(KEPT, |kept| Ok(kept.insert(round.0, ()).map(drop)?))
    }

    /// Forgets the kept states of rounds below `round`; the latest state always stays.
    pub fn release_states_below(&self, round: Round) -> Result<(), StoreError> {
        let tip = self.tip()?.map(|tip| tip.1.0);
        let write = self.database()?.begin_write()?;
        {
            let mut kept = write.open_table(KEPT)?;
            let mut states = write.open_table(STATES)?;
            kept.retain(|kept, ()| kept >= round.0)?;
            states.retain(|state, _| state >= round.0 || Some(state) == tip)?;
        }
        Ok(write.commit()?)
    }

    /// Up to `max` records from `from` on, in order, on the current branch.
    ///
    /// # Errors
    /// [`StoreError::Record`] names the first round that cannot be read.
    pub fn records(&self, from: Round, max: u32) -> Result<Vec<Decided>, StoreError> {
        self.read(|read| {
            let table = read.open_table(RECORDS)?;
            let mut records = Vec::new();
            for entry in table.range(from.0..)?.take(max as usize) {
                let (round, bytes) = entry?;
                records.push(decode(Round(round.value()), bytes.value())?);
            }
            Ok(records)
        })
    }

    /// The record of one round on the current branch.
    pub fn record(&self, round: Round) -> Result<Option<Decided>, StoreError> {
        self.read(|read| {
            let bytes = read.open_table(RECORDS)?.get(round.0)?;
            bytes.map(|bytes| decode(round, bytes.value())).transpose()
        })
    }

    /// The record with this hash on the current branch.
    pub fn by_hash(&self, hash: Hash) -> Result<Option<Decided>, StoreError> {
        let round = self.read(|read| Ok(read.open_table(INDEX)?.get(hash.0)?.map(|round| Round(round.value()))))?;
        round.map_or(Ok(None), |round| self.record(round))
    }

    /// A record of a branch that lost (R21).
    pub fn voided(&self, hash: Hash) -> Result<Option<Decided>, StoreError> {
        self.read(|read| {
            let bytes = read.open_table(VOID)?.get(hash.0)?;
            bytes.map(|bytes| decode(Round(0), bytes.value())).transpose()
        })
    }

    /// Branch, round and hash of the newest record.
    pub fn tip(&self) -> Result<Option<(Branch, Round, Hash)>, StoreError> {
        self.read(|read| tip_of(&read.open_table(RECORDS)?))
    }

    /// The chain state after `round`, if it is the newest or kept.
    pub fn state(&self, round: Round) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|read| {
            Ok(read
                .open_table(STATES)?
                .get(round.0)?
                .map(|bytes| bytes.value().to_vec()))
        })
    }

    /// The newest stored state at or below `round`, with its round: where a replay starts.
    pub fn state_at_or_below(&self, round: Round) -> Result<Option<(Round, Vec<u8>)>, StoreError> {
        self.read(|read| {
            let states = read.open_table(STATES)?;
            let last = states.range(..=round.0)?.next_back().transpose()?;
            Ok(last.map(|(round, bytes)| (Round(round.value()), bytes.value().to_vec())))
        })
    }

    /// Leaves a branch: records above `round` become void, and their states go. In one transaction.
    pub fn truncate_above(&self, round: Round) -> Result<(), StoreError> {
        let write = self.database()?.begin_write()?;
        {
            let mut records = write.open_table(RECORDS)?;
            let mut index = write.open_table(INDEX)?;
            let mut void = write.open_table(VOID)?;
            let (mut hashes, above) = (Vec::new(), round.0.saturating_add(1)..);
            for entry in records.range(above.clone())? {
                let (round, bytes) = entry?;
                let hash = decode(Round(round.value()), bytes.value())?.record.hash();
                void.insert(hash.0, bytes.value())?;
                hashes.push(hash);
            }
            for hash in hashes {
                index.remove(hash.0)?;
            }
            records.retain_in(above.clone(), |_, _| false)?;
            write.open_table(STATES)?.retain_in(above.clone(), |_, _| false)?;
            write.open_table(KEPT)?.retain_in(above, |_, ()| false)?;
        }
        Ok(write.commit()?)
    }

    /// A small fact by name.
    pub fn meta_get(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|read| Ok(read.open_table(META)?.get(name)?.map(|bytes| bytes.value().to_vec())))
    }

    /// Stores a small fact, durably.
    pub fn meta_put(&self, name: &str, value: &[u8]) -> Result<(), StoreError> {
        self.write(META, |meta| Ok(meta.insert(name, value).map(drop)?))
    }

    /// This peer's traces, and which auditors it answered; none if they are of another version.
    pub fn traces(&self) -> Result<Traces, StoreError> {
        let bytes = self.meta_get(TRACES)?;
        Ok(bytes
            .and_then(|bytes| Traces::from_canonical(&bytes).ok())
            .unwrap_or_default())
    }

    /// Stores them, durably.
    pub fn keep_traces(&self, traces: &Traces) -> Result<(), StoreError> {
        self.meta_put(TRACES, &traces.to_canonical())
    }

    /// Appends to the write-ahead log; on disk when this returns `Ok`.
    pub fn wal_append(&self, entry: &[u8]) -> Result<(), StoreError> {
        Ok(self.wal()?.append(entry)?)
    }

    /// Whether the log was not there when the store was opened: whoever was a member before can't know what it signed (R19).
    ///
    /// # Errors
    /// The store is read-only.
    pub fn wal_was_lost(&self) -> Result<bool, StoreError> {
        Ok(self.wal()?.created())
    }

    /// The log's whole entries, oldest first; a torn or corrupt tail was cut off when the store was opened.
    pub fn wal_entries(&self) -> Result<Vec<Vec<u8>>, StoreError> {
        Ok(self.wal()?.entries().to_vec())
    }

    /// Empties the log.
    pub fn wal_clear(&self) -> Result<(), StoreError> {
        Ok(self.wal()?.clear()?)
    }

    fn database(&self) -> Result<&Database, StoreError> {
        match &self.backend {
            Backend::Writer { database, .. } => Ok(database),
            Backend::Reader(_) | Backend::Copy { .. } => Err(StoreError::ReadOnly),
        }
    }

    fn wal(&self) -> Result<MutexGuard<'_, Wal>, StoreError> {
        match &self.backend {
            // The log's own invariants hold after each of its steps, so a panic elsewhere under the lock spoils nothing.
            Backend::Writer { wal, .. } => Ok(wal.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
            Backend::Reader(_) | Backend::Copy { .. } => Err(StoreError::ReadOnly),
        }
    }

    fn read<T>(&self, body: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        guarded(|| {
            let read = match &self.backend {
                Backend::Writer { database, .. } | Backend::Copy { database, .. } => database.begin_read()?,
                Backend::Reader(database) => database.begin_read()?,
            };
            body(&read)
        })
    }

    fn write<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        table: TableDefinition<K, V>,
        body: impl FnOnce(&mut redb::Table<'_, K, V>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let write = self.database()?.begin_write()?;
        body(&mut write.open_table(table)?)?;
        Ok(write.commit()?)
    }
}

fn create_tables(database: &Database) -> Result<(), StoreError> {
    let write = database.begin_write()?;
    write.open_table(RECORDS)?;
    write.open_table(INDEX)?;
    write.open_table(STATES)?;
    write.open_table(KEPT)?;
    write.open_table(VOID)?;
    write.open_table(META)?;
    Ok(write.commit()?)
}

fn decode(round: Round, bytes: &[u8]) -> Result<Decided, StoreError> {
    let decided = Decided::from_canonical(bytes).map_err(|error| StoreError::Record {
        round,
        reason: error.to_string(),
    })?;
    let found = decided.record.slot.round;
    if round != Round(0) && found != round {
        return Err(StoreError::Record {
            round,
            reason: format!("expected round {round}, found round {found}"),
        });
    }
    Ok(decided)
}

fn tip_of(records: &impl ReadableTable<u64, &'static [u8]>) -> Result<Option<(Branch, Round, Hash)>, StoreError> {
    let Some((round, bytes)) = records.last()? else {
        return Ok(None);
    };
    let decided = decode(Round(round.value()), bytes.value())?;
    Ok(Some((
        decided.record.slot.branch,
        decided.record.slot.round,
        decided.record.hash(),
    )))
}

/// Runs `body`; a panic of the database over a damaged file becomes an error value.
fn guarded<T>(body: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    // A read leaves nothing of ours half done, and a transaction that unwinds is aborted.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(StoreError::Damaged(message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("not a sound database").to_owned()
}

/// A folder of this process's own under the system's temporary folder, removed when dropped.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn create() -> std::io::Result<Self> {
        let name = format!("murmur-{}-{:016x}", std::process::id(), rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // Nothing depends on the folder being gone.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests;
