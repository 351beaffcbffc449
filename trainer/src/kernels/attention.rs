//! Causal attention with grouped queries, forward and backward, a block of queries against all keys they see.
//!
//! The scheme of FlashAttention (arXiv 2205.14135) with larger blocks: only one block's scores exist at a time, the forward pass keeps the
//! logarithm of each row's sum, and the backward pass computes the weights from it again. Blocks are as large as a cache holds, because
//! here they are multiplied by whole matrix products.
//!
//! Shapes: by head as in [`super::rotary`]; `group = heads / kv_heads`; `matrices = batch * kv_heads`, each of which serves `group` query
//! heads; `lse` and `mean` `[batch, heads, seq]`.

use tch::{TchError, Tensor};

use super::rotary::Heads;
use super::softmax::{Block, unweigh, weigh, weigh_again};
use super::threads::run;
use super::{Buffer, Number, lane_sum, product};

/// Queries in a block.
const ROWS: usize = 128;

/// Bytes that the scores of one block may take.
const BYTES: usize = 4 << 20;

/// Room for one block's scores and their gradient, and the sizes.
pub(crate) struct Attention<N> {
    h: Heads,
    matrices: usize,
    /// Matrices taken at once.
    together: usize,
    scores: Buffer<N>,
    dscores: Buffer<N>,
}

/// Queries, keys and values, or their gradients, by head.
pub(crate) struct Qkv<N> {
    pub(crate) q: Buffer<N>,
    pub(crate) k: Buffer<N>,
    pub(crate) v: Buffer<N>,
}

impl<N: Number> Qkv<N> {
    /// Room for `batch` sequences.
    pub(crate) fn new(h: Heads, batch: usize) -> Result<Self, TchError> {
        let (q, kv) = (batch * h.heads * h.seq * h.hd, batch * h.kv_heads * h.seq * h.hd);
        Ok(Self {
            q: Buffer::new(q)?,
            k: Buffer::new(kv)?,
            v: Buffer::new(kv)?,
        })
    }
}

/// One block of queries of several matrices: query head `member` of each group, places `first..first + rows`.
#[derive(Clone, Copy)]
struct Part {
    start: usize,
    count: usize,
    member: usize,
    first: usize,
    rows: usize,
}

impl<N: Number> Attention<N> {
    /// Room for `batch` sequences.
    pub(crate) fn new(h: Heads, batch: usize) -> Result<Self, TchError> {
        let (matrices, together) = (batch * h.kv_heads, Self::together(h, batch));
        let block = together * ROWS.min(h.seq) * h.seq;
        Ok(Self {
            h,
            matrices,
            together,
            scores: Buffer::new(block)?,
            dscores: Buffer::new(block)?,
        })
    }

    fn together(h: Heads, batch: usize) -> usize {
        let one = ROWS.min(h.seq) * h.seq * size_of::<N>();
        (BYTES / one).clamp(1, batch * h.kv_heads)
    }

    /// Bytes that [`Self::new`] takes.
    pub(crate) fn bytes(h: Heads, batch: usize) -> u128 {
        let block = ROWS.min(h.seq) * h.seq * size_of::<N>();
        2 * Self::together(h, batch) as u128 * block as u128
    }

    /// Mixes values: `out` like the queries.
    pub(crate) fn forward(&mut self, from: &Qkv<N>, out: &Buffer<N>, lse: &mut [f32]) -> Result<(), TchError> {
        for part in self.parts() {
            let (b, scores) = (self.block(part), self.view(&self.scores, part));
            product(
                &scores,
                &self.queries(&from.q, part),
                &self.keys(&from.k, part).transpose(1, 2),
                false,
            )?;
            let figures = self.figures(part);
            weigh(b, self.live(part), &mut lse[figures]);
            product(&self.queries(out, part), &scores, &self.keys(&from.v, part), false)?;
        }
        Ok(())
    }

    /// From the gradient `dout` of [`Self::forward`]'s output those of queries, keys and values. `mean` holds `sum(dout * out)` of each query.
    pub(crate) fn backward(
        &mut self,
        from: &Qkv<N>,
        dout: &Buffer<N>,
        (lse, mean): (&[f32], &[f32]),
        to: &Qkv<N>,
    ) -> Result<(), TchError> {
        // Last block first: it sees all keys, so it sets their gradients, and all others add.
        for part in self.parts().into_iter().rev() {
            let add = part.member + 1 < self.group() || part.first + part.rows < self.h.seq;
            let (b, figures) = (self.block(part), self.figures(part));
            let (scores, dscores) = (self.view(&self.scores, part), self.view(&self.dscores, part));
            let (q, dout) = (self.queries(&from.q, part), self.queries(dout, part));
            let (k, v) = (self.keys(&from.k, part), self.keys(&from.v, part));
            product(&scores, &q, &k.transpose(1, 2), false)?;
            weigh_again(b, self.live(part), &lse[figures.clone()]);
            product(&self.keys(&to.v, part), &scores.transpose(1, 2), &dout, add)?;
            product(&dscores, &dout, &v.transpose(1, 2), false)?;
            let len = part.count * b.rows * b.columns;
            unweigh(
                b,
                &self.scores.slice()[..len],
                &mean[figures],
                &mut self.dscores.slice_mut()[..len],
            );
            product(&self.queries(&to.q, part), &dscores, &k, false)?;
            product(&self.keys(&to.k, part), &dscores.transpose(1, 2), &q, add)?;
        }
        Ok(())
    }

