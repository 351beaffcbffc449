//! Proof of FLOPS: how many operations a second a peer can really do, shown by doing them.
//!
//! A **challenge** is some chains of matrix products, all made from the peer's id and a seed that a record gives: `x_0` (`side` rows of `side` numbers) and a factor `b`,
//! then `x_{t+1} = (x_t b) mod m` in a precision, as [`trainer::products`] defines it, in whole numbers: the same on every device, so there is no
//! tolerance. The peer
//!
//! 1. computes all products, and keeps of every `depth`-th (in fp32 of each, see [`deepest`]) the hashes of its blocks of [`ROWS`] rows;
//! 2. commits to the Merkle root of all of them: 32 bytes, before the window closes;
//! 3. once a later seed is known, opens the blocks that it draws, with the same rows `depth` products before.
//!
//! Who verifies has a clock, the two seeds and the opening ([`verify`]). For each block that is drawn:
//!
//! - both ends are those of the root, by their paths; where the chain begins, from the seed;
//! - one row, drawn too, is computed again from end to end, exactly;
//! - in fp32, the other rows are held by Freivalds' test: a product mod m is linear, so `x_{t+depth} r = x_t (b^depth r)` for random `r`, at the cost of a sum a
//!   row (Freivalds 1977; a wrong row passes twice with probability 1.5e-8). In bf16 sums are rounded, and only the row stands.
//!
//! A peer that computes all but a share `f` of the rows is missed with probability [`missed`]`(f, samples)`, `(1 - f)^samples`: 0.12% for a tenth and
//! 64 samples. Another's results are of another seed; so are those of another round. Sent through a clock, `flops / seconds` is what the machine does *beside* what
//! else it does: a machine that answers for two ids at once shows half for each.
//!
//! What it does not show: that the products were done by the usual number of operations (fast multiplication would count as speed, as it is), that memory or network
//! keep up, and that the precision's own units did it: an fp32 product of such numbers can be put together from two exact bf16 ones.

use coordinatorless::protocol::speed::{self, SpeedTest};
use coordinatorless::types::{Hash, PeerId, SpeedChain};
use trainer::config::Precision;

use crate::tree;

mod opening;
mod prover;
mod verifier;
mod work;

pub use opening::OpeningError;
pub use prover::{Answer, AnswerError, Start, answer, answer_while};
pub use verifier::{FlopsError, verify};

/// Rows that share a leaf of the commitment.
pub const ROWS: usize = speed::ROWS as usize;
/// Samples that are usual: a tenth of the work not done is missed once in 800 times.
pub const SAMPLES: usize = 64;
/// Samples that the members of a run look at: a tenth not done is missed once in 29 times, a fifth once in 1,200.
pub const RUN_SAMPLES: usize = 32;
/// Most samples.
pub const MAX_SAMPLES: usize = 1024;
/// Sides of matrices, multiples of [`ROWS`].
pub const SIDES: std::ops::RangeInclusive<usize> = *speed::SIDES.start() as usize..=*speed::SIDES.end() as usize;
/// Most chains of a challenge.
pub const MAX_CHAINS: usize = 16;
/// Most products of a chain.
pub const MAX_PRODUCTS: usize = speed::MAX_PRODUCTS as usize;
/// Most products from one commitment to the next.
pub const MAX_DEPTH: usize = speed::MAX_DEPTH as usize;
/// Most leaves of a commitment.
pub const MAX_LEAVES: usize = 1 << 22;

/// Products from one commitment to the next, at most: in fp32 one, since more could be had for one product by `b^depth`, which has no larger numbers, with the same results. In bf16 every
/// product is rounded, and none can be left out.
#[must_use]
pub fn deepest(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 => MAX_DEPTH,
        Precision::Fp32 | Precision::Tf32 => 1,
    }
}

/// One chain of products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainSpec {
    /// Rows and columns of the matrices; within [`SIDES`].
    pub side: usize,
    /// How many products; a multiple of `depth`, at most [`MAX_PRODUCTS`].
    pub products: usize,
    /// From one commitment to the next; 1 to [`MAX_DEPTH`].
    pub depth: usize,
}

/// What a peer is asked to compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    peer: PeerId,
    precision: Precision,
    chains: Vec<ChainSpec>,
    /// All that the numbers follow from.
    key: [u8; 32],
}

/// A challenge that nobody should be asked to answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a challenge's {what} is {found}, expected {expected}")]
pub struct ChallengeError {
    what: &'static str,
    expected: String,
    found: String,
}

impl Challenge {
    /// For `peer`, from the seed that a record gives.
    ///
    /// # Errors
    /// A size out of bounds.
    pub fn new(
        peer: PeerId,
        seed: &[u8; 32],
        precision: Precision,
        chains: &[ChainSpec],
    ) -> Result<Self, ChallengeError> {
        let bound = |what, holds: bool, expected: String, found: String| match holds {
            true => Ok(()),
            false => Err(ChallengeError { what, expected, found }),
        };
        let known = matches!(precision, Precision::Fp32 | Precision::Bf16);
        bound(
            "precision",
            known,
            "fp32 or bf16".to_owned(),
            precision.name().to_owned(),
        )?;
        let count = chains.len();
        bound(
            "number of chains",
            (1..=MAX_CHAINS).contains(&count),
            format!("1 to {MAX_CHAINS}"),
            count.to_string(),
        )?;
        for chain in chains {
            let (side, depth, products) = (chain.side, chain.depth, chain.products);
            let sides = SIDES.contains(&side) && side.is_multiple_of(ROWS);
            bound(
                "side",
                sides,
                format!("{} to {}, a multiple of {ROWS}", SIDES.start(), SIDES.end()),
                side.to_string(),
            )?;
            bound(
                "depth",
                (1..=deepest(precision)).contains(&depth),
                format!("1 to {}", deepest(precision)),
                depth.to_string(),
            )?;
            let fits = (1..=MAX_PRODUCTS).contains(&products) && products.is_multiple_of(depth);
            bound(
                "number of products",
                fits,
                format!("1 to {MAX_PRODUCTS}, a multiple of {depth}"),
                products.to_string(),
            )?;
        }
        let leaves: usize = chains.iter().map(ChainSpec::leaves).sum();
        bound(
            "number of leaves",
            leaves <= MAX_LEAVES,
            format!("{MAX_LEAVES} at most"),
            leaves.to_string(),
        )?;
        Ok(Self {
            key: key(&peer, seed, precision),
            peer,
            precision,
            chains: chains.to_vec(),
        })
    }

