//! The agreement under loss, crashes and liars, in virtual time.

use super::net::{Net, SECOND, VOTERS, keys, record, slot, timeouts, voters};
use super::*;

fn publishes(outputs: &[Output]) -> Vec<Signed> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Publish(signed) => Some(signed.clone()),
            _ => None,
        })
        .collect()
}

fn votes(outputs: &[Output]) -> Vec<Vote> {
    publishes(outputs)
        .into_iter()
        .filter_map(|signed| match signed.body {
            Body::Vote(vote) => Some(vote),
            _ => None,
        })
        .collect()
}

fn vote(voter: usize, view: View, kind: VoteKind, record: Option<Hash>) -> Signed {
    keys(voter).sign(&Body::Vote(Vote {
        slot: slot(1, view),
        kind,
        record,
    }))
}

fn proposal(proposer: usize, view: View, record: &Record) -> Signed {
    let record = record.clone();
    keys(proposer).sign(&Body::Proposal(Box::new(Proposal {
        slot: slot(1, view),
        polka_view: None,
        record,
    })))
}

fn index_of(peer: PeerId) -> usize {
    (0..VOTERS).find(|index| keys(*index).id() == peer).unwrap()
}

/// A peer at round 1 that doesn't propose in view 0, the one that does, and the two others.
fn listener() -> (Agreement, usize, usize, [usize; 2]) {
    let proposer = index_of(voters(1).proposer(Round(1), 0));
    let others: Vec<usize> = (0..VOTERS).filter(|index| *index != proposer).collect();
    let mut agreement = Agreement::new(slot(1, 0).run, keys(others[0]), timeouts());
    let outputs = agreement.start(0, 0, Round(1), voters(1), &[]);
    assert!(votes(&outputs).is_empty());
    (agreement, others[0], proposer, [others[1], others[2]])
}

