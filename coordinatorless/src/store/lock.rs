//! The exclusive lock on a peer's directory: one process at a time, and a message that names the other one.
//!
//! An advisory lock on `<dir>/lock` that the kernel drops with the process, so a crash leaves nothing to clean up. The file holds
//! the owner's process id, for the message alone: a stale id in an unlocked file means nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::StoreError;

/// Held for as long as this value lives.
#[derive(Debug)]
pub struct DirLock {
    file: File,
}

impl DirLock {
    /// Locks `dir`, or says which process has it.
    pub fn acquire(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::InUse {
                    dir: dir.to_owned(),
                    process: owner(&mut file),
                });
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { file })
    }

    /// Whether the lock file is still in the directory, as far as the file system tells: a deleted file has no name left.
    pub fn is_there(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.nlink() > 0)
    }
}

/// What the lock file says about its owner; 20 digits are enough for any process id.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(20).read_to_string(&mut text);
    let digits = text.trim();
    if read.is_ok() && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        digits.to_owned()
    } else {
        "(unknown)".to_owned()
    }
}
