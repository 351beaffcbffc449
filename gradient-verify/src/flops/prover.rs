//! Answering a challenge.

use std::collections::BTreeMap;

use coordinatorless::types::{Hash, PeerId};
use trainer::config::Precision;
use trainer::products::{Chain, beside_products};

use super::opening::write_end;
use super::work::{Numbers, factor_row, first_row};
use super::{ChainSpec, Challenge, ChallengeError, Draw, MAX_LEAVES, MAX_PRODUCTS, ROWS, leaf};
use crate::tree;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The device refused.
    #[error("the products could not be computed: {0}")]
    Device(String),
    /// No challenge that anyone may be asked to answer.
    #[error(transparent)]
    Challenge(#[from] ChallengeError),
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
            hash_blocks(&chain.numbers(), ROWS * spec.side, &mut leaves);
        }
    }
    Ok(Answer::of_leaves(challenge, leaves))
}

/// Computes as many links of each of these kinds of chains (side and depth) as `more` allows, which is told which kind, and how many of its links are done;
/// kinds for which it allows none are passed over. `None`: there is no link at all.
///
/// # Errors
/// The device's, or a kind that no challenge may have.
pub fn answer_while(
    peer: PeerId,
    seed: &[u8; 32],
    precision: Precision,
    kinds: &[(usize, usize)],
    more: &mut dyn FnMut(usize, usize) -> bool,
    start: &Start<'_>,
) -> Result<Option<Answer>, AnswerError> {
    let (mut specs, mut leaves): (Vec<ChainSpec>, Vec<Hash>) = (Vec::new(), Vec::new());
    for (kind, &(side, depth)) in kinds.iter().enumerate() {
        // A commitment has so many leaves at most; each kind after this one may want one link.
        let later: usize = kinds[kind + 1..].iter().map(|(side, _)| side / ROWS).sum();
        let room = |leaves: &Vec<Hash>| leaves.len() + side / ROWS + later <= MAX_LEAVES;
        if !room(&leaves) || !more(kind, 0) {
            continue;
        }
        let first = ChainSpec {
            side,
            products: depth,
            depth,
        };
        specs.push(first);
        let challenge = Challenge::new(peer, seed, precision, &specs)?;
        let (number, rows): (usize, Vec<usize>) = (specs.len() - 1, (0..side).collect());
        let mut chain = begin(&challenge, number, &rows, start)?;
        let mut links = 0;
        while links == 0 || (links < MAX_PRODUCTS / depth && room(&leaves) && more(kind, links)) {
            advance(&mut chain, depth)?;
            hash_blocks(&chain.numbers(), ROWS * side, &mut leaves);
            links += 1;
        }
        specs[number].products = links * depth;
    }
    if specs.is_empty() {
        return Ok(None);
    }
    let challenge = Challenge::new(peer, seed, precision, &specs)?;
    Ok(Some(Answer::of_leaves(&challenge, leaves)))
}

/// Appends the leaves of all blocks of `length` numbers.
fn hash_blocks(numbers: &[i16], length: usize, leaves: &mut Vec<Hash>) {
    /// Jobs that a link is cut into, several for each of the usual number of threads.
    const JOBS: usize = 16;
    let (first, blocks) = (leaves.len(), numbers.len().div_ceil(length));
    leaves.resize(first + blocks, Hash::default());
    let per = blocks.div_ceil(JOBS).max(1);
    let parts = leaves[first..].chunks_mut(per).zip(numbers.chunks(per * length));
    let mut jobs = Vec::with_capacity(JOBS);
    for (part, (leaves, numbers)) in parts.enumerate() {
        let from = first + part * per;
        jobs.push(move || {
            for (place, (hash, block)) in leaves.iter_mut().zip(numbers.chunks(length)).enumerate() {
                *hash = leaf(from + place, block);
            }
        });
    }
    beside_products(jobs);
}

/// Makes a chain: first rows, factor, side, modulus, precision.
pub type Start<'a> = dyn Fn(&[f32], &[f32], usize, u32, Precision) -> Result<Chain, String> + 'a;

fn begin(challenge: &Challenge, number: usize, rows: &[usize], start: &Start<'_>) -> Result<Chain, AnswerError> {
    let spec = &challenge.chains()[number];
    let mut x = vec![0.0; rows.len() * spec.side];
    let mut b = vec![0.0; spec.side * spec.side];
    let draw = |out: &mut [f32], numbers: &mut dyn Iterator<Item = f32>| {
        out.iter_mut().zip(numbers).for_each(|(out, number)| *out = number);
    };
    let mut jobs: Vec<Box<dyn FnOnce() + Send>> = Vec::with_capacity(rows.len() + spec.side);
    for (&row, out) in rows.iter().zip(x.chunks_mut(spec.side)) {
        let job = move || draw(out, &mut first_row(challenge, number, row).into_iter().map(f32::from));
        jobs.push(Box::new(job));
    }
    for (row, out) in b.chunks_mut(spec.side).enumerate() {
        let job = move || draw(out, &mut factor_row(challenge, number, row).into_iter().map(f32::from));
        jobs.push(Box::new(job));
    }
    beside_products(jobs);
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

    /// What was answered.
    #[must_use]
    pub fn challenge(&self) -> &Challenge {
        &self.challenge
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