#[test]
fn four_equal_voters_decide_in_the_first_view() {
    let mut net = Net::new(1, 0);
    net.run(5, 60 * SECOND);
    for peer in &net.peers {
        assert!(peer.decided.iter().all(|(_, certificate)| certificate.slot.view == 0));
    }
    net.assert_agreement(5);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut net = Net::new(seed, 20);
        net.run(4, 600 * SECOND);
        net.digest()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_crashed_proposer_costs_one_view() {
    let mut net = Net::new(2, 0);
    let crashed = index_of(voters(1).proposer(Round(1), 0));
    net.peers[crashed].down = true;
    net.run(1, 60 * SECOND);
    let (_, certificate) = &net.peers[(crashed + 1) % VOTERS].decided[0];
    assert_eq!(certificate.slot.view, 1);
    assert!(
        net.now >= timeouts().propose_first && net.now < 2 * timeouts().propose_first,
        "took {}",
        net.now
    );
}

#[test]
fn a_fifth_of_all_messages_lost_stops_nobody() {
    let mut slowest = 0;
    for seed in 0..100 {
        let mut net = Net::new(seed, 20);
        net.run(5, 600 * SECOND);
        net.assert_agreement(5);
        slowest = slowest.max(net.now);
    }
    println!("slowest of 100 runs of 5 heights: {} ms", slowest / 1000);
}

#[test]
fn half_of_all_messages_lost_stops_nobody_either() {
    for seed in 0..20 {
        let mut net = Net::new(1000 + seed, 50);
        net.run(3, 3000 * SECOND);
        net.assert_agreement(3);
    }
}

#[test]
fn a_peer_restarted_at_any_point_never_signs_two_messages_for_one_slot() {
    let mut crashes = 0;
    for seed in 0..60 {
        let mut net = Net::new(2000 + seed, 20);
        // Every peer loses power again and again, after an arbitrary output: perhaps between a vote's entry and its sending.
        net.crash_every = 5 + seed % 23;
        net.run(4, 3000 * SECOND);
        net.assert_agreement(4);
        crashes += net.crashes;
    }
    assert!(crashes > 600, "only {crashes} crashes");
}

#[test]
fn a_height_waits_until_its_record_is_found_valid() {
    let (mut agreement, me, proposer, [a, b]) = listener();
    let record = record(1, proposer);
    let outputs = agreement.message(1, &proposal(proposer, 0, &record));
    assert!(matches!(&outputs[..], [Output::Persist(_), Output::Check { record: found, .. }] if **found == record));
    let hash = record.hash();
    for (voter, kind) in [
        (proposer, VoteKind::Prevote),
        (a, VoteKind::Prevote),
        (b, VoteKind::Prevote),
    ] {
        assert!(votes(&agreement.message(2, &vote(voter, 0, kind, Some(hash)))).is_empty());
    }
    let said = votes(&agreement.valid(3, hash));
    assert_eq!(
        said.iter().map(|vote| (vote.kind, vote.record)).collect::<Vec<_>>(),
        [(VoteKind::Prevote, Some(hash)), (VoteKind::Precommit, Some(hash)),]
    );
    assert!(agreement.valid(3, hash).is_empty());
    let (polka, seen) = agreement.polka().unwrap();
    assert_eq!((polka.view, polka.record, (*seen).clone()), (0, record.hash(), record));
    agreement.message(4, &vote(a, 0, VoteKind::Precommit, Some(hash)));
    let outputs = agreement.message(4, &vote(b, 0, VoteKind::Precommit, Some(hash)));
    let Some(Output::Decided { certificate, .. }) = outputs.last() else {
        panic!("no decision in {outputs:?}")
    };
    assert_eq!(
        Agreement::certificate_valid(&voters(1), certificate, Scheme::KeyedHash),
        Ok(())
    );
    assert!(certificate.votes.iter().any(|(voter, _)| *voter == keys(me).id()));
    assert!(
        agreement
            .message(5, &vote(proposer, 0, VoteKind::Precommit, Some(hash)))
            .is_empty()
    );
}

#[test]
fn while_a_record_is_not_found_valid_the_timeout_of_the_view_votes_nil() {
    let (mut agreement, _, proposer, _) = listener();
    agreement.message(1, &proposal(proposer, 0, &record(1, proposer)));
    let timer = AgreementTimer {
        branch: 0,
        round: Round(1),
        kind: 0,
        view: 0,
    };
    let said = votes(&agreement.timeout(timeouts().propose_first, timer));
    assert_eq!(
        said.iter().map(|vote| (vote.kind, vote.record)).collect::<Vec<_>>(),
        [(VoteKind::Prevote, None)]
    );
    assert!(agreement.timeout(timeouts().propose_first, timer).is_empty());
}

#[test]
fn a_vote_of_a_stranger_and_a_proposal_of_a_wrong_proposer_change_nothing() {
    let (mut agreement, _, proposer, [a, _]) = listener();
    let hash = record(1, proposer).hash();
    assert!(
        agreement
            .message(1, &vote(VOTERS, 0, VoteKind::Prevote, Some(hash)))
            .is_empty()
    );
    assert!(agreement.message(1, &proposal(a, 0, &record(1, a))).is_empty());
    let mut elsewhere = slot(1, 0);
    elsewhere.run = RunId([9; 32]);
    let other_run = keys(a).sign(&Body::Vote(Vote {
        slot: elsewhere,
        kind: VoteKind::Prevote,
        record: None,
    }));
    assert!(agreement.message(1, &other_run).is_empty());
    let mut branch = slot(1, 0);
    branch.branch = 1;
    let other_branch = keys(a).sign(&Body::Vote(Vote {
        slot: branch,
        kind: VoteKind::Prevote,
        record: None,
    }));
    assert!(agreement.message(1, &other_branch).is_empty());
    // The same kinds of message do have an effect where they belong.
    assert!(
        !agreement
            .message(1, &vote(a, 0, VoteKind::Prevote, Some(hash)))
            .is_empty()
    );
    assert!(
        !agreement
            .message(1, &proposal(proposer, 0, &record(1, proposer)))
            .is_empty()
    );
}

#[test]
fn messages_of_the_next_height_wait_for_it_in_bounded_number() {
    let proposer = index_of(voters(2).proposer(Round(2), 0));
    let (mut agreement, me, _, _) = listener();
    let record = record(2, proposer);
    let early = Body::Proposal(Box::new(Proposal {
        slot: slot(2, 0),
        polka_view: None,
        record,
    }));
    for view in 0..50 {
        let ahead = Vote {
            slot: slot(2, view),
            kind: VoteKind::Prevote,
            record: None,
        };
        let voter = if proposer == me { (me + 1) % VOTERS } else { proposer };
        assert!(agreement.message(1, &keys(voter).sign(&Body::Vote(ahead))).is_empty());
    }
    assert_eq!(agreement.early.values().map(Vec::len).sum::<usize>(), EARLY_VOTES);
    if proposer != me {
        agreement.message(1, &keys(proposer).sign(&early));
    }
    let outputs = agreement.start(2, 0, Round(2), voters(2), &[]);
    assert_eq!(
        outputs.iter().any(|output| matches!(output, Output::Check { .. })),
        proposer != me
    );
    assert!(agreement.early.is_empty());
}

#[test]
fn a_double_voter_cannot_hide_a_polka() {
    let (mut agreement, _, proposer, [a, liar]) = listener();
    let hash = record(1, proposer).hash();
    agreement.message(1, &proposal(proposer, 0, &record(1, proposer)));
    agreement.valid(1, hash);
    agreement.message(2, &vote(liar, 0, VoteKind::Prevote, None));
    agreement.message(2, &vote(a, 0, VoteKind::Prevote, Some(hash)));
    let outputs = agreement.message(2, &vote(liar, 0, VoteKind::Prevote, Some(hash)));
    let told = |output: &Output| matches!(output, Output::Equivocation { peer, .. } if *peer == keys(liar).id());
    assert!(outputs.iter().any(told));
    assert!(
        votes(&outputs)
            .iter()
            .any(|vote| vote.kind == VoteKind::Precommit && vote.record == Some(hash))
    );
}

#[test]
fn a_prevote_of_another_process_with_this_key_completes_a_polka() {
    let (mut agreement, me, proposer, [a, _]) = listener();
    let hash = record(1, proposer).hash();
    agreement.message(1, &proposal(proposer, 0, &record(1, proposer)));
    let timer = AgreementTimer {
        branch: 0,
        round: Round(1),
        kind: 0,
        view: 0,
    };
    let said = votes(&agreement.timeout(30 * SECOND, timer));
    assert_eq!((said[0].kind, said[0].record), (VoteKind::Prevote, None));
    agreement.valid(31 * SECOND, hash);
    for voter in [me, a] {
        let outputs = agreement.message(31 * SECOND, &vote(voter, 0, VoteKind::Prevote, Some(hash)));
        assert!(votes(&outputs).is_empty());
    }
    let outputs = agreement.message(31 * SECOND, &vote(proposer, 0, VoteKind::Prevote, Some(hash)));
    let said = votes(&outputs);
    assert_eq!((said[0].kind, said[0].record), (VoteKind::Precommit, Some(hash)));
}

#[test]
fn two_proposals_in_one_view_are_told() {
    let (mut agreement, _, proposer, [a, _]) = listener();
    agreement.message(1, &proposal(proposer, 0, &record(1, proposer)));
    let outputs = agreement.message(1, &proposal(proposer, 0, &record(1, a)));
    let told = |output: &Output| matches!(output, Output::Equivocation { peer, .. } if *peer == keys(proposer).id());
    assert!(outputs.iter().any(told));
}

#[test]
fn a_peer_that_slept_through_many_views_is_brought_forward() {
    let (mut agreement, _, proposer, [a, _]) = listener();
    agreement.message(1, &vote(a, 40, VoteKind::Prevote, None));
    assert_eq!(agreement.view(), 0);
    agreement.message(1, &vote(proposer, 40, VoteKind::Precommit, None));
    assert_eq!(agreement.view(), 40);
    assert_eq!(agreement.failed_proposers().len(), VOTERS);
}

#[test]
fn a_log_with_an_unreadable_entry_inside_keeps_its_peer_silent() {
    let (mut agreement, me, proposer, _) = listener();
    let record = record(1, proposer);
    let mut log = Vec::new();
    let mut outputs = agreement.message(1, &proposal(proposer, 0, &record));
    outputs.extend(agreement.valid(1, record.hash()));
    for output in outputs {
        if let Output::Persist(entry) = output {
            log.push(entry);
        }
    }
    let restarted = |log: &[Vec<u8>]| {
        let mut agreement = Agreement::new(slot(1, 0).run, keys(me), timeouts());
        let mut outputs = agreement.start(2, 0, Round(1), voters(1), log);
        let timer = AgreementTimer {
            branch: 0,
            round: Round(1),
            kind: 0,
            view: 0,
        };
        outputs.extend(agreement.timeout(30 * SECOND, timer));
        (votes(&outputs), agreement.repeat().len())
    };
    let (said, repeated) = restarted(&log);
    assert_eq!((said.len(), said[0].record, repeated), (1, Some(record.hash()), 1));
    let mut broken = log.clone();
    broken[1].truncate(20);
    assert_eq!(restarted(&broken).0.len(), 0);
    // A torn last entry is what a crash leaves: nothing was sent after it.
    let mut torn = log.clone();
    torn.last_mut().unwrap().pop();
    assert_eq!(restarted(&torn).0.len(), 1);
}

#[test]
fn rubbish_in_the_log_never_panics() {
    let rubbish: Vec<Vec<u8>> = (0..64u8).map(|n| vec![n; usize::from(n) * 7]).collect();
    let mut agreement = Agreement::new(slot(1, 0).run, keys(0), timeouts());
    assert!(votes(&agreement.start(0, 0, Round(1), voters(1), &rubbish)).is_empty());
}

#[test]
fn a_certificate_must_be_signed_by_enough_distinct_voters_for_this_very_slot() {
    let record = Hash([3; 32]);
    let mut signers: Vec<usize> = (0..VOTERS).collect();
    signers.sort_by_key(|index| keys(*index).id());
    let signed = |index: usize| {
        (
            keys(index).id(),
            vote(index, 2, VoteKind::Precommit, Some(record)).signature,
        )
    };
    let good = Certificate {
        slot: slot(1, 2),
        record,
        votes: signers[..3].iter().map(|index| signed(*index)).collect(),
    };
    let check = |certificate: &Certificate| Agreement::certificate_valid(&voters(1), certificate, Scheme::KeyedHash);
    assert_eq!(check(&good), Ok(()));

    let mut light = good.clone();
    light.votes.pop();
    assert_eq!(check(&light), Err(CertificateError::Weight { total: 400, found: 200 }));
    let mut doubled = light.clone();
    doubled.votes.push(doubled.votes[1]);
    assert!(matches!(check(&doubled), Err(CertificateError::Order { .. })));
    let mut forged = good.clone();
    forged.votes[2].1 = Signature([7; 64]);
    assert!(matches!(check(&forged), Err(CertificateError::Signature { .. })));
    let mut prevotes = good.clone();
    prevotes.votes[0].1 = vote(signers[0], 2, VoteKind::Prevote, Some(record)).signature;
    assert!(matches!(check(&prevotes), Err(CertificateError::Signature { .. })));
    let mut moved = good.clone();
    moved.slot.branch = 1;
    assert!(matches!(check(&moved), Err(CertificateError::Signature { .. })));
    let mut other = good.clone();
    other.record = Hash([4; 32]);
    assert!(matches!(check(&other), Err(CertificateError::Signature { .. })));
    let mut stranger = light.clone();
    stranger.votes.push(signed(VOTERS));
    stranger.votes.sort_unstable();
    assert!(matches!(check(&stranger), Err(CertificateError::Stranger { .. })));
    assert!(matches!(
        check(&Certificate { votes: vec![], ..good }),
        Err(CertificateError::Weight { found: 0, .. })
    ));
}

#[test]
fn log_entries_of_another_height_are_passed_over() {
    let (mut agreement, me, proposer, _) = listener();
    let outputs = agreement.message(1, &proposal(proposer, 0, &record(1, proposer)));
    let Some(Output::Persist(entry)) = outputs.first() else {
        panic!("nothing logged")
    };
    let mut later = Agreement::new(slot(1, 0).run, keys(me), timeouts());
    let outputs = later.start(0, 0, Round(2), voters(2), std::slice::from_ref(entry));
    assert!(!outputs.iter().any(|output| matches!(output, Output::Check { .. })));
}
