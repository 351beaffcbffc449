//! The softmax in its three uses here: of causal attention scores, of their gradient, and of logits under cross-entropy.

use super::threads::{rows_per_job, run};
use super::{LANES, Number, exp, fold, vectorised};

/// A block of attention's scores: `[matrices, rows, columns]`, its row i being the query at place `first + i`, which sees the keys up to its own place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Place of the first row's query.
    pub(crate) first: usize,
    /// Where the rows' figures lie among those of all queries: the first matrix' from `offset` on, each next one's `apart` further.
    pub(crate) offset: usize,
    pub(crate) apart: usize,
    /// Factor on the scores before the softmax.
    pub(crate) scale: f32,
}

/// `max x`; not a number only if all are.
#[inline(always)]
fn largest<N: Number>(x: &[N]) -> f32 {
    let (lanes_of, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for x in lanes_of {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = larger(*lane, x.wide());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x.wide());
    }
    fold(lanes, larger)
}

/// `sum e^(scale (x - top))`.
#[inline(always)]
fn exp_sum<N: Number>(x: &[N], top: f32, scale: f32) -> f32 {
    let (lanes_of, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for x in lanes_of {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += exp((x.wide() - top) * scale);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += exp((x.wide() - top) * scale);
    }
    fold(lanes, |a, b| a + b)
}

/// `ln x` for a sum of exponentials. The library's, once a row.
fn ln(x: f32) -> f32 {
    x.ln()
}

vectorised! {
    /// One matrix of scores to weights, in place; `lse` takes the logarithm of each row's sum.
    fn weigh_matrix<N>(b: Block, scores: &mut [N], lse: &mut [f32]) {
        for (i, (row, lse)) in scores.chunks_exact_mut(b.columns).zip(lse).enumerate() {
            let (seen, unseen) = row.split_at_mut(b.first + i + 1);
            let top = largest(seen);
            *lse = top * b.scale + ln(exp_sum(seen, top, b.scale));
            for x in seen {
                *x = N::narrow(exp(x.wide() * b.scale - *lse));
            }
            unseen.fill(N::default());
        }
    }
}

vectorised! {
    /// One matrix of scores to weights once more, now that `lse` is known.
    fn weigh_again_matrix<N>(b: Block, scores: &mut [N], lse: &[f32]) {
        for (i, (row, lse)) in scores.chunks_exact_mut(b.columns).zip(lse).enumerate() {
            let (seen, unseen) = row.split_at_mut(b.first + i + 1);
            for x in seen {
                *x = N::narrow(exp(x.wide() * b.scale - lse));
            }
            unseen.fill(N::default());
        }
    }
}

vectorised! {
    /// The gradient of one matrix of weights to that of its scores, in place: `weight (d - mean)`, `mean` being each row's weighted mean of d.
    fn unweigh_matrix<N>(b: Block, weights: &[N], mean: &[f32], d: &mut [N]) {
        let rows = weights.chunks_exact(b.columns).zip(d.chunks_exact_mut(b.columns));
        for ((weights, d), mean) in rows.zip(mean) {
            for (d, weight) in d.iter_mut().zip(weights) {
                *d = N::narrow(weight.wide() * (d.wide() - mean) * b.scale);
            }
        }
    }
}

vectorised! {
    /// Rows of logits to the gradient of the cross-entropy against their targets, times `scale`, in place; `loss` takes each row's cross-entropy.
    fn cross_entropy_rows<N>(logits: &mut [N], vocab: usize, targets: &[i64], scale: f32, loss: &mut [f32]) {
        for ((row, &target), loss) in logits.chunks_exact_mut(vocab).zip(targets).zip(loss) {
            let top = largest(row);
            let lse = top + ln(exp_sum(row, top, 1.0));
            let target = target as usize;
            let hit = row[target].wide();
            *loss = lse - hit;
            for x in row.iter_mut() {
                *x = N::narrow(exp(x.wide() - lse) * scale);
            }
            row[target] = N::narrow((exp(hit - lse) - 1.0) * scale);
        }
    }
}

/// Scores to weights, each matrix a job; the figures of their rows within `lse` are written.
pub(crate) fn weigh<N: Number>(b: Block, scores: &mut [N], lse: &mut [f32]) {
    let lse = lse.chunks_mut(b.apart).map(|lse| &mut lse[b.offset..][..b.rows]);
    let jobs = scores.chunks_mut(b.rows * b.columns).zip(lse);
    run(jobs.map(|(scores, lse)| move || weigh_matrix(b, scores, lse)).collect());
}

/// The same from a known `lse`.
pub(crate) fn weigh_again<N: Number>(b: Block, scores: &mut [N], lse: &[f32]) {
    let lse = lse.chunks(b.apart).map(|lse| &lse[b.offset..][..b.rows]);
    let jobs = scores.chunks_mut(b.rows * b.columns).zip(lse);
    run(jobs
        .map(|(scores, lse)| move || weigh_again_matrix(b, scores, lse))
        .collect());
}

/// Gradients of weights to those of scores; `mean` holds each row's weighted mean of them.
pub(crate) fn unweigh<N: Number>(b: Block, weights: &[N], mean: &[f32], d: &mut [N]) {
    let mean = mean.chunks(b.apart).map(|mean| &mean[b.offset..][..b.rows]);
    let matrix = b.rows * b.columns;
    let jobs = weights.chunks(matrix).zip(d.chunks_mut(matrix)).zip(mean);
    run(jobs
        .map(|((weights, d), mean)| move || unweigh_matrix(b, weights, mean, d))
        .collect());
}

/// Logits `[rows, vocab]` to `scale` times the gradient of their cross-entropy against `targets` (below `vocab`), in place; `loss` `[rows]` takes
/// each row's cross-entropy in nats.
pub(crate) fn cross_entropy<N: Number>(logits: &mut [N], vocab: usize, targets: &[i64], scale: f32, loss: &mut [f32]) {
    let per = rows_per_job(targets.len(), vocab);
    let rows = logits.chunks_mut(per * vocab).zip(targets.chunks(per));
    let jobs = rows.zip(loss.chunks_mut(per));
    run(jobs
        .map(|((logits, targets), loss)| move || cross_entropy_rows(logits, vocab, targets, scale, loss))
        .collect());
}
