//! Documents to shards. The same texts and options give the same manifest on every machine.
//!
//! **The held-out part.** From the end of each document, in proportion to its length, tokens go to the held-out stream
//! instead of the training stream; so every kind of text is measured, and no token is in both. A document shorter than
//! one sequence is held out whole or not at all. The two streams are cut into shards of a fixed span each.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::manifest::{MAX_SEQ_LEN, MAX_SHARD_TOKENS, MAX_SHARDS, MIN_SHARD_TOKENS, Manifest, ShardInfo, VERSION};
use crate::shard::{manifest_path, missing, part_name, shard_path, write_whole};
use crate::source::{self, SourceError};
use crate::tokenizer::{Tokenizer, TokenizerKind};

/// Largest share of the text that may be held out, in thousandths.
pub const MAX_HELD_OUT_PERMILLE: u32 = 500;

/// How to cut a text into a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareOptions {
    /// The vocabulary. Default: bytes, which suits the demo's small model.
    pub tokenizer: TokenizerKind,
    /// Tokens of a training sequence, 1 to 2^20. Default: 256.
    pub seq_len: usize,
    /// Share of the tokens never trained on, in thousandths, 0 to 500. Default: 20.
    pub held_out_permille: u32,
    /// Tokens of a shard, 256 to 2^25. Default: 2^20, so that a shard is fetched within a second or two on a home line,
    /// and a newcomer can ask many peers at once.
    pub shard_tokens: u64,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            tokenizer: TokenizerKind::Bytes,
            seq_len: 256,
            held_out_permille: 20,
            shard_tokens: 1 << 20,
        }
    }
}

