//! Strangers' bytes as a message: never a panic, and whatever the strict decoder lets through is canonical.
//!
//! The bytes are read as they are, and once more as the payload of a frame whose header is right, with the first byte as its kind,
//! so that the fuzzer need not find a header before it reaches the encodings. Signatures are the simulator's keyed hash for the
//! second reading: no fuzzer signs.
#![no_main]

use coordinatorless::ticket::Ticket;
use coordinatorless::types::RunId;
use coordinatorless::wire::{Keys, Scheme, Signed, VERSION};
use libfuzzer_sys::fuzz_target;

/// The signing context of each kind, as `wire.rs` names them; kinds not listed are refused before the signature matters.
const KINDS: [(u8, &str); 9] = [
    (1, "commit"),
    (2, "have"),
    (3, "proposal"),
    (4, "vote"),
    (5, "join"),
    (6, "leave"),
    (7, "verdict"),
    (8, "regroup"),
    (9, "evidence"),
];

fuzz_target!(|bytes: &[u8]| {
    if let Ok(signed) = Signed::from_frame(bytes, Scheme::Ed25519) {
        assert_eq!(signed.to_frame(), bytes, "one message has one encoding");
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<Ticket>();
    }
    let Some((first, payload)) = bytes.split_first() else {
        return;
    };
    let (kind, name) = KINDS[usize::from(*first) % KINDS.len()];
    let frame = framed(kind, name, payload);
    if let Ok(signed) = Signed::from_frame(&frame, Scheme::KeyedHash) {
        assert_eq!(signed.to_frame(), frame, "one message has one encoding");
        let (me, run) = (signed.signer, signed.body.slot().run);
        let read = Signed::from_link(&signed.to_link(me, run), me, run, Scheme::KeyedHash);
        assert_eq!(read.as_ref(), Ok(&signed), "a link carries it whole");
    }
    let stranger = Keys::new([6; 32], Scheme::KeyedHash).id();
    let _ = Signed::from_link(bytes, stranger, RunId([7; 32]), Scheme::KeyedHash);
});

/// A frame around `payload` whose keyed-hash signature holds.
fn framed(kind: u8, name: &str, payload: &[u8]) -> Vec<u8> {
    let id = Keys::new([5; 32], Scheme::KeyedHash).id();
    let digest = blake3::derive_key(&format!("murmur/v1/{name}"), payload);
    let mut signature = [0; 64];
    blake3::Hasher::new_keyed(&id.0)
        .update(&digest)
        .finalize_xof()
        .fill(&mut signature);
    let mut frame = VERSION.to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(&id.0);
    frame.extend_from_slice(&signature);
    frame.extend_from_slice(payload);
    frame
}
