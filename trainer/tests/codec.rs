//! The codec, the integer sum and its application as one: what a peer publishes, what strangers may send, what all agree on.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use trainer::aggregate::{AggregateError, Update, Weighted, aggregate, aggregate_into, aggregate_with};
use trainer::apply::{ApplyError, OuterRate, apply, apply_with};
use trainer::bench_codec::{heavy_tailed, synthetic_row};
use trainer::compress::codec::CLIP_BITS;
use trainer::compress::{CodecError, DecodeError, MAX_SHARD_BYTES, SparseCodec, accumulator_root, reference};

fn codec(params: usize) -> SparseCodec {
    SparseCodec::new(params, 4096, 64, 0.95).unwrap()
}

/// A contribution of one seed, from an empty accumulator.
fn contribution(codec: &SparseCodec, seed: u64, scale: f32) -> Vec<Vec<u8>> {
    let delta: Vec<f32> = heavy_tailed(codec.params(), seed)
        .iter()
        .map(|value| value * scale)
        .collect();
    codec.encode(&vec![0.0; codec.params()], &delta).unwrap().shards
}

fn weighted(tokens: u64, shards: &[Vec<u8>]) -> Weighted<'_, Vec<u8>> {
    Weighted { tokens, shards }
}

/// Means of an update, as floats.
fn means(update: &Update) -> Vec<f64> {
    let unit = 2f64.powi(32) * update.total_weight() as f64;
    update.sums().iter().map(|sum| *sum as f64 / unit).collect()
}

// ---- what an honest peer publishes

