//! Proofs of speed, as the chain has them.

use super::*;
use crate::protocol::speed::{CLAIM_ROUNDS, MAX_TESTS, OPEN_ROUNDS, operations};

const SECS: f64 = 2.0;

fn run(every: u64) -> Run {
    let mut run = Run::new();
    run.config.verification.speed_secs = SECS;
    run.config.verification.speed_every = every;
    run.config.timing.train_secs = 60.0;
    run.config.validate().unwrap();
    run.chain = ChainState::genesis(&run.config);
    run
}

fn products(products: u32) -> Vec<SpeedChain> {
    vec![SpeedChain {
        side: 512,
        products,
        depth: 4,
    }]
}

impl Run {
    fn keys_of(&self, member: &PeerId) -> &Keys {
        self.keys.iter().find(|keys| keys.id() == *member).unwrap()
    }

    fn claim(&self, member: &PeerId, chains: Vec<SpeedChain>) -> SpeedStep {
        let asked = self.chain.speed_test(member).map_or(Round(0), |test| test.asked);
        let claim = SpeedClaim {
            slot: Slot {
                round: asked.next(),
                ..self.chain.next_slot()
            },
            chains,
            root: Hash::of(b"root"),
        };
        let signed = self.keys_of(member).sign(&Body::Speed(claim.clone()));
        SpeedStep::Claimed(*member, claim, signed.signature)
    }

    fn apply_with(&mut self, mut speeds: Vec<SpeedStep>) -> Result<Vec<Notice>, RuleViolation> {
        speeds.sort_by_key(SpeedStep::member);
        let record = Record {
            speeds,
            ..self.record()
        };
        let (next, notices) = self.chain.apply(&self.config, &record, SCHEME)?;
        self.chain = next;
        Ok(notices)
    }

    fn asked_for(&self) -> Vec<PeerId> {
        self.chain.agreed.speeds.iter().map(|test| test.member).collect()
    }
}

#[test]
fn nobody_is_asked_where_the_run_does_not_ask() {
    let mut run = Run::new();
    run.apply_with(Vec::new()).unwrap();
    assert_eq!(run.asked_for(), []);
    let step = run.claim(&run.keys[0].id(), products(4));
    assert!(run.apply_with(vec![step]).is_err());
}

#[test]
fn the_first_record_asks_everyone_but_its_proposer_and_a_proof_takes_three_more() {
    let mut run = run(1 << 20);
    let first = run.record();
    run.apply_with(Vec::new()).unwrap();
    let asked = run.asked_for();
    assert_eq!(asked.len(), 3);
    assert!(!asked.contains(&first.beacon.proposer), "it knew the seed before");

    let who = asked[0];
    assert!(
        run.apply_with(vec![SpeedStep::Proven(who)]).is_err(),
        "nothing was claimed"
    );
    let step = run.claim(&who, products(400));
    run.apply_with(vec![step.clone()]).unwrap();
    let seed_of_the_claim = run.chain.agreed.seed;
    assert_eq!(run.chain.speed_test(&who).unwrap().drawn, None);
    assert!(run.apply_with(vec![step]).is_err(), "claimed already");
    assert!(
        run.apply_with(vec![SpeedStep::Proven(who)]).is_err(),
        "nothing was drawn"
    );
    run.apply_with(Vec::new()).unwrap();
    let drawn = run.chain.speed_test(&who).unwrap().drawn.unwrap();
    assert_eq!(drawn.seed, run.chain.agreed.seed);
    assert_ne!(drawn.seed, seed_of_the_claim, "the claim was fixed before it");

    let notices = run.apply_with(vec![SpeedStep::Proven(who)]).unwrap();
    let expected = u64::try_from(operations(&products(400)) / 2_000_000).unwrap();
    assert_eq!(expected, 2 * 400 * 512 * 512 * 512 / 2_000_000);
    let told = notices.iter().any(
        |notice| matches!(notice, Notice::Speed { member, proven: Some(shown), .. } if (*member, *shown) == (who, expected)),
    );
    assert!(told, "{notices:?}");
    let member = run.chain.member(&who).unwrap();
    assert_eq!((member.proven, member.owes), (expected, false));
    assert_eq!(run.chain.speed_test(&who), None);
}

