//! R25, R27: who may accuse whom, and what comes of it.

use super::*;

#[test]
fn a_cheat_is_barred_only_when_more_than_a_third_finds_a_difference() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    let cheat = open.member;
    // A quarter of the weight said so.
    assert_eq!(run.chain.member(&cheat).unwrap().standing, Standing::Active);
    assert!(run.chain.ledger.get(&cheat).unwrap().provisional_points() > 0);
    // Its own word is not asked for, nor the accuser's again.
    for by in [run.index(cheat), run.index(open.accuser)] {
        let verdict = run.verdict(Finding::Agrees, open.round, cheat, None, by);
        assert!(run.chain.check_verdict(&run.config, &verdict, SCHEME).is_err());
    }
    // Half of it says so. The cheat delivers in the very round that bars it.
    let by = run.asked(&open)[0];
    let record = Record {
        verdicts: vec![run.verdict(Finding::Differs, open.round, cheat, None, by)],
        ..run.record()
    };
    let notices = run.advance(&record);
    assert!(
        notices
            .iter()
            .any(|notice| matches!(notice, Notice::Slashed { member, .. } if *member == cheat))
    );
    let account = run.chain.ledger.get(&cheat).unwrap();
    assert_eq!((account.provisional_points(), account.vested), (0, 0));
    assert_eq!(run.chain.member(&cheat).unwrap().standing, Standing::Banned);
    assert_eq!(run.chain.voters().weight_of(&cheat), 0);
}

#[test]
fn of_two_members_neither_convicts_the_other() {
    let mut run = Run::new();
    // The points must not vest first.
    run.config.rewards.vesting_rounds = 20;
    let record = run.record();
    run.advance(&record);
    let mut open = run.accused(Finding::Differs);
    // All the others are gone: the accuser has half of what weight there is.
    let two = [open.member, open.accuser];
    run.chain.agreed.weights.retain(|(id, _)| two.contains(id));
    open = run.chain.agreed.accusations[0].clone();
    for _ in 0..run.config.verification.verdict_rounds {
        let before = run.chain.agreed.weights.clone();
        let record = run.record();
        run.advance(&record);
        run.chain.agreed.weights = before;
    }
    let account = run.chain.ledger.get(&open.member).unwrap();
    assert!(
        account.slashed == 0 && account.unpaid > 0,
        "the round is not paid, and that is all"
    );
    assert!(run.chain.agreed.accusations.is_empty());
}

#[test]
fn an_accusation_that_is_not_confirmed_costs_the_accuser() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    run.answered(&open, Finding::Agrees);
    assert!(run.chain.ledger.get(&open.member).unwrap().provisional_points() > 0);
    assert_eq!(run.chain.ledger.get(&open.accuser).unwrap().strikes, 1);
    assert!(run.chain.agreed.accusations.is_empty());
}

