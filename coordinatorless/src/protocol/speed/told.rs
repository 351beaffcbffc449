//! What a peer knows of the proofs of speed that are open, and tells: its own claims, which claims came in time, which openings hold.

use std::collections::BTreeMap;

use super::{Key, MAX_TESTS, SpeedTest};
use crate::protocol::State;
use crate::protocol::event::{Effect, SpeedAnswer, SpeedCheck, SpeedOrder};
use crate::protocol::round::CENSORSHIP_VIEWS;
use crate::protocol::{SECOND, micros};
use crate::types::*;
use crate::wire::{Body, Signed};

/// Voters that ask the member itself at once for what is to be opened; twice as many each second.
const AT_FIRST: u64 = 4;

/// What this peer knows itself.
#[derive(Default)]
pub(in crate::protocol) struct SpeedState {
    seen: BTreeMap<Key, Seen>,
    /// The next record to be reviewed was decided by this peer's own votes, not learned of from others, at once or after a restart.
    pub(in crate::protocol) live: bool,
    /// Claims that came before the record that asked for them: one a member.
    early: BTreeMap<PeerId, Signed>,
}

#[derive(Default)]
struct Seen {
    /// Until when a claim is in time here; not known of a record that this peer learned of late.
    due: Option<Micros>,
    claim: Option<Signed>,
    /// The member made another one, too: then none counts.
    doubled: bool,
    in_time: bool,
    /// Since when somebody says that it holds an opening.
    opened: Option<Micros>,
    /// Whether an opening was found to hold.
    holds: bool,
}

impl Seen {
    fn is_of(&self, step: &SpeedStep) -> bool {
        match (step, &self.claim) {
            (SpeedStep::Claimed(_, claim, _), Some(known)) => self.counts() && known.body == Body::Speed(claim.clone()),
            (SpeedStep::Claimed(..), None) => false,
            (SpeedStep::Proven(_), _) => self.holds,
        }
    }

    /// Whether there is one claim, and it came in time.
    fn counts(&self) -> bool {
        self.in_time && !self.doubled
    }

    /// Whether this peer knows of another claim than the one that is named.
    fn contradicts(&self, step: &SpeedStep) -> bool {
        match (step, &self.claim) {
            (SpeedStep::Claimed(_, claim, _), Some(known)) => self.doubled || known.body != Body::Speed(claim.clone()),
            _ => false,
        }
    }
}

impl SpeedState {
    pub(in crate::protocol) fn load(&self) -> usize {
        self.seen.len() + self.early.len()
    }

    fn of(&self, test: &SpeedTest) -> Option<&Seen> {
        self.seen.get(&test.key())
    }

    /// The bits for a `Have`.
    pub(in crate::protocol) fn bits(&self, tests: &[SpeedTest]) -> u32 {
        let of = |(at, test): (usize, &SpeedTest)| {
            let seen = self.of(test);
            let in_time = u32::from(seen.is_some_and(Seen::counts));
            let holds = u32::from(seen.is_some_and(|seen| seen.holds));
            in_time << at | holds << (at + MAX_TESTS)
        };
        tests
            .iter()
            .take(MAX_TESTS)
            .enumerate()
            .map(of)
            .fold(0, |all, one| all | one)
    }
}

impl State {
    /// At the start of a round: what the last record asks, draws and ends.
    pub(in crate::protocol) fn review_speeds(&mut self, now: Micros) {
        let (chain, me) = (self.chain.clone(), self.keys.id());
        let (branch, round) = (chain.agreed.branch, chain.agreed.round);
        let window = micros(self.config.verification.speed_secs);
        let live = std::mem::take(&mut self.speeds.live);
        self.speeds
            .seen
            .retain(|key, _| chain.speed_test(&key.0).is_some_and(|test| test.key() == *key));
        for test in &chain.agreed.speeds {
            let is_new = test.asked == round;
            let seen = self.speeds.seen.entry(test.key()).or_default();
            if is_new && live {
                seen.due.get_or_insert(now + window);
            }
            if test.member != me {
                continue;
            }
            // Of a record learned of late, or before a restart, the time is over, or something was claimed.
            if is_new && live {
                self.out.push(Effect::Speed(SpeedOrder {
                    branch,
                    asked: test.asked,
                    seed: test.seed,
                    until: now + window,
                }));
            }
            if test.drawn.is_some_and(|drawn| drawn.since == round) {
                self.out.push(Effect::OpenSpeed(Box::new(test.clone())));
            }
        }
        for message in std::mem::take(&mut self.speeds.early).into_values() {
            self.speed_claim(now, message);
        }
        self.check_speeds(now);
    }