/// Settings, with an accumulator and a pseudo-gradient: rough values, ties, zeros and clusters among them.
fn any_input() -> impl Strategy<Value = (SparseCodec, Vec<f32>, Vec<f32>)> {
    let chunk = prop_oneof![Just(64usize), Just(128), Just(1024), Just(4096)];
    (chunk, 1usize..9000, 0.0f32..=1.0, any::<prop::sample::Index>()).prop_flat_map(|(chunk, params, beta, k)| {
        let codec = SparseCodec::new(params, chunk, 1 + k.index(chunk), beta).unwrap();
        let value = prop_oneof![
            4 => -1e-2f32..1e-2,
            2 => prop::sample::select(vec![0.0f32, -0.0, 1e-3, -1e-3]),
            1 => any::<f32>().prop_map(|value| if value.is_finite() { value / 4.0 } else { 0.0 }),
        ];
        (
            Just(codec),
            prop::collection::vec(value.clone(), params),
            prop::collection::vec(value, params),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn fast_and_reference_codec_agree_bit_for_bit((codec, e, d) in any_input(), threads in 1usize..5) {
        let fast = codec.encode_with(&e, &d, threads).unwrap();
        let slow = reference::encode(&codec, &e, &d).unwrap();
        prop_assert_eq!(&fast.shards, &slow.shards);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&fast.accumulator), bits(&slow.accumulator));
        let decoded = codec.decode(&fast.shards).unwrap();
        prop_assert_eq!(decoded.to_dense(), reference::decode(&codec, &fast.shards));
    }

    #[test]
    fn what_is_sent_and_what_is_kept_make_up_the_whole((codec, e, d) in any_input()) {
        let encoded = codec.encode(&e, &d).unwrap();
        let decoded = codec.decode(&encoded.shards).unwrap().to_dense();
        for (i, kept) in encoded.accumulator.iter().enumerate() {
            let whole = codec.beta() * e[i] + d[i];
            prop_assert_eq!(*kept, whole - decoded[i], "parameter {}", i);
        }
    }

    #[test]
    fn no_contribution_is_longer_than_its_limit((codec, e, d) in any_input()) {
        let shards = codec.encode(&e, &d).unwrap().shards;
        prop_assert_eq!(shards.len(), codec.shard_count());
        for (number, shard) in shards.iter().enumerate() {
            prop_assert!(shard.len() as u64 <= codec.max_shard_bytes(number));
        }
    }

    #[test]
    fn decoded_content_packs_to_the_same_bytes((codec, e, d) in any_input()) {
        let shards = codec.encode(&e, &d).unwrap().shards;
        codec.check(&shards).unwrap();
        let decoded = codec.decode(&shards).unwrap();
        prop_assert_eq!(&codec.pack(&decoded).unwrap(), &shards);
        // Dense values lead back to the same bytes too: the mean of equal magnitudes is their scale.
        let again = codec.encode(&vec![0.0; codec.params()], &decoded.to_dense()).unwrap();
        prop_assert_eq!(&again.shards, &shards);
    }
}

#[test]
fn a_contribution_at_k_64_costs_at_most_0_0170_bytes_a_parameter() {
    let row = synthetic_row(1 << 20, 64, 1).unwrap();
    assert!(row.bytes_per_param <= 0.0170, "{}", row.bytes_per_param);
    assert!(row.bytes_per_param <= 1.03 * row.entropy_bytes_per_param, "{row:?}");
    assert!(row.entropy_bytes_per_param <= row.bytes_per_param);
}

#[test]
fn error_feedback_delivers_what_one_round_leaves_out() {
    let codec = SparseCodec::new(4096, 4096, 64, 1.0).unwrap();
    let delta = heavy_tailed(4096, 3);
    let mut accumulator = vec![0.0; 4096];
    let mut delivered = vec![0.0f64; 4096];
    let rounds = 400;
    for _ in 0..rounds {
        let encoded = codec.encode(&accumulator, &delta).unwrap();
        codec
            .decode(&encoded.shards)
            .unwrap()
            .for_each(|param, value| delivered[param] += f64::from(value));
        accumulator = encoded.accumulator;
    }
    let wanted: f64 = delta.iter().map(|value| f64::from(*value).powi(2)).sum();
    let missed: f64 = delta
        .iter()
        .zip(&delivered)
        .map(|(value, sum)| (f64::from(*value) - sum / f64::from(rounds)).powi(2))
        .sum();
    assert!(missed < 0.05 * wanted, "{missed} of {wanted}");
}

#[test]
fn padding_is_never_selected() {
    // The last chunk holds 10 parameters, fewer than k: all are sent, nothing beyond them.
    let codec = codec(4096 + 10);
    let encoded = codec.encode(&vec![0.0; 4106], &vec![1e-3; 4106]).unwrap();
    let mut sent = Vec::new();
    codec
        .decode(&encoded.shards)
        .unwrap()
        .for_each(|param, _| sent.push(param));
    assert_eq!(sent, (0..64).chain(4096..4106).collect::<Vec<_>>());
}

#[test]
fn a_large_model_is_cut_into_shards_of_at_most_4_mib() {
    // k = chunk: 2.2 bits a parameter make the second shard affordable in a test.
    let codec = SparseCodec::new(40 << 20, 4096, 4096, 0.95).unwrap();
    assert!(codec.shard_count() > 2);
    for shard in 0..codec.shard_count() {
        assert!(codec.max_shard_bytes(shard) as usize <= MAX_SHARD_BYTES);
    }
    let encoded = codec
        .encode(&vec![0.0; codec.params()], &vec![-2e-3; codec.params()])
        .unwrap();
    assert_eq!(encoded.shards.len(), codec.shard_count());
    assert!(encoded.shards.iter().all(|shard| shard.len() <= MAX_SHARD_BYTES));
    assert_eq!(codec.decode(&encoded.shards).unwrap().len(), codec.params());
    assert_eq!(codec.max_shard_bytes(codec.shard_count()), 0, "no such shard");
}

#[test]
fn inputs_that_cannot_be_encoded_are_refused() {
    let codec = codec(5000);
    let zeros = vec![0.0; 5000];
    assert!(matches!(
        codec.encode(&zeros[1..], &zeros),
        Err(CodecError::Length {
            expected: 5000,
            found: 4999,
            ..
        })
    ));
    assert!(matches!(
        codec.encode(&zeros, &zeros[1..]),
        Err(CodecError::Length {
            expected: 5000,
            found: 4999,
            ..
        })
    ));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut delta = zeros.clone();
        delta[4999] = bad;
        assert!(
            matches!(
                codec.encode(&zeros, &delta),
                Err(CodecError::NotFinite { index: 4999, .. })
            ),
            "{bad}"
        );
        assert!(
            matches!(
                codec.encode(&delta, &zeros),
                Err(CodecError::NotFinite { index: 4999, .. })
            ),
            "{bad}"
        );
    }
    let huge = vec![f32::MAX; 5000];
    assert!(
        matches!(codec.encode(&huge, &huge), Err(CodecError::NotFinite { index: 0, .. })),
        "the sum overflows"
    );
}

