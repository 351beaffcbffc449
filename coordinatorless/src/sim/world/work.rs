//! The host's part: training and audits, of which nothing is simulated but the time they take and what a replay would show.

use super::{Item, World};
use crate::protocol::SECOND;
use crate::protocol::event::{AuditOrder, Encode, Event, TrainOrder, Trained};
use crate::sim::adversary::false_work;
use crate::types::*;

/// Bytes of a simulated contribution.
const BLOB_BYTES: u64 = 50_000;
/// How long it takes to encode it.
const ENCODING: Micros = 1000;
/// Pieces of training that a peer remembers: those of the round in progress and of the next.
const TRAINED: usize = 2;

impl World {
    pub(super) fn train(&mut self, at: usize, order: TrainOrder) {
        let quota: u64 = order.batches.iter().map(|range| range.len).sum();
        let speed = self.scenario.speeds.get(at).copied().unwrap_or(1.0);
        let batch = (self.scenario.batch_secs / speed * 1e6) as Micros;
        let time = self.global(at, order.until).saturating_sub(self.now);
        let done = quota.min(time / batch.max(1));
        let life = self.peers[at].life;
        self.peers[at].training = Some(order.clone());
        self.push(
            self.now + done * batch.max(1) + 1,
            Item::TrainingDone {
                peer: at,
                life,
                order: Box::new(order),
                done,
            },
        );
    }

    pub(super) fn training_done(&mut self, at: usize, life: u32, order: TrainOrder, done: u64) {
        let peer = &mut self.peers[at];
        if peer.life != life || peer.training.take_if(|running| *running == order).is_none() {
            return; // it crashed, or was stopped
        }
        let (branch, round, fruitful) = (order.branch, order.round, done > 0);
        peer.trained.push((order, done));
        let spare = peer.trained.len().saturating_sub(TRAINED);
        peer.trained.drain(..spare);
        self.event(
            at,
            life,
            Event::TrainingEnded {
                branch,
                round,
                fruitful,
            },
        );
    }

    pub(super) fn encode(&mut self, at: usize, encode: Encode) {
        let peer = &mut self.peers[at];
        let found = peer.trained.iter().find(|(order, _)| *order == encode.work);
        let Some((order, done)) = found.cloned() else { return };
        let mut seed = order.parent.0.to_vec();
        seed.extend(peer.keys.id().0);
        seed.extend(order.round.0.to_le_bytes());
        seed.extend(encode.branch.to_le_bytes());
        let shard = Hash::of(&seed);
        let blob = Hash::of(&shard.0);
        peer.disk.blobs.insert(blob);
        let trained = Trained {
            branch: encode.branch,
            round: order.round,
            shards: vec![shard],
            len: BLOB_BYTES,
            tokens: done * self.config.data.batch_tokens(),
            loss_micros: 2_000_000,
            trace_root: Hash::default(),
            accumulator_before: encode.accumulator,
            accumulator_after: Hash::of(&blob.0),
        };
        self.worked.insert(blob, order);
        let (life, event) = (peer.life, Box::new(Event::Trained(trained)));
        self.push(self.now + ENCODING, Item::Event { peer: at, life, event });
    }

    /// Whether a replay by this auditor would do what the member did: the same batches, from the same model, at the same point of the
    /// schedule.
    fn replays(&mut self, at: usize, order: &AuditOrder) -> bool {
        let (work, commit) = (&order.work, &order.contribution.commit);
        let same = self.worked.get(&commit.blob).is_none_or(|done| {
            let of = |order: &TrainOrder| (order.round, order.base, order.parent, order.global_tokens, order.seed);
            of(done) == of(work) && done.batches == work.batches
        });
        same && commit.base == work.base && commit.model_root == self.model(at, work.base)
    }

    pub(super) fn audit(&mut self, at: usize, order: AuditOrder) {
        let slot = order.contribution.commit.slot;
        let member = order.contribution.member;
        let replays = self.replays(at, &order);
        let shown = false_work::shows(&order.contribution.commit);
        let finding = if replays { shown } else { Finding::Differs };
        let verdict = Verdict {
            slot,
            member,
            draw: order.draw,
            lot: order.lot,
            finding,
            distance_nanos: if finding == Finding::Agrees { 0 } else { 500_000_000 },
            bound_nanos: 20_000_000,
        };
        let (life, event) = (self.peers[at].life, Box::new(Event::Audited(verdict)));
        self.push(self.now + SECOND / 2, Item::Event { peer: at, life, event });
    }
}
