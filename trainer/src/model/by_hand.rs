//! Loss and gradient of the decoder, forward and backward written out for a CPU: what training runs on there.
//!
//! libtorch's autograd computes the same from [`Model::logits`], and a test holds the two equal; it stays the path for other devices and for
//! shapes that [`ByHand::supports`] refuses. Written out, every product writes into memory that is there already, each weight's gradient lands in its place
//! in the flat vector, what lies between two products is one pass ([`crate::kernels`]), and what is kept for the backward pass is known to
//! the byte ([`ByHand::bytes`]): per block its two inputs in `f32` and queries, keys, values, the mixed values, gates and what they let
//! through in the working precision. The norms and the gated product are computed again. With `checkpoint` only each block's input is
//! kept, and the block runs again before its backward pass (arXiv 1604.06174).
//!
//! In bf16 the products and attention take and give bfloat16, from a copy of the weights made once a step; parameters, residual stream, norms,
//! softmax, loss and gradients are `f32`, as under PyTorch's autocast.
//!
//! Shapes as in `model.rs`; `width = (heads + 2 kv_heads) hd`, `q_dim = heads hd`.

use std::ops::Range;

use tch::{Device, TchError, Tensor};

use super::cross_entropy::{Head, Loss};
use super::{Layout, Model};
use crate::config::ModelConfig;
use crate::kernels::attention::{Attention, Qkv, heads_to_rows, rows_to_heads};
use crate::kernels::rotary::{Heads, join_heads, split_heads};
use crate::kernels::{Buffer, Number, copy, gate, norm, product};
use crate::model::host;

/// A matrix within the flat vector: where it starts and its `[rows, columns]`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Matrix {
    at: usize,
    shape: [i64; 2],
}

impl Matrix {
    fn len(&self) -> usize {
        (self.shape[0] * self.shape[1]) as usize
    }

    fn range(&self) -> Range<usize> {
        self.at..self.at + self.len()
    }
}

/// Where one block's parameters lie.
#[derive(Debug, Clone, PartialEq)]
struct Places {
    norms: [Range<usize>; 2],
    qkv: Matrix,
    out: Matrix,
    gate_up: Matrix,
    down: Matrix,
}

/// The sizes of one pass.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    h: Heads,
    batch: usize,
    rows: usize,
    dim: usize,
    ffn: usize,
    eps: f32,
}

impl Sizes {
    fn new(config: &ModelConfig, batch: usize, seq: usize) -> Self {
        let h = Heads {
            seq,
            heads: config.heads,
            kv_heads: config.kv_heads,
            hd: config.head_dim(),
        };
        Self {
            h,
            batch,
            rows: batch * seq,
            dim: config.dim,
            ffn: config.ffn,
            eps: config.norm_eps as f32,
        }
    }

    fn q_dim(&self) -> usize {
        self.h.heads * self.h.hd
    }

    fn shape(&self, columns: usize) -> [i64; 2] {
        [self.rows as i64, columns as i64]
    }
}

/// What a block leaves for its backward pass, beside its input.
struct Kept<N> {
    /// By head, turned.
    qkv: Qkv<N>,
    /// Logarithms of attention's sums, `[batch, heads, seq]`.
    lse: Buffer<f32>,
    /// Attention's output, `[rows, q_dim]`.
    mixed: Buffer<N>,
    /// The residual stream after attention, `[rows, dim]`.
    middle: Buffer<f32>,
    /// `[rows, 2 ffn]`.
    gate_up: Buffer<N>,
}

impl<N: Number> Kept<N> {
    fn new(s: &Sizes) -> Result<Self, TchError> {
        Ok(Self {
            qkv: Qkv::new(s.h, s.batch)?,
            lse: Buffer::new(s.rows * s.h.heads)?,
            mixed: Buffer::new(s.rows * s.q_dim())?,
            middle: Buffer::new(s.rows * s.dim)?,
            gate_up: Buffer::new(s.rows * 2 * s.ffn)?,
        })
    }