#[test]
fn settings_out_of_bounds_are_refused() {
    for (params, chunk, k, beta) in [
        (0, 4096, 64, 0.9),
        (9, 0, 64, 0.9),
        (9, 100, 64, 0.9),
        (9, 1 << 17, 64, 0.9),
        (9, 4096, 0, 0.9),
    ]
    .into_iter()
    .chain([
        (9, 4096, 4097, 0.9),
        (9, 4096, 64, 1.1),
        (9, 4096, 64, f32::NAN),
        (1 << 41, 4096, 64, 0.9),
    ]) {
        assert!(
            SparseCodec::new(params, chunk, k, beta).is_err(),
            "{params} {chunk} {k} {beta}"
        );
    }
}

#[test]
fn the_accumulator_root_is_that_of_the_agreed_values() {
    let codec = codec(300_000);
    let delta = heavy_tailed(300_000, 5);
    let roots: Vec<_> = (1..=8)
        .map(|threads| codec.encode_with(&vec![0.0; 300_000], &delta, threads).unwrap())
        .map(|encoded| accumulator_root(&encoded.accumulator))
        .collect();
    assert!(roots.iter().all(|root| *root == roots[0]));
}

// ---- what strangers may send

/// Valid shards of a small codec with some bytes changed, dropped or added.
fn mutated() -> impl Strategy<Value = (SparseCodec, Vec<Vec<u8>>)> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..6), 1..4);
    (1usize..9000, 1usize..40, any::<u64>(), edits).prop_map(|(params, k, seed, edits)| {
        let codec = SparseCodec::new(params, 512, k, 0.9).unwrap();
        let mut shards = contribution(&codec, seed, 1.0);
        for (place, byte, kind) in edits {
            let place = place.index(shards[0].len().max(1));
            match kind {
                0 => shards[0].truncate(place),
                1 => shards[0].insert(place, byte),
                2 => shards.push(vec![byte]),
                3 if place < shards[0].len() => shards[0][place] = byte,
                _ if place < shards[0].len() => shards[0][place] ^= 1 << (byte % 8),
                _ => (),
            }
        }
        (codec, shards)
    })
}

