//! One run: workers in turn, real bytes, the real sum.

use std::time::{Duration, Instant};

use datasets::{Dataset, Order};
use serde::{Deserialize, Serialize};

use super::attack::Attack;
use super::plan::{Kind, Task};
use crate::aggregate::{Weighted, aggregate_by};
use crate::arms::{Algorithm, ArmError, Ddp, Demo, DiLoCo, Engine, Sparse, Work};
use crate::compress::{DenseCodec, Int8Codec};
use crate::config::{OptimizerConfig, OptimizerKind};
use crate::model::init_flat;
use crate::schedule::learning_rate;

/// Held-out losses of a run, evenly spaced in tokens, the last at its end.
const POINTS: u64 = 8;

/// A run whose loss is this many times that of a guess has diverged.
const LOST: f64 = 2.0;

/// Text for all runs.
#[derive(Debug)]
pub struct Data {
    set: Dataset,
    order: Order,
    held_out: Vec<Vec<u32>>,
}

impl Data {
    /// Training sequences in an order of their own for `seed`, and the first `held_out` sequences that training never sees.
    #[must_use]
    pub fn new(set: Dataset, seed: u64, held_out: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            order: Order::new(key, set.train_sequences()),
            held_out: (0..held_out.min(set.held_out_sequences()))
                .map(|i| set.held_out(i))
                .collect(),
            set,
        }
    }
}

/// A run at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Honest tokens so far.
    pub tokens: u64,
    /// Exchanges so far.
    pub exchanges: u64,
    /// Bytes that one worker has sent, if it was never missing.
    pub bytes: f64,
    /// Held-out loss, nats per token.
    pub loss: f64,
}

/// What a run gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The run.
    pub task: Task,
    /// Parameters of the model.
    pub params: usize,
    /// Losses on the way; the last one counts.
    pub points: Vec<Point>,
    /// Mean bytes of a contribution.
    pub contribution_bytes: f64,
    /// Seconds that all workers computed for, one after the other.
    pub work_seconds: f64,
    /// Why it ended early.
    pub diverged: Option<String>,
}

impl Outcome {
    /// The loss at the end; infinite if it diverged.
    #[must_use]
    pub fn loss(&self) -> f64 {
        match (&self.diverged, self.points.last()) {
            (None, Some(point)) => point.loss,
            _ => f64::INFINITY,
        }
    }
}

/// Runs a task to its end, or to its divergence. `note` is told each point.
///
/// # Errors
/// Settings out of bounds, or short memory.
pub fn simulate(task: &Task, data: &Data, note: &dyn Fn(Point)) -> Result<Outcome, ArmError> {
    let setting = &task.setting;
    let model = setting.model().map_err(crate::local::LocalError::from)?;
    let engine = Engine::new(&model, &setting.training(task.lr))?;
    let params = engine.params();
    let theta = init_flat(&model, setting.seed);
    let steps = setting.inner_steps;
    let optimizer = |kind: OptimizerKind| OptimizerConfig {
        kind,
        lr: task.lr,
        ..OptimizerConfig::default()
    };
    match task.kind.clone() {
        Kind::Ddp { optimizer: kind } => {
            Run::new(&Ddp::new(params, &optimizer(kind))?, task, data, engine, theta).all(note)
        }
        Kind::Diloco {
            optimizer: kind,
            int8: false,
        } => {
            let arm = DiLoCo::new(DenseCodec::new(params)?, &optimizer(kind), steps);
            Run::new(&arm, task, data, engine, theta).all(note)
        }
        Kind::Diloco {
            optimizer: kind,
            int8: true,
        } => {
            let arm = DiLoCo::new(Int8Codec::new(params)?, &optimizer(kind), steps);
            Run::new(&arm, task, data, engine, theta).all(note)
        }
        Kind::Demo { k } => Run::new(&Demo::new(&engine, k)?, task, data, engine, theta).all(note),
        Kind::Sparse {
            optimizer: kind,
            carry,
            accumulator,
            k,
            beta,
            outer_rate,
        } => {
            let arm = Sparse::new(params, &Kind::compression(k, beta), &optimizer(kind), steps, outer_rate)?
                .carrying(carry)
                .accumulating(accumulator);
            Run::new(&arm, task, data, engine, theta).all(note)
        }
    }
}