    fn bytes(s: &Sizes) -> u128 {
        let narrow = s.h.width() + s.q_dim() + 2 * s.ffn;
        s.rows as u128 * (narrow * size_of::<N>() + 4 * (s.h.heads + s.dim)) as u128
    }
}

/// Memory and plan of one model's passes over batches of one shape.
pub(crate) struct ByHand<N> {
    s: Sizes,
    blocks: Vec<Places>,
    last_norm: Range<usize>,
    embedding: Matrix,
    head: Matrix,
    tables: [Vec<f32>; 2],
    /// What each block takes, then what the last one gives, `[rows, dim]`.
    inputs: Vec<Buffer<f32>>,
    /// Of each block, or with `checkpoint` of the one in work.
    kept: Vec<Kept<N>>,
    attention: Attention<N>,
    loss: Head<N>,
    /// The weights in the working precision; empty when they are in it already.
    weights: Buffer<N>,
    /// A weight's gradient before it is added to the flat one; empty when it needs no rounding.
    dweight: Buffer<N>,
    /// The norms' outputs, then what is added to the residual stream, `[rows, dim]`.
    normed: Buffer<N>,
    delta: Buffer<N>,
    /// `[rows, max(width, ffn)]`.
    wide: Buffer<N>,
    /// By head, `[batch, heads, seq, hd]`.
    mixed: Buffer<N>,
    dqkv: Qkv<N>,
    mean: Buffer<f32>,
    /// The gradient of the residual stream, also in the working precision.
    dx: Buffer<f32>,
    dx_narrow: Buffer<N>,
}

/// One batch.
pub(crate) struct Batch<'a> {
    /// `[batch, seq]`, and what follows each.
    pub(crate) inputs: &'a [i64],
    pub(crate) targets: &'a [i64],
    /// Factor on the summed loss within the gradient: one over the rows of the whole step.
    pub(crate) scale: f32,
    /// Whether the gradient starts here; otherwise it is added to.
    pub(crate) first: bool,
}

impl<N: Number> ByHand<N> {
    /// Whether the pass can be written out for this model here: on a CPU, with the matrices that it takes together side by side.
    pub(crate) fn supports(model: &Model) -> bool {
        model.device() == Device::Cpu && places(model.config(), model.layout()).is_some()
    }

    /// Memory for batches of `batch` sequences of `seq` tokens.
    ///
    /// # Errors
    /// Want of memory. The model must be one that [`Self::supports`].
    pub(crate) fn new(model: &Model, batch: usize, seq: usize, checkpoint: bool) -> Result<Self, TchError> {
        let (config, layout) = (model.config(), model.layout());
        let s = Sizes::new(config, batch, seq);
        let refused = || TchError::Shape("the layout is not one that is written out by hand".to_owned());
        let (blocks, last_norm, [embedding, head]) = places(config, layout).ok_or_else(refused)?;
        let rope = model.rope.as_ref().ok_or_else(refused)?;
        let narrow = N::KIND != tch::Kind::Float;
        let largest = blocks
            .iter()
            .flat_map(|b| [b.qkv, b.out, b.gate_up, b.down])
            .map(|m| m.len());
        let largest = largest.chain([head.len()]).max().unwrap_or(0);
        let kept = if checkpoint { 1 } else { config.layers };
        let dim = s.rows * s.dim;
        Ok(Self {
            blocks,
            last_norm,
            embedding,
            head,
            tables: [host::to_vec(&rope.cos), host::to_vec(&rope.sin)],
            inputs: (0..=config.layers)
                .map(|_| Buffer::new(dim))
                .collect::<Result<_, _>>()?,
            kept: (0..kept).map(|_| Kept::new(&s)).collect::<Result<_, _>>()?,
            attention: Attention::new(s.h, batch)?,
            loss: Head::new(s.rows, config.vocab_size)?,
            weights: Buffer::new(if narrow { layout.total } else { 0 })?,
            dweight: Buffer::new(if narrow { largest } else { 0 })?,
            normed: Buffer::new(dim)?,
            delta: Buffer::new(dim)?,
            wide: Buffer::new(s.rows * s.h.width().max(s.ffn))?,
            mixed: Buffer::new(s.rows * s.q_dim())?,
            dqkv: Qkv::new(s.h, batch)?,
            mean: Buffer::new(s.rows * s.h.heads)?,
            dx: Buffer::new(dim)?,
            dx_narrow: Buffer::new(dim)?,
            s,
        })
    }

