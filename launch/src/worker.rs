//! The thread that owns the model: takes [`Work`] from the protocol, gives [`Done`].
//!
//! `agreed` is the agreed state as plain floats on the CPU, the model's parameters first; the device only ever sees copies. Audits and evaluations are handed to
//! [`crate::side`], so that a round never waits for them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use coordinatorless::config::RunConfig;
use coordinatorless::node::{Done, Step, Stop, Work};
use coordinatorless::protocol::event::{TrainOrder, Trained};
use coordinatorless::types::{BatchIndex, Branch, Hash, PeerId, Round};
use tch::Device;
use trainer::checkpoint;
use trainer::compress::Codec;
use trainer::local::{LocalError, RoundInputs, set_threads};
use trainer::replicas::Replicas;

use crate::accumulators::Accumulators;
use crate::cheat::{sent, trained_on};
use crate::cli::Cheat;
use crate::keeper::Policy;
use crate::kit::{Kit, batch_indices};
use crate::model_file::{self, Stamp};
use crate::peer_dir::PeerDir;
use crate::side::{Backlog, Task};

/// Rounds between two evaluations; the members take turns.
const EVAL_ROUNDS: u64 = 5;
/// The current model is written out when that took less than this share of the time since it was last done.
const SAVE_SHARE: u32 = 20;
/// Accumulators kept beyond those that an auditor may still ask for.
const SPARE_ACCUMULATORS: u64 = 6;

/// What the worker is started with.
pub struct Setup {
    /// The run's parts.
    pub kit: Arc<Kit>,
    /// Where this peer keeps its files.
    pub dir: PeerDir,
    /// This peer.
    pub me: PeerId,
    /// Where to compute: every batch is shared out over them.
    pub devices: Vec<Device>,
    /// With how many threads.
    pub threads: usize,
    /// How this peer cheats, in a demo that wants it caught.
    pub cheat: Option<Cheat>,
    /// Which models are kept.
    pub keeping: Policy,
    /// The models that wait for the side thread.
    pub backlog: Backlog,
    /// Work that is no longer wanted.
    pub stop: Stop,
    /// Answers.
    pub done: tokio::sync::mpsc::Sender<Done>,
    /// Audits and evaluations.
    pub side: Sender<Task>,
}

/// The worker's own.
struct Worker {
    setup: Setup,
    replicas: Replicas,
    accumulators: Accumulators,
    agreed: Vec<f32>,
    at: Option<Stamp>,
    saved: Option<Stamp>,
    saved_at: Instant,
    save_took: Duration,
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

/// How many accumulators a peer keeps: those of rounds that an auditor may still ask for, and some.
pub fn kept_accumulators(config: &RunConfig) -> usize {
    let rounds = config.verification.verdict_rounds.saturating_mul(2);
    usize::try_from(rounds.saturating_add(SPARE_ACCUMULATORS)).unwrap_or(usize::MAX)
}

/// Works until the protocol hangs up, then writes the model out.
///
/// # Errors
/// The model does not fit the device, or the disk.
pub fn work(setup: Setup, orders: &Receiver<Work>) -> Result<()> {
    set_threads(setup.threads);
    let kit = &setup.kit;
    let keep = kept_accumulators(&kit.config);
    let mut worker = Worker {
        replicas: Replicas::new(&kit.model, &setup.devices, setup.threads)?,
        accumulators: Accumulators::open(setup.dir.accumulators(), kit.kept(), keep)?,
        agreed: Vec::new(),
        at: None,
        saved: None,
        saved_at: Instant::now(),
        save_took: Duration::ZERO,
        patience: Patience::default(),
        last: Vec::new(),
        setup,
    };
    for order in orders {
        let answer = worker.take(order);
        if let Some(answer) = answer
            && worker.setup.done.blocking_send(answer).is_err()
        {
            break;
        }
        if let Some(reason) = worker.patience.lost() {
            worker.save()?;
            return Err(anyhow!(reason));
        }
        worker.save_now_and_then()?;
    }
    worker.save()
}

impl Worker {
    fn take(&mut self, work: Work) -> Option<Done> {
        match work {
            Work::Train { id, order, deadline } => Some(self.train(id, &order, deadline)),
            Work::Load { epoch, branch, source } => {
                let rebuilt = self.setup.kit.rebuild(&source);
                let round = source
                    .steps
                    .last()
                    .map_or(source.round, |step| step.decided.record.slot.round);
                Some(answer(
                    epoch,
                    rebuilt.map(|agreed| self.hold(epoch, branch, round, agreed)),
                ))
            }
            Work::Apply { epoch, step, snapshot } => Some(answer(epoch, self.apply(epoch, &step, snapshot))),
            Work::Audit {
                order,
                source,
                shards,
                accumulators,
            } => {
                // If the side thread is gone, the process is ending.
                let _ = self.setup.side.send(Task::Audit {
                    order: Box::new(order),
                    source,
                    shards,
                    accumulators,
                });
                None
            }
        }
    }

