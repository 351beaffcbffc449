//! One run: workers in turn, real bytes, the real sum.

use std::time::{Duration, Instant};

use datasets::{Dataset, Order};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::attack::Attack;
use super::plan::Task;
use crate::aggregate::{Weighted, aggregate_by};
use crate::arms::{Algorithm, ArmError, agreed_layout, algorithm};
use crate::compress::Codec;
use crate::config::TrainingConfig;
use crate::eval::validation_loss;
use crate::local::{LocalError, RoundInputs, local_round};
use crate::model::{Model, init_flat};

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
    Run::new(task, data, None)?.all(note)
}

/// What a worker comes back with.
struct Found {
    /// What it will encode.
    vector: Vec<f32>,
    /// Its inner optimizer's state, if that is carried.
    state: Vec<f32>,
}

/// What a worker encodes: its accumulator, what it found, the bytes.
pub(super) type Recorder<'a> = &'a mut dyn FnMut(&[f32], &[f32], &[Vec<u8>]);

/// A run in progress.
pub(super) struct Run<'a> {
    task: &'a Task,
    data: &'a Data,
    training: TrainingConfig,
    algorithm: Box<dyn Algorithm>,
    model: Model,
    /// Parameters, and what the algorithm keeps beside them.
    agreed: Vec<f32>,
    /// What each keeps to itself, accumulator and inner state: honest workers, then liars.
    workers: Vec<Vec<f32>>,
    recorder: Option<Recorder<'a>>,
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

impl<'a> Run<'a> {
    /// A run from the seed's parameters.
    pub(super) fn new(task: &'a Task, data: &'a Data, recorder: Option<Recorder<'a>>) -> Result<Self, ArmError> {
        let (setting, training) = (&task.setting, task.training());
        let config = setting.model().map_err(LocalError::from)?;
        training.validate_with(&config).map_err(LocalError::from)?;
        let algorithm = algorithm(&config, &training)?;
        let mut agreed = init_flat(&config, setting.seed);
        agreed.resize(agreed_layout(&config, algorithm.as_ref()).total, 0.0);
        let kept = config.param_count() + training.carried(&config);
        Ok(Self {
            workers: vec![vec![0.0; kept]; setting.workers + task.trouble.attackers],
            model: Model::new(&config, Device::Cpu)?,
            agreed,
            algorithm,
            training,
            task,
            data,
            recorder,
            tokens: 0,
            batches: 0,
            exchanges: 0,
            contributions: 0,
            bytes: 0,
            worked: Duration::ZERO,
            points: Vec::new(),
        })
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
            params: self.params(),
            contribution_bytes: self.contribution_bytes(),
            points: self.points,
            work_seconds: self.worked.as_secs_f64(),
            diverged,
        })
    }

    fn params(&self) -> usize {
        self.algorithm.codec().params()
    }

    /// One exchange: work, encode, sum, advance.
    fn exchange(&mut self) -> Result<(), ArmError> {
        let setting = &self.task.setting;
        let steps = self.training.max_inner_steps;
        let round = self.exchanges / u64::from((setting.inner_steps / steps).max(1));
        let honest: Vec<usize> = (0..setting.workers)
            .filter(|worker| !self.misses(round, *worker))
            .collect();
        let mut found = Vec::with_capacity(self.workers.len());
        for worker in &honest {
            found.push(self.work(*worker, None)?);
        }
        let mut present = honest.clone();
        if let (Some(attack), false) = (self.task.trouble.attack, honest.is_empty()) {
            let liars = setting.workers..self.workers.len();
            present.extend(liars.clone());
            let vectors: Vec<&[f32]> = found.iter().map(|found| &found.vector[..]).collect();
            let crafted = attack.vector(&vectors);
            for liar in liars {
                found.push(match &crafted {
                    Some(vector) => Found {
                        vector: vector.clone(),
                        state: self.workers[liar][self.params()..].to_vec(),
                    },
                    None => self.work(liar, Some(attack))?,
                });
            }
        }
        let tokens = honest.len() as u64 * u64::from(steps) * setting.step_tokens();
        self.sum(&present, found, tokens)?;
        self.exchanges += 1;
        self.tokens += tokens;
        Ok(())
    }

    /// Encodes, sums and applies.
    fn sum(&mut self, present: &[usize], found: Vec<Found>, honest_tokens: u64) -> Result<(), ArmError> {
        let codec = &*self.algorithm.codec_of(self.exchanges + 1);
        let params = codec.params();
        let mut encoded = Vec::with_capacity(present.len());
        for (worker, Found { vector, state }) in present.iter().zip(found) {
            let own = &self.workers[*worker][..params];
            let mut one = codec.encode_with(own, &vector, 1)?;
            if let Some(record) = &mut self.recorder {
                record(own, &vector, &one.shards);
            }
            one.accumulator.extend(state);
            encoded.push(one);
        }
        let tokens = u64::from(self.training.max_inner_steps) * self.task.setting.step_tokens();
        let weighted: Vec<Weighted<'_, Vec<u8>>> = encoded
            .iter()
            .map(|encoded| Weighted {
                tokens,
                shards: &encoded.shards,
            })
            .collect();
        let update = aggregate_by(codec, &weighted, self.training.rule, 1, Vec::new())?;
        let bytes: usize = encoded.iter().flat_map(|encoded| &encoded.shards).map(Vec::len).sum();
        self.bytes += bytes as u64;
        self.contributions += encoded.len() as u64;
        for (worker, encoded) in present.iter().zip(encoded) {
            self.workers[*worker] = encoded.accumulator;
        }
        self.algorithm.advance(&mut self.agreed, &update, honest_tokens, 1)
    }

    /// What a worker finds on the next batches; a liar's are spoiled and not taken from the honest.
    fn work(&mut self, worker: usize, attack: Option<Attack>) -> Result<Found, ArmError> {
        let sequences = self.task.setting.batch_sequences;
        let steps = u64::from(self.training.max_inner_steps);
        let params = self.params();
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
        let inputs = RoundInputs {
            theta: &self.agreed[..params],
            state: &self.workers[worker][params..],
            global_tokens: self.tokens,
            batches: &mut |step| batches.get(step as usize).cloned(),
            keep_going: &mut |_| true,
            observe: &mut |_, _| (),
        };
        let local = local_round(&mut self.model, &self.training, inputs)?;
        let vector = self.algorithm.vector(local.delta);
        self.worked += began.elapsed();
        Ok(Found {
            vector,
            state: local.state,
        })
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
            loss: validation_loss(
                &mut self.model,
                &self.agreed[..self.algorithm.codec().params()],
                &self.data.held_out,
            )?,
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