#[test]
fn what_is_asked_for_follows_from_what_others_found_and_not_from_the_beacon_alone() {
    let run = run(1 << 20);
    let asked = |batches: u64| {
        let all = (0..4)
            .map(|member| run.sign(member, run.commit(member, batches)))
            .collect();
        let record = run.record_of(all, Vec::new(), Vec::new());
        let (next, _) = run.apply(&record).unwrap();
        (next.agreed.seed, next.agreed.speeds)
    };
    let ((seed, one), (same, other)) = (asked(1), asked(2));
    assert_eq!(seed, same, "of one proposer");
    assert_eq!(one.len(), 3);
    assert!(
        one.iter()
            .zip(&other)
            .all(|(one, other)| one.member == other.member && one.seed != other.seed)
    );
    assert!(one.iter().all(|test| test.seed != seed));
}

#[test]
fn claims_that_break_a_rule_are_refused() {
    let mut run = run(1 << 20);
    run.apply_with(Vec::new()).unwrap();
    let who = run.asked_for()[0];
    let with = |side, products, depth| vec![SpeedChain { side, products, depth }];
    let odd = [
        Vec::new(),
        vec![products(4)[0]; 5],
        with(63, 4, 4),
        with(66, 4, 4),
        with(4100, 4, 4),
        with(4096, 8, 8),
        with(512, 6, 4),
        with(512, 0, 4),
        with(512, 4, 0),
        with(512, u32::MAX, 1),
        with(u32::MAX, u32::MAX, u32::MAX),
        with(4096, 2, 2),
        with(1 << 31, 4, 4),
    ];
    for chains in odd {
        let step = run.claim(&who, chains.clone());
        assert!(run.apply_with(vec![step]).is_err(), "{chains:?}");
    }
    let SpeedStep::Claimed(_, claim, signature) = run.claim(&who, products(4)) else {
        unreachable!()
    };
    let other = *run.asked_for().last().unwrap();
    let changed = SpeedClaim {
        root: Hash::of(b"another"),
        ..claim.clone()
    };
    let later = SpeedClaim {
        slot: Slot {
            round: claim.slot.round.next(),
            ..claim.slot
        },
        ..claim.clone()
    };
    let late = run.keys_of(&who).sign(&Body::Speed(later.clone())).signature;
    for step in [
        SpeedStep::Claimed(who, changed, signature),
        SpeedStep::Claimed(other, claim.clone(), signature),
        SpeedStep::Claimed(who, later, late),
    ] {
        assert!(run.apply_with(vec![step]).is_err());
    }
    let step = SpeedStep::Claimed(who, claim, signature);
    assert!(run.apply_with(vec![step.clone(), step.clone()]).is_err(), "repeated");
    run.apply_with(vec![step]).unwrap();
}

#[test]
fn who_shows_nothing_owes_and_its_multiplier_stands_still_until_it_does() {
    let mut run = run(1);
    run.apply_with(Vec::new()).unwrap();
    let (idle, sealed) = (run.asked_for()[0], run.asked_for()[1]);
    let lived = |run: &Run, id: &PeerId| run.chain.ledger.get(id).unwrap().lived;
    let step = run.claim(&sealed, products(4));
    run.apply_with(vec![step]).unwrap();
    // Asked after the first record: `CLAIM_ROUNDS` later it is over for who claimed nothing.
    for _ in 1..CLAIM_ROUNDS {
        assert!(!run.chain.member(&idle).unwrap().owes);
        run.apply_with(Vec::new()).unwrap();
    }
    assert!(run.chain.member(&idle).unwrap().owes);
    assert!(!run.chain.member(&sealed).unwrap().owes, "it may still open");
    let before = lived(&run, &idle);
    run.apply_with(Vec::new()).unwrap();
    assert_eq!(lived(&run, &idle), before);
    assert_eq!(lived(&run, &sealed), before + 1);
    for _ in 0..OPEN_ROUNDS {
        run.apply_with(Vec::new()).unwrap();
    }
    assert!(run.chain.member(&sealed).unwrap().owes);
    // Everyone is asked again in each of these records, so the next proof is at hand.
    while run
        .chain
        .speed_test(&idle)
        .is_none_or(|test| test.asked != run.chain.agreed.round)
    {
        run.apply_with(Vec::new()).unwrap();
    }
    let step = run.claim(&idle, products(4));
    run.apply_with(vec![step]).unwrap();
    run.apply_with(Vec::new()).unwrap();
    run.apply_with(vec![SpeedStep::Proven(idle)]).unwrap();
    assert!(!run.chain.member(&idle).unwrap().owes);
    let before = lived(&run, &idle);
    run.apply_with(Vec::new()).unwrap();
    assert_eq!(lived(&run, &idle), before + 1);
}

