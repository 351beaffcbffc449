//! How files write numbers: floats of several widths, and the blocks of GGUF, each with its own scale.
//!
//! Layouts of the blocks: the format's reference implementation (ggml, `ggml-common.h`). `d` and `m` are 16-bit floats; low nibbles hold a
//! block's first half, high nibbles its second.
//!
//! ```text
//! q4_0   32 values  18 bytes   d | 16 nibble pairs                  (q - 8) d
//! q4_1   32 values  20 bytes   d | m | 16 nibble pairs              q d + m
//! q8_0   32 values  34 bytes   d | 32 signed bytes                  q d
//! q6_k  256 values 210 bytes   128 nibble pairs | 64 bytes of four 2-bit tops | 16 signed scales | d      (q - 32) scale d
//! ```

/// A way to write numbers that is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// IEEE 754 single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// 4 bits around zero.
    Q4_0,
    /// 4 bits above a minimum.
    Q4_1,
    /// 8 bits around zero.
    Q8_0,
    /// 6 bits around zero, two levels of scales.
    Q6K,
}

impl Encoding {
    /// Values and bytes of one block; a tensor is whole blocks.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
            Self::Q6K => (256, 210),
        }
    }

    /// Appends the values of whole blocks to `out`.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        let (_, block) = self.block();
        debug_assert!(bytes.len().is_multiple_of(block));
        let blocks = bytes.chunks_exact(block);
        match self {
            Self::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            Self::F16 => out.extend(blocks.map(half)),
            Self::Bf16 => out.extend(blocks.map(|b| f32::from_bits(u32::from(word(b)) << 16))),
            Self::Q4_0 => blocks.for_each(|b| nibbles(&b[2..], out, |q| (q - 8.0) * half(b))),
            Self::Q4_1 => blocks.for_each(|b| nibbles(&b[4..], out, |q| q * half(b) + half(&b[2..]))),
            Self::Q8_0 => blocks.for_each(|b| out.extend(b[2..].iter().map(|&q| f32::from(q as i8) * half(b)))),
            Self::Q6K => blocks.for_each(|b| six_bits(b, out)),
        }
    }
}

/// The low nibbles of `bytes`, then the high ones, each through `value`.
fn nibbles(bytes: &[u8], out: &mut Vec<f32>, value: impl Fn(f32) -> f32) {
    out.extend(bytes.iter().map(|&byte| value(f32::from(byte & 15))));
    out.extend(bytes.iter().map(|&byte| value(f32::from(byte >> 4))));
}

/// One block of `q6_k`: twice 128 values from 64 bytes of nibbles and 32 of tops; 16 values share a scale.
fn six_bits(block: &[u8], out: &mut Vec<f32>) {
    let (low, rest) = block.split_at(128);
    let (top, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    for (place, part) in (0..256).zip(std::iter::repeat(half(d))) {
        let (upper, within) = (place / 128, place % 128);
        let (quarter, column) = (within / 32, within % 32);
        let nibble = low[64 * upper + 32 * (quarter % 2) + column] >> (4 * (quarter / 2)) & 15;
        let bits = top[32 * upper + column] >> (2 * quarter) & 3;
        let q = f32::from(i16::from(nibble | bits << 4) - 32);
        out.push(part * f32::from(scales[place / 16] as i8) * q);
    }
}

/// The first two bytes, little-endian.
fn word(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The first two bytes as a half-precision float: sign, 5 bits of exponent, 10 of mantissa.
fn half(bytes: &[u8]) -> f32 {
    let bits = word(bytes);
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    sign * match exponent {
        0 => mantissa * 2.0_f32.powi(-24),
        31 if mantissa == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1024.0 + mantissa) * 2.0_f32.powi(exponent - 25),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::new();
        encoding.decode(bytes, &mut out);
        out
    }

    #[test]
    fn half_precision_is_read_exactly() {
        for (bits, value) in [
            (0x3c00_u16, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_95),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555e-5),
            (0x8000, -0.0),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(decoded(Encoding::F16, &bits.to_le_bytes()), [value], "{bits:#06x}");
        }
        assert!(decoded(Encoding::F16, &0x7e00_u16.to_le_bytes())[0].is_nan());
        assert_eq!(decoded(Encoding::Bf16, &[0x80, 0xbf]), [-1.0]);
    }

    #[test]
    fn low_nibbles_are_the_first_half_of_a_block() {
        let mut block = vec![0x00, 0x40]; // d = 2
        block.extend((0..16).map(|i| i | (15 - i) << 4));
        let found = decoded(Encoding::Q4_0, &block);
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 2.0 * (q as f32 - 8.0)).collect();
        assert_eq!(found, expected);
        let mut block = vec![0x00, 0x40, 0x00, 0x3c]; // d = 2, m = 1
        block.extend([0x21; 16]);
        let found = decoded(Encoding::Q4_1, &block);
        assert_eq!((found[0], found[15], found[16], found[31]), (3.0, 3.0, 5.0, 5.0));
    }

    #[test]
    fn eight_bits_are_signed() {
        let mut block = vec![0x00, 0x38]; // d = 0.5
        block.extend((0..32_u8).map(|i| i.wrapping_sub(16)));
        let found = decoded(Encoding::Q8_0, &block);
        assert_eq!((found[0], found[16], found[31]), (-8.0, 0.0, 7.5));
    }

    #[test]
    fn six_bits_are_put_together_from_nibble_and_top() {
        let mut block = vec![0; 210];
        block[64 + 32 + 5] = 0x30; // upper half, high nibble of the second 32: value 128 + 96 + 5 has low bits 3
        block[128 + 32 + 5] = 0b1000_0000; // and top bits 2
        block[192..208].fill(1);
        block[192 + 14] = 0xfe; // its scale is -2
        block[208..].copy_from_slice(&[0x00, 0x3c]); // d = 1
        let found = decoded(Encoding::Q6K, &block);
        assert_eq!(found[229], -2.0 * (f32::from(3_u8 | 2 << 4) - 32.0));
        assert_eq!((found[0], found[228]), (-32.0, 64.0));
    }
}
