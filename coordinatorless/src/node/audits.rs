//! What an auditor asks of a member: its accumulators before the replay, its trace after it.
//!
//! Whoever gives no answer is asked again, soon at first, later once a second. It has refused if that happened [`REFUSALS`] times in a row while it
//! was heard and had the audited record in its chain: who is gone, has just come back, or is behind has not. Who begins to open and does not end
//! has refused after [`OPENING`]; where a round's verdicts are over sooner, nobody says so in time.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::driver::{Driver, Job};
use super::effects::AGAIN;
use super::{ModelSource, NodeError, Opened, Work, leaf_count, transfer};
use crate::net::{Net, Request, Response};
use crate::protocol::event::{AuditOrder, Event, Notice};
use crate::protocol::replayed::{self, Answer, Heard, PATIENCE, Question, REFUSALS};
use crate::types::*;
use crate::wire::Scheme;

/// How long an audited member may take to open an accumulator; four times that where everyone asks for it.
const OPENING: Duration = Duration::from_secs(30);
/// How long a member is asked for it that gives none, if there is no end to the round's verdicts before.
const REOPENING: Duration = Duration::from_secs(10);
/// How long one question for a trace may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an accusation waits for it.
const ACCUSED: Duration = Duration::from_secs(1);
/// Peers asked for an opened accumulator.
const MAX_OPENERS: usize = 16;
/// Before somebody is asked again for the first times: rounds may be short.
const SOON: Duration = Duration::from_millis(250);

/// How often somebody was asked that gave no answer.
pub(super) struct Tries {
    began: Instant,
    all: u32,
    /// In a row, each time able to answer.
    refused: u32,
}

impl Tries {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            all: 0,
            refused: 0,
        }
    }

    /// It gave no answer once more.
    fn again(&mut self, able: bool) {
        self.all = self.all.saturating_add(1);
        self.refused = if able { self.refused.saturating_add(1) } else { 0 };
    }

    fn pause(&self) -> Duration {
        if self.all <= REFUSALS { SOON } else { AGAIN }
    }

    fn has_refused(&self) -> bool {
        self.refused >= REFUSALS
    }
}

/// A replay that waits for what the member is to open, or has it.
pub(super) struct AuditReady {
    order: AuditOrder,
    source: Result<ModelSource, String>,
    shards: Vec<Bytes>,
    accumulators: Option<Opened>,
    /// Who may have what is to be opened.
    providers: Vec<PeerId>,
    /// The record with which asking ends.
    until: Round,
    tries: Tries,
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
            tries: Tries::new(),
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

    /// Gathers what a replay takes, and asks the member for what it is to open; of who is only said to have told nothing, for its trace.
    pub(super) fn prepare_audit(&mut self, order: AuditOrder) {
        if order.accusation.is_some_and(|accused| !accused.replay) {
            let bound = self.node.config.run.verification.bound;
            return self.ask_for_trace(replayed::told(&order, bound), Trace::default());
        }
        let (net, store, others) = (self.node.net.clone(), self.node.store.clone(), self.others());
        let spacing = self.node.config.run.storage.snapshot_rounds;
        let until = replayed::open_until(&self.node.config.run, self.state.chain(), &order);
        let opening = self.opening();
        self.jobs.spawn(async move {
            let (member, commit) = (order.contribution.member, order.contribution.commit.clone());
            let source = transfer::model_source(&net, &store, order.work.base, &others, spacing).await;
            let shards = transfer::fetch_contribution(&net, &commit, &others)
                .await
                .unwrap_or_default();
            // Whoever accused it had them from the member, under the same hashes; where everyone is asked, others soon have them too, and one
            // member need not serve all.
            let handed_on = order
                .accusation
                .map(|accused| accused.by)
                .into_iter()
                .chain(others.iter().copied().filter(|_| order.draw > 0));
            let providers: Vec<PeerId> = std::iter::once(member)
                .chain(handed_on.filter(|id| *id != member))
                .take(MAX_OPENERS)
                .collect();
            let ready = AuditReady {
                order,
                source,
                shards,
                accumulators: None,
                providers,
                until,
                tries: Tries::new(),
            };
            opening.of(Box::new(ready)).await
        });
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
    pub(super) fn hear_opened(&mut self, mut ready: Box<AuditReady>) -> Result<(), NodeError> {
        let slot = ready.order.contribution.commit.slot;
        if ready.accumulators.is_none() {
            let able = self.is_able(&ready.order.contribution.member, &slot);
            ready.tries.again(able);
            if ready.tries.began.elapsed() < REOPENING && self.state.chain().agreed.round < ready.until {
                let opening = self.opening();
                self.jobs.spawn(async move {
                    tokio::time::sleep(ready.tries.pause()).await;
                    opening.of(ready).await
                });
                return Ok(());
            }
            // Who lets a whole patience pass has refused, too.
            let stalled = able && ready.tries.began.elapsed() >= OPENING;
            if !(ready.tries.has_refused() || stalled) {
                return Ok(());
            }
        }
        let AuditReady {
            order,
            source,
            shards,
            accumulators,
            ..
        } = *ready;
        match source {
            Ok(source) => self.give(Work::Audit {
                order,
                source,
                shards,
                accumulators,
            }),
            Err(reason) => {
                self.notice(Notice::Warning(format!("an audit could not be done: {reason}")));
                Ok(())
            }
        }
    }

    /// Whether this member could answer about the round of this slot.
    fn is_able(&self, member: &PeerId, slot: &Slot) -> bool {
        self.state.alive(self.now()).contains(member) && self.state.has_decided(member, slot)
    }

    /// What an audited member told of its trace, or that it told nothing.
    pub(super) fn hear_trace(&mut self, mut asking: Asking, answer: Option<Answer>) -> Result<(), NodeError> {
        let (slot, member) = (asking.verdict.slot, asking.verdict.member);
        let chain = self.state.chain().clone();
        // An accusation says more with the member's steps, and holds without.
        let patient = asking.verdict.finding != Finding::Differs;
        if answer.is_none() {
            asking.tries.again(self.is_able(&member, &slot));
            if patient && asking.tries.began.elapsed() < PATIENCE && chain.agreed.round < asking.until {
                let pause = asking.tries.pause();
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
    /// Asks once.
    async fn of(&self, mut ready: Box<AuditReady>) -> Job {
        let (order, commit) = (&ready.order, &ready.order.contribution.commit);
        let patience = if order.draw > 0 { 4 * OPENING } else { OPENING };
        let leaves = order.leaves(leaf_count(self.limit)).filter(|_| self.by_leaf);
        let (providers, limit) = (&ready.providers, self.limit);
        ready.accumulators =
            transfer::accumulators(&self.net, commit, self.zero, providers, limit, leaves, patience).await;
        Job::Audit(ready)
    }
}
