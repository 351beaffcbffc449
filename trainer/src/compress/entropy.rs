//! Bits in and out, the Rice code for gaps, and the entropy that it is measured against.
//!
//! A Rice code with parameter `p` writes a gap `g` as `g >> p` zeros, a one, and the low `p` bits of `g` (Rice and Plaunt
//! 1971; Golomb 1966 for geometric gaps, which is what k positions drawn at random leave). At 64 of 4096 it takes 7.50 bits
//! an index where the entropy `log2 C(4096, 64) / 64` is 7.36.
//!
//! Bits fill each byte from the lowest up. The reader works on eight bytes at a time and never reads past its slice: beyond
//! the end it sees zeros, and `BitReader::finish` tells.

/// How many parameters a block may choose from; few, so that a decoder can hold the author to the best one.
const CANDIDATES: usize = 4;

/// Bits that a [`BitReader::peek`] always delivers: 64 less the 7 that may lie before the position.
const PEEK_BITS: u32 = 57;

/// The Rice parameters allowed for one geometry, and the cost of each over the gaps seen so far.
#[derive(Clone, Debug)]
pub(crate) struct RiceCosts {
    lowest: u32,
    /// Sum of the quotients `gap >> p` for each candidate.
    quotients: [u64; CANDIDATES],
    gaps: u64,
}

impl RiceCosts {
    /// Nothing seen yet; candidates lie around the best parameter for `k` of `chunk` positions drawn at random.
    pub(crate) fn new(chunk: usize, k: usize) -> Self {
        Self {
            lowest: usual_parameter(chunk, k).saturating_sub(2),
            quotients: [0; CANDIDATES],
            gaps: 0,
        }
    }

    /// Forgets the gaps seen.
    pub(crate) fn clear(&mut self) {
        (self.quotients, self.gaps) = ([0; CANDIDATES], 0);
    }

    /// Counts the gaps of one chunk.
    pub(crate) fn add(&mut self, gaps: &[u16]) {
        for (candidate, sum) in self.quotients.iter_mut().enumerate() {
            let parameter = self.lowest + candidate as u32;
            // Gaps of one chunk sum to less than its length, so u32 holds them; a checked sum would not be vectorised.
            *sum += u64::from(
                gaps.iter()
                    .fold(0u32, |sum, gap| sum.wrapping_add(u32::from(*gap) >> parameter)),
            );
        }
        self.gaps += gaps.len() as u64;
    }

    /// The parameter with the fewest bits, the smallest among equals: there is one right answer, which a decoder checks.
    pub(crate) fn best(&self) -> u32 {
        let cost = |candidate: &usize| self.quotients[*candidate] + *candidate as u64 * self.gaps;
        self.lowest + (0..CANDIDATES).min_by_key(cost).unwrap_or(0) as u32
    }
}

/// Upper bound on the bits of the gaps of one chunk when the best candidate is taken: what no parameter chosen by
/// [`RiceCosts::best`] can exceed, whatever the positions.
pub(crate) fn max_gap_bits(chunk: usize, k: usize) -> u64 {
    let lowest = usual_parameter(chunk, k).saturating_sub(2);
    let bits = |parameter: u32| k as u64 * u64::from(parameter + 1) + ((chunk - k) as u64 >> parameter);
    (lowest..lowest + CANDIDATES as u32).map(bits).min().unwrap_or(u64::MAX)
}

/// `floor(log2(mean gap * ln 2))`: within one of the best parameter for gaps of random positions.
fn usual_parameter(chunk: usize, k: usize) -> u32 {
    (chunk as u64 * 177 / 256 / k as u64).max(1).ilog2()
}

/// Appends bits to a byte vector.
pub(crate) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    word: u64,
    fill: u32, // bits of `word` in use, below 64
}

impl<'a> BitWriter<'a> {
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, word: 0, fill: 0 }
    }

    /// Appends the low `count` bits (1 to 64) of `bits`; the others must be zero.
    #[inline]
    pub(crate) fn push(&mut self, bits: u64, count: u32) {
        debug_assert!((1..=64).contains(&count) && (count == 64 || bits >> count == 0));
        self.word |= bits << self.fill;
        let fill = self.fill + count;
        if fill < 64 {
            self.fill = fill;
            return;
        }
        self.out.extend_from_slice(&self.word.to_le_bytes());
        let written = 64 - self.fill;
        self.word = if written < 64 { bits >> written } else { 0 };
        self.fill = fill - 64;
    }

    /// Appends one gap.
    #[inline]
    pub(crate) fn push_gap(&mut self, gap: u16, parameter: u32) {
        let quotient = u32::from(gap) >> parameter;
        let low = u64::from(gap) & ((1 << parameter) - 1);
        if quotient + 1 + parameter <= 64 {
            return self.push((1 | low << 1) << quotient, quotient + 1 + parameter);
        }
        for _ in 0..quotient / 64 {
            self.push(0, 64);
        }
        let rest = quotient % 64;
        self.push(1 << rest, rest + 1);
        if parameter > 0 {
            self.push(low, parameter);
        }
    }

    /// Writes the last bits, padded with zeros to a whole byte.
    pub(crate) fn finish(self) {
        let bytes = self.fill.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.word.to_le_bytes()[..bytes]);
    }
}

/// Why a bit stream did not end where it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadEnd {
    /// More bits were read than there are.
    Short,
    /// Whole bytes are left over.
    Long,
    /// The bits that pad the last byte are not zero.
    Padding,
}