    /// Asks for the openings that were not found to hold yet.
    fn check_speeds(&mut self, now: Micros) {
        let (chain, me) = (self.chain.clone(), self.keys.id());
        let votes = self.voters.weight_of(&me) > 0;
        let drawn = |test: &&SpeedTest| test.drawn.is_some() && test.member != me;
        for test in chain.agreed.speeds.iter().filter(drawn).filter(|_| votes) {
            let providers = self.speed_providers(now, test);
            if !providers.is_empty() {
                self.out.push(Effect::CheckSpeed(Box::new(SpeedCheck {
                    branch: chain.agreed.branch,
                    test: test.clone(),
                    providers,
                })));
            }
        }
    }

    /// Whom to ask for an opening, if it is not known to hold: those who say that they have it, each peer beginning with another, then the member itself, which
    /// need not serve everyone.
    fn speed_providers(&mut self, now: Micros, test: &SpeedTest) -> Vec<PeerId> {
        let (me, bit) = (self.keys.id(), self.bit_of(&SpeedStep::Proven(test.member)));
        let says = |id: &PeerId| *id != me && bit.is_some_and(|bit| self.says_of_speeds(id, bit));
        let mut holders: Vec<PeerId> = self.haves.keys().copied().filter(says).collect();
        let seen = self.speeds.seen.get_mut(&test.key()).filter(|seen| !seen.holds);
        let Some(seen) = seen.filter(|_| !holders.is_empty()) else {
            return Vec::new();
        };
        let waited = now.saturating_sub(*seen.opened.get_or_insert(now)) / SECOND;
        let first = holders.partition_point(|id| *id < me);
        holders.rotate_left(first);
        holders.retain(|id| *id != test.member);
        let (voters, after) = (self.voters.len(), self.voters.rank(&test.member));
        let turn = (self.voters.rank(&me) + voters - after) % voters.max(1);
        let asks = (turn as u64) < AT_FIRST << waited.min(8);
        holders.extend(Some(test.member).filter(|_| asks));
        holders
    }

    /// Once a second: says its own claim again while no record has it, and looks for openings.
    pub(in crate::protocol) fn repeat_speeds(&mut self, now: Micros) {
        let chain = self.chain.clone();
        let mine = chain.speed_test(&self.keys.id()).filter(|test| test.claim.is_none());
        // R19: who listens says nothing at all.
        if let Some(claim) = mine
            .filter(|_| !self.listening)
            .and_then(|test| self.speeds.of(test)?.claim.clone())
        {
            self.spread(claim);
        }
        self.check_speeds(now);
    }

    /// What this peer computed.
    pub(in crate::protocol) fn speed_answered(&mut self, now: Micros, answer: SpeedAnswer) {
        let SpeedAnswer {
            branch,
            asked,
            chains,
            root,
        } = answer;
        let slot = Slot {
            round: asked.next(),
            ..self.chain.next_slot()
        };
        if slot.branch == branch {
            let message = self.keys.sign(&Body::Speed(SpeedClaim { slot, chains, root }));
            self.speed_claim(now, message);
        }
    }

