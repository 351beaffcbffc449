//! Who holds what (R9): blobs fetched as their commits appear, `Have` messages, and the repair of what was lost on the way.

use std::sync::Arc;

use super::event::{Effect, Timer};
use super::membership::Standing;
use super::{FRESH, HAVE_PAUSE, SILENCE, State};
use crate::types::*;
use crate::wire::{Body, Signed};

/// Messages of others that one beat passes on to one peer at most.
const REPAIRS_PER_BEAT: usize = 4;
/// Bytes of a bitmap at most: a bit for each member.
const MAX_MAP: usize = super::membership::MAX_MEMBERS / 8;
/// A commit that others lack is said again once it has been known for this long: before, it may be on its way.
const REPAIR_AFTER: Micros = super::SECOND / 2;
/// Of many voters, this many pass on a commit that others lack.
const REPAIRERS: usize = 16;
/// Voters that pass on another's request or verdict.
const RELAYERS: usize = 2;
/// With so many voters, what one holds is told as much later as they are more.
const HAVE_VOTERS: u64 = 32;

impl State {
    /// A commit for this round: remembered, and its blob fetched at once.
    pub(super) fn commit(&mut self, now: Micros, message: &Signed) {
        let Body::Commit(commit) = &message.body else {
            return;
        };
        let (branch, round) = self.height();
        let slot = commit.slot;
        if slot.branch == branch && slot.round < round {
            return; // late
        }
        if slot.branch == branch && slot.round == round.next() {
            self.round.keep_early(message.clone());
            return;
        }
        if slot != self.chain.next_slot() {
            return self.maybe_behind(now, message.signer, slot);
        }
        if let Some(known) = self.round.commits.get(&message.signer) {
            if known.commit != *commit {
                self.reject(message.signer, "commit", "a second commit for the same round".into());
            }
            return;
        }
        let contribution = Contribution {
            member: message.signer,
            commit: commit.clone(),
            signature: message.signature,
        };
        if let Err(violation) = self
            .chain
            .check_commit(&self.config, &self.assignment, &contribution, self.scheme)
        {
            return self.reject(message.signer, "commit", violation.to_string());
        }
        self.round.committed(now, contribution);
        self.fetch(message.signer);
    }

    /// Orders a commit's blob from everyone who says that they hold it.
    fn fetch(&mut self, member: PeerId) {
        let Some(contribution) = self.round.commits.get(&member) else {
            return;
        };
        let blob = contribution.commit.blob;
        if self.round.held.contains(&blob) || self.round.bad.contains(&blob) {
            return;
        }
        let commit = contribution.commit.clone();
        let (slot, place) = (self.chain.next_slot(), self.roster.place(&member));
        let says = |have: &Have| have.slot == slot && place.is_some_and(|place| have.held.has(place));
        let others = self.haves.iter().filter(|(id, have)| **id != member && says(have));
        let providers = std::iter::once(member).chain(others.map(|(id, _)| *id)).collect();
        self.out.push(Effect::Fetch {
            member,
            commit,
            providers,
        });
    }

