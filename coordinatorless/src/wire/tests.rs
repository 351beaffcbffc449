//! The wire against round trips, mutations and noise.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn hash() -> impl Strategy<Value = Hash> {
    any::<[u8; 32]>().prop_map(Hash)
}

fn peer() -> impl Strategy<Value = PeerId> {
    any::<[u8; 32]>().prop_map(PeerId)
}

fn signature() -> impl Strategy<Value = Signature> {
    any::<([u8; 32], [u8; 32])>().prop_map(|(r, s)| {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&r);
        bytes[32..].copy_from_slice(&s);
        Signature(bytes)
    })
}

fn slot() -> impl Strategy<Value = Slot> {
    (any::<[u8; 32]>(), any::<u32>(), any::<u64>(), any::<u32>()).prop_map(|(run, branch, round, view)| Slot {
        run: RunId(run),
        branch,
        round: Round(round),
        view,
    })
}

fn range() -> impl Strategy<Value = DataRange> {
    any::<(u64, u64, u8)>().prop_map(|(start, len, returns)| DataRange { start, len, returns })
}

fn commit() -> impl Strategy<Value = Commit> {
    let roots = (hash(), hash(), hash(), hash(), hash());
    (slot(), vec(hash(), 0..4), any::<(u64, u64, u64, u64)>(), roots).prop_map(|(slot, shards, numbers, roots)| {
        Commit {
            slot,
            base: Round(numbers.0),
            parent: roots.0,
            model_root: Hash::of(b"model"),
            blob: roots.1,
            shards,
            len: numbers.1,
            tokens: numbers.2,
            loss_micros: numbers.3,
            trace_root: roots.2,
            accumulator_before: roots.3,
            accumulator_after: roots.4,
        }
    })
}