    /// Takes `agreed` as the agreed state.
    fn hold(&mut self, epoch: u64, branch: Branch, round: Round, agreed: Vec<f32>) -> Done {
        self.agreed = agreed;
        let model_root = self.setup.kit.root(&self.agreed);
        self.at = Some(Stamp {
            branch,
            round: round.0,
            model_root,
        });
        Done::Applied {
            epoch,
            branch,
            round,
            model_root,
            snapshot: None,
        }
    }

    fn apply(&mut self, epoch: u64, step: &Step, snapshot: bool) -> Result<Done> {
        if self.agreed.is_empty() {
            return Err(anyhow!("asked to apply a record without a model"));
        }
        let slot = step.decided.record.slot;
        self.setup.kit.apply(&mut self.agreed, step)?;
        let agreed = std::mem::take(&mut self.agreed);
        let held = self.hold(epoch, slot.branch, slot.round, agreed);
        self.evaluate_in_turn(step);
        if self.setup.keeping.wants(slot.round.0) {
            self.aside(slot.round.0, "kept", |round, theta| Task::Keep { round, theta });
        }
        let Done::Applied { model_root, .. } = held else {
            return Ok(held);
        };
        let snapshot = snapshot.then(|| self.snapshot(model_root)).transpose()?;
        Ok(Done::Applied {
            epoch,
            branch: slot.branch,
            round: slot.round,
            model_root,
            snapshot,
        })
    }

    /// A snapshot is a file named by its root, as all peers have it.
    fn snapshot(&self, model_root: Hash) -> Result<PathBuf> {
        let folder = self.setup.dir.snapshots();
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{model_root}.safetensors"));
        checkpoint::save(&path, &self.setup.kit.agreed, &self.agreed)?;
        Ok(path)
    }

    /// Every few rounds one of those who contributed evaluates: whose turn it is follows from the round. Whoever looks for the best model does it
    /// each time.
    fn evaluate_in_turn(&self, step: &Step) {
        let record = &step.decided.record;
        let (round, members) = (record.slot.round.0, &record.contributions);
        if members.is_empty() || !round.is_multiple_of(EVAL_ROUNDS) {
            return;
        }
        let turn = (round / EVAL_ROUNDS) as usize % members.len();
        if members[turn].member == self.setup.me || self.setup.keeping.measures() {
            self.aside(round, "evaluated", |round, theta| Task::Evaluate { round, theta });
        }
    }

    /// Gives the side thread a copy of the model, unless it is behind.
    fn aside(&self, round: u64, what: &str, task: impl FnOnce(u64, Vec<f32>) -> Task) {
        if !self.setup.backlog.enter() {
            tracing::warn!(
                "evaluating and keeping models takes longer than training them: that of round {round} is not {what}"
            );
            return;
        }
        // If the side thread is gone, the process is ending.
        let _ = self
            .setup
            .side
            .send(task(round, self.setup.kit.parameters(&self.agreed).to_vec()));
    }

