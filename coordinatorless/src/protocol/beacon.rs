//! The run's randomness (R23): each record's original proposer adds a VRF output over the last seed, which it can neither choose
//! nor withhold without losing its turn. Certificates never enter the seed: whoever assembles one could grind it.

//!
//! The same keys draw auditors (R24, [`super::audit`]), each with a lot of its own that nobody else can compute.

use schnorrkel::vrf::{VRFInOut, VRFPreOut, VRFProof};

use crate::types::*;
use crate::wire::{Keys, Scheme};

/// A peer's VRF key pair, derived from its one secret in a context of its own (R1).
pub struct VrfKeys {
    scheme: Scheme,
    pair: schnorrkel::Keypair,
}

impl VrfKeys {
    /// Derives the pair.
    pub fn derive(keys: &Keys) -> Self {
        let seed = blake3::derive_key("murmur/v1/vrf-key", &keys.secret());
        let mini = schnorrkel::MiniSecretKey::from_bytes(&seed)
            .unwrap_or_else(|_| unreachable!("every string of 32 bytes is a schnorrkel mini secret"));
        let pair = mini.expand_to_keypair(schnorrkel::ExpansionMode::Ed25519);
        Self {
            scheme: keys.scheme(),
            pair,
        }
    }

    /// The public key, as announced in a join or the genesis.
    pub fn public(&self) -> [u8; 32] {
        self.pair.public.to_bytes()
    }

    /// This peer's lot for the audit of `member`'s work in `round`, with its proof, if `drawn` says of its value that it is one.
    pub fn lot(&self, seed: &[u8; 32], round: Round, member: &PeerId, drawn: impl FnOnce(u64) -> bool) -> Option<Lot> {
        let message = lot_message(seed, round, member);
        if self.scheme == Scheme::KeyedHash {
            let output = hashed(&self.public(), &message);
            let proof = Signature([0; 64]);
            return drawn(lot_value(&message, &output)).then_some(Lot { output, proof });
        }
        let mut drawn = Some(drawn);
        let check = |out: &VRFInOut| {
            let value = lot_value(&message, &out.to_preout().to_bytes());
            drawn.take().is_some_and(|drawn| drawn(value))
        };
        let (output, proof, _) = self.pair.vrf_sign_after_check(lot_transcript(&message), check)?;
        Some(Lot {
            output: output.to_preout().to_bytes(),
            proof: Signature(proof.to_bytes()),
        })
    }

    /// The beacon for a record that this peer is first to propose.
    pub fn beacon(&self, proposer: PeerId, seed: &[u8; 32], round: Round, view: View) -> Beacon {
        let message = message(seed, round, view);
        if self.scheme == Scheme::KeyedHash {
            return Beacon {
                proposer,
                view,
                output: hashed(&self.public(), &message),
                proof: Signature([0; 64]),
            };
        }
        let (output, proof, _) = self.pair.vrf_sign(transcript(&message));
        Beacon {
            proposer,
            view,
            output: output.to_preout().to_bytes(),
            proof: Signature(proof.to_bytes()),
        }
    }
}

/// Whether `beacon` is the one output that the holder of `vrf_key` can give here.
pub fn verify(beacon: &Beacon, vrf_key: &[u8; 32], seed: &[u8; 32], round: Round, scheme: Scheme) -> bool {
    let message = message(seed, round, beacon.view);
    if scheme == Scheme::KeyedHash {
        return beacon.output == hashed(vrf_key, &message) && beacon.proof == Signature([0; 64]);
    }
    let (Ok(key), Ok(output), Ok(proof)) = (
        schnorrkel::PublicKey::from_bytes(vrf_key),
        VRFPreOut::from_bytes(&beacon.output),
        VRFProof::from_bytes(&beacon.proof.0),
    ) else {
        return false;
    };
    key.vrf_verify(transcript(&message), &output, &proof).is_ok()
}

/// The value of a lot, uniform over 64 bits; `None` if it is not the one that the holder of `vrf_key` has here.
pub fn verify_lot(
    lot: &Lot,
    vrf_key: &[u8; 32],
    seed: &[u8; 32],
    round: Round,
    member: &PeerId,
    scheme: Scheme,
) -> Option<u64> {
    let message = lot_message(seed, round, member);
    let value = lot_value(&message, &lot.output);
    if scheme == Scheme::KeyedHash {
        return (lot.output == hashed(vrf_key, &message) && lot.proof == Signature([0; 64])).then_some(value);
    }
    let key = schnorrkel::PublicKey::from_bytes(vrf_key).ok()?;
    let output = VRFPreOut::from_bytes(&lot.output).ok()?;
    let proof = VRFProof::from_bytes(&lot.proof.0).ok()?;
    let verified = key.vrf_verify(lot_transcript(&message), &output, &proof);
    verified.is_ok().then_some(value)
}

fn lot_message(seed: &[u8; 32], round: Round, member: &PeerId) -> Vec<u8> {
    [&b"audit"[..], &seed[..], &round.0.to_le_bytes(), &member.0[..]].concat()
}

fn lot_transcript(message: &[u8]) -> impl schnorrkel::context::SigningTranscript {
    schnorrkel::signing_context(b"murmur/v1/audit-lot").bytes(message)
}

/// The output is one point of a group for each key and message; its hash is uniform.
fn lot_value(message: &[u8], output: &[u8; 32]) -> u64 {
    let hash = blake3::derive_key("murmur/v1/audit-lot", &[message, &output[..]].concat());
    hash.first_chunk().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes))
}

/// The seed after a record: `H(seed before ‖ output)`.
pub fn next_seed(seed: &[u8; 32], output: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("murmur/v1/seed", &[&seed[..], &output[..]].concat())
}

fn message(seed: &[u8; 32], round: Round, view: View) -> Vec<u8> {
    [&seed[..], &round.0.to_le_bytes(), &view.to_le_bytes()].concat()
}

fn transcript(message: &[u8]) -> impl schnorrkel::context::SigningTranscript {
    schnorrkel::signing_context(b"murmur/v1/beacon").bytes(message)
}

/// The simulator's stand-in: nobody there grinds.
fn hashed(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(key, message).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beacon_verifies_only_for_its_key_seed_round_and_view() {
        for scheme in [Scheme::Ed25519, Scheme::KeyedHash] {
            let keys = Keys::new([7; 32], scheme);
            let vrf = VrfKeys::derive(&keys);
            let other = VrfKeys::derive(&Keys::new([8; 32], scheme));
            let (seed, round) = ([1; 32], Round(5));
            let beacon = vrf.beacon(keys.id(), &seed, round, 0);
            assert!(verify(&beacon, &vrf.public(), &seed, round, scheme));
            assert!(!verify(&beacon, &other.public(), &seed, round, scheme));
            assert!(!verify(&beacon, &vrf.public(), &[2; 32], round, scheme));
            assert!(!verify(&beacon, &vrf.public(), &seed, Round(6), scheme));
            assert!(!verify(
                &Beacon {
                    view: 1,
                    ..beacon.clone()
                },
                &vrf.public(),
                &seed,
                round,
                scheme
            ));
        }
    }

    #[test]
    fn the_output_is_the_same_whenever_it_is_computed() {
        let keys = Keys::new([7; 32], Scheme::Ed25519);
        let vrf = VrfKeys::derive(&keys);
        let one = vrf.beacon(keys.id(), &[1; 32], Round(5), 0);
        let two = vrf.beacon(keys.id(), &[1; 32], Round(5), 0);
        assert_eq!(one.output, two.output);
    }
}
