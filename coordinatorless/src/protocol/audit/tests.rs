#![allow(clippy::unwrap_used)]
use super::*;
use crate::protocol::beacon::{VrfKeys, verify_lot};
use crate::wire::{Keys, Scheme};

const SCHEME: Scheme = Scheme::KeyedHash;

fn permille(audit_permille: u32) -> VerificationConfig {
    VerificationConfig {
        audit_permille,
        ..VerificationConfig::default()
    }
}

/// Auditors of these weights, their keys by id.
fn auditors(weights: &[u64]) -> (Vec<(PeerId, VrfKeys)>, Auditable) {
    let mut keys: Vec<Keys> = (0..weights.len())
        .map(|n| Keys::new([n as u8 + 1; 32], SCHEME))
        .collect();
    keys.sort_by_key(Keys::id);
    let weights = keys
        .iter()
        .zip(weights)
        .map(|(keys, weight)| (keys.id(), *weight))
        .collect();
    let auditable = Auditable {
        round: Round(7),
        seed: [0; 32],
        weights,
        answered: Vec::new(),
        work: Vec::new(),
        judged: Vec::new(),
        accused: Vec::new(),
    };
    let keys = keys.iter().map(|keys| (keys.id(), VrfKeys::derive(keys))).collect();
    (keys, auditable)
}

fn seed(of: u64) -> [u8; 32] {
    blake3::derive_key("a seed of this test", &of.to_le_bytes())
}

#[test]
fn over_a_hundred_thousand_draws_each_auditor_has_its_weights_share() {
    const DRAWS: u64 = 100_000;
    let weights = [1000, 1000, 1000, 1000, 500, 500, 250, 2000, 1000, 1750];
    let (keys, mut auditable) = auditors(&weights);
    let verification = permille(100);
    // The audited member has no weight itself: a newcomer.
    let member = PeerId([99; 32]);
    let total: u64 = weights.iter().sum();
    let mut drawn = vec![0u64; weights.len()];
    for draw in 0..DRAWS {
        auditable.seed = seed(draw);
        for (at, (id, vrf)) in keys.iter().enumerate() {
            let hit = |lot| auditable.draws(&verification, id, &member, lot);
            drawn[at] += u64::from(vrf.lot(&auditable.seed, auditable.round, &member, hit).is_some());
        }
    }
    // Each count is binomial: 10% of the draws, shared out by weight. The sum of their squared standard deviations from that is
    // chi-squared with ten degrees of freedom: above 29.6 in one of a thousand cases.
    let chi_squared: f64 = drawn
        .iter()
        .zip(&weights)
        .map(|(drawn, weight)| {
            let chance = 0.1 * *weight as f64 / total as f64;
            let expected = chance * DRAWS as f64;
            (*drawn as f64 - expected).powi(2) / (expected * (1.0 - chance))
        })
        .sum();
    assert!(chi_squared < 29.6, "{chi_squared}: {drawn:?}");
    println!("chi-squared {chi_squared:.2} with 10 degrees of freedom; audits by auditor: {drawn:?}");
    let all: u64 = drawn.iter().sum();
    assert!(all.abs_diff(DRAWS / 10) < 400, "four standard deviations: {all}");
}

#[test]
fn an_audited_members_own_weight_lowers_its_rate_by_nothing() {
    // Whoever has half of the weight is audited by the others at the full rate all the same, and never by itself.
    let (keys, mut auditable) = auditors(&[4000, 1000, 1000, 1000, 1000]);
    let (member, verification) = (keys[0].0, permille(200));
    let mut audits = 0;
    for draw in 0..20_000 {
        auditable.seed = seed(draw);
        for (id, vrf) in &keys {
            let hit = |lot| auditable.draws(&verification, id, &member, lot);
            let lot = vrf.lot(&auditable.seed, auditable.round, &member, hit);
            assert!(lot.is_none() || *id != member);
            audits += u64::from(lot.is_some());
        }
    }
    // Binomial, 20,000 times four chances of 5%: 4000, with a standard deviation of 62.
    assert!((3750..4250).contains(&audits), "{audits}");
}

#[test]
fn a_million_tries_at_the_seed_leave_the_audit_rate_of_the_others_as_it_is() {
    const ROUNDS: u64 = 1000;
    const TRIES: u64 = 1000;
    // Three of ten collude: they know each other's lots, and take the seed that draws the most of them and so the fewest others, they hope.
    let (keys, mut auditable) = auditors(&[1000; 11]);
    let (member, verification) = (keys[10].0, permille(300));
    let (gang, honest) = keys[..10].split_at(3);
    let drawn = |auditable: &Auditable, (id, vrf): &(PeerId, VrfKeys)| {
        let hit = |lot| auditable.draws(&verification, id, &member, lot);
        vrf.lot(&auditable.seed, auditable.round, &member, hit).is_some()
    };
    let (mut by_gang, mut by_honest) = (0, 0);
    for round in 0..ROUNDS {
        let tries = (0..TRIES).map(|at| seed(round * TRIES + at));
        let best = tries.max_by_key(|seed| {
            auditable.seed = *seed;
            gang.iter().filter(|one| drawn(&auditable, one)).count()
        });
        auditable.seed = best.unwrap();
        by_gang += gang.iter().filter(|one| drawn(&auditable, one)).count();
        by_honest += honest.iter().filter(|one| drawn(&auditable, one)).count();
    }
    println!(
        "{} seeds tried: honest auditors draw {by_honest} audits in {ROUNDS} rounds, 210 expected",
        ROUNDS * TRIES
    );
    assert!(by_gang > 1500, "the gang did choose: {by_gang}");
    // 1000 rounds of seven chances of 3%: 210, with a standard deviation of 14.
    assert!(
        (154..=266).contains(&by_honest),
        "four standard deviations: {by_honest}"
    );
}

#[test]
fn a_lot_proves_itself_for_its_key_seed_round_and_member_alone() {
    for scheme in [Scheme::Ed25519, Scheme::KeyedHash] {
        let vrf = VrfKeys::derive(&Keys::new([7; 32], scheme));
        let other = VrfKeys::derive(&Keys::new([8; 32], scheme));
        let (seed, round, member) = ([1; 32], Round(5), PeerId([2; 32]));
        let mut seen = None;
        let lot = vrf.lot(&seed, round, &member, |value| {
            seen = Some(value);
            true
        });
        let lot = lot.unwrap();
        let (mine, theirs) = (vrf.public(), other.public());
        let read = |lot: &Lot, key: &[u8; 32], seed: &[u8; 32], round, member: &PeerId| {
            verify_lot(lot, key, seed, round, member, scheme)
        };
        assert_eq!(read(&lot, &mine, &seed, round, &member), seen);
        assert_eq!(read(&lot, &theirs, &seed, round, &member), None);
        assert_eq!(read(&lot, &mine, &[2; 32], round, &member), None);
        assert_eq!(read(&lot, &mine, &seed, Round(6), &member), None);
        assert_eq!(read(&lot, &mine, &seed, round, &PeerId([3; 32])), None);
        let mut forged = lot.clone();
        forged.output[0] ^= 1;
        assert_eq!(read(&forged, &mine, &seed, round, &member), None);
        let mut forged = lot;
        forged.proof.0[9] ^= 1;
        assert_eq!(read(&forged, &mine, &seed, round, &member), None);
        assert!(vrf.lot(&seed, round, &member, |_| false).is_none());
    }
}