    fn train(&mut self, id: u64, order: &TrainOrder, deadline: Instant) -> Done {
        let round = order.round;
        if !self.setup.stop.wants(id) || order.batches.is_empty() {
            return Done::Idle { round, reason: None };
        }
        // Whatever was assigned and not delivered is handed out again by the next record.
        match self.contribute(id, order, deadline) {
            Ok(Some(done)) => {
                self.patience.renew();
                done
            }
            Ok(None) => Done::Idle { round, reason: None },
            Err(error) => {
                if let Some(LocalError::NonFinite { step, .. }) = error.downcast_ref() {
                    self.patience.spend();
                    let batch = batch_indices(&order.batches).nth(*step as usize);
                    tracing::warn!(%round, step, ?batch, "round abandoned: {error:#}");
                }
                Done::Idle {
                    round,
                    reason: Some(format!("{error:#}")),
                }
            }
        }
    }

    /// Trains, encodes, keeps the accumulator. `None` if it was stopped before the first step's end.
    fn contribute(&mut self, id: u64, order: &TrainOrder, deadline: Instant) -> Result<Option<Done>> {
        let Setup { kit, stop, cheat, .. } = &self.setup;
        // A branch may begin on the model of another; only the round must fit.
        if self.at.is_none_or(|at| at.round != order.round.previous().0) {
            return Err(anyhow!(
                "the model here is that of another round: expected {}",
                order.round.previous()
            ));
        }
        let assigned: Vec<BatchIndex> = batch_indices(&order.batches)
            .take(kit.training.max_inner_steps as usize)
            .collect();
        let claimed = assigned.len();
        let batches = trained_on(*cheat, assigned);
        let steps = batches.len();
        let (mut before, accumulator_before) = self.accumulators.load(order.accumulator);
        let state = before.split_off(kit.layout.total);
        let inputs = RoundInputs {
            theta: kit.parameters(&self.agreed),
            state: &state,
            global_tokens: order.global_tokens,
            batches: &mut |step| batches.get(step as usize).map(|index| kit.batch(*index)),
            keep_going: &mut |_| stop.wants(id) && Instant::now() < deadline,
            observe: &mut |step, loss| tracing::debug!(round = %order.round, step, loss, "trained"),
        };
        let mut local = self.replicas.local_round(&kit.training, inputs)?;
        if !stop.wants(id) {
            return Ok(None);
        }
        if cheat.is_some() {
            let found = local.delta.clone();
            sent(*cheat, &mut local.delta, &self.last);
            self.last = found;
        }
        let vector = kit.algorithm.vector(local.delta);
        let mut encoded = kit
            .algorithm
            .codec()
            .encode_with(&before, &vector, self.setup.threads)?;
        encoded.accumulator.extend(&local.state);
        let (accumulator_after, accumulator) = self.accumulators.save(&encoded.accumulator)?;
        let shards: Vec<Bytes> = encoded.shards.into_iter().map(Bytes::from).collect();
        // An honest peer claims the steps it took; a cheat that was not cut short claims all that it was given.
        let done = local.steps as usize;
        let tokens = if done == steps {
            claimed as u64 * kit.training.tokens_per_step()
        } else {
            local.tokens
        };
        let trained = Trained {
            branch: order.branch,
            round: order.round,
            shards: shards.iter().map(|shard| Hash::of(shard)).collect(),
            len: shards.iter().map(|shard| shard.len() as u64).sum(),
            tokens,
            loss_micros: (local.mean_loss * 1e6).clamp(0.0, 1e15) as u64,
            trace_root: Hash(local.trace_root),
            accumulator_before,
            accumulator_after,
        };
        Ok(Some(Done::Trained {
            trained,
            shards,
            accumulator,
        }))
    }

    fn save_now_and_then(&mut self) -> Result<()> {
        if self.saved_at.elapsed() >= self.save_took.saturating_mul(SAVE_SHARE) {
            self.save()
        } else {
            Ok(())
        }
    }

    /// Writes the model out, for `generate`, `export` and the next start's reader.
    fn save(&mut self) -> Result<()> {
        let Some(at) = self.at.filter(|at| self.saved != Some(*at)) else {
            return Ok(());
        };
        let began = Instant::now();
        model_file::save(&self.setup.dir, &self.setup.kit.agreed, &self.agreed, at)?;
        (self.saved, self.saved_at, self.save_took) = (Some(at), Instant::now(), began.elapsed());
        Ok(())
    }
}

fn answer(epoch: u64, result: Result<Done>) -> Done {
    result.unwrap_or_else(|error| Done::Failed {
        epoch,
        reason: format!("{error:#}"),
    })
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
