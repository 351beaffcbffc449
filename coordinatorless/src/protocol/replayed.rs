//! What shows that an auditor replayed the work it says agrees (R25).
//!
//! A round's [`Trace`] is known to who trained the round and to who replays it; the commit binds its root alone. So an auditor replays first, and
//! then
//!
//! 1. commits itself: it asks the member with `C = H(slot, member, auditor, its own trace, salt)`, and with its lot, since only who was drawn may ask;
//! 2. the member answers one `C` for each auditor, with its whole trace and a signature over slot, auditor, `C` and the trace's root. Asked again it
//!    gives the same answer: whoever has seen the trace can commit itself to nothing any more;
//! 3. the verdict opens `C` and carries both traces and the signature. Every voter checks that `C` opens, that the member signed for it, that its trace is the
//!    one it committed to, and that the two agree in three quarters of the steps at least, the norms within `verification.trace_bound`, the losses
//!    within a hundredth of it, as they tell rounds apart so much more finely.
//!
//! ```text
//! record    r        ..        asked_until | asked_until+1     ..      r + verdict_rounds
//!           members answer                 | verdicts that agree are told, traces in them
//! ```
//! A verdict shows the trace to everyone. So until [`audit::asked_until`](super::audit::asked_until) nobody tells one, and after it no member answers:
//! no auditor can read what it was to find. Who replays too slowly for that is not paid, and harms nobody. The window is as sharp as records are
//! known everywhere: a member that lags a record behind answers that much longer.
//!
//! **Who tells nothing, or other steps.** A member that gives an auditor no valid answer, though it is heard and there is time, or whose answer parts
//! from the replay while its work agrees, is accused before everyone ([`super::audit`]; [`Finding::Untold`]). In the second case the verdict opens `C` and shows both
//! traces like one that agrees. From `asked_until` on a member tells its trace to whoever votes and is asked about it. Where nothing was told, asking is
//! all they do; where other steps were shown, they replay and compare. So it costs a member its round and a strike to tell nobody, or to commit to
//! steps that it did not take. One that tells everyone but an auditor costs that auditor its pay, and the others a message each. One that holds
//! an answer to another commitment of the same auditor proves by its signature that it did answer.
//!
//! **Where the work differs**, too, the auditor asks for the member's trace before it says so, once and for a second at most: the accusation then shows both traces, and anyone
//! can tell from the record from which step on they part ([`Replayed::parted`]). It need not wait for others: a round that was accused pays nobody for vouching any more.
//!
//! **What remains.** Who trained and who audits can collude: they know each other's trace, and vouch for one another at will. So can two auditors that
//! were both drawn to the same work, of whom one replays. That is why a verdict that agrees clears nobody, and more than a third judge an
//! accusation.

use std::time::Duration;

use rkyv::{Archive, Deserialize, Serialize};

use super::audit::{Accusation, Claim, asked_until};
use super::beacon;
use super::chain::ChainState;
use super::event::AuditOrder;
use crate::config::RunConfig;
use crate::types::*;
use crate::wire::{Keys, Scheme, verify_bytes};

/// Branches whose traces are kept.
const BRANCHES: u64 = 4;

/// Why a trace is not told.
const NOT_HERE: &str = "the trace is not here (any more)";

/// How often in a row a member must give no answer to count as silent, each time heard and with the audited record in its chain: who is gone, has just
/// come back, or is behind has not refused.
pub const REFUSALS: u32 = 3;

/// How long a member is asked for its trace before it counts as silent, if [`ask_until`] does not come first.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// By how much losses are told apart more finely than norms.
const LOSS_FINER: f64 = 100.0;

/// One step of so many may stray farther than the bound.
const STRAY: usize = 4;

/// The domain of a member's signature under its answer, and of what an auditor's salt follows from.
const ANSWER: &str = "trace-answer";
const SALT: &str = "audit-salt";

impl Trace {
    /// Of loss and gradient norm of each step.
    pub fn of(steps: impl IntoIterator<Item = (f32, f64)>) -> Self {
        let bytes = |(loss, norm): (f32, f64)| {
            let mut bytes = [0; 12];
            bytes[..4].copy_from_slice(&loss.to_bits().to_le_bytes());
            bytes[4..].copy_from_slice(&norm.to_bits().to_le_bytes());
            bytes
        };
        Self(steps.into_iter().map(bytes).collect())
    }