    /// The challenge that a run's record made, as the member says that it answered it.
    ///
    /// # Errors
    /// A claim that no record can have.
    pub fn of_run(test: &SpeedTest, precision: Precision) -> Result<Self, ChallengeError> {
        let claimed = test.claim.iter().flat_map(|claim| &claim.chains);
        let chains: Vec<ChainSpec> = claimed.map(ChainSpec::from).collect();
        Self::new(test.member, &test.seed, spoken(precision), &chains)
    }

    /// Who is asked.
    #[must_use]
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// In which precision.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The chains.
    #[must_use]
    pub fn chains(&self) -> &[ChainSpec] {
        &self.chains
    }

    /// Operations in all: a multiplication and an addition for each of `side^3` terms of a product.
    #[must_use]
    pub fn flops(&self) -> u128 {
        self.chains.iter().map(ChainSpec::flops).sum()
    }

    /// Leaves of the commitment, over all chains.
    fn leaves(&self) -> usize {
        self.chains.iter().map(ChainSpec::leaves).sum()
    }

    /// What the later `seed` asks for, once `root` is fixed; with more samples where there is more work.
    fn draws(&self, root: &Hash, seed: &[u8; 32], samples: usize) -> Vec<Draw> {
        let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/flops-draw");
        hasher.update(&self.key).update(&root.0).update(seed);
        let mut stream = hasher.finalize_xof();
        let mut below = move |bound: u128| {
            let mut sixteen = [0; 16];
            stream.fill(&mut sixteen);
            u128::from_le_bytes(sixteen) % bound
        };
        let samples = samples.clamp(1, MAX_SAMPLES);
        let mut draw = || {
            let mut work = below(self.flops());
            let mut chain = 0;
            while work >= self.chains[chain].flops() {
                work -= self.chains[chain].flops();
                chain += 1;
            }
            let spec = &self.chains[chain];
            Draw {
                chain,
                link: below(spec.links() as u128) as usize,
                block: below(spec.blocks() as u128) as usize,
                row: below(ROWS as u128) as usize,
            }
        };
        (0..samples).map(|_| draw()).collect()
    }

    /// The number of a leaf: chain after chain, link after link, block after block.
    fn leaf_index(&self, chain: usize, link: usize, block: usize) -> usize {
        let before: usize = self.chains[..chain].iter().map(ChainSpec::leaves).sum();
        before + link * self.chains[chain].blocks() + block
    }
}

/// All that the numbers follow from. Not from how many products there are: who is asked for as many as it can do learns that only in the end.
fn key(peer: &PeerId, seed: &[u8; 32], precision: Precision) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("murmur/v2/flops");
    hasher.update(&peer.0).update(seed).update(precision.name().as_bytes());
    *hasher.finalize().as_bytes()
}

impl From<&SpeedChain> for ChainSpec {
    fn from(chain: &SpeedChain) -> Self {
        let [side, products, depth] = [chain.side, chain.products, chain.depth].map(|number| number as usize);
        Self { side, products, depth }
    }
}

impl From<&ChainSpec> for SpeedChain {
    fn from(spec: &ChainSpec) -> Self {
        // All are within the bounds of a challenge.
        let [side, products, depth] = [spec.side, spec.products, spec.depth].map(|number| number as u32);
        Self { side, products, depth }
    }
}

/// The precision in which a run's members show their speed: that of its training, or fp32 where products in it are not the same everywhere.
#[must_use]
pub fn spoken(precision: Precision) -> Precision {
    match precision {
        Precision::Bf16 => Precision::Bf16,
        Precision::Fp32 | Precision::Tf32 => Precision::Fp32,
    }
}

impl ChainSpec {
    /// Stretches of `depth` products, at the end of each of which all blocks are committed to.
    fn links(&self) -> usize {
        self.products / self.depth
    }

    /// Blocks of rows.
    fn blocks(&self) -> usize {
        self.side / ROWS
    }

    fn leaves(&self) -> usize {
        self.links() * self.blocks()
    }

    /// Operations of all its products.
    #[must_use]
    pub fn flops(&self) -> u128 {
        2 * self.products as u128 * (self.side as u128).pow(3)
    }
}

/// A block that has to be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Draw {
    chain: usize,
    /// From 0; the block is the one at its end, and the one at its beginning.
    link: usize,
    block: usize,
    /// The row within it that is computed again.
    row: usize,
}

/// The probability that a peer which left out a `share` of the rows, anywhere, is not found by `samples`.
#[must_use]
pub fn missed(share: f64, samples: usize) -> f64 {
    (1.0 - share.clamp(0.0, 1.0)).powf(samples as f64)
}

/// A leaf's hash: its place in the whole, and its numbers as they travel.
fn leaf(index: usize, numbers: &[i16]) -> Hash {
    tree::leaf(index as u32, &opening::bytes_of(numbers))
}

#[cfg(test)]
mod tests;
