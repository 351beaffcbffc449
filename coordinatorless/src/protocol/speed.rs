//! Proof of speed: how much a member can compute in a second, shown by computing it, and agreed in records.
//!
//! What is computed, and why it cannot be made up, is `gradient_verify::flops`' business: chains of matrix products that follow from the member's id and a seed, a
//! Merkle root over the results, an opening of what a later seed draws. Here is when, for whom, and what follows. With `verification.speed_secs = W` above zero:
//!
//! ```text
//! record r       asks        its seed draws who is asked (newcomers always, the others all at once now and then); seed and record together, what
//!                            the member computes, and says what and the root: within W after it saw record r
//! record r+1..   Claimed     names claims that came in time to more than 2/3 of the weight, each voter's own clock counting from *its* record r
//! the one after              its seed draws what is to be opened; everyone who votes fetches and checks the opening
//! ...            Proven      names openings that more than 2/3 of the weight found to hold
//! ```
//! The member's speed is what it claimed over `W`: what it showed at least. It had no more time than that but for what messages took, and for how much earlier it
//! could know what is asked. Whoever proposed record `r` knew its seed a round before, but not the record: that names what the others found in the same round. So it
//! knows as long before the proposal as it can put off proposing once they have committed, and is not asked; everyone else learns it with the proposal, as long before
//! the decision as agreement takes. What is *opened* is drawn by a seed alone: a proposer could try records until one draws what its friend can show.
//!
//! **Heard in time** is each voter's own word, told in its `Have` messages bit by bit, as for blobs (R9). A voter says no to a claim other than the one it heard, and in the first
//! two views to one that neither it heard in time nor, as far as it knows, more than 2/3 did; a polka overrules that, as for lapses, and so does what it learns later. Two claims of one
//! member for one record are passed on, and then neither counts. Records that are first proposed later than in these views name no steps of proofs, and
//! nobody says no to one that is proposed again: a peer that was started again knows nothing of what came in time, and could never agree with those who are locked on such a
//! record. The price: a liar whose turn comes after two views have failed may copy the beacon of the first and name a claim that came late. It gains the time.
//!
//! **Openings** are handed on by whoever found them to hold; the member itself is asked by a few voters first, and by more each second. A wrong one, from the member too, makes nobody
//! sure that there is no right one.
//!
//! **What follows.** A newcomer's quota is made from its speed and that of those who have shown theirs, instead of from the mean. Who was asked
//! and showed nothing, within [`CLAIM_ROUNDS`] and [`OPEN_ROUNDS`], or went away meanwhile, owes a proof, and until it gives one the liveness multiplier (R29) does not grow: there is
//! no loss for a machine that was restarted at the wrong moment but that. Everybody is asked in the same
//! round ([`MAX_TESTS`] of many), so a machine that answers for two names shows half for each; nothing but the newcomer's quota follows from how much that is.
//!
//! A claim that does not hold is no crime: it shows nothing, and the member owes.
//!
//! **What remains.** A proposer may tell an accomplice, whom it asks, what its record will be: that one has a few seconds more than `W`.

use rkyv::{Archive, Deserialize, Serialize};

use super::chain::{ChainState, RuleViolation};
use super::event::Notice;
use super::membership::{MEAN_SPEED, Member, Standing};
use super::micros;
use crate::config::RunConfig;
use crate::types::*;
use crate::wire::{Body, Scheme, Signed};

mod told;

pub(super) use told::SpeedState;

/// Proofs that are open at a time: the bits of a `Have` for each of the two things said of them.
pub const MAX_TESTS: usize = 16;
/// Records after the one that asks in which a claim may stand. It had to come in time in any case; a proposer that leaves it out is not the only one.
pub const CLAIM_ROUNDS: u64 = 3;
/// Records after the one that draws within which the opening has to be found to hold.
pub const OPEN_ROUNDS: u64 = 8;
/// Chains of a claim.
const MAX_CHAINS: usize = 4;
/// Sides of matrices, multiples of [`ROWS`].
pub const SIDES: std::ops::RangeInclusive<u32> = 64..=4096;
/// Rows that are committed to together.
pub const ROWS: u32 = 4;
/// Products of a chain.
pub const MAX_PRODUCTS: u32 = 1 << 20;
/// Products from one commitment to the next.
pub const MAX_DEPTH: u32 = 64;
/// What a drawn row takes to be computed again: `depth * side^2` multiplications.
pub const MAX_ROW: u64 = 1 << 24;
/// A newcomer is given so many times the mean at most, until it has done that: products are not training, and what it cannot do comes back a round late.
const MOST_AT_FIRST: u64 = 8;
/// Others that have shown theirs, fewer than which say nothing of what is usual.
const FEWEST: usize = 3;

