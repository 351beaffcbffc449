//! What workers really encode: accumulators, pseudo-gradients and bytes of the last rounds of a short training, for `murmur bench codec`.

use std::cell::RefCell;

use super::plan::{Kind, Setting, Task, Trouble};
use super::simulate::{Data, Run};
use crate::aggregate::Update;
use crate::arms::{Algorithm, ArmError, Engine, Sparse, Work};
use crate::compress::{Encoded, SparseCodec};
use crate::config::{OptimizerConfig, OptimizerKind};

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
    let model = setting.model().map_err(crate::local::LocalError::from)?;
    let engine = Engine::new(&model, &setting.training(lr))?;
    let optimizer = OptimizerConfig {
        lr,
        ..OptimizerConfig::default()
    };
    let (beta, outer_rate) = (0.95, 2.0);
    let compression = Kind::compression(k, beta);
    let recorder = Recorder {
        inner: Sparse::new(
            engine.params(),
            &compression,
            &optimizer,
            setting.inner_steps,
            outer_rate,
        )?,
        keep: rounds * setting.workers,
        seen: RefCell::default(),
    };
    let task = Task {
        setting: setting.clone(),
        arm: "captured".to_owned(),
        kind: Kind::Sparse {
            optimizer: OptimizerKind::Muon,
            carry: false,
            accumulator: true,
            k,
            beta,
            outer_rate,
        },
        lr,
        trouble: Trouble::default(),
    };
    Run::start(&recorder, &task, data, engine)?.rounds(setting.rounds)?;
    Ok(recorder.seen.into_inner())
}

/// Sparse rounds that keep what was encoded last.
struct Recorder {
    inner: Sparse,
    keep: usize,
    seen: RefCell<Vec<Captured>>,
}

impl Algorithm for Recorder {
    type Codec = SparseCodec;
    type Outer = ();
    type Own = <Sparse as Algorithm>::Own;

    fn codec(&self) -> &SparseCodec {
        self.inner.codec()
    }

    fn inner_steps(&self) -> u32 {
        self.inner.inner_steps()
    }

    fn start(&self, _engine: &Engine) {}

    fn newcomer(&self, engine: &Engine) -> Self::Own {
        self.inner.newcomer(engine)
    }

    fn work(&self, engine: &mut Engine, own: &mut Self::Own, work: Work<'_>) -> Result<Vec<f32>, ArmError> {
        self.inner.work(engine, own, work)
    }

    fn encode(&self, own: &Self::Own, vector: &[f32]) -> Result<Encoded, ArmError> {
        let encoded = self.inner.encode(own, vector)?;
        let mut seen = self.seen.borrow_mut();
        if seen.len() == self.keep {
            seen.remove(0);
        }
        seen.push(Captured {
            accumulator: own.accumulator().to_vec(),
            delta: vector.to_vec(),
            shards: encoded.shards.clone(),
        });
        Ok(encoded)
    }

    fn counted(&self, own: &mut Self::Own, encoded: Encoded) {
        self.inner.counted(own, encoded);
    }

    fn advance(
        &self,
        engine: &mut Engine,
        theta: &mut Vec<f32>,
        outer: &mut (),
        update: &Update,
        lr: f64,
    ) -> Result<(), ArmError> {
        self.inner.advance(engine, theta, outer, update, lr)
    }
}
