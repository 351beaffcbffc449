//! One peer, several devices: a replica of the model on each, every batch shared out among them, gradients summed over all. To the others it is
//! one member that is so much faster, and the round that it trains is the one that a single device would train, within rounding.
//!
//! ```text
//! local_round        rank 0                rank 1 ...
//!   batch  -------->  its share             its share
//!   <--- loss ------  gradient              gradient         each reports before any of them sums:
//!   go  ----------->  sum over all ranks    sum              one that failed must not leave the others waiting
//!   <--- norm ------  clip, update          clip, update     the same numbers everywhere, so the same parameters
//! ```
//!
//! Every rank has a thread of its own for as long as a round takes. Gradients are summed after the backward pass, in one piece: libtorch's
//! backward runs in one call here, with nothing to hook buckets to.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tch::{Device, TchError, Tensor};

use crate::collective::{Collective, CollectiveError, group};
use crate::config::{ModelConfig, TrainingConfig};
use crate::local::{Left, LocalError, LocalRound, RoundInputs, Stepper, local_round, set_threads, take_steps};
use crate::model::{Model, ModelError};

/// The model on each device of a peer.
pub struct Replicas {
    models: Vec<Model>,
    group: Vec<Box<dyn Collective>>,
    /// Of libtorch, for each rank on the CPU.
    threads: usize,
}

/// Why there are no replicas.
#[derive(Debug, thiserror::Error)]
pub enum ReplicasError {
    /// A model could not be made.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The devices make no group.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl Replicas {
    /// A model on each of `devices`, at least one; ranks on the CPU share `threads` among them.
    ///
    /// # Errors
    /// See [`ReplicasError`].
    pub fn new(config: &ModelConfig, devices: &[Device], threads: usize) -> Result<Self, ReplicasError> {
        let models = devices.iter().map(|&device| Model::new(config, device));
        let models = models.collect::<Result<Vec<_>, _>>()?;
        // One device needs nobody to sum with.
        let group = if devices.len() > 1 { group(devices)? } else { Vec::new() };
        let threads = (threads / devices.len().max(1)).max(1);
        Ok(Self { models, group, threads })
    }

    /// [`local_round`] over all devices.
    ///
    /// # Errors
    /// Its errors, a batch that cannot be shared out, and a rank's that failed.
    pub fn local_round(
        &mut self,
        training: &TrainingConfig,
        inputs: RoundInputs<'_>,
    ) -> Result<LocalRound, LocalError> {
        if let [model] = &mut self.models[..] {
            return local_round(model, training, inputs);
        }
        let ranks = self.models.len();
        let share = shared(training, ranks)?;
        if let Some(model) = self.models.first() {
            training.validate_with(model.config())?;
        }
        let (theta, state, global_tokens) = (inputs.theta, inputs.state, inputs.global_tokens);
        let threads = self.threads;
        let (taken, left) = std::thread::scope(|scope| {
            let mut ends = Vec::with_capacity(ranks);
            let mut handles = Vec::with_capacity(ranks);
            for (model, group) in self.models.iter_mut().zip(&mut self.group) {
                let (here, there) = ends_of_a_rank();
                ends.push(here);
                let share = &share;
                handles.push(scope.spawn(move || -> Result<Left, LocalError> {
                    set_threads(threads);
                    let begun = Stepper::begin(model, share, state, theta, global_tokens);
                    let ready = begun.as_ref().map(|_| 0.0).map_err(|_| ());
                    let mut rank = Rank {
                        model,
                        group: group.as_ref(),
                        there,
                    };
                    // Whoever asked hears of a failure by this thread's result.
                    let _ = rank.there.found.send(ready);
                    rank.serve(begun?)
                }));
            }
            let taken = all(&ends, |end| end.found.recv().ok()?.ok()).and_then(|_| {
                let mut step = |batch: &[Vec<u32>]| one_step(&ends, batch, share.batch_sequences, training);
                take_steps(training.max_inner_steps, inputs, &mut step)
            });
            drop(ends); // the ranks end
            let mut left = Vec::with_capacity(ranks);
            for (rank, handle) in handles.into_iter().enumerate() {
                // A rank's own error says more than that it ended.
                left.push(handle.join().map_err(|_| LocalError::Rank { rank })??);
            }
            Ok::<_, LocalError>((taken?, left.into_iter().next().unwrap_or_default()))
        })?;
        taken.round(training, theta, &self.models[0], left)
    }
}

