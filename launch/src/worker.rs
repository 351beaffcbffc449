//! The thread that owns the model: takes [`Work`] from the protocol, gives [`Done`].
//!
//! `agreed` is the agreed state as plain floats on the CPU, the model's parameters first; the device only ever sees copies. Steps are taken by
//! [`crate::training`], so that records are applied and contributions encoded while training goes on; audits and evaluations are handed to
//! [`crate::side`], so that a round never waits for them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use coordinatorless::config::RunConfig;
use coordinatorless::node::{Done, Step, Stop, Work};
use coordinatorless::protocol::event::{Encode, TrainOrder, Trained};
use coordinatorless::types::{Branch, Hash, PeerId, Round};
use trainer::checkpoint;
use trainer::compress::Codec;
use trainer::local::set_threads;

use crate::accumulators::Accumulators;
use crate::cheat;
use crate::cheat::Cheat;
use crate::keeper::Policy;
use crate::kit::Kit;
use crate::model_file::{self, Stamp};
use crate::peer_dir::PeerDir;
use crate::side::{Backlog, Task};
use crate::speed;
use crate::training::{self, Found, Job};

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
    /// Local rounds to train.
    pub training: Sender<training::Task>,
    /// What came of them.
    pub found: Receiver<Found>,
    /// Audits and evaluations.
    pub side: Sender<Task>,
}

/// The worker's own.
struct Worker {
    setup: Setup,
    accumulators: Accumulators,
    /// Copied when it changes, if it is still trained from.
    agreed: Arc<Vec<f32>>,
    /// With overlap (R16), the state of the round before, and which that is: the round in flight was trained from it.
    before: Option<(u64, Arc<Vec<f32>>)>,
    /// What was trained and waits to be encoded.
    waiting: Vec<Found>,
    /// What a cheat copied of the last record; nobody else does.
    copied: Option<Vec<Bytes>>,
    /// Whether there is a thread that trains.
    trains: bool,
    at: Option<Stamp>,
    saved: Option<Stamp>,
    saved_at: Instant,
    save_took: Duration,
}

/// How many accumulators a peer keeps: those of rounds that an auditor may still ask for, and some.
pub fn kept_accumulators(config: &RunConfig) -> usize {
    let rounds = config.verification.verdict_rounds.saturating_mul(2);
    usize::try_from(rounds.saturating_add(SPARE_ACCUMULATORS)).unwrap_or(usize::MAX)
}

/// Works until the protocol hangs up, then writes the model out.
///
/// # Errors
/// The disk.
pub fn work(setup: Setup, orders: &Receiver<Work>) -> Result<()> {
    set_threads(setup.threads);
    let kit = &setup.kit;
    let keep = kept_accumulators(&kit.config);
    let mut worker = Worker {
        accumulators: Accumulators::open(setup.dir.accumulators(), kit.kept(), keep)?,
        agreed: Arc::default(),
        before: None,
        waiting: Vec::new(),
        copied: None,
        trains: true,
        at: None,
        saved: None,
        saved_at: Instant::now(),
        save_took: Duration::ZERO,
        setup,
    };
    for order in orders {
        let answer = worker.take(order);
        if let Some(answer) = answer
            && worker.setup.done.blocking_send(answer).is_err()
        {
            break;
        }
        if !worker.trains {
            break;
        }
        worker.save_now_and_then()?;
    }
    worker.save()
}

