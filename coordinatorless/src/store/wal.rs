//! The write-ahead log: what this peer has signed in the round in progress, on disk before anything of it leaves (R19).
//!
//! ```text
//! entry = length u32 LE | BLAKE3(length ‖ payload) 32 | payload
//! ```
//! A power loss may tear the last entry. Reading stops at the first entry that is not whole, and cuts it off, so that what is
//! appended next stands behind whole entries only.
//!
//! A log that is not there is not simply made: it takes its name only with its first entry in it, or when it is cleared. So a log
//! that was lost stays lost, however often the peer starts, until something is on disk that says so, or a decision makes it idle.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes before an entry's payload.
const HEADER: usize = 4 + 32;
/// What the file is called until it is the log.
const UNNAMED: &str = "log.new";

/// The log, open for appending.
#[derive(Debug)]
pub struct Wal {
    file: File,
    /// Where the last whole entry ends.
    end: u64,
    entries: Vec<Vec<u8>>,
    created: bool,
    /// The folder, while the file in it has not its name yet.
    unnamed: Option<PathBuf>,
}

impl Wal {
    /// Opens `<dir>/wal/log`, dropping a torn or corrupt tail, or prepares one that is not there.
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        let folder = dir.join("wal");
        std::fs::create_dir_all(&folder)?;
        let path = folder.join("log");
        let created = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(created)
            .truncate(created)
            .open(if created { folder.join(UNNAMED) } else { path })?;
        File::open(&folder)?.sync_all()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (entries, end) = parse(&bytes);
        if end < bytes.len() as u64 {
            tracing::warn!(
                kept = end,
                dropped = bytes.len() as u64 - end,
                "write-ahead log ends in a torn entry"
            );
            file.set_len(end)?;
            file.sync_data()?;
        }
        Ok(Self {
            file,
            end,
            entries,
            created,
            unnamed: created.then_some(folder),
        })
    }

    /// Gives the file its name, once what it holds is on disk.
    fn name(&mut self) -> std::io::Result<()> {
        if let Some(folder) = &self.unnamed {
            std::fs::rename(folder.join(UNNAMED), folder.join("log"))?;
            File::open(folder)?.sync_all()?;
            self.unnamed = None;
        }
        Ok(())
    }

    /// Whether there was no log before.
    pub fn created(&self) -> bool {
        self.created
    }

    /// The whole entries, oldest first.
    pub fn entries(&self) -> &[Vec<u8>] {
        &self.entries
    }

    /// Appends an entry; when this returns `Ok`, it is on disk. On an error (a full disk) the log is as it was.
    pub fn append(&mut self, payload: &[u8]) -> std::io::Result<()> {
        let length =
            u32::try_from(payload.len()).map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
        let mut entry = Vec::with_capacity(HEADER + payload.len());
        entry.extend_from_slice(&length.to_le_bytes());
        entry.extend_from_slice(checksum(length.to_le_bytes(), payload).as_bytes());
        entry.extend_from_slice(payload);
        let written = self
            .file
            .seek(SeekFrom::Start(self.end))
            .and_then(|_| self.file.write_all(&entry))
            .and_then(|()| self.file.sync_data())
            .and_then(|()| self.name());
        if let Err(error) = written {
            // Whatever part arrived would be dropped as a torn tail anyway; the first error is the one to tell.
            let _ = self.file.set_len(self.end);
            return Err(error);
        }
        self.end += entry.len() as u64;
        self.entries.push(payload.to_vec());
        Ok(())
    }

    /// Empties the log.
    pub fn clear(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.sync_data()?;
        self.name()?;
        self.end = 0;
        self.entries.clear();
        Ok(())
    }
}

fn checksum(length: [u8; 4], payload: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(&length).update(payload).finalize()
}

/// The whole entries at the start of `bytes`, and where they end.
fn parse(bytes: &[u8]) -> (Vec<Vec<u8>>, u64) {
    let mut entries = Vec::new();
    let mut end = 0;
    while let Some(payload) = entry(&bytes[end..]) {
        end += HEADER + payload.len();
        entries.push(payload.to_vec());
    }
    (entries, end as u64)
}

fn entry(bytes: &[u8]) -> Option<&[u8]> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let (length, expected) = header.split_first_chunk::<4>()?;
    let payload = rest.get(..u32::from_le_bytes(*length) as usize)?;
    (checksum(*length, payload).as_bytes() == expected).then_some(payload)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn entries_survive_reopening_and_clearing_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut wal = Wal::open(dir.path()).unwrap();
        wal.append(b"one").unwrap();
        wal.append(b"").unwrap();
        drop(wal);
        let mut wal = Wal::open(dir.path()).unwrap();
        assert_eq!(wal.entries(), [b"one".to_vec(), Vec::new()]);
        wal.clear().unwrap();
        drop(wal);
        assert!(Wal::open(dir.path()).unwrap().entries().is_empty());
    }

    #[test]
    fn a_lost_log_stays_lost_until_its_first_entry_or_until_it_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Wal::open(dir.path()).unwrap().created());
        let mut wal = Wal::open(dir.path()).unwrap();
        assert!(wal.created());
        wal.append(b"lost").unwrap();
        drop(wal);
        let wal = Wal::open(dir.path()).unwrap();
        assert!(!wal.created());
        assert_eq!(wal.entries(), [b"lost".to_vec()]);
        let dir = tempfile::tempdir().unwrap();
        Wal::open(dir.path()).unwrap().clear().unwrap();
        assert!(!Wal::open(dir.path()).unwrap().created());
    }

    #[test]
    fn a_log_cut_anywhere_keeps_its_whole_entries_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wal/log");
        let mut wal = Wal::open(dir.path()).unwrap();
        wal.append(b"first").unwrap();
        wal.append(b"second").unwrap();
        drop(wal);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut wal = Wal::open(dir.path()).unwrap();
            let kept = usize::from(cut >= HEADER + 5);
            assert_eq!(wal.entries().len(), kept, "cut at {cut}");
            wal.append(b"third").unwrap();
            drop(wal);
            let wal = Wal::open(dir.path()).unwrap();
            assert_eq!(wal.entries().last().unwrap(), b"third");
            assert_eq!(wal.entries().len(), kept + 1);
        }
    }

    #[test]
    fn a_flipped_bit_ends_the_log_before_its_entry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wal/log");
        let mut wal = Wal::open(dir.path()).unwrap();
        wal.append(b"first").unwrap();
        wal.append(b"second").unwrap();
        drop(wal);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            std::fs::write(&path, &bytes).unwrap();
            let expected = usize::from(at >= HEADER + 5);
            assert_eq!(
                Wal::open(dir.path()).unwrap().entries().len(),
                expected,
                "flipped at {at}"
            );
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_not_a_panic() {
        let file = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let mut wal = Wal {
            file,
            end: 0,
            entries: Vec::new(),
            created: false,
            unnamed: None,
        };
        assert_eq!(
            wal.append(b"anything").unwrap_err().kind(),
            std::io::ErrorKind::StorageFull
        );
        assert!(wal.entries().is_empty());
    }
}