    /// Loss and gradient norm of each step.
    pub fn steps(&self) -> impl Iterator<Item = (f32, f64)> + '_ {
        self.0.iter().map(|[a, b, c, d, norm @ ..]| {
            let loss = f32::from_bits(u32::from_le_bytes([*a, *b, *c, *d]));
            (loss, f64::from_bits(u64::from_le_bytes(*norm)))
        })
    }

    /// The Merkle root that a commit names: the trainer's, whose module says how it is made.
    pub fn root(&self) -> Hash {
        let leaf = |(step, bytes): (usize, &[u8; 12])| {
            let step = u32::try_from(step).unwrap_or(u32::MAX).to_le_bytes();
            hash(&[b"murmur/trace/2\0", &step, bytes])
        };
        let mut level: Vec<Hash> = self.0.iter().enumerate().map(leaf).collect();
        while level.len() > 1 {
            let node = |pair: &[Hash]| match pair {
                [left, right] => hash(&[b"murmur/trace-node/1\0", &left.0, &right.0]),
                _ => pair.first().copied().unwrap_or_default(),
            };
            level = level.chunks(2).map(node).collect();
        }
        let steps = u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_le_bytes();
        let top = level.first().copied().unwrap_or_default();
        hash(&[b"murmur/trace-root/1\0", &steps, &top.0])
    }

    /// How far the two are apart in each step that both have: the relative difference of their norms, or a hundred times that of their losses
    /// if that is more.
    pub fn distances(&self, other: &Self) -> impl Iterator<Item = f64> {
        let relative = |a: f64, b: f64| match a == b {
            true => 0.0,
            false => (a - b).abs() / a.abs().max(b.abs()),
        };
        self.steps().zip(other.steps()).map(move |(a, b)| {
            let (losses, norms) = ([f64::from(a.0), f64::from(b.0)], [a.1, b.1]);
            // What is no number is as far away as can be.
            match [losses, norms].as_flattened().iter().all(|value| value.is_finite()) {
                true => relative(norms[0], norms[1]).max(LOSS_FINER * relative(losses[0], losses[1])),
                false => f64::INFINITY,
            }
        })
    }

    /// The distance that no more than a quarter of the steps go beyond: single steps of honest rounds can be far apart where sums are rounded
    /// coarsely, those on other data are in nearly all steps. An auditor that makes steps up saves a quarter of the replay at most.
    pub fn distance(&self, other: &Self) -> f64 {
        let mut all: Vec<f64> = self.distances(other).collect();
        all.sort_by(|a, b| b.total_cmp(a));
        all.get(all.len() / STRAY).copied().unwrap_or(0.0)
    }

    /// The first step, from 0, in which the two are farther apart than the bound, if more than a quarter of the steps are, or that one of them lacks.
    pub fn parts(&self, other: &Self, bound: f64) -> Option<usize> {
        let uneven = self.0.len() != other.0.len();
        let first = || self.distances(other).position(|distance| distance > bound);
        (uneven || self.distance(other) > bound).then(|| first().unwrap_or(self.0.len().min(other.0.len())))
    }
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    Hash(*hasher.finalize().as_bytes())
}

/// Run, branch and round, as they are signed and committed to.
fn place(slot: &Slot) -> Vec<u8> {
    [&slot.run.0[..], &slot.branch.to_le_bytes(), &slot.round.0.to_le_bytes()].concat()
}

/// What an auditor binds itself to before it hears the member.
pub fn commitment(slot: &Slot, member: &PeerId, auditor: &PeerId, trace: &Trace, salt: &[u8; 32]) -> Hash {
    let head = [&place(slot)[..], &member.0, &auditor.0, salt].concat();
    Hash::derive(
        "murmur/v1/audit-commitment",
        &[&head[..], trace.0.as_flattened()].concat(),
    )
}

/// The salt of an auditor: nobody can guess it, and after a restart it is the same.
fn salt(keys: &Keys, slot: &Slot, member: &PeerId) -> [u8; 32] {
    let secret = keys.sign_bytes(SALT, &[&place(slot)[..], &member.0].concat());
    Hash::of(&secret.0).0
}

fn answered(slot: &Slot, auditor: &PeerId, commitment: &Hash, trace_root: &Hash) -> Vec<u8> {
    [&place(slot)[..], &auditor.0, &commitment.0, &trace_root.0].concat()
}