/// A run in progress.
pub(super) struct Run<'a, A: Algorithm> {
    algorithm: &'a A,
    task: &'a Task,
    data: &'a Data,
    engine: Engine,
    theta: Vec<f32>,
    outer: A::Outer,
    /// Honest workers, then liars.
    workers: Vec<A::Own>,
    /// Honest tokens counted.
    tokens: u64,
    /// Batches handed out.
    batches: u64,
    exchanges: u64,
    contributions: u64,
    bytes: u64,
    worked: Duration,
    points: Vec<Point>,
}

impl<'a, A: Algorithm> Run<'a, A> {
    fn new(algorithm: &'a A, task: &'a Task, data: &'a Data, engine: Engine, theta: Vec<f32>) -> Self {
        let workers = task.setting.workers + task.trouble.attackers;
        Self {
            outer: algorithm.start(&engine),
            workers: (0..workers).map(|_| algorithm.newcomer(&engine)).collect(),
            algorithm,
            task,
            data,
            engine,
            theta,
            tokens: 0,
            batches: 0,
            exchanges: 0,
            contributions: 0,
            bytes: 0,
            worked: Duration::ZERO,
            points: Vec::new(),
        }
    }

    /// A run from the seed's parameters.
    pub(super) fn start(algorithm: &'a A, task: &'a Task, data: &'a Data, engine: Engine) -> Result<Self, ArmError> {
        let model = task.setting.model().map_err(crate::local::LocalError::from)?;
        let theta = init_flat(&model, task.setting.seed);
        Ok(Self::new(algorithm, task, data, engine, theta))
    }

    /// So many exchanges and no evaluation.
    pub(super) fn rounds(mut self, exchanges: u64) -> Result<(), ArmError> {
        (0..exchanges).try_for_each(|_| self.exchange())
    }

    fn all(mut self, note: &dyn Fn(Point)) -> Result<Outcome, ArmError> {
        let total = self.task.setting.tokens();
        let mut diverged = None;
        while self.tokens < total && diverged.is_none() {
            match self.exchange() {
                Err(error) if error.is_divergence() => diverged = Some(error.to_string()),
                other => other?,
            }
            if self.tokens * POINTS >= (self.points.len() as u64 + 1) * total {
                let point = self.point()?;
                note(point);
                diverged = diverged.or_else(|| self.lost(point.loss));
            }
        }
        Ok(Outcome {
            task: self.task.clone(),
            params: self.engine.params(),
            contribution_bytes: self.contribution_bytes(),
            points: self.points,
            work_seconds: self.worked.as_secs_f64(),
            diverged,
        })
    }

    /// One exchange: work, encode, sum, advance.
    fn exchange(&mut self) -> Result<(), ArmError> {
        let setting = &self.task.setting;
        let lr = learning_rate(&setting.training(self.task.lr), self.tokens);
        let steps = self.algorithm.inner_steps();
        let round = self.exchanges / u64::from((setting.inner_steps / steps).max(1));
        let honest: Vec<usize> = (0..setting.workers)
            .filter(|worker| !self.misses(round, *worker))
            .collect();
        let mut vectors = Vec::with_capacity(self.workers.len());
        for worker in &honest {
            vectors.push(self.work(*worker, lr, None)?);
        }
        let mut present = honest.clone();
        if let (Some(attack), false) = (self.task.trouble.attack, honest.is_empty()) {
            let liars = setting.workers..self.workers.len();
            present.extend(liars.clone());
            let crafted = attack.vector(&vectors);
            for liar in liars {
                vectors.push(match &crafted {
                    Some(vector) => vector.clone(),
                    None => self.work(liar, lr, Some(attack))?,
                });
            }
        }
        self.sum(&present, &vectors, lr)?;
        self.exchanges += 1;
        self.tokens += honest.len() as u64 * u64::from(steps) * setting.step_tokens();
        Ok(())
    }

