//! What a scenario's faults do to the world, and what the checker sees of it.

use super::{Item, World};
use crate::agreement::Voters;
use crate::protocol::SECOND;
use crate::protocol::event::Event;
use crate::sim::fault::FaultKind;
use crate::types::*;
use crate::wire::{Body, Signed};

/// A peer that said goodbye stays this long, so that it is heard.
const GOODBYE: Micros = SECOND;

/// What ails a peer.
#[derive(Default)]
pub(super) struct Plight {
    /// Nothing reaches it before this.
    paused_until: Micros,
    /// What it sends is lost.
    pub mute: bool,
    /// How long a write to its log takes.
    pub disk: Micros,
    /// How long the writes of the step in progress have taken so far: what is sent after them leaves as much later.
    pub lag: Micros,
    /// The power fails at the next write to the log, for this long.
    fuse: Option<Micros>,
    /// Its clock: from this moment of the world on, at that local time, at a rate other than 1.
    clock: Option<(Micros, Micros, f64)>,
}

impl Plight {
    /// What its clock shows.
    pub fn local(&self, now: Micros) -> Micros {
        self.clock.map_or(now, |(since, local, rate)| {
            local + (now.saturating_sub(since) as f64 * rate) as Micros
        })
    }

    /// Whether it stands still.
    pub fn is_paused(&self, now: Micros) -> bool {
        self.paused_until > now
    }

    /// Its clock jumps, ahead or back; no clock shows a time before its first.
    fn jump(&mut self, now: Micros, secs: f64) {
        let (local, far) = (self.local(now), (secs.abs() * 1e6) as Micros);
        let local = if secs < 0.0 {
            local.saturating_sub(far).max(1)
        } else {
            local + far
        };
        self.clock = Some((now, local, self.rate()));
    }

    fn rate(&self) -> f64 {
        self.clock.map_or(1.0, |(_, _, rate)| rate)
    }
}

impl World {
    /// The time as a peer's core takes it. A liar's clock is its own business, and always right.
    pub(super) fn local(&self, peer: usize) -> Micros {
        let one = &self.peers[peer];
        if self.gang.has(peer) {
            return self.now;
        }
        one.clock.at(one.plight.local(self.now))
    }

    /// When a peer's core will have come to `at`, if its clock runs on as it does.
    pub(super) fn global(&self, peer: usize, at: Micros) -> Micros {
        let left = at.saturating_sub(self.local(peer));
        let rate = self.peers[peer].plight.rate();
        self.now + (left as f64 / rate) as Micros
    }

    pub(super) fn fault(&mut self, which: usize) {
        self.faults_left -= 1;
        let fault = self.scenario.faults[which].clone();
        let (now, micros) = (self.now, (fault.secs * 1e6) as Micros);
        if fault.kind == FaultKind::Heal {
            self.side.fill(0);
            self.peers.iter_mut().for_each(|peer| peer.plight.mute = false);
            return;
        }
        for peer in fault.peers {
            let plight = &mut self.peers[peer].plight;
            match fault.kind {
                FaultKind::Crash => self.crash(peer),
                FaultKind::Restart | FaultKind::Join => self.restart(peer, true),
                FaultKind::RestartWithoutWal => self.restart(peer, false),
                FaultKind::PowerLoss => plight.fuse = Some(micros),
                FaultKind::Pause => plight.paused_until = plight.paused_until.max(now + micros),
                FaultKind::SlowDisk => plight.disk = micros,
                FaultKind::ClockJump if !self.gang.has(peer) => plight.jump(now, fault.secs),
                FaultKind::Drift if !self.gang.has(peer) => {
                    plight.clock = Some((now, plight.local(now), fault.rate.clamp(0.1, 10.0)));
                }
                FaultKind::Drift | FaultKind::ClockJump | FaultKind::Heal => {}
                FaultKind::DuplicateKey => self.double(peer),
                FaultKind::Mute => plight.mute = true,
                FaultKind::Partition => self.side[peer] = 1 + which,
                FaultKind::Leave => {
                    let life = self.peers[peer].life;
                    self.event(peer, life, Event::Leave);
                    self.push(now + GOODBYE, Item::Exit { peer, life });
                }
            }
        }
    }

