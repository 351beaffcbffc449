//! The thread beside the worker: replays other members' rounds (audits) and evaluates on held-out text, with a model of its own, so
//! that a round never waits for either.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;

use anyhow::Result;
use bytes::Bytes;
use coordinatorless::node::{Done, ModelSource, Opened, leaf_count};
use coordinatorless::protocol::event::AuditOrder;
use coordinatorless::types::{BatchIndex, Trace, Verdict};
use gradient_verify::{Audit, Replay, ReplayError, explain, malformed, replay, verdict};
use tch::Device;
use trainer::local::set_threads;
use trainer::model::Model;

use crate::cheat::Cheat;
use crate::cheat::pretended;
use crate::held_out::{HeldOut, held_out};
use crate::keeper::Keeper;
use crate::kit::{Kit, batch_indices};

/// Held-out sequences of one evaluation.
pub const EVALUATED: u64 = 200;

/// Something that can wait.
pub enum Task {
    /// Replay a member's round.
    Audit {
        /// Whose, and on what.
        order: Box<AuditOrder>,
        /// The model before it.
        source: ModelSource,
        /// What the member sent.
        shards: Vec<Bytes>,
        /// Its accumulators, as it opened them.
        accumulators: Opened,
    },
    /// Evaluate a model.
    Evaluate {
        /// The round it is the model of.
        round: u64,
        /// The model.
        theta: Vec<f32>,
    },
    /// Keep a model.
    Keep {
        /// The round it is the model of.
        round: u64,
        /// The model.
        theta: Vec<f32>,
    },
}

/// Whole models that wait for this thread. Each is as large as the model, so there are at most [`Backlog::MOST`].
#[derive(Clone, Debug, Default)]
pub struct Backlog(Arc<AtomicUsize>);

impl Backlog {
    /// One being worked on, one that waits.
    const MOST: usize = 2;

    /// Takes a place for another; `false` if there is none.
    pub fn enter(&self) -> bool {
        let entered = |waiting| (waiting < Self::MOST).then_some(waiting + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, entered)
            .is_ok()
    }

    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the side thread is started with.
pub struct Setup {
    /// The run's parts.
    pub kit: Arc<Kit>,
    /// Where to compute.
    pub device: Device,
    /// With how many threads: the worker's, so that an honest replay has the same bits.
    pub threads: usize,
    /// The models that wait.
    pub backlog: Backlog,
    /// Where models are kept.
    pub keeper: Keeper,
    /// How this peer cheats, in a demo that wants it caught.
    pub cheat: Option<Cheat>,
    /// Verdicts.
    pub done: tokio::sync::mpsc::Sender<Done>,
    /// Evaluations: round and what was found.
    pub evals: tokio::sync::mpsc::Sender<(u64, HeldOut)>,
}

/// Takes tasks until nobody has any.
///
/// # Errors
/// The model does not fit the device.
pub fn work(mut setup: Setup, tasks: &Receiver<Task>) -> Result<()> {
    set_threads(setup.threads);
    let mut model = Model::new(&setup.kit.model, setup.device)?;
    for task in tasks {
        match task {
            Task::Evaluate { round, theta } => {
                match held_out(&mut model, &theta, &setup.kit.data, EVALUATED) {
                    Ok(found) => {
                        told(setup.keeper.consider(round, found, &theta));
                        let _ = setup.evals.blocking_send((round, found));
                    }
                    Err(error) => tracing::warn!(round, "no evaluation: {error:#}"),
                }
                setup.backlog.leave();
            }
            Task::Keep { round, theta } => {
                told(setup.keeper.keep(round, &theta));
                setup.backlog.leave();
            }
            Task::Audit {
                order,
                source,
                shards,
                accumulators,
            } => {
                let found = pretended(setup.cheat, &order, &setup.kit)
                    .or_else(|| audit(&setup.kit, &mut model, &order, &source, &shards, &accumulators));
                if let Some((verdict, trace)) = found
                    && setup.done.blocking_send(Done::Audited { verdict, trace }).is_err()
                {
                    break;
                }
            }
        }
    }
    Ok(())
}

/// A model that could not be kept is no reason to stop training.
fn told(kept: Result<()>) {
    if let Err(error) = kept {
        tracing::warn!("{error:#}");
    }
}

/// Replays, and gives what the steps came to here; `None` where the fault may be this peer's own or the network's: then nobody is accused.
fn audit(
    kit: &Kit,
    model: &mut Model,
    order: &AuditOrder,
    source: &ModelSource,
    shards: &[Bytes],
    accumulators: &Opened,
) -> Option<(Verdict, Option<Trace>)> {
    let bound = kit.config.verification.bound;
    let agreed = match kit.rebuild(source) {
        Ok(agreed) => agreed,
        Err(error) => {
            tracing::warn!("an audit could not be done: {error:#}");
            return None;
        }
    };
    let result = replayed(kit, model, order, &agreed, shards, accumulators);
    match result {
        Ok(replay) => {
            tracing::info!("{}", explain(order, &replay, bound));
            Some((verdict(order, &replay, bound), Some(replay.trace)))
        }
        Err(error) if error.blames_member() => {
            tracing::info!("audit of {}: {error}", order.contribution.member.short());
            Some((malformed(order, bound), None))
        }
        Err(error) => {
            tracing::warn!(
                "an audit of {} could not be done: {error}",
                order.contribution.member.short()
            );
            None
        }
    }
}

/// A member's round again, with what it sent and what it opened.
///
/// # Errors
/// Those of [`replay()`].
pub fn replayed(
    kit: &Kit,
    model: &mut Model,
    order: &AuditOrder,
    agreed: &[f32],
    shards: &[Bytes],
    opened: &Opened,
) -> Result<Replay, ReplayError> {
    let indices: Vec<BatchIndex> = batch_indices(&order.work.batches)
        .take(kit.training.max_inner_steps as usize)
        .collect();
    let (leaves, before, after) = match opened {
        Opened::Whole(before, after) => (None, before, after),
        Opened::Leaves(before, after) => (order.leaves(leaf_count(4 * kit.layout.total as u64)), before, after),
    };
    let shards: Vec<&[u8]> = shards.iter().map(AsRef::as_ref).collect();
    replay(Audit {
        model,
        training: &kit.training,
        algorithm: kit.algorithm.as_ref(),
        theta: kit.parameters(agreed),
        order,
        batches: &mut |step| indices.get(step as usize).map(|index| kit.batch(*index)),
        shards: &shards,
        leaves: leaves.as_deref(),
        accumulator_before: before,
        accumulator_after: after,
        accumulator_zero: kit.config.verification.accumulator_zero,
    })
}
