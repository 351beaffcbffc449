//! Contributions that point away from the rest, found without trusting anyone.
//!
//! Norms are clipped already, so the harm of a liar is the direction of what it sends: the opposite of the honest mean undoes as much as one honest
//! worker does. But honest contributions agree: leave one out, and its inner product with the sum of the others is positive (on pseudo-gradients of
//! a small model at k = 64, cosines of .16 to .28, though only a tenth of what a worker sends is sent by another, too). So:
//!
//! 1. All are summed as usual. The *agreement* of a contribution is its inner product with that sum less its own part in it, exact in integers but for the
//!    low bits of the sums.
//! 2. If any agreement is negative, the contribution with the lowest, by what it would add to the sum, does not count: neither in the sum nor in the
//!    total weight. Then all is done again without it. One at a time, because a liar who mirrors an honest peer makes that one look bad, too, until
//!    the liar is gone.
//! 3. If half of the weight or more would go this way, or fewer than three contributions say something, there is no rest to go by, and all count.
//!
//! Votes on single parameters, trimmed means and medians do not suit sparse contributions: nine tenths of what is sent is sent by one worker
//! alone, and would be thrown away. What agrees a little is kept, also from liars ("a little is enough", mimics); they are held to the
//! median norm as before.

use std::ops::Range;

use super::{AggregateError, Round, Share};
use crate::compress::Codec;
use crate::compress::codec::{CLIP_BITS, INNER_BITS};
use crate::compress::parallel::{run, split};

/// Fewest contributions that can disagree.
const FEWEST: usize = 3;

/// Sets the weight of contributions that point away from the rest to zero, and sums without them. `sums` are those of all.
pub(super) fn keep_agreeing<C: Codec>(
    round: &Round<'_, C>,
    shares: &mut [Share],
    sums: &mut Vec<i64>,
) -> Result<(), AggregateError> {
    let all = shares.to_vec();
    let speaking = |share: &Share| share.norm > 0 && share.weight > 0;
    let weight = |shares: &[Share]| -> u128 {
        let weights = shares.iter().filter(|share| speaking(share));
        weights.map(|share| u128::from(share.weight)).sum()
    };
    while shares.iter().filter(|share| speaking(share)).count() >= FEWEST {
        let agreements = round.inner(sums)?.into_iter().zip(&*shares).enumerate();
        let lowest = agreements
            .filter(|(_, (_, share))| speaking(share))
            .map(|(place, (inner, share))| (felt(inner - own_part(share), share), place))
            .min_by(|(a, _), (b, _)| a.total_cmp(b));
        let Some((_, place)) = lowest.filter(|(felt, _)| *felt < 0.0) else {
            return Ok(());
        };
        shares[place].weight = 0;
        if 2 * weight(shares) <= weight(&all) {
            shares.copy_from_slice(&all);
            return round.sum(shares, sums);
        }
        round.sum(shares, sums)?;
    }
    Ok(())
}

/// An agreement as the sum feels it: times clip and weight. Only its order counts, and each operation is one that every processor rounds alike.
fn felt(agreement: i128, share: &Share) -> f64 {
    agreement as f64 * (u128::from(share.clip) * u128::from(share.weight)) as f64
}

/// What a contribution's own part in the sums makes of its inner product with them, rounded down: `norm^2 * clip * weight` in the units of
/// [`Codec::inner`]. A norm is below 2^57, clip and weight together below 2^58, so the largest products are divided before they are taken.
fn own_part(share: &Share) -> i128 {
    const HALF: u32 = CLIP_BITS / 2;
    let squared = u128::from(share.norm).pow(2) >> INNER_BITS; // below 2^90
    let factor = (u128::from(share.clip) * u128::from(share.weight)) >> HALF; // below 2^42
    let part = squared
        .checked_mul(factor)
        .map_or((squared >> HALF) * factor, |product| product >> HALF);
    part as i128 // below 2^116
}

impl<C: Codec> Round<'_, C> {
    /// The inner product of every contribution with the sums.
    fn inner(&self, sums: &[i64]) -> Result<Vec<i128>, AggregateError> {
        let jobs = split(self.codec.blocks(), self.threads)
            .map(|range| move || self.inner_of(range, sums))
            .collect();
        let mut all = vec![0; self.blocks.len()];
        for products in run(jobs) {
            for (all, part) in all.iter_mut().zip(products?) {
                *all += part;
            }
        }
        Ok(all)
    }

    /// The same over some blocks.
    fn inner_of(&self, range: Range<usize>, sums: &[i64]) -> Result<Vec<i128>, AggregateError> {
        let mut reader = self.codec.reader();
        let mut products = vec![0; self.blocks.len()];
        for block in range {
            let sums = &sums[self.codec.blocks_params(block..block + 1)];
            for (contribution, (product, blocks)) in products.iter_mut().zip(self.blocks).enumerate() {
                *product += self
                    .codec
                    .inner(&mut reader, block, blocks[block], self.caps, sums)
                    .map_err(|source| AggregateError::Decode { contribution, source })?;
            }
        }
        Ok(products)
    }
}
