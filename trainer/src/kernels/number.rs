//! The two kinds of element that activations come in.

use tch::Kind;

/// bfloat16: the upper sixteen bits of a single-precision float.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

/// An element that is computed with as `f32` and kept as itself.
pub(crate) trait Number: Copy + Default + Send + Sync + 'static {
    /// libtorch's name for it.
    const KIND: Kind;

    /// As a float; exact.
    fn wide(self) -> f32;

    /// The nearest there is, ties to even.
    fn narrow(x: f32) -> Self;
}

impl Number for f32 {
    const KIND: Kind = Kind::Float;

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Number for Bf16 {
    const KIND: Kind = Kind::BFloat16;

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let odd = (bits >> 16) & 1;
        let rounded = (bits.wrapping_add(0x7fff + odd) >> 16) as u16;
        // Rounding would carry some of those that are no number over into zero.
        Self(if x.is_nan() { 0x7fc0 } else { rounded })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    #[test]
    fn rounding_to_bfloat16_is_libtorchs() {
        let mut values: Vec<f32> = (0..100_000_u32)
            .map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)))
            .filter(|x| !x.is_nan())
            .collect();
        values.extend([
            0.0,
            -0.0,
            1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            1.003_906_2,
            1.011_718_8,
        ]);
        let expected = Tensor::from_slice(&values).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        for (i, &x) in values.iter().enumerate() {
            let expected = expected.double_value(&[i as i64]) as f32;
            assert_eq!(Bf16::narrow(x).wide().to_bits(), expected.to_bits(), "{x:e}");
        }
        assert!(Bf16::narrow(f32::NAN).wide().is_nan());
    }
}
