//! The rule of agreement: who points away from the rest does not count, and nobody else is hurt.
#![allow(clippy::unwrap_used)]

use trainer::aggregate::{Rule, Update, Weighted, aggregate_by};
use trainer::bench_codec::heavy_tailed;
use trainer::compress::{Codec, DenseCodec, Int8Codec, SparseCodec};

const PARAMS: usize = 64 * 4096 + 5000;

/// Workers that see the same, each with noise of its own.
fn honest(workers: u64) -> Vec<Vec<f32>> {
    let common = heavy_tailed(PARAMS, 1);
    let worker = |worker| {
        let noise = heavy_tailed(PARAMS, 100 + worker);
        common
            .iter()
            .zip(noise)
            .map(|(common, noise)| common + 0.7 * noise)
            .collect()
    };
    (0..workers).map(worker).collect()
}

fn negated(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| -value).collect()
}

fn sum<C: Codec>(codec: &C, vectors: &[Vec<f32>], tokens: &[u64], rule: Rule, threads: usize) -> Update {
    let zeros = vec![0.0; PARAMS];
    let encoded: Vec<_> = vectors
        .iter()
        .map(|vector| codec.encode(&zeros, vector).unwrap().shards)
        .collect();
    let weighted: Vec<_> = encoded
        .iter()
        .zip(tokens)
        .map(|(shards, tokens)| Weighted {
            tokens: *tokens,
            shards,
        })
        .collect();
    aggregate_by(codec, &weighted, rule, threads, Vec::new()).unwrap()
}

fn weights(update: &Update) -> Vec<u64> {
    update.shares().iter().map(|share| share.weight).collect()
}

/// Workers whose contributions hardly meet, as accumulators make them: all find the same, each a quarter of it first.
fn taking_turns() -> Vec<Vec<f32>> {
    let common = heavy_tailed(PARAMS, 1);
    let worker = |worker: usize| {
        let noise = heavy_tailed(PARAMS, 200 + worker as u64);
        let turn = |(i, value): (usize, &f32)| if i % 4 == worker { *value } else { 0.05 * value };
        let own = common.iter().enumerate().map(turn);
        own.zip(noise).map(|(own, noise)| own + 0.01 * noise).collect()
    };
    (0..4).map(worker).collect()
}

#[test]
fn the_honest_peer_that_a_liar_mirrors_stays() {
    let codec = DenseCodec::new(PARAMS).unwrap();
    let mut vectors = taking_turns();
    let tokens = [1000; 5];
    assert_eq!(
        weights(&sum(&codec, &vectors, &tokens[..4], Rule::Agreement, 1)),
        [1000; 4],
        "they agree a little"
    );
    vectors.push(negated(&vectors[2]));
    // Against its mirror image the honest one points away from the sum of the others, until the image is gone.
    assert_eq!(
        weights(&sum(&codec, &vectors, &tokens, Rule::Agreement, 1)),
        [1000, 1000, 1000, 1000, 0]
    );
}

#[test]
fn large_scales_everywhere_gain_a_liar_nothing() {
    // Every other chunk has values a hundred times smaller.
    let codec = SparseCodec::new(PARAMS, 4096, 64, 0.95).unwrap();
    let uneven = |values: &Vec<f32>| -> Vec<f32> {
        let scale = |i: usize| if (i / 4096).is_multiple_of(2) { 0.01 } else { 1e-4 };
        values.iter().enumerate().map(|(i, value)| value * scale(i)).collect()
    };
    let mut vectors: Vec<Vec<f32>> = honest(4).iter().map(uneven).collect();
    let share = |vectors: &[Vec<f32>], rule| {
        let own = sum(&codec, &vectors[4..], &[1000], Rule::Mean, 1);
        let all = sum(&codec, vectors, &[1000; 5], rule, 1);
        let without = sum(&codec, &vectors[..4], &[1000; 4], rule, 1);
        // What the liar adds in the small chunks, beside what the four do.
        let small = |i: usize| i / 4096 % 2 == 1 && own.sums()[i] != 0;
        let (mut added, mut honest) = (0f64, 0f64);
        for i in 0..PARAMS {
            honest += f64::from(i32::from(i / 4096 % 2 == 1)) * (without.sums()[i] as f64).powi(2);
            added += f64::from(i32::from(small(i))) * ((all.sums()[i] - without.sums()[i]) as f64).powi(2);
        }
        (added / honest).sqrt()
    };
    vectors.push(negated(&vectors[0]));
    let plain = share(&vectors, Rule::MedianNorm);
    vectors[4] = vectors[4].iter().map(|value| value * 1000.0).collect();
    let thousandfold = share(&vectors, Rule::MedianNorm);
    assert!(plain > 0.1, "{plain}");
    assert!(thousandfold < 2.5 * plain, "{thousandfold} of {plain}");
}