/// A question for a member's trace.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// Run, branch and the audited round; view 0.
    pub slot: Slot,
    /// What drew the auditor; nothing, where a voter is asked about an accusation.
    pub lot: Option<Lot>,
    /// What it binds itself to.
    pub commitment: Hash,
}

/// What a member answers.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The first commitment that this auditor asked with.
    pub commitment: Hash,
    /// The member's trace.
    pub trace: Trace,
    /// Its signature over slot, auditor, that commitment and the trace's root.
    pub signature: Signature,
}

/// What came of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// The verdict can show that its auditor replayed.
    Proven(Box<Replayed>),
    /// This auditor asked with another commitment before: nothing to be shown, nobody's fault.
    Before,
    /// The traces part at this step, from 0. That can be shown, too.
    Parts(usize, Box<Replayed>),
    /// No answer at all: not signed by the member, or not the trace it committed to.
    Invalid,
}

/// What an auditor asks a member about, once it has replayed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Run, branch and the audited round; view 0.
    pub slot: Slot,
    /// Who is asked.
    pub member: PeerId,
    /// Who asks.
    pub auditor: PeerId,
    /// What it replayed.
    pub trace: Trace,
    /// What hides that until the verdict.
    pub salt: [u8; 32],
}

impl Question {
    /// That of the peer with these keys.
    pub fn new(keys: &Keys, slot: Slot, member: PeerId, trace: Trace) -> Self {
        Self {
            slot,
            member,
            auditor: keys.id(),
            trace,
            salt: salt(keys, &slot, &member),
        }
    }

    fn commitment(&self) -> Hash {
        commitment(&self.slot, &self.member, &self.auditor, &self.trace, &self.salt)
    }

    /// As it is sent, with the lot that entitles to it, if that is what does.
    pub fn ask(&self, lot: Option<Lot>) -> Ask {
        Ask {
            slot: self.slot,
            lot,
            commitment: self.commitment(),
        }
    }

    /// Whether the member told what the record's `claim` binds it to, and signed for it.
    fn is_told(&self, claim: &Claim, answer: &Answer, scheme: Scheme) -> bool {
        let signed = answered(&self.slot, &self.auditor, &answer.commitment, &claim.trace_root);
        // More steps than a round has no record can show.
        answer.trace.0.len() as u64 <= MAX_STEPS
            && verify_bytes(scheme, ANSWER, &signed, self.member, answer.signature).is_ok()
            && answer.trace.root() == claim.trace_root
    }

    /// The auditor's reading of an answer, where the record has `claim`.
    pub fn hear(&self, claim: &Claim, answer: Answer, bound: f64, scheme: Scheme) -> Heard {
        if !self.is_told(claim, &answer, scheme) {
            return Heard::Invalid;
        }
        if answer.commitment != self.commitment() {
            return Heard::Before;
        }
        let parts = self.trace.parts(&answer.trace, bound);
        let shown = Box::new(Replayed {
            salt: self.salt,
            trace: self.trace.clone(),
            claimed: answer.trace,
            answer: answer.signature,
        });
        match parts {
            Some(step) => Heard::Parts(step, shown),
            None => Heard::Proven(shown),
        }
    }

    /// What a voter finds who was asked about this: one that replayed compares, one that did not only wants to be told.
    pub fn judge(&self, claim: &Claim, answer: &Answer, bound: f64, scheme: Scheme) -> Finding {
        let compared = self.trace.0.is_empty() || self.trace.parts(&answer.trace, bound).is_none();
        match self.is_told(claim, answer, scheme) && compared {
            true => Finding::Agrees,
            false => Finding::Untold,
        }
    }
}

/// The record with which asking for a trace ends: by then a drawn auditor gets no answer, and a voter has half of its time left to say so. The member was
/// asked in time if its auditor's chain was a record short of that when it first asked: whose chain is ahead may be right to refuse.
pub fn ask_until(config: &RunConfig, chain: &ChainState, verdict: &Verdict) -> Round {
    let verification = &config.verification;
    match chain.accusation(verdict).filter(|_| verdict.draw > 0) {
        Some(open) => Round(open.since.0.saturating_add(verification.verdict_rounds / 2)),
        None => asked_until(verification, verdict.slot.round),
    }
}

/// The time in which accumulators are to be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// With this record half of it is over: time to say that nothing was opened.
    pub half: Round,
    /// After this record two more can have it, or half of them where everyone is asked: time to say so of who is not there, too.
    pub end: Round,
}