/// Why no data set was made. Nothing was left in the output folder.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// An option is out of bounds.
    #[error("{option} is {found}; it must be {low} to {high}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        found: u64,
        /// Least allowed.
        low: u64,
        /// Most allowed.
        high: u64,
    },
    /// No source was named.
    #[error("no text was named: give files or folders")]
    NoSources,
    /// A source is not text.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// There is too little text for a single sequence of a part.
    #[error("the {part} part has {found} tokens; one sequence needs {needed}: give more text or a shorter seq_len")]
    TooShort {
        /// `training` or `held-out`.
        part: &'static str,
        /// Tokens in it.
        found: u64,
        /// Tokens of one sequence, its last target included.
        needed: u64,
    },
    /// There is too much text for the shards' size.
    #[error("more than {limit} shards: raise shard_tokens")]
    TooManyShards {
        /// The bound.
        limit: usize,
    },
    /// The output folder holds something else.
    #[error("{} exists and is not this data set: remove it or name another folder", path.display())]
    OutputInUse {
        /// The folder.
        path: PathBuf,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl PrepareError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

impl PrepareOptions {
    /// Checks the bounds.
    fn check(&self) -> Result<(), PrepareError> {
        let bounds = [
            ("seq_len", self.seq_len as u64, 1, MAX_SEQ_LEN as u64),
            (
                "held_out_permille",
                self.held_out_permille.into(),
                0,
                MAX_HELD_OUT_PERMILLE.into(),
            ),
            ("shard_tokens", self.shard_tokens, MIN_SHARD_TOKENS, MAX_SHARD_TOKENS),
        ];
        for (option, found, low, high) in bounds {
            if !(low..=high).contains(&found) {
                return Err(PrepareError::Option {
                    option,
                    found,
                    low,
                    high,
                });
            }
        }
        Ok(())
    }
}

/// Makes a data set of text files and folders (see [`source::list`]) in the folder `out`.
///
/// It is written aside and appears whole. A folder that already holds exactly this data set is left as it is; any other
/// content is an error. Documents of the same text count once, so that no copy of a held-out text is trained on.
pub fn prepare(sources: &[PathBuf], out: &Path, options: &PrepareOptions) -> Result<Manifest, PrepareError> {
    options.check()?;
    if sources.is_empty() {
        return Err(PrepareError::NoSources);
    }
    let files = source::list(sources)?;
    let aside = aside_of(out);
    let made = write_dataset(&files, &aside, options).and_then(|manifest| publish(manifest, &aside, out));
    // What is still aside is either of no use (an error) or a second copy.
    match fs::remove_dir_all(&aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => tracing::warn!(path = %aside.display(), "not removed: {e}"),
        _ => {}
    }
    made
}

/// A folder beside `out`, on the same file system, for this call alone.
fn aside_of(out: &Path) -> PathBuf {
    out.parent().unwrap_or(Path::new("")).join(part_name())
}

/// Tokenizes every document into both streams and writes shards and manifest to `dir`.
fn write_dataset(files: &[PathBuf], dir: &Path, options: &PrepareOptions) -> Result<Manifest, PrepareError> {
    let tokenizer = Tokenizer::new(options.tokenizer);
    let mut split = Split::new(options);
    let mut train = Stream::new(dir, options);
    let mut held_out = Stream::new(dir, options);
    let (mut documents, mut text_bytes) = (0, 0);
    let mut known = HashSet::new();
    for file in files {
        let text = source::read(file)?;
        if !known.insert(blake3::hash(text.as_bytes())) {
            tracing::warn!(file = %file.display(), "passed over: another document has the same text");
            continue;
        }
        documents += 1;
        text_bytes += text.len() as u64;
        let mut tokens = tokenizer.encode(&text);
        tokens.push(options.tokenizer.end_of_document());
        let (first, last) = tokens.split_at(tokens.len() - split.held_out_of(tokens.len()));
        train.push(first)?;
        held_out.push(last)?;
    }
    let (train_tokens, mut shards) = train.finish()?;
    let (held_out_tokens, held_out_shards) = held_out.finish()?;
    shards.extend(held_out_shards);
    enough("training", train_tokens, options.seq_len)?;
    if options.held_out_permille > 0 {
        enough("held-out", held_out_tokens, options.seq_len)?;
    }
    if shards.len() > MAX_SHARDS {
        return Err(PrepareError::TooManyShards { limit: MAX_SHARDS });
    }
    let manifest = Manifest {
        version: VERSION,
        tokenizer: options.tokenizer,
        seq_len: options.seq_len,
        token_bytes: options.tokenizer.token_bytes(),
        shard_tokens: options.shard_tokens,
        documents,
        text_bytes,
        train_tokens,
        held_out_tokens,
        shards,
    };
    let path = manifest_path(dir);
    write_whole(&path, &manifest.to_bytes()).map_err(|e| PrepareError::io(&path, e))?;
    Ok(manifest)
}

fn enough(part: &'static str, found: u64, seq_len: usize) -> Result<(), PrepareError> {
    let needed = seq_len as u64 + 1;
    if found < needed {
        Err(PrepareError::TooShort { part, found, needed })
    } else {
        Ok(())
    }
}

/// Moves what was written aside to `out`.
fn publish(manifest: Manifest, aside: &Path, out: &Path) -> Result<Manifest, PrepareError> {
    // Onto nothing or an empty folder a rename succeeds; onto anything else it fails, and nothing is touched.
    let Err(error) = fs::rename(aside, out) else {
        return Ok(manifest);
    };
    if !out.exists() {
        return Err(PrepareError::io(out, error));
    }
    let same = fs::read(manifest_path(out)).is_ok_and(|bytes| bytes == manifest.to_bytes());
    if same && missing(out, &manifest).is_empty() {
        Ok(manifest)
    } else {
        Err(PrepareError::OutputInUse { path: out.to_owned() })
    }
}

/// Decides how many tokens of each document are held out, so that the share holds over all documents so far.
struct Split {
    permille: u64,
    seq_len: u64,
    seen: u64,
    held_out: u64,
}

impl Split {
    fn new(options: &PrepareOptions) -> Self {
        let permille = options.held_out_permille.into();
        Self {
            permille,
            seq_len: options.seq_len as u64,
            seen: 0,
            held_out: 0,
        }
    }

    /// How many of the next document's tokens to hold out, from its end.
    fn held_out_of(&mut self, tokens: usize) -> usize {
        self.seen += tokens as u64;
        let due = (u128::from(self.seen) * u128::from(self.permille) / 1000) as u64 - self.held_out;
        // Scraps would be torn from their context: wait until a whole sequence, or the whole document, is due.
        let taken = if due < (tokens as u64).min(self.seq_len + 1) {
            0
        } else {
            due.min(tokens as u64)
        };
        self.held_out += taken;
        taken as usize // at most `tokens`
    }
}

/// One part's tokens on their way into shards.
struct Stream<'a> {
    dir: &'a Path,
    kind: TokenizerKind,
    shard_bytes: usize,
    buffer: Vec<u8>,
    tokens: u64,
    shards: Vec<ShardInfo>,
}

impl<'a> Stream<'a> {
    fn new(dir: &'a Path, options: &PrepareOptions) -> Self {
        // At most 2^25 tokens of two bytes: options were checked.
        let shard_bytes = options.shard_tokens as usize * options.tokenizer.token_bytes();
        Self {
            dir,
            kind: options.tokenizer,
            shard_bytes,
            buffer: Vec::new(),
            tokens: 0,
            shards: Vec::new(),
        }
    }

    fn push(&mut self, tokens: &[u32]) -> Result<(), PrepareError> {
        for token in tokens {
            // Ids are below the vocabulary's size, so the bytes left off are zero.
            self.buffer
                .extend_from_slice(&token.to_le_bytes()[..self.kind.token_bytes()]);
            if self.buffer.len() == self.shard_bytes {
                self.write_shard()?;
            }
        }
        self.tokens += tokens.len() as u64;
        Ok(())
    }

    fn finish(mut self) -> Result<(u64, Vec<ShardInfo>), PrepareError> {
        if !self.buffer.is_empty() {
            self.write_shard()?;
        }
        Ok((self.tokens, self.shards))
    }

    fn write_shard(&mut self) -> Result<(), PrepareError> {
        let hash = *blake3::hash(&self.buffer).as_bytes();
        let path = shard_path(self.dir, &hash);
        write_whole(&path, &self.buffer).map_err(|e| PrepareError::io(&path, e))?;
        let tokens = (self.buffer.len() / self.kind.token_bytes()) as u64;
        self.shards.push(ShardInfo { hash, tokens });
        self.buffer.clear();
        Ok(())
    }
}
