//! A model to speak, to be measured or to be written out: a peer's current one, or one from elsewhere.

use std::path::Path;

use anyhow::Result;
use coordinatorless::config::RunConfig;
use coordinatorless::types::Hash;
use datasets::TokenizerKind;
use gradient_verify::proof::{Identity, shape_of};
use trainer::arms::agreed_layout;
use trainer::checkpoint::gguf::Gguf;
use trainer::checkpoint::{ImportError, Imported, import_folder, import_gguf, model_root};
use trainer::config::ModelConfig;
use trainer::model::Layout;

use crate::cli::ModelArgs;
use crate::failure::usage;
use crate::model_file::{self, Stamp};
use crate::peer_dir::PeerDir;
use crate::run_file::{algorithm, trainer_of};
use crate::vocabulary::Vocabulary;

/// A model with its vocabulary.
pub struct Loaded {
    /// Its shape.
    pub config: ModelConfig,
    /// Its parameters, in the layout's order.
    pub theta: Vec<f32>,
    /// How it reads text.
    pub vocabulary: Vocabulary,
    /// Which of a run's models it is, if it is one.
    pub stamp: Option<Stamp>,
}

impl Loaded {
    /// What the arguments name.
    ///
    /// # Errors
    /// There is no such model, or it cannot be read (exit code 2).
    pub fn open(args: &ModelArgs) -> Result<Self> {
        match &args.model {
            Some(path) => Self::of_path(path, "--model"),
            None => Self::of_dir(&PeerDir::find(args.dir.dir.as_deref())?),
        }
    }

    /// The same for at most `tokens` tokens: tables of rotations are made for those alone, not for the hundred thousand that a `config.json`
    /// may name. Learned positions are parameters and stay.
    pub fn for_tokens(mut self, tokens: usize) -> Self {
        if self.config.family.has_rope() {
            self.config.max_seq_len = self.config.max_seq_len.min(tokens.max(2));
        }
        self
    }

    /// What a proof names it by; before [`Self::for_tokens`] or after.
    pub fn identity(&self) -> Identity {
        // Of the parameters alone: a run's own root covers what its algorithm keeps beside them, too, and an exported model has none of that.
        Identity {
            model_root: Hash(model_root(&Layout::new(&self.config), &self.theta)),
            shape: shape_of(&self.config),
            tokenizer: self.vocabulary.hash(),
            round: self.stamp.map(|stamp| (stamp.branch, stamp.round)),
        }
    }

    /// A directory's current model.
    ///
    /// # Errors
    /// There is none yet (exit code 2), or it is damaged.
    pub fn of_dir(dir: &PeerDir) -> Result<Self> {
        let run = dir.run_config()?;
        let (config, training) = trainer_of(&run)?;
        let layout = agreed_layout(&config, algorithm(&config, &training)?.as_ref());
        let (mut theta, stamp) = model_file::load(dir, &layout)?;
        theta.truncate(config.param_count());
        Ok(Self {
            config,
            theta,
            vocabulary: Vocabulary::own(tokenizer_of(&run)?),
            stamp: Some(stamp),
        })
    }

    /// A model from elsewhere: a Hugging Face folder, or a GGUF file; `option` is what named it.
    ///
    /// # Errors
    /// It is neither, or not a model that is computed here (exit code 2).
    pub fn of_path(path: &Path, option: &str) -> Result<Self> {
        let refused = |error: ImportError| usage(format!("{option}: {error}"));
        let (Imported { config, theta }, vocabulary) = if path.is_dir() {
            (import_folder(path).map_err(refused)?, Vocabulary::of_folder(path))
        } else {
            let gguf = Gguf::open(path).map_err(refused)?;
            (import_gguf(&gguf).map_err(refused)?, Vocabulary::of_gguf(&gguf))
        };
        Ok(Self {
            config,
            theta,
            vocabulary,
            stamp: None,
        })
    }
}

/// The tokenizer that a run agreed on.
///
/// # Errors
/// One that this build does not know (exit code 2).
fn tokenizer_of(config: &RunConfig) -> Result<TokenizerKind> {
    config
        .data
        .tokenizer
        .parse()
        .map_err(|error| usage(format!("the run's tokenizer: {error}")))
}
