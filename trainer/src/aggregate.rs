//! The contributions of one round, summed as integers: the same bits in any order, on any hardware and any number of threads.
//!
//! 1. Where a codec has a scale for each chunk, scales above twice the *median* of that chunk's count as twice the median
//!    ([`Codec::caps`]). Every contribution has a *norm*: the integer square root of its exact squared norm, in units of `2^-32`.
//! 2. Norms above the *median* are clipped to it by a factor `floor(median * 2^32 / norm) / 2^32`. The median is taken over
//!    contributions that count and say something, by weight, the lower of two: whatever less than half of the weight sends,
//!    it lies within the norms of the rest, and splitting into many small members moves nothing.
//! 3. *Weights* are the counted tokens, all shifted right by one agreed amount if the largest has too many bits
//!    ([`check_bits`]), never to less than 1.
//! 4. Each value (of a sparse contribution, each scale code) becomes one integer, `floor(value * factor * weight)` in units of
//!    `2^-32`, and is added to its parameter's sum, with its sign.
//! 5. [`apply`](crate::apply) divides by the *total* weight, never by the number that sent an index: that would give one
//!    attacker the leverage of all.
//!
//! What a stranger may send and what then happens:
//!
//! | contributions | result |
//! |---|---|
//! | none, or all with 0 tokens | all sums zero, total weight 0; nothing moves |
//! | one with 0 tokens | decoded strictly, weighs nothing, has no say in the median |
//! | one all zero | dilutes by its weight (it claims to have worked), has no say in the median, so that many of them cannot pull it to zero |
//! | all zero | all sums zero |
//! | one giant | clipped to the median, so it moves the model no further than its weight's share of an ordinary one |
//! | one alone | it is its own median: not clipped |
//! | tokens near 2^64 | shifted into the bits that are free; others keep at least 1 |
//! | bytes that do not decode | an error that names the contribution; no update |

mod agreement;

use std::ops::Range;

use crate::compress::codec::{CLIP_BITS, Caps};
use crate::compress::parallel::{available_threads, run, split};
use crate::compress::quantize::VALUE_BITS;
use crate::compress::{Codec, DecodeError, resize};

/// Bits that a sum may use: one for the sign and one to spare are left of 64.
pub const SUM_BITS: u32 = 62;

/// Weights keep at least this many bits, or peers could no longer be told apart by their work.
pub const MIN_WEIGHT_BITS: u32 = 8;

/// One peer's contribution.
#[derive(Debug)]
pub struct Weighted<'a, S: AsRef<[u8]>> {
    /// Tokens counted for it in this round.
    pub tokens: u64,
    /// Its bytes.
    pub shards: &'a [S],
}

impl<S: AsRef<[u8]>> Clone for Weighted<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: AsRef<[u8]>> Copy for Weighted<'_, S> {}

/// Contributions that cannot be summed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AggregateError {
    /// One does not decode.
    #[error("contribution {contribution}: {source}")]
    Decode {
        /// Its place in the input.
        contribution: usize,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// So many peers that no bits are left for their weights.
    #[error("{peers} peers leave {found} bits for a weight, at least {expected} are needed")]
    TooManyPeers {
        /// Peers asked for.
        peers: usize,
        /// [`MIN_WEIGHT_BITS`].
        expected: u32,
        /// Bits left.
        found: u32,
    },
}

/// How the 62 bits of a sum are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitBudget {
    /// Bits of a decoded value.
    pub value: u32,
    /// Bits of a weight.
    pub weight: u32,
    /// Bits for adding up peers.
    pub peers: u32,
    /// How far tokens are shifted right to become weights: 0 means that weights are tokens exactly.
    pub shift: u32,
}

/// Shares out the bits for `peers` contributions of at most `max_tokens` tokens each. Called when a run is created, and by
/// [`aggregate`] with what a round really holds.
///
/// # Errors
/// More peers than leave [`MIN_WEIGHT_BITS`] for a weight: above 2^18.
pub fn check_bits(peers: usize, max_tokens: u64) -> Result<BitBudget, AggregateError> {
    let peer_bits = peers.max(1).next_power_of_two().ilog2();
    let weight = SUM_BITS.saturating_sub(VALUE_BITS + peer_bits);
    if weight < MIN_WEIGHT_BITS {
        return Err(AggregateError::TooManyPeers {
            peers,
            expected: MIN_WEIGHT_BITS,
            found: weight,
        });
    }
    let token_bits = u64::BITS - max_tokens.leading_zeros();
    Ok(BitBudget {
        value: VALUE_BITS,
        weight,
        peers: peer_bits,
        shift: token_bits.saturating_sub(weight),
    })
}

/// How contributions are held to one another before they are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Not at all: the plain weighted mean, which one liar can drive anywhere. For comparison.
    Mean,
    /// Norms are clipped to their median, as the module says.
    MedianNorm,
    /// The same, and contributions that point away from the rest do not count, see `aggregate::agreement`.
    #[default]
    Agreement,
}

