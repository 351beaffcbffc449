//! Strangers' bytes as a contribution: never a panic, and whatever the strict decoder lets through is canonical.
//!
//! The first byte chooses a codec, the rest is its one shard: as it is, and once more behind a header that is right, so that
//! the fuzzer need not find out lengths before it reaches the bits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trainer::aggregate::{Weighted, aggregate_with};
use trainer::compress::{Codec, DenseCodec, Int8Codec, LevelsCodec, Quantizer, SparseCodec};

/// Parameters, chunk and k: short chunks, k = chunk, one block, several blocks.
const CODECS: [(usize, usize, usize); 6] = [
    (1, 64, 1),
    (100, 64, 5),
    (600, 64, 64),
    (4096, 4096, 64),
    (5000, 1024, 16),
    (64 * 64 * 2 + 9, 64, 3),
];

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let (params, chunk, k) = CODECS[usize::from(*first) % CODECS.len()];
    let codec = SparseCodec::new(params, chunk, k, 0.95).expect("settings within bounds");
    hold(&codec, rest.to_vec());
    let mut framed = vec![1, 1, 0, 0];
    let blocks = params.div_ceil(64 * chunk);
    for block in 0..blocks {
        let length = rest.len() * (block + 1) / blocks - rest.len() * block / blocks;
        framed.extend((length as u32).to_le_bytes());
    }
    framed.extend(rest);
    for (quantizer, number) in [(Quantizer::Sign2, 4), (Quantizer::Raw, 5)] {
        let levels = LevelsCodec::new(params, chunk, k, 0.95, quantizer).expect("settings within bounds");
        framed[1] = number;
        hold_levels(&levels, framed.clone());
    }
    framed[1] = 1;
    hold(&codec, framed);
    hold_dense(params, rest);
    hold_int8(params, rest);
});

/// The same bytes with more said of each value: what passes the check can be summed.
fn hold_levels(codec: &LevelsCodec, shard: Vec<u8>) {
    let shards = [shard];
    let one = Weighted {
        tokens: u64::MAX,
        shards: &shards[..],
    };
    assert_eq!(aggregate_with(codec, &[one], 1).is_ok(), codec.check(&shards).is_ok());
}

/// The same bytes as eight bits of every value.
fn hold_int8(params: usize, bytes: &[u8]) {
    let codec = Int8Codec::new(params).expect("a model has parameters");
    let mut shard = vec![1, 3, 0, 0];
    let length = codec.max_total_bytes() as usize - shard.len();
    shard.extend(bytes.iter().cycle().take(if bytes.is_empty() { 0 } else { length }));
    let shards = [shard];
    if codec.check(&shards).is_ok() {
        let values = codec.to_dense(&shards).expect("what passes the check decodes");
        let again = codec.encode_with(&[], &values, 1).expect("what decodes is finite");
        assert_eq!(again.shards, shards, "one content has one encoding");
    }
}

/// The same bytes as every value of a model.
fn hold_dense(params: usize, bytes: &[u8]) {
    let codec = DenseCodec::new(params).expect("a model has parameters");
    let mut shard = vec![1, 2, 0, 0];
    shard.extend(bytes.iter().cycle().take(if bytes.is_empty() { 0 } else { 4 * params }));
    let shards = [shard];
    if codec.check(&shards).is_ok() {
        let values = codec.to_dense(&shards).expect("what passes the check decodes");
        let again = codec.encode_with(&[], &values, 1).expect("what decodes is finite");
        assert_eq!(again.shards, shards, "one content has one encoding");
    }
}

fn hold(codec: &SparseCodec, shard: Vec<u8>) {
    let shards = [shard];
    let sum = aggregate_with(
        codec,
        &[Weighted {
            tokens: u64::MAX,
            shards: &shards[..],
        }],
        1,
    );
    match codec.check(&shards) {
        Ok(()) => {
            let decoded = codec.decode(&shards).expect("what passes the check decodes");
            assert_eq!(
                codec.pack(&decoded).expect("of the same codec"),
                shards,
                "one content has one encoding"
            );
            assert!(sum.is_ok());
        }
        Err(error) => {
            assert_eq!(
                codec.decode(&shards).expect_err("what fails the check does not decode"),
                error
            );
            assert!(sum.is_err());
        }
    }
}
