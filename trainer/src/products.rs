//! Chained products of whole numbers, the same on every device: what a proof of speed is made of.
//!
//! `x <- (x b) mod m`, the remainder between `-m/2` and `m/2`. All numbers are so small that a product's sums stay below 2^24, which single precision holds
//! exactly, in whatever order they are added; in bf16 the exact sum is rounded once, to nearest even, before the remainder is taken. So a device that computes in
//! the precision it claims gives the same numbers as any other, and one that computes in less does not: in fp32 the numbers need 12 bits, of which bf16
//! has 8 and TF32 11.

//!
//! On a CPU everything between two products is one pass on libtorch's own threads, for a proof should show what the machine multiplies.

use tch::{Device, Kind, TchError, Tensor};

use crate::config::Precision;
use crate::kernels::threads::{rows_per_job, run};
use crate::kernels::{Bf16, Buffer, Number, product, vectorised};
use crate::model::host;

/// Rows of a chain on a device.
pub struct Chain {
    x: Rows,
    /// `[side, side]`.
    b: Tensor,
    modulus: f32,
}

/// `[rows, side]`, whole numbers in the working precision.
enum Rows {
    Single(Here<f32>),
    Half(Here<Bf16>),
    Elsewhere(Tensor),
}

/// Rows in this machine's memory, and room for a product.
struct Here<N> {
    x: Buffer<N>,
    out: Buffer<N>,
    side: usize,
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
        Ok(Self {
            x: match (device, kind) {
                (Device::Cpu, Kind::Float) => Rows::Single(Here::new(x, side)?),
                (Device::Cpu, Kind::BFloat16) => Rows::Half(Here::new(x, side)?),
                _ => Rows::Elsewhere(place(x)?),
            },
            b: place(b)?,
            modulus: modulus as f32,
        })
    }

    /// One product.
    ///
    /// # Errors
    /// libtorch's.
    pub fn step(&mut self) -> Result<(), TchError> {
        match &mut self.x {
            Rows::Single(rows) => rows.step(&self.b, self.modulus),
            Rows::Half(rows) => rows.step(&self.b, self.modulus),
            Rows::Elsewhere(x) => {
                let sums = x.f_matmul(&self.b)?.f_to_kind(Kind::Float)?;
                *x = remainder_elsewhere(&sums, self.modulus).f_to_kind(x.kind())?;
                Ok(())
            }
        }
    }

    /// The numbers as they are now, by rows.
    pub fn numbers(&self) -> Vec<i16> {
        match &self.x {
            Rows::Single(rows) => whole(rows.x.slice(), rows.side),
            Rows::Half(rows) => whole(rows.x.slice(), rows.side),
            Rows::Elsewhere(x) => fetched(x),
        }
    }

    /// The rows from `from` on, `[count, side]`, flat.
    pub fn rows(&self, from: usize, count: usize) -> Vec<i16> {
        let some = |side: usize| from * side..(from + count) * side;
        match &self.x {
            Rows::Single(rows) => whole(&rows.x.slice()[some(rows.side)], rows.side),
            Rows::Half(rows) => whole(&rows.x.slice()[some(rows.side)], rows.side),
            Rows::Elsewhere(x) => fetched(&x.narrow(0, from as i64, count as i64)),
        }
    }
}

impl<N: Number> Here<N> {
    fn new(values: &[f32], side: usize) -> Result<Self, TchError> {
        let mut x = Buffer::new(values.len())?;
        for (place, value) in x.slice_mut().iter_mut().zip(values) {
            *place = N::narrow(*value);
        }
        let out = Buffer::new(values.len())?;
        Ok(Self { x, out, side })
    }

    fn step(&mut self, b: &Tensor, modulus: f32) -> Result<(), TchError> {
        let shape = [(self.x.slice().len() / self.side) as i64, self.side as i64];
        product(&self.out.view(&shape), &self.x.view(&shape), b, false)?;
        std::mem::swap(&mut self.x, &mut self.out);
        let per = self.side * rows_per_job(self.x.slice().len() / self.side, self.side);
        let jobs = self.x.slice_mut().chunks_mut(per);
        run(jobs.map(|numbers| move || remainders(numbers, modulus)).collect());
        Ok(())
    }
}

/// Runs jobs, which must not panic, on the threads that products are computed with: others would wait for cores that these hold.
pub fn beside_products<F: FnOnce() + Send>(jobs: Vec<F>) {
    run(jobs);
}

vectorised! {
    fn remainders<N>(numbers: &mut [N], modulus: f32) {
        for number in numbers {
            *number = N::narrow(remainder(number.wide(), modulus));
        }
    }
}

vectorised! {
    fn whole_numbers<N>(numbers: &[N], out: &mut [i16]) {
        for (out, number) in out.iter_mut().zip(numbers) {
            // Through 32 bits: there is an instruction for it, and the numbers are far below its limits.
            *out = number.wide() as i32 as i16;
        }
    }
}

fn whole<N: Number>(numbers: &[N], side: usize) -> Vec<i16> {
    let mut out = vec![0; numbers.len()];
    let per = side * rows_per_job(numbers.len() / side, side);
    let jobs = numbers.chunks(per).zip(out.chunks_mut(per));
    run(jobs.map(|(numbers, out)| move || whole_numbers(numbers, out)).collect());
    out
}

/// Whole numbers from another device, flat.
fn fetched(numbers: &Tensor) -> Vec<i16> {
    let numbers = numbers.contiguous().to_kind(Kind::Float);
    host::to_vec(&numbers).into_iter().map(|value| value as i16).collect()
}

/// The same as [`remainder`] by operators.
fn remainder_elsewhere(sums: &Tensor, modulus: f32) -> Tensor {
    let m = f64::from(modulus);
    let half = (m - 1.0) / 2.0;
    let near = sums - (sums * (1.0 / m)).round() * m;
    let (above, below) = (near.gt(half).to_kind(Kind::Float), near.lt(-half).to_kind(Kind::Float));
    near - above * m + below * m
}

/// The remainder of a whole number below 2^24 by an odd `m`, nearest to zero: exact, since the quotient is off by one at most and every product in it is whole.
#[inline(always)]
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
            let sums = Tensor::from_slice(&[0.0_f32, 4_096_000.0, -16_777_215.0, 255.0, 4096.0]);
            let copies = remainder_elsewhere(&sums, m as f32);
            let expected = [0.0, 4_096_000.0, -16_777_215.0, 255.0, 4096.0].map(|value| remainder(value, m as f32));
            assert_eq!(host::to_vec(&copies), expected);
        }
    }
}
