//! What the world does for each effect of a peer's core, as [`crate::node`] does for a real one.

use std::sync::Arc;

use super::{Item, World};
use crate::protocol::event::{Effect, Notice};
use crate::types::*;

impl World {
    pub(super) fn carry_out(&mut self, peer: usize, effects: Vec<Effect>) {
        self.peers[peer].plight.lag = 0;
        for effect in effects {
            if matches!(effect, Effect::Persist(_)) && self.loses_power(peer) {
                return;
            }
            self.effect(peer, effect);
        }
    }

    pub(super) fn effect(&mut self, at: usize, effect: Effect) {
        let life = self.peers[at].life;
        match effect {
            Effect::Persist(entry) => {
                let peer = &mut self.peers[at];
                peer.disk.wal.push(entry);
                peer.disk.wal_lost = false;
                peer.plight.lag += peer.plight.disk;
            }
            Effect::ClearWal => {
                self.peers[at].disk.wal.clear();
                self.peers[at].disk.wal_lost = false;
                self.checker.log_cleared(at);
            }
            Effect::Store { decided, state } => {
                let round = decided.record.slot.round;
                self.weigh_holders(at, &decided);
                self.weigh_liars(at, &state.voters());
                self.checker.decided(at, &decided);
                let (slot, view) = (decided.record.slot, decided.certificate.slot.view);
                let (counted, changes) = (decided.record.contributions.len(), decided.record.changes.len());
                tracing::debug!(secs = self.now as f64 / 1e6, peer = at, branch = slot.branch, round = %slot.round, view, counted, changes, "decided");
                let line = [
                    &(at as u64).to_le_bytes()[..],
                    &self.now.to_le_bytes(),
                    &decided.record.hash().0,
                ]
                .concat();
                self.digest.update(&line);
                let disk = &mut self.peers[at].disk;
                disk.records.insert(round, decided);
                disk.states.insert(round, state);
            }
            Effect::Broadcast(message) => {
                self.leaves(at, &message);
                let message = Arc::new(message);
                let size = self.link_bytes(at, &message);
                let members: Vec<usize> = self.audience(at);
                members
                    .into_iter()
                    .for_each(|to| self.send(at, to, message.clone(), size));
            }
            Effect::Multicast { to, message } => {
                self.leaves(at, &message);
                let message = Arc::new(message);
                let size = self.link_bytes(at, &message);
                for to in to
                    .iter()
                    .filter_map(|id| self.index.get(id).copied())
                    .collect::<Vec<_>>()
                {
                    self.send(at, to, message.clone(), size);
                }
            }
            Effect::Send(to, message) => {
                self.leaves(at, &message);
                let size = self.link_bytes(at, &message);
                if let Some(to) = self.index.get(&to).copied() {
                    self.send(at, to, Arc::new(message), size);
                }
            }
            Effect::SetTimer(timer, when) => {
                self.order += 1;
                let generation = self.order;
                self.peers[at].timers.insert(timer, (generation, when));
                let when = self.global(at, when).max(self.now + 1);
                self.push(
                    when,
                    Item::Timer {
                        peer: at,
                        life,
                        timer,
                        generation,
                    },
                );
            }
            Effect::CancelTimer(timer) => drop(self.peers[at].timers.remove(&timer)),
            Effect::Train(order) => self.train(at, order),
            Effect::Encode(order) => self.encode(at, order),
            Effect::StopTraining(round) => {
                self.peers[at].training.take_if(|order| order.round <= round);
            }
            Effect::Fetch { commit, providers, .. } => self.fetch(at, &commit, &providers),
            Effect::Apply(decided) => {
                self.peers[at].applying.push(decided);
                self.apply(at);
            }
            Effect::Rollback { round, .. } => self.rollback(at, round),
            Effect::Resync { round, model_root, .. } => {
                self.checker.warned(at, round, &format!("resync to {model_root}"));
            }
            Effect::Audit(order) => self.audit(at, order),
            Effect::Speed(order) => self.prove_speed(at, order),
            Effect::OpenSpeed(test) => self.open_speed(at, &test),
            Effect::CheckSpeed(check) => self.look_at_speed(at, *check),
            Effect::AskRecords { peer, from } => {
                if let Some(peer) = self.index.get(&peer).copied().map(|peer| self.reached(peer))
                    && let Some(delay) = self.delay(at, peer)
                {
                    self.push(self.now + delay, Item::AskRecords { peer, asker: at, from });
                }
            }
            Effect::Members(_) => {}
            Effect::Notice(notice) => self.notice(at, notice),
        }
    }

    pub(super) fn notice(&mut self, at: usize, notice: Notice) {
        self.count_notice(at, &notice);
        tracing::debug!(secs = self.now as f64 / 1e6, peer = at, ?notice, "notices");
        match notice {
            Notice::Advanced {
                agree,
                round,
                model_root,
                ..
            } => {
                self.agreements.push(agree);
                self.digest
                    .update(&[&round.0.to_le_bytes()[..], &model_root.0].concat());
            }
            Notice::Slashed { member, round, .. } => match self.index.get(&member) {
                // What a liar decided may be what it alone says.
                Some(liar) if self.gang.has(*liar) && self.gang.has(at) => {}
                Some(liar) if self.gang.has(*liar) => {
                    let at = self.peers[at].state.as_ref().map(|state| state.chain().agreed.round);
                    self.slashed.entry(*liar).or_insert(at.unwrap_or(round));
                }
                Some(double) if self.is_faulty(*double) => {}
                _ => self.checker.slashed(at, round, member),
            },
            Notice::Speed {
                member,
                asked,
                proven: Some(shown),
            } => self.shown_speed(at, member, asked, shown),
            Notice::Warning(warning) => {
                let round = self.peers[at]
                    .state
                    .as_ref()
                    .map_or(Round(0), |state| state.chain().agreed.round);
                self.checker.warned(at, round, &warning);
            }
            _ => {}
        }
    }
}
