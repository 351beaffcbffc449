//! The fingerprint of up to 32 tokens: the largest of what the model's head read there.
//!
//! As in TOPLOC (arXiv 2501.16007, section 4): of all values that the head reads at these places, `tokens * dim` of them, the 128 of largest magnitude are
//! kept, each with its place and rounded to bfloat16 (sign, 8 bits of exponent, 7 of mantissa). Places and values together are one polynomial
//! over the integers modulo a prime, which at the place gives the value; so 128 pairs take 2 bytes each instead of 5:
//!
//! ```text
//!  0   2  m: places are taken modulo m, the largest modulus up to 65521 that keeps the 128 apart
//!  2   2  coefficient 0 (of x^0)   below 65521, as every one
//!  4   2  coefficient 1
//!  .   .  ...
//! 256  2  coefficient 127                                            258 bytes; 2 + 2 n where there are n < 128 values
//! ```
//!
//! Who checks computes the values anew, takes the places that are largest *there*, and asks the polynomial for the values that the prover had. Nearly the
//! same activations have nearly the same largest places and values; others give what is as good as random. Values are compared as TOPLOC does, except
//! that a value just below a power of two and one just above count as near: by the distance of their bit patterns, in units of the last of the 7 bits,
//! of which there are 128 an octave.

use super::field::{PRIME, evaluate, interpolate};
use crate::proof::{ProofError, Reader, Writer};

/// Tokens that share a fingerprint.
pub const TOKENS: usize = 32;
/// Values kept of them.
pub const TOP: usize = 128;
/// Units of the last bit in a factor of two.
const OCTAVE: u16 = 128;
/// The largest finite bfloat16.
const LARGEST: u16 = 0x7f7f;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    modulus: u16,
    coefficients: Vec<u16>,
}

/// How far a fingerprint and activations are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// Values compared.
    pub compared: usize,
    /// Of them, those whose sign differs, or whose magnitude differs by a factor of two or more.
    pub exponents: usize,
    /// Mean difference of the others, in units of the last bit of a bfloat16 (1 is 0.4% to 0.8%).
    pub mean: f64,
    /// The median of the same.
    pub median: f64,
}

/// The values are not numbers, or there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FingerprintError {
    /// Nothing to take a fingerprint of.
    #[error("no activations to take a fingerprint of")]
    Empty,
    /// The model is broken.
    #[error("activation {index} is not a finite number; the model's parameters are broken")]
    NonFinite {
        /// The first.
        index: usize,
    },
    /// Not one modulus keeps the places apart.
    #[error("no modulus keeps the {TOP} largest of {values} activations apart")]
    Clash {
        /// Of how many values.
        values: usize,
    },
}

/// A value as bfloat16, rounded to nearest even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // What rounds beyond the largest finite value stays there: no infinity among the values.
    if rounded & 0x7fff > LARGEST {
        rounded & 0x8000 | LARGEST
    } else {
        rounded
    }
}

/// The places of the largest magnitudes, larger first, ties by the lower place.
fn largest(values: &[f32]) -> Result<Vec<usize>, FingerprintError> {
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(FingerprintError::NonFinite { index });
    }
    if values.is_empty() {
        return Err(FingerprintError::Empty);
    }
    let mut places: Vec<usize> = (0..values.len()).collect();
    let by_size = |a: &usize, b: &usize| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b));
    if places.len() > TOP {
        places.select_nth_unstable_by(TOP - 1, by_size);
        places.truncate(TOP);
    }
    places.sort_unstable_by(by_size);
    Ok(places)
}

/// The largest modulus up to the prime under which no two places are the same.
fn modulus(places: &[usize]) -> Option<u16> {
    let mut seen = vec![0_u32; PRIME as usize];
    (places.len() as u32..=PRIME).rev().find_map(|m| {
        let distinct = places.iter().all(|place| {
            let slot = &mut seen[place % m as usize];
            std::mem::replace(slot, m) != m
        });
        distinct.then_some(m as u16)
    })
}

impl Fingerprint {
    /// Of the activations of up to [`TOKENS`] places, `[places * dim]`.
    ///
    /// # Errors
    /// See [`FingerprintError`].
    pub fn of(values: &[f32]) -> Result<Self, FingerprintError> {
        let places = largest(values)?;
        let modulus = modulus(&places).ok_or(FingerprintError::Clash { values: values.len() })?;
        let point = |place: &usize| ((place % usize::from(modulus)) as u16, bf16(values[*place]));
        let points: Vec<(u16, u16)> = places.iter().map(point).collect();
        Ok(Self {
            modulus,
            coefficients: interpolate(&points),
        })
    }

    /// How far it is from these activations, of the same places.
    ///
    /// # Errors
    /// See [`FingerprintError`].
    pub fn distance(&self, values: &[f32]) -> Result<Distance, FingerprintError> {
        let places = largest(values)?;
        let mut near: Vec<u16> = Vec::with_capacity(places.len());
        for place in &places {
            let claimed = evaluate(&self.coefficients, (place % usize::from(self.modulus)) as u16);
            let own = bf16(values[*place]);
            let apart = (claimed & 0x7fff).abs_diff(own & 0x7fff);
            if claimed & 0x8000 == own & 0x8000 && apart < OCTAVE {
                near.push(apart);
            }
        }
        near.sort_unstable();
        let middle = near.get(near.len() / 2).copied().unwrap_or(OCTAVE);
        let sum: f64 = near.iter().map(|&apart| f64::from(apart)).sum();
        Ok(Distance {
            compared: places.len(),
            exponents: places.len() - near.len(),
            mean: if near.is_empty() {
                f64::from(OCTAVE)
            } else {
                sum / near.len() as f64
            },
            median: f64::from(middle),
        })
    }

