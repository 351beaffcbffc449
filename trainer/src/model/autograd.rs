//! Loss and gradient by libtorch's autograd: on any device, for every family, in any precision.
//!
//! In bf16 the products and attention take and give bfloat16, as under PyTorch's autocast; parameters, their gradient, the residual stream, norms
//! and rotation stay in fp32. In TF32, CUDA devices round the factors of fp32 products to 10 bits of mantissa (everything else, and every other
//! device, is as in fp32).
//!
//! The graph ends at what the head reads. Behind it the logits exist for some rows at a time and become their own gradient, as in
//! [`super::cross_entropy`]: with a vocabulary of tens of thousands they are the largest tensor by far, and a graph keeps them thrice.
//!
//! Shapes: `tokens` `[batch, seq + 1]`, `hidden` `[rows, dim]`, `head` `[vocab, dim]`, `logits` `[rows, vocab]`.

use tch::{Device, Kind, TchError, Tensor};

use super::Model;
use crate::config::Precision;

/// Bytes that the logits of one piece take in fp32.
const BYTES_ON_HOST: usize = 128 << 20;
const BYTES_ON_GPU: usize = 512 << 20;

unsafe extern "C" {
    fn murmur_allow_tf32(allowed: bool);
}

/// Computes gradients of one model, batch after batch.
pub(crate) struct Autograd {
    kind: Kind,
    /// That of the last batch, `[total]`, fp32; whatever an optimizer made of it is overwritten.
    gradient: Tensor,
}

/// The parameters as leaves of one batch's graph.
struct Leaves {
    /// In the order of [`Model::pieces_of_flat`]: the blocks' matrices as copies in the working precision, everything else as it is.
    pieces: Vec<Tensor>,
    /// Where each lies in the flat vector.
    places: Vec<(i64, i64)>,
    /// The head in the working precision, `[vocab, dim]`; no part of the graph.
    head: Tensor,
    /// Which of the pieces it is.
    head_piece: usize,
}

impl Leaves {
    fn of(model: &Model, kind: Kind) -> Result<Self, TchError> {
        let (layout, dim) = (&model.layout, model.config.dim as i64);
        let mut start = 0;
        let mut place = |&len: &i64| {
            let place = (start, len);
            start += len;
            place
        };
        let places: Vec<(i64, i64)> = model.pieces.iter().map(&mut place).collect();
        let leaf = |&(start, len): &(i64, i64)| {
            let piece = model.flat.detach().f_narrow(0, start, len)?;
            let matrix = start >= layout.matrices.start as i64;
            let piece = if matrix { piece.f_to_kind(kind)? } else { piece };
            Ok(piece.set_requires_grad(true))
        };
        let pieces = places.iter().map(leaf).collect::<Result<Vec<_>, TchError>>()?;
        let head_piece = usize::from(!model.config.tied_embeddings);
        let head = pieces[head_piece].detach().f_to_kind(kind)?.f_view([-1, dim])?;
        Ok(Self {
            pieces,
            places,
            head,
            head_piece,
        })
    }
}