impl Rule {
    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "plain mean",
            Self::MedianNorm => "median norm",
            Self::Agreement => "median norm and agreement",
        }
    }
}

/// How one contribution was weighed, for logs and pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its weight in the sum.
    pub weight: u64,
    /// Its norm in units of `2^-32`, rounded down; with scales above the caps cut to them.
    pub norm: u64,
    /// What it was scaled by, in units of `2^-32`: `2^32` is not clipped.
    pub clip: u64,
}

/// The sum of a round: what every peer applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    sums: Vec<i64>,
    total_weight: u64,
    shares: Vec<Share>,
}

impl Update {
    /// Weighted sum for each parameter, in units of `2^-32`: below 2^62 in magnitude.
    #[must_use]
    pub fn sums(&self) -> &[i64] {
        &self.sums
    }

    /// The sums, to be used as a buffer by [`aggregate_into`].
    #[must_use]
    pub fn into_sums(self) -> Vec<i64> {
        self.sums
    }

    /// What sums are divided by: the weight of all contributions. Zero if none counts.
    #[must_use]
    pub fn total_weight(&self) -> u64 {
        self.total_weight
    }

    /// How each contribution was weighed, in the order given.
    #[must_use]
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }
}

/// Sums contributions on all cores. See the module for what the sum is.
///
/// # Errors
/// A contribution that does not decode strictly, or too many of them.
pub fn aggregate<C: Codec, S: AsRef<[u8]> + Sync>(
    codec: &C,
    contributions: &[Weighted<'_, S>],
) -> Result<Update, AggregateError> {
    aggregate_with(codec, contributions, available_threads())
}

/// [`aggregate`] on at most `threads` threads; the result is the same for any number.
///
/// # Errors
/// As [`aggregate`].
pub fn aggregate_with<C: Codec, S: AsRef<[u8]> + Sync>(
    codec: &C,
    contributions: &[Weighted<'_, S>],
    threads: usize,
) -> Result<Update, AggregateError> {
    aggregate_into(codec, contributions, threads, Vec::new())
}

/// [`aggregate_with`] that sums into the buffer of an earlier update ([`Update::into_sums`]), whatever it holds: for large
/// models, getting fresh memory from the system takes longer than summing.
///
/// # Errors
/// As [`aggregate`].
pub fn aggregate_into<C: Codec, S: AsRef<[u8]> + Sync>(
    codec: &C,
    contributions: &[Weighted<'_, S>],
    threads: usize,
    sums: Vec<i64>,
) -> Result<Update, AggregateError> {
    aggregate_by(codec, contributions, Rule::MedianNorm, threads, sums)
}

/// [`aggregate_into`] by any rule; that one holds norms to their median alone.
///
/// # Errors
/// As [`aggregate`].
pub fn aggregate_by<C: Codec, S: AsRef<[u8]> + Sync>(
    codec: &C,
    contributions: &[Weighted<'_, S>],
    rule: Rule,
    threads: usize,
    mut sums: Vec<i64>,
) -> Result<Update, AggregateError> {
    let blocks = split_all(codec, contributions)?;
    let weights = weights(contributions)?;
    let caps = match rule {
        Rule::Mean => Caps::default(),
        Rule::MedianNorm | Rule::Agreement => codec
            .caps(&blocks, &weights)
            .map_err(|(contribution, source)| AggregateError::Decode { contribution, source })?,
    };
    let round = Round {
        codec,
        blocks: &blocks,
        caps: &caps,
        threads,
    };
    let mut shares = round.shares(&weights)?;
    if rule != Rule::Mean {
        clip_to_median(&mut shares);
    }
    round.sum(&shares, &mut sums)?;
    if rule == Rule::Agreement {
        agreement::keep_agreeing(&round, &mut shares, &mut sums)?;
    }
    let total_weight = shares.iter().map(|share| share.weight).sum();
    Ok(Update {
        sums,
        total_weight,
        shares,
    })
}

/// The contributions of a round, cut into blocks, and what they are held to.
struct Round<'a, C: Codec> {
    codec: &'a C,
    blocks: &'a [Vec<&'a [u8]>],
    caps: &'a Caps,
    threads: usize,
}

impl<C: Codec> Round<'_, C> {
    /// Norms beside the weights; nothing is clipped yet.
    fn shares(&self, weights: &[u64]) -> Result<Vec<Share>, AggregateError> {
        let share = |(contribution, (weight, blocks)): (usize, (&u64, &Vec<&[u8]>))| {
            let squared = self.codec.norm_squared(blocks, self.caps);
            let squared = squared.map_err(|source| AggregateError::Decode { contribution, source })?;
            Ok(Share {
                weight: *weight,
                // Rounded down, in units of 2^-32: fewer than 2^41 values below 2^36.
                norm: squared.isqrt() as u64,
                clip: 1 << CLIP_BITS,
            })
        };
        weights.iter().zip(self.blocks).enumerate().map(share).collect()
    }

    /// Sums all contributions by their shares, whatever `sums` held before.
    fn sum(&self, shares: &[Share], sums: &mut Vec<i64>) -> Result<(), AggregateError> {
        let factors: Vec<C::Factor> = shares
            .iter()
            .map(|share| self.codec.factor(share.clip, share.weight))
            .collect();
        resize(sums, self.codec.params());
        let mut rest = &mut sums[..];
        let mut jobs = Vec::new();
        for range in split(self.codec.blocks(), self.threads) {
            let part;
            (part, rest) = rest.split_at_mut(self.codec.blocks_params(range.clone()).len());
            let factors = &factors;
            jobs.push(move || self.add_blocks(range, factors, part));
        }
        // Of several errors the one in the first range is told, whoever found it first.
        run(jobs).into_iter().collect()
    }

    /// Adds a range of blocks of all contributions to their sums, block by block, so that the sums of one stay in the cache.
    fn add_blocks(
        &self,
        range: Range<usize>,
        factors: &[C::Factor],
        mut sums: &mut [i64],
    ) -> Result<(), AggregateError> {
        let mut reader = self.codec.reader();
        for block in range {
            let part;
            (part, sums) = sums.split_at_mut(self.codec.blocks_params(block..block + 1).len());
            part.fill(0);
            for (contribution, (blocks, factor)) in self.blocks.iter().zip(factors).enumerate() {
                self.codec
                    .add(&mut reader, block, blocks[block], factor, self.caps, part)
                    .map_err(|source| AggregateError::Decode { contribution, source })?;
            }
        }
        Ok(())
    }
}

/// The blocks of every contribution.
fn split_all<'a, C: Codec, S: AsRef<[u8]>>(
    codec: &C,
    contributions: &[Weighted<'a, S>],
) -> Result<Vec<Vec<&'a [u8]>>, AggregateError> {
    let split = |(contribution, weighted): (usize, &Weighted<'a, S>)| {
        codec
            .split(weighted.shards)
            .map_err(|source| AggregateError::Decode { contribution, source })
    };
    contributions.iter().enumerate().map(split).collect()
}