/// The property that the fuzz target holds as well: no panic, and whatever passes is canonical.
fn strict(codec: &SparseCodec, shards: &[Vec<u8>]) -> Result<(), TestCaseError> {
    let sum = aggregate_with(codec, &[weighted(7, shards), weighted(0, shards)], 2);
    match codec.check(shards) {
        Ok(()) => {
            let decoded = codec.decode(shards).unwrap();
            prop_assert_eq!(&codec.pack(&decoded).unwrap()[..], shards);
            prop_assert!(sum.is_ok());
        }
        Err(error) => {
            prop_assert_eq!(codec.decode(shards).unwrap_err(), error);
            prop_assert!(sum.is_err());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_contributions_are_refused_or_canonical((codec, shards) in mutated()) {
        strict(&codec, &shards)?;
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), params in 1usize..600) {
        let codec = SparseCodec::new(params, 64, 5, 0.9).unwrap();
        strict(&codec, std::slice::from_ref(&bytes))?;
        // The same bytes behind a header that is right, so that the block itself is reached.
        let mut framed = vec![1, 1, 0, 0];
        framed.extend((bytes.len() as u32).to_le_bytes());
        framed.extend(&bytes);
        strict(&codec, &[framed])?;
    }
}

#[test]
fn each_kind_of_damage_has_its_own_error() {
    let codec = SparseCodec::new(4096, 4096, 3, 0.9).unwrap();
    let mut delta = vec![0.0; 4096];
    (delta[5], delta[6], delta[40]) = (1e-3, -1e-3, 1e-3);
    let good = codec.encode(&vec![0.0; 4096], &delta).unwrap().shards;
    let damaged = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut shards = good.clone();
        damage(&mut shards[0]);
        codec.check(&shards).unwrap_err()
    };
    // Header 4, length 4, Rice parameter, scale; then gaps 5, 0, 33 with parameter 7 and three signs: 27 bits.
    assert_eq!(
        codec.check(&[[0u8; 0]; 0]),
        Err(DecodeError::ShardCount { expected: 1, found: 0 })
    );
    assert!(
        matches!(damaged(&|bytes| bytes[0] = 2), DecodeError::Header { .. }),
        "another version"
    );
    assert!(matches!(
        damaged(&|bytes| bytes.truncate(3)),
        DecodeError::Header { .. }
    ));
    assert!(matches!(
        damaged(&|bytes| bytes.truncate(6)),
        DecodeError::ShardLength { .. }
    ));
    assert!(matches!(
        damaged(&|bytes| bytes[4] += 1),
        DecodeError::ShardLength { .. }
    ));
    let longer = |bytes: &mut Vec<u8>| (bytes[4] += 1, bytes.push(0)).1;
    assert_eq!(damaged(&longer), DecodeError::BlockEndsLate { block: 0 });
    let shorter = |bytes: &mut Vec<u8>| (bytes[4] -= 1, bytes.pop()).0;
    assert!(matches!(
        damaged(&shorter),
        DecodeError::BlockEndsEarly { block: 0 } | DecodeError::IndexOutOfRange { .. }
    ));
    let wasteful = |bytes: &mut Vec<u8>| {
        // The same content with parameter 8: three gaps of 9 bits, then the signs.
        let bits = (1 | 5 << 1) | 1 << 9 | (1 | 33 << 1) << 18 | 0b010u32 << 27;
        bytes[8] = 8;
        bytes[10..].copy_from_slice(&bits.to_le_bytes());
    };
    assert_eq!(
        damaged(&wasteful),
        DecodeError::RiceParameter {
            block: 0,
            expected: 7,
            found: 8
        }
    );
    assert!(matches!(
        damaged(&|bytes| bytes[8] = 255),
        DecodeError::RiceParameter { found: 255, .. }
    ));
    assert!(
        matches!(damaged(&|bytes| bytes[9] = 0), DecodeError::BlockEndsLate { .. }),
        "a silent chunk that speaks"
    );
    assert!(matches!(
        damaged(&|bytes| bytes[10..].fill(0)),
        DecodeError::IndexOutOfRange { chunk: 0, limit: 4096 }
    ));
    assert_eq!(
        damaged(&|bytes| *bytes.last_mut().unwrap() |= 128),
        DecodeError::Padding { block: 0 }
    );
    let huge = |bytes: &mut Vec<u8>| {
        bytes.resize(8 + 10_000, 0);
        bytes[4..8].copy_from_slice(&10_000u32.to_le_bytes());
    };
    assert!(matches!(damaged(&huge), DecodeError::BlockLength { found: 10_000, .. }));
}

// ---- what all agree on

#[test]
fn a_sum_has_the_same_bits_on_any_threads_and_in_any_order() {
    let codec = codec(1_500_000);
    let all: Vec<_> = (0..5)
        .map(|seed| contribution(&codec, seed, 1.0 + seed as f32))
        .collect();
    let tokens = [15_000, 15_000, 4_096, 0, 31_337];
    let of = |order: &[usize], threads| {
        let contributions: Vec<_> = order.iter().map(|i| weighted(tokens[*i], &all[*i])).collect();
        aggregate_with(&codec, &contributions, threads).unwrap()
    };
    let first = of(&[0, 1, 2, 3, 4], 1);
    let rate = OuterRate::new(2.0).unwrap();
    let model = heavy_tailed(codec.params(), 99);
    let mut moved = model.clone();
    apply_with(&mut moved, &first, rate, 1).unwrap();
    for threads in 1..=8 {
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]] {
            let other = of(&order, threads);
            assert!(other.sums() == first.sums() && other.total_weight() == first.total_weight());
            let mut theta = model.clone();
            apply_with(&mut theta, &other, rate, threads).unwrap();
            assert!(
                theta.iter().zip(&moved).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{threads} threads"
            );
        }
    }
}

