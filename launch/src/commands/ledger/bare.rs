//! Records as they lie on disk, for `murmur ledger verify`.
//!
//! After a crash the database repairs itself when it is opened next: it checks every page, and where one differs it goes back to an older
//! commit or refuses the whole file. That is right for a peer, which fetches what it lost; but whoever verifies a ledger wants to be told
//! *which record* was changed. So a file that a crash left unfinished is copied, the copy's mark of that is taken away, and the records
//! are read from it as they are. Every one of them is checked against the chain anyway, so nothing read this way is believed.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use coordinatorless::store::Store;
use tempfile::TempDir;

/// The database's file in a peer's directory.
const FILE: &str = "records.redb";
/// Where redb's file format (version 3, `design.md`, "Database file format") has its flags: right behind the magic number.
const FLAGS_AT: u64 = 9;
/// "Recovery required" and "primary not flushed".
const UNFINISHED: u8 = 2 | 8;

/// Records to read, and the copy they are read from, if it is one.
pub struct Records {
    /// The records.
    pub store: Store,
    // Declared after the store: the copy goes when nobody reads it any more.
    _copy: Option<TempDir>,
}

/// Opens the records of a peer's directory, live or not, without repairing anything.
///
/// # Errors
/// There are none ([`coordinatorless::store::StoreError::Missing`]), or it is a file that cannot be read at all.
pub fn open(dir: &Path) -> Result<Records> {
    if is_unfinished(dir) && !is_live(dir) {
        let copy = unmarked(dir)?;
        // Pages that a crash tore apart can make even this fail; then the repaired records are what there is.
        if let Ok(store) = Store::open_read_only(copy.path()) {
            return Ok(Records {
                store,
                _copy: Some(copy),
            });
        }
    }
    Ok(Records {
        store: Store::open_read_only(dir)?,
        _copy: None,
    })
}

/// Whether a process has the directory: then the file's mark is that process's own, and the records are read beside it.
fn is_live(dir: &Path) -> bool {
    File::open(dir.join("lock")).is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn is_unfinished(dir: &Path) -> bool {
    let mut flags = [0];
    File::open(dir.join(FILE))
        .and_then(|file| file.read_exact_at(&mut flags, FLAGS_AT))
        .is_ok_and(|()| flags[0] & UNFINISHED != 0)
}

fn unmarked(dir: &Path) -> Result<TempDir> {
    let copy = tempfile::tempdir().context("no temporary folder for a copy of the records")?;
    let path = copy.path().join(FILE);
    std::fs::copy(dir.join(FILE), &path).with_context(|| format!("cannot copy {}", dir.join(FILE).display()))?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut flags = [0];
    file.read_exact_at(&mut flags, FLAGS_AT)?;
    file.write_all_at(&[flags[0] & !UNFINISHED], FLAGS_AT)?;
    Ok(copy)
}
