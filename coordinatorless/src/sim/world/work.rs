//! The host's part: training and audits, of which nothing is simulated but the time they take and what a replay would show.

use super::{Item, World};
use crate::protocol::SECOND;
use crate::protocol::audit::Claim;
use crate::protocol::event::{AuditOrder, Encode, Event, TrainOrder, Trained};
use crate::protocol::replayed::{self, Answer, Ask, Heard, PATIENCE, Question, REFUSALS, Window};
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
        let trace = trace(&order, &peer.keys.id(), done);
        let trace_root = trace.root();
        peer.disk.traces.keep(&self.config, encode.branch, order.round, trace);
        let trained = Trained {
            branch: encode.branch,
            round: order.round,
            shards: vec![shard],
            len: BLOB_BYTES,
            tokens: done * self.config.data.batch_tokens(),
            loss_micros: 2_000_000,
            trace_root,
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
        if order.accusation.is_some_and(|accused| !accused.replay) {
            let verdict = replayed::told(&order, self.config.verification.bound);
            return self.ask_later(at, Asking::new(verdict, Trace::default(), self.now));
        }
        let Some(chain) = self.chain(at) else { return };
        let window = replayed::opening(&self.config, chain, &order);
        self.ask_to_open(at, self.peers[at].life, order, window);
    }

    /// R25: asks the audited member for its accumulators, while it is away again and again until hardly a record can have the verdict.
    pub(super) fn ask_to_open(&mut self, at: usize, life: u32, order: AuditOrder, window: Window) {
        let Some(round) = self.chain(at).map(|chain| chain.agreed.round) else {
            return;
        };
        if self.peers[at].life != life {
            return;
        }
        let member = order.contribution.member;
        let processes: Vec<usize> = self.processes(&member).collect();
        for of in &processes {
            self.gang.is_asked(*of, &order.contribution.commit, window.end);
        }
        let there =
            |of: &usize| self.side[*of] == self.side[at] && self.peers[*of].state.is_some() && !self.gang.is_away(*of);
        if processes.iter().any(there) || self.gang.is_lazy(at) {
            return self.replay(at, order);
        }
        if round >= window.end {
            let verdict = replayed::unanswered(&order, self.config.verification.bound);
            return self.event(at, life, Event::Audited(verdict));
        }
        let order = Box::new(order);
        self.push(
            self.now + SECOND,
            Item::Audit {
                peer: at,
                life,
                order,
                window,
            },
        );
    }

    /// What an auditor finds that was given what it asked for.
    fn replay(&mut self, at: usize, order: AuditOrder) {
        let (slot, member) = (order.contribution.commit.slot, order.contribution.member);
        let replays = self.replays(at, &order);
        let shown = false_work::shows(&order.contribution.commit);
        let lazy = self.gang.is_lazy(at);
        let finding = match replays {
            _ if lazy => Finding::Agrees,
            true => shown,
            false => Finding::Differs,
        };
        let steps = order.contribution.commit.tokens / self.config.data.batch_tokens();
        // Who is lazy has nothing to go by but what others of its rounds look like.
        let trace = match lazy {
            true => guessed(steps),
            false => trace(&order.work, &member, steps),
        };
        let first = order.draw == 0;
        let verdict = Verdict {
            slot,
            member,
            draw: order.draw,
            lot: order.lot,
            finding,
            distance_nanos: if finding == Finding::Agrees { 0 } else { 500_000_000 },
            bound_nanos: 20_000_000,
            replayed: None,
        };
        let about_steps = order
            .accusation
            .is_some_and(|accused| accused.finding == Finding::Untold);
        if finding == Finding::Agrees && (first || about_steps) {
            return self.ask_later(at, Asking::new(verdict, trace, self.now));
        }
        let life = self.peers[at].life;
        let event = Box::new(Event::Audited(verdict));
        self.push(self.now + SECOND / 2, Item::Event { peer: at, life, event });
    }

    fn ask_later(&mut self, at: usize, asking: Asking) {
        let (life, asking) = (self.peers[at].life, Box::new(asking));
        self.push(self.now + SECOND / 2, Item::Ask { peer: at, life, asking });
    }

    /// R25: asks the audited member for its trace, again and again for a while.
    pub(super) fn ask(&mut self, at: usize, life: u32, mut asking: Asking) {
        if self.peers[at].life != life {
            return;
        }
        let verdict = &asking.verdict;
        let (slot, member) = (verdict.slot, verdict.member);
        let peer = &self.peers[at];
        let Some(chain) = peer.state.as_ref().map(|state| state.chain().clone()) else {
            return;
        };
        let keys = peer.keys.clone();
        let claim = match verdict.draw {
            0 => chain.auditable(slot.round).and_then(|open| open.claim(&member)),
            _ => chain.accusation(verdict).map(|open| &open.claim),
        };
        let Some(claim) = claim.filter(|_| chain.agreed.branch == slot.branch) else {
            return;
        };
        let question = Question::new(&keys, slot, member, asking.trace.clone());
        let (answer, able) = self.told(at, &member, claim, &question.ask(verdict.lot.clone()));
        asking.refused = if able { asking.refused + 1 } else { 0 };
        let silent = asking.refused >= REFUSALS;
        let in_time = chain.agreed.round < replayed::ask_until(&self.config, &chain, verdict);
        let asked_in_time = *asking.in_time.get_or_insert(in_time);
        let patient = self.now < asking.began + PATIENCE.as_secs() * SECOND;
        if answer.is_none() && in_time && patient {
            return self.ask_later(at, asking);
        }
        let mut verdict = asking.verdict;
        let lazy = self.gang.is_lazy(at);
        let claimed = answer.as_ref().map(|answer| (answer.trace.clone(), answer.signature));
        let (bound, scheme) = (self.config.verification.trace_bound, self.scenario.scheme());
        if verdict.draw > 0 {
            verdict.finding = match answer {
                Some(answer) => question.judge(claim, &answer, bound, scheme),
                None if !silent => return,
                None => Finding::Untold,
            };
            return self.event(at, life, Event::Audited(verdict));
        }
        let heard = answer.map_or(Heard::Invalid, |answer| question.hear(claim, answer, bound, scheme));
        match (heard, claimed) {
            (Heard::Proven(shown), _) => verdict.replayed = Some(*shown),
            // It shows what it has: its guess, and what the member answered.
            (_, Some((claimed, answer))) if lazy => {
                verdict.replayed = Some(Replayed {
                    salt: question.salt,
                    trace: question.trace,
                    claimed,
                    answer,
                });
            }
            (Heard::Parts(_, shown), _) => (verdict.finding, verdict.replayed) = (Finding::Untold, Some(*shown)),
            (Heard::Invalid, _) if asked_in_time && silent => verdict.finding = Finding::Untold,
            _ => return,
        }
        self.event(at, life, Event::Audited(verdict));
    }

    /// What a member that can be reached tells this auditor, and whether it could know what it is asked.
    fn told(&mut self, at: usize, member: &PeerId, claim: &Claim, ask: &Ask) -> (Option<Answer>, bool) {
        let (auditor, config) = (self.peers[at].keys.id(), self.config.clone());
        let there = |of: &usize| self.side[*of] == self.side[at] && self.peers[*of].state.is_some();
        let processes: Vec<usize> = self.processes(member).filter(there).collect();
        let answer = processes.iter().find_map(|of| {
            let peer = &mut self.peers[*of];
            if claim.trace_root == false_work::other_steps().root() {
                return Some(false_work::answer(&peer.keys, ask, &auditor));
            }
            let chain = peer.state.as_ref()?.chain().clone();
            let answer = peer.disk.traces.answer(&chain, &config, &peer.keys, auditor, ask);
            answer.ok()
        });
        let knows = |of: &usize| {
            let state = self.peers[*of].state.as_ref();
            let agreed = state.map(|state| &state.chain().agreed);
            agreed.is_some_and(|agreed| agreed.branch == ask.slot.branch && agreed.round >= ask.slot.round)
        };
        (answer, processes.iter().any(knows))
    }
}

