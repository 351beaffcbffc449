//! The local round: agreed model and assigned batches in, pseudo-gradient out.
//!
//! A round is a function of what all peers know: the parameters `theta_r`, the sequences, the schedule's value at the record's token count. The
//! optimizer starts from zero, so an auditor who replays the same steps needs nothing from the peer (unless the run says `carry`, where it
//! starts from what the peer's last counted round left). At fixed threads on one machine the
//! replay has the same bits; elsewhere it agrees within the tolerance of its precision.
//!
//! **Trace.** Of every step the peer keeps the loss and the gradient's norm, which both hang on all parameters before it: two rounds that part
//! ways at some step have other numbers from the next one on, and the first leaf that differs tells where. The parameters themselves are not
//! hashed: on a GPU that would take several times as long as the step. With `|` for concatenation and all integers little-endian:
//!
//! ```text
//! leaf_s = BLAKE3("murmur/trace/2\0" | s: u32 | loss: f32 bits | gradient norm before clipping: f64 bits)      s = 0, 1, ...
//! node   = BLAKE3("murmur/trace-node/1\0" | left: 32 | right: 32)       pairs from the left; a last odd one moves up as it is
//! root   = BLAKE3("murmur/trace-root/1\0" | steps: u32 | top: 32)       the count is bound, so no odd tree has a twin
//! ```

use tch::{Device, Kind, Tensor};

use crate::collective::CollectiveError;
use crate::config::{ConfigError, InnerState, TrainingConfig};
use crate::gradient::Gradients;
use crate::memory::MemoryError;
use crate::model::{Model, ModelError, host};
use crate::optimizer::{Optimizer, clip_scale};
use crate::schedule::learning_rate;

/// What a round is computed from.
pub struct RoundInputs<'a> {
    /// The agreed parameters, in the layout's order.
    pub theta: &'a [f32],
    /// The optimizer's state after the last counted round, where the run carries it; else nothing, which is a fresh one.
    pub state: &'a [f32],
    /// Tokens counted in the whole run up to this round; sets the learning rate, which is constant within the round.
    pub global_tokens: u64,
    /// The batch of each step, counted from 0: `batch_sequences` sequences of `seq_len + 1` tokens; `None` ends the round.
    pub batches: &'a mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
    /// Asked after each step with the number done: whether there is time for another.
    pub keep_going: &'a mut dyn FnMut(u32) -> bool,
    /// Told after each step: its number from 0, and its loss in nats per token, taken before the step.
    pub observe: &'a mut dyn FnMut(u32, f64),
}

/// What a round gives.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalRound {
    /// The pseudo-gradient `theta_r - theta_local`, in the layout's order; where the way of training sends gradients, that of the last batch, not
    /// clipped.
    pub delta: Vec<f32>,
    /// The optimizer's state after the last step, where the run carries it; else empty.
    pub state: Vec<f32>,
    /// Inner steps taken, at least one.
    pub steps: u32,
    /// Tokens predicted: `steps * batch_sequences * seq_len`.
    pub tokens: u64,
    /// Mean loss over the steps, nats per token.
    pub mean_loss: f64,
    /// Loss of the first batch under the agreed parameters, nats per token.
    pub first_loss: f64,
    /// Loss of the last batch before the last step, nats per token.
    pub last_loss: f64,
    /// Loss and gradient norm of each step, as the leaves have them.
    pub numbers: Vec<(f32, f64)>,
    /// The leaf of each step.
    pub trace: Vec<[u8; 32]>,
    /// The root over them.
    pub trace_root: [u8; 32],
}

/// Why a round gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The training configuration does not fit the model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The parameters do not fit the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There was no batch at all.
    #[error("no batch for the first step")]
    NoBatch,
    /// A batch of the wrong shape.
    #[error("step {step}: the batch is {found}, expected {expected}")]
    Shape {
        /// The step, from 0.
        step: u32,
        /// Sequences and tokens expected.
        expected: String,
        /// Those found.
        found: String,
    },
    /// A token that the vocabulary lacks.
    #[error("step {step}: token {found} in a vocabulary of {vocab_size}")]
    Token {
        /// The step, from 0.
        step: u32,
        /// The token found.
        found: u32,
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
    /// Loss or gradient ceased to be a number: the model diverged or the data are poison.
    #[error("step {step}: {what} is {value}, expected a finite number")]
    NonFinite {
        /// The step, from 0.
        step: u32,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// The value found.
        value: f64,
    },
    /// There is too little memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A batch that cannot be shared out evenly.
    #[error(
        "{ranks} devices cannot share batches of {found} sequences evenly; take a batch_sequences that is a multiple of {ranks}, or fewer devices"
    )]
    Shares {
        /// Devices.
        ranks: usize,
        /// Sequences of a batch.
        found: usize,
    },
    /// The devices of this peer could not add up their gradients.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A device's thread ended before it should.
    #[error("the thread of device {rank} of this peer ended early")]
    Rank {
        /// Which, from 0.
        rank: usize,
    },
    /// libtorch failed, usually for want of memory.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// Sets how many threads libtorch computes with. Training has the same bits at the same number only: the order of partial sums follows the
