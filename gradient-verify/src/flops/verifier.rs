//! Checking an answer: from two seeds, 32 bytes and an opening, without a tensor.

use coordinatorless::types::Hash;
use trainer::config::Precision;

use super::opening::{End, Opened, OpeningError, read};
use super::work::{Numbers, factor, first_row};
use super::{Challenge, Draw, ROWS, leaf};
use crate::tree;

/// Random vectors of Freivalds' test: each lets a wrong row pass once in 8191.
const VECTORS: usize = 2;

/// Why an answer is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlopsError {
    /// The bytes are no opening.
    #[error(transparent)]
    Opening(#[from] OpeningError),
    /// Rows that are not those committed to.
    #[error("draw {draw}: the rows {end} product {product} of side {side} are not those of the commitment")]
    Path {
        /// Which draw, from 0.
        draw: usize,
        /// `before` or `after`.
        end: &'static str,
        /// The link's last product, from 1.
        product: usize,
        /// The matrices' side.
        side: usize,
    },
    /// Rows that do not follow from those before.
    #[error("draw {draw}: row {row} after product {product} of side {side} is not what the rows before it give")]
    Product {
        /// Which draw, from 0.
        draw: usize,
        /// Which row of the whole matrix.
        row: usize,
        /// The link's last product, from 1.
        product: usize,
        /// The matrices' side.
        side: usize,
    },
}

/// Whether `opening` shows that all of `challenge` was computed, as `root` says; the blocks are drawn by the later `seed`. Gives the operations done.
///
/// # Errors
/// See [`FlopsError`].
pub fn verify(
    challenge: &Challenge,
    root: &Hash,
    seed: &[u8; 32],
    samples: usize,
    opening: &[u8],
) -> Result<u128, FlopsError> {
    let draws = challenge.draws(root, seed, samples);
    let opened = read(challenge, &draws, opening)?;
    let check = |chain: usize| {
        let test = Chain::new(challenge, chain, root, seed);
        let of_chain = draws
            .iter()
            .zip(&opened)
            .enumerate()
            .filter(|(_, (draw, _))| draw.chain == chain);
        for (number, (draw, opened)) in of_chain {
            test.check(number, draw, opened, root)?;
        }
        Ok::<(), FlopsError>(())
    };
    let asked = |chain: &usize| draws.iter().any(|draw| draw.chain == *chain);
    (0..challenge.chains().len()).filter(asked).try_for_each(check)?;
    Ok(challenge.flops())
}

/// One chain: its factor, and random vectors that went through it.
struct Chain<'a> {
    challenge: &'a Challenge,
    number: usize,
    numbers: Numbers,
    factor: Vec<i8>,
    /// `r` and `b^depth r`, mod m; none where sums are rounded.
    vectors: Vec<(Vec<i16>, Vec<i16>)>,
}

impl<'a> Chain<'a> {
    fn new(challenge: &'a Challenge, number: usize, root: &Hash, seed: &[u8; 32]) -> Self {
        let numbers = Numbers::of(challenge.precision());
        let factor = factor(challenge, number);
        let spec = &challenge.chains()[number];
        let count = if challenge.precision() == Precision::Bf16 {
            0
        } else {
            VECTORS
        };
        let vector = |which: usize| {
            // Not known before the root is fixed, as the draws.
            let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/flops-freivalds");
            hasher
                .update(&challenge.key)
                .update(&root.0)
                .update(seed)
                .update(&[number as u8, which as u8]);
            let mut bytes = vec![0; 4 * spec.side];
            hasher.finalize_xof().fill(&mut bytes);
            let value = |four: &[u8; 4]| numbers.reduce(i64::from(u32::from_le_bytes(*four)));
            let r: Vec<i16> = bytes.as_chunks::<4>().0.iter().map(value).collect();
            let through = (0..spec.depth).fold(r.clone(), |r, _| {
                factor
                    .chunks(spec.side)
                    .map(|row| dot_factor(&numbers, row, &r))
                    .collect()
            });
            (r, through)
        };
        Self {
            challenge,
            number,
            vectors: (0..count).map(vector).collect(),
            numbers,
            factor,
        }
    }

    fn check(&self, number: usize, draw: &Draw, opened: &Opened, root: &Hash) -> Result<(), FlopsError> {
        let spec = &self.challenge.chains()[self.number];
        let (side, product) = (spec.side, (draw.link + 1) * spec.depth);
        let held = |end: &End, link: usize, which: &'static str| {
            let index = self.challenge.leaf_index(draw.chain, link, draw.block);
            let leaf = leaf(index, &end.rows);
            match tree::root_of(leaf, self.challenge.leaves(), index, &end.path) == Some(*root) {
                true => Ok(()),
                false => Err(FlopsError::Path {
                    draw: number,
                    end: which,
                    product,
                    side,
                }),
            }
        };
        held(&opened.after, draw.link, "after")?;
        let before = match (&opened.before, draw.link.checked_sub(1)) {
            (Some(end), Some(link)) => {
                held(end, link, "before")?;
                end.rows.clone()
            }
            _ => {
                let rows = draw.block * ROWS..(draw.block + 1) * ROWS;
                rows.flat_map(|row| first_row(self.challenge, self.number, row))
                    .collect()
            }
        };
        for (place, (before, after)) in before.chunks(side).zip(opened.after.rows.chunks(side)).enumerate() {
            let again = || (0..spec.depth).fold(before.to_vec(), |row, _| self.numbers.times(&row, &self.factor));
            let holds = self
                .vectors
                .iter()
                .all(|(r, through)| dot(&self.numbers, after, r) == dot(&self.numbers, before, through))
                && (place != draw.row || again() == after);
            if !holds {
                return Err(FlopsError::Product {
                    draw: number,
                    row: draw.block * ROWS + place,
                    product,
                    side,
                });
            }
        }
        Ok(())
    }
}

/// The inner product mod m.
fn dot(numbers: &Numbers, a: &[i16], b: &[i16]) -> i16 {
    numbers.reduce(a.iter().zip(b).map(|(a, b)| i64::from(*a) * i64::from(*b)).sum())
}

/// The same with a row of the factor.
fn dot_factor(numbers: &Numbers, a: &[i8], b: &[i16]) -> i16 {
    // At most 4096 terms of 4095: below 2^24.
    let sum: i32 = a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
    numbers.reduce(i64::from(sum))
}