/// A proof of speed in the making.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct SpeedTest {
    /// Who is asked.
    pub member: PeerId,
    /// The record that asks.
    pub asked: Round,
    /// What it asks: of its seed, and of all that it says.
    pub seed: [u8; 32],
    /// What it computed, once a record has it.
    pub claim: Option<Claimed>,
    /// What is to be opened, once it is drawn.
    pub drawn: Option<Drawn>,
}

/// A claim that a record has.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Claimed {
    /// The record.
    pub since: Round,
    /// What was computed.
    pub chains: Vec<SpeedChain>,
    /// The root over it.
    pub root: Hash,
}

/// What draws the rows to be opened.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drawn {
    /// The record whose seed it is.
    pub since: Round,
    /// The seed.
    pub seed: [u8; 32],
}

/// What identifies a proof, on whatever branch: whose it is, and what is asked.
pub type Key = (PeerId, [u8; 32]);

impl SpeedTest {
    /// What identifies it.
    pub fn key(&self) -> Key {
        (self.member, self.seed)
    }

    fn is_over(&self, now: Round) -> bool {
        let past = |since: Round, rounds: u64| since.0.saturating_add(rounds) <= now.0;
        match (&self.claim, &self.drawn) {
            (_, Some(drawn)) => past(drawn.since, OPEN_ROUNDS),
            (Some(_), None) => false,
            (None, None) => past(self.asked, CLAIM_ROUNDS),
        }
    }
}

/// Operations of these chains: a multiplication and an addition for each of `side^3` terms of a product.
#[must_use]
pub fn operations(chains: &[SpeedChain]) -> u128 {
    let of = |chain: &SpeedChain| 2 * u128::from(chain.products) * u128::from(chain.side).pow(3);
    chains.iter().map(of).sum()
}

/// Whether anyone need look at these chains.
fn are_plausible(chains: &[SpeedChain]) -> bool {
    // The ranges first: within them nothing overflows.
    let one = |chain: &SpeedChain| {
        SIDES.contains(&chain.side)
            && chain.side.is_multiple_of(ROWS)
            && (1..=MAX_DEPTH).contains(&chain.depth)
            && (1..=MAX_PRODUCTS).contains(&chain.products)
            && chain.products.is_multiple_of(chain.depth)
            && u64::from(chain.depth) * u64::from(chain.side).pow(2) <= MAX_ROW
    };
    (1..=MAX_CHAINS).contains(&chains.len()) && chains.iter().all(one)
}

impl ChainState {
    /// The open proof of this member.
    pub fn speed_test(&self, member: &PeerId) -> Option<&SpeedTest> {
        let at = self.agreed.speeds.binary_search_by_key(member, |test| test.member);
        at.ok().map(|at| &self.agreed.speeds[at])
    }

    /// Whether this step of a proof may stand in the next record; when its claim came is each voter's own to judge.
    pub(super) fn check_speed(&self, step: &SpeedStep, scheme: Scheme) -> Result<(), RuleViolation> {
        let refuse = |why| {
            Err(RuleViolation::Refused {
                what: "proof of speed",
                member: step.member(),
                why,
            })
        };
        let Some(test) = self.speed_test(&step.member()) else {
            return refuse("nobody asked for it, or too late");
        };
        match step {
            SpeedStep::Proven(_) if test.drawn.is_none() => refuse("nothing was drawn yet"),
            SpeedStep::Proven(_) => Ok(()),
            SpeedStep::Claimed(..) if test.claim.is_some() => refuse("it has claimed already"),
            SpeedStep::Claimed(member, claim, signature) => {
                let slot = Slot {
                    round: test.asked.next(),
                    ..self.next_slot()
                };
                if claim.slot != slot {
                    return refuse("a claim for another run, branch or round");
                }
                if !are_plausible(&claim.chains) {
                    return refuse("sizes that nobody may be made to check");
                }
                let signed = Signed {
                    signer: *member,
                    body: Body::Speed(claim.clone()),
                    signature: *signature,
                };
                if signed.verify(scheme).is_err() {
                    return refuse("signature does not fit");
                }
                Ok(())
            }
        }
    }

    fn owe(&mut self, member: &PeerId, asked: Round, notices: &mut Vec<Notice>) {
        if let Some(member) = self.member_mut(member) {
            member.owes = true;
            notices.push(Notice::Speed {
                member: member.id,
                asked,
                proven: None,
            });
        }
    }

