//! What the trainer computes on a CPU beside libtorch: matrix products through oneDNN, and everything between two products in one pass.
//!
//! Three things cost a decoder time on a CPU: the products, the passes over memory between them, and the pages of fresh buffers. So a
//! product writes into (or adds onto) a buffer that exists already ([`product()`]), and what lies between two products is one pass over
//! slices, shared out over libtorch's own threads ([`threads`]), compiled for the widest vectors that the machine has ([`vectorised`]).
//!
//! Every pass here is written so that its bits do not depend on the vectors' width or on the number of threads: sums run over sixteen fixed
//! lanes, jobs have fixed sizes, and nothing is contracted to fused multiply-adds.

pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod copy;
pub(crate) mod gate;
pub(crate) mod norm;
pub(crate) mod number;
pub(crate) mod product;
pub(crate) mod rotary;
pub(crate) mod softmax;
pub(crate) mod threads;

pub(crate) use buffer::Buffer;
pub(crate) use number::{Bf16, Number};
pub(crate) use product::product;

/// Defines a function whose body is compiled thrice: for AVX-512, for AVX2, and for whatever the target guarantees; the widest that the machine
/// has runs. Rust never contracts or reorders floating-point arithmetic, so all three give the same bits.
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$number:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name $(<$number: $crate::kernels::Number>)? ($($arg: $ty),*) {
            #[inline(always)]
            fn body $(<$number: $crate::kernels::Number>)? ($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn wide $(<$number: $crate::kernels::Number>)? ($($arg: $ty),*) {
                    body $(::<$number>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn medium $(<$number: $crate::kernels::Number>)? ($($arg: $ty),*) {
                    body $(::<$number>)? ($($arg),*)
                }
                if $crate::kernels::has_avx512() {
                    // SAFETY: the machine has the features, as was just asked.
                    return unsafe { wide $(::<$number>)? ($($arg),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { medium $(::<$number>)? ($($arg),*) };
                }
            }
            body $(::<$number>)? ($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// Whether the machine has all of AVX-512 that [`vectorised`] asks for; the standard library remembers the answer.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
}

/// Lanes that a sum runs over.
const LANES: usize = 16;

/// `sum of f(a, b)` over equally long slices, in [`LANES`] fixed lanes, then the lanes pairwise.
#[inline(always)]
pub(crate) fn lane_sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += f(a, b);
    }
    fold(lanes, |a, b| a + b)
}

/// The lanes brought together pairwise.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x`, to within 2 units in the last place; 0 far below, near the largest float far above, not a number if `x` is none.
///
/// Cephes' `expf` without its branches, so that a loop over it becomes vectors: `x = n ln 2 + r`, a polynomial in r, and n into the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to a whole number; its low bits then hold that number.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons, not `clamp`: a number that is none must stay so.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_66;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_the_librarys_to_two_units_in_the_last_place() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 2.4e-7 * exact, "e^{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_sum_in_lanes_is_the_sum() {
        for len in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let expected: f32 = a.iter().map(|x| x * x).sum();
            assert_eq!(lane_sum(&a, &a, |x, y| x * y), expected, "{len} elements");
        }
    }
}
