//! Contributions that point away from the rest, found without trusting anyone.
//!
//! Norms are clipped already, so the harm of a liar is the direction of what it sends: the opposite of the honest mean undoes as much as one honest
//! worker does. But honest contributions agree: leave one out, and its inner product with the sum of the others is positive (on pseudo-gradients of
//! a small model at k = 64, cosines of .16 to .28, though only a tenth of what a worker sends is sent by another, too). So:
//!
//! 1. All are summed as usual. The *agreement* of a contribution is its inner product with that sum less its own part in it, exact in integers but for the
//!    low bits of the sums.
//! 2. Those whose agreement is negative do not count: neither in the sum nor in the total weight.
//! 3. Unless they have half of the weight or more, or fewer than three contributions say something: then there is no rest to go by, and all count.
//!
//! Votes on single parameters, trimmed means and medians do not suit sparse contributions: nine tenths of what is sent is sent by one worker
//! alone, and would be thrown away. What agrees a little is kept, also from liars ("a little is enough", mimics); they are held to the
//! median norm as before.

use super::{AggregateError, Share};
use crate::compress::Codec;
use crate::compress::codec::{CLIP_BITS, INNER_BITS};
use crate::compress::parallel::{run, split};

/// Fewest contributions that can disagree.
const FEWEST: usize = 3;

/// Sets the weight of contributions that point away from the rest to zero, and says whether there are any. `sums` are those of all.
pub(super) fn keep_agreeing<C: Codec>(
    codec: &C,
    blocks: &[Vec<&[u8]>],
    shares: &mut [Share],
    threads: usize,
    sums: &[i64],
) -> Result<bool, AggregateError> {
    let speaking = |share: &Share| share.norm > 0 && share.weight > 0;
    if shares.iter().filter(|share| speaking(share)).count() < FEWEST {
        return Ok(false);
    }
    let inner = inner(codec, blocks, threads, sums)?;
    let away: Vec<bool> = shares
        .iter()
        .zip(inner)
        .map(|(share, inner)| speaking(share) && inner < own_part(share))
        .collect();
    let weight = |wanted: bool| -> u128 {
        let of = shares.iter().zip(&away).filter(|(_, away)| **away == wanted);
        of.filter(|(share, _)| speaking(share))
            .map(|(share, _)| u128::from(share.weight))
            .sum()
    };
    if weight(true) == 0 || weight(true) >= weight(false) {
        return Ok(false);
    }
    for (share, _) in shares.iter_mut().zip(&away).filter(|(_, away)| **away) {
        share.weight = 0;
    }
    Ok(true)
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

/// The inner product of every contribution with the sums.
fn inner<C: Codec>(
    codec: &C,
    blocks: &[Vec<&[u8]>],
    threads: usize,
    sums: &[i64],
) -> Result<Vec<i128>, AggregateError> {
    let some = |range: std::ops::Range<usize>| {
        let mut reader = codec.reader();
        let mut products = vec![0; blocks.len()];
        for block in range {
            let sums = &sums[codec.blocks_params(block..block + 1)];
            for (contribution, (product, blocks)) in products.iter_mut().zip(blocks).enumerate() {
                *product += codec
                    .inner(&mut reader, block, blocks[block], sums)
                    .map_err(|source| AggregateError::Decode { contribution, source })?;
            }
        }
        Ok(products)
    };
    let jobs = split(codec.blocks(), threads)
        .map(|range| move || some(range))
        .collect();
    let mut all = vec![0; blocks.len()];
    for products in run(jobs) {
        for (all, part) in all.iter_mut().zip(products?) {
            *all += part;
        }
    }
    Ok(all)
}
