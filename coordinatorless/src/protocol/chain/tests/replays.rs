//! R25: what shows that an auditor replayed, and what comes of a member that tells no steps, or others.

use super::*;

/// A run in which the first round may be told of: who audits whom in it.
fn told() -> (Run, Round, usize, PeerId, Lot) {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    while run.chain.agreed.round <= audit::asked_until(&run.config.verification, round) {
        let early = run.agreeing(round, member, lot.clone(), by);
        let refused = run.chain.check_verdict(&run.config, &early, SCHEME).unwrap_err();
        assert!(refused.to_string().contains("others may still ask"), "{refused}");
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    (run, round, by, member, lot)
}

#[test]
fn who_says_that_work_agrees_shows_that_it_replayed_it_or_is_not_heard() {
    let (run, round, by, member, lot) = told();
    let refused = |verdict: SignedVerdict, why: &str| {
        let found = run.chain.check_verdict(&run.config, &verdict, SCHEME).unwrap_err();
        assert!(found.to_string().contains(why), "{found}");
    };
    let good = run.agreeing(round, member, lot.clone(), by);
    run.chain.check_verdict(&run.config, &good, SCHEME).unwrap();
    let shown = good.verdict.replayed.clone().unwrap();
    let with = |shown: Option<Replayed>, finding| {
        let verdict = Verdict {
            finding,
            replayed: shown,
            ..good.verdict.clone()
        };
        run.say(verdict, by)
    };
    refused(with(None, Finding::Agrees), "does not show");
    refused(with(Some(shown.clone()), Finding::Unanswered), "none is to be shown");
    // Steps that agree, and work that does not: what was sent is not what they gave.
    let scaled = with(Some(shown.clone()), Finding::Differs);
    run.chain.check_verdict(&run.config, &scaled, SCHEME).unwrap();
    // A guess, to which it did bind itself before it was told.
    let guess = Trace::of((0..8).map(|_| (3.0, 2.0)));
    let guessed = run.shown(&good, guess, [7; 32]);
    refused(with(Some(guessed.clone()), Finding::Agrees), "not that of the work");
    // What it was told, which it did not bind itself to.
    let copied = Replayed {
        trace: shown.claimed.clone(),
        ..guessed
    };
    refused(with(Some(copied), Finding::Agrees), "did not answer a commitment");
    let salted = Replayed {
        salt: [8; 32],
        ..shown.clone()
    };
    refused(with(Some(salted), Finding::Agrees), "did not answer a commitment");
    // Another auditor's proof.
    let other = (0..4).find(|other| *other != by).unwrap();
    let auditor = run.keys[other].id();
    let borrowed = SignedVerdict {
        auditor,
        ..good.clone()
    };
    let borrowed = Replayed {
        answer: run.shown(&borrowed, steps(member), [7; 32]).answer,
        ..shown.clone()
    };
    refused(with(Some(borrowed), Finding::Agrees), "did not answer a commitment");
    // What it claims that the member told, and what the member cannot have committed to.
    let invented = Replayed {
        claimed: Trace::of([(1.0, 1.0)]),
        ..shown.clone()
    };
    refused(
        with(Some(invented), Finding::Agrees),
        "not the one that was committed to",
    );
    let long = Replayed {
        trace: Trace(vec![[0; 12]; 1025]),
        ..shown
    };
    refused(with(Some(long), Finding::Agrees), "more steps than a round has");
}

#[test]
fn a_proven_audit_is_paid_half_of_the_work_where_the_run_says_so() {
    let (mut run, round, by, member, lot) = told();
    let auditor = run.keys[by].id();
    let before = run.chain.ledger.get(&auditor).unwrap().provisional_points();
    let verdict = run.agreeing(round, member, lot, by);
    run.advance(&run.record_of(Vec::new(), Vec::new(), vec![verdict]));
    let account = run.chain.ledger.get(&auditor).unwrap();
    let gained = account.provisional_points() - before;
    // One batch of 16 tokens at a GFLOP each, and the liveness of one round counted.
    let of_one_round = 16 * u128::from(crate::ledger::liveness_millionths(60)) / 1_000_000;
    assert_eq!((account.audits, gained), (1, of_one_round / 2));
    let all: u128 = run
        .chain
        .ledger
        .accounts
        .iter()
        .map(|one| one.provisional_points() + one.vested)
        .sum();
    assert_eq!(all, run.chain.ledger.issued);
    // A difference pays when others have found it, too.
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let open = run.accused(Finding::Differs);
    assert_eq!(run.chain.ledger.get(&open.accuser).unwrap().audits, 0);
    run.answered(&open, Finding::Differs);
    assert_eq!(run.chain.ledger.get(&open.accuser).unwrap().audits, 1);
}

#[test]
fn a_member_answers_one_commitment_of_each_auditor_that_was_drawn_and_in_time() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    let (auditor, keys) = (run.keys[by].id(), run.keys[run.index(member)].clone());
    let slot = Slot {
        round,
        ..run.chain.next_slot()
    };
    let mut traces = replayed::Traces::default();
    traces.keep(&run.config, slot.branch, round, steps(member));
    let salt = [7; 32];
    let commitment = replayed::commitment(&slot, &member, &auditor, &steps(member), &salt);
    let lot = Some(lot);
    let ask = replayed::Ask { slot, lot, commitment };
    let mut answer =
        |run: &Run, who: PeerId, ask: &replayed::Ask| traces.answer(&run.chain, &run.config, &keys, who, ask);
    let first = answer(&run, auditor, &ask).unwrap();
    // Asked with anything else, it says the same again.
    let again = replayed::Ask {
        commitment: Hash::of(b"another"),
        ..ask.clone()
    };
    assert_eq!(answer(&run, auditor, &again).unwrap(), first);
    let other = run
        .keys
        .iter()
        .map(Keys::id)
        .find(|id| *id != auditor && *id != member)
        .unwrap();
    assert!(answer(&run, other, &ask).unwrap_err().contains("drawn"));
    let claim = *run.chain.auditable(round).unwrap().claim(&member).unwrap();
    let hear = |trace: &Trace, answer: &replayed::Answer| {
        let question = replayed::Question {
            slot,
            member,
            auditor,
            trace: trace.clone(),
            salt,
        };
        question.hear(&claim, answer.clone(), 1e-3, SCHEME)
    };
    assert!(matches!(hear(&steps(member), &first), replayed::Heard::Proven(_)));
    assert_eq!(hear(&steps(other), &first), replayed::Heard::Before);
    let mut forged = first.clone();
    forged.trace.0.pop();
    assert_eq!(hear(&steps(member), &forged), replayed::Heard::Invalid);
    while run.chain.agreed.round <= audit::asked_until(&run.config.verification, round) {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    assert!(answer(&run, auditor, &ask).unwrap_err().contains("too late"));
}

/// The verdict of an auditor whose replay took other steps than the member told, `told` being what it committed to.
fn mistold(run: &Run, round: Round, member: PeerId, lot: Lot, by: usize) -> SignedVerdict {
    let unproven = run.verdict(Finding::Untold, round, member, Some(lot), by);
    let shown = run.shown(&unproven, Trace::of([(9.0, 9.0); 8]), [7; 32]);
    let verdict = Verdict {
        replayed: Some(shown),
        ..unproven.verdict
    };
    run.say(verdict, by)
}

#[test]
fn who_commits_to_other_steps_is_not_paid_for_the_round_and_the_auditor_is() {
    let (mut run, round, by, member, lot) = told();
    let same = run.agreeing(round, member, lot.clone(), by).verdict;
    let same = run.say(
        Verdict {
            finding: Finding::Untold,
            ..same
        },
        by,
    );
    let refused = run.chain.check_verdict(&run.config, &same, SCHEME).unwrap_err();
    assert!(refused.to_string().contains("and shows the same"), "{refused}");
    let record = Record {
        verdicts: vec![mistold(&run, round, member, lot, by)],
        ..run.record()
    };
    run.advance(&record);
    let open = run.chain.agreed.accusations[0].clone();
    assert!(open.accused().replay && open.finding == Finding::Untold);
    run.answered(&open, Finding::Untold);
    let account = |id: PeerId| run.chain.ledger.get(&id).unwrap();
    assert!(account(member).unpaid > 0 && account(member).strikes == 1 && account(member).slashed == 0);
    assert_eq!((account(open.accuser).audits, account(open.accuser).strikes), (1, 0));
}

#[test]
fn who_shows_other_steps_than_a_replay_gives_has_a_strike() {
    let (mut run, round, by, member, lot) = told();
    let record = Record {
        verdicts: vec![mistold(&run, round, member, lot, by)],
        ..run.record()
    };
    run.advance(&record);
    let open = run.chain.agreed.accusations[0].clone();
    run.answered(&open, Finding::Agrees);
    let account = |id: PeerId| run.chain.ledger.get(&id).unwrap();
    assert_eq!((account(member).unpaid, account(member).strikes), (0, 0));
    assert_eq!((account(open.accuser).audits, account(open.accuser).strikes), (0, 1));
}

#[test]
fn who_tells_nobody_its_steps_is_not_paid_and_has_a_strike_and_who_tells_the_others_has_none() {
    for (found, strikes) in [(Finding::Untold, 1), (Finding::Agrees, 0)] {
        let mut run = Run::new();
        let record = run.record();
        run.advance(&record);
        let open = run.accused(Finding::Untold);
        // Nobody need replay to be told.
        assert!(!open.accused().replay);
        run.answered(&open, found);
        let account = |id: PeerId| run.chain.ledger.get(&id).unwrap();
        assert_eq!(account(open.member).strikes, strikes);
        assert_eq!(account(open.member).unpaid > 0, strikes > 0);
        assert_eq!((account(open.accuser).audits, account(open.accuser).strikes), (0, 0));
    }
}

#[test]
fn a_member_tells_voters_only_when_it_is_said_to_have_told_nothing_and_auditors_are_done() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let round = run.chain.agreed.round;
    let open = run.accused(Finding::Untold);
    let (member, voter) = (open.member, run.asked(&open)[0]);
    let (voter, keys) = (run.keys[voter].id(), run.keys[run.index(member)].clone());
    let slot = Slot {
        round,
        ..run.chain.next_slot()
    };
    let mut traces = replayed::Traces::default();
    traces.keep(&run.config, slot.branch, round, steps(member));
    let question = replayed::Question {
        slot,
        member,
        auditor: voter,
        trace: Trace::default(),
        salt: [0; 32],
    };
    let ask = question.ask(None);
    let mut answer = |run: &Run, who: PeerId| traces.answer(&run.chain, &run.config, &keys, who, &ask);
    assert!(answer(&run, voter).unwrap_err().contains("not yet"));
    while run.chain.agreed.round <= audit::asked_until(&run.config.verification, round) {
        let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
        run.advance(&record);
    }
    assert!(answer(&run, PeerId([9; 32])).unwrap_err().contains("no vote"));
    let told = answer(&run, voter).unwrap();
    let judge =
        |question: &replayed::Question, told: &replayed::Answer| question.judge(&open.claim, told, 1e-3, SCHEME);
    assert_eq!(judge(&question, &told), Finding::Agrees);
    // Who replayed compares.
    let with = |trace: Trace| replayed::Question {
        trace,
        ..question.clone()
    };
    assert_eq!(judge(&with(steps(member)), &told), Finding::Agrees);
    assert_eq!(judge(&with(steps(voter)), &told), Finding::Untold);
    let mut forged = told;
    forged.trace.0.pop();
    assert_eq!(judge(&question, &forged), Finding::Untold);
    // Without an accusation nobody is told.
    run.answered(&open, Finding::Agrees);
    assert!(answer(&run, voter).unwrap_err().contains("nobody is to ask"));
}

