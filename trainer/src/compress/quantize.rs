//! The quantiser: one sign per value and one 8-bit logarithmic scale per chunk.
//!
//! A scale code `c` in `1..=255` stands for `2^-28 * 2^((c - 1) / 8)`: 32 octaves in steps of 9%, from 3.7e-9 to 13.5. Code 0
//! is a chunk that says nothing. Everybody must decode a code to the same number, so the numbers come from an integer table,
//! in units of [`UNIT`]; each has at most 24 significant bits, so that its `f32` is the same number exactly and the author's
//! accumulator loses precisely what the others add.
//!
//! On heavy-tailed values, sign and mean magnitude err less than a small codebook and cost fewer bits (`training.md`);
//! sign with mean magnitude is the 1-bit quantiser of signSGD with error feedback (Karimireddy et al. 2019, arXiv 1901.09847),
//! here over the selected values of one chunk.

/// What is said of each value that a sparse contribution holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantizer {
    /// Its sign; one scale a chunk.
    #[default]
    Sign,
    /// Its sign and one of two levels of its chunk ([`super::levels`]).
    Sign2,
    /// The value.
    Raw,
}

/// Fraction bits of a decoded value: the fixed-point unit is `2^-32`.
pub const FRACTION_BITS: u32 = 32;

/// The fixed-point unit as a float: what one integer step of a decoded value is worth.
pub const UNIT: f32 = 1.0 / (1u64 << FRACTION_BITS) as f32;

/// Every decoded magnitude is below `2^VALUE_BITS` units.
pub const VALUE_BITS: u32 = 36;

/// Magnitude of each scale code in units of `2^-32`; code 0 is zero.
pub const SCALES: [u64; 256] = scales();

/// `2^(j/8)` with 23 fraction bits: the mantissas of the eight steps of an octave.
const MANTISSAS: [u64; 8] = [
    8_388_608, 9_147_842, 9_975_792, 10_878_679, 11_863_283, 12_937_002, 14_107_901, 15_384_775,
];

/// Octave of code 1 above the unit: `2^-28 = 2^4 units`.
const FIRST_OCTAVE: usize = 4;

/// Upper end of code 0, in units: the geometric middle between code 1 and the code that would come before it, rounded.
const SILENT_BELOW: u64 = 15;

/// Squares of the borders between neighbouring codes: a mean `m` (in units) has code `c` if `BORDERS[c] <= m^2 < BORDERS[c+1]`.
/// Borders are geometric means, and comparing squares needs no root.
const BORDERS: [f64; 256] = borders();

const fn scales() -> [u64; 256] {
    let mut table = [0; 256];
    let mut code = 1;
    while code < 256 {
        let octave = FIRST_OCTAVE + (code - 1) / 8;
        let mantissa = MANTISSAS[(code - 1) % 8];
        table[code] = if octave >= 23 {
            mantissa << (octave - 23)
        } else {
            (mantissa + (1 << (22 - octave))) >> (23 - octave)
        };
        code += 1;
    }
    table
}

const fn borders() -> [f64; 256] {
    let scales = scales();
    let mut table = [0.0; 256];
    table[1] = (SILENT_BELOW * SILENT_BELOW) as f64;
    let mut code = 2;
    while code < 256 {
        table[code] = (scales[code - 1] as u128 * scales[code] as u128) as f64;
        code += 1;
    }
    table
}

/// The magnitude of a scale code as a float: exactly `SCALES[code] * 2^-32`.
#[must_use]
pub fn scale_value(code: u8) -> f32 {
    SCALES[usize::from(code)] as f32 * UNIT
}

/// The scale code nearest to a mean magnitude, in the logarithmic sense. Above the table's end it is the largest; the
/// accumulator carries what is cut off.
#[must_use]
pub(crate) fn scale_code(mean: f64) -> u8 {
    let units = mean * (1u64 << FRACTION_BITS) as f64;
    let square = units * units;
    let above = BORDERS[1..].partition_point(|border| *border <= square);
    above as u8 // at most 255, the number of borders
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_scale_is_exact_in_f32_and_fits_the_value_bits() {
        for (code, units) in SCALES.iter().enumerate() {
            assert_eq!((*units as f32) as u64, *units, "code {code}");
            assert!(*units < 1 << VALUE_BITS, "code {code}");
            assert_eq!(
                f64::from(scale_value(code as u8)),
                *units as f64 / 2f64.powi(32),
                "code {code}"
            );
        }
    }

    #[test]
    fn scales_grow_by_an_eighth_of_an_octave() {
        for code in 2..256 {
            let ratio = SCALES[code] as f64 / SCALES[code - 1] as f64;
            // The smallest are rounded to whole units, 1/32 of their value.
            assert!((ratio - 2f64.powf(0.125)).abs() < 0.06, "code {code}: {ratio}");
        }
        assert_eq!(SCALES[1], 16);
        assert_eq!(SCALES[1 + 28 * 8], 1 << 32, "2^-28 * 2^28 is one");
    }

    #[test]
    fn a_scale_has_its_own_code() {
        for code in 0..=255u8 {
            assert_eq!(scale_code(f64::from(scale_value(code))), code);
        }
    }

    #[test]
    fn means_outside_the_table_take_its_ends() {
        assert_eq!(scale_code(0.0), 0);
        assert_eq!(scale_code(1e-12), 0);
        assert_eq!(scale_code(3e38), 255);
    }
}
