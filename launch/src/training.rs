//! The thread that trains: takes the steps of one local round after the other, on a model of its own, so that records are applied and
//! contributions encoded beside it ([`crate::worker`]).
//!
//! The model on the devices only ever holds a copy of agreed parameters: those that the order names, which with overlap (R16) are not the
//! latest.
//!
//! Proofs of speed ([`crate::speed`]) come between two steps: their time runs from the moment they are asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use anyhow::{Result, anyhow};
use coordinatorless::node::{Done, Stop};
use coordinatorless::protocol::event::TrainOrder;
use coordinatorless::types::{BatchIndex, PeerId, Trace};
use tch::Device;
use trainer::local::{LocalError, RoundInputs, set_threads};
use trainer::replicas::Replicas;

use crate::cheat::Cheat;
use crate::cheat::{read, sent, settings, told, trained_on};
use crate::kit::{Kit, batch_indices};
use crate::speed::{self, Prover};

/// What the thread is started with.
pub struct Setup {
    /// The run's parts.
    pub kit: Arc<Kit>,
    /// This peer.
    pub me: PeerId,
    /// Where to compute: every batch is shared out over them.
    pub devices: Vec<Device>,
    /// With how many threads.
    pub threads: usize,
    /// How this peer cheats, in a demo that wants it caught.
    pub cheat: Option<Cheat>,
    /// Training that is no longer wanted.
    pub stop: Stop,
    /// That it has ended.
    pub done: tokio::sync::mpsc::Sender<Done>,
    /// What came of it.
    pub found: Sender<Found>,
}

/// Something for this thread.
#[allow(clippy::large_enum_variant)] // a few a round, moved once
pub enum Task {
    /// A local round.
    Train(Job),
    /// A proof of speed: goes before whatever waits.
    Speed(speed::Task),
}

/// A local round to train.
pub struct Job {
    /// Names it for [`Stop`].
    pub id: u64,
    /// On what.
    pub order: TrainOrder,
    /// When to stop at the latest.
    pub deadline: Instant,
    /// The agreed state to train from.
    pub agreed: Arc<Vec<f32>>,
    /// The optimizer's state after the last counted round, where the run carries it.
    pub state: Vec<f32>,
}

/// What a local round came to.
pub struct Found {
    /// The order, as it was given.
    pub order: TrainOrder,
    /// The pseudo-gradient, or the gradient.
    pub delta: Vec<f32>,
    /// The optimizer's state after it, where the run carries it.
    pub state: Vec<f32>,
    /// Tokens that it claims.
    pub tokens: u64,
    /// Mean loss, nats per token.
    pub mean_loss: f64,
    /// Its steps.
    pub trace: Trace,
}

struct Training {
    setup: Setup,
    replicas: Replicas,
    prover: Prover,
    /// Rounds that came while one was trained.
    waiting: VecDeque<Job>,
    patience: Patience,
    /// A cheat's pseudo-gradient of the round before; nobody else keeps one.
    last: Vec<f32>,
}

/// How often in a row this peer's rounds have ended in a loss or gradient that is no number. One may be a bad batch; [`Patience::MOST`] are a bad run.
#[derive(Debug, Default)]
struct Patience {
    spent: u32,
}

impl Patience {
    const MOST: u32 = 5;

    fn spend(&mut self) {
        self.spent += 1;
    }

    fn renew(&mut self) {
        self.spent = 0;
    }

    /// Why the peer stops, once it must.
    fn lost(&self) -> Option<String> {
        (self.spent >= Self::MOST).then(|| {
            format!(
                "{} rounds in a row ended in a loss or gradient that is not a number: the model diverges or the data are broken. Try a lower \
                 training.optimizer.lr, or training.precision = \"fp32\" if it is bf16, and look at the batches named in the log above",
                self.spent
            )
        })
    }
}

/// Trains until nobody has anything to train.
///
/// # Errors
/// The model does not fit the device, or diverges for good.
pub fn work(setup: Setup, tasks: &Receiver<Task>) -> Result<()> {
    set_threads(setup.threads);
    let device = setup.devices.first().copied().unwrap_or(Device::Cpu);
    let mut training = Training {
        replicas: Replicas::new(&setup.kit.model, &setup.devices, setup.threads)?,
        prover: Prover::new(setup.me, setup.kit.training.precision, device),
        waiting: VecDeque::new(),
        patience: Patience::default(),
        last: Vec::new(),
        setup,
    };
    while let Some(task) = training.next(tasks) {
        let answer = match task {
            Task::Train(job) => training.take(job, tasks),
            Task::Speed(task) => training.prover.take(task),
        };
        if let Some(answer) = answer
            && training.setup.done.blocking_send(answer).is_err()
        {
            break;
        }
        if let Some(reason) = training.patience.lost() {
            return Err(anyhow!(reason));
        }
    }
    Ok(())
}