impl Worker {
    fn take(&mut self, work: Work) -> Option<Done> {
        match work {
            Work::Train { id, order, deadline } => self.train(id, order, deadline),
            Work::Encode(encode) => Some(self.encode(&encode)),
            Work::Load { epoch, branch, source } => {
                let rebuilt = self.setup.kit.rebuild(&source);
                let round = source
                    .steps
                    .last()
                    .map_or(source.round, |step| step.decided.record.slot.round);
                Some(answer(
                    epoch,
                    rebuilt.map(|agreed| {
                        (self.agreed, self.before) = (Arc::new(agreed), None);
                        self.hold(epoch, branch, round)
                    }),
                ))
            }
            Work::Apply { epoch, step, snapshot } => Some(answer(epoch, self.apply(epoch, &step, snapshot))),
            Work::Speed { order, deadline } => self.pass_on(speed::Task::Prove { order, deadline }),
            Work::OpenSpeed(test) => self.pass_on(speed::Task::Open(test)),
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

    /// The agreed state is that after this round now.
    fn hold(&mut self, epoch: u64, branch: Branch, round: Round) -> Done {
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
        if self.setup.kit.config.timing.overlap > 0 {
            self.before = self.at.map(|at| (at.round, self.agreed.clone()));
        }
        let agreed: &mut Vec<f32> = Arc::make_mut(&mut self.agreed);
        self.setup.kit.apply(agreed, step)?;
        self.copied = cheat::copied(self.setup.cheat, &self.setup.me, step);
        cheat::leaves(self.setup.cheat, &self.setup.me, step);
        let held = self.hold(epoch, slot.branch, slot.round);
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

    /// Hands a local round to the thread that trains, with the model that it names: the last, or with overlap the one before.
    fn train(&mut self, id: u64, order: TrainOrder, deadline: Instant) -> Option<Done> {
        let Setup { kit, stop, .. } = &self.setup;
        if !stop.wants(id) {
            return None;
        }
        // A branch may begin on the model of another; only the round must fit.
        let last = self.at.map(|at| (at.round, &self.agreed));
        let before = self.before.as_ref().map(|(round, agreed)| (*round, agreed));
        let base = [last, before]
            .into_iter()
            .flatten()
            .find(|(round, _)| *round == order.base.0);
        let Some((_, agreed)) = base else {
            return Some(Done::TrainingEnded {
                branch: order.branch,
                round: order.round,
                fruitful: false,
                reason: Some(format!("the model after round {} is not here (any more)", order.base)),
            });
        };
        let state = match kit.training.carried(&kit.model) {
            0 => Vec::new(),
            _ => self.accumulators.load(order.accumulator).0.split_off(kit.layout.total),
        };
        // What was trained for the round before may wait to be encoded; nothing else is of use any more.
        self.waiting.extend(self.setup.found.try_iter());
        self.waiting.retain(|found| found.order.round.next() == order.round);
        let job = Job {
            id,
            order,
            deadline,
            agreed: agreed.clone(),
            state,
        };
        // If that thread is gone, it says why, and the process is ending.
        self.trains &= self.setup.training.send(training::Task::Train(job)).is_ok();
        None
    }

    fn pass_on(&mut self, task: speed::Task) -> Option<Done> {
        self.trains &= self.setup.training.send(training::Task::Speed(task)).is_ok();
        None
    }

    fn encode(&mut self, encode: &Encode) -> Done {
        let round = encode.work.round;
        self.contribute(encode).unwrap_or_else(|error| Done::Idle {
            round,
            reason: format!("{error:#}"),
        })
    }

    /// Encodes what was trained, keeps the accumulator.
    fn contribute(&mut self, encode: &Encode) -> Result<Done> {
        self.waiting.extend(self.setup.found.try_iter());
        let at = self.waiting.iter().position(|found| found.order == encode.work);
        let found = at.map(|at| self.waiting.swap_remove(at));
        // Of what was to be encoded before this, nothing will be; what is trained ahead may be.
        self.waiting.retain(|found| found.order.round > encode.work.round);
        let found = found.ok_or_else(|| anyhow!("what was trained is not here"))?;
        let kit = &self.setup.kit;
        let (mut before, accumulator_before) = self.accumulators.load(encode.accumulator);
        before.truncate(kit.layout.total);
        let vector = kit.algorithm.vector(found.delta);
        let mut encoded =
            kit.algorithm
                .codec_of(encode.work.round.0)
                .encode_with(&before, &vector, self.setup.threads)?;
        cheat::kept(self.setup.cheat, &mut encoded.accumulator);
        encoded.accumulator.extend(&found.state);
        let (accumulator_after, accumulator) = self.accumulators.save(encode.branch, &encoded.accumulator)?;
        let shards: Vec<Bytes> = match self.copied.take() {
            Some(copied) => copied,
            None => encoded.shards.into_iter().map(Bytes::from).collect(),
        };
        let shards = cheat::encoded(self.setup.cheat, shards);
        let trained = Trained {
            branch: encode.branch,
            round: encode.work.round,
            shards: shards.iter().map(|shard| Hash::of(shard)).collect(),
            len: shards.iter().map(|shard| shard.len() as u64).sum(),
            tokens: found.tokens,
            loss_micros: (found.mean_loss * 1e6).clamp(0.0, 1e15) as u64,
            trace_root: found.trace.root(),
            accumulator_before,
            accumulator_after,
        };
        Ok(Done::Trained {
            trained,
            shards,
            accumulator: cheat::opened(self.setup.cheat, accumulator)?,
            trace: found.trace,
        })
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
