//! What workers really encode: accumulators, pseudo-gradients and bytes of the last rounds of a short training, for `murmur bench codec`.

use std::collections::VecDeque;

use super::plan::{Kind, Setting, Task, Trouble};
use super::simulate::{Data, Run};
use crate::arms::ArmError;
use crate::compress::Quantizer;
use crate::config::OptimizerKind;

/// One worker's round.
#[derive(Clone, Debug)]
pub struct Captured {
    /// e, before the round; one value a parameter.
    pub accumulator: Vec<f32>,
    /// d, one value a parameter.
    pub delta: Vec<f32>,
    /// What was sent.
    pub shards: Vec<Vec<u8>>,
}

/// Trains `sparse` with Muon and fresh state at learning rate `lr`, and returns what every worker encoded in the last `rounds` rounds, round after
/// round.
///
/// # Errors
/// Settings out of bounds, or a training that diverges.
pub fn capture(setting: &Setting, lr: f64, k: usize, rounds: usize, data: &Data) -> Result<Vec<Captured>, ArmError> {
    let task = Task {
        setting: setting.clone(),
        arm: "captured".to_owned(),
        kind: Kind::Sparse {
            optimizer: OptimizerKind::Muon,
            carry: false,
            accumulator: true,
            k,
            k_last: None,
            beta: 0.95,
            outer_rate: 2.0,
            outer_momentum: 0.0,
            quantizer: Quantizer::Sign,
        },
        lr,
        trouble: Trouble::default(),
    };
    let keep = rounds * setting.workers;
    let mut seen = VecDeque::with_capacity(keep);
    let mut record = |accumulator: &[f32], delta: &[f32], shards: &[Vec<u8>]| {
        if seen.len() == keep {
            seen.pop_front();
        }
        seen.push_back(Captured {
            accumulator: accumulator.to_vec(),
            delta: delta.to_vec(),
            shards: shards.to_vec(),
        });
    };
    Run::new(&task, data, Some(&mut record))?.rounds(setting.rounds)?;
    Ok(seen.into())
}
