//! What an auditor asks of a member: its accumulators before the replay, its trace after it.
//!
//! Whoever gives no answer is asked again, soon at first, later once a second. It has refused if that happened [`REFUSALS`] times in a row while it
//! could answer: while it was heard and said that it has the audited record, or has been counted in as many records since it was asked, whatever it
//! says. Who is gone, has just come back, or is behind has not refused, and is asked until no record can have the verdict any more. Who begins to open
//! and does not end has refused with the second such answer; where a round's verdicts are over sooner, nobody says so in time.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::driver::{Driver, Job};
use super::effects::AGAIN;
use super::{ModelSource, NodeError, Opened, Work, leaf_count, transfer};
use crate::net::{Net, Request, Response};
use crate::protocol::event::{AuditOrder, Event, Notice};
use crate::protocol::replayed::{self, Answer, Heard, PATIENCE, Question, REFUSALS, Window};
use crate::types::*;
use crate::wire::Scheme;

/// How long an audited member may take to open an accumulator; four times that where everyone asks for it.
const OPENING: Duration = Duration::from_secs(30);
/// Answers that do not end which are a refusal.
const STALLS: u32 = 2;
/// How long a member that gives none may still change its mind, unless half of the time for the verdict is over before.
const REOPENING: Duration = Duration::from_secs(10);
/// How long one question for a trace may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an accusation waits for it.
const ACCUSED: Duration = Duration::from_secs(1);
/// Peers asked for an opened accumulator.
const MAX_OPENERS: usize = 16;
/// Before somebody is asked again for the first times, and how many those are: rounds may be short.
const SOON: Duration = Duration::from_millis(250);
const AT_FIRST: u32 = 12;
/// Before somebody is asked again that cannot answer now.
const LATER: Duration = Duration::from_secs(2);

/// How often somebody was asked that gave no answer.
pub(super) struct Tries {
    began: Instant,
    /// The last record then.
    record: Round,
    /// When it was asked last.
    asked: Instant,
    all: u32,
    /// Each time able to answer, in a row, and when it was first asked of these.
    refused: u32,
    since: Instant,
    /// Of these, those in a row that were waited for in vain for a whole patience.
    stalled: u32,
}

/// What follows when an accumulator was not opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    /// Ask again after this.
    Ask(Duration),
    /// It has refused.
    Accuse,
    /// It may have been unable, and a verdict would come too late by now.
    Drop,
}

impl Tries {
    fn new(now: Instant, record: Round) -> Self {
        Self {
            began: now,
            record,
            asked: now,
            all: 0,
            refused: 0,
            since: now,
            stalled: 0,
        }
    }

    /// It gave no answer once more.
    fn again(&mut self, able: bool, now: Instant) {
        self.all = self.all.saturating_add(1);
        if self.refused == 0 {
            self.since = self.asked;
        }
        self.refused = if able { self.refused.saturating_add(1) } else { 0 };
        let stalled = able && now - self.asked >= OPENING;
        self.stalled = if stalled { self.stalled.saturating_add(1) } else { 0 };
    }

    fn is_able(&self) -> bool {
        self.refused > 0
    }

    fn pause(&self) -> Duration {
        match self.is_able() {
            true if self.all <= AT_FIRST => SOON,
            true => AGAIN,
            false => LATER,
        }
    }

    fn has_refused(&self) -> bool {
        self.refused >= REFUSALS
    }

    /// What to do now, with `record` the last one.
    fn next(&self, now: Instant, record: Round, window: &Window) -> Next {
        let late = now - self.since >= REOPENING || record >= window.half;
        match (self.has_refused() && late) || self.stalled >= STALLS {
            true => Next::Accuse,
            false if record < window.end => Next::Ask(self.pause()),
            false => Next::Drop,
        }
    }
}

/// An audit that waits for what the member is to open, or has it.
pub(super) struct Audit {
    order: AuditOrder,
    /// Let go of while the member is not there: models are large, and it may take a while.
    basis: Option<Basis>,
    accumulators: Option<Opened>,
    /// Who may have what is to be opened.
    providers: Vec<PeerId>,
    window: Window,
    tries: Tries,
}

/// What a replay begins with: the model, and what the member sent.
pub(super) struct Basis {
    source: Result<ModelSource, String>,
    shards: Vec<Bytes>,
}