#[test]
fn only_who_was_drawn_is_heard_once_and_with_its_own_lot() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, all) = (run.chain.agreed.round, run.all_drawn());
    let refused = |run: &Run, verdict: SignedVerdict| {
        let record = run.record_of(Vec::new(), Vec::new(), vec![verdict]);
        run.apply(&record).unwrap_err().to_string()
    };
    let (by, member, lot) = all[0].clone();
    let good = run.verdict(Finding::Differs, round, member, Some(lot.clone()), by);
    assert!(
        run.apply(&run.record_of(Vec::new(), Vec::new(), vec![good.clone()]))
            .is_ok()
    );
    // Another's lot, a member that the lot did not draw, a lot bent into place, none.
    let other = (0..4)
        .find(|other| *other != by && run.keys[*other].id() != member)
        .unwrap();
    let stolen = run.verdict(Finding::Differs, round, member, Some(lot.clone()), other);
    assert!(refused(&run, stolen).contains("does not prove that it was drawn"));
    let undrawn = |id: &PeerId| *id != run.keys[by].id() && !all.iter().any(|(at, one, _)| (*at, *one) == (by, *id));
    if let Some(id) = run.keys.iter().map(Keys::id).find(undrawn) {
        let auditable = run.chain.agreed.auditable.last().unwrap();
        let vrf = VrfKeys::derive(&run.keys[by]);
        let honest_but_too_high = vrf.lot(&auditable.seed, round, &id, |_| true);
        let uninvited = run.verdict(Finding::Differs, round, id, honest_but_too_high, by);
        assert!(refused(&run, uninvited).contains("does not prove that it was drawn"));
    }
    let mut bent = lot.clone();
    bent.output[3] ^= 1;
    let bent = run.verdict(Finding::Differs, round, member, Some(bent), by);
    assert!(refused(&run, bent).contains("does not prove that it was drawn"));
    let unproven = run.verdict(Finding::Differs, round, member, None, by);
    assert!(refused(&run, unproven).contains("nobody awaits it"));
    // Work that was not counted, a round to come, a signature that does not fit.
    let vrf = VrfKeys::derive(&run.keys[by]);
    let nobody = PeerId([9; 32]);
    let auditable = run.chain.agreed.auditable.last().unwrap().clone();
    let on_nobody = vrf.lot(&auditable.seed, round, &nobody, |_| true);
    let on_nobody = run.verdict(Finding::Differs, round, nobody, on_nobody, by);
    assert!(refused(&run, on_nobody).contains("not counted"));
    let early = run.verdict(Finding::Differs, round.next(), member, Some(lot.clone()), by);
    assert!(refused(&run, early).contains("nobody awaits it"));
    let mut forged = good.clone();
    forged.verdict.distance_nanos += 1;
    assert!(refused(&run, forged).contains("signature"));
    // The same auditor has one word on a round.
    run.advance(&run.record_of(Vec::new(), Vec::new(), vec![good]));
    let again = run.verdict(Finding::Agrees, round, member, Some(lot), by);
    assert!(refused(&run, again).contains("nobody awaits it"));
}

#[test]
fn a_round_can_be_audited_for_as_long_as_the_run_says_and_no_longer() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    for _ in 1..run.config.verification.verdict_rounds {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    let said = |run: &Run| {
        let verdict = run.agreeing(round, member, lot.clone(), by);
        run.apply(&run.record_of(Vec::new(), Vec::new(), vec![verdict]))
    };
    assert!(said(&run).is_ok());
    let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
    run.advance(&record);
    assert!(said(&run).unwrap_err().to_string().contains("too late"));
}

#[test]
fn who_opens_nothing_to_two_auditors_is_not_paid_and_the_third_time_barred() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let withholder = run.drawn().1;
    let mut strikes = 0;
    // Until the lots have fallen on it three times.
    for _ in 0..100 {
        let drawn = run.all_drawn().into_iter().find(|(_, member, _)| *member == withholder);
        let round = run.chain.agreed.round;
        let Some((by, member, lot)) = drawn else {
            let record = run.record();
            run.advance(&record);
            continue;
        };
        let record = Record {
            verdicts: vec![run.verdict(Finding::Unanswered, round, member, Some(lot), by)],
            ..run.record()
        };
        run.advance(&record);
        let open = run.chain.agreed.accusations[0].clone();
        let before = run.chain.ledger.get(&withholder).unwrap().unpaid;
        let notices = run.answered(&open, Finding::Unanswered);
        strikes += 1;
        let account = run.chain.ledger.get(&withholder).unwrap();
        assert!(account.unpaid > before);
        let slashed = |one: &Notice| matches!(one, Notice::Slashed { member, .. } if *member == withholder);
        assert_eq!(notices.iter().any(slashed), strikes == 3);
        if strikes == 3 {
            break;
        }
    }
    assert_eq!(strikes, 3);
    assert_eq!(run.chain.member(&withholder).unwrap().standing, Standing::Banned);
    assert!(run.keys.iter().all(|keys| {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        keys.id() == withholder || account.strikes == 0
    }));
}

