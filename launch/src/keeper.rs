//! Models that a person wants to keep, beside those that the run needs: `kept/round-<N>` every so many rounds, the last few of them, and
//! `kept/best`, the one with the lowest loss on held-out text that this peer has measured. Each is a folder as `murmur export` writes it.
//!
//! A folder is written aside and renamed, so whatever has its name is whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use trainer::checkpoint::{export_hf, tokenizer_json};

use crate::held_out::HeldOut;
use crate::kit::Kit;
use crate::peer_dir::{PeerDir, PeerFile};

/// What is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The model of every so many rounds; 0 keeps none.
    every: u64,
    /// How many of those; 0 keeps all.
    last: u64,
    /// Whether the best is.
    best: bool,
}

impl Policy {
    /// A peer's.
    pub fn of(file: &PeerFile) -> Self {
        Self {
            every: file.keep_every.unwrap_or(0),
            last: file.keep_last.unwrap_or(0),
            best: file.keep_best.unwrap_or(false),
        }
    }

    /// Whether the model after this round is to be kept.
    pub fn wants(self, round: u64) -> bool {
        self.every > 0 && round > 0 && round.is_multiple_of(self.every)
    }

    /// Whether this peer has to measure for itself.
    pub fn measures(self) -> bool {
        self.best
    }
}

/// What is known of the best, in `kept/best/murmur.json`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Best {
    round: u64,
    loss: f64,
    bits_per_byte: f64,
}

/// Writes and clears away.
pub struct Keeper {
    folder: PathBuf,
    kit: Arc<Kit>,
    policy: Policy,
    best: Option<Best>,
}

/// Beside the model in `kept/best`.
const ABOUT: &str = "murmur.json";

impl Keeper {
    /// In a peer's directory.
    pub fn open(dir: &PeerDir, kit: Arc<Kit>, policy: Policy) -> Self {
        let folder = dir.path().join("kept");
        let read = fs::read(folder.join("best").join(ABOUT)).ok();
        Self {
            best: read.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            folder,
            kit,
            policy,
        }
    }

    /// Keeps the model after a round, and lets the oldest go.
    ///
    /// # Errors
    /// The disk.
    pub fn keep(&self, round: u64, theta: &[f32]) -> Result<()> {
        self.write(&name_of(round), theta, |_| Ok(()))?;
        if self.policy.last == 0 {
            return Ok(());
        }
        let mut rounds: Vec<u64> = rounds_in(&self.folder);
        rounds.sort_unstable();
        let old = rounds
            .len()
            .saturating_sub(usize::try_from(self.policy.last).unwrap_or(usize::MAX));
        for round in rounds.drain(..old) {
            let path = self.folder.join(name_of(round));
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Keeps the model after a round if none was better.
    ///
    /// # Errors
    /// The disk.
    pub fn consider(&mut self, round: u64, found: HeldOut, theta: &[f32]) -> Result<()> {
        let better = self.best.is_none_or(|best| found.loss < best.loss);
        if !self.policy.best || !better || !found.loss.is_finite() {
            return Ok(());
        }
        let best = Best {
            round,
            loss: found.loss,
            bits_per_byte: found.bits_per_byte,
        };
        self.write("best", theta, |folder| {
            Ok(fs::write(folder.join(ABOUT), serde_json::to_vec(&best)?)?)
        })?;
        self.best = Some(best);
        Ok(())
    }

    fn write(&self, name: &str, theta: &[f32], more: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (path, aside) = (self.folder.join(name), self.folder.join(format!(".{name}.new")));
        let write = || -> Result<()> {
            clear(&aside)?;
            let tokenizer = tokenizer_json(self.kit.data.manifest().tokenizer);
            export_hf(&aside, &self.kit.model, &self.kit.layout, theta, Some(&tokenizer))?;
            more(&aside)?;
            for entry in fs::read_dir(&aside)? {
                File::open(entry?.path())?.sync_all()?;
            }
            clear(&path)?;
            fs::rename(&aside, &path)?;
            File::open(&self.folder)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("cannot keep the model in {}", path.display()))
    }
}

fn name_of(round: u64) -> String {
    format!("round-{round}")
}

/// The rounds whose models a folder holds.
fn rounds_in(folder: &Path) -> Vec<u64> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("round-")?.parse().ok())
        .collect()
}

/// Removes a folder, if it is there.
fn clear(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_nothing_wants_nothing_and_another_every_so_many() {
        let nothing = Policy::of(&PeerFile::default());
        assert!((0..100).all(|round| !nothing.wants(round)) && !nothing.measures());
        let file = PeerFile {
            keep_every: Some(10),
            ..PeerFile::default()
        };
        let wanted: Vec<u64> = (0..35).filter(|&round| Policy::of(&file).wants(round)).collect();
        assert_eq!(wanted, [10, 20, 30]);
    }

    #[test]
    fn only_whole_folders_count_as_kept() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["round-7", "round-30", ".round-40.new", "best", "round-x"] {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        let mut rounds = rounds_in(temp.path());
        rounds.sort_unstable();
        assert_eq!(rounds, [7, 30]);
    }
}