impl Training {
    /// `None`: nobody has anything to do for this thread any more.
    fn next(&mut self, tasks: &Receiver<Task>) -> Option<Task> {
        match self.waiting.pop_front() {
            Some(job) => Some(Task::Train(job)),
            None => tasks.recv().ok(),
        }
    }

    /// `None` if it was stopped: whoever stopped it knows.
    fn take(&mut self, job: Job, tasks: &Receiver<Task>) -> Option<Done> {
        let (id, branch, round) = (job.id, job.order.branch, job.order.round);
        if !self.setup.stop.wants(id) {
            return None;
        }
        // Whatever was assigned and not delivered is handed out again by the round's record.
        let trained = self.train(job, tasks);
        if !self.setup.stop.wants(id) {
            return None;
        }
        let reason = match trained {
            Ok(found) => {
                self.patience.renew();
                // Without the worker the process is ending.
                let _ = self.setup.found.send(found);
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        Some(Done::TrainingEnded {
            branch,
            round,
            fruitful: reason.is_none(),
            reason,
        })
    }

    fn train(&mut self, job: Job, tasks: &Receiver<Task>) -> Result<Found> {
        let Setup {
            kit, stop, cheat, done, ..
        } = &self.setup;
        let (prover, waiting) = (&mut self.prover, &mut self.waiting);
        let Job {
            id,
            order,
            deadline,
            agreed,
            state,
        } = job;
        let assigned: Vec<BatchIndex> = batch_indices(&order.batches)
            .take(kit.training.max_inner_steps as usize)
            .collect();
        let claimed = assigned.len();
        let batches = trained_on(*cheat, assigned);
        let inputs = RoundInputs {
            theta: kit.parameters(&agreed),
            state: &state,
            global_tokens: order.global_tokens,
            batches: &mut |step| batches.get(step as usize).map(|index| read(*cheat, kit.batch(*index))),
            keep_going: &mut |_| {
                for task in tasks.try_iter() {
                    match task {
                        Task::Train(job) => waiting.push_back(job),
                        Task::Speed(task) => {
                            // Without the driver the process is ending.
                            prover.take(task).map(|answer| done.blocking_send(answer).ok());
                        }
                    }
                }
                stop.wants(id) && Instant::now() < deadline
            },
            observe: &mut |step, loss| tracing::debug!(round = %order.round, step, loss, "trained"),
        };
        let mut local = match self.replicas.local_round(&settings(*cheat, &kit.training), inputs) {
            Ok(local) => local,
            Err(error) => {
                if let LocalError::NonFinite { step, .. } = &error {
                    self.patience.spend();
                    let batch = batch_indices(&order.batches).nth(*step as usize);
                    tracing::warn!(round = %order.round, step, ?batch, "round abandoned: {error:#}");
                }
                return Err(error.into());
            }
        };
        if cheat.is_some() {
            let found = local.delta.clone();
            sent(*cheat, &mut local.delta, &self.last);
            self.last = found;
        }
        // An honest peer claims the steps it took; a cheat that was not cut short claims all that it was given.
        let tokens = if local.steps as usize == batches.len() {
            claimed as u64 * kit.training.tokens_per_step()
        } else {
            local.tokens
        };
        Ok(Found {
            order,
            delta: local.delta,
            state: local.state,
            tokens,
            mean_loss: local.mean_loss,
            trace: Trace::of(told(*cheat, local.numbers)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_diverged_rounds_in_a_row_end_the_peer_with_what_to_try() {
        let mut patience = Patience::default();
        for _ in 0..4 {
            patience.spend();
        }
        assert!(patience.lost().is_none());
        patience.renew();
        for _ in 0..4 {
            patience.spend();
        }
        assert!(
            patience.lost().is_none(),
            "a good round in between starts the count anew"
        );
        patience.spend();
        let reason = patience.lost().unwrap();
        assert!(
            reason.contains("training.optimizer.lr") && reason.contains("fp32"),
            "{reason}"
        );
    }
}
