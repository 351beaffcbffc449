//! Strangers' bytes as the opening of an answer to a challenge: never a panic, and never a proof, since no fuzzer finds a root.
#![no_main]

use coordinatorless::types::{Hash, PeerId};
use gradient_verify::flops::{ChainSpec, Challenge, verify};
use libfuzzer_sys::fuzz_target;
use trainer::config::Precision;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else {
        return;
    };
    let precision = if first % 2 == 0 {
        Precision::Fp32
    } else {
        Precision::Bf16
    };
    let chains = [ChainSpec {
        side: 64,
        products: 2,
        depth: 1,
    }];
    let challenge = Challenge::new(PeerId([1; 32]), &[2; 32], precision, &chains).expect("within bounds");
    // As many bytes as the draws take, so that lengths need not be guessed.
    for length in [rest.len(), 64 * 4 * 2 + 5 * 32, 2 * (64 * 4 * 2 + 5 * 32)] {
        let opening: Vec<u8> = rest
            .iter()
            .copied()
            .cycle()
            .take(if rest.is_empty() { 0 } else { length })
            .collect();
        assert!(verify(&challenge, &Hash([3; 32]), &[4; 32], 1, &opening).is_err());
    }
});