/// Reads bits from a slice.
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize, // in bits
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The bits from here on: at least [`PEEK_BITS`] of them, zeros beyond the end.
    #[inline]
    fn peek(&self) -> u64 {
        let byte = self.at / 8;
        let word = match self.bytes.get(byte..).and_then(<[u8]>::first_chunk::<8>) {
            Some(word) => u64::from_le_bytes(*word),
            None => self.peek_end(byte),
        };
        word >> (self.at % 8)
    }

    #[cold]
    fn peek_end(&self, byte: usize) -> u64 {
        let mut word = [0; 8];
        let rest = self.bytes.get(byte..).unwrap_or_default();
        word[..rest.len()].copy_from_slice(rest);
        u64::from_le_bytes(word)
    }

    /// One gap; nothing if the stream ends within its run of zeros.
    #[inline]
    pub(crate) fn gap(&mut self, parameter: u32) -> Option<u64> {
        let word = self.peek();
        let quotient = word.trailing_zeros();
        if quotient + 1 + parameter > PEEK_BITS {
            return self.long_gap(parameter);
        }
        self.at += (quotient + 1 + parameter) as usize;
        Some(u64::from(quotient) << parameter | (word >> quotient >> 1) & ((1 << parameter) - 1))
    }

    #[cold]
    fn long_gap(&mut self, parameter: u32) -> Option<u64> {
        let mut quotient = 0u64;
        loop {
            let zeros = (self.peek() as u32).trailing_zeros();
            quotient += u64::from(zeros);
            self.at += zeros as usize;
            if zeros < 32 {
                break;
            }
            if self.at >= self.bytes.len() * 8 {
                return None;
            }
        }
        self.at += 1;
        Some(quotient << parameter | self.take(parameter))
    }

    /// The next `count` bits, at most 64.
    #[inline]
    pub(crate) fn take(&mut self, count: u32) -> u64 {
        if count > 32 {
            let low = self.take(32);
            return low | self.take(count - 32) << 32;
        }
        let bits = self.peek() & ((1 << count) - 1);
        self.at += count as usize;
        bits
    }

    /// Says whether the stream was read to its very end and padded with zeros.
    pub(crate) fn finish(self) -> Result<(), BadEnd> {
        let bits = self.bytes.len() * 8;
        match self.at {
            at if at > bits => Err(BadEnd::Short),
            at if at + 8 <= bits => Err(BadEnd::Long),
            at if at < bits && self.bytes[at / 8] >> (at % 8) != 0 => Err(BadEnd::Padding),
            _ => Ok(()),
        }
    }
}

/// `log2 C(n, k)`: the bits that `k` positions out of `n` take when all sets are equally likely.
#[must_use]
pub fn log2_binomial(n: usize, k: usize) -> f64 {
    (0..k.min(n)).map(|i| ((n - i) as f64 / (k - i) as f64).log2()).sum()
}

/// Shannon entropy of a histogram, in bits a symbol; zero when it is empty.
#[must_use]
pub fn entropy_bits(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let bits = |count: &u64| *count as f64 / total * (total / *count as f64).log2();
    counts.iter().filter(|count| **count > 0).map(bits).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(gaps in prop::collection::vec(any::<u16>(), 1..200), parameter in 0u32..16) {
            let mut bytes = Vec::new();
            let mut writer = BitWriter::new(&mut bytes);
            for gap in &gaps {
                writer.push_gap(*gap, parameter);
                writer.push(u64::from(*gap), 16);
                writer.push(u64::MAX - u64::from(*gap), 64);
            }
            writer.finish();
            let mut reader = BitReader::new(&bytes);
            for gap in &gaps {
                prop_assert_eq!(reader.gap(parameter), Some(u64::from(*gap)));
                prop_assert_eq!(reader.take(16), u64::from(*gap));
                prop_assert_eq!(reader.take(64), u64::MAX - u64::from(*gap));
            }
            prop_assert_eq!(reader.finish(), Ok(()));
        }

        #[test]
        fn any_bytes_can_be_read_as_gaps(bytes in prop::collection::vec(any::<u8>(), 0..64), parameter in 0u32..16) {
            let mut reader = BitReader::new(&bytes);
            let read = (0..600).take_while(|_| reader.gap(parameter).is_some()).count();
            prop_assert!(read <= bytes.len() * 8);
        }
    }

    #[test]
    fn a_stream_must_end_exactly() {
        let read = |bytes: &[u8], count| {
            let mut reader = BitReader::new(bytes);
            reader.take(count);
            reader.finish()
        };
        assert_eq!(read(&[0b0000_0111], 3), Ok(()));
        assert_eq!(read(&[0b0000_1111], 3), Err(BadEnd::Padding));
        assert_eq!(read(&[7, 0], 3), Err(BadEnd::Long));
        assert_eq!(read(&[7], 9), Err(BadEnd::Short));
    }

    #[test]
    fn the_cheapest_parameter_is_chosen_and_the_smaller_of_equals() {
        let mut costs = RiceCosts::new(4096, 64);
        assert_eq!(costs.best(), 3, "nothing to code");
        costs.add(&[63; 64]);
        assert_eq!(costs.best(), 5);
        costs.clear();
        costs.add(&[3; 64]);
        assert_eq!(costs.best(), 3);
    }

    #[test]
    fn binomials_and_entropies_match_known_values() {
        assert!((log2_binomial(4096, 64) / 64.0 - 7.36).abs() < 0.01);
        assert!((log2_binomial(10, 3) - 120f64.log2()).abs() < 1e-12);
        assert_eq!(log2_binomial(5, 5), 0.0);
        assert_eq!(entropy_bits(&[4, 4, 0, 8]), 1.5);
        assert_eq!(entropy_bits(&[0; 3]), 0.0);
    }
}