fn join() -> impl Strategy<Value = Join> {
    (slot(), any::<[u8; 32]>(), "[a-z0-9]{0,64}").prop_map(|(slot, vrf_key, payout_address)| Join {
        slot,
        vrf_key,
        payout_address,
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (join(), peer(), signature()).prop_map(|(join, peer, signature)| Change::Join(join, peer, signature)),
        (slot(), peer(), signature()).prop_map(|(slot, peer, signature)| Change::Leave(
            Leave { slot },
            peer,
            signature
        )),
        peer().prop_map(Change::Lapse),
    ]
}

fn verdict() -> impl Strategy<Value = Verdict> {
    let finding = prop_oneof![Just(Finding::Agrees), Just(Finding::Differs), Just(Finding::Unanswered)];
    let lot = option::of((any::<[u8; 32]>(), signature()).prop_map(|(output, proof)| Lot { output, proof }));
    let trace = || vec(any::<[u8; 12]>(), 0..4).prop_map(Trace);
    let shown = (any::<[u8; 32]>(), trace(), trace(), signature());
    let replayed = option::of(shown.prop_map(|(salt, trace, claimed, answer)| Replayed {
        salt,
        trace,
        claimed,
        answer,
    }));
    let parts = (slot(), peer(), any::<(u8, u64, u64)>(), finding, lot, replayed);
    parts.prop_map(|(slot, member, numbers, finding, lot, replayed)| Verdict {
        slot,
        member,
        draw: numbers.0,
        lot,
        finding,
        distance_nanos: numbers.1,
        bound_nanos: numbers.2,
        replayed,
    })
}

fn speed_claim() -> impl Strategy<Value = SpeedClaim> {
    let chain = any::<(u32, u32, u32)>().prop_map(|(side, products, depth)| SpeedChain { side, products, depth });
    (slot(), vec(chain, 0..4), hash()).prop_map(|(slot, chains, root)| SpeedClaim { slot, chains, root })
}

fn speed_step() -> impl Strategy<Value = SpeedStep> {
    prop_oneof![
        (peer(), speed_claim(), signature())
            .prop_map(|(peer, claim, signature)| { SpeedStep::Claimed(peer, claim, signature) }),
        peer().prop_map(SpeedStep::Proven),
    ]
}

fn record() -> impl Strategy<Value = Record> {
    let contribution = (peer(), commit(), signature()).prop_map(|(member, commit, signature)| Contribution {
        member,
        commit,
        signature,
    });
    let signed = (peer(), verdict(), signature()).prop_map(|(auditor, verdict, signature)| SignedVerdict {
        auditor,
        verdict,
        signature,
    });
    let lists = (
        vec(change(), 0..3),
        vec(contribution, 0..3),
        vec(range(), 0..3),
        vec(range(), 0..3),
        vec(signed, 0..3),
        vec(evidence(), 0..3),
        vec(speed_step(), 0..3),
    );
    let beacon = (peer(), any::<u32>(), any::<[u8; 32]>(), signature());
    let beacon = beacon.prop_map(|(proposer, view, output, proof)| Beacon {
        proposer,
        view,
        output,
        proof,
    });
    let roots = (hash(), hash(), hash(), hash());
    let carried = (polka(), vec(any::<u8>(), 0..9)).prop_map(|(polka, record)| Carried { polka, record });
    let beacon = (beacon, option::of(carried));
    (slot(), any::<u32>(), lists, roots, beacon).prop_map(|(slot, parent_view, lists, roots, beacon)| Record {
        slot,
        parent: roots.0,
        parent_view,
        changes: lists.0,
        contributions: lists.1,
        returned: lists.2,
        retired: lists.3,
        model_root: roots.1,
        state_root: roots.2,
        ledger_root: roots.3,
        verdicts: lists.4,
        evidence: lists.5,
        speeds: lists.6,
        beacon: beacon.0,
        carried: beacon.1,
    })
}

fn have() -> impl Strategy<Value = Have> {
    (
        slot(),
        any::<(u64, u64)>(),
        hash(),
        vec(any::<bool>(), 0..20),
        vec(any::<bool>(), 0..20),
    )
        .prop_map(|(slot, numbers, tip, held, heard)| Have {
            slot,
            sequence: numbers.0,
            tip,
            tip_round: Round(numbers.1),
            held: Bits::new(held.len(), |at| held[at]),
            alive: Bits::new(heard.len(), |at| heard[at]),
            heard: Bits::new(heard.len(), |at| heard[at]),
            speeds: numbers.0 as u32,
        })
}

fn vote() -> impl Strategy<Value = Vote> {
    let kind = prop_oneof![Just(VoteKind::Prevote), Just(VoteKind::Precommit)];
    (slot(), kind, option::of(hash())).prop_map(|(slot, kind, record)| Vote { slot, kind, record })
}

fn evidence() -> impl Strategy<Value = Evidence> {
    let signed = || (vote(), signature());
    (peer(), signed(), signed()).prop_map(|(culprit, one, other)| Evidence::new(culprit, one, other))
}

fn polka() -> impl Strategy<Value = Polka> {
    (any::<u32>(), hash(), vec((peer(), signature()), 0..3)).prop_map(|(view, record, prevotes)| Polka {
        view,
        record,
        prevotes,
    })
}

fn regroup() -> impl Strategy<Value = Regroup> {
    (slot(), any::<u32>(), hash(), option::of(polka()), vec(peer(), 0..5)).prop_map(
        |(slot, attempt, tip, polka, survivors)| Regroup {
            slot,
            attempt,
            tip,
            polka,
            survivors,
        },
    )
}

fn body() -> impl Strategy<Value = Body> {
    let proposal = (slot(), option::of(any::<u32>()), record());
    let proposal = proposal.prop_map(|(slot, polka_view, record)| Proposal {
        slot,
        polka_view,
        record,
    });
    prop_oneof![
        commit().prop_map(Body::Commit),
        have().prop_map(Body::Have),
        proposal.prop_map(|proposal| Body::Proposal(Box::new(proposal))),
        vote().prop_map(Body::Vote),
        join().prop_map(Body::Join),
        slot().prop_map(|slot| Body::Leave(Leave { slot })),
        verdict().prop_map(Body::Verdict),
        regroup().prop_map(Body::Regroup),
        evidence().prop_map(Body::Evidence),
        speed_claim().prop_map(Body::Speed),
    ]
}

fn keys(scheme: Scheme) -> Keys {
    Keys::new([5; 32], scheme)
}

/// A frame around any payload, signed as if it were a message of this kind.
fn forged(kind: u8, name: &str, payload: &[u8]) -> Vec<u8> {
    let id = keys(Scheme::KeyedHash).id();
    let mut frame = VERSION.to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(&id.0);
    frame.extend_from_slice(&keyed(&id, &digest(name, payload)).0);
    frame.extend_from_slice(payload);
    frame
}

fn a_vote() -> Body {
    let slot = Slot {
        run: RunId([1; 32]),
        branch: 0,
        round: Round(3),
        view: 1,
    };
    Body::Vote(Vote {
        slot,
        kind: VoteKind::Prevote,
        record: Some(Hash([9; 32])),
    })
}

proptest! {
    #[test]
    fn every_message_comes_back_as_it_was_signed(body in body()) {
        let signed = keys(Scheme::Ed25519).sign(&body);
        let read = Signed::from_frame(&signed.to_frame(), Scheme::Ed25519).unwrap();
        prop_assert_eq!(read.signer, keys(Scheme::Ed25519).id());
        prop_assert_eq!(read.body, body);
    }

    #[test]
    fn a_frame_with_any_bit_changed_is_refused(body in body(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut frame = keys(Scheme::Ed25519).sign(&body).to_frame();
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        prop_assert!(Signed::from_frame(&frame, Scheme::Ed25519).is_err());
    }

    #[test]
    fn a_frame_cut_or_lengthened_is_refused(body in body(), at in any::<prop::sample::Index>(), extra in vec(any::<u8>(), 1..20)) {
        let frame = keys(Scheme::KeyedHash).sign(&body).to_frame();
        prop_assert!(Signed::from_frame(&frame[..at.index(frame.len())], Scheme::KeyedHash).is_err());
        let lengthened = [frame, extra].concat();
        prop_assert!(Signed::from_frame(&lengthened, Scheme::KeyedHash).is_err());
    }

    #[test]
    fn a_link_carries_every_message_and_leaves_out_what_it_says_itself(body in body()) {
        let (keys, run) = (keys(Scheme::Ed25519), body.slot().run);
        let signed = keys.sign(&body);
        let bytes = signed.to_link(keys.id(), run);
        prop_assert_eq!(&Signed::from_link(&bytes, keys.id(), run, Scheme::Ed25519).unwrap(), &signed);
        let whole = matches!(body, Body::Proposal(_) | Body::Evidence(_));
        prop_assert_eq!(signed.to_frame().len() - bytes.len(), if whole { 0 } else { 2 + 32 + 32 });
        // Whoever passes it on, and whoever is in another run, says all of it.
        let other = Keys::new([6; 32], Scheme::Ed25519).id();
        prop_assert_eq!(signed.to_link(other, run), signed.to_frame());
        prop_assert_eq!(signed.to_link(keys.id(), RunId([0xee; 32])), signed.to_frame());
    }

    #[test]
    fn a_short_form_changed_cut_or_from_another_link_is_refused(
        body in body(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let (keys, run) = (keys(Scheme::Ed25519), body.slot().run);
        let bytes = keys.sign(&body).to_link(keys.id(), run);
        let refused = |bytes: &[u8], from, run| Signed::from_link(bytes, from, run, Scheme::Ed25519).is_err();
        let at = at.index(bytes.len());
        let mut changed = bytes.clone();
        changed[at] ^= 1 << bit;
        prop_assert!(refused(&changed, keys.id(), run));
        prop_assert!(refused(&bytes[..at], keys.id(), run));
        if bytes[0] & 0x80 != 0 {
            prop_assert!(refused(&bytes, Keys::new([6; 32], Scheme::Ed25519).id(), run));
            prop_assert!(refused(&bytes, keys.id(), RunId([0xee; 32])));
        }
    }

    #[test]
    fn noise_never_panics(noise in vec(any::<u8>(), 0..600), kind in 0u8..12) {
        let _ = Signed::from_frame(&noise, Scheme::Ed25519);
        let marked: Vec<u8> = [&[0x80 | kind][..], &noise].concat();
        let _ = Signed::from_link(&marked, keys(Scheme::Ed25519).id(), RunId([1; 32]), Scheme::Ed25519);
        let _ = Body::decode(kind, &noise);
    }

    /// The signer itself may be hostile: whatever it signs is refused, or is the one encoding of what it says.
    #[test]
    fn a_signed_mutation_is_refused_or_canonical(
        body in body(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut payload = body.payload();
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        let frame = forged(body.kind(), body.name(), &payload);
        if let Ok(signed) = Signed::from_frame(&frame, Scheme::KeyedHash) {
            prop_assert_eq!(signed.to_frame(), frame);
        }
    }

    #[test]
    fn an_encoding_that_says_the_same_in_other_bytes_is_refused(body in body(), padding in 1usize..32) {
        let payload = [vec![0; padding], body.payload()].concat();
        let frame = forged(body.kind(), body.name(), &payload);
        prop_assert_eq!(Signed::from_frame(&frame, Scheme::KeyedHash), Err(WireError::NotCanonical));
    }
}

#[test]
fn each_refusal_has_its_reason() {
    let frame = keys(Scheme::Ed25519).sign(&a_vote()).to_frame();
    let refusal = |frame: &[u8]| Signed::from_frame(frame, Scheme::Ed25519).unwrap_err();
    assert_eq!(
        refusal(&frame[..HEADER - 1]),
        WireError::Short {
            expected: HEADER,
            found: HEADER - 1
        }
    );
    assert_eq!(
        refusal(&[&[1, 0], &frame[2..]].concat()),
        WireError::Version { found: 1 }
    );
    assert_eq!(
        refusal(&[&frame[..2], &[200], &frame[3..]].concat()),
        WireError::Kind { found: 200 }
    );
    assert_eq!(refusal(&frame[..frame.len() - 1]), WireError::Invalid);
    let long = forged(4, "vote", &vec![0; MAX_SMALL + 1]);
    assert_eq!(
        refusal(&long),
        WireError::Long {
            expected: MAX_SMALL,
            found: MAX_SMALL + 1
        }
    );
    let marked = |kind: u8, payload: usize| [vec![0x80 | kind], vec![0; 64 + payload]].concat();
    let refused = |bytes: &[u8]| {
        let me = keys(Scheme::Ed25519).id();
        Signed::from_link(bytes, me, RunId([1; 32]), Scheme::Ed25519).unwrap_err()
    };
    assert_eq!(refused(&marked(3, 100)), WireError::Kind { found: 0x83 });
    assert!(matches!(refused(&marked(4, 3)), WireError::Short { found: 68, .. }));
    assert!(matches!(
        refused(&marked(4, MAX_SMALL + 1)),
        WireError::Long {
            expected: MAX_SMALL,
            ..
        }
    ));
    let other = Keys::new([6; 32], Scheme::Ed25519).id();
    let stolen = [&frame[..3], &other.0, &frame[35..]].concat();
    assert_eq!(refusal(&stolen), WireError::Signature { signer: other });
}

#[test]
fn a_signature_holds_for_one_kind_of_message_only() {
    let slot = Slot {
        run: RunId([1; 32]),
        branch: 0,
        round: Round(3),
        view: 1,
    };
    let signed = keys(Scheme::Ed25519).sign(&Body::Leave(Leave { slot }));
    let mut frame = signed.to_frame();
    frame[2] = a_vote().kind();
    assert!(Signed::from_frame(&frame, Scheme::Ed25519).is_err());
    assert!(signed.verify(Scheme::Ed25519).is_ok());
    assert!(signed.verify(Scheme::KeyedHash).is_err());
}

#[test]
fn bytes_are_signed_in_a_domain_that_no_message_has() {
    for scheme in [Scheme::Ed25519, Scheme::KeyedHash] {
        let keys = keys(scheme);
        let leave = keys.sign(&Body::Leave(Leave {
            slot: Slot {
                run: RunId([1; 32]),
                branch: 0,
                round: Round(3),
                view: 1,
            },
        }));
        let payload = leave.body.payload();
        let signature = keys.sign_bytes("proof", &payload);
        let verify = |name, bytes: &[u8], signature| verify_bytes(scheme, name, bytes, keys.id(), signature).is_ok();
        assert!(verify("proof", &payload, signature));
        assert!(!verify("other", &payload, signature) && !verify("proof", &payload[1..], signature));
        // Neither passes for the other, even under the message's own name.
        assert!(!verify("leave", &payload, leave.signature));
        let forged = Signed { signature, ..leave };
        assert!(forged.verify(scheme).is_err());
    }
}
