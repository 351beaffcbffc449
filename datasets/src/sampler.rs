//! Which sequence comes when: a permutation of all sequences per epoch, computed for one index in O(1) and with integers
//! only, so that any peer replays any other's data from the seed alone, and nobody stores or sends an order.
//!
//! The permutation is a balanced Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that holds
//! `n`, with *cycle-walking* (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): what falls outside `n` is
//! permuted again until it falls inside. The domain is less than four times `n`, so that takes fewer than four passes on
//! average. Round keys come from BLAKE3 of seed and epoch. It has to shuffle well, not to resist cryptanalysis.

/// Feistel rounds. Four make a pseudo-random permutation of ideal round functions; six leave a margin for a cheap one.
const ROUNDS: usize = 6;

/// The order in which the sequences of a data set are trained on.
///
/// A *position* counts sequences since the start of a run, over all epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    seed: [u8; 32],
    n: u64,
}

impl Order {
    /// The order of `n` sequences that follows from `seed`.
    ///
    /// # Panics
    /// If `n` is zero: a data set has at least one sequence.
    pub fn new(seed: [u8; 32], n: u64) -> Self {
        assert!(n > 0, "an order needs at least one sequence");
        Self { seed, n }
    }

    /// Number of sequences in an epoch.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// The sequence at `index` of `epoch`: for each epoch a bijection of `0..n` on itself.
    ///
    /// # Panics
    /// If `index` is not below `n`.
    pub fn sequence(&self, epoch: u64, index: u64) -> u64 {
        assert!(
            index < self.n,
            "index {index} is outside an epoch of {} sequences",
            self.n
        );
        let keys = self.round_keys(epoch);
        let half = half_bits(self.n);
        let mut value = feistel(&keys, half, index);
        // Ends, since a permutation's cycle through an index below n comes back to it at last.
        while value >= self.n {
            value = feistel(&keys, half, value);
        }
        value
    }

    /// The sequence at a position of the run: epoch `position / n`, index `position % n`.
    pub fn at(&self, position: u64) -> u64 {
        self.sequence(position / self.n, position % self.n)
    }

    fn round_keys(&self, epoch: u64) -> [u64; ROUNDS] {
        let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/sequence-order");
        hasher
            .update(&self.seed)
            .update(&self.n.to_le_bytes())
            .update(&epoch.to_le_bytes());
        let mut stream = hasher.finalize_xof();
        std::array::from_fn(|_| {
            let mut key = [0; 8];
            stream.fill(&mut key);
            u64::from_le_bytes(key)
        })
    }
}

/// Bits of each half of the domain: the smallest `h >= 1` with `2^(2h) >= n`.
fn half_bits(n: u64) -> u32 {
    let bits = u64::BITS - (n - 1).leading_zeros();
    bits.div_ceil(2).max(1)
}

/// One pass over `2 * half` bits.
fn feistel(keys: &[u64; ROUNDS], half: u32, value: u64) -> u64 {
    let mask = (1_u64 << half) - 1; // half <= 32
    let (mut left, mut right) = (value >> half, value & mask);
    for key in keys {
        (left, right) = (right, left ^ (mix(right ^ key) & mask));
    }
    (left << half) | right
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_epoch_visits_every_sequence_once(seed: [u8; 32], n in 1_u64..3000, epoch: u64) {
            let order = Order::new(seed, n);
            let mut seen = vec![false; n as usize];
            for index in 0..n {
                let sequence = order.sequence(epoch, index) as usize;
                prop_assert!(!std::mem::replace(&mut seen[sequence], true), "{sequence} twice");
            }
        }

        #[test]
        fn huge_data_sets_stay_in_range(seed: [u8; 32], n in 1_u64.., position: u64) {
            prop_assert!(Order::new(seed, n).at(position) < n);
        }
    }

    #[test]
    fn epochs_and_seeds_give_different_orders() {
        let order = |seed, epoch| {
            (0..1000)
                .map(|i| Order::new([seed; 32], 1000).sequence(epoch, i))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }

    #[test]
    fn a_position_runs_on_through_the_epochs() {
        let order = Order::new([3; 32], 10);
        assert_eq!(order.at(37), order.sequence(3, 7));
    }

    /// Every peer must compute the same order for ever: these values are part of the protocol.
    #[test]
    fn the_order_never_changes() {
        let order = Order::new([42; 32], 1000);
        let first: Vec<_> = (0..8).map(|i| order.at(i)).collect();
        assert_eq!(first, [84, 979, 873, 550, 144, 100, 692, 87]);
    }

    #[test]
    fn neighbours_are_scattered() {
        // Mean distance of successive draws from 0..n: n/3 for a uniform shuffle, 1 for none.
        let n = 100_000;
        let order = Order::new([9; 32], n);
        let total: u64 = (1..10_000).map(|i| order.at(i).abs_diff(order.at(i - 1))).sum();
        let mean = total / 9_999;
        assert!((n * 3 / 10..n * 4 / 10).contains(&mean), "mean distance {mean}");
    }
}