    /// Until when the peer that this is for stands still.
    pub(super) fn paused(&self, item: &Item) -> Option<Micros> {
        let peer = match item {
            Item::Deliver { to, .. } => *to,
            Item::Timer { peer, .. }
            | Item::TrainingDone { peer, .. }
            | Item::Fetched { peer, .. }
            | Item::AskRecords { peer, .. }
            | Item::Audit { peer, .. }
            | Item::Ask { peer, .. }
            | Item::Event { peer, .. } => *peer,
            Item::Fault(_) | Item::Wake(_) | Item::Look | Item::Exit { .. } => return None,
        };
        Some(self.peers[peer].plight.paused_until).filter(|until| *until > self.now)
    }

    /// Whether the power fails before this write to the log is done.
    pub(super) fn loses_power(&mut self, peer: usize) -> bool {
        let Some(secs) = self.peers[peer].plight.fuse.take() else {
            return false;
        };
        self.crash(peer);
        self.waking += 1;
        self.push(self.now + secs.max(1), Item::Wake(peer));
        true
    }

    pub(super) fn wake(&mut self, peer: usize) {
        self.waking -= 1;
        self.restart(peer, true);
    }

    /// A message leaves a peer: is it one that it may sign?
    pub(super) fn leaves(&mut self, at: usize, message: &Signed) {
        let peer = &self.peers[at];
        if let Body::Proposal(proposal) = &message.body {
            self.checker.proposed(&proposal.record);
        }
        if message.signer == peer.keys.id() {
            if let Body::Vote(vote) = &message.body {
                let (view, kind, record) = (vote.slot.view, vote.kind, vote.record);
                tracing::trace!(secs = self.now as f64 / 1e6, peer = at, view, ?kind, ?record, "votes");
            }
            if let Body::Regroup(Regroup {
                attempt,
                survivors,
                polka,
                ..
            }) = &message.body
            {
                let polka = polka.as_ref().map(|polka| (polka.view, polka.record));
                tracing::trace!(
                    secs = self.now as f64 / 1e6,
                    peer = at,
                    attempt,
                    ?survivors,
                    ?polka,
                    "regroups"
                );
            }
            let disk = &peer.disk;
            self.checker
                .says(at, message, disk.wal.len(), |blob| disk.blobs.contains(blob));
        }
    }

    /// Less than a third of the weight lies: that is what everything rests on.
    pub(super) fn weigh_liars(&mut self, at: usize, voters: &Voters) {
        if !self.is_faulty(at) {
            let faulty = self.gang.peers().chain(self.doubles.keys().copied());
            let weights = faulty.map(|at| voters.weight_of(&self.peers[at].keys.id()));
            let lying: u64 = weights.sum();
            self.checker.beyond |= lying > 0 && u128::from(lying) * 3 >= u128::from(voters.total());
        }
    }

    /// R11: whatever was decided, honest voters of more than a third of the weight hold every blob of it.
    pub(super) fn weigh_holders(&mut self, at: usize, decided: &Decided) {
        let slot = decided.record.slot;
        // A branch's first record has voters that no stored state names.
        if !self.checker.is_new(slot) || !decided.regroup.is_empty() || self.gang.has(at) {
            return;
        }
        let voters = match self.peers[at].disk.states.get(&slot.round.previous()) {
            Some(state) if state.agreed.branch == slot.branch => state.voters(),
            None if slot.round == Round(1) => crate::protocol::chain::ChainState::genesis(&self.config).voters(),
            _ => return,
        };
        let holding = |blob: &Hash| -> u64 {
            let honest = self.peers.iter().enumerate().filter(|(at, _)| !self.is_faulty(*at));
            honest
                .filter(|(_, peer)| peer.disk.blobs.contains(blob))
                .map(|(_, peer)| voters.weight_of(&peer.keys.id()))
                .sum()
        };
        let least = decided
            .record
            .contributions
            .iter()
            .map(|one| holding(&one.commit.blob))
            .min();
        if let Some(least) = least {
            self.checker.held(at, slot.round, least, voters.total());
        }
    }
}
