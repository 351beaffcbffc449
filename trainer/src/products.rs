//! Chained products of whole numbers, the same on every device: what a proof of speed is made of.
//!
//! `x <- (x b) mod m`, the remainder between `-m/2` and `m/2`. All numbers are so small that a product's sums stay below 2^24, which single precision holds
//! exactly, in whatever order they are added; in bf16 the exact sum is rounded once, to nearest even, before the remainder is taken. So a device that computes in
//! the precision it claims gives the same numbers as any other, and one that computes in less does not: in fp32 the numbers need 12 bits, of which bf16
//! has 8 and TF32 11.

use tch::{Device, Kind, TchError, Tensor};

use crate::config::Precision;
use crate::kernels::product;
use crate::model::host;

/// Rows of a chain on a device.
pub struct Chain {
    /// `[rows, side]`, whole numbers in the working precision.
    x: Tensor,
    /// `[side, side]`.
    b: Tensor,
    /// Room for a product, in the working precision.
    out: Tensor,
    modulus: f32,
}

impl Chain {
    /// Starts from `x` `[rows * side]` with the factor `b` `[side * side]`, by rows.
    ///
    /// # Errors
    /// libtorch's, for want of memory; lengths are the caller's duty.
    pub fn new(
        x: &[f32],
        b: &[f32],
        side: usize,
        modulus: u32,
        precision: Precision,
        device: Device,
    ) -> Result<Self, TchError> {
        let kind = precision.kind();
        let place = |values: &[f32]| {
            Tensor::f_from_slice(values)?
                .f_view([-1, side as i64])?
                .f_to_device(device)?
                .f_to_kind(kind)
        };
        let (x, b) = (place(x)?, place(b)?);
        Ok(Self {
            out: x.f_zeros_like()?,
            x,
            b,
            modulus: modulus as f32,
        })
    }

    /// One product.
    ///
    /// # Errors
    /// libtorch's.
    pub fn step(&mut self) -> Result<(), TchError> {
        product(&self.out, &self.x, &self.b, false)?;
        let mut sums = self.out.f_to_kind(Kind::Float)?;
        match host::slice_mut(&mut sums) {
            Some(sums) => sums.iter_mut().for_each(|sum| *sum = remainder(*sum, self.modulus)),
            None => sums = self.remainder_elsewhere(&sums),
        }
        if self.out.kind() == Kind::Float && self.out.device() == Device::Cpu {
            // The sums are what `out` held: the two change places, and nothing is copied.
            std::mem::swap(&mut self.x, &mut self.out);
        } else {
            self.x.f_copy_(&sums)?;
        }
        Ok(())
    }

    /// The same as [`remainder`] by operators.
    fn remainder_elsewhere(&self, sums: &Tensor) -> Tensor {
        let m = f64::from(self.modulus);
        let half = (m - 1.0) / 2.0;
        let near = sums - (sums * (1.0 / m)).round() * m;
        let (above, below) = (near.gt(half).to_kind(Kind::Float), near.lt(-half).to_kind(Kind::Float));
        near - above * m + below * m
    }

    /// The numbers as they are now, by rows.
    pub fn numbers(&self) -> Vec<i16> {
        whole(&self.x)
    }

    /// The rows from `from` on, `[count, side]`, flat.
    pub fn rows(&self, from: usize, count: usize) -> Vec<i16> {
        whole(&self.x.narrow(0, from as i64, count as i64).contiguous())
    }
}

/// Whole numbers of any kind and place, flat.
fn whole(numbers: &Tensor) -> Vec<i16> {
    let numbers = numbers.to_kind(Kind::Float);
    match host::slice(&numbers) {
        Some(values) => values.iter().map(|&value| value as i16).collect(),
        None => host::to_vec(&numbers).into_iter().map(|value| value as i16).collect(),
    }
}

/// The remainder of a whole number below 2^24 by an odd `m`, nearest to zero: exact, since the quotient is off by one at most and every product in it is whole.
fn remainder(value: f32, m: f32) -> f32 {
    let half = (m - 1.0) / 2.0;
    let near = value - (value * (1.0 / m)).round_ties_even() * m;
    let near = if near > half { near - m } else { near };
    if near < -half { near + m } else { near }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn remainders_are_exact_up_to_the_largest_sum() {
        for (m, step) in [(8191_i64, 37), (509, 41), (8191, 8191), (509, 509)] {
            for value in (-16_777_215..=16_777_215_i64).step_by(step) {
                let expected = (value + (m - 1) / 2).rem_euclid(m) - (m - 1) / 2;
                let found = remainder(value as f32, m as f32);
                assert!(
                    found == expected as f32,
                    "{value} mod {m}: expected {expected}, found {found}"
                );
            }
        }
    }

    /// Numbers within `-most..=most`.
    fn numbers(count: usize, most: i64, salt: i64) -> Vec<f32> {
        (0..count as i64)
            .map(|i| ((i * i * 7919 + i * salt) % (2 * most + 1) - most) as f32)
            .collect()
    }

    #[test]
    fn a_chain_is_whole_numbers_whatever_rows_are_beside() {
        for (precision, m, most) in [(Precision::Fp32, 8191, 1), (Precision::Bf16, 509, 2)] {
            let side = 256;
            let (x, b) = (
                numbers(side * side, i64::from(m) / 2, 31),
                numbers(side * side, most, 17),
            );
            let mut whole = Chain::new(&x, &b, side, m, precision, Device::Cpu).unwrap();
            let mut some = Chain::new(&x[5 * side..8 * side], &b, side, m, precision, Device::Cpu).unwrap();
            let mut exact: Vec<i64> = x[5 * side..6 * side].iter().map(|&x| x as i64).collect();
            for _ in 0..3 {
                whole.step().unwrap();
                some.step().unwrap();
                let sum = |column: usize| (0..side).map(|i| exact[i] * b[i * side + column] as i64).sum::<i64>();
                let rounded = |sum: i64| match precision {
                    Precision::Bf16 => Tensor::from_slice(&[sum as f32])
                        .to_kind(Kind::BFloat16)
                        .double_value(&[0]) as i64,
                    _ => sum,
                };
                let m = i64::from(m);
                let next = |column| (rounded(sum(column)) + (m - 1) / 2).rem_euclid(m) - (m - 1) / 2;
                exact = (0..side).map(next).collect();
            }
            assert_eq!(whole.rows(5, 3), some.numbers());
            assert!(
                some.rows(0, 1).iter().zip(&exact).all(|(a, b)| i64::from(*a) == *b),
                "{precision:?}"
            );
            let copies = whole.remainder_elsewhere(&Tensor::from_slice(&[
                0.0_f32,
                4_096_000.0,
                -16_777_215.0,
                255.0,
                4096.0,
            ]));
            let expected = [0.0, 4_096_000.0, -16_777_215.0, 255.0, 4096.0].map(|value| remainder(value, m as f32));
            assert_eq!(host::to_vec(&copies), expected);
        }
    }
}