#[test]
fn the_mean_is_weighted_by_tokens_and_divided_by_the_total() {
    let codec = codec(10_000);
    let (a, b) = (contribution(&codec, 1, 1.0), contribution(&codec, 2, 1.0));
    let update = aggregate(&codec, &[weighted(3000, &a), weighted(1000, &b)]).unwrap();
    let (da, db) = (
        codec.decode(&a).unwrap().to_dense(),
        codec.decode(&b).unwrap().to_dense(),
    );
    let clips: Vec<f64> = update
        .shares()
        .iter()
        .map(|share| share.clip as f64 / 2f64.powi(32))
        .collect();
    assert!(
        clips.contains(&1.0) && clips.iter().all(|clip| *clip > 0.5),
        "alike in norm: {clips:?}"
    );
    for (i, mean) in means(&update).iter().enumerate() {
        let wanted = 0.75 * clips[0] * f64::from(da[i]) + 0.25 * clips[1] * f64::from(db[i]);
        assert!((mean - wanted).abs() < 1e-9, "parameter {i}: {mean} and {wanted}");
    }
}

#[test]
fn an_index_that_one_attacker_alone_sends_moves_by_its_share_only() {
    let codec = SparseCodec::new(4096, 4096, 1, 0.9).unwrap();
    let at = |place: usize| {
        let mut delta = vec![0.0; 4096];
        delta[place] = 1e-2;
        codec.encode(&vec![0.0; 4096], &delta).unwrap().shards
    };
    let (honest, attacker) = (at(7), at(4000));
    let update = aggregate(&codec, &[weighted(9, &honest), weighted(1, &attacker)]).unwrap();
    let means = means(&update);
    assert!((means[4000] / means[7] - 1.0 / 9.0).abs() < 1e-6);
}

#[test]
fn a_giant_is_clipped_to_the_median_norm() {
    let codec = codec(50_000);
    let honest: Vec<_> = (0..3).map(|seed| contribution(&codec, seed, 1.0)).collect();
    let giant = contribution(&codec, 9, 1000.0);
    let mut all: Vec<_> = honest.iter().map(|shards| weighted(100, shards)).collect();
    all.push(weighted(100, &giant));
    let update = aggregate(&codec, &all).unwrap();
    let giant = update.shares()[3];
    let median = {
        let mut norms: Vec<u64> = update.shares().iter().map(|share| share.norm).collect();
        norms.sort_unstable();
        norms[1]
    };
    assert_eq!(
        giant.clip,
        ((u128::from(median) << CLIP_BITS) / u128::from(giant.norm)) as u64
    );
    assert!(giant.clip < (1 << CLIP_BITS) * 3 / 4);
    assert!(
        giant.norm < 3 * median,
        "its scales are cut to twice the median of each chunk"
    );
    let norm = means(&update).iter().map(|mean| mean * mean).sum::<f64>().sqrt() * 2f64.powi(32);
    assert!(norm <= median as f64, "a mean of vectors no longer than the median");
}

#[test]
fn silent_contributions_dilute_but_do_not_silence() {
    let codec = codec(5000);
    let silent = codec.encode(&vec![0.0; 5000], &vec![0.0; 5000]).unwrap().shards;
    let honest = contribution(&codec, 1, 1.0);
    let update = aggregate(
        &codec,
        &[
            weighted(1, &silent),
            weighted(1, &silent),
            weighted(1, &silent),
            weighted(1, &honest),
        ],
    );
    let update = update.unwrap();
    assert_eq!(update.shares()[3].clip, 1 << CLIP_BITS);
    let wanted = codec.decode(&honest).unwrap().to_dense();
    for (mean, wanted) in means(&update).iter().zip(&wanted) {
        assert_eq!(*mean, f64::from(*wanted) / 4.0);
    }
}

