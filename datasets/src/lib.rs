//! Text in, token sequences out, addressed by content. This crate is a leaf: no tensors, no peers.
//!
//! In reading order:
//!
//! 1. [`tokenizer`]: text to token ids and back, as bytes or with GPT-2's vocabulary.
//! 2. [`source`](mod@source): files and folders to documents; refuses what is not text.
//! 3. [`prepare`](mod@prepare): documents to shards, with a held-out part that training never sees.
//! 4. [`manifest`]: the list of shards whose hash, the *root*, goes into a run's configuration.
//! 5. [`shard`]: the files in a data folder; checks, and installs what came from elsewhere.
//! 6. [`loader`]: a verified, memory-mapped data set; sequence *i* in O(1).
//! 7. [`sampler`]: `(seed, epoch, index) -> sequence`, a permutation in O(1) that anyone can replay.
//! 8. [`demo`]: the plays the demo trains on.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use datasets::{Dataset, Order, PrepareOptions, prepare};
//! let folder = tempfile::tempdir()?;
//! let text = folder.path().join("poem.txt");
//! std::fs::write(&text, "Shall I compare thee to a summer's day? ".repeat(50))?;
//!
//! let out = folder.path().join("data");
//! let options = PrepareOptions { seq_len: 64, held_out_permille: 100, ..PrepareOptions::default() };
//! let manifest = prepare(&[text], &out, &options)?;
//! let data = Dataset::open(&out, &manifest.root())?;
//!
//! let order = Order::new([7; 32], data.train_sequences());
//! let batch = data.batch(&order, 0, 4);
//! assert!(batch.iter().all(|sequence| sequence.len() == 64 + 1));
//! # Ok(())
//! # }
//! ```

pub mod demo;
pub mod loader;
pub mod manifest;
pub mod prepare;
pub mod sampler;
pub mod shard;
pub mod source;
pub mod tokenizer;

pub use loader::{Dataset, OpenError};
pub use manifest::{Manifest, ManifestError, ShardInfo};
pub use prepare::{PrepareError, PrepareOptions, prepare};
pub use sampler::Order;
pub use shard::{InstallError, install_manifest, install_shard, manifest_path, missing, shard_path};
pub use source::SourceError;
pub use tokenizer::{Tokenizer, TokenizerKind};
