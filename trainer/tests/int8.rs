//! The eight-bit codec: what rounding may take, strict bytes, sums that equal what was sent.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use trainer::aggregate::{Weighted, aggregate_with};
use trainer::bench_codec::heavy_tailed;
use trainer::compress::{Codec, CodecError, DecodeError, Int8Codec};

fn encode(delta: &[f32]) -> Vec<Vec<u8>> {
    let codec = Int8Codec::new(delta.len()).unwrap();
    codec.encode_with(&[], delta, 2).unwrap().shards
}

proptest! {
    #[test]
    fn values_lose_at_most_half_a_step_and_have_one_encoding(
        delta in prop::collection::vec(prop_oneof![any::<f32>(), -1e-3f32..1e-3, -1e-9f32..1e-9, Just(-0.0f32)], 1..300)
    ) {
        let codec = Int8Codec::new(delta.len()).unwrap();
        match codec.encode_with(&[], &delta, 1) {
            Ok(encoded) => {
                codec.check(&encoded.shards).unwrap();
                let sent = codec.to_dense(&encoded.shards).unwrap();
                let largest = delta.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                // Steps are at most the 63.75th part of the largest value; below the unit of the sums everything rounds to it.
                let step = (f64::from(largest) / 63.75).max(2f64.powi(-32));
                for (sent, value) in sent.iter().zip(&delta).filter(|_| largest < 7.9) {
                    prop_assert!((f64::from(*sent) - f64::from(*value)).abs() <= step / 2.0 + 1e-12, "{} {}", sent, value);
                }
                prop_assert_eq!(encode(&sent), encoded.shards, "one content has one encoding");
            }
            Err(CodecError::NotFinite { index, .. }) => prop_assert!(!delta[index].is_finite()),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn bytes_that_pass_the_check_are_those_that_an_encoder_writes(
        code in 0u8..40, values in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>(), Just(127u8)], 1..100)
    ) {
        let mut shard = vec![1, 3, 0, 0, code];
        shard.extend(&values);
        let codec = Int8Codec::new(values.len()).unwrap();
        let shards = [shard];
        let sum = aggregate_with(&codec, &[Weighted { tokens: 3, shards: &shards }], 1);
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
fn a_scale_too_large_for_its_values_is_refused() {
    let codec = Int8Codec::new(3).unwrap();
    let refused = |bytes: [u8; 8]| codec.check(&[bytes]).unwrap_err();
    let steps = |code, largest| DecodeError::Steps {
        chunk: 0,
        code,
        largest,
    };
    assert_eq!(refused([1, 3, 0, 0, 5, 63, 0, 0]), steps(5, 63));
    assert_eq!(refused([1, 3, 0, 0, 0, 1, 0, 0]), steps(0, 1));
    assert_eq!(refused([1, 3, 0, 0, 1, 0, 0, 0]), steps(1, 0));
    assert_eq!(refused([1, 3, 0, 0, 30, 127, 0, 0]), steps(30, 127));
    assert_eq!(refused([1, 3, 0, 0, 9, 128, 0, 0]), steps(9, 128));
    codec.check(&[[1, 3, 0, 0, 9, 129, 0, 0]]).unwrap();
    assert!(codec.check(&[&[1, 3, 0, 0, 9, 127, 0][..]]).is_err());
    assert!(codec.check(&[&[1, 1, 0, 0, 9, 127, 0, 0][..]]).is_err());
}

#[test]
fn a_model_of_several_shards_sums_to_what_was_sent_on_any_number_of_threads() {
    let delta = heavy_tailed(4_200_000, 5);
    let codec = Int8Codec::new(delta.len()).unwrap();
    let shards = codec.encode_with(&[], &delta, 3).unwrap().shards;
    assert_eq!(shards.len(), 2);
    assert!(
        shards
            .iter()
            .all(|shard| shard.len() <= trainer::compress::MAX_SHARD_BYTES)
    );
    assert_eq!(
        shards.iter().map(Vec::len).sum::<usize>() as u64,
        codec.max_total_bytes()
    );
    assert_eq!(shards, codec.encode_with(&[], &delta, 1).unwrap().shards);
    let weighted = [
        Weighted {
            tokens: 7,
            shards: &shards,
        },
        Weighted {
            tokens: 7,
            shards: &shards,
        },
    ];
    let one = aggregate_with(&codec, &weighted, 1).unwrap();
    assert_eq!(one, aggregate_with(&codec, &weighted, 4).unwrap());
    let sent = codec.to_dense(&shards).unwrap();
    for (sum, sent) in one.sums().iter().zip(&sent) {
        assert_eq!(*sum, (f64::from(*sent) * 2f64.powi(32)) as i64 * 14);
    }
}