fn one_against_four<C: Codec>(codec: &C) {
    let mut vectors = honest(4);
    vectors.push(negated(&vectors[0]));
    let tokens = [1000, 2000, 1000, 1500, 2500];
    let update = sum(codec, &vectors, &tokens, Rule::Agreement, 2);
    assert_eq!(weights(&update), [1000, 2000, 1000, 1500, 0]);
    assert_eq!(update.total_weight(), 5500);
    let without = sum(codec, &vectors[..4], &tokens[..4], Rule::MedianNorm, 1);
    assert_eq!(update.total_weight(), without.total_weight());
    // The median that norms are clipped to is that of all five, so sums may differ by a clip, not by direction.
    let norm = |values: &mut dyn Iterator<Item = i64>| values.map(|v| (v as f64).powi(2)).sum::<f64>().sqrt();
    let apart = norm(&mut update.sums().iter().zip(without.sums()).map(|(a, b)| a - b));
    let whole = norm(&mut without.sums().iter().copied());
    assert!(apart < 0.1 * whole, "{apart} of {whole}");
    for threads in [1, 3] {
        assert_eq!(sum(codec, &vectors, &tokens, Rule::Agreement, threads), update);
    }
}

#[test]
fn a_liar_that_points_away_does_not_count_in_any_codec() {
    one_against_four(&SparseCodec::new(PARAMS, 4096, 64, 0.95).unwrap());
    one_against_four(&DenseCodec::new(PARAMS).unwrap());
    one_against_four(&Int8Codec::new(PARAMS).unwrap());
}

#[test]
fn among_the_honest_nothing_changes() {
    let codec = SparseCodec::new(PARAMS, 4096, 64, 0.95).unwrap();
    let (vectors, tokens) = (honest(5), [9, 9, 9, 9, 1]);
    let update = sum(&codec, &vectors, &tokens, Rule::Agreement, 1);
    assert_eq!(update, sum(&codec, &vectors, &tokens, Rule::MedianNorm, 1));
}

#[test]
fn without_a_majority_or_a_third_there_is_no_rest_to_go_by() {
    let codec = SparseCodec::new(PARAMS, 4096, 64, 0.95).unwrap();
    let mut vectors = honest(2);
    vectors[1] = negated(&vectors[1]);
    assert_eq!(weights(&sum(&codec, &vectors, &[5, 5], Rule::Agreement, 1)), [5, 5]);
    vectors.push(vec![0.0; PARAMS]);
    assert_eq!(
        weights(&sum(&codec, &vectors, &[5, 5, 5], Rule::Agreement, 1)),
        [5, 5, 5]
    );
    // Two camps of equal weight: nobody can say who lies.
    let mut camps = honest(4);
    camps[2] = negated(&camps[2]);
    camps[3] = negated(&camps[3]);
    assert_eq!(
        weights(&sum(&codec, &camps, &[4, 4, 4, 4], Rule::Agreement, 1)),
        [4, 4, 4, 4]
    );
}

#[test]
fn the_largest_values_and_weights_do_not_overflow() {
    let codec = DenseCodec::new(3).unwrap();
    let encode = |values: [f32; 3]| codec.encode(&[], &values).unwrap().shards;
    let (up, down) = (encode([15.9, 15.9, -15.9]), encode([-15.9, -15.9, 15.9]));
    let weighted: Vec<_> = [&up, &up, &up, &down]
        .into_iter()
        .map(|shards| Weighted {
            tokens: u64::MAX,
            shards,
        })
        .collect();
    let update = aggregate_by(&codec, &weighted, Rule::Agreement, 1, Vec::new()).unwrap();
    assert!(
        update.shares()[..3].iter().all(|share| share.weight > 0),
        "{:?}",
        update.shares()
    );
    assert_eq!(update.shares()[3].weight, 0);
}
