//! The numbers of a challenge, and its products in plain whole numbers: slow, and the definition.

use trainer::config::Precision;

use super::Challenge;

/// What the numbers are taken by, and how large the factor's are; see [`trainer::products`] for why.
pub(super) struct Numbers {
    pub(super) modulus: i32,
    /// The factor's numbers lie within `-most..=most`.
    most: i32,
    rounds: bool,
}

impl Numbers {
    pub(super) fn of(precision: Precision) -> Self {
        match precision {
            // 4095 * 1 * 4096 < 2^24: twelve bits, which no smaller format has.
            Precision::Fp32 | Precision::Tf32 => Self {
                modulus: 8191,
                most: 1,
                rounds: false,
            },
            // 254 * 2 * 4096 < 2^24: eight bits and a sign, which a byte has not.
            Precision::Bf16 => Self {
                modulus: 509,
                most: 2,
                rounds: true,
            },
        }
    }

    pub(super) fn half(&self) -> i32 {
        (self.modulus - 1) / 2
    }

    /// The remainder nearest to zero.
    pub(super) fn reduce(&self, value: i64) -> i16 {
        let (m, half) = (i64::from(self.modulus), i64::from(self.half()));
        ((value + half).rem_euclid(m) - half) as i16
    }

    /// A row times the factor, as the device gives it.
    pub(super) fn times(&self, row: &[i16], factor: &[i8]) -> Vec<i16> {
        let side = row.len();
        let mut sums = vec![0_i32; side];
        // Every sum is below 2^24.
        for (&x, factors) in row.iter().zip(factor.chunks(side)) {
            for (sum, &b) in sums.iter_mut().zip(factors) {
                *sum += i32::from(x) * i32::from(b);
            }
        }
        let value = |sum: i32| if self.rounds { to_bf16(sum) } else { sum };
        sums.into_iter().map(|sum| self.reduce(i64::from(value(sum)))).collect()
    }
}

/// A whole number below 2^24 rounded to bfloat16, to nearest even.
fn to_bf16(sum: i32) -> i32 {
    let bits = (sum as f32).to_bits();
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    f32::from_bits(rounded) as i32
}

fn stream(challenge: &Challenge, what: u8, chain: usize, row: usize) -> blake3::OutputReader {
    let mut hasher = blake3::Hasher::new_keyed(&challenge.key);
    hasher.update(&[what, chain as u8]).update(&(row as u32).to_le_bytes());
    hasher.finalize_xof()
}

/// A row that a chain begins with.
pub(super) fn first_row(challenge: &Challenge, chain: usize, row: usize) -> Vec<i16> {
    let numbers = Numbers::of(challenge.precision);
    let mut bytes = vec![0; 4 * challenge.chains[chain].side];
    stream(challenge, 0, chain, row).fill(&mut bytes);
    let (fours, _) = bytes.as_chunks::<4>();
    // The bias of the remainder is below one in 500,000: of no use to anyone.
    let number =
        |four: &[u8; 4]| (i64::from(u32::from_le_bytes(*four)) % i64::from(numbers.modulus)) as i32 - numbers.half();
    fours.iter().map(|four| number(four) as i16).collect()
}

/// The factor of a chain, by rows.
pub(super) fn factor(challenge: &Challenge, chain: usize) -> Vec<i8> {
    let rows = 0..challenge.chains[chain].side;
    rows.flat_map(|row| factor_row(challenge, chain, row)).collect()
}

/// A row of the factor.
pub(super) fn factor_row(challenge: &Challenge, chain: usize, row: usize) -> Vec<i8> {
    let most = Numbers::of(challenge.precision).most;
    let mut bytes = vec![0; challenge.chains[chain].side];
    stream(challenge, 1, chain, row).fill(&mut bytes);
    let width = (2 * most + 1) as u8;
    bytes
        .into_iter()
        .map(|byte| (byte % width) as i8 - most as i8)
        .collect()
}
