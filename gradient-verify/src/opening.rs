//! The accumulators that a commit names, opened as bytes.
//!
//! A commit's `accumulator_before` and `accumulator_after` are the BLAKE3 hashes of the whole accumulator, its `f32` values in
//! little-endian order without anything else. So an accumulator is a blob, addressed by what the commit says, and whoever has fetched it by
//! that address knows that it is what the member committed to. It is checked here once more, with its length and that every
//! value is finite; hostile bytes are refused, never a panic.

use coordinatorless::types::Hash;

/// Bytes of one value.
const VALUE_BYTES: usize = size_of::<f32>();

/// An accumulator as it is committed to and opened: little-endian `f32`, `4 * values.len()` bytes, whose BLAKE3 is
/// [`trainer::compress::accumulator_root`].
#[must_use]
pub fn accumulator_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Which of the two accumulators of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one the member started from (e).
    Before,
    /// The one it was left with (e').
    After,
}

impl std::fmt::Display for Which {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Which::Before => "before",
            Which::After => "after",
        })
    }
}

/// Bytes that are not an accumulator of this model, or not the one committed to.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OpeningError {
    /// Not what the commit names. Says nothing of the member: these bytes are not its word.
    #[error("the accumulator {which} the round hashes to {found}, the commit names {expected}")]
    Root {
        /// Which accumulator.
        which: Which,
        /// The commit's hash.
        expected: Hash,
        /// That of the bytes.
        found: Hash,
    },
    /// What was sent does not show these leaves to be part of what the commit names. Says nothing of the member either.
    #[error("the leaves of the accumulator {which} the round are not proven: {why}")]
    Proof {
        /// Which accumulator.
        which: Which,
        /// What is wrong with the proof.
        why: String,
    },
    /// What the member committed to is not as long as the model.
    #[error("the accumulator {which} the round has {found} bytes, this model's have {expected}")]
    Length {
        /// Which accumulator.
        which: Which,
        /// Four bytes a parameter.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// What the member committed to holds a value that no training gives.
    #[error("value {index} of the accumulator {which} the round is {found}, expected a finite number")]
    NotFinite {
        /// Which accumulator.
        which: Which,
        /// The first such parameter.
        index: usize,
        /// The value.
        found: f32,
    },
}

/// An opened accumulator: the committed bytes, as many as the model needs, all finite.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    values: &'a [[u8; VALUE_BYTES]],
}

impl<'a> Opening<'a> {
    /// Checks `bytes` against the commit's `root` and a model of `params` parameters. Allocates nothing.
    ///
    /// # Errors
    /// See [`OpeningError`]; the root is checked first, so that only the member's own word can be held against it.
    pub fn open(which: Which, bytes: &'a [u8], root: &Hash, params: usize) -> Result<Self, OpeningError> {
        let hash = Hash::of(bytes);
        if hash != *root {
            return Err(OpeningError::Root {
                which,
                expected: *root,
                found: hash,
            });
        }
        let expected = params.saturating_mul(VALUE_BYTES);
        if bytes.len() != expected {
            return Err(OpeningError::Length {
                which,
                expected,
                found: bytes.len(),
            });
        }
        let opening = Self {
            values: bytes.as_chunks().0,
        };
        match opening.values().enumerate().find(|(_, value)| !value.is_finite()) {
            Some((index, found)) => Err(OpeningError::NotFinite { which, index, found }),
            None => Ok(opening),
        }
    }

    /// The values in the model's order.
    pub fn values(&self) -> impl Iterator<Item = f32> + 'a {
        self.values.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use trainer::compress::{accumulator_root, accumulator_zero_root};

    use super::*;

    fn open(bytes: &[u8], params: usize) -> Result<Vec<f32>, OpeningError> {
        Opening::open(Which::After, bytes, &Hash::of(bytes), params).map(|opening| opening.values().collect())
    }

    #[test]
    fn an_accumulator_opens_to_the_values_it_was_made_of() {
        let values = [0.0, -0.0, 1.5, -3e38, f32::MIN_POSITIVE / 2.0];
        assert_eq!(open(&accumulator_bytes(&values), 5).unwrap(), values);
    }

    #[test]
    fn what_the_trainer_commits_to_opens() {
        let values: Vec<f32> = (0..10_000).map(|i| i as f32).collect();
        let root = Hash(accumulator_root(&values));
        assert!(Opening::open(Which::Before, &accumulator_bytes(&values), &root, 10_000).is_ok());
        let root = Hash(accumulator_zero_root(10_000));
        assert!(Opening::open(Which::Before, &[0; 40_000], &root, 10_000).is_ok());
    }

    #[test]
    fn other_bytes_than_those_committed_to_are_refused_before_anything_else() {
        let root = Hash::of(&accumulator_bytes(&[1.0, 2.0]));
        let result = Opening::open(Which::Before, &[1, 2, 3], &root, 2);
        assert!(
            matches!(
                result,
                Err(OpeningError::Root {
                    which: Which::Before,
                    ..
                })
            ),
            "{result:?}"
        );
    }

    #[test]
    fn a_wrong_length_is_refused_even_if_committed_to() {
        for bytes in [0, 1, 7, 9, 12] {
            let expected = OpeningError::Length {
                which: Which::After,
                expected: 8,
                found: bytes,
            };
            assert_eq!(open(&vec![0; bytes], 2), Err(expected));
        }
    }

    #[test]
    fn what_is_no_number_is_refused_even_if_committed_to() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let result = open(&accumulator_bytes(&[0.0, value, 1.0]), 3);
            assert!(
                matches!(result, Err(OpeningError::NotFinite { index: 1, .. })),
                "{result:?}"
            );
        }
    }
}