/// A member being asked for its trace.
pub(super) struct Asking {
    verdict: Verdict,
    trace: Trace,
    began: Micros,
    /// Whether it was first asked while it still had to answer.
    in_time: Option<bool>,
    /// How often in a row it could have answered and did not.
    refused: u32,
}

impl Asking {
    fn new(verdict: Verdict, trace: Trace, began: Micros) -> Self {
        Self {
            verdict,
            trace,
            began,
            in_time: None,
            refused: 0,
        }
    }
}

/// What the steps of a local round come to: the same for whoever does the same work.
fn trace(work: &TrainOrder, member: &PeerId, steps: u64) -> Trace {
    let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/sim-trace");
    hasher.update(&work.seed).update(&work.parent.0).update(&member.0);
    for number in [work.round.0, work.base.0, work.global_tokens] {
        hasher.update(&number.to_le_bytes());
    }
    let mut random = hasher.finalize_xof();
    let step = |_| {
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        let share = |at: usize| f32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])) / 65_536.0;
        (2.0 + share(0), f64::from(0.5 + share(2)))
    };
    Trace::of((0..steps).map(step))
}

/// What a lazy auditor makes up: as many steps, of a loss and a norm that are likely.
fn guessed(steps: u64) -> Trace {
    Trace::of((0..steps).map(|_| (2.5, 1.0)))
}