    fn group(&self) -> usize {
        self.h.heads / self.h.kv_heads
    }

    /// All parts; for each set of matrices the last one is that of the last query head's last queries.
    fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for start in (0..self.matrices).step_by(self.together) {
            let count = self.together.min(self.matrices - start);
            for member in 0..self.group() {
                parts.extend((0..self.h.seq).step_by(ROWS).map(|first| Part {
                    start,
                    count,
                    member,
                    first,
                    rows: ROWS.min(self.h.seq - first),
                }));
            }
        }
        parts
    }

    fn block(&self, part: Part) -> Block {
        Block {
            rows: part.rows,
            columns: part.first + part.rows,
            first: part.first,
            offset: part.member * self.h.seq + part.first,
            apart: self.group() * self.h.seq,
            scale: 1.0 / (self.h.hd as f32).sqrt(),
        }
    }

    /// Where the figures of a part's matrices lie within `lse` and `mean`.
    fn figures(&self, part: Part) -> std::ops::Range<usize> {
        let apart = self.group() * self.h.seq;
        part.start * apart..(part.start + part.count) * apart
    }

    /// A part's scores, `[count, rows, columns]`.
    fn view(&self, buffer: &Buffer<N>, part: Part) -> Tensor {
        buffer.view(&[part.count as i64, part.rows as i64, (part.first + part.rows) as i64])
    }

    fn live(&mut self, part: Part) -> &mut [N] {
        &mut self.scores.slice_mut()[..part.count * part.rows * (part.first + part.rows)]
    }

    /// A part's queries, `[count, rows, hd]`, within a buffer like the queries.
    fn queries(&self, buffer: &Buffer<N>, part: Part) -> Tensor {
        let (group, seq, hd) = (self.group() as i64, self.h.seq as i64, self.h.hd as i64);
        buffer
            .view(&[self.matrices as i64, group, seq, hd])
            .narrow(0, part.start as i64, part.count as i64)
            .select(1, part.member as i64)
            .narrow(1, part.first as i64, part.rows as i64)
    }

    /// The keys or values that a part sees, `[count, columns, hd]`.
    fn keys(&self, buffer: &Buffer<N>, part: Part) -> Tensor {
        buffer
            .view(&[self.matrices as i64, self.h.seq as i64, self.h.hd as i64])
            .narrow(0, part.start as i64, part.count as i64)
            .narrow(1, 0, (part.first + part.rows) as i64)
    }
}

/// From `[batch, heads, seq, hd]` to `[batch, seq, heads, hd]`.
pub(crate) fn heads_to_rows<N: Number>(h: Heads, by_head: &[N], rows: &mut [N]) {
    let (one, width) = (h.seq * h.hd, h.heads * h.hd);
    let jobs = rows
        .chunks_exact_mut(h.seq * width)
        .zip(by_head.chunks_exact(h.heads * one));
    run(jobs
        .map(|(rows, by_head)| {
            move || {
                for (place, row) in rows.chunks_exact_mut(width).enumerate() {
                    for (head, out) in row.chunks_exact_mut(h.hd).enumerate() {
                        out.copy_from_slice(&by_head[head * one + place * h.hd..][..h.hd]);
                    }
                }
            }
        })
        .collect());
}

/// The gradient `dout` `[batch, seq, heads, hd]` of attention's output by head, and its product with the output itself, `mean` `[batch, heads, seq]`.
pub(crate) fn rows_to_heads<N: Number>(h: Heads, dout: &[N], out: &[N], by_head: &mut [N], mean: &mut [f32]) {
    let (one, width) = (h.seq * h.hd, h.heads * h.hd);
    let job = |index: usize, by_head: &mut [N], mean: &mut [f32]| {
        let first = index / h.heads * h.seq * width + index % h.heads * h.hd;
        let mut wide = [vec![0.0_f32; h.hd], vec![0.0_f32; h.hd]];
        for (place, (to, mean)) in by_head.chunks_exact_mut(h.hd).zip(mean).enumerate() {
            let at = first + place * width;
            to.copy_from_slice(&dout[at..at + h.hd]);
            for (wide, from) in wide.iter_mut().zip([dout, out]) {
                for (wide, x) in wide.iter_mut().zip(&from[at..at + h.hd]) {
                    *wide = x.wide();
                }
            }
            *mean = lane_sum(&wide[0], &wide[1], |a, b| a * b);
        }
    };
    let job = &job;
    let heads = by_head
        .chunks_exact_mut(one)
        .zip(mean.chunks_exact_mut(h.seq))
        .enumerate();
    run(heads
        .map(|(index, (by_head, mean))| move || job(index, by_head, mean))
        .collect());
}