    pub(super) fn blob_held(&mut self, now: Micros, blob: Hash) {
        if self.regroup.carries().any(|one| one.commit.blob == blob) {
            self.round.held.insert(blob);
            self.recheck(now);
            return self.try_propose(now);
        }
        let Some(member) = self.round.author(&blob) else { return };
        if self.round.held.insert(blob) {
            self.round.last_blob = now;
            if let Some(place) = self.roster.place(&member)
                && self.round.holding.insert(place)
            {
                let weight = self.voters.weight_of(&self.keys.id());
                self.tally(now, place, weight);
            }
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
    pub(super) fn have(&mut self, now: Micros, from: PeerId, message: &Signed) {
        let (signer, Body::Have(have)) = (message.signer, message.body.clone()) else {
            return;
        };
        let maps = [&have.held, &have.alive, &have.heard];
        let same = have.slot == self.chain.next_slot();
        let fit = |map: &&Bits| map.bytes() <= MAX_MAP && (!same || map.fits(self.roster.len()));
        if !maps.iter().all(fit) {
            return self.reject(signer, "have", "its bitmaps don't fit the members".into());
        }
        let known = self.haves.get(&signer).map(|known| known.sequence);
        if let Some(known) = known.filter(|known| *known >= have.sequence) {
            if known > have.sequence && from == signer {
                self.answer_double(signer);
            }
            return;
        }
        if self.is_known(&signer) || !self.is_member(&self.keys.id()) {
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
            self.have_signatures.insert(signer, message.signature);
            let before = self
                .haves
                .insert(signer, have.clone())
                .filter(|before| before.slot == have.slot);
            if same {
                self.count_have(now, &signer, &have, before.as_ref());
                self.recheck_boasts(now);
            }
            self.try_propose(now);
        }
    }

    /// Adds a voter's weight to what it says it holds, and takes it from what it says no more.
    fn count_have(&mut self, now: Micros, signer: &PeerId, have: &Have, before: Option<&Have>) {
        let weight = self.voters.weight_of(signer);
        if weight == 0 {
            return;
        }
        let held = before.map(|before| &before.held);
        for place in have.held.gained(held) {
            self.tally(now, place, weight);
        }
        for place in held.into_iter().flat_map(|held| held.gained(Some(&have.held))) {
            if let Some(sum) = self.round.weight.get_mut(place) {
                *sum = sum.saturating_sub(weight);
            }
        }
    }

    /// More weight holds the contribution of the member at `place`. Remembers since when that is enough, and it is held here
    /// too, for R12.
    fn tally(&mut self, now: Micros, place: usize, weight: u64) {
        let Some(sum) = self.round.weight.get_mut(place) else {
            return;
        };
        *sum = sum.saturating_add(weight);
        if self.voters.quorum(*sum) && self.round.holding.contains(&place) {
            self.round.wide_since.entry(place).or_insert(now);
        }
    }

    /// At the start of a round: what others, who are in it already, have said.
    pub(super) fn count_haves(&mut self, now: Micros) {
        self.round.weight = vec![0; self.roster.len()];
        let slot = self.chain.next_slot();
        let me = self.keys.id();
        let said: Vec<(PeerId, Have)> = self
            .haves
            .iter()
            .filter(|(id, have)| **id != me && have.slot == slot && have.held.fits(self.roster.len()))
            .map(|(id, have)| (*id, have.clone()))
            .collect();
        for (signer, have) in said {
            self.count_have(now, &signer, &have, None);
        }
    }

    /// Tells soon what this peer holds: not at once, so that several blobs make one message; the more listen, the later.
    pub(super) fn plan_have(&mut self, now: Micros) {
        if !self.round.have_planned {
            self.round.have_planned = true;
            let crowd = (self.voters.len() as u64 / HAVE_VOTERS).max(1);
            self.out
                .push(Effect::SetTimer(Timer::Settled, now + HAVE_PAUSE * crowd));
        }
    }

    pub(super) fn tell_have(&mut self, now: Micros) {
        self.round.have_planned = false;
        // R19: who listens says nothing, unless nobody speaks to it: it may have lapsed, and then nobody will before it is heard.
        let others = self.heard.values().any(|(at, _)| at + SILENCE > now);
        if self.listening && others {
            return;
        }
        self.sequence += 1;
        let members = self.roster.len();
        let member = |place: usize| self.roster.member(place).unwrap_or_default();
        let have = Have {
            slot: self.chain.next_slot(),
            sequence: self.sequence,
            tip: self.chain.agreed.record,
            tip_round: self.chain.agreed.round,
            held: Bits::new(members, |place| self.round.holding.contains(&place)),
            alive: Bits::new(members, |place| {
                self.hears_within(now, &member(place), FRESH) || self.told_alive(now, place)
            }),
            heard: Bits::new(members, |place| {
                self.heard_lately(now, &member(place)) || self.told_heard(now, place)
            }),
            speeds: self.speeds.bits(&self.chain.agreed.speeds),
        };
        self.haves.insert(self.keys.id(), have.clone());
        self.last_have = Some(self.broadcast(Body::Have(have)));
    }

    /// Tells one peer that was a member, another each second, where this peer is. Two sides that left each other out have nobody
    /// in common who would tell them that there is another branch (R21), and one that lapsed may be back.
    pub(super) fn reach_out(&mut self) {
        let members = self.chain.agreed.members.iter();
        let away = || members.clone().filter(|member| member.standing == Standing::Away);
        let at = usize::try_from(self.sequence).unwrap_or(0) % away().count().max(1);
        if let Some(to) = away().nth(at).map(|member| member.id) {
            self.say_where(to);
        }
    }

    /// Tells one peer where this peer is, and nothing else.
    pub(super) fn say_where(&mut self, to: PeerId) {
        self.sequence += 1;
        let nobody = Bits::new(self.roster.len(), |_| false);
        let have = Have {
            slot: self.chain.next_slot(),
            sequence: self.sequence,
            tip: self.chain.agreed.record,
            tip_round: self.chain.agreed.round,
            held: nobody.clone(),
            alive: nobody.clone(),
            heard: nobody,
            speeds: 0,
        };
        let message = self.keys.sign(&Body::Have(have));
        self.out.push(Effect::Send(to, message));
    }

    /// Whether this peer is or was a member, and was not barred.
    fn is_known(&self, id: &PeerId) -> bool {
        let member = self.chain.member(id);
        member.is_some_and(|member| member.standing != Standing::Banned)
    }

    /// Whether any of those who listen for the member at `place` heard it lately (R15); nobody does for a member that this peer hears
    /// itself.
    pub(super) fn told_heard(&self, now: Micros, place: usize) -> bool {
        let slot = self.chain.next_slot();
        let says = |by: &PeerId| {
            let have = self.haves.get(by).filter(|have| have.slot == slot);
            have.is_some_and(|have| have.heard.has(place)) && self.hears_now(now, by)
        };
        self.roster.told_by(place).is_some_and(|by| by.iter().any(says))
    }

    /// Whether two of those who listen for the member at `place` say that it lives, or the only one: the last word of one of them may
    /// be lost, and its word before that is stale.
    pub(super) fn told_alive(&self, now: Micros, place: usize) -> bool {
        let says = |by: &PeerId| {
            let have = self
                .haves
                .get(by)
                .filter(|have| self.roster.means(have.slot, &have.alive))?;
            self.hears_now(now, by).then(|| have.alive.has(place))
        };
        let by = self.roster.told_by(place).unwrap_or_default();
        let (mut voices, mut alive) = (0, 0);
        for lives in by.iter().filter_map(says) {
            voices += 1;
            alive += u32::from(lives);
            if alive == 2 {
                return true;
            }
        }
        voices == 1 && alive == 1
    }

    /// Weight of those who say, for this round, that they hold this member's contribution.
    pub(super) fn weight_holding(&self, member: &PeerId) -> u64 {
        let place = self.roster.place(member);
        place
            .and_then(|place| self.round.weight.get(place))
            .copied()
            .unwrap_or(0)
    }

    /// Once a second: fetch again what is missing, say again what others seem to lack.
    pub(super) fn repair(&mut self, now: Micros) {
        let waiting: Vec<PeerId> = self.round.commits.keys().copied().collect();
        waiting.into_iter().for_each(|member| self.fetch(member));
        self.fetch_named();
        if self.listening {
            return; // R19
        }
        let (slot, me) = (self.chain.next_slot(), self.keys.id());
        let mine = self
            .roster
            .place(&me)
            .filter(|place| self.round.holding.contains(place));
        let drawn = |place: &usize| {
            let member = self.roster.member(*place);
            member.is_some_and(|member| self.passes_on(&member, REPAIRERS))
        };
        let passed_on: Vec<usize> = self.round.holding.iter().copied().filter(drawn).collect();
        let mut sends = Vec::new();
        for (id, have) in self.haves.iter().filter(|(id, have)| **id != me && have.slot == slot) {
            if self.voters.weight_of(id) == 0 && self.voters.len() >= super::roster::CROWD {
                continue; // who has no vote in a crowd gets the record
            }
            // My own commit first, then others' that I hold and was drawn to pass on.
            let lacking = mine
                .iter()
                .chain(&passed_on)
                .copied()
                .filter(|place| !have.held.has(*place));
            for one in lacking
                .filter_map(|place| self.settled_commit(now, place))
                .take(REPAIRS_PER_BEAT)
            {
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
            // What others said is passed on by a few: each voter has it from several, and it grows with the voters, not their square.
            let after = self.voters_after_me();
            for message in self.agreement.repeat() {
                if message.signer == me || after.len() + 1 == self.voters.len() {
                    self.spread(message);
                } else {
                    let to = after.clone();
                    self.out.push(Effect::Multicast { to, message });
                }
            }
        }
        let verdicts = self.verdicts.values().filter(|one| one.auditor == me);
        let mine: Vec<Signed> = verdicts.map(signed_verdict).take(REPAIRS_PER_BEAT).collect();
        mine.into_iter().for_each(|message| self.spread(message));
    }

    /// The next few voters by id: whom this peer tells what others said.
    fn voters_after_me(&self) -> Arc<[PeerId]> {
        let me = self.keys.id();
        let all: Vec<PeerId> = self.voters.iter().map(|(id, _)| id).filter(|id| *id != me).collect();
        let start = all.partition_point(|id| *id < me);
        let (before, after) = all.split_at(start);
        after.iter().chain(before).take(REPAIRERS).copied().collect()
    }

    /// Passes on a request or verdict when it is first heard, if this peer is one of the two that do so for its signer: a lost
    /// link between signer and proposer costs nothing, and not everyone tells everyone.
    pub(super) fn relay(&mut self, message: Signed) {
        if message.signer == self.keys.id() || self.passes_on(&message.signer, RELAYERS) {
            self.spread(message);
        }
    }

    /// A commit that has been known for long enough that others should have it too.
    fn settled_commit(&self, now: Micros, place: usize) -> Option<&Contribution> {
        let member = self.roster.member(place)?;
        let seen = self.round.commit_seen.get(&member)?;
        let one = self.round.commits.get(&member)?;
        (now >= seen + REPAIR_AFTER && self.round.held.contains(&one.commit.blob)).then_some(one)
    }

    /// Whether this peer is one of `count` voters who pass on what this member said: the next ones by id.
    fn passes_on(&self, member: &PeerId, count: usize) -> bool {
        let (me, voters) = (self.keys.id(), self.voters.len());
        let rank = |id: &PeerId| self.voters.rank(id);
        // A member with a vote is not the first of those after it.
        let first = rank(member) + usize::from(self.voters.weight_of(member) > 0);
        self.voters.weight_of(&me) > 0 && *member != me && (rank(&me) + voters - first % voters) % voters < count
    }
}

fn signed_verdict(signed: &SignedVerdict) -> Signed {
    Signed {
        signer: signed.auditor,
        body: Body::Verdict(signed.verdict.clone()),
        signature: signed.signature,
    }
}
