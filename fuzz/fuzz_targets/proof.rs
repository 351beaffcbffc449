//! Strangers' bytes as a proof: never a panic, never memory out of proportion, and whatever the strict decoder lets through is canonical.
//!
//! The bytes are read as they are, and once more behind a beginning that is right, with the first byte as its kind, so that the fuzzer need
//! not find it before it reaches what follows.
#![no_main]

use gradient_verify::proof::{Proof, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    hold(bytes);
    if let Some((kind, rest)) = bytes.split_first() {
        let mut framed = b"MURMURPF\x01\x00".to_vec();
        framed.extend([1 + kind % 2, 0]);
        framed.extend_from_slice(rest);
        hold(&framed);
    }
});

fn hold(bytes: &[u8]) {
    match Proof::decode(bytes) {
        // No fuzzer signs.
        Ok(proof) => assert_eq!(
            encode(&proof.model, &proof.statement, None),
            bytes,
            "one proof has one encoding"
        ),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
