//! The model that a run starts from, where it is not a random one: `[model] from = "PATH"` in RUN.toml.
//!
//! Who creates the run reads the folder or GGUF file once and keeps it as `start.safetensors` in the peer's directory, a snapshot like any other.
//! Its root is part of what all peers agree on; joiners fetch it by that root, as they do the run's data.

use std::path::Path;

use anyhow::{Context, Result, bail};
use coordinatorless::config::RunConfig;
use coordinatorless::types::Hash;
use trainer::checkpoint;
use trainer::config::ModelConfig;
use trainer::model::Layout;

use crate::failure::usage;
use crate::loaded::Loaded;
use crate::peer_dir::PeerDir;
use crate::run_file::RunPlan;
use crate::vocabulary::Vocabulary;

/// The key in an agreed run's `[model]` that holds the root.
pub const KEY: &str = "start";

/// What both tokenizers must cut alike.
const SAMPLE: &str = "Hello world, it's 1789 already!\n\n\tnaïve café (don't)";

/// The root of the model that an agreed run starts from; `None` for a random one.
///
/// # Errors
/// Something that is no root (exit code 2: it came from a stranger's ticket or a damaged file).
pub fn root_of(config: &RunConfig) -> Result<Option<Hash>> {
    let Some(value) = config.model.get(KEY) else {
        return Ok(None);
    };
    match value.as_str().and_then(Hash::from_hex) {
        Some(root) => Ok(Some(root)),
        None => Err(usage(format!(
            "[model] of the run: {KEY} is {value}, expected a root of 64 hexadecimal digits"
        ))),
    }
}

/// The shape of the model at `path`, for the run file.
///
/// # Errors
/// It is no model that is computed here (exit code 2).
pub fn shape(path: &Path) -> Result<ModelConfig> {
    checkpoint::model_config(path).map_err(|error| usage(format!("model.from: {error}")))
}

/// Keeps the model that the plan names in the directory; returns its root, or `None` where the plan names none.
///
/// # Errors
/// It cannot be read, or reads text otherwise than the run does (exit code 2).
pub fn install(plan: &RunPlan, dir: &PeerDir) -> Result<Option<Hash>> {
    let Some(path) = &plan.from else {
        return Ok(None);
    };
    let loaded = Loaded::of_path(path, "model.from")?;
    must_read_alike(plan, path, &loaded.vocabulary)?;
    let layout = Layout::new(&plan.model);
    checkpoint::save(&dir.start_model(), &layout, &loaded.theta)?;
    Ok(Some(Hash(checkpoint::model_root(&layout, &loaded.theta))))
}

/// That the model was trained on the ids that the run's tokenizer gives. A model that brings no tokenizer is taken at its author's word.
fn must_read_alike(plan: &RunPlan, path: &Path, theirs: &Vocabulary) -> Result<()> {
    if let Vocabulary::None(_) = theirs {
        return Ok(());
    }
    let (ours, theirs) = (Vocabulary::own(plan.tokenizer).encode(SAMPLE)?, theirs.encode(SAMPLE)?);
    if ours == theirs {
        return Ok(());
    }
    Err(usage(format!(
        "model.from: the tokenizer of {} makes {} tokens of a sample text, the run's (tokenizer = \"{}\") {} others; start from a model with the run's tokenizer",
        path.display(),
        theirs.len(),
        plan.tokenizer,
        ours.len()
    )))
}

/// Reads what [`install`] has kept, or a joiner has fetched.
///
/// # Errors
/// It is absent, torn or changed.
pub fn load(path: &Path, layout: &Layout, root: Hash) -> Result<Vec<f32>> {
    let told = "the model that the run starts from cannot be used; join again in a new directory to fetch it";
    let theta = checkpoint::load(path, layout).context(told)?;
    let found = Hash(checkpoint::model_root(layout, &theta));
    if found != root {
        bail!("{told}: {} has the root {found}, expected {root}", path.display());
    }
    Ok(theta)
}