    /// Values that it holds.
    pub(super) fn len(&self) -> usize {
        self.coefficients.len()
    }

    pub(super) fn write(&self, out: &mut Writer) {
        out.u16(self.modulus);
        for &coefficient in &self.coefficients {
            out.u16(coefficient);
        }
    }

    /// One of `values` values.
    pub(super) fn read(bytes: &mut Reader<'_>, values: usize) -> Result<Self, ProofError> {
        let modulus = bytes.u16("a fingerprint's modulus")?;
        if !(values as u32..=PRIME).contains(&u32::from(modulus)) {
            let expected = format!("{values} to {PRIME}");
            return Err(ProofError::value("a fingerprint's modulus", expected, modulus));
        }
        let (twos, _) = bytes.take(2 * values, "a fingerprint's coefficients")?.as_chunks::<2>();
        let coefficients: Vec<u16> = twos.iter().map(|two| u16::from_le_bytes(*two)).collect();
        if let Some(found) = coefficients.iter().find(|&&found| u32::from(found) >= PRIME) {
            let expected = format!("below {PRIME}");
            return Err(ProofError::value("a fingerprint's coefficient", expected, found));
        }
        Ok(Self { modulus, coefficients })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Values with a heavy tail, the same for the same salt.
    fn activations(salt: u64, count: usize) -> Vec<f32> {
        let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next() * 8.0 * next().abs()).collect()
    }

    #[test]
    fn the_same_activations_have_no_distance() {
        // Fewer than are kept, a small model's, and more places than the prime.
        for count in [1, 100, 128, 4096, 300_000] {
            let values = activations(count as u64, count);
            let found = Fingerprint::of(&values).unwrap();
            let expected = Distance {
                compared: count.min(TOP),
                exponents: 0,
                mean: 0.0,
                median: 0.0,
            };
            assert_eq!(found.distance(&values).unwrap(), expected, "{count}");
            let mut bytes = Writer::default();
            found.write(&mut bytes);
            assert_eq!(bytes.into_bytes().len(), 2 + 2 * count.min(TOP));
        }
    }

    #[test]
    fn the_distance_grows_with_the_difference() {
        let values = activations(1, 4096);
        let print = Fingerprint::of(&values).unwrap();
        let off = |by: f32| {
            let other: Vec<f32> = values
                .iter()
                .zip(activations(2, 4096))
                .map(|(a, b)| a * (1.0 + by * b))
                .collect();
            print.distance(&other).unwrap()
        };
        let (rounding, bits, percent) = (off(1e-6), off(1e-3), off(1e-2));
        assert!(rounding.mean < 0.02 && rounding.exponents == 0, "{rounding:?}");
        assert!(
            bits.mean > 0.05 && percent.mean > 5.0 * bits.mean,
            "{bits:?} {percent:?}"
        );
        let other = print.distance(&activations(3, 4096)).unwrap();
        assert!(other.exponents > 110, "{other:?}");
    }

    #[test]
    fn just_below_and_just_above_a_power_of_two_are_near() {
        let print = Fingerprint::of(&[1.999, 0.5, -4.0]).unwrap();
        let found = print.distance(&[1.98, 0.5, -4.0]).unwrap();
        assert_eq!((found.exponents, found.median), (0, 0.0));
        assert!((found.mean - 1.0).abs() < 0.5, "{found:?}");
        assert_eq!(print.distance(&[1.999, 0.5, 4.0]).unwrap().exponents, 1);
        assert_eq!(print.distance(&[1.999, 1.1, -4.0]).unwrap().exponents, 1);
    }

    #[test]
    fn rounding_to_bfloat16_is_to_nearest_even_and_never_infinite() {
        let cases = [
            (1.0, 0x3f80),
            (-2.0, 0xc000),
            (1.003_906_2, 0x3f80),
            (1.011_718_8, 0x3f82),
            (f32::MAX, LARGEST),
        ];
        for (value, expected) in cases {
            assert_eq!(bf16(value), expected, "{value}");
        }
    }

    #[test]
    fn what_is_no_number_has_no_fingerprint() {
        assert_eq!(Fingerprint::of(&[]), Err(FingerprintError::Empty));
        assert_eq!(
            Fingerprint::of(&[1.0, f32::NAN]),
            Err(FingerprintError::NonFinite { index: 1 })
        );
        let print = Fingerprint::of(&[1.0]).unwrap();
        assert!(print.distance(&[f32::INFINITY]).is_err());
    }

    #[test]
    fn a_fingerprint_out_of_bounds_is_refused() {
        let read = |values: usize, numbers: &[u16]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            Fingerprint::read(&mut Reader::new(&bytes), values)
        };
        assert!(read(2, &[2, 0, 65_520]).is_ok());
        for (values, numbers) in [
            (2, &[1, 0, 0][..]),
            (2, &[65_522, 0, 0]),
            (2, &[9, 0, 65_521]),
            (2, &[9, 0]),
            (1, &[]),
        ] {
            assert!(read(values, numbers).is_err(), "{numbers:?}");
        }
    }
}
