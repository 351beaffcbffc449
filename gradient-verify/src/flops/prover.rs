//! Answering a challenge.

use std::collections::BTreeMap;

use coordinatorless::types::Hash;
use trainer::config::Precision;
use trainer::products::Chain;

use super::opening::write_end;
use super::work::{Numbers, factor, first_row};
use super::{Challenge, Draw, ROWS, leaf};
use crate::tree;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The device refused.
    #[error("the products could not be computed: {0}")]
    Device(String),
}

/// All products of a challenge, done; of the numbers only the hashes are kept.
pub struct Answer {
    challenge: Challenge,
    leaves: Vec<Hash>,
    root: Hash,
}

/// Computes the whole challenge on the device that `start` makes chains on: `trainer::products::Chain::new` on one of libtorch's.
///
/// # Errors
/// The device's.
pub fn answer(challenge: &Challenge, start: &Start<'_>) -> Result<Answer, AnswerError> {
    let mut leaves = Vec::with_capacity(challenge.leaves());
    for (number, spec) in challenge.chains().iter().enumerate() {
        let rows: Vec<usize> = (0..spec.side).collect();
        let mut chain = begin(challenge, number, &rows, start)?;
        for _ in 0..spec.links() {
            advance(&mut chain, spec.depth)?;
            let numbers = chain.numbers();
            for block in numbers.chunks(ROWS * spec.side) {
                leaves.push(leaf(leaves.len(), block));
            }
        }
    }
    Ok(Answer::of_leaves(challenge, leaves))
}

/// Makes a chain: first rows, factor, side, modulus, precision.
pub type Start<'a> = dyn Fn(&[f32], &[f32], usize, u32, Precision) -> Result<Chain, String> + 'a;

fn begin(challenge: &Challenge, number: usize, rows: &[usize], start: &Start<'_>) -> Result<Chain, AnswerError> {
    let spec = &challenge.chains()[number];
    let x: Vec<f32> = rows
        .iter()
        .flat_map(|&row| first_row(challenge, number, row))
        .map(f32::from)
        .collect();
    let b: Vec<f32> = factor(challenge, number).into_iter().map(f32::from).collect();
    let modulus = Numbers::of(challenge.precision()).modulus as u32;
    start(&x, &b, spec.side, modulus, challenge.precision()).map_err(AnswerError::Device)
}

fn advance(chain: &mut Chain, products: usize) -> Result<(), AnswerError> {
    (0..products)
        .try_for_each(|_| chain.step())
        .map_err(|error| AnswerError::Device(error.to_string()))
}

impl Answer {
    pub(super) fn of_leaves(challenge: &Challenge, leaves: Vec<Hash>) -> Self {
        Self {
            challenge: challenge.clone(),
            root: tree::root(&leaves),
            leaves,
        }
    }

    /// The commitment.
    #[must_use]
    pub fn root(&self) -> Hash {
        self.root
    }

    /// Opens what the later `seed` draws. The rows in question are computed again, which costs a small part of the challenge.
    ///
    /// # Errors
    /// The device's.
    pub fn open(&self, seed: &[u8; 32], samples: usize, start: &Start<'_>) -> Result<Vec<u8>, AnswerError> {
        let challenge = &self.challenge;
        let draws = challenge.draws(&self.root, seed, samples);
        let mut blocks = BTreeMap::new();
        for (number, spec) in challenge.chains().iter().enumerate() {
            // Which blocks are wanted, and after which links.
            let mut wanted: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
            for draw in draws.iter().filter(|draw| draw.chain == number) {
                let links = wanted.entry(draw.block).or_default();
                links.extend(draw.link.checked_sub(1));
                links.push(draw.link);
            }
            let Some(last) = wanted.values().flatten().max().copied() else {
                continue;
            };
            let rows: Vec<usize> = wanted
                .keys()
                .flat_map(|block| block * ROWS..(block + 1) * ROWS)
                .collect();
            let mut chain = begin(challenge, number, &rows, start)?;
            for link in 0..=last {
                advance(&mut chain, spec.depth)?;
                for (place, (block, links)) in wanted.iter().enumerate() {
                    if links.contains(&link) {
                        blocks.insert((number, link, *block), chain.rows(place * ROWS, ROWS));
                    }
                }
            }
        }
        let block = |chain, link, block| blocks.get(&(chain, link, block)).cloned().unwrap_or_default();
        Ok(self.opening(&draws, &block))
    }

    /// The bytes of these draws, given the rows of any block (chain, link, block).
    pub(super) fn opening(&self, draws: &[Draw], block: &dyn Fn(usize, usize, usize) -> Vec<i16>) -> Vec<u8> {
        let paths = tree::Paths::new(&self.leaves);
        let mut out = Vec::new();
        for draw in draws {
            let links = draw.link.checked_sub(1).into_iter().chain([draw.link]);
            for link in links {
                let index = self.challenge.leaf_index(draw.chain, link, draw.block);
                write_end(&mut out, &block(draw.chain, link, draw.block), &paths.of(index));
            }
        }
        out
    }
}
