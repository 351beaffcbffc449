//! Loss and gradient of a step's batch, whichever way they are computed: written out by hand on a CPU
//! ([`ByHand`]), by libtorch's autograd elsewhere and for models that are not written out.
//!
//! A batch may go through the model in pieces of `micro_batch` sequences. Each piece's gradient is that of its summed loss over the whole step's
//! rows, so the pieces add up to the gradient of the step's mean loss, within rounding.

use tch::{Device, TchError, Tensor};

use crate::config::{Precision, TrainingConfig};
use crate::kernels::{Bf16, Buffer, Number};
use crate::local::{LocalError, token_tensor};
use crate::memory;
use crate::model::Model;
use crate::model::autograd::Autograd;
use crate::model::by_hand::{Batch, ByHand};

/// Computes gradients of batches of one shape.
pub(crate) struct Gradients {
    /// Sequences at once.
    micro: usize,
    path: Path,
}

enum Path {
    ByHand(Box<WrittenOut>),
    Autograd(Autograd),
}

/// The pass, its gradient `[total]`, and room for the tokens.
struct WrittenOut {
    pass: Box<dyn Pass>,
    flat: Buffer<f32>,
    inputs: Vec<i64>,
    targets: Vec<i64>,
}

/// [`ByHand`] in either precision.
trait Pass {
    fn run(&mut self, model: &Model, batch: &Batch<'_>, gradient: &mut Buffer<f32>) -> Result<f64, TchError>;
}

impl<N: Number> Pass for ByHand<N> {
    fn run(&mut self, model: &Model, batch: &Batch<'_>, gradient: &mut Buffer<f32>) -> Result<f64, TchError> {
        Self::run(self, model, batch, gradient)
    }
}

/// Whether the gradient of this model is written out here.
pub(crate) fn by_hand(model: &Model) -> bool {
    ByHand::<f32>::supports(model)
}

impl Gradients {
    /// Memory and plan for the batches of `training`.
    ///
    /// # Errors
    /// Too little memory, which is said before it is asked for.
    pub(crate) fn new(model: &Model, training: &TrainingConfig) -> Result<Self, LocalError> {
        let micro = training.sequences_at_once();
        if !by_hand(model) {
            let path = Path::Autograd(Autograd::new(model, training.precision)?);
            return Ok(Self { micro, path });
        }
        memory::Need::of_training(model.config(), training).must_fit()?;
        let (seq, again) = (training.seq_len, training.recompute);
        let pass: Box<dyn Pass> = match training.precision {
            Precision::Fp32 | Precision::Tf32 => Box::new(ByHand::<f32>::new(model, micro, seq, again)?),
            Precision::Bf16 => Box::new(ByHand::<Bf16>::new(model, micro, seq, again)?),
        };
        let written_out = WrittenOut {
            pass,
            flat: Buffer::new(model.layout().total)?,
            inputs: Vec::new(),
            targets: Vec::new(),
        };
        let path = Path::ByHand(Box::new(written_out));
        Ok(Self { micro, path })
    }

    /// The mean loss of a checked batch, nats per token, and its gradient, flat in the layout's order, on the model's device.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub(crate) fn of(&mut self, model: &Model, batch: &[Vec<u32>]) -> Result<(f64, &Tensor), TchError> {
        match &mut self.path {
            Path::ByHand(own) => Ok((own.of(model, batch, self.micro)?, own.flat.tensor())),
            Path::Autograd(autograd) => autograd.of(model, &pieces(batch, self.micro, model.device())),
        }
    }
}

impl WrittenOut {
    fn of(&mut self, model: &Model, batch: &[Vec<u32>], micro: usize) -> Result<f64, TchError> {
        let rows: usize = batch.iter().map(|sequence| sequence.len() - 1).sum();
        let mut loss = 0.0;
        for (i, piece) in batch.chunks(micro).enumerate() {
            self.inputs.clear();
            self.targets.clear();
            for sequence in piece {
                let (given, asked) = (&sequence[..sequence.len() - 1], &sequence[1..]);
                self.inputs.extend(given.iter().map(|&token| i64::from(token)));
                self.targets.extend(asked.iter().map(|&token| i64::from(token)));
            }
            let piece = Batch {
                inputs: &self.inputs,
                targets: &self.targets,
                scale: 1.0 / rows as f32,
                first: i == 0,
            };
            loss += self.pass.run(model, &piece, &mut self.flat)?;
        }
        Ok(loss / rows as f64)
    }
}

/// The batch as tensors `[micro, seq + 1]` on `device`, the last of fewer sequences where they don't divide.
fn pieces(batch: &[Vec<u32>], micro: usize, device: Device) -> Vec<Tensor> {
    let piece = |piece: &[Vec<u32>]| token_tensor(piece, piece[0].len(), device);
    batch.chunks(micro).map(piece).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::{host, init_flat};

    #[test]
    fn pieces_by_autograd_add_up_to_the_whole_and_equal_what_is_written_out() {
        let config = ModelConfig {
            vocab_size: 64,
            dim: 32,
            layers: 2,
            ..ModelConfig::demo()
        };
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        model.load_flat(&init_flat(&config, 1)).unwrap();
        let batch: Vec<Vec<u32>> = (0..4)
            .map(|i| (0..17).map(|j| (i * 31 + j * j * (i + 3)) % 64).collect())
            .collect();
        let training = TrainingConfig {
            seq_len: 16,
            batch_sequences: 4,
            micro_batch: Some(2),
            ..TrainingConfig::default()
        };
        let by_autograd = |batch: &[Vec<u32>], micro| {
            let mut autograd = Autograd::new(&model, Precision::Fp32).unwrap();
            let (loss, gradient) = autograd.of(&model, &pieces(batch, micro, Device::Cpu)).unwrap();
            (loss, host::to_vec(gradient))
        };
        let (whole, expected) = by_autograd(&batch, 4);
        let (pieces, summed) = by_autograd(&batch, 2);
        let mut written_out = Gradients::new(&model, &training).unwrap();
        let (by_hand, flat) = written_out.of(&model, &batch).unwrap();
        for (loss, flat) in [(pieces, summed), (by_hand, host::to_vec(flat))] {
            assert!((loss - whole).abs() < 1e-6 * whole, "{loss} {whole}");
            let largest = flat
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(largest < 1e-6, "{largest}");
        }
    }
}