/// threads. Call it on the thread that trains, before it computes anything: OpenMP keeps the number per calling thread, and a
/// thread that has computed already keeps its own.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// Trains from the agreed parameters for up to `max_inner_steps` steps and returns the pseudo-gradient.
///
/// # Errors
/// See [`LocalError`]; the model then holds no meaningful parameters, and the next round loads them anew.
pub fn local_round(
    model: &mut Model,
    training: &TrainingConfig,
    inputs: RoundInputs<'_>,
) -> Result<LocalRound, LocalError> {
    training.validate_with(model.config())?;
    let theta = inputs.theta;
    let mut stepper = Stepper::begin(model, training, inputs.state, theta, inputs.global_tokens)?;
    let taken = take_steps(training.max_inner_steps, inputs, &mut |batch| {
        stepper.step(model, batch)
    })?;
    taken.round(training, theta, model, stepper.left())
}

/// What steps leave behind beside the model that they moved.
#[derive(Default)]
pub(crate) struct Left {
    /// The optimizer's state, where the run carries it; else nothing.
    state: Vec<f32>,
    /// The last gradient, where that is what is sent.
    gradient: Option<Vec<f32>>,
}

/// What the steps of a round came to.
pub(crate) struct Taken {
    numbers: Vec<(f32, f64)>,
    trace: Vec<[u8; 32]>,
}

/// What a step gives: the loss before it, and the gradient's norm before clipping.
type Stepped = Result<(f32, f64), LocalError>;

/// Takes steps as long as there are batches and time.
pub(crate) fn take_steps(
    most: u32,
    inputs: RoundInputs<'_>,
    take: &mut dyn FnMut(&[Vec<u32>]) -> Stepped,
) -> Result<Taken, LocalError> {
    let (mut numbers, mut trace) = (Vec::new(), Vec::new());
    for step in 0..most {
        let Some(batch) = (inputs.batches)(step) else { break };
        let (loss, norm) = take(&batch)?;
        numbers.push((loss, norm));
        trace.push(trace_leaf(step, loss, norm));
        (inputs.observe)(step, f64::from(loss));
        if !(inputs.keep_going)(step + 1) {
            break;
        }
    }
    Ok(Taken { numbers, trace })
}

impl Taken {
    /// The round that ended with `model` and this left behind.
    ///
    /// # Errors
    /// No step was taken.
    pub(crate) fn round(
        self,
        training: &TrainingConfig,
        theta: &[f32],
        model: &Model,
        left: Left,
    ) -> Result<LocalRound, LocalError> {
        let Self { numbers, trace } = self;
        let losses: Vec<f64> = numbers.iter().map(|(loss, _)| f64::from(*loss)).collect();
        let (Some(&first_loss), Some(&last_loss)) = (losses.first(), losses.last()) else {
            return Err(LocalError::NoBatch);
        };
        let moved = |local: &[f32]| theta.iter().zip(local).map(|(agreed, local)| agreed - local).collect();
        Ok(LocalRound {
            delta: left.gradient.unwrap_or_else(|| model.with_flat(moved)),
            state: left.state,
            steps: trace.len() as u32,
            tokens: trace.len() as u64 * training.tokens_per_step(),
            mean_loss: losses.iter().sum::<f64>() / losses.len() as f64,
            first_loss,
            last_loss,
            trace_root: trace_root(&trace),
            numbers,
            trace,
        })
    }
}

/// The inner steps of one round: optimizer state, learning rate, and the number done.
pub(crate) struct Stepper {
    training: TrainingConfig,
    gradients: Gradients,
    optimizer: Optimizer,
    lr: f64,
    done: u32,
    gradient: Option<Vec<f32>>,
}

impl Stepper {
    /// Fresh state for `model`, at the constant learning rate `lr`.
    pub(crate) fn new(model: &Model, training: &TrainingConfig, lr: f64) -> Result<Self, LocalError> {
        let optimizer = Optimizer::new(&training.optimizer, training.precision, model.config(), model.device());
        Ok(Self {
            training: training.clone(),
            gradients: Gradients::new(model, training)?,
            optimizer,
            lr,
            done: 0,
            gradient: None,
        })
    }

    /// A round's: `model` gets the agreed parameters, the optimizer the carried state if there is one.
    pub(crate) fn begin(
        model: &mut Model,
        training: &TrainingConfig,
        state: &[f32],
        theta: &[f32],
        global_tokens: u64,
    ) -> Result<Self, LocalError> {
        model.load_flat(theta)?;
        let mut stepper = Self::new(model, training, learning_rate(training, global_tokens))?;
        if !state.is_empty() {
            stepper.optimizer.load_state(state)?;
        }
        Ok(stepper)
    }

