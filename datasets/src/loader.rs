//! A verified data set in memory-mapped shards: any sequence in O(1), no index, nothing read twice.
//!
//! Opening checks everything once: the manifest against its root, each shard against its hash, each token against the
//! vocabulary. Afterwards reading cannot fail, so the training loop carries no error path for data.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::manifest::{Manifest, ManifestError, ShardInfo, hex};
use crate::sampler::Order;
use crate::shard::{manifest_path, shard_path};

/// Why a data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file is missing or unreadable.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The manifest is of another data set, or was changed.
    #[error("{} has root {}, expected {}", path.display(), hex(found), hex(expected))]
    WrongRoot {
        /// The manifest's file.
        path: PathBuf,
        /// The root asked for.
        expected: [u8; 32],
        /// The root found.
        found: [u8; 32],
    },
    /// The manifest has the right root and cannot be used.
    #[error("{}: {source}", path.display())]
    Manifest {
        /// The manifest's file.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A shard's content is not what its name says: torn, or tampered with.
    #[error("shard {} is damaged: its {found_bytes} bytes hash to {}; remove it and fetch it again", path.display(), hex(found))]
    DamagedShard {
        /// The shard's file.
        path: PathBuf,
        /// The hash it should have.
        expected: [u8; 32],
        /// The hash it has.
        found: [u8; 32],
        /// Its size in bytes.
        found_bytes: u64,
    },
    /// A shard has the right hash, but not the size its manifest says.
    #[error("shard {} has {found} bytes, its manifest says {expected}", path.display())]
    WrongLength {
        /// The shard's file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// A shard holds a token that the vocabulary lacks: a model would read outside its table.
    #[error("shard {} holds token {found}; the vocabulary has {vocab_size}", path.display())]
    TokenOutOfRange {
        /// The shard's file.
        path: PathBuf,
        /// The token.
        found: u32,
        /// Ids must be below it.
        vocab_size: usize,
    },
}

impl OpenError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// A data set, open and verified.
#[derive(Debug)]
pub struct Dataset {
    manifest: Manifest,
    train: Vec<Mmap>,
    held_out: Vec<Mmap>,
}

impl Dataset {
    /// Opens the data set with this root in the folder `dir`; reads and checks every byte of it.
    pub fn open(dir: &Path, root: &[u8; 32]) -> Result<Self, OpenError> {
        let manifest = read_manifest(dir, root)?;
        let mut train = Vec::with_capacity(manifest.shards.len());
        for shard in &manifest.shards {
            train.push(map_shard(dir, &manifest, shard)?);
        }
        let held_out = train.split_off(manifest.train_shards());
        Ok(Self {
            manifest,
            train,
            held_out,
        })
    }

    /// How the data set was made, and of which shards it consists.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of training sequences; at least one.
    pub fn train_sequences(&self) -> u64 {
        self.manifest.train_sequences()
    }

    /// Number of held-out sequences; zero when nothing was held out.
    pub fn held_out_sequences(&self) -> u64 {
        self.manifest.held_out_sequences()
    }

    /// Training sequence `i`: `seq_len + 1` tokens, the inputs and, one further on, their targets.
    ///
    /// # Panics
    /// If `i` is not below [`train_sequences`](Self::train_sequences).
    pub fn train(&self, i: u64) -> Vec<u32> {
        assert!(
            i < self.train_sequences(),
            "training sequence {i} of {}",
            self.train_sequences()
        );
        self.read(&self.train, i)
    }

    /// Held-out sequence `i`: `seq_len + 1` tokens.
    ///
    /// # Panics
    /// If `i` is not below [`held_out_sequences`](Self::held_out_sequences).
    pub fn held_out(&self, i: u64) -> Vec<u32> {
        assert!(
            i < self.held_out_sequences(),
            "held-out sequence {i} of {}",
            self.held_out_sequences()
        );
        self.read(&self.held_out, i)
    }

    /// The `n` training sequences from `position` on, in this order; into the next epoch where one ends.
    /// Shape: `[n, seq_len + 1]`.
    ///
    /// # Panics
    /// If the order is over more sequences than there are.
    pub fn batch(&self, order: &Order, position: u64, n: usize) -> Vec<Vec<u32>> {
        (position..)
            .take(n)
            .map(|position| self.train(order.at(position)))
            .collect()
    }

    /// Reads sequence `i` of a part. It may lie across the border of shards, and short shards make it lie across several.
    fn read(&self, shards: &[Mmap], i: u64) -> Vec<u32> {
        let span = self.manifest.shard_tokens;
        let mut token = i * self.manifest.seq_len as u64;
        let mut left = self.manifest.seq_len + 1;
        let mut sequence = Vec::with_capacity(left);
        while left > 0 {
            // Within bounds: a part has `tokens` tokens in full shards but the last, and the caller checked `i`.
            let bytes = &shards[(token / span) as usize];
            let start = (token % span) as usize;
            let taken = left.min(bytes.len() / self.manifest.token_bytes - start);
            let bytes = &bytes[start * self.manifest.token_bytes..(start + taken) * self.manifest.token_bytes];
            sequence.extend(tokens_of(bytes, self.manifest.token_bytes));
            token += taken as u64;
            left -= taken;
        }
        sequence
    }
}

/// The tokens in a shard's bytes.
fn tokens_of(bytes: &[u8], token_bytes: usize) -> impl Iterator<Item = u32> + '_ {
    // Little-endian, whatever the width.
    bytes
        .chunks_exact(token_bytes)
        .map(|token| token.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
}

fn read_manifest(dir: &Path, root: &[u8; 32]) -> Result<Manifest, OpenError> {
    let path = manifest_path(dir);
    let bytes = fs::read(&path).map_err(|e| OpenError::io(&path, e))?;
    let found = *blake3::hash(&bytes).as_bytes();
    if found != *root {
        return Err(OpenError::WrongRoot {
            path,
            expected: *root,
            found,
        });
    }
    Manifest::from_bytes(&bytes).map_err(|source| OpenError::Manifest { path, source })
}

fn map_shard(dir: &Path, manifest: &Manifest, shard: &ShardInfo) -> Result<Mmap, OpenError> {
    let path = shard_path(dir, &shard.hash);
    let file = File::open(&path).map_err(|e| OpenError::io(&path, e))?;
    // SAFETY: the map is read-only, and only integers are copied out of it, so any content is valid. Murmur changes no
    // shard in place: they are written aside and renamed (see `shard`), and a replaced file lives on under its map.
    let bytes = unsafe { Mmap::map(&file) }.map_err(|e| OpenError::io(&path, e))?;
    let found = *blake3::hash(&bytes).as_bytes();
    if found != shard.hash {
        return Err(OpenError::DamagedShard {
            path,
            expected: shard.hash,
            found,
            found_bytes: bytes.len() as u64,
        });
    }
    let expected = shard.tokens * manifest.token_bytes as u64;
    if bytes.len() as u64 != expected {
        return Err(OpenError::WrongLength {
            path,
            expected,
            found: bytes.len() as u64,
        });
    }
    let vocab_size = manifest.tokenizer.vocab_size();
    let stray = tokens_of(&bytes, manifest.token_bytes).find(|&token| token as usize >= vocab_size);
    match stray {
        Some(found) => Err(OpenError::TokenOutOfRange {
            path,
            found,
            vocab_size,
        }),
        None => Ok(bytes),
    }
}