    /// Bytes that [`Self::new`] takes, for a model of this shape. Wide enough for whatever shape a configuration admits.
    pub(crate) fn bytes(config: &ModelConfig, batch: usize, seq: usize, checkpoint: bool) -> u128 {
        let s = Sizes::new(config, batch, seq);
        let (element, rows) = (size_of::<N>(), s.rows as u128);
        let kept = if checkpoint { 1 } else { config.layers as u128 };
        let copies = match N::KIND {
            tch::Kind::Float => 0,
            _ => {
                let largest = config.vocab_size.max(s.h.width()).max(2 * s.ffn) * s.dim;
                element as u128 * (config.param_count() + largest) as u128
            }
        };
        let streams = s.dim * (4 * (config.layers + 2) + 3 * element);
        let rest = element * (s.h.width().max(s.ffn) + s.q_dim() + s.h.width()) + 4 * s.h.heads;
        kept * Kept::<N>::bytes(&s)
            + Attention::<N>::bytes(s.h, batch)
            + Head::<N>::bytes(s.rows, config.vocab_size)
            + copies
            + rows * (streams + rest) as u128
    }

    /// Adds (or sets, if the batch is the first) the gradient of `scale` times the summed cross-entropy to `gradient`, flat in the layout's order, and
    /// returns the summed cross-entropy in nats.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub(crate) fn run(
        &mut self,
        model: &Model,
        batch: &Batch<'_>,
        gradient: &mut Buffer<f32>,
    ) -> Result<f64, TchError> {
        tch::no_grad(|| {
            if batch.first {
                if N::KIND != tch::Kind::Float {
                    model.with_flat(|flat| copy::narrow(flat, self.weights.slice_mut()));
                }
                self.clear(gradient);
            }
            self.forward(model, batch.inputs)?;
            let loss = self.head(model, batch, gradient)?;
            self.backward(model, batch, gradient)?;
            Ok(loss)
        })
    }

    /// Zeros what is only ever added to: norms, and an embedding that is no head.
    fn clear(&self, gradient: &mut Buffer<f32>) {
        let norms = self.blocks.iter().flat_map(|block| block.norms.clone());
        for range in norms.chain([self.last_norm.clone()]) {
            gradient.slice_mut()[range].fill(0.0);
        }
        if self.embedding != self.head {
            copy::zero(&mut gradient.slice_mut()[self.embedding.range()]);
        }
    }

    /// Up to the hidden states before the head, which are left in `normed`.
    fn forward(&mut self, model: &Model, tokens: &[i64]) -> Result<(), TchError> {
        model.with_flat(|flat| {
            copy::gather(
                &flat[self.embedding.range()],
                tokens,
                self.inputs[0].slice_mut(),
                self.s.dim,
            );
            let weight = &flat[self.blocks[0].norms[0].clone()];
            norm::norm(self.inputs[0].slice(), weight, self.s.eps, self.normed.slice_mut());
        });
        for layer in 0..self.blocks.len() {
            self.attend(model, layer)?;
            self.feed(model, layer)?;
        }
        Ok(())
    }

    /// A block's attention and the first product of its feed-forward, from the first norm's output in `normed`; fills what is kept.
    fn attend(&mut self, model: &Model, layer: usize) -> Result<(), TchError> {
        let (s, place) = (self.s, self.blocks[layer].clone());
        let slot = layer % self.kept.len();
        let (dim, width) = (s.shape(s.dim), s.h.width());
        let w_qkv = self.weight(model, place.qkv);
        product(
            &self.wide.view(&s.shape(width)),
            &self.normed.view(&dim),
            &w_qkv.tr(),
            false,
        )?;

        let kept = &mut self.kept[slot];
        let Qkv { q, k, v } = &mut kept.qkv;
        let [cos, sin] = &self.tables;
        let rows = &self.wide.slice()[..s.rows * width];
        split_heads(s.h, rows, cos, sin, [q.slice_mut(), k.slice_mut(), v.slice_mut()]);
        self.attention.forward(&kept.qkv, &self.mixed, kept.lse.slice_mut())?;
        heads_to_rows(s.h, self.mixed.slice(), kept.mixed.slice_mut());

        let w_out = self.weight(model, place.out);
        let kept = &mut self.kept[slot];
        product(
            &self.delta.view(&dim),
            &kept.mixed.view(&s.shape(s.q_dim())),
            &w_out.tr(),
            false,
        )?;
        model.with_flat(|flat| {
            let (x, weight) = (self.inputs[layer].slice(), &flat[place.norms[1].clone()]);
            let (sum, out) = (kept.middle.slice_mut(), self.normed.slice_mut());
            norm::add_norm(x, self.delta.slice(), weight, s.eps, sum, out);
        });
        let w_gate_up = self.weight(model, place.gate_up);
        let gate_up = self.kept[slot].gate_up.view(&s.shape(2 * s.ffn));
        product(&gate_up, &self.normed.view(&dim), &w_gate_up.tr(), false)
    }

    /// The rest of a block's feed-forward: the next block's input, and in `normed` the next norm's output.
    fn feed(&mut self, model: &Model, layer: usize) -> Result<(), TchError> {
        let (s, slot) = (self.s, layer % self.kept.len());
        let w_down = self.weight(model, self.blocks[layer].down);
        let next = self
            .blocks
            .get(layer + 1)
            .map_or(&self.last_norm, |block| &block.norms[0]);
        let kept = &self.kept[slot];
        gate::gate(
            kept.gate_up.slice(),
            s.ffn,
            &mut self.wide.slice_mut()[..s.rows * s.ffn],
        );
        let gated = self.wide.view(&s.shape(s.ffn));
        product(&self.delta.view(&s.shape(s.dim)), &gated, &w_down.tr(), false)?;
        model.with_flat(|flat| {
            let (sum, out) = (self.inputs[layer + 1].slice_mut(), self.normed.slice_mut());
            norm::add_norm(
                kept.middle.slice(),
                self.delta.slice(),
                &flat[next.clone()],
                s.eps,
                sum,
                out,
            );
        });
        Ok(())
    }

    /// The loss, and its gradient back through the head and the last norm into `dx`.
    fn head(&mut self, model: &Model, batch: &Batch<'_>, gradient: &mut Buffer<f32>) -> Result<f64, TchError> {
        let (s, head) = (self.s, self.head);
        let weight = self.weight(model, head);
        let (dweight, narrow) = (&mut self.dweight, N::KIND != tch::Kind::Float);
        let loss = self.loss.run(
            Loss {
                hidden: &self.normed.view(&s.shape(s.dim)),
                weight: &weight,
                targets: batch.targets,
                scale: batch.scale,
                dhidden: &self.delta.view(&s.shape(s.dim)),
            },
            &mut |dlogits, hidden, first| {
                let add = !(batch.first && first);
                weight_gradient(dweight, narrow, gradient, head, dlogits, hidden, add)
            },
        )?;
        copy::zero(self.dx.slice_mut());
        let last = self.blocks.len();
        self.norm_back(model, &self.last_norm.clone(), From::Input(last), gradient);
        Ok(loss)
    }

    /// From the gradient of the last block's output in `dx` down to the embedding.
    fn backward(&mut self, model: &Model, batch: &Batch<'_>, gradient: &mut Buffer<f32>) -> Result<(), TchError> {
        let add = !batch.first;
        for layer in (0..self.blocks.len()).rev() {
            if self.kept.len() < self.blocks.len() {
                self.norm_again(model, layer, 0);
                self.attend(model, layer)?;
            }
            self.feed_back(model, layer, add, gradient)?;
            self.attend_back(model, layer, add, gradient)?;
        }
        let table = &mut gradient.slice_mut()[self.embedding.range()];
        copy::scatter_add(self.dx.slice(), batch.inputs, table, self.s.dim);
        Ok(())
    }

    /// Back through a block's feed-forward; what is kept of it is used up.
    fn feed_back(
        &mut self,
        model: &Model,
        layer: usize,
        add: bool,
        gradient: &mut Buffer<f32>,
    ) -> Result<(), TchError> {
        let (s, place) = (self.s, self.blocks[layer].clone());
        let (dim, slot) = (s.shape(s.dim), layer % self.kept.len());
        let dx = self.dx_narrow.view(&dim);
        let gated = self.wide.view(&s.shape(s.ffn));
        product(&gated, &dx, &self.weight(model, place.down), false)?;
        let gates = self.kept[slot].gate_up.slice_mut();
        gate::gate_back(gates, s.ffn, &mut self.wide.slice_mut()[..s.rows * s.ffn]);
        self.weight_gradient(gradient, place.down, &dx, &gated, add)?;

        self.norm_again(model, layer, 1);
        let dgates = self.kept[slot].gate_up.view(&s.shape(2 * s.ffn));
        self.weight_gradient(gradient, place.gate_up, &dgates, &self.normed.view(&dim), add)?;
        product(
            &self.delta.view(&dim),
            &dgates,
            &self.weight(model, place.gate_up),
            false,
        )?;
        self.norm_back(model, &place.norms[1], From::Middle(slot), gradient);
        Ok(())
    }

    /// Back through a block's attention; what is kept of it is used up.
    fn attend_back(
        &mut self,
        model: &Model,
        layer: usize,
        add: bool,
        gradient: &mut Buffer<f32>,
    ) -> Result<(), TchError> {
        let (s, place) = (self.s, self.blocks[layer].clone());
        let (dim, slot) = (s.shape(s.dim), layer % self.kept.len());
        let (q_dim, width) = (s.shape(s.q_dim()), s.h.width());
        let dx = self.dx_narrow.view(&dim);
        self.weight_gradient(gradient, place.out, &dx, &self.kept[slot].mixed.view(&q_dim), add)?;
        product(&self.wide.view(&q_dim), &dx, &self.weight(model, place.out), false)?;

        let kept = &self.kept[slot];
        let dmixed = &self.wide.slice()[..s.rows * s.q_dim()];
        rows_to_heads(
            s.h,
            dmixed,
            kept.mixed.slice(),
            self.mixed.slice_mut(),
            self.mean.slice_mut(),
        );
        let figures = (kept.lse.slice(), self.mean.slice());
        self.attention.backward(&kept.qkv, &self.mixed, figures, &self.dqkv)?;
        let Qkv { q, k, v } = &self.dqkv;
        let [cos, sin] = &self.tables;
        let rows = &mut self.wide.slice_mut()[..s.rows * width];
        join_heads(s.h, [q.slice(), k.slice(), v.slice()], cos, sin, rows);

        self.norm_again(model, layer, 0);
        let drows = self.wide.view(&s.shape(width));
        self.weight_gradient(gradient, place.qkv, &drows, &self.normed.view(&dim), add)?;
        product(&self.delta.view(&dim), &drows, &self.weight(model, place.qkv), false)?;
        self.norm_back(model, &place.norms[0], From::Input(layer), gradient);
        Ok(())
    }

    /// Puts the output of a block's first or second norm into `normed` again.
    fn norm_again(&mut self, model: &Model, layer: usize, which: usize) {
        let x = match which {
            0 => &self.inputs[layer],
            _ => &self.kept[layer % self.kept.len()].middle,
        };
        let weight = self.blocks[layer].norms[which].clone();
        model.with_flat(|flat| norm::norm(x.slice(), &flat[weight], self.s.eps, self.normed.slice_mut()));
    }

    /// From a norm's output's gradient in `delta`: adds to `dx`, renews `dx_narrow`, and adds the weight's gradient to the flat one.
    fn norm_back(&mut self, model: &Model, weight: &Range<usize>, x: From, gradient: &mut Buffer<f32>) {
        let x = match x {
            From::Input(layer) => &self.inputs[layer],
            From::Middle(slot) => &self.kept[slot].middle,
        };
        let dweight = &mut gradient.slice_mut()[weight.clone()];
        model.with_flat(|flat| {
            let (dx, narrow) = (self.dx.slice_mut(), self.dx_narrow.slice_mut());
            let weight = &flat[weight.clone()];
            norm::norm_back(self.delta.slice(), x.slice(), weight, self.s.eps, dx, narrow, dweight);
        });
    }

    /// A weight in the working precision.
    fn weight(&self, model: &Model, matrix: Matrix) -> Tensor {
        if N::KIND == tch::Kind::Float {
            let flat = model.flat.detach();
            return flat.narrow(0, matrix.at as i64, matrix.len() as i64).view(matrix.shape);
        }
        self.weights.view_at(matrix.at, &matrix.shape)
    }

    /// The gradient `dout^T x` of a weight, into its place.
    fn weight_gradient(
        &mut self,
        gradient: &mut Buffer<f32>,
        matrix: Matrix,
        dout: &Tensor,
        x: &Tensor,
        add: bool,
    ) -> Result<(), TchError> {
        let narrow = N::KIND != tch::Kind::Float;
        weight_gradient(&mut self.dweight, narrow, gradient, matrix, dout, x, add)
    }
}