impl Autograd {
    /// Room for the gradient of `model`, in a working precision. TF32 is a switch of the whole process: the last one made decides.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub(crate) fn new(model: &Model, precision: Precision) -> Result<Self, TchError> {
        allow_tf32(precision == Precision::Tf32);
        Ok(Self {
            kind: precision.kind(),
            gradient: Tensor::f_zeros(model.flat.size(), (Kind::Float, model.device()))?,
        })
    }

    /// The mean loss over the pieces `[batch, seq + 1]` together, nats per token, and its gradient in the layout's order, on the model's device.
    ///
    /// # Errors
    /// libtorch's, for want of memory; no piece at all.
    pub(crate) fn of(&mut self, model: &Model, batch: &[Tensor]) -> Result<(f64, &Tensor), TchError> {
        let rows: i64 = batch.iter().map(|piece| piece.size()[0] * (piece.size()[1] - 1)).sum();
        if rows == 0 {
            return Err(TchError::Shape("a batch without a token to predict".to_owned()));
        }
        let leaves = Leaves::of(model, self.kind)?;
        let mut loss = Tensor::f_zeros([], (Kind::Float, model.device()))?;
        for (i, tokens) in batch.iter().enumerate() {
            let _ = loss.f_add_(&self.piece(model, &leaves, tokens, 1.0 / rows as f64, i == 0)?)?;
        }
        Ok((loss.f_double_value(&[])? / rows as f64, &self.gradient))
    }

    /// The summed loss of a piece; the gradient of `scale` times that is set, if it is the first piece, or added to.
    fn piece(
        &mut self,
        model: &Model,
        leaves: &Leaves,
        tokens: &Tensor,
        scale: f64,
        first: bool,
    ) -> Result<Tensor, TchError> {
        let seq = tokens.size()[1] - 1;
        let targets = tokens.narrow(1, 1, seq).reshape([-1]); // [rows]
        let pieces = leaves.pieces.iter().map(Tensor::shallow_clone).collect();
        let (hidden, _) = model.hidden(pieces, &tokens.narrow(1, 0, seq), None, self.kind);
        let (loss, dhidden, dhead) = tch::no_grad(|| cross_entropy(&hidden.detach(), &leaves.head, &targets, scale))?;
        // The binding's backward begins at a scalar: at one whose gradient is the one just computed.
        let end = (&hidden * dhidden).sum(Kind::Float);
        let untied = !model.config.tied_embeddings;
        let in_graph = |i: &usize| !untied || *i != leaves.head_piece;
        let reached: Vec<usize> = (0..leaves.pieces.len()).filter(in_graph).collect();
        let inputs: Vec<&Tensor> = reached.iter().map(|&i| &leaves.pieces[i]).collect();
        let gradients = Tensor::f_run_backward(&[&end], &inputs, false, false)?;
        for (i, gradient) in reached.iter().zip(&gradients) {
            self.put(leaves.places[*i], gradient, first)?;
        }
        self.put(leaves.places[leaves.head_piece], &dhead.f_view([-1])?, first && untied)?;
        Ok(loss)
    }

    /// Sets a part of the gradient, or adds to it.
    fn put(&self, (start, len): (i64, i64), gradient: &Tensor, first: bool) -> Result<(), TchError> {
        let mut place = self.gradient.f_narrow(0, start, len)?;
        if first {
            place.f_copy_(gradient)
        } else {
            place.f_add_(gradient).map(drop)
        }
    }
}

/// Whether CUDA devices may round the factors of fp32 products to TF32; in the whole process.
pub(crate) fn allow_tf32(allowed: bool) {
    // SAFETY: sets one flag of libtorch's; it throws nothing.
    unsafe { murmur_allow_tf32(allowed) };
}

/// The summed cross-entropy of `targets` under `hidden head^T`, fp32, and the gradients of `scale` times that by `hidden`, in its kind, and
/// by `head`, in fp32 where it took several pieces.
fn cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor), TchError> {
    let (rows, vocab, kind) = (hidden.size()[0] as usize, head.size()[0] as usize, hidden.kind());
    let bytes = match hidden.device() {
        Device::Cpu => BYTES_ON_HOST,
        _ => BYTES_ON_GPU,
    };
    let most = (bytes / (4 * vocab)).max(1);
    // Pieces of nearly equal size, each of which passes over the head's gradient once.
    let piece = rows.div_ceil(rows.div_ceil(most));
    let dhidden = Tensor::f_empty_like(hidden)?;
    let mut dhead: Option<Tensor> = None; // [vocab, dim]
    let mut loss = Tensor::f_zeros([], (Kind::Float, hidden.device()))?;
    for start in (0..rows).step_by(piece.max(1)) {
        let part = |t: &Tensor| t.narrow(0, start as i64, piece.min(rows - start) as i64);
        let (x, targets) = (part(hidden), part(targets).unsqueeze(1)); // [piece, dim], [piece, 1]
        let logits = x.f_matmul(&head.tr())?; // [piece, vocab]
        let mut scores = logits.f_log_softmax(-1, Kind::Float)?;
        drop(logits);
        let _ = loss.f_sub_(&scores.f_gather(1, &targets, false)?.f_sum(Kind::Float)?)?;
        // softmax - one-hot, in place
        let _ = scores.f_exp_()?;
        let _ = scores.f_scatter_add_(
            1,
            &targets,
            &Tensor::f_full([targets.size()[0], 1], -1.0, (Kind::Float, scores.device()))?,
        )?;
        let _ = scores.f_mul_scalar_(scale)?;
        let dlogits = scores.f_to_kind(kind)?;
        part(&dhidden).f_copy_(&dlogits.f_matmul(head)?)?;
        let share = dlogits.tr().f_matmul(&x)?;
        dhead = Some(match dhead {
            Some(sum) => sum.f_to_kind(Kind::Float)?.f_add_(&share)?,
            None => share,
        });
    }
    let dhead = dhead.ok_or_else(|| TchError::Shape("a batch without a row".to_owned()))?;
    Ok((loss, dhidden, dhead))
}

