//! Rotary embedding (RoFormer, arXiv 2104.09864, in the half-split form) joined with the change between two orders of the same numbers:
//! by row, as the products make and take them, and by head, as attention does.
//!
//! By row: `[batch, seq, heads + 2 kv_heads, hd]`, queries, keys, values. By head: queries `[batch, heads, seq, hd]`; keys and values
//! `[batch, kv_heads, seq, hd]` each. The tables are the model's: `[max_seq_len, hd]`, both halves of the cosines alike, the first half of
//! the sines negated. So `turned[i] = x[i] cos[i] + x[i +- hd/2] sin[i]`, and turning back negates the sines.

use super::threads::{rows_per_job, run};
use super::{Number, vectorised};

/// The sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Heads {
    pub(crate) seq: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) hd: usize,
}

impl Heads {
    /// Numbers of all heads at one place.
    pub(crate) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.hd
    }
}

vectorised! {
    /// Turns one head at consecutive places, from rows `stride` apart.
    fn turn_head<N>(rows: &[N], stride: usize, cos: &[f32], sin: &[f32], hd: usize, out: &mut [N]) {
        let half = hd / 2;
        let tables = cos.chunks_exact(hd).zip(sin.chunks_exact(hd));
        for ((out, row), (cos, sin)) in out.chunks_exact_mut(hd).zip(rows.chunks(stride)).zip(tables) {
            let (a, b) = row[..hd].split_at(half);
            let (out_a, out_b) = out.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (a[i].wide(), b[i].wide());
                out_a[i] = N::narrow(x * cos[i] + y * sin[i]);
                out_b[i] = N::narrow(y * cos[half + i] + x * sin[half + i]);
            }
        }
    }
}

vectorised! {
    /// Turns the heads of one place back: `head` of `count` lies `apart` after the one before it in `by_head`, side by side in `row`.
    fn turn_back_row<N>(by_head: &[N], apart: usize, cos: &[f32], sin: &[f32], hd: usize, row: &mut [N]) {
        let half = hd / 2;
        for (head, out) in row.chunks_exact_mut(hd).enumerate() {
            let (a, b) = by_head[head * apart..][..hd].split_at(half);
            let (out_a, out_b) = out.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (a[i].wide(), b[i].wide());
                // The pair's sine is `sin[half + i]`; `sin[i]` is the same, negated.
                out_a[i] = N::narrow(x * cos[i] + y * sin[half + i]);
                out_b[i] = N::narrow(y * cos[half + i] + x * sin[i]);
            }
        }
    }
}

/// Copies one head at consecutive places, from rows `stride` apart.
fn copy_head<N: Number>(rows: &[N], stride: usize, hd: usize, out: &mut [N]) {
    for (out, row) in out.chunks_exact_mut(hd).zip(rows.chunks(stride)) {
        out.copy_from_slice(&row[..hd]);
    }
}

/// From rows to heads: queries and keys turned, values as they are.
pub(crate) fn split_heads<N: Number>(h: Heads, rows: &[N], cos: &[f32], sin: &[f32], [q, k, v]: [&mut [N]; 3]) {
    let (width, hd) = (h.width(), h.hd);
    let one = h.seq * hd; // one head of one sequence
    let mut jobs: Vec<Box<dyn FnOnce() + Send + '_>> = Vec::new();
    let mut first = 0;
    for (part, (out, count)) in [(q, h.heads), (k, h.kv_heads), (v, h.kv_heads)].into_iter().enumerate() {
        for (i, out) in out.chunks_exact_mut(one).enumerate() {
            let rows = &rows[i / count * h.seq * width + (first + i % count) * hd..];
            jobs.push(match part {
                2 => Box::new(move || copy_head(rows, width, hd, out)),
                _ => Box::new(move || turn_head(rows, width, cos, sin, hd, out)),
            });
        }
        first += count;
    }
    run(jobs);
}

/// From heads to rows, turned back: the gradient of [`split_heads`].
pub(crate) fn join_heads<N: Number>(h: Heads, [q, k, v]: [&[N]; 3], cos: &[f32], sin: &[f32], rows: &mut [N]) {
    let (width, hd, one) = (h.width(), h.hd, h.seq * h.hd);
    let per = rows_per_job(rows.len() / width, width);
    let job = |first: usize, rows: &mut [N]| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let (sequence, place) = ((first + i) / h.seq, (first + i) % h.seq);
            let (cos, sin) = (&cos[place * hd..][..hd], &sin[place * hd..][..hd]);
            let (q_row, rest) = row.split_at_mut(h.heads * hd);
            let (k_row, v_row) = rest.split_at_mut(h.kv_heads * hd);
            let at = |heads: usize| sequence * heads * one + place * hd;
            turn_back_row(&q[at(h.heads)..], one, cos, sin, hd, q_row);
            turn_back_row(&k[at(h.kv_heads)..], one, cos, sin, hd, k_row);
            for (head, out) in v_row.chunks_exact_mut(hd).enumerate() {
                out.copy_from_slice(&v[at(h.kv_heads) + head * one..][..hd]);
            }
        }
    };
    let job = &job;
    let parts = rows.chunks_mut(per * width).enumerate();
    run(parts.map(|(part, rows)| move || job(part * per, rows)).collect());
}