/// When the accumulators of this audit are to be opened.
pub fn opening(config: &RunConfig, chain: &ChainState, order: &AuditOrder) -> Window {
    let (round, member) = (order.work.round, order.contribution.member);
    let about = |open: &&Accusation| order.draw > 0 && (open.round, open.member) == (round, member);
    let from = chain
        .agreed
        .accusations
        .iter()
        .find(about)
        .map_or(round, |open| open.since);
    let rounds = config.verification.verdict_rounds;
    let after = |rounds: u64| Round(from.0.saturating_add(rounds));
    let half = rounds / 2;
    Window {
        half: after(half),
        // Where everyone says so at once, records need time to have it.
        end: after(if order.draw > 0 {
            half
        } else {
            half.max(rounds.saturating_sub(2))
        }),
    }
}

/// The verdict on a member that opened no accumulators; there is nothing to replay with.
pub fn unanswered(order: &AuditOrder, bound: f64) -> Verdict {
    Verdict {
        lot: order.lot.clone(),
        finding: Finding::Unanswered,
        distance_nanos: u64::MAX,
        ..told(order, bound)
    }
}

/// The word of a voter that is only asked whether the member tells its steps, before it knows: that nothing is amiss.
pub fn told(order: &AuditOrder, bound: f64) -> Verdict {
    Verdict {
        slot: Slot {
            view: 0,
            ..order.contribution.commit.slot
        },
        member: order.contribution.member,
        draw: order.draw,
        lot: None,
        finding: Finding::Agrees,
        distance_nanos: 0,
        bound_nanos: (bound * 1e9).round() as u64,
        replayed: None,
    }
}

impl Replayed {
    /// The first step, from 0, in which the auditor's replay and what the member told part.
    pub fn parted(&self, bound: f64) -> Option<usize> {
        self.trace.parts(&self.claimed, bound)
    }
}

/// Where two traces part, in words. `step` counts from 0.
pub fn parted(step: usize) -> String {
    match step {
        0 => "the first step does not agree".to_owned(),
        1 => "the first step agrees; step 2 does not".to_owned(),
        _ => format!("the first {step} steps agree; step {} does not", step + 1),
    }
}

/// Whether a verdict shows what it must, and nothing that it need not.
pub(super) fn check(
    verdict: &Verdict,
    auditor: &PeerId,
    claim: Option<&Claim>,
    bound: f64,
    scheme: Scheme,
) -> Result<(), &'static str> {
    let needed = verdict.draw == 0 && verdict.finding == Finding::Agrees;
    let allowed = verdict.draw == 0 && matches!(verdict.finding, Finding::Untold | Finding::Differs);
    let untold = verdict.finding == Finding::Untold;
    let (shown, claim) = match (&verdict.replayed, claim) {
        (None, _) if !needed => return Ok(()),
        (Some(shown), Some(claim)) if needed || allowed => (shown, claim),
        (None, _) => return Err("says that the work agrees, and does not show that it replayed it"),
        (Some(_), _) => return Err("shows a replay where none is to be shown"),
    };
    let (slot, member) = (&verdict.slot, &verdict.member);
    if shown.trace.0.len().max(shown.claimed.0.len()) as u64 > MAX_STEPS {
        return Err("shows more steps than a round has");
    }
    if shown.claimed.root() != claim.trace_root {
        return Err("the trace it shows as the member's is not the one that was committed to");
    }
    let commitment = commitment(slot, member, auditor, &shown.trace, &shown.salt);
    let signed = answered(slot, auditor, &commitment, &claim.trace_root);
    if verify_bytes(scheme, ANSWER, &signed, *member, shown.answer).is_err() {
        return Err("the member did not answer a commitment to the trace it shows");
    }
    match shown.trace.parts(&shown.claimed, bound) {
        Some(_) if needed => Err("the trace it committed to is not that of the work"),
        None if untold => Err("says that the member told other steps, and shows the same"),
        _ => Ok(()),
    }
}

/// A member's signature under its answer.
pub(crate) fn signed(keys: &Keys, slot: &Slot, auditor: &PeerId, commitment: &Hash, trace_root: &Hash) -> Signature {
    keys.sign_bytes(ANSWER, &answered(slot, auditor, commitment, trace_root))
}