#[cfg(test)]
impl Model {
    /// The loss as by [`Model::loss`] and its gradient, through whole logits and one graph: what [`Autograd`] is held equal to.
    pub(crate) fn loss_and_gradient(&self, tokens: &Tensor) -> Result<(Tensor, Tensor), TchError> {
        let loss = self.loss(tokens);
        let mut gradients = Tensor::f_run_backward(&[&loss], &[&self.flat], false, false)?;
        Ok((loss.detach(), gradients.swap_remove(0)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{Family, ModelConfig};
    use crate::model::{host, init_flat};

    fn model(family: Family, tied_embeddings: bool) -> Model {
        let config = ModelConfig {
            family,
            vocab_size: 64,
            dim: 32,
            layers: 2,
            heads: 4,
            kv_heads: if family == Family::Gpt2 { 4 } else { 2 },
            tied_embeddings,
            ..ModelConfig::demo()
        };
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        // Larger than initial weights, so that attention matters; norms stay.
        let larger = |&x: &f32| if x == 1.0 { x } else { 3.0 * x };
        let larger: Vec<f32> = init_flat(&config, 3).iter().map(larger).collect();
        model.load_flat(&larger).unwrap();
        model
    }

    fn tokens(batch: i64, seq: i64) -> Tensor {
        let all: Vec<i64> = (0..batch * (seq + 1)).map(|i| (i * i * 7 + i / 5) % 64).collect();
        Tensor::from_slice(&all).view([batch, seq + 1])
    }

    /// `|a - b| / |b|`
    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
    }

    #[test]
    fn the_gradient_equals_that_of_whole_logits_for_every_family_in_pieces_or_not() {
        for (family, tied) in [
            (Family::Llama, false),
            (Family::Llama, true),
            (Family::Qwen2, true),
            (Family::Qwen3, false),
            (Family::Gpt2, true),
        ] {
            let (model, tokens) = (model(family, tied), tokens(4, 16));
            let (loss, expected) = model.loss_and_gradient(&tokens).unwrap();
            let (loss, expected) = (loss.double_value(&[]), host::to_vec(&expected));
            for (precision, bound) in [
                (Precision::Fp32, 1e-6),
                (Precision::Tf32, 1e-6),
                (Precision::Bf16, 2e-2),
            ] {
                for pieces in [1, 2] {
                    let mut autograd = Autograd::new(&model, precision).unwrap();
                    let pieces: Vec<Tensor> = tokens.chunk(pieces, 0);
                    let (found_loss, found) = autograd.of(&model, &pieces).unwrap();
                    assert!(
                        (found_loss - loss).abs() < bound * loss,
                        "{family:?} {precision:?}: {found_loss} {loss}"
                    );
                    assert_eq!(found.kind(), Kind::Float);
                    let distance = distance(&host::to_vec(found), &expected);
                    assert!(distance < bound, "{family:?} {precision:?}: {distance:e}");
                }
            }
        }
    }

    #[test]
    fn rows_in_many_pieces_give_the_gradient_of_one() {
        // A vocabulary so large that a piece holds few rows would be slow; the split is the same by the bytes of a row.
        let (rows, vocab) = (7, BYTES_ON_HOST as i64 / 4 / 3);
        let hidden = Tensor::arange(rows * 2, (Kind::Float, Device::Cpu)).view([rows, 2]) * 0.1;
        let head = Tensor::arange(vocab * 2, (Kind::Float, Device::Cpu))
            .view([vocab, 2])
            .sin();
        let targets = Tensor::arange(rows, (Kind::Int64, Device::Cpu));
        let (loss, dhidden, dhead) = cross_entropy(&hidden, &head, &targets, 0.5).unwrap();
        let (hidden, head) = (hidden.set_requires_grad(true), head.set_requires_grad(true));
        let whole =
            hidden
                .matmul(&head.tr())
                .cross_entropy_loss(&targets, None::<&Tensor>, tch::Reduction::Sum, -100, 0.0);
        let expected = Tensor::run_backward(&[&(&whole * 0.5)], &[&hidden, &head], false, false);
        assert!((loss.double_value(&[]) - whole.double_value(&[])).abs() < 1e-5 * whole.double_value(&[]));
        for (found, expected) in [dhidden, dhead].iter().zip(&expected) {
            let distance = distance(&host::to_vec(found), &host::to_vec(expected));
            assert!(distance < 1e-5, "{distance:e}");
        }
    }
}