#[test]
fn a_newcomer_is_asked_at_once_and_given_what_it_has_shown() {
    let mut run = run(1 << 20);
    run.apply_with(Vec::new()).unwrap();
    let founders = run.asked_for();
    let claims = founders.iter().map(|id| run.claim(id, products(400))).collect();
    run.apply_with(claims).unwrap();
    run.apply_with(Vec::new()).unwrap();
    run.apply_with(founders.iter().map(|id| SpeedStep::Proven(*id)).collect())
        .unwrap();
    assert_eq!(run.asked_for(), []);

    // Three times as fast as they.
    let keys = Keys::new([9; 32], SCHEME);
    let join = Join {
        slot: Slot {
            round: run.chain.agreed.round,
            ..run.chain.next_slot()
        },
        vrf_key: VrfKeys::derive(&keys).public(),
        payout_address: String::new(),
    };
    let signature = keys.sign(&Body::Join(join.clone())).signature;
    let record = Record {
        changes: vec![Change::Join(join, keys.id(), signature)],
        ..run.record()
    };
    run.chain = run.chain.apply(&run.config, &record, SCHEME).unwrap().0;
    assert_eq!(run.asked_for(), [keys.id()]);
    run.keys.push(keys.clone());
    let step = run.claim(&keys.id(), products(1200));
    let speed = |run: &Run, id: &PeerId| run.chain.member(id).unwrap().speed;
    run.apply_with(vec![step]).unwrap();
    run.apply_with(Vec::new()).unwrap();
    run.apply_with(vec![SpeedStep::Proven(keys.id())]).unwrap();
    let (new, old) = (speed(&run, &keys.id()) as f64, speed(&run, &founders[0]) as f64);
    assert!((new / old - 3.0).abs() < 0.01, "{new} and {old}");
}

#[test]
fn of_many_some_are_asked_and_never_more_than_can_be_told_of() {
    let mut run = run(1);
    let template = run.record_of(Vec::new(), Vec::new(), Vec::new());
    for n in 0..40u8 {
        let id = Keys::new([n + 50; 32], SCHEME).id();
        let mut member = run.chain.agreed.members[0].clone();
        (member.id, member.joined) = (id, Round(0));
        let at = run.chain.agreed.members.partition_point(|other| other.id < id);
        run.chain.agreed.members.insert(at, member);
    }
    let mut seen = BTreeSet::new();
    for n in 0..30 {
        let speeds = run.chain.agreed.speeds.len();
        assert!(speeds <= MAX_TESTS);
        seen.extend(run.asked_for());
        let mut record = template.clone();
        (record.slot, record.beacon.output) = (run.chain.next_slot(), [n; 32]);
        run.chain = run.chain.advance(&run.config, &record).0;
    }
    assert!(seen.len() > 40, "{}", seen.len());
    run.chain.agreed.branch = 7;
    let survivors: Vec<PeerId> = run.chain.active().collect();
    assert!(!run.chain.agreed.speeds.is_empty());
    let next = run.chain.regrouped(&run.config, 8, &survivors);
    assert_eq!(next.agreed.speeds, [], "what the old branch asked");
}