    /// What is left when no more steps come.
    pub(crate) fn left(&mut self) -> Left {
        Left {
            state: match self.training.optimizer.state {
                InnerState::Carry => self.optimizer.state(),
                InnerState::Reset => Vec::new(),
            },
            gradient: self.gradient.take(),
        }
    }

    /// One step on a batch of `batch_sequences` sequences of `seq_len + 1` tokens: forward, backward, clip, update. Returns the loss before it and
    /// the gradient's norm before clipping.
    pub(crate) fn step(&mut self, model: &mut Model, batch: &[Vec<u32>]) -> Stepped {
        self.step_with(model, batch, &mut |loss, _| Ok(loss))
    }

    /// The same, where `between` may change loss and gradient before they are looked at: by what other ranks found in their share of the batch.
    pub(crate) fn step_with(
        &mut self,
        model: &mut Model,
        batch: &[Vec<u32>],
        between: &mut dyn FnMut(f64, &Tensor) -> Result<f64, LocalError>,
    ) -> Stepped {
        let step = self.done;
        self.check(batch, model)?;
        let (loss, gradient) = self.gradients.of(model, batch)?;
        let loss = between(loss, gradient)?;
        let norm = gradient.norm().double_value(&[]);
        for (what, value) in [("loss", loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(LocalError::NonFinite { step, what, value });
            }
        }
        if self.training.algorithm.sends_gradients() {
            self.gradient = Some(host::to_vec(gradient));
        } else {
            let scale = clip_scale(norm, self.training.grad_clip);
            self.optimizer.step(model.flat_mut(), gradient, scale, self.lr)?;
        }
        self.done += 1;
        Ok((loss as f32, norm))
    }

    /// Checks the batch's shape and tokens.
    fn check(&self, batch: &[Vec<u32>], model: &Model) -> Result<(), LocalError> {
        let (rows, columns) = (self.training.batch_sequences, self.training.seq_len + 1);
        let told = |rows: usize, columns: usize| format!("{rows} sequences of {columns} tokens");
        let odd = batch.iter().find(|sequence| sequence.len() != columns);
        if batch.len() != rows || odd.is_some() {
            let found = told(batch.len(), odd.map_or(columns, Vec::len));
            return Err(LocalError::Shape {
                step: self.done,
                expected: told(rows, columns),
                found,
            });
        }
        let vocab_size = model.config().vocab_size;
        if let Some(&found) = batch.iter().flatten().find(|&&token| token as usize >= vocab_size) {
            return Err(LocalError::Token {
                step: self.done,
                found,
                vocab_size,
            });
        }
        Ok(())
    }
}

/// Sequences of `columns` tokens each as an i64 tensor `[sequences, columns]`.
pub(crate) fn token_tensor(sequences: &[Vec<u32>], columns: usize, device: Device) -> Tensor {
    let tokens: Vec<i64> = sequences.iter().flatten().map(|&token| i64::from(token)).collect();
    Tensor::from_slice(&tokens)
        .view([-1, columns as i64])
        .to_kind(Kind::Int64)
        .to_device(device)
}

/// The hash of one step; see the module's documentation.
fn trace_leaf(step: u32, loss: f32, norm: f64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(b"murmur/trace/2\0")
        .update(&step.to_le_bytes())
        .update(&loss.to_bits().to_le_bytes())
        .update(&norm.to_bits().to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// The root over the leaves of a round's steps; see the module's documentation. Zero steps have a root too, over a top of zeros.
pub fn trace_root(leaves: &[[u8; 32]]) -> [u8; 32] {
    let mut level = leaves.to_vec();
    while level.len() > 1 {
        level = level.chunks(2).map(trace_node).collect();
    }
    let top = level.first().copied().unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    let steps = u32::try_from(leaves.len()).unwrap_or(u32::MAX);
    hasher
        .update(b"murmur/trace-root/1\0")
        .update(&steps.to_le_bytes())
        .update(&top);
    *hasher.finalize().as_bytes()
}

/// The parent of one or two nodes.
fn trace_node(children: &[[u8; 32]]) -> [u8; 32] {
    let [left, right] = children else {
        return children.first().copied().unwrap_or_default();
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"murmur/trace-node/1\0").update(left).update(right);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_root_binds_every_step_their_order_and_their_number() {
        let leaves: Vec<[u8; 32]> = (0..5).map(|i| [i; 32]).collect();
        let root = trace_root(&leaves);
        for i in 0..5 {
            let mut changed = leaves.clone();
            changed[i][31] ^= 1;
            assert_ne!(trace_root(&changed), root, "step {i}");
        }
        let mut swapped = leaves.clone();
        swapped.swap(1, 2);
        assert_ne!(trace_root(&swapped), root);
        assert_ne!(trace_root(&leaves[..4]), root);
    }
}