    /// Encodes, sums and applies.
    fn sum(&mut self, present: &[usize], vectors: &[Vec<f32>], lr: f64) -> Result<(), ArmError> {
        let mut encoded = Vec::with_capacity(present.len());
        for (worker, vector) in present.iter().zip(vectors) {
            encoded.push(self.algorithm.encode(&self.workers[*worker], vector)?);
        }
        let tokens = u64::from(self.algorithm.inner_steps()) * self.task.setting.step_tokens();
        let weighted: Vec<Weighted<'_, Vec<u8>>> = encoded
            .iter()
            .map(|encoded| Weighted {
                tokens,
                shards: &encoded.shards,
            })
            .collect();
        let update = aggregate_by(self.algorithm.codec(), &weighted, self.task.trouble.rule, 1, Vec::new())?;
        let bytes: usize = encoded.iter().flat_map(|encoded| &encoded.shards).map(Vec::len).sum();
        self.bytes += bytes as u64;
        self.contributions += encoded.len() as u64;
        for (worker, encoded) in present.iter().zip(encoded) {
            self.algorithm.counted(&mut self.workers[*worker], encoded);
        }
        self.algorithm
            .advance(&mut self.engine, &mut self.theta, &mut self.outer, &update, lr)
    }

    /// What a worker finds on the next batches; a liar's are spoiled and not taken from the honest.
    fn work(&mut self, worker: usize, lr: f64, attack: Option<Attack>) -> Result<Vec<f32>, ArmError> {
        let sequences = self.task.setting.batch_sequences;
        let steps = u64::from(self.algorithm.inner_steps());
        let batch = |number: u64| {
            let position = number * sequences as u64;
            self.data.set.batch(&self.data.order, position, sequences)
        };
        let mut batches: Vec<Vec<Vec<u32>>> = (self.batches..self.batches + steps).map(batch).collect();
        match attack {
            Some(attack) => batches = attack.text(batches),
            None => self.batches += steps,
        }
        let began = Instant::now();
        let work = Work {
            theta: &self.theta,
            lr,
            batches: &batches,
        };
        let vector = self.algorithm.work(&mut self.engine, &mut self.workers[worker], work)?;
        self.worked += began.elapsed();
        Ok(vector)
    }

    /// Whether a worker is away for a round: the same in every arm.
    fn misses(&self, round: u64, worker: usize) -> bool {
        let mut hasher = blake3::Hasher::new();
        for part in [self.task.setting.seed, round, worker as u64] {
            hasher.update(&part.to_le_bytes());
        }
        let [low, high, ..] = *hasher.finalize().as_bytes();
        u64::from(u16::from_le_bytes([low, high])) * 1000 < u64::from(self.task.trouble.dropout_permille) << 16
    }

    fn point(&mut self) -> Result<Point, ArmError> {
        let point = Point {
            tokens: self.tokens,
            exchanges: self.exchanges,
            bytes: self.contribution_bytes() * self.exchanges as f64,
            loss: self.engine.evaluate(&self.theta, &self.data.held_out)?,
        };
        self.points.push(point);
        Ok(point)
    }

    fn contribution_bytes(&self) -> f64 {
        self.bytes as f64 / self.contributions.max(1) as f64
    }

    fn lost(&self, loss: f64) -> Option<String> {
        let guess = 256f64.ln();
        let lost = loss.is_nan() || loss >= LOST * guess;
        lost.then(|| format!("held-out loss {loss:.2} after {} tokens", self.tokens))
    }
}