#[test]
fn who_is_gone_and_opens_nothing_is_not_paid_for_what_was_not_drawn_either_and_has_no_strike() {
    let mut run = Run::new();
    run.config.rewards.vesting_rounds = 20;
    for _ in 0..3 {
        let record = run.record();
        run.advance(&record);
    }
    let open = run.accused(Finding::Unanswered);
    let before = run.chain.ledger.get(&open.member).unwrap().provisional_points();
    assert!(before > 0);
    // It delivered nothing in the last record.
    let rest = (0..4).filter(|member| run.keys[*member].id() != open.member);
    let contributions = rest.map(|member| run.sign(member, run.commit(member, 1))).collect();
    let record = run.record_of(contributions, Vec::new(), Vec::new());
    run.advance(&record);
    run.answered(&open, Finding::Unanswered);
    let account = run.chain.ledger.get(&open.member).unwrap();
    // All of the work is audited in these runs, so what was not opened costs four rounds' pay.
    let four = 4 * u128::from(run.config.data.batch_tokens());
    assert_eq!(
        (account.unpaid, account.provisional_points()),
        (four, before + four / 4 - four)
    );
    assert!(account.strikes == 0 && account.slashed == 0);
}

#[test]
fn an_auditor_that_could_not_reach_who_is_honest_harms_nobody() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Unanswered);
    run.answered(&open, Finding::Agrees);
    for keys in &run.keys {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        assert_eq!((account.strikes, account.unpaid, account.slashed), (0, 0, 0));
    }
    // Had the others found a difference, that would count, whatever the accuser could not open.
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Unanswered);
    run.answered(&open, Finding::Differs);
    assert_eq!(run.chain.member(&open.member).unwrap().standing, Standing::Banned);
}

#[test]
fn all_who_are_said_to_open_nothing_are_before_everyone() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (mut said, mut rounds) = (BTreeSet::new(), 0);
    while said.len() < 8 {
        let round = run.chain.agreed.round;
        let mut drawn = run.all_drawn();
        drawn.retain(|(_, member, _)| said.insert((round, *member)));
        let each = drawn.into_iter();
        let mut verdicts: Vec<SignedVerdict> = each
            .map(|(by, member, lot)| run.verdict(Finding::Unanswered, round, member, Some(lot), by))
            .collect();
        verdicts.sort_by_key(audit::key);
        let record = Record {
            verdicts,
            ..run.record()
        };
        run.advance(&record);
        rounds += 1;
    }
    assert!(rounds < run.config.verification.verdict_rounds, "none has run out");
    assert_eq!(run.chain.agreed.accusations.len(), said.len());
}

#[test]
fn an_accusation_to_which_too_few_speak_costs_the_round_and_nothing_else() {
    let mut run = Run::new();
    // The points must not vest first.
    run.config.rewards.vesting_rounds = 20;
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    for _ in 0..run.config.verification.verdict_rounds {
        let record = run.record();
        run.advance(&record);
    }
    assert!(run.chain.agreed.accusations.is_empty());
    for keys in &run.keys {
        let account = run.chain.ledger.get(&keys.id()).unwrap();
        assert_eq!((account.strikes, account.slashed), (0, 0));
        assert_eq!(account.unpaid > 0, keys.id() == open.member);
    }
}

#[test]
fn the_word_of_an_auditor_that_was_barred_meanwhile_is_let_go_of() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (by, member, lot) = run.drawn();
    let verdict = run.verdict(Finding::Agrees, run.chain.agreed.round, member, Some(lot), by);
    assert!(run.chain.awaits(&verdict));
    let evidence = two_votes(&run, by, run.chain.next_slot());
    let record = with_evidence(&run, vec![evidence]);
    run.advance(&record);
    // Whoever keeps such a verdict would never propose anything lawful again.
    assert!(!run.chain.awaits(&verdict));
    assert!(run.chain.check_verdict(&run.config, &verdict, SCHEME).is_err());
}
