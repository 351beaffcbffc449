//! The host's part: training and audits, of which nothing is simulated but the time they take and what a replay would show.

use super::{Item, World};
use crate::protocol::SECOND;
use crate::protocol::event::{AuditOrder, Event, TrainOrder, Trained};
use crate::sim::adversary::false_work;
use crate::types::*;

/// Bytes of a simulated contribution.
const BLOB_BYTES: u64 = 50_000;

impl World {
    pub(super) fn train(&mut self, at: usize, order: TrainOrder) {
        let quota: u64 = order.batches.iter().map(|range| range.len).sum();
        let speed = self.scenario.speeds.get(at).copied().unwrap_or(1.0);
        let batch = (self.scenario.batch_secs / speed * 1e6) as Micros;
        let time = self.global(at, order.until).saturating_sub(self.now);
        let done = quota.min(time / batch.max(1));
        let life = self.peers[at].life;
        self.peers[at].training = Some((order.round, done, order.branch));
        self.push(
            self.now + done * batch.max(1) + 1,
            Item::TrainingDone {
                peer: at,
                life,
                order: Box::new(order),
            },
        );
    }

    pub(super) fn training_done(&mut self, at: usize, life: u32, order: TrainOrder) {
        let peer = &mut self.peers[at];
        let running = peer
            .training
            .is_some_and(|(round, _, branch)| (round, branch) == (order.round, order.branch));
        if peer.life != life || !running {
            return;
        }
        let Some((_, done, _)) = peer.training.take().filter(|(_, done, _)| *done > 0) else {
            return;
        };
        let mut seed = order.parent.0.to_vec();
        seed.extend(peer.keys.id().0);
        seed.extend(order.branch.to_le_bytes());
        let shard = Hash::of(&seed);
        let blob = Hash::of(&shard.0);
        peer.disk.blobs.insert(blob);
        let trained = Trained {
            branch: order.branch,
            round: order.round,
            shards: vec![shard],
            len: BLOB_BYTES,
            tokens: done * self.config.data.batch_tokens(),
            loss_micros: 2_000_000,
            trace_root: Hash::default(),
            accumulator_before: order.accumulator,
            accumulator_after: Hash::of(&blob.0),
        };
        self.event(at, life, Event::Trained(trained));
    }

    pub(super) fn audit(&mut self, at: usize, order: AuditOrder) {
        let slot = order.contribution.commit.slot;
        let member = order.contribution.member;
        let finding = false_work::shows(&order.contribution.commit);
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