/// A member being asked for its trace.
pub(super) struct Asking {
    verdict: Verdict,
    question: Question,
    /// Whether it was first asked while it still had to answer.
    in_time: bool,
    /// The record with which asking ends.
    until: Round,
    tries: Tries,
}

impl Driver {
    /// Asks an audited member for its trace, bound to this peer's own (R25), until it answers or patience ends. Where this peer only has to know
    /// whether the member tells anyone, its own is empty.
    pub(super) fn ask_for_trace(&mut self, verdict: Verdict, trace: Trace) {
        let question = Question::new(&self.keys, verdict.slot, verdict.member, trace);
        let chain = self.state.chain();
        let until = replayed::ask_until(&self.node.config.run, chain, &verdict);
        let asking = Asking {
            in_time: chain.agreed.round < until,
            verdict,
            question,
            until,
            tries: Tries::new(Instant::now(), chain.agreed.round),
        };
        self.ask(asking, Duration::ZERO);
    }

    /// Asks once more, after a while.
    fn ask(&mut self, asking: Asking, after: Duration) {
        let ask = asking.question.ask(asking.verdict.lot.clone());
        let (net, member) = (self.node.net.clone(), asking.verdict.member);
        let patience = match asking.verdict.finding {
            Finding::Differs => ACCUSED,
            _ => ANSWER,
        };
        self.jobs.spawn(async move {
            tokio::time::sleep(after).await;
            let answer = match net.request(member, Request::Trace(ask), patience).await {
                Ok(Response::Trace(answer)) => Some(answer),
                _ => None,
            };
            Job::Trace(Box::new(asking), answer)
        });
    }

    /// Asks the member for what it is to open; of who is only said to have told nothing, for its trace.
    pub(super) fn prepare_audit(&mut self, order: AuditOrder) {
        if order.accusation.is_some_and(|accused| !accused.replay) {
            let bound = self.node.config.run.verification.bound;
            return self.ask_for_trace(replayed::told(&order, bound), Trace::default());
        }
        let member = order.contribution.member;
        // Whoever accused it had them from the member, under the same hashes; where everyone is asked, others soon have them too, and one
        // member need not serve all.
        let others = self.others();
        let handed_on = order
            .accusation
            .map(|accused| accused.by)
            .into_iter()
            .chain(others.into_iter().filter(|_| order.draw > 0));
        let providers: Vec<PeerId> = std::iter::once(member)
            .chain(handed_on.filter(|id| *id != member))
            .take(MAX_OPENERS)
            .collect();
        let chain = self.state.chain();
        let window = replayed::opening(&self.node.config.run, chain, &order);
        let mut audit = Box::new(Audit {
            tries: Tries::new(Instant::now(), chain.agreed.round),
            order,
            basis: None,
            accumulators: None,
            providers,
            window,
        });
        let (basis, opening) = (self.basis(&audit.order), self.opening());
        self.jobs.spawn(async move {
            let (basis, opened) = tokio::join!(basis, opening.of(&audit, Duration::ZERO));
            (audit.basis, audit.accumulators) = (Some(basis), opened);
            Job::Audit(audit)
        });
    }

