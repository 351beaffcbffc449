//! Who holds what (R9): blobs fetched as their commits appear, `Have` messages, and the repair of what was lost on the way.

use super::event::{Effect, Timer};
use super::{HAVE_PAUSE, State};
use crate::types::*;
use crate::wire::{Body, Signed};

/// Messages of others that one beat passes on to one peer at most.
const REPAIRS_PER_BEAT: usize = 4;
/// Peers named in a `Have` at most.
const MAX_LISTED: usize = 1024;

impl State {
    /// A commit for this round: remembered, and its blob fetched at once.
    pub(super) fn commit(&mut self, now: Micros, message: Signed) {
        let Body::Commit(commit) = message.body.clone() else {
            return;
        };
        let (branch, round) = self.height();
        let slot = commit.slot;
        if slot.branch == branch && slot.round < round {
            return; // late
        }
        if slot.branch == branch && slot.round == round.next() {
            self.round.keep_early(message);
            return;
        }
        if slot != self.chain.next_slot() {
            return self.maybe_behind(now, message.signer, slot);
        }
        let contribution = Contribution {
            member: message.signer,
            commit,
            signature: message.signature,
        };
        if let Some(known) = self.round.commits.get(&message.signer) {
            if known.commit != contribution.commit {
                self.reject(message.signer, "commit", "a second commit for the same round".into());
            }
            return;
        }
        if let Err(violation) = self
            .chain
            .check_commit(&self.config, &self.assignment, &contribution, self.scheme)
        {
            return self.reject(message.signer, "commit", violation.to_string());
        }
        self.round.commits.insert(message.signer, contribution);
        self.round.commit_seen.insert(message.signer, now);
        self.fetch(message.signer);
    }

    /// Orders a commit's blob from everyone who says that they hold it.
    fn fetch(&mut self, member: PeerId) {
        let Some(contribution) = self.round.commits.get(&member) else {
            return;
        };
        let commit = contribution.commit.clone();
        if self.round.held.contains(&commit.blob) || self.round.bad.contains(&commit.blob) {
            return;
        }
        let slot = self.chain.next_slot();
        let others = self.haves.iter().filter(|(id, have)| {
            **id != member && have.slot.round == slot.round && have.blobs.binary_search(&commit.blob).is_ok()
        });
        let providers = std::iter::once(member).chain(others.map(|(id, _)| *id)).collect();
        self.out.push(Effect::Fetch {
            member,
            commit,
            providers,
        });
    }

    pub(super) fn blob_held(&mut self, now: Micros, blob: Hash) {
        if self.round.author(&blob).is_none() {
            return;
        }
        if self.round.held.insert(blob) {
            self.round.held_since.insert(blob, now);
            self.round.last_blob = now;
            self.plan_have(now);
        }
        self.recheck(now);
        self.try_propose(now);
    }

    pub(super) fn blob_bad(&mut self, now: Micros, blob: Hash, reason: String) {
        let Some(member) = self.round.author(&blob) else { return };
        self.round.bad.insert(blob);
        self.reject(member, "contribution", reason);
        self.try_propose(now);
    }

    /// Takes what another peer says it holds, and whom it hears.
    pub(super) fn have(&mut self, now: Micros, signer: PeerId, have: Have) {
        if have.blobs.len() > MAX_LISTED || have.heard.len() > MAX_LISTED {
            return self.reject(signer, "have", "names too many".into());
        }
        if !have.blobs.is_sorted() || !have.heard.is_sorted() {
            return self.reject(signer, "have", "is not sorted".into());
        }
        if self
            .haves
            .get(&signer)
            .is_some_and(|known| known.sequence >= have.sequence)
        {
            return;
        }
        if self.is_member(&signer) || !self.is_member(&self.keys.id()) {
            self.compare_tips(now, signer, &have);
        }
        if !self.is_member(&signer) {
            // Someone who missed its own lapse, or a newcomer: nobody else tells it where the run is.
            if let Some(mine) = self
                .last_have
                .clone()
                .filter(|_| have.tip_round < self.chain.agreed.round)
            {
                self.out.push(Effect::Send(signer, mine));
            }
        } else {
            self.haves.insert(signer, have);
            self.note_widely_held(now);
            self.try_propose(now);
        }
    }