    fn prove(&mut self, config: &RunConfig, test: &SpeedTest, notices: &mut Vec<Notice>) {
        let Some(claim) = &test.claim else { return };
        let window = u128::from(micros(config.verification.speed_secs).max(1));
        let proven = u64::try_from(operations(&claim.chains) / window)
            .unwrap_or(u64::MAX)
            .max(1);
        let first = first_speed(&self.agreed.members, &test.member, proven);
        let Some(member) = self.member_mut(&test.member) else {
            return;
        };
        // Who has worked for longer has shown by its work what it does.
        if let Some(first) = first.filter(|_| member.joined == test.asked.next()) {
            member.speed = first;
        }
        (member.proven, member.owes) = (proven, false);
        notices.push(Notice::Speed {
            member: test.member,
            asked: test.asked,
            proven: Some(proven),
        });
    }
}

/// What a member that has shown this may be given: as half of the others are given less for what they have shown, and half of them more. One of them cannot
/// move that far.
fn first_speed(members: &[Member], who: &PeerId, proven: u64) -> Option<u64> {
    let measured = members
        .iter()
        .filter(|one| one.standing == Standing::Active && one.proven > 0 && one.id != *who);
    let given = |one: &Member| u128::from(one.speed) * u128::from(proven) / u128::from(one.proven);
    let mut speeds: Vec<u128> = measured.map(given).collect();
    speeds.sort_unstable();
    let usual = speeds.get(speeds.len() / 2).filter(|_| speeds.len() >= FEWEST)?;
    let speed = u64::try_from(*usual).unwrap_or(u64::MAX);
    Some(speed.clamp(MEAN_SPEED / 64, MEAN_SPEED * MOST_AT_FIRST))
}

/// Carries out the steps that `record` has, lets go of what is over, and asks anew. The state's round and seed are the record's already.
pub(super) fn settle(state: &mut ChainState, config: &RunConfig, record: &Record, notices: &mut Vec<Notice>) {
    if config.verification.speed_secs <= 0.0 {
        return;
    }
    let (now, seed) = (state.agreed.round, state.agreed.seed);
    let mut tests = std::mem::take(&mut state.agreed.speeds);
    for step in &record.speeds {
        let Ok(at) = tests.binary_search_by_key(&step.member(), |test| test.member) else {
            continue;
        };
        match step {
            SpeedStep::Claimed(_, claim, _) => {
                tests[at].claim = Some(Claimed {
                    since: now,
                    chains: claim.chains.clone(),
                    root: claim.root,
                });
            }
            SpeedStep::Proven(_) => {
                let test = tests.remove(at);
                state.prove(config, &test, notices);
            }
        }
    }
    // Going away is no way out of it; who is back is asked anew.
    let (mut tests, away): (Vec<_>, Vec<_>) = tests.into_iter().partition(|test| state.is_active(&test.member));
    for test in &mut tests {
        // The root is fixed by a record before this one: nobody knew this seed when it was made.
        if test.claim.as_ref().is_some_and(|claim| claim.since < now) {
            test.drawn.get_or_insert(Drawn { since: now, seed });
        }
    }
    let (over, open): (Vec<_>, Vec<_>) = tests.into_iter().partition(|test| test.is_over(now));
    state.agreed.speeds = open;
    for test in over.into_iter().chain(away) {
        state.owe(&test.member, test.asked, notices);
    }
    ask(state, config, &record.beacon.proposer);
}

/// What is asked for. Nobody knows it a round before, its proposer neither: the record names what others found.
fn challenge(seed: &[u8; 32], record: &Hash) -> [u8; 32] {
    blake3::derive_key("murmur/v1/speed-challenge", &[&seed[..], &record.0[..]].concat())
}

/// Draws who is asked by the state's seed: newcomers, and now and then everyone. The proposer knew it too early.
fn ask(state: &mut ChainState, config: &RunConfig, proposer: &PeerId) {
    let (now, seed) = (state.agreed.round, state.agreed.seed);
    let challenge = challenge(&seed, &state.agreed.record);
    let lot = |id: &[u8]| {
        let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/speed");
        hasher.update(&seed).update(id);
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    };
    // The first seed that nobody knew when the run was made.
    let all = now == Round(1) || lot(&[]).is_multiple_of(config.verification.speed_every.max(1));
    let is_new = |member: &Member| member.joined == now.next();
    let mut asked: Vec<(bool, u64, PeerId)> = state
        .agreed
        .members
        .iter()
        .filter(|one| one.standing == Standing::Active && one.id != *proposer && (all || is_new(one)))
        .filter(|one| state.speed_test(&one.id).is_none())
        .map(|one| (!is_new(one), lot(&one.id.0), one.id))
        .collect();
    asked.sort_unstable();
    asked.truncate(MAX_TESTS.saturating_sub(state.agreed.speeds.len()));
    let tests = asked.into_iter().map(|(_, _, member)| SpeedTest {
        member,
        asked: now,
        seed: challenge,
        claim: None,
        drawn: None,
    });
    state.agreed.speeds.extend(tests);
    state.agreed.speeds.sort_unstable_by_key(|test| test.member);
}