    /// Gathers what a replay begins with.
    fn basis(&self, order: &AuditOrder) -> impl Future<Output = Basis> + Send + 'static {
        let (net, store, others) = (self.node.net.clone(), self.node.store.clone(), self.others());
        let spacing = self.node.config.run.storage.snapshot_rounds;
        let (base, commit) = (order.work.base, order.contribution.commit.clone());
        async move {
            let source = transfer::model_source(&net, &store, base, &others, spacing).await;
            let shards = transfer::fetch_contribution(&net, &commit, &others).await;
            Basis {
                source,
                shards: shards.unwrap_or_default(),
            }
        }
    }

    fn opening(&self) -> Opening {
        Opening {
            net: self.node.net.clone(),
            zero: self.node.config.run.verification.accumulator_zero,
            limit: self.node.config.accumulator_bytes,
            by_leaf: self.node.config.opens_leaves,
        }
    }

    /// An audited member's accumulators, or that it did not open them.
    pub(super) fn hear_opened(&mut self, mut audit: Box<Audit>) -> Result<(), NodeError> {
        let Some(accumulators) = audit.accumulators.take() else {
            return self.hear_nothing(audit);
        };
        let Some(basis) = audit.basis.take() else {
            let basis = self.basis(&audit.order);
            self.jobs.spawn(async move {
                (audit.basis, audit.accumulators) = (Some(basis.await), Some(accumulators));
                Job::Audit(audit)
            });
            return Ok(());
        };
        match basis.source {
            Ok(source) => self.give(Work::Audit {
                order: audit.order,
                source,
                shards: basis.shards,
                accumulators,
            }),
            Err(reason) => {
                self.notice(Notice::Warning(format!("an audit could not be done: {reason}")));
                Ok(())
            }
        }
    }

    /// A member that did not open its accumulators.
    fn hear_nothing(&mut self, mut audit: Box<Audit>) -> Result<(), NodeError> {
        let (member, slot) = (audit.order.contribution.member, audit.order.contribution.commit.slot);
        let (able, now) = (self.is_able(&member, &slot, &audit.tries), Instant::now());
        audit.tries.again(able, now);
        match audit.tries.next(now, self.state.chain().agreed.round, &audit.window) {
            Next::Ask(pause) => {
                audit.tries.asked = now + pause;
                if !able {
                    audit.basis = None;
                }
                let opening = self.opening();
                self.jobs.spawn(async move {
                    audit.accumulators = opening.of(&audit, pause).await;
                    Job::Audit(audit)
                });
                Ok(())
            }
            // Not behind the replays that wait: rounds may be short.
            Next::Accuse => {
                let bound = self.node.config.run.verification.bound;
                self.handle(Event::Audited(replayed::unanswered(&audit.order, bound)))
            }
            Next::Drop => {
                let (member, round) = (member.short(), slot.round);
                self.notice(Notice::Warning(format!(
                    "{member} was not there to open what it sent in round {round}, so it was not audited"
                )));
                Ok(())
            }
        }
    }

    /// Whether this member could answer about the round of this slot when it was asked last.
    fn is_able(&self, member: &PeerId, slot: &Slot, tries: &Tries) -> bool {
        let chain = self.state.chain();
        // Its commits name the record before them. Of those that were on their way when it was asked there may be one or two.
        let counted = chain.member(member).is_some_and(|one| {
            let since = one.work.iter().filter(|(round, _)| *round > tries.record);
            slot.branch == chain.agreed.branch && one.uncounted == 0 && since.count() >= REFUSALS as usize
        });
        counted || (self.state.alive(self.now()).contains(member) && self.state.has_decided(member, slot))
    }

    /// What an audited member told of its trace, or that it told nothing.
    pub(super) fn hear_trace(&mut self, mut asking: Asking, answer: Option<Answer>) -> Result<(), NodeError> {
        let (slot, member) = (asking.verdict.slot, asking.verdict.member);
        let chain = self.state.chain().clone();
        // An accusation says more with the member's steps, and holds without.
        let patient = asking.verdict.finding != Finding::Differs;
        if answer.is_none() {
            let able = self.is_able(&member, &slot, &asking.tries);
            asking.tries.again(able, Instant::now());
            let waits = asking.tries.began.elapsed() < PATIENCE || !asking.tries.has_refused();
            if patient && waits && chain.agreed.round < asking.until {
                let pause = asking.tries.pause();
                asking.tries.asked = Instant::now() + pause;
                self.ask(asking, pause);
                return Ok(());
            }
        }
        let refused = asking.in_time && asking.tries.has_refused();
        let Asking {
            mut verdict, question, ..
        } = asking;
        if verdict.draw > 0 {
            return self.hear_accused(verdict, &question, answer, refused);
        }
        let claim = chain.auditable(slot.round).and_then(|open| open.claim(&member));
        let Some(claim) = claim.filter(|_| slot.branch == chain.agreed.branch) else {
            return Ok(());
        };
        let bound = self.node.config.run.verification.trace_bound;
        let told = answer.is_some();
        let heard = answer.map_or(Heard::Invalid, |answer| {
            question.hear(claim, answer, bound, Scheme::Ed25519)
        });
        let agrees = verdict.finding == Finding::Agrees;
        match heard {
            Heard::Parts(step, shown) => {
                let (member, round, steps) = (member.short(), slot.round, replayed::parted(step));
                self.notice(Notice::Warning(match agrees {
                    true => format!("{member} did its work of round {round}, but committed to another trace: {steps}"),
                    false => format!("{member} did not do its work of round {round} as assigned: {steps}"),
                }));
                if agrees {
                    verdict.finding = Finding::Untold;
                }
                verdict.replayed = Some(*shown);
                self.handle(Event::Audited(verdict))
            }
            Heard::Invalid | Heard::Before if !agrees => self.handle(Event::Audited(verdict)),
            Heard::Proven(shown) => {
                verdict.replayed = Some(*shown);
                self.handle(Event::Audited(verdict))
            }
            Heard::Invalid if refused || told => {
                verdict.finding = Finding::Untold;
                self.handle(Event::Audited(verdict))
            }
            Heard::Invalid | Heard::Before => Ok(()),
        }
    }

    /// What a member tells of its trace that is said to have told nothing, or other steps.
    fn hear_accused(
        &mut self,
        mut verdict: Verdict,
        question: &Question,
        answer: Option<Answer>,
        refused: bool,
    ) -> Result<(), NodeError> {
        let Some(claim) = self.state.chain().accusation(&verdict).map(|open| open.claim) else {
            return Ok(());
        };
        let bound = self.node.config.run.verification.trace_bound;
        verdict.finding = match answer {
            Some(answer) => question.judge(&claim, &answer, bound, Scheme::Ed25519),
            None if refused => Finding::Untold,
            None => return Ok(()),
        };
        self.handle(Event::Audited(verdict))
    }
}