#[test]
fn what_was_done_before_a_fork_can_be_told_after_coming_back_from_a_long_branch() {
    let run = Run::new();
    let mut traces = replayed::Traces::default();
    let (member, other) = (run.keys[0].id(), run.keys[1].id());
    traces.keep(&run.config, 0, Round(46), steps(member));
    // Alone for long, each round with steps of its own.
    let alone = |round: u64| Trace::of([(round as f32, 1.0)]);
    for round in 47..=400 {
        traces.keep(&run.config, 7, Round(round), alone(round));
    }
    assert_eq!(traces.find(steps(member).root()), Some(steps(member)));
    // On its own branch a round grows old as ever, and of many branches the oldest go.
    assert_eq!(traces.find(alone(300).root()), None);
    assert!(traces.find(alone(400).root()).is_some());
    traces.keep(&run.config, 0, Round(300), steps(other));
    assert_eq!(traces.find(steps(member).root()), None);
    for branch in 8..200 {
        traces.keep(&run.config, branch, Round(300), alone(u64::from(branch)));
    }
    assert_eq!(traces.find(alone(400).root()), None);
}

#[test]
fn an_accusation_shows_at_once_from_which_step_on_the_work_is_another() {
    let mut run = Run::new();
    let record = run.record();
    run.advance(&record);
    let (round, (by, member, lot)) = (run.chain.agreed.round, run.drawn());
    let bare = run.verdict(Finding::Differs, round, member, Some(lot), by);
    // The replay took the first two steps like the member, and others from there on.
    let told = steps(member);
    let mut replay = told.clone();
    for step in replay.0.iter_mut().skip(2) {
        *step = Trace::of([(9.0, 9.0)]).0[0];
    }
    let shown = run.shown(&bare, replay, [7; 32]);
    let bound = run.config.verification.trace_bound;
    assert_eq!(shown.parted(bound), Some(2));
    let with = |shown| {
        let replayed = Some(shown);
        run.say(
            Verdict {
                replayed,
                ..bare.verdict.clone()
            },
            by,
        )
    };
    let forged = Replayed {
        claimed: Trace::of([(1.0, 1.0)]),
        ..shown.clone()
    };
    let refused = run.chain.check_verdict(&run.config, &with(forged), SCHEME).unwrap_err();
    assert!(refused.to_string().contains("committed to"), "{refused}");
    let record = Record {
        verdicts: vec![with(shown)],
        ..run.record()
    };
    run.advance(&record);
    let open = run.chain.agreed.accusations[0].clone();
    assert_eq!((open.finding, open.member), (Finding::Differs, member));
    run.answered(&open, Finding::Differs);
    assert_eq!(run.chain.member(&member).unwrap().standing, Standing::Banned);
}