/// Weights, from tokens.
fn weights<S: AsRef<[u8]>>(contributions: &[Weighted<'_, S>]) -> Result<Vec<u64>, AggregateError> {
    let tokens = || contributions.iter().map(|weighted| weighted.tokens);
    let bits = check_bits(contributions.len(), tokens().max().unwrap_or(0))?;
    Ok(tokens()
        .map(|tokens| (tokens >> bits.shift).max(tokens.min(1)))
        .collect())
}

/// Clips the norms above the median to it.
fn clip_to_median(shares: &mut [Share]) {
    let median = median_norm(shares);
    for share in shares.iter_mut().filter(|share| share.norm > median) {
        // Below 2^32, for the norm is larger than the median.
        share.clip = ((u128::from(median) << CLIP_BITS) / u128::from(share.norm)) as u64;
    }
}

/// The lower weighted median of the norms that are not zero and have a weight; zero if there is none, and then no norm that
/// counts is above it.
fn median_norm(shares: &[Share]) -> u64 {
    let mut voices: Vec<&Share> = shares
        .iter()
        .filter(|share| share.norm > 0 && share.weight > 0)
        .collect();
    voices.sort_unstable_by_key(|share| share.norm);
    let total: u128 = voices.iter().map(|share| u128::from(share.weight)).sum();
    let mut below = 0;
    for share in voices {
        below += u128::from(share.weight);
        if 2 * below >= total {
            return share.norm;
        }
    }
    0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_value_weight_and_peers_are_62_together() {
        for peers in [1, 2, 3, 4, 5, 128, 129, 1 << 18] {
            let bits = check_bits(peers, u64::MAX).unwrap();
            assert_eq!(bits.value + bits.weight + bits.peers, SUM_BITS);
            assert!(1 << bits.peers >= peers);
            assert_eq!(bits.shift, 64 - bits.weight);
        }
        assert_eq!(
            check_bits(4, 60_000).unwrap().shift,
            0,
            "the demo's weights are its tokens"
        );
        let error = AggregateError::TooManyPeers {
            peers: (1 << 18) + 1,
            expected: MIN_WEIGHT_BITS,
            found: 7,
        };
        assert_eq!(check_bits((1 << 18) + 1, 1), Err(error));
        assert!(check_bits(usize::MAX / 2, 1).is_err());
    }

    #[test]
    fn the_median_goes_by_weight_and_ignores_the_silent() {
        let share = |weight, norm| Share {
            weight,
            norm,
            clip: 1 << CLIP_BITS,
        };
        assert_eq!(median_norm(&[]), 0);
        assert_eq!(median_norm(&[share(5, 0), share(0, 9)]), 0);
        assert_eq!(median_norm(&[share(1, 7), share(1, 3)]), 3, "the lower of two");
        assert_eq!(
            median_norm(&[share(1, 900), share(1, 900), share(1, 900), share(4, 5)]),
            5,
            "sybils weigh no more"
        );
        assert_eq!(median_norm(&[share(9, 0), share(1, 4), share(1, 6), share(1, 8)]), 6);
    }
}
