//! RMSNorm (arXiv 1910.07467) over rows, joined with the residual sum before it, and its gradient.
//!
//! Shapes: `x` `[rows, dim]`; `weight` `[dim]`. `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.

use super::threads::{rows_per_job, run};
use super::{Number, lane_sum, vectorised};

vectorised! {
    /// The norm of each row.
    fn norm_rows<N>(x: &[f32], weight: &[f32], eps: f32, out: &mut [N]) {
        let dim = weight.len();
        for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
            let scale = inverse_rms(x, eps);
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *out = N::narrow(x * scale * w);
            }
        }
    }
}

vectorised! {
    /// `sum = x + delta`, and the norm of each row of it.
    fn add_norm_rows<N>(x: &[f32], delta: &[N], weight: &[f32], eps: f32, sum: &mut [f32], out: &mut [N]) {
        let dim = weight.len();
        let given = x.chunks_exact(dim).zip(delta.chunks_exact(dim));
        for ((x, delta), (sum, out)) in given.zip(sum.chunks_exact_mut(dim).zip(out.chunks_exact_mut(dim))) {
            for ((sum, &x), &d) in sum.iter_mut().zip(x).zip(delta) {
                *sum = x + d.wide();
            }
            let scale = inverse_rms(sum, eps);
            for ((out, &x), &w) in out.iter_mut().zip(&*sum).zip(weight) {
                *out = N::narrow(x * scale * w);
            }
        }
    }
}

vectorised! {
    /// Adds the gradient of `x` to `dx` and that of the weight to `dweight`, and leaves `dx` in `narrow` too.
    fn norm_back_rows<N>(dout: &[N], x: &[f32], weight: &[f32], eps: f32, dx: &mut [f32], narrow: &mut [N], dweight: &mut [f32]) {
        let dim = weight.len();
        let mut dnormed = vec![0.0_f32; dim]; // dout * weight
        let given = dout.chunks_exact(dim).zip(x.chunks_exact(dim));
        for ((dout, x), (dx, narrow)) in given.zip(dx.chunks_exact_mut(dim).zip(narrow.chunks_exact_mut(dim))) {
            let scale = inverse_rms(x, eps);
            for (((d, &dout), &w), (dweight, &x)) in dnormed.iter_mut().zip(dout).zip(weight).zip(dweight.iter_mut().zip(x)) {
                *d = dout.wide() * w;
                *dweight += dout.wide() * (x * scale);
            }
            let pull = lane_sum(&dnormed, x, |d, x| d * x) * scale * scale * scale / dim as f32;
            for (((dx, narrow), &d), &x) in dx.iter_mut().zip(narrow).zip(&dnormed).zip(x) {
                *dx += scale * d - pull * x;
                *narrow = N::narrow(*dx);
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (lane_sum(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

/// `out` = the norm of each row of `x`.
pub(crate) fn norm<N: Number>(x: &[f32], weight: &[f32], eps: f32, out: &mut [N]) {
    let part = rows_per_job(x.len() / weight.len(), weight.len()) * weight.len();
    let jobs = x.chunks(part).zip(out.chunks_mut(part));
    run(jobs.map(|(x, out)| move || norm_rows(x, weight, eps, out)).collect());
}

/// `sum = x + delta`, and `out` = the norm of each row of the sum.
pub(crate) fn add_norm<N: Number>(x: &[f32], delta: &[N], weight: &[f32], eps: f32, sum: &mut [f32], out: &mut [N]) {
    let part = rows_per_job(x.len() / weight.len(), weight.len()) * weight.len();
    let given = x.chunks(part).zip(delta.chunks(part));
    let jobs = given.zip(sum.chunks_mut(part).zip(out.chunks_mut(part)));
    run(jobs
        .map(|((x, delta), (sum, out))| move || add_norm_rows(x, delta, weight, eps, sum, out))
        .collect());
}

/// From the gradient of the norm's output: adds that of `x` to `dx`, copies the sum to `narrow`, and adds the weight's to `dweight` `[dim]`.
pub(crate) fn norm_back<N: Number>(
    dout: &[N],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dx: &mut [f32],
    narrow: &mut [N],
    dweight: &mut [f32],
) {
    let dim = weight.len();
    let part = rows_per_job(x.len() / dim, dim) * dim;
    // Each job sums its own rows; the sums are brought together in order.
    let mut partial = vec![0.0_f32; x.len().div_ceil(part) * dim];
    let given = dout.chunks(part).zip(x.chunks(part));
    let taken = dx.chunks_mut(part).zip(narrow.chunks_mut(part));
    let jobs = given.zip(taken).zip(partial.chunks_mut(dim));
    run(jobs
        .map(|(((dout, x), (dx, narrow)), dweight)| move || norm_back_rows(dout, x, weight, eps, dx, narrow, dweight))
        .collect());
    for partial in partial.chunks(dim) {
        for (sum, part) in dweight.iter_mut().zip(partial) {
            *sum += part;
        }
    }
}
