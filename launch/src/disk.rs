//! `--max-disk`: refused at the start where the run cannot fit it (R17: nothing that the run needs is dropped for a budget). What passes
//! it later is told by [`crate::reporter`].

use anyhow::Result;
use coordinatorless::config::RunConfig;
use datasets::Manifest;
use trainer::arms::agreed_layout;

use crate::failure::usage;
use crate::run_file::{algorithm, trainer_of};
use crate::start_model;
use crate::units::Bytes;
use crate::worker::kept_accumulators;

/// Models on disk at once: the last two snapshots, and the current one; with overlap a third snapshot.
const MODELS: u64 = 3;

/// Bytes that a peer of this run keeps for certain: its data, its models, its accumulators. Contributions come on top.
fn least(config: &RunConfig, data: &Manifest) -> Result<u64> {
    let (model, training) = trainer_of(config)?;
    let agreed = agreed_layout(&model, algorithm(&model, &training)?.as_ref()).total as u64;
    let kept = (model.param_count() + training.carried(&model)) as u64;
    let tokens = data
        .shards
        .iter()
        .fold(0, |sum: u64, shard| sum.saturating_add(shard.tokens));
    let start = u64::from(start_model::root_of(config)?.is_some());
    let models = agreed
        .saturating_mul(4)
        .saturating_mul(MODELS + start + u64::from(config.timing.overlap));
    let accumulators = kept.saturating_mul(4).saturating_mul(kept_accumulators(config) as u64);
    let floats = models.saturating_add(accumulators);
    Ok(tokens.saturating_mul(data.token_bytes as u64).saturating_add(floats))
}

/// Whether a run fits the limit, if there is one.
///
/// # Errors
/// It does not (exit code 2).
pub fn must_fit(config: &RunConfig, data: &Manifest, limit: Option<Bytes>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let least = Bytes(least(config, data)?);
    if limit.0 < least.0 {
        return Err(usage(format!(
            "--max-disk {limit}: this run needs {least} at least, for its data, models and accumulators; give it more, or leave it out"
        )));
    }
    Ok(())
}