/// A trace of this peer's own, and what it answered for it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
struct Kept {
    branch: Branch,
    round: Round,
    trace: Trace,
    /// Auditors with the commitment of each, in the order in which they asked.
    answered: Vec<(PeerId, Hash)>,
}

/// The traces that a peer may be asked for. To be stored before an answer leaves: who answers a second commitment helps a lazy auditor.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Traces(Vec<Kept>);

impl Traces {
    /// Keeps the trace of a round of this branch, and drops those that nobody may ask for any more. Those of another branch do not grow old meanwhile: who
    /// went on without the others and comes back is asked for what it did before.
    pub fn keep(&mut self, config: &RunConfig, branch: Branch, round: Round, trace: Trace) {
        // Until its verdicts are over, and accusations with the last of them.
        let rounds = config.verification.verdict_rounds.saturating_mul(2);
        // Who asked for the same trace before has it.
        let answered = match self.0.iter().position(|kept| kept.trace == trace) {
            Some(at) => self.0.remove(at).answered,
            None => Vec::new(),
        };
        let most = usize::try_from(rounds.saturating_mul(BRANCHES)).unwrap_or(usize::MAX);
        self.0
            .retain(|kept| kept.branch != branch || kept.round.0.saturating_add(rounds) >= round.0);
        self.0.drain(..self.0.len().saturating_sub(most));
        self.0.push(Kept {
            branch,
            round,
            trace,
            answered,
        });
    }

    /// The trace with this root.
    pub fn find(&self, root: Hash) -> Option<Trace> {
        let mut all = self.0.iter().map(|kept| &kept.trace);
        all.find(|trace| trace.root() == root).cloned()
    }

    /// Answers an auditor that this peer's chain draws, one commitment each: so no more than have weight. Later on it answers who votes, if this peer is
    /// said to have told nothing.
    ///
    /// # Errors
    /// Why there is no answer.
    pub fn answer(
        &mut self,
        chain: &ChainState,
        config: &RunConfig,
        keys: &Keys,
        auditor: PeerId,
        ask: &Ask,
    ) -> Result<Answer, &'static str> {
        let (here, me, round) = (chain.next_slot(), keys.id(), ask.slot.round);
        if (ask.slot.run, ask.slot.branch) != (here.run, here.branch) {
            return Err("of another run or branch");
        }
        let over = chain.agreed.round > asked_until(&config.verification, round);
        let Some(lot) = &ask.lot else {
            let open = chain
                .agreed
                .accusations
                .iter()
                .find(|open| (open.round, open.member) == (round, me));
            let open = open.filter(|open| over && open.finding == Finding::Untold);
            let claim = open.ok_or("nobody is to ask about it, or not yet")?.claim;
            if chain
                .agreed
                .weights
                .binary_search_by_key(&auditor, |(id, _)| *id)
                .is_err()
            {
                return Err("it has no vote");
            }
            // Nobody is paid for what it asks now.
            return self.tell(keys, &ask.slot, &auditor, ask.commitment, claim.trace_root);
        };
        let auditable = chain.auditable(round).ok_or("of a round that is not audited now")?;
        if over {
            return Err("too late: verdicts may show the trace by now");
        }
        let key = chain.member(&auditor).map(|member| member.vrf_key).unwrap_or_default();
        let lot = beacon::verify_lot(lot, &key, &auditable.seed, round, &me, keys.scheme());
        if !lot.is_some_and(|lot| auditable.draws(&config.verification, &auditor, &me, lot)) {
            return Err("its lot does not prove that it was drawn");
        }
        let root = auditable.claim(&me).ok_or("nothing was counted")?.trace_root;
        let kept = self.0.iter_mut().find(|kept| kept.trace.root() == root);
        let kept = kept.ok_or(NOT_HERE)?;
        let commitment = match kept.answered.iter().find(|(id, _)| *id == auditor) {
            Some((_, first)) => *first,
            None => {
                kept.answered.push((auditor, ask.commitment));
                ask.commitment
            }
        };
        self.tell(keys, &ask.slot, &auditor, commitment, root)
    }

    fn tell(
        &self,
        keys: &Keys,
        slot: &Slot,
        auditor: &PeerId,
        commitment: Hash,
        root: Hash,
    ) -> Result<Answer, &'static str> {
        Ok(Answer {
            commitment,
            trace: self.find(root).ok_or(NOT_HERE)?,
            signature: signed(keys, slot, auditor, &commitment, &root),
        })
    }
}