/// What one rank trains: its share of every batch.
fn shared(training: &TrainingConfig, ranks: usize) -> Result<TrainingConfig, LocalError> {
    let found = training.batch_sequences;
    if ranks == 0 || !found.is_multiple_of(ranks) {
        return Err(LocalError::Shares { ranks, found });
    }
    let own = found / ranks;
    let most = training.sequences_at_once().min(own);
    let micro = (1..=most).rev().find(|micro| own.is_multiple_of(*micro));
    Ok(TrainingConfig {
        batch_sequences: own,
        micro_batch: micro,
        ..training.clone()
    })
}

/// The round's end of a rank.
struct Here {
    shares: SyncSender<Vec<Vec<u32>>>,
    found: Receiver<Result<f64, ()>>,
    go: SyncSender<f64>,
    stepped: Receiver<f64>,
}

/// The rank's end.
struct There {
    shares: Receiver<Vec<Vec<u32>>>,
    found: SyncSender<Result<f64, ()>>,
    go: Receiver<f64>,
    stepped: SyncSender<f64>,
}

fn ends_of_a_rank() -> (Here, There) {
    let (shares, shares_there) = sync_channel(1);
    let (found_there, found) = sync_channel(1);
    let (go, go_there) = sync_channel(1);
    let (stepped_there, stepped) = sync_channel(1);
    let here = Here {
        shares,
        found,
        go,
        stepped,
    };
    let there = There {
        shares: shares_there,
        found: found_there,
        go: go_there,
        stepped: stepped_there,
    };
    (here, there)
}

/// Asks every rank, in their order.
fn all<T>(ends: &[Here], ask: impl Fn(&Here) -> Option<T>) -> Result<Vec<T>, LocalError> {
    let answer = |(rank, end)| ask(end).ok_or(LocalError::Rank { rank });
    ends.iter().enumerate().map(answer).collect()
}

/// One step of all ranks: the mean loss and the norm of the mean gradient.
fn one_step(
    ends: &[Here],
    batch: &[Vec<u32>],
    share: usize,
    training: &TrainingConfig,
) -> Result<(f32, f64), LocalError> {
    if batch.len() != training.batch_sequences {
        return Err(LocalError::Shape {
            step: 0,
            expected: format!("{} sequences", training.batch_sequences),
            found: format!("{} sequences", batch.len()),
        });
    }
    for ((rank, end), share) in ends.iter().enumerate().zip(batch.chunks(share)) {
        end.shares.send(share.to_vec()).map_err(|_| LocalError::Rank { rank })?;
    }
    let losses = all(ends, |end| end.found.recv().ok()?.ok())?;
    let loss = losses.iter().sum::<f64>() / losses.len() as f64;
    all(ends, |end| end.go.send(loss).ok())?;
    let norms = all(ends, |end| end.stepped.recv().ok())?;
    Ok((loss as f32, norms[0]))
}

/// One rank in its thread.
struct Rank<'a> {
    model: &'a mut Model,
    group: &'a dyn Collective,
    there: There,
}

impl Rank<'_> {
    /// Steps as long as shares come.
    fn serve(&mut self, mut stepper: Stepper) -> Result<Left, LocalError> {
        let Self { model, group, there } = self;
        let mut gone = false;
        while let Ok(share) = there.shares.recv() {
            let mut between = |loss: f64, gradient: &Tensor| {
                let told = there.found.send(Ok(loss));
                // Another rank failed: nobody sums.
                let Some(mean) = told.ok().and_then(|()| there.go.recv().ok()) else {
                    gone = true;
                    return Err(LocalError::Rank { rank: group.rank() });
                };
                average(*group, gradient)?;
                Ok(mean)
            };
            match stepper.step_with(model, &share, &mut between) {
                Ok((_, norm)) => drop(there.stepped.send(norm)),
                // The round ended because of another; that one tells why.
                Err(_) if gone => break,
                Err(error) => return Err(error),
            }
        }
        Ok(stepper.left())
    }
}

