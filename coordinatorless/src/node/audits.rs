//! What an auditor asks of a member: its accumulators before the replay, its trace after it.
//!
//! Whoever gives no answer is asked again, until it has refused or hardly a record more can have the verdict ([`super::tries`]). It could answer while it
//! was heard and said that it has the audited record, or has been counted in [`REFUSALS`] records since it was asked, whatever it says.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::driver::{Driver, Job};
use super::tries::{Next, Tries};
use super::{ModelSource, NodeError, Opened, Work, leaf_count, transfer};
use crate::net::{Net, Request, Response};
use crate::protocol::event::{AuditOrder, Event, Notice};
use crate::protocol::replayed::{self, Answer, Heard, PATIENCE, Question, REFUSALS, Window};
use crate::types::*;
use crate::wire::Scheme;

/// How long an audited member may take to open an accumulator; four times that where everyone asks for it.
pub(super) const OPENING: Duration = Duration::from_secs(30);
/// How long that may still take when it is to be said that nothing was opened.
const LAST: Duration = Duration::from_secs(2);
/// How long one question for a trace may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an accusation waits for it.
const ACCUSED: Duration = Duration::from_secs(1);
/// Peers asked for an opened accumulator.
const MAX_OPENERS: usize = 16;

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
            decided: self.decided.subscribe(),
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
                audit.tries.ask_at(now + pause);
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
                    "rounds are too short to tell whether {member} is gone: what it sent in round {round} was not audited"
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
            let since = one.work.iter().filter(|(round, _)| *round > tries.record());
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
            let waits = asking.tries.elapsed() < PATIENCE || !asking.tries.has_refused();
            if patient && waits && chain.agreed.round < asking.until {
                let pause = asking.tries.pause();
                asking.tries.ask_at(Instant::now() + pause);
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
    /// The last record's round.
    decided: watch::Receiver<Round>,
}

impl Opening {
    /// Asks once, after a while, or at once for the last time when it is to be said that nothing came.
    async fn of(self, audit: &Audit, after: Duration) -> Option<Opened> {
        let end = audit.window.end;
        if *self.decided.borrow() >= end {
            return self.ask(audit).await;
        }
        let (mut pausing, mut asking) = (self.decided.clone(), self.decided.clone());
        tokio::select! {
            () = tokio::time::sleep(after) => {}
            _ = pausing.wait_for(|round| *round >= end) => {}
        }
        // What is on its way then may still arrive; a line of this peer's own that is back may still be used.
        let over = async {
            let _ = asking.wait_for(|round| *round >= end).await;
            tokio::time::sleep(LAST).await;
        };
        tokio::select! {
            opened = self.ask(audit) => opened,
            () = over => None,
        }
    }

    async fn ask(&self, audit: &Audit) -> Option<Opened> {
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