/// What a norm was taken of.
enum From {
    /// A block's input, or the last one's output.
    Input(usize),
    /// The stream between attention and feed-forward, by slot.
    Middle(usize),
}

/// Sets or adds `dout^T x` at `matrix` of the flat gradient: at once where both are `f32`, by way of `room` where they are narrower.
fn weight_gradient<N: Number>(
    room: &mut Buffer<N>,
    narrow: bool,
    gradient: &mut Buffer<f32>,
    matrix: Matrix,
    dout: &Tensor,
    x: &Tensor,
    add: bool,
) -> Result<(), TchError> {
    if !narrow {
        return product(&gradient.view_at(matrix.at, &matrix.shape), &dout.tr(), x, add);
    }
    product(&room.view(&matrix.shape), &dout.tr(), x, false)?;
    let (from, to) = (&room.slice()[..matrix.len()], &mut gradient.slice_mut()[matrix.range()]);
    copy::widen(from, to, add);
    Ok(())
}

/// Where every block's parameters lie, the last norm, embedding and head; `None` if what is multiplied together does not lie together.
fn places(config: &ModelConfig, layout: &Layout) -> Option<(Vec<Places>, Range<usize>, [Matrix; 2])> {
    let range = |name: &str| layout.get(name).map(|entry| entry.offset..entry.offset + entry.len);
    let matrix = |names: &[String]| {
        let parts = names.iter().map(|name| layout.get(name)).collect::<Option<Vec<_>>>()?;
        let adjacent = parts
            .windows(2)
            .all(|pair| pair[0].offset + pair[0].len == pair[1].offset);
        let [_, columns] = parts.first()?.shape[..] else {
            return None;
        };
        let rows: usize = parts.iter().map(|part| part.shape[0]).sum();
        adjacent.then_some(Matrix {
            at: parts[0].offset,
            shape: [rows as i64, columns as i64],
        })
    };
    let block = |layer: usize| {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let matrix = |parts: &[&str]| matrix(&parts.iter().map(|part| name(part)).collect::<Vec<_>>());
        Some(Places {
            norms: [
                range(&name("input_layernorm"))?,
                range(&name("post_attention_layernorm"))?,
            ],
            qkv: matrix(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
            out: matrix(&["self_attn.o_proj"])?,
            gate_up: matrix(&["mlp.gate_proj", "mlp.up_proj"])?,
            down: matrix(&["mlp.down_proj"])?,
        })
    };
    let blocks: Vec<Places> = (0..config.layers).map(block).collect::<Option<_>>()?;
    let embedding = matrix(&["model.embed_tokens.weight".to_owned()])?;
    let head = match config.tied_embeddings {
        true => embedding,
        false => matrix(&["lm_head.weight".to_owned()])?,
    };
    let last_norm = range("model.norm.weight")?;
    // Every parameter there is must be one of these: a bias or a norm more would be left out.
    let per_block = |b: &Places| b.norms.iter().map(ExactSizeIterator::len).sum::<usize>() + b.qkv.len() + b.out.len();
    let known: usize = blocks
        .iter()
        .map(|b| per_block(b) + b.gate_up.len() + b.down.len())
        .sum();
    let known = known + last_norm.len() + embedding.len() + if config.tied_embeddings { 0 } else { head.len() };
    (known == layout.total).then_some((blocks, last_norm, [embedding, head]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernels::Bf16;
    use crate::model::init_flat;

    const SEQ: usize = 150; // more than one block of queries

    fn config(heads: usize, kv_heads: usize, tied_embeddings: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: 61,
            dim: 48,
            layers: 3,
            heads,
            kv_heads,
            ffn: 88, // no whole number of lanes
            tied_embeddings,
            ..ModelConfig::demo()
        }
    }

    fn model(config: &ModelConfig) -> Model {
        let mut model = Model::new(config, Device::Cpu).unwrap();
        // Larger than initial weights, and norms other than one, so that attention and the norms' weights matter.
        let flat: Vec<f32> = init_flat(config, 5)
            .iter()
            .enumerate()
            .map(|(i, &x)| if x == 1.0 { 0.8 + 0.1 * (i % 7) as f32 } else { 5.0 * x })
            .collect();
        model.load_flat(&flat).unwrap();
        model
    }

    fn tokens(batch: usize) -> Vec<i64> {
        (0..batch * (SEQ + 1))
            .map(|i| (i * i * 7 + i / 5) as i64 % 61)
            .collect()
    }

    /// Sets the gradient from the sequences in `micro` at a time; the mean loss.
    fn by_hand<N: Number>(model: &Model, tokens: &[i64], micro: usize, checkpoint: bool) -> (f64, Vec<f32>) {
        let mut pass = ByHand::<N>::new(model, micro, SEQ, checkpoint).unwrap();
        let mut gradient = Buffer::<f32>::new(model.layout().total).unwrap();
        gradient.slice_mut().fill(7.0); // what was there before must not matter
        let rows = tokens.len() / (SEQ + 1) * SEQ;
        let mut loss = 0.0;
        for (i, part) in tokens.chunks(micro * (SEQ + 1)).enumerate() {
            let inputs: Vec<i64> = part.chunks(SEQ + 1).flat_map(|s| &s[..SEQ]).copied().collect();
            let targets: Vec<i64> = part.chunks(SEQ + 1).flat_map(|s| &s[1..]).copied().collect();
            let batch = Batch {
                inputs: &inputs,
                targets: &targets,
                scale: 1.0 / rows as f32,
                first: i == 0,
            };
            loss += pass.run(model, &batch, &mut gradient).unwrap();
        }
        (loss / rows as f64, gradient.slice().to_vec())
    }

    fn by_autograd(model: &Model, tokens: &[i64]) -> (f64, Vec<f32>) {
        let tokens = Tensor::from_slice(tokens).view([-1, SEQ as i64 + 1]);
        let (loss, gradient) = model.loss_and_gradient(&tokens).unwrap();
        (loss.double_value(&[]), host::to_vec(&gradient))
    }

    /// L2 distance of each tensor's gradient, relative to its length.
    fn assert_near(model: &Model, found: &[f32], expected: &[f32], bound: f64, what: &str) {
        for entry in &model.layout().entries {
            let part = |flat: &[f32]| flat[entry.offset..entry.offset + entry.len].to_vec();
            let (found, expected) = (part(found), part(expected));
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let distance = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let length = norm(&mut expected.iter().copied());
            assert!(
                length > 0.0 && distance <= bound * length,
                "{what}, {}: {distance:e} of {length:e}",
                entry.name
            );
        }
    }

    #[test]
    fn the_gradient_equals_autograds_with_grouped_and_ungrouped_queries_tied_and_untied() {
        for (heads, kv_heads, tied) in [(4, 4, false), (4, 2, true), (6, 1, false), (2, 2, true)] {
            let model = model(&config(heads, kv_heads, tied));
            let (loss, expected) = by_autograd(&model, &tokens(3));
            let (found_loss, found) = by_hand::<f32>(&model, &tokens(3), 3, false);
            assert!((found_loss - loss).abs() < 2e-6 * loss, "{found_loss} {loss}");
            assert_near(
                &model,
                &found,
                &expected,
                1e-5,
                &format!("{heads} heads, {kv_heads} shared"),
            );
        }
    }

    #[test]
    fn families_with_biases_or_more_norms_are_left_to_autograd() {
        use crate::config::Family;
        for (family, supported) in [
            (Family::Llama, true),
            (Family::Qwen2, false),
            (Family::Qwen3, false),
            (Family::Gpt2, false),
        ] {
            let config = ModelConfig {
                family,
                ..config(4, 4, true)
            };
            let model = Model::new(&config, Device::Cpu).unwrap();
            assert_eq!(ByHand::<f32>::supports(&model), supported, "{family:?}");
        }
    }

    #[test]
    fn heads_of_another_width_than_their_share_are_covered() {
        let config = ModelConfig {
            head_dim: Some(20),
            ..config(4, 2, true)
        };
        let model = model(&config);
        let (_, expected) = by_autograd(&model, &tokens(2));
        let (_, found) = by_hand::<f32>(&model, &tokens(2), 2, false);
        assert_near(&model, &found, &expected, 1e-5, "heads of 20");
    }

    #[test]
    fn a_batch_in_pieces_has_the_gradient_of_the_whole() {
        let model = model(&config(4, 2, true));
        let (loss, expected) = by_hand::<f32>(&model, &tokens(6), 6, false);
        let (found_loss, found) = by_hand::<f32>(&model, &tokens(6), 2, false);
        assert!((found_loss - loss).abs() < 1e-6 * loss);
        assert_near(&model, &found, &expected, 3e-6, "three pieces of two");
    }

    #[test]
    fn blocks_that_run_again_give_the_same_bits() {
        let model = model(&config(4, 2, false));
        assert_eq!(
            by_hand::<f32>(&model, &tokens(2), 2, true),
            by_hand::<f32>(&model, &tokens(2), 2, false)
        );
        assert_eq!(
            by_hand::<Bf16>(&model, &tokens(2), 2, true),
            by_hand::<Bf16>(&model, &tokens(2), 2, false)
        );
    }

    #[test]
    fn bfloat16_stays_near_single_precision() {
        let model = model(&config(4, 2, true));
        let (loss, expected) = by_hand::<f32>(&model, &tokens(3), 3, false);
        let (found_loss, found) = by_hand::<Bf16>(&model, &tokens(3), 3, false);
        assert!((found_loss - loss).abs() < 5e-3 * loss, "{found_loss} {loss}");
        assert_near(&model, &found, &expected, 4e-2, "bf16");
    }
}