    /// A claim: in time if it comes within the window after this peer saw the record that asks.
    pub(in crate::protocol) fn speed_claim(&mut self, now: Micros, message: Signed) {
        let Body::Speed(claim) = &message.body else { return };
        let (member, slot) = (message.signer, claim.slot);
        let (branch, round) = self.height();
        if slot.branch == branch && slot.round == round.next() {
            // Members only, one each.
            self.speeds.early.insert(member, message);
            return;
        }
        if slot.branch != branch || slot.round > round {
            return self.maybe_behind(now, member, slot);
        }
        let asked = slot.round.previous();
        let chain = self.chain.clone();
        let Some(test) = chain.speed_test(&member).filter(|test| test.asked == asked) else {
            return; // over by now
        };
        let step = SpeedStep::Claimed(member, claim.clone(), message.signature);
        let known = self.speeds.of(test).and_then(|seen| seen.claim.as_ref());
        let is_second = known.is_some_and(|known| known.body != message.body);
        if (known.is_some() && !is_second) || test.claim.is_some() {
            return;
        }
        if let Err(violation) = self.chain.check_speed(&step, self.scheme) {
            return self.reject(member, "speed", violation.to_string());
        }
        let Some(seen) = self.speeds.seen.get_mut(&test.key()).filter(|seen| !seen.doubled) else {
            return;
        };
        if is_second {
            seen.doubled = true;
            self.reject(member, "speed", "two claims of speed for one record".into());
        } else {
            seen.in_time = seen.due.is_some_and(|due| now <= due);
            seen.claim = Some(message.clone());
        }
        self.plan_have(now);
        if is_second {
            // Whoever knows one of the two must know both.
            self.spread(message);
        } else if !(self.listening && member == self.keys.id()) {
            self.relay(message);
        }
        self.recheck_boasts(now);
        self.try_propose(now);
    }

    /// An opening was looked at.
    pub(in crate::protocol) fn speed_checked(&mut self, now: Micros, key: Key, outcome: Result<(), String>) {
        let Some(seen) = self.speeds.seen.get_mut(&key) else {
            return;
        };
        match outcome {
            Ok(()) => seen.holds = true,
            Err(reason) => return self.reject(key.0, "speed", reason),
        }
        self.plan_have(now);
        self.recheck(now);
        self.try_propose(now);
    }

    /// Whether more than 2/3 of the weight have said this of an open proof, this peer included.
    fn widely_said(&self, bit: u32) -> bool {
        let me = self.keys.id();
        let says = |id: &PeerId| match *id == me {
            true => self.speeds.bits(&self.chain.agreed.speeds) & bit != 0,
            false => self.says_of_speeds(id, bit),
        };
        let voters = self.voters.iter().filter(|(id, _)| says(id));
        self.voters.quorum(voters.map(|(_, weight)| weight).sum())
    }

    /// Whether another has said this of an open proof in the round in progress.
    fn says_of_speeds(&self, id: &PeerId, bit: u32) -> bool {
        let have = self.haves.get(id).filter(|have| have.slot == self.chain.next_slot());
        have.is_some_and(|have| have.speeds & bit != 0)
    }

    /// What is said of a step in a `Have`.
    fn bit_of(&self, step: &SpeedStep) -> Option<u32> {
        let tests = &self.chain.agreed.speeds;
        let at = tests.binary_search_by_key(&step.member(), |test| test.member).ok()?;
        match step {
            SpeedStep::Claimed(..) => Some(1 << at),
            SpeedStep::Proven(_) => Some(1 << (at + MAX_TESTS)),
        }
    }

    /// The steps for a record of this peer's: what it and most others have seen. Where views fail, there are none.
    pub(in crate::protocol) fn speed_steps(&self, view: View) -> Vec<SpeedStep> {
        let step = |test: &SpeedTest| {
            let seen = self.speeds.of(test)?;
            let step = match (&test.claim, &test.drawn, &seen.claim) {
                (None, _, Some(message)) => match &message.body {
                    Body::Speed(claim) => SpeedStep::Claimed(test.member, claim.clone(), message.signature),
                    _ => return None,
                },
                (Some(_), Some(_), _) => SpeedStep::Proven(test.member),
                _ => return None,
            };
            let known = seen.is_of(&step) && self.bit_of(&step).is_some_and(|bit| self.widely_said(bit));
            known.then_some(step)
        };
        let tests = self.chain.agreed.speeds.iter().filter(|_| view < CENSORSHIP_VIEWS);
        tests.filter_map(step).collect()
    }

    /// The step of a record that this peer knows to be another, or that neither it nor, as far as it knows, most others have seen in time.
    pub(in crate::protocol) fn unseen_speed(&self, record: &Record) -> Option<PeerId> {
        let unseen = |step: &&SpeedStep| {
            let test = self.chain.speed_test(&step.member());
            let Some(seen) = test.and_then(|test| self.speeds.of(test)) else {
                return true;
            };
            let widely = || self.bit_of(step).is_some_and(|bit| self.widely_said(bit));
            seen.contradicts(step) || !(seen.is_of(step) || widely())
        };
        record.speeds.iter().find(unseen).map(SpeedStep::member)
    }
}
