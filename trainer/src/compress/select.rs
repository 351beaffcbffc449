//! Which values of a chunk are sent: the k of largest magnitude, ties by lower index, found without sorting the chunk.
//!
//! A lower bound on the k-th magnitude comes first: the chunk is dealt out in turn to at least 2k groups, and the k-th
//! largest of the groups' maxima is reached by at least k values. Both passes over the chunk are then plain loops that the
//! compiler vectorises; what remains above the bound, about 1.4 k values, is small enough for a quickselect.
//!
//! Floats that are finite and not negative order like their bits, so magnitudes are compared as integers.

/// Clears the sign of a float's bits.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// Groups are dealt at least this many values each, or the bound is not worth its price.
const MIN_GROUP: usize = 4;

/// Scratch space for one chunk after another.
#[derive(Debug, Default)]
pub(crate) struct Selector {
    maxima: Vec<u32>,
    candidates: Vec<u16>,
    keys: Vec<u32>,
}

impl Selector {
    /// Writes the indices of the `k` largest |values| to `out`, sorted. `values` are finite, at most 65536, at least `k`.
    pub(crate) fn top_k(&mut self, values: &[f32], k: usize, out: &mut Vec<u16>) {
        debug_assert!(k <= values.len() && values.len() <= 1 << 16);
        let bound = self.lower_bound(values, k);
        let found = self.collect(values, bound);
        let candidates = &self.candidates[..found];
        self.keys.clear();
        self.keys
            .extend(candidates.iter().map(|index| key(values[usize::from(*index)])));
        let threshold = kth_largest(&mut self.keys, k);
        // After the partition the first k keys are the chosen ones; those that equal the threshold are ties.
        let mut ties = self.keys[..k].iter().filter(|key| **key == threshold).count();
        out.clear();
        for index in candidates {
            let key = key(values[usize::from(*index)]);
            if key > threshold {
                out.push(*index);
            } else if key == threshold && ties > 0 {
                ties -= 1;
                out.push(*index);
            }
        }
    }

    /// A magnitude that at least `k` values reach.
    fn lower_bound(&mut self, values: &[f32], k: usize) -> u32 {
        let groups = (2 * k).next_multiple_of(32);
        if values.len() < MIN_GROUP * groups {
            return 0;
        }
        self.maxima.clear();
        self.maxima.resize(groups, 0);
        for row in values.chunks(groups) {
            for (max, value) in self.maxima.iter_mut().zip(row) {
                // As signed integers: the same order, and an instruction that more processors have.
                *max = (*max as i32).max(key(*value) as i32) as u32;
            }
        }
        kth_largest(&mut self.maxima, k)
    }

    /// Collects the indices of all values that reach `bound`, in order, and counts them.
    fn collect(&mut self, values: &[f32], bound: u32) -> usize {
        self.candidates.resize(values.len(), 0);
        let mut found = 0;
        for (index, value) in values.iter().enumerate() {
            // Written always, kept if it counts: cheaper than a branch that is hard to foresee.
            self.candidates[found] = index as u16;
            found += usize::from(key(*value) >= bound);
        }
        found
    }
}

#[inline]
fn key(value: f32) -> u32 {
    value.to_bits() & MAGNITUDE
}

/// The `k`-th largest key; the `k` largest come first afterwards. Zero if `k` is zero.
fn kth_largest(keys: &mut [u32], k: usize) -> u32 {
    match k.checked_sub(1) {
        Some(last) => *keys.select_nth_unstable_by(last, |a, b| b.cmp(a)).1,
        None => 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn top_k(values: &[f32], k: usize) -> Vec<u16> {
        let mut out = Vec::new();
        Selector::default().top_k(values, k, &mut out);
        out
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[1.0, -2.0, 2.0, 2.0, -1.0], 2), [1, 2]);
        assert_eq!(top_k(&[0.0; 700], 3), [0, 1, 2]);
        assert_eq!(top_k(&[-0.0, 0.0, -0.0], 2), [0, 1]);
    }

    #[test]
    fn magnitudes_count_whatever_the_sign() {
        let values: Vec<f32> = (0..4096)
            .map(|i| if i % 2 == 0 { i as f32 } else { -(i as f32) })
            .collect();
        assert_eq!(top_k(&values, 4), [4092, 4093, 4094, 4095]);
    }

    #[test]
    fn all_of_a_short_chunk_can_be_chosen() {
        assert_eq!(top_k(&[3.0, 1.0, 2.0], 3), [0, 1, 2]);
    }
}
