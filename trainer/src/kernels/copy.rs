//! Passes that only move numbers: between precisions, and rows of the embedding.

use super::threads::{rows_per_job, run};
use super::{Number, vectorised};

vectorised! {
    fn narrow_part<N>(from: &[f32], to: &mut [N]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = N::narrow(from);
        }
    }
}

vectorised! {
    fn widen_part<N>(from: &[N], to: &mut [f32], add: bool) {
        if add {
            for (to, from) in to.iter_mut().zip(from) {
                *to += from.wide();
            }
        } else {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.wide();
            }
        }
    }
}

/// `to = from`, rounded.
pub(crate) fn narrow<N: Number>(from: &[f32], to: &mut [N]) {
    let part = rows_per_job(from.len(), 1);
    let jobs = from.chunks(part).zip(to.chunks_mut(part));
    run(jobs.map(|(from, to)| move || narrow_part(from, to)).collect());
}

/// `to = from`, or `to += from` if `add`.
pub(crate) fn widen<N: Number>(from: &[N], to: &mut [f32], add: bool) {
    let part = rows_per_job(from.len(), 1);
    let jobs = from.chunks(part).zip(to.chunks_mut(part));
    run(jobs.map(|(from, to)| move || widen_part(from, to, add)).collect());
}

/// `to = 0`.
pub(crate) fn zero(to: &mut [f32]) {
    let part = rows_per_job(to.len(), 1);
    run(to.chunks_mut(part).map(|to| move || to.fill(0.0)).collect());
}

/// Row `tokens[i]` of `table` `[vocab, dim]` to row i of `to`.
pub(crate) fn gather(table: &[f32], tokens: &[i64], to: &mut [f32], dim: usize) {
    for (to, &token) in to.chunks_exact_mut(dim).zip(tokens) {
        to.copy_from_slice(&table[token as usize * dim..][..dim]);
    }
}

/// Adds row i of `from` to row `tokens[i]` of `table` `[vocab, dim]`, in order.
pub(crate) fn scatter_add(from: &[f32], tokens: &[i64], table: &mut [f32], dim: usize) {
    for (from, &token) in from.chunks_exact(dim).zip(tokens) {
        for (sum, x) in table[token as usize * dim..][..dim].iter_mut().zip(from) {
            *sum += x;
        }
    }
}
