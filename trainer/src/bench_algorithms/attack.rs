//! What liars send: vectors, which then go through the same codec as everyone's. They know what all honest workers found, and act as one.

use serde::{Deserialize, Serialize};

/// Coordinates that are reordered together by [`Attack::UniqueIndex`]: the codec's chunk.
const CHUNK: usize = 4096;

/// How far "a little" is, in deviations.
const LITTLE: f32 = 1.5;

/// A known attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// The opposite of what an honest worker found.
    SignFlip,
    /// A thousand times the opposite.
    Thousandfold,
    /// Full magnitudes where honest workers have least, against their direction.
    UniqueIndex,
    /// Inner-product manipulation: the opposite of the honest mean (Xie et al., arXiv 1903.03936).
    InnerProduct,
    /// "A little is enough": the mean less some deviations, so that it looks honest (Baruch et al., arXiv 1902.06156).
    Little,
    /// One honest worker's vector, so that it counts more than others (Karimireddy et al., arXiv 2006.09365).
    Mimic,
    /// Honest work on false data: every byte `b` of its text is `255 - b`.
    LabelFlip,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::SignFlip,
        Self::Thousandfold,
        Self::UniqueIndex,
        Self::InnerProduct,
        Self::Little,
        Self::Mimic,
        Self::LabelFlip,
    ];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SignFlip => "sign flip",
            Self::Thousandfold => "sign flip x1000",
            Self::UniqueIndex => "unique indices",
            Self::InnerProduct => "inner product",
            Self::Little => "a little is enough",
            Self::Mimic => "mimic",
            Self::LabelFlip => "label flip",
        }
    }

    /// The liars' vector, from those of the honest (at least one); `None` for one who works, on false data.
    #[must_use]
    pub fn vector(self, honest: &[&[f32]]) -> Option<Vec<f32>> {
        let first = honest.first()?;
        Some(match self {
            Self::SignFlip => scaled(first, -1.0),
            Self::Thousandfold => scaled(first, -1000.0),
            Self::UniqueIndex => unique(first, &mean(honest)),
            Self::InnerProduct => scaled(&mean(honest), -1.0),
            Self::Little => little(honest),
            Self::Mimic => first.to_vec(),
            Self::LabelFlip => return None,
        })
    }

    /// The text that a liar trains on.
    #[must_use]
    pub fn text(self, mut batches: Vec<Vec<Vec<u32>>>) -> Vec<Vec<Vec<u32>>> {
        if self == Self::LabelFlip {
            for token in batches.iter_mut().flatten().flatten() {
                *token = 255 - (*token).min(255);
            }
        }
        batches
    }
}

fn scaled(values: &[f32], factor: f32) -> Vec<f32> {
    values.iter().map(|value| value * factor).collect()
}

fn mean(vectors: &[&[f32]]) -> Vec<f32> {
    let sum = |i: usize| vectors.iter().map(|vector| vector[i]).sum::<f32>();
    (0..vectors[0].len()).map(|i| sum(i) / vectors.len() as f32).collect()
}

fn little(vectors: &[&[f32]]) -> Vec<f32> {
    let mean = mean(vectors);
    let deviation = |i: usize| {
        let squares = vectors.iter().map(|vector| (vector[i] - mean[i]).powi(2)).sum::<f32>();
        (squares / vectors.len() as f32).sqrt()
    };
    (0..mean.len()).map(|i| mean[i] - LITTLE * deviation(i)).collect()
}

/// The magnitudes of `own`, the largest where the others' mean is smallest, with the opposite sign.
fn unique(own: &[f32], mean: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; own.len()];
    for (chunk, (own, mean)) in own.chunks(CHUNK).zip(mean.chunks(CHUNK)).enumerate() {
        let mut magnitudes: Vec<f32> = own.iter().map(|value| value.abs()).collect();
        magnitudes.sort_unstable_by(|a, b| b.total_cmp(a));
        let mut order: Vec<usize> = (0..mean.len()).collect();
        order.sort_by(|a, b| mean[*a].abs().total_cmp(&mean[*b].abs()));
        for (index, magnitude) in order.into_iter().zip(magnitudes) {
            out[chunk * CHUNK + index] = -magnitude.copysign(mean[index]);
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn unique_indices_are_those_that_nobody_else_would_send() {
        let honest: [&[f32]; 2] = [&[4.0, -0.1, 3.0, 0.2], &[5.0, 0.05, 2.0, 0.1]];
        let vector = Attack::UniqueIndex.vector(&honest).unwrap();
        assert_eq!(vector, [-0.1, 4.0, -0.2, -3.0]);
    }

    #[test]
    fn a_little_is_near_the_mean_and_against_it() {
        let honest: [&[f32]; 2] = [&[1.0, 3.0], &[3.0, 3.0]];
        assert_eq!(Attack::Little.vector(&honest).unwrap(), [0.5, 3.0]);
        assert_eq!(Attack::InnerProduct.vector(&honest).unwrap(), [-2.0, -3.0]);
    }

    #[test]
    fn flipped_labels_come_from_work_and_not_from_a_vector() {
        assert_eq!(Attack::LabelFlip.vector(&[&[1.0]]), None);
        assert_eq!(Attack::LabelFlip.text(vec![vec![vec![0, 65]]]), [[[255, 190]]]);
        assert_eq!(Attack::SignFlip.text(vec![vec![vec![65]]]), [[[65]]]);
    }
}