/// What it takes to ask for accumulators.
struct Opening {
    net: Net,
    /// The root of an empty one.
    zero: Hash,
    /// Bytes of one, or at most.
    limit: u64,
    /// Whether some leaves are enough.
    by_leaf: bool,
}

impl Opening {
    /// Asks once, after a while.
    async fn of(&self, audit: &Audit, after: Duration) -> Option<Opened> {
        tokio::time::sleep(after).await;
        let (order, commit) = (&audit.order, &audit.order.contribution.commit);
        let patience = if order.draw > 0 { 4 * OPENING } else { OPENING };
        let leaves = order.leaves(leaf_count(self.limit)).filter(|_| self.by_leaf);
        transfer::accumulators(
            &self.net,
            commit,
            self.zero,
            &audit.providers,
            self.limit,
            leaves,
            patience,
        )
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window {
        half: Round(14),
        end: Round(17),
    };

    /// What follows after questions at these seconds, each with whether the member was able and how long it was waited for; `record` is the last one.
    fn after(questions: &[(u64, bool, u64)], record: u64) -> Next {
        let began = Instant::now();
        let at = |secs| began + Duration::from_secs(secs);
        let (mut tries, mut now) = (Tries::new(began, Round(10)), began);
        for (asked, able, waited) in questions {
            (tries.asked, now) = (at(*asked), at(asked + waited));
            tries.again(*able, now);
        }
        tries.next(now, Round(record), &WINDOW)
    }

    #[test]
    fn who_was_able_and_gave_nothing_three_times_has_refused_when_it_is_late() {
        let thrice = [(0, true, 0); 3];
        assert_eq!(after(&thrice, 11), Next::Ask(SOON), "it may change its mind");
        let often: Vec<_> = (0..13).map(|_| (0, true, 0)).collect();
        assert_eq!(after(&often, 11), Next::Ask(AGAIN));
        assert_eq!(after(&[(0, true, 0), (4, true, 0), (9, true, 1)], 11), Next::Accuse);
        assert_eq!(after(&thrice, 14), Next::Accuse, "rounds are short");
        assert_eq!(after(&thrice[1..], 14), Next::Ask(SOON), "twice is not enough");
        let endless = [(0, true, 30), (31, true, 30)];
        assert_eq!(after(&endless, 11), Next::Accuse, "answers that do not end");
        assert_eq!(after(&endless[1..], 11), Next::Ask(SOON), "it may have been the line");
        assert_eq!(
            after(&[(0, false, 30); 2], 11),
            Next::Ask(LATER),
            "it went away over it"
        );
    }

    #[test]
    fn who_goes_silent_is_asked_until_no_record_can_have_the_verdict() {
        let gone = [(0, true, 0), (1, true, 0), (2, false, 3), (600, false, 3)];
        assert_eq!(after(&gone, 16), Next::Ask(LATER));
        assert_eq!(after(&gone, 17), Next::Drop, "who is gone has not refused");
        let back = [(605, true, 0), (605, true, 0), (606, true, 0)];
        assert_eq!(
            after(&[&gone[..], &back].concat(), 11),
            Next::Ask(SOON),
            "it has just come back"
        );
        assert_eq!(after(&[&gone[..], &back].concat(), 14), Next::Accuse);
        assert_eq!(after(&[&gone[..], &back, &[(615, true, 0)]].concat(), 11), Next::Accuse);
    }
}