    /// Tells soon what this peer holds: not at once, so that several blobs make one message.
    pub(super) fn plan_have(&mut self, now: Micros) {
        if !self.round.have_planned {
            self.round.have_planned = true;
            self.out.push(Effect::SetTimer(Timer::Settled, now + HAVE_PAUSE));
        }
    }

    pub(super) fn tell_have(&mut self, now: Micros) {
        self.round.have_planned = false;
        self.sequence += 1;
        let me = self.keys.id();
        let round = self.height().1;
        let lapse = self.config.membership.lapse_rounds;
        let heard = |id: &PeerId| {
            *id == me || self.is_alive(now, id) || self.heard.get(id).is_some_and(|(_, at)| at.0 + lapse > round.0)
        };
        let have = Have {
            slot: self.chain.next_slot(),
            sequence: self.sequence,
            tip: self.chain.agreed.record,
            tip_round: self.chain.agreed.round,
            blobs: self.round.held.iter().copied().take(MAX_LISTED).collect(),
            heard: self.chain.active().filter(heard).take(MAX_LISTED).collect(),
        };
        self.haves.insert(me, have.clone());
        self.note_widely_held(now);
        self.last_have = Some(self.broadcast(Body::Have(have)));
    }

    /// Weight of those who say, for this round, that they hold the blob.
    pub(super) fn weight_holding(&self, blob: &Hash) -> u64 {
        let slot = self.chain.next_slot();
        let me = self.keys.id();
        let holds = |id: &PeerId| {
            if *id == me {
                return self.round.held.contains(blob);
            }
            let have = self
                .haves
                .get(id)
                .filter(|have| have.slot.branch == slot.branch && have.slot.round == slot.round);
            have.is_some_and(|have| have.blobs.binary_search(blob).is_ok())
        };
        self.voters
            .iter()
            .filter(|(id, _)| holds(id))
            .map(|(_, weight)| weight)
            .sum()
    }

    /// Remembers since when each valid commit has been held widely and here, for R12.
    pub(super) fn note_widely_held(&mut self, now: Micros) {
        let blobs: Vec<Hash> = self.round.held.iter().copied().collect();
        for blob in blobs {
            if !self.round.wide_since.contains_key(&blob) && self.voters.quorum(self.weight_holding(&blob)) {
                self.round.wide_since.insert(blob, now);
            }
        }
    }

    /// Once a second: fetch again what is missing, say again what others seem to lack.
    pub(super) fn repair(&mut self, now: Micros) {
        let waiting: Vec<PeerId> = self.round.commits.keys().copied().collect();
        waiting.into_iter().for_each(|member| self.fetch(member));
        self.fetch_named();
        let slot = self.chain.next_slot();
        let mut sends = Vec::new();
        for (id, have) in self
            .haves
            .iter()
            .filter(|(id, have)| **id != self.keys.id() && have.slot == slot)
        {
            // My own commit first, then others' that I hold.
            let mine = self.round.commits.get(&self.keys.id());
            let others = self
                .round
                .commits
                .values()
                .filter(|one| self.round.held.contains(&one.commit.blob));
            let lacking = mine
                .into_iter()
                .chain(others)
                .filter(|one| have.blobs.binary_search(&one.commit.blob).is_err());
            for one in lacking.take(REPAIRS_PER_BEAT) {
                let body = Body::Commit(one.commit.clone());
                sends.push(Effect::Send(
                    *id,
                    Signed {
                        signer: one.member,
                        body,
                        signature: one.signature,
                    },
                ));
            }
        }
        self.out.extend(sends);
        if self
            .round
            .voting_since
            .is_some_and(|since| since + super::SECOND / 2 < now)
        {
            for message in self.agreement.repeat() {
                self.out.push(Effect::Broadcast(message));
            }
        }
        let requests: Vec<Signed> = self
            .verdicts
            .values()
            .map(signed_verdict)
            .take(REPAIRS_PER_BEAT)
            .collect();
        self.out.extend(requests.into_iter().map(Effect::Broadcast));
    }
}

fn signed_verdict(signed: &SignedVerdict) -> Signed {
    Signed {
        signer: signed.auditor,
        body: Body::Verdict(signed.verdict.clone()),
        signature: signed.signature,
    }
}
