//! The head and the cross-entropy behind it, forward and backward at once, some rows at a time.
//!
//! With a vocabulary of tens of thousands the logits of a whole batch are larger than the model, and an autograd graph keeps them
//! several times over. Here they exist for [`BYTES`] worth of rows, and become their own gradient in place: the loss is the end of the graph,
//! so its gradient is known as soon as the logits are.
//!
//! Shapes: `hidden` `[rows, dim]`, `weight` `[vocab, dim]`, `targets` `[rows]`, `logits = hidden weight^T`.

use tch::{TchError, Tensor};

use crate::kernels::{Buffer, Number, product, softmax};

/// Bytes that the logits may take at once. Each piece reads and writes the weight's gradient once, so pieces should be few.
const BYTES: usize = 128 << 20;

/// What the loss is computed from, and where its gradient goes.
pub(crate) struct Loss<'a> {
    pub(crate) hidden: &'a Tensor,
    pub(crate) weight: &'a Tensor,
    /// Each below `vocab`.
    pub(crate) targets: &'a [i64],
    /// Factor on the summed loss within the gradients.
    pub(crate) scale: f32,
    /// Takes the gradient of `hidden`.
    pub(crate) dhidden: &'a Tensor,
}

/// Takes `dlogits` and `hidden` of one piece, whose `dlogits^T hidden` is its share of the weight's gradient, and whether it is the first.
pub(crate) type WeightGradient<'a> = dyn FnMut(&Tensor, &Tensor, bool) -> Result<(), TchError> + 'a;

/// Room for one piece's logits.
pub(crate) struct Head<N> {
    vocab: usize,
    /// Rows of a piece.
    piece: usize,
    logits: Buffer<N>,
    losses: Buffer<f32>,
}

impl<N: Number> Head<N> {
    /// Room for batches of `rows`.
    pub(crate) fn new(rows: usize, vocab: usize) -> Result<Self, TchError> {
        let piece = Self::piece(rows, vocab);
        Ok(Self {
            vocab,
            piece,
            logits: Buffer::new(piece * vocab)?,
            losses: Buffer::new(rows)?,
        })
    }

    fn piece(rows: usize, vocab: usize) -> usize {
        // Pieces of nearly equal size: a last one of a few rows would cost as much memory traffic as a full one.
        let most = (BYTES / (vocab * size_of::<N>())).max(1);
        rows.div_ceil(rows.div_ceil(most))
    }

    /// Bytes that [`Self::new`] takes.
    pub(crate) fn bytes(rows: usize, vocab: usize) -> u128 {
        (Self::piece(rows, vocab) * vocab * size_of::<N>() + 4 * rows) as u128
    }

    /// The summed cross-entropy in nats; its gradients go where `loss` and `weight_gradient` say.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub(crate) fn run(&mut self, loss: Loss<'_>, weight_gradient: &mut WeightGradient<'_>) -> Result<f64, TchError> {
        let (rows, vocab) = (loss.targets.len(), self.vocab);
        for first in (0..rows).step_by(self.piece) {
            let count = self.piece.min(rows - first);
            let part = |tensor: &Tensor| tensor.narrow(0, first as i64, count as i64);
            let (hidden, logits) = (part(loss.hidden), self.logits.view(&[count as i64, vocab as i64]));
            product(&logits, &hidden, &loss.weight.tr(), false)?;
            softmax::cross_entropy(
                &mut self.logits.slice_mut()[..count * vocab],
                vocab,
                &loss.targets[first..first + count],
                loss.scale,
                &mut self.losses.slice_mut()[first..first + count],
            );
            product(&part(loss.dhidden), &logits, loss.weight, false)?;
            weight_gradient(&logits, &hidden, first == 0)?;
        }
        Ok(self.losses.slice()[..rows].iter().map(|&loss| f64::from(loss)).sum())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Reduction};

    fn noise(shape: [i64; 2], salt: f64) -> Tensor {
        let len = shape[0] * shape[1];
        (Tensor::arange(len, (Kind::Double, Device::Cpu)) * salt)
            .sin()
            .to_kind(Kind::Float)
            .view(shape)
    }

    #[test]
    fn pieces_equal_the_whole_by_libtorch() {
        let (rows, vocab, dim) = (37, 50, 12);
        let (hidden, weight) = (noise([rows, dim], 1.7), noise([vocab, dim], 2.3));
        let targets: Vec<i64> = (0..rows).map(|i| (i * i) % vocab).collect();
        let (hidden, weight) = (hidden.set_requires_grad(true), weight.set_requires_grad(true));
        let whole = hidden.matmul(&weight.tr()).cross_entropy_loss(
            &Tensor::from_slice(&targets),
            None::<&Tensor>,
            Reduction::Mean,
            -100,
            0.0,
        );
        let expected = Tensor::run_backward(&[&whole], &[&hidden, &weight], false, false);

        let mut head = Head::<f32>::new(rows as usize, vocab as usize).unwrap();
        head.piece = 10; // the last piece has seven rows
        let (dhidden, dweight) = (hidden.detach().zeros_like(), weight.detach().zeros_like());
        let loss = Loss {
            hidden: &hidden.detach(),
            weight: &weight.detach(),
            targets: &targets,
            scale: 1.0 / rows as f32,
            dhidden: &dhidden,
        };
        let mut pieces = 0;
        let sum = head.run(loss, &mut |dlogits, hidden, first| {
            pieces += 1;
            product(&dweight, &dlogits.tr(), hidden, !first)
        });
        assert_eq!(pieces, 4);
        assert!((sum.unwrap() / rows as f64 - whole.double_value(&[])).abs() < 1e-6);
        for (found, expected) in [&dhidden, &dweight].into_iter().zip(&expected) {
            assert!((found - expected).abs().max().double_value(&[]) < 1e-7);
        }
    }

    #[test]
    fn pieces_fit_their_memory_and_are_nearly_equal() {
        assert_eq!(Head::<f32>::piece(2048, 256), 2048);
        let piece = Head::<f32>::piece(2048, 50_257);
        assert!(
            piece * 50_257 * 4 <= BYTES && 2048_usize.div_ceil(piece) * piece < 2048 + 8,
            "{piece}"
        );
        assert_eq!(Head::<f32>::piece(3, 1 << 30), 1);
    }

    #[test]
    fn a_logit_that_is_no_number_makes_the_loss_none() {
        let mut logits = vec![1.0_f32, f32::NAN, 0.0, 2.0, 1.0, 0.0];
        let mut loss = [0.0; 2];
        softmax::cross_entropy(&mut logits, 3, &[0, 0], 1.0, &mut loss);
        assert!(loss[0].is_nan() && loss[1].is_finite());
    }
}