/// Replaces a gradient by its mean over all ranks.
fn average(group: &dyn Collective, gradient: &Tensor) -> Result<(), LocalError> {
    let mut sum = gradient.detach();
    group.sum(&mut sum)?;
    let _ = sum
        .f_mul_scalar_(1.0 / group.size() as f64)
        .map_err(|error: TchError| error)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::OptimizerKind;
    use crate::model::init_flat;

    fn tiny() -> ModelConfig {
        ModelConfig {
            vocab_size: 64,
            dim: 32,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            ffn: 64,
            max_seq_len: 32,
            ..ModelConfig::demo()
        }
    }

    fn training(kind: OptimizerKind) -> TrainingConfig {
        let mut training = TrainingConfig {
            seq_len: 16,
            batch_sequences: 8,
            max_inner_steps: 6,
            ..TrainingConfig::default()
        };
        training.optimizer.kind = kind;
        training.optimizer.state = crate::config::InnerState::Carry;
        training
    }

    fn batch(step: u32, vocabulary: u32) -> Vec<Vec<u32>> {
        let token = |i: u32, j: u32| (step * 7 + i * 31 + j * j * (i + 3) + j) % vocabulary;
        (0..8).map(|i| (0..17).map(|j| token(i, j)).collect()).collect()
    }

    fn round(ranks: usize, training: &TrainingConfig, vocabulary: u32) -> Result<LocalRound, LocalError> {
        let mut replicas = Replicas::new(&tiny(), &vec![Device::Cpu; ranks], 1).unwrap();
        set_threads(1);
        let inputs = RoundInputs {
            theta: &init_flat(&tiny(), 1),
            state: &[],
            global_tokens: 0,
            batches: &mut |step| Some(batch(step, vocabulary)),
            keep_going: &mut |_| true,
            observe: &mut |_, _| (),
        };
        replicas.local_round(training, inputs)
    }

    /// `|a - b| / |b|`
    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
    }

    #[test]
    fn ranks_train_the_round_of_one_device_and_repeat_it_bit_for_bit() {
        for kind in [OptimizerKind::Muon, OptimizerKind::AdamW] {
            let training = training(kind);
            let one = round(1, &training, 64).unwrap();
            for ranks in [2, 4] {
                let many = round(ranks, &training, 64).unwrap();
                assert_eq!((many.steps, many.tokens), (one.steps, one.tokens));
                assert!((many.mean_loss - one.mean_loss).abs() < 1e-5 * one.mean_loss);
                let apart = distance(&many.delta, &one.delta);
                assert!(apart < 1e-4, "{kind:?}, {ranks} ranks: {apart:e}");
                assert!(distance(&many.state, &one.state) < 1e-4);
                assert_eq!(many, round(ranks, &training, 64).unwrap(), "the same again");
            }
        }
    }

    #[test]
    fn where_gradients_are_sent_ranks_find_the_one_of_the_whole_batch() {
        let mut training = training(OptimizerKind::AdamW);
        training.algorithm = crate::config::Way::Ddp;
        training.compression.algorithm = "dense".to_owned();
        training.optimizer.state = crate::config::InnerState::Reset;
        training.max_inner_steps = 1;
        let one = round(1, &training, 64).unwrap();
        assert_eq!(one.steps, 1);
        let two = round(2, &training, 64).unwrap();
        assert!(distance(&two.delta, &one.delta) < 1e-5);
        // Not clipped, and no step was taken: an inner step would be as long as the learning rate.
        let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
        model.load_flat(&init_flat(&tiny(), 1)).unwrap();
        let mut gradients = crate::gradient::Gradients::new(&model, &training).unwrap();
        let (_, gradient) = gradients.of(&model, &batch(0, 64)).unwrap();
        assert!(distance(&one.delta, &crate::model::host::to_vec(gradient)) < 1e-6);
    }

    #[test]
    fn batches_that_cannot_be_shared_are_refused() {
        let told = round(3, &training(OptimizerKind::AdamW), 64).unwrap_err().to_string();
        assert!(told.contains("3 devices") && told.contains("8 sequences"), "{told}");
    }

    #[test]
    fn a_rank_that_fails_ends_the_round_with_its_own_error_and_nobody_waits() {
        // Tokens that the vocabulary lacks are in some shares only.
        let told = round(4, &training(OptimizerKind::AdamW), 90).unwrap_err().to_string();
        assert!(told.contains("in a vocabulary of 64"), "{told}");
    }

    #[test]
    fn pieces_of_a_share_divide_it() {
        let mut training = training(OptimizerKind::AdamW);
        training.batch_sequences = 12;
        for (micro, expected) in [(None, 6), (Some(4), 3), (Some(1), 1), (Some(12), 6)] {
            training.micro_batch = micro;
            let share = shared(&training, 2).unwrap();
            assert_eq!((share.batch_sequences, share.micro_batch), (6, Some(expected)));
            share.validate().unwrap();
        }
    }
}
