//! SwiGLU (arXiv 2002.05202): `out = silu(gate) * up`, with `silu(g) = g / (1 + e^-g)`.
//!
//! `gate_up` `[rows, 2 ffn]` holds in each row the gates, then what they let through; `out` `[rows, ffn]`.

use super::threads::{rows_per_job, run};
use super::{LANES, Number, exp, vectorised};

vectorised! {
    fn gate_rows<N>(gate_up: &[N], ffn: usize, out: &mut [N]) {
        for (row, out) in gate_up.chunks_exact(2 * ffn).zip(out.chunks_exact_mut(ffn)) {
            let (gate, up) = row.split_at(ffn);
            for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                let g = g.wide();
                *out = N::narrow(g / (1.0 + exp(-g)) * u.wide());
            }
        }
    }
}

vectorised! {
    fn gate_back_rows<N>(gate_up: &mut [N], ffn: usize, out: &mut [N]) {
        for (row, out) in gate_up.chunks_exact_mut(2 * ffn).zip(out.chunks_exact_mut(ffn)) {
            let (gate, up) = row.split_at_mut(ffn);
            let (gates, gate) = gate.as_chunks_mut::<LANES>();
            let (ups, up) = up.as_chunks_mut::<LANES>();
            let (outs, out) = out.as_chunks_mut::<LANES>();
            for ((gate, up), out) in gates.iter_mut().zip(ups).zip(outs) {
                // Copies, so that the compiler knows the three apart and makes vectors of them.
                let (mut g, mut u, mut o) = (*gate, *up, *out);
                for i in 0..LANES {
                    [g[i], u[i], o[i]] = gate_back_one(g[i], u[i], o[i]);
                }
                (*gate, *up, *out) = (g, u, o);
            }
            for ((gate, up), out) in gate.iter_mut().zip(up).zip(out) {
                [*gate, *up, *out] = gate_back_one(*gate, *up, *out);
            }
        }
    }
}

/// The gradients of one gate and of what it let through, and the output, from the two and the output's gradient.
#[inline(always)]
fn gate_back_one<N: Number>(gate: N, up: N, dout: N) -> [N; 3] {
    let (g, u, d) = (gate.wide(), up.wide(), dout.wide());
    let share = 1.0 / (1.0 + exp(-g));
    let silu = g * share;
    [d * u * share * (1.0 + g * (1.0 - share)), d * silu, silu * u].map(N::narrow)
}

/// `out` from `gate_up`.
pub(crate) fn gate<N: Number>(gate_up: &[N], ffn: usize, out: &mut [N]) {
    let per = rows_per_job(out.len() / ffn, 3 * ffn);
    let jobs = gate_up.chunks(2 * per * ffn).zip(out.chunks_mut(per * ffn));
    run(jobs
        .map(|(gate_up, out)| move || gate_rows(gate_up, ffn, out))
        .collect());
}

/// In place: `gate_up` becomes its own gradient, and `out`, which holds the gradient of the output, becomes the output again.
pub(crate) fn gate_back<N: Number>(gate_up: &mut [N], ffn: usize, out: &mut [N]) {
    let per = rows_per_job(out.len() / ffn, 3 * ffn);
    let jobs = gate_up.chunks_mut(2 * per * ffn).zip(out.chunks_mut(per * ffn));
    run(jobs
        .map(|(gate_up, out)| move || gate_back_rows(gate_up, ffn, out))
        .collect());
}
