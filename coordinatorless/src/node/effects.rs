//! What the driver does for each effect of the core.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::seq::SliceRandom;

use super::driver::{Driver, Job};
use super::transfer::there_first;
use super::{NodeError, Work, transfer};
use crate::net::{Request, Response};
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::{Body, Signed};

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
            Effect::Speed(order) => self.prove_speed(order)?,
            Effect::OpenSpeed(test) => self.give(Work::OpenSpeed(test))?,
            Effect::CheckSpeed(check) => self.look_at_speed(*check),
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
        // By chance: no well-chosen id comes first each time.
        providers.shuffle(&mut rand::rng());
        let providers = there_first(&self.node.net, providers);
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
}
