//! What the driver does for each effect of the core.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::driver::{Asking, AuditReady, Driver, Job};
use super::{NodeError, Work, transfer};
use crate::net::{Request, Response};
use crate::protocol::event::{AuditOrder, Effect};
use crate::protocol::replayed::{self, Question};
use crate::types::*;
use crate::wire::{Body, Signed};

/// How long an audited member may take to open an accumulator; four times that where everyone asks for it.
const OPENING: Duration = Duration::from_secs(30);
/// How long a member is asked again that could not be reached for it.
const REOPENING: Duration = Duration::from_secs(10);
/// How long one question for a trace may take.
const ANSWER: Duration = Duration::from_secs(5);
/// Peers asked for an opened accumulator.
const MAX_OPENERS: usize = 16;
/// Before a model that could not be built is tried again.
pub(super) const AGAIN: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn carry_out(&mut self, effects: Vec<Effect>) -> Result<(), NodeError> {
        for effect in effects {
            self.effect(effect)?;
        }
        self.apply_next();
        Ok(())
    }

    fn effect(&mut self, effect: Effect) -> Result<(), NodeError> {
        match effect {
            // Both return when the bytes are on disk: nothing after them leaves this peer before.
            Effect::Persist(entry) => self.node.store.wal_append(&entry)?,
            Effect::ClearWal => self.node.store.wal_clear()?,
            Effect::Store { decided, state } => self.node.store.put(&decided, &state.to_bytes())?,
            Effect::Broadcast(message) => {
                if matches!(message.body, Body::Join(_)) {
                    self.node.net.announce(message.to_frame().into());
                }
                self.node.net.broadcast(self.link_frame(&message));
            }
            Effect::Multicast { to, message } => {
                let frame = self.link_frame(&message);
                to.iter().for_each(|id| self.node.net.send(*id, frame.clone()));
            }
            Effect::Send(to, message) => self.node.net.send(to, self.link_frame(&message)),
            Effect::SetTimer(timer, at) => drop(self.timers.insert(timer, at)),
            Effect::CancelTimer(timer) => drop(self.timers.remove(&timer)),
            Effect::Train(order) => {
                self.training = (self.training.0 + 1, order.round);
                let left = Duration::from_micros(order.until.saturating_sub(self.now()));
                self.give(Work::Train {
                    id: self.training.0,
                    order,
                    deadline: Instant::now() + left,
                })?;
            }
            Effect::Encode(order) => self.give(Work::Encode(order))?,
            // One piece is in work at a time. With overlap it may be that of the round after.
            Effect::StopTraining(round) if self.training.1 <= round => self.node.host.stop.up_to(self.training.0),
            Effect::StopTraining(_) => {}
            Effect::Fetch { commit, providers, .. } => self.fetch(commit, providers),
            // Begun when all effects are carried out: then it is known how far there is to go.
            Effect::Apply(decided) => self.applying.push_back(decided),
            Effect::Rollback { branch, round } => {
                self.node.store.truncate_above(round)?;
                self.applying.clear();
                self.load_model(branch, round);
            }
            Effect::Resync { round, .. } => {
                // Whatever was wrong with the model in memory, it is built again from certified bytes.
                let branch = self.state.chain().agreed.branch;
                self.load_model(branch, round);
            }
            Effect::Audit(order) => self.prepare_audit(order),
            Effect::AskRecords { peer, from } => {
                let net = self.node.net.clone();
                self.jobs.spawn(async move {
                    match net
                        .request(peer, Request::Records { from, max: 256 }, Duration::from_secs(10))
                        .await
                    {
                        Ok(Response::Records(records)) => Job::Records(peer, records),
                        _ => Job::Nothing,
                    }
                });
            }
            Effect::Members(members) => {
                self.members = members;
                self.keep_connections();
            }
            Effect::Notice(notice) => self.notice(notice),
        }
        Ok(())
    }

    fn link_frame(&self, message: &Signed) -> Bytes {
        message.to_link(self.keys.id(), self.state.chain().agreed.run).into()
    }

    fn fetch(&mut self, commit: Commit, mut providers: Vec<PeerId>) {
        if !self.fetching.insert(commit.blob) {
            return;
        }
        providers.retain(|id| *id != self.keys.id());
        let (net, check, blob) = (self.node.net.clone(), self.node.host.check.clone(), commit.blob);
        self.jobs
            .spawn(async move { Job::Wanted(blob, transfer::want(net, commit, providers, check).await) });
    }

    /// One record at a time: gathered, then applied. If there are more than anyone keeps the contributions of (R17), a snapshot is the way.
    pub(super) fn apply_next(&mut self) {
        if self.busy {
            return;
        }
        if self.applying.len() as u64 > transfer::reach(self.node.config.run.storage.snapshot_rounds) {
            self.applying.clear();
            let (branch, round) = (self.state.chain().agreed.branch, self.state.chain().agreed.round);
            return self.load_model(branch, round);
        }
        let Some(decided) = self.applying.pop_front() else {
            return;
        };
        self.busy = true;
        let (net, epoch, others) = (self.node.net.clone(), self.epoch, self.others());
        self.jobs
            .spawn(async move { Job::Gathered(epoch, transfer::gather(&net, decided, &others).await) });
    }

    /// Builds the model after `round` from the newest snapshot and the counted bytes since.
    pub(super) fn load_model(&mut self, branch: Branch, round: Round) {
        self.epoch += 1;
        self.busy = true;
        self.model = None;
        let (net, store, epoch, others) = (
            self.node.net.clone(),
            self.node.store.clone(),
            self.epoch,
            self.others(),
        );
        let spacing = self.node.config.run.storage.snapshot_rounds;
        self.jobs.spawn(async move {
            let source = transfer::model_source(&net, &store, round, &others, spacing).await;
            if source.is_err() {
                tokio::time::sleep(AGAIN).await;
            }
            Job::Source(epoch, branch, source)
        });
    }

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
            began: Instant::now(),
            refused: 0,
        };
        self.ask(asking, Duration::ZERO);
    }

    /// Asks once more, after a while.
    pub(super) fn ask(&mut self, asking: Asking, after: Duration) {
        let ask = asking.question.ask(asking.verdict.lot.clone());
        let (net, member) = (self.node.net.clone(), asking.verdict.member);
        self.jobs.spawn(async move {
            tokio::time::sleep(after).await;
            let answer = match net.request(member, Request::Trace(ask), ANSWER).await {
                Ok(Response::Trace(answer)) => Some(answer),
                _ => None,
            };
            Job::Trace(Box::new(asking), answer)
        });
    }

    fn prepare_audit(&mut self, order: AuditOrder) {
        if order.accusation.is_some_and(|accused| !accused.replay) {
            let bound = self.node.config.run.verification.bound;
            return self.ask_for_trace(replayed::told(&order, bound), Trace::default());
        }
        let (net, store, others) = (self.node.net.clone(), self.node.store.clone(), self.others());
        let limit = self.node.config.accumulator_bytes;
        let zero = self.node.config.run.verification.accumulator_zero;
        let spacing = self.node.config.run.storage.snapshot_rounds;
        let by_leaf = self.node.config.opens_leaves;
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
            let patience = if order.draw > 0 { 4 * OPENING } else { OPENING };
            let leaves = order.leaves(super::leaf_count(limit)).filter(|_| by_leaf);
            let began = Instant::now();
            let accumulators = loop {
                let opened =
                    transfer::accumulators(&net, &commit, zero, &providers, limit, leaves.clone(), patience).await;
                // Who was just killed has not refused, and is heard again before long.
                if opened.is_some() || began.elapsed() > REOPENING {
                    break opened;
                }
                tokio::time::sleep(AGAIN).await;
            };
            Job::Audit(Box::new(AuditReady {
                order,
                source,
                shards,
                accumulators,
            }))
        });
    }
}