#[test]
fn buffers_of_earlier_rounds_change_nothing() {
    let codec = codec(300_000);
    let shards = contribution(&codec, 1, 1.0);
    let contributions = [weighted(3, &shards)];
    let fresh = aggregate_with(&codec, &contributions, 2).unwrap();
    for length in [0, 1000, 400_000] {
        let again = aggregate_into(&codec, &contributions, 2, vec![-7; length]).unwrap();
        assert_eq!(again.into_sums(), fresh.sums());
        let (zeros, delta) = (vec![0.0; 300_000], heavy_tailed(300_000, 1));
        let encoded = codec.encode_into(&zeros, &delta, 2, vec![f32::NAN; length]).unwrap();
        assert_eq!(encoded, codec.encode(&zeros, &delta).unwrap());
    }
}

#[test]
fn nothing_moves_without_weight() {
    let codec = codec(5000);
    let honest = contribution(&codec, 1, 1.0);
    let silent = codec.encode(&vec![0.0; 5000], &vec![0.0; 5000]).unwrap().shards;
    let model = heavy_tailed(5000, 4);
    for contributions in [vec![], vec![weighted(0, &honest)], vec![weighted(5, &silent)]] {
        let update = aggregate(&codec, &contributions).unwrap();
        assert!(update.sums().iter().all(|sum| *sum == 0));
        let mut theta = model.clone();
        apply(&mut theta, &update, OuterRate::new(2.0).unwrap()).unwrap();
        assert_eq!(theta, model);
    }
}

#[test]
fn the_largest_weights_and_scales_do_not_overflow() {
    let codec = SparseCodec::new(64, 64, 64, 0.9).unwrap();
    let largest = codec.encode(&[0.0; 64], &[-f32::MAX; 64]).unwrap().shards;
    let all = vec![weighted(u64::MAX, &largest); 128];
    let update = aggregate(&codec, &all).unwrap();
    let scale = trainer::compress::quantize::scale_value(255);
    assert!(update.sums().iter().all(|sum| *sum < 0 && sum.unsigned_abs() < 1 << 62));
    assert!(means(&update).iter().all(|mean| (mean + f64::from(scale)).abs() < 1e-6));
    let mixed = aggregate(&codec, &[weighted(u64::MAX, &largest), weighted(1, &largest)]).unwrap();
    assert_eq!(mixed.shares()[1].weight, 1, "small, not nothing");
}

#[test]
fn a_contribution_that_does_not_decode_is_named_and_nothing_is_summed() {
    let codec = codec(600_000);
    let good = contribution(&codec, 1, 1.0);
    let mut bad = contribution(&codec, 2, 1.0);
    let last = bad[0].len() - 1;
    bad[0].remove(last);
    let error = aggregate(&codec, &[weighted(1, &good), weighted(1, &bad)]).unwrap_err();
    assert!(matches!(
        error,
        AggregateError::Decode {
            contribution: 1,
            source: DecodeError::ShardLength { .. }
        }
    ));
    let errors: Vec<_> = (1..=8)
        .map(|threads| {
            let mut bad = good.clone();
            let middle = bad[0].len() / 2;
            bad[0][middle..].fill(0);
            aggregate_with(&codec, &[weighted(1, &good), weighted(0, &bad)], threads).unwrap_err()
        })
        .collect();
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
}

#[test]
fn the_model_moves_against_the_mean_pseudo_gradient() {
    let codec = codec(5000);
    let shards = contribution(&codec, 1, 1.0);
    let update = aggregate(&codec, &[weighted(15_360, &shards)]).unwrap();
    let delta = codec.decode(&shards).unwrap().to_dense();
    let model = heavy_tailed(5000, 4);
    let mut theta = model.clone();
    apply(&mut theta, &update, OuterRate::new(2.0).unwrap()).unwrap();
    for i in 0..5000 {
        assert_eq!(theta[i], model[i] - 2.0 * delta[i], "parameter {i}");
    }
    let error = apply(&mut theta[1..], &update, OuterRate::new(2.0).unwrap());
    assert_eq!(
        error,
        Err(ApplyError::Length {
            expected: 4999,
            found: 5000
        })
    );
}
