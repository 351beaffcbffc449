//! The dense codec: every value on the grid of the sums, strict bytes, and a round of one peer that ends where its steps did.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use trainer::aggregate::{Weighted, aggregate_with};
use trainer::apply::{OuterRate, apply_with};
use trainer::bench_codec::heavy_tailed;
use trainer::compress::{AnyCodec, Codec, CodecError, DecodeError, DenseCodec, MAX_SHARD_BYTES, SparseCodec};

fn encode(delta: &[f32]) -> Vec<Vec<u8>> {
    let codec = DenseCodec::new(delta.len()).unwrap();
    codec.encode_with(&[], delta, 2).unwrap().shards
}

fn weighted(tokens: u64, shards: &[Vec<u8>]) -> Weighted<'_, Vec<u8>> {
    Weighted { tokens, shards }
}

proptest! {
    #[test]
    fn values_lose_less_than_half_a_unit_and_decode_to_what_was_sent(
        delta in prop::collection::vec(prop_oneof![any::<f32>(), -1e-3f32..1e-3, Just(-0.0f32)], 1..300)
    ) {
        let codec = DenseCodec::new(delta.len()).unwrap();
        match codec.encode_with(&[], &delta, 1) {
            Ok(encoded) => {
                prop_assert!(encoded.accumulator.iter().all(|value| value.to_bits() == 0));
                let sent = codec.to_dense(&encoded.shards).unwrap();
                for (sent, value) in sent.iter().zip(&delta) {
                    let wanted = f64::from(*value).clamp(-15.999_999_046_325_684, 15.999_999_046_325_684);
                    prop_assert!((f64::from(*sent) - wanted).abs() <= 2f64.powi(-33));
                }
                prop_assert_eq!(encode(&sent), encoded.shards, "one content has one encoding");
            }
            Err(CodecError::NotFinite { index, .. }) => prop_assert!(!delta[index].is_finite()),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn bytes_that_pass_the_check_are_those_that_an_encoder_writes(
        bytes in prop::collection::vec(any::<u8>(), 0..120), edit in 0usize..3
    ) {
        let params = bytes.len() / 4;
        prop_assume!(params > 0);
        let mut shard = vec![1, 2, 0, 0];
        shard.extend(&bytes[..bytes.len() - edit.min(bytes.len() % 4)]);
        let codec = AnyCodec::Dense(DenseCodec::new(params).unwrap());
        let shards = [shard];
        let sum = aggregate_with(&codec, &[weighted(3, &shards)], 1);
        match codec.check(&shards) {
            Ok(()) => {
                prop_assert!(sum.is_ok());
                prop_assert_eq!(encode(&codec.to_dense(&shards).unwrap()), shards);
            }
            Err(error) => {
                prop_assert!(sum.is_err());
                prop_assert_eq!(codec.to_dense(&shards).unwrap_err(), error);
            }
        }
    }
}

#[test]
fn damage_is_named() {
    let good = encode(&[0.5, -0.25]);
    let codec = DenseCodec::new(2).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut shards = good.clone();
        change(&mut shards);
        codec.check(&shards).unwrap_err()
    };
    let value = |value: f32| refused(&move |shards| shards[0][8..].copy_from_slice(&value.to_le_bytes()));
    for bad in [f32::NAN, f32::INFINITY, 16.0, -16.0, -0.0, 1e-12, f32::MIN_POSITIVE] {
        assert_eq!(
            value(bad),
            DecodeError::Value {
                param: 1,
                bits: bad.to_bits()
            }
        );
    }
    assert_eq!(
        value(20.0).to_string(),
        "parameter 1 is 20, not a multiple of 2^-32 below 16 in magnitude"
    );
    let sparse = refused(&|shards| shards[0][1] = 1);
    assert!(matches!(sparse, DecodeError::Header { shard: 0, .. }));
    let short = refused(&|shards| shards[0].truncate(9));
    assert_eq!(
        short,
        DecodeError::ShardLength {
            shard: 0,
            expected: 12,
            found: 9
        }
    );
    let missing = refused(&|shards| shards.clear());
    assert_eq!(missing, DecodeError::ShardCount { expected: 1, found: 0 });
}

#[test]
fn a_large_model_is_cut_into_shards_and_sums_alike_on_any_threads() {
    let params = 3 * (1 << 18) * 2 + 12_345;
    let codec = AnyCodec::Dense(DenseCodec::new(params).unwrap());
    let (a, b) = (encode(&heavy_tailed(params, 1)), encode(&heavy_tailed(params, 2)));
    assert_eq!(a.len(), 3);
    assert!(a.iter().all(|shard| shard.len() <= MAX_SHARD_BYTES));
    assert_eq!(
        a.iter().map(|shard| shard.len() as u64).sum::<u64>(),
        codec.max_total_bytes()
    );
    let of = |pair: [(u64, &Vec<Vec<u8>>); 2], threads| {
        aggregate_with(&codec, &pair.map(|(tokens, shards)| weighted(tokens, shards)), threads).unwrap()
    };
    let first = of([(3000, &a), (1000, &b)], 1);
    for threads in 2..6 {
        let other = of([(1000, &b), (3000, &a)], threads);
        assert!(other.sums() == first.sums() && other.total_weight() == 4000);
    }
    // The exact mean, written out: whole units, so no rounding but that of the clip.
    let (da, db) = (codec.to_dense(&a).unwrap(), codec.to_dense(&b).unwrap());
    let clips = first
        .shares()
        .iter()
        .map(|share| u128::from(share.clip))
        .collect::<Vec<_>>();
    let term = |value: f32, clip: u128, weight: u128| {
        let units = (f64::from(value) * 2f64.powi(32)) as i64;
        let magnitude = ((u128::from(units.unsigned_abs()) * clip * weight) >> 32) as i64;
        magnitude * units.signum()
    };
    let sums = da
        .iter()
        .zip(&db)
        .map(|(a, b)| term(*a, clips[0], 3000) + term(*b, clips[1], 1000));
    assert!(sums.eq(first.sums().iter().copied()));
}

#[test]
fn one_peer_ends_where_its_steps_did() {
    let theta: Vec<f32> = heavy_tailed(10_000, 5);
    let local: Vec<f32> = theta
        .iter()
        .zip(heavy_tailed(10_000, 6))
        .map(|(theta, step)| theta - 0.01 * step)
        .collect();
    let delta: Vec<f32> = theta.iter().zip(&local).map(|(theta, local)| theta - local).collect();
    let codec = AnyCodec::Dense(DenseCodec::new(delta.len()).unwrap());
    let update = aggregate_with(&codec, &[weighted(15_360, &encode(&delta))], 2).unwrap();
    let mut moved = theta.clone();
    apply_with(&mut moved, &update, OuterRate::new(1.0).unwrap(), 2).unwrap();
    for ((moved, local), theta) in moved.iter().zip(&local).zip(&theta) {
        // Half a unit of the grid, and the rounding of the subtractions at the size of the parameter.
        let bound = 2f32.powi(-33) + theta.abs().max(local.abs()) * f32::EPSILON;
        assert!((moved - local).abs() <= bound, "{moved} {local}");
    }
}

#[test]
fn a_contribution_of_the_other_codec_is_refused() {
    let delta = heavy_tailed(4096, 3);
    let sparse = SparseCodec::new(4096, 4096, 4096, 0.0).unwrap();
    let dense = DenseCodec::new(4096).unwrap();
    assert!(Codec::check(&sparse, &encode(&delta)).is_err());
    assert!(
        dense
            .check(&sparse.encode(&vec![0.0; 4096], &delta).unwrap().shards)
            .is_err()
    );
}
