//! The nouns of the protocol. Newtypes for what must not be mixed; every structure that travels or is hashed is `rkyv` with
//! one canonical encoding (fixed-width little-endian integers, sequences sorted where the docs say so).

use std::fmt;

use rkyv::{Archive, Deserialize, Serialize};

/// Derives shared by everything that travels: `rkyv` for the wire, ordering for canonical sorting.
macro_rules! id32 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[rkyv(derive(PartialEq, Eq, PartialOrd, Ord))]
        pub struct $name(pub [u8; 32]);

        impl Ord for $name {
            /// Lexicographic. The first eight bytes nearly always decide, and a call of `memcmp` costs more than they do.
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                let head = |id: &Self| id.0.first_chunk().map_or(0, |head| u64::from_be_bytes(*head));
                head(self).cmp(&head(other)).then_with(|| self.0.cmp(&other.0))
            }
        }
        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// The first five bytes in hexadecimal, for people.
            pub fn short(&self) -> String {
                self.to_string()[..10].to_owned()
            }
            /// Reads 64 hexadecimal digits.
            pub fn from_hex(text: &str) -> Option<Self> {
                blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                Self::from_hex(&text).ok_or_else(|| {
                    serde::de::Error::custom(format!("expected 64 hexadecimal digits, found {text:?}"))
                })
            }
        }
    };
}

id32!(
    /// A peer: its iroh endpoint id, an ed25519 public key (R1).
    PeerId
);
id32!(
    /// The hash of a run's canonical configuration (R2).
    RunId
);
id32!(
    /// A BLAKE3 hash: of a record, a blob, a model, a state.
    Hash
);

impl Hash {
    /// BLAKE3 of `bytes`, the address of a blob.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
    /// BLAKE3 of `bytes` in a domain of its own (`context` as in `blake3::derive_key`).
    pub fn derive(context: &str, bytes: &[u8]) -> Self {
        Self(blake3::derive_key(context, bytes))
    }
}

/// A round of a run; round 1 is the first that trains, record 0 is the genesis.
#[derive(
    Archive,
    Serialize,
    Deserialize,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Round(pub u64);

impl Round {
    /// The round after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
    /// The round before this one; the genesis stays itself.
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A branch: 0 until a regroup (R20) starts another.
pub type Branch = u32;
/// A view of the agreement within one round, from 0.
pub type View = u32;
/// Microseconds on this peer's own monotonic clock, or the simulator's virtual one.
pub type Micros = u64;
/// The index of a batch in the run's one permuted stream of batches.
pub type BatchIndex = u64;

/// An ed25519 signature (64 bytes).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature(pub [u8; 64]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sig:{:02x}{:02x}{:02x}", self.0[0], self.0[1], self.0[2])
    }
}

/// What every signature covers besides its message: no message can be replayed in another run, branch, round or view (R1).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Slot {
    /// The run.
    pub run: RunId,
    /// The branch of the run.
    pub branch: Branch,
    /// The round.
    pub round: Round,
    /// The view of the agreement, 0 where views mean nothing.
    pub view: View,
}

/// `len` batches of the stream from `start` on, handed back `returns` times by members who delivered nothing (R7).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DataRange {
    /// The first batch.
    pub start: BatchIndex,
    /// How many batches.
    pub len: u64,
    /// How often a member that delivered nothing has had this range.
    pub returns: u8,
}

/// A member's promise for one round: these bytes, for this much work (R4).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Commit {
    /// Run, branch and round; view 0.
    pub slot: Slot,
    /// The round whose model was trained from: the round before, or with overlap (R16) the one before that.
    pub base: Round,
    /// The record before the round's own.
    pub parent: Hash,
    /// The model trained from. A replica that went astray is not counted, rather than accused (R14).
    pub model_root: Hash,
    /// BLAKE3 of the concatenated shard hashes: an iroh-blobs hash sequence.
    pub blob: Hash,
    /// The shards' hashes in order, each of at most 4 MiB.
    pub shards: Vec<Hash>,
    /// Bytes of all shards together.
    pub len: u64,
    /// Tokens trained on: a prefix of the assigned order, in whole batches.
    pub tokens: u64,
    /// Mean training loss in nats per token, in millionths; advisory.
    pub loss_micros: u64,
    /// Merkle root over the inner steps ([`Trace::root`]).
    pub trace_root: Hash,
    /// The accumulator before the round: the root after the last counted commit, or that of zeros (R19).
    pub accumulator_before: Hash,
    /// The accumulator after it, should this commit be counted.
    pub accumulator_after: Hash,
}

/// A commit as its member signed it. Records carry these whole, so that anyone can check a record on its own.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Contribution {
    /// Who trained.
    pub member: PeerId,
    /// What it promised.
    pub commit: Commit,
    /// Its signature over the commit.
    pub signature: Signature,
}

/// A change of membership (R3, R15).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Change {
    /// A peer asks to take part from the next round on, or with overlap from the one after; signed by it.
    Join(Join, PeerId, Signature),
    /// A member says goodbye; signed by it.
    Leave(Leave, PeerId, Signature),
    /// A member has been silent for too long.
    Lapse(PeerId),
}

/// A newcomer's request (R18).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Join {
    /// Run, branch and the round the newcomer knows of; valid for 16 rounds after it.
    pub slot: Slot,
    /// Its VRF key (schnorrkel), cross-signed by this message's signature.
    pub vrf_key: [u8; 32],
    /// Where its tokens are to be paid; empty if nowhere. At most 64 bytes of ASCII.
    pub payout_address: String,
}

/// A member's goodbye.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Leave {
    /// Run, branch and round.
    pub slot: Slot,
}

/// What an auditor found.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Finding {
    /// The replay agrees within the bound.
    Agrees,
    /// It does not.
    Differs,
    /// The member did not open its accumulator.
    Unanswered,
    /// It agrees, but the member tells no steps, or others than an auditor's ([`Replayed`]).
    Untold,
}

impl Finding {
    /// In one word, as events and `--json` have it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Agrees => "agrees",
            Self::Differs => "differs",
            Self::Unanswered => "unanswered",
            Self::Untold => "untold",
        }
    }
}

/// A private draw, revealed: the VRF output that made its holder an auditor, and the proof that it is the one (R24).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Lot {
    /// The VRF output (schnorrkel pre-output, 32 bytes).
    pub output: [u8; 32],
    /// Its proof (64 bytes).
    pub proof: Signature,
}

/// A round's inner steps as whoever trained or replayed it saw them, and nobody else: of each the loss (`f32`) and the gradient's norm before
/// clipping (`f64`), their bits little-endian. At most [`MAX_STEPS`].
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Trace(pub Vec<[u8; 12]>);

/// Most inner steps of a round. Two traces of so many are 24 KiB, and sixteen such verdicts less than half of the longest record.
pub const MAX_STEPS: u64 = 1024;

/// What shows that an auditor replayed the round before it was told what the member had found (`protocol::replayed`).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Replayed {
    /// With the trace it opens the auditor's commitment.
    pub salt: [u8; 32],
    /// The auditor's trace.
    pub trace: Trace,
    /// The member's, as it told it for that commitment.
    pub claimed: Trace,
    /// The member's signature over slot, auditor, commitment and its own trace root.
    pub answer: Signature,
}

/// An auditor's signed word on one member's round (R25).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Verdict {
    /// Run and branch, and the *audited* round; view 0.
    pub slot: Slot,
    /// The member audited.
    pub member: PeerId,
    /// 0 if its lot drew the auditor, 1 if it was asked about an accusation, like everyone who votes.
    pub draw: u8,
    /// What drew the auditor.
    pub lot: Option<Lot>,
    /// What was found.
    pub finding: Finding,
    /// Relative L2 distance between claim and replay, in billionths (saturating).
    pub distance_nanos: u64,
    /// The bound it was held to, in billionths.
    pub bound_nanos: u64,
    /// In a first verdict that agrees, what shows that the auditor replayed; in one that says `Untold`, what the member told instead of its steps, or
    /// nothing if it told nothing; in one that differs, the steps of both, if the member told its own: so the record shows from which step on. Nowhere
    /// else.
    pub replayed: Option<Replayed>,
}

/// A verdict with its auditor's signature, as it stands in a record.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SignedVerdict {
    /// Who audited.
    pub auditor: PeerId,
    /// What it says.
    pub verdict: Verdict,
    /// The signature.
    pub signature: Signature,
}

/// Products of matrices of one size, each made from the last, in a proof of speed.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpeedChain {
    /// Rows and columns.
    pub side: u32,
    /// How many products; a multiple of `depth`.
    pub products: u32,
    /// From one commitment to the next.
    pub depth: u32,
}

/// What a member computed when it was asked for its speed (`protocol::speed`).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpeedClaim {
    /// Run, branch and the round after the record that asked; view 0.
    pub slot: Slot,
    /// What was computed.
    pub chains: Vec<SpeedChain>,
    /// Merkle root over the results.
    pub root: Hash,
}

/// A step of a proof of speed, as a record has it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SpeedStep {
    /// This member's claim came in time, signed by it.
    Claimed(PeerId, SpeedClaim, Signature),
    /// What was drawn of this member's claim was opened, and holds.
    Proven(PeerId),
}

impl SpeedStep {
    /// Whose proof it is of.
    pub fn member(&self) -> PeerId {
        match self {
            Self::Claimed(member, ..) | Self::Proven(member) => *member,
        }
    }
}

/// The next link of the run's randomness: a VRF of the original proposer over the last seed (R23).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Beacon {
    /// Who first proposed the record.
    pub proposer: PeerId,
    /// In which view.
    pub view: View,
    /// The VRF output (schnorrkel pre-output, 32 bytes).
    pub output: [u8; 32],
    /// Its proof (64 bytes).
    pub proof: Signature,
}

/// What the members agree on, once per round. The chain of records is the ledger: membership, weights, quotas, balances and
/// randomness follow from it by replay.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Record {
    /// Run, branch and round; view 0 (a record re-proposed in a later view stays the same record).
    pub slot: Slot,
    /// The record before.
    pub parent: Hash,
    /// The view in which the parent was decided: views below it failed, and their proposers go last for two rounds (R10).
    pub parent_view: View,
    /// Joins, leaves and lapses, at most 8, sorted.
    pub changes: Vec<Change>,
    /// Counted contributions, sorted by member.
    pub contributions: Vec<Contribution>,
    /// Batches nobody delivered, sorted; they are assigned first in the next round.
    pub returned: Vec<DataRange>,
    /// Batches returned three times: given up as poison, sorted.
    pub retired: Vec<DataRange>,
    /// The model after the round before this one.
    pub model_root: Hash,
    /// Cursor, pools, quotas, weights and VRF keys after the round before.
    pub state_root: Hash,
    /// Balances after the round before.
    pub ledger_root: Hash,
    /// Verdicts, at most 16, sorted.
    pub verdicts: Vec<SignedVerdict>,
    /// Proofs that a voter said two things in one slot, at most 8, sorted by culprit (R22).
    pub evidence: Vec<Evidence>,
    /// Steps of proofs of speed, at most 16, sorted by member.
    pub speeds: Vec<SpeedStep>,
    /// The next link of the randomness.
    pub beacon: Beacon,
    /// In the first record of a branch: what was half agreed at the fork, and is counted here.
    pub carried: Option<Carried>,
}

/// More than 2/3 of the weight precommitted to a record: nobody needs to trust whoever shows it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Certificate {
    /// Run, branch, round, and the view that decided.
    pub slot: Slot,
    /// The record.
    pub record: Hash,
    /// Voters and their precommit signatures, sorted by voter.
    pub votes: Vec<(PeerId, Signature)>,
}

/// A record with the proof that it was decided, as it is stored and handed to laggards.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Decided {
    /// The record.
    pub record: Record,
    /// Its certificate.
    pub certificate: Certificate,
    /// Where a branch begins (R20): the statements of everyone who went on. Empty otherwise.
    pub regroup: Vec<(PeerId, Regroup, Signature)>,
}

/// The two steps of voting.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum VoteKind {
    /// "I hold it and it follows the rules" (R11).
    Prevote,
    /// "More than 2/3 prevoted it."
    Precommit,
}

/// A vote of the agreement.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Vote {
    /// Run, branch, round and view.
    pub slot: Slot,
    /// Prevote or precommit.
    pub kind: VoteKind,
    /// The record voted for, or nil.
    pub record: Option<Hash>,
}

/// Two votes that one voter signed for one slot: whoever has both can show it, and needs nobody's word for it (R22).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Evidence {
    /// Who signed both.
    pub culprit: PeerId,
    /// The lesser of the two, and its signature.
    pub first: (Vote, Signature),
    /// The greater.
    pub second: (Vote, Signature),
}

impl Evidence {
    /// The one order in which two votes are shown.
    pub fn new(culprit: PeerId, one: (Vote, Signature), other: (Vote, Signature)) -> Self {
        let (first, second) = if one.0 <= other.0 { (one, other) } else { (other, one) };
        Self { culprit, first, second }
    }
}

/// A proposer's record for a view.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Proposal {
    /// Run, branch, round and view.
    pub slot: Slot,
    /// The view in which this record already had more than 2/3 of the prevotes, if any.
    pub polka_view: Option<View>,
    /// The record itself.
    pub record: Record,
}

/// What a peer holds and whom it hears: advice and provider list, not proof (R9, R15). Also the heartbeat.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Have {
    /// Run, branch and the round in progress.
    pub slot: Slot,
    /// Counts up with each message of this peer in this process, so that an older one never undoes a newer.
    pub sequence: u64,
    /// The last certified record this peer knows.
    pub tip: Hash,
    /// The round of `tip`.
    pub tip_round: Round,
    /// Members whose contribution of this round is held in full and found well-formed.
    pub held: Bits,
    /// Members heard from within the last seconds, by what they sent themselves.
    pub alive: Bits,
    /// Members heard from within the last three rounds, likewise.
    pub heard: Bits,
    /// Of the proofs of speed that are open, in their order: those whose claim came in time here, and from bit 16 on, those whose opening was
    /// found to hold.
    pub speeds: u32,
}

/// A set of members: bit `i` stands for the `i`-th active member, sorted by id, after the record before the message's round. So
/// who reads it must be in the same round.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Bits(Vec<u8>);

impl Bits {
    /// Those of `members` members for which `holds` says so.
    pub fn new(members: usize, holds: impl Fn(usize) -> bool) -> Self {
        let mut bytes = vec![0; members.div_ceil(8)];
        for at in (0..members).filter(|at| holds(*at)) {
            bytes[at / 8] |= 1 << (at % 8);
        }
        Self(bytes)
    }

    /// Whether the `at`-th member is in it.
    pub fn has(&self, at: usize) -> bool {
        self.0.get(at / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0)
    }

    /// The members in it that are not in `before`, ascending.
    pub fn gained<'a>(&'a self, before: Option<&'a Self>) -> impl Iterator<Item = usize> + 'a {
        let had = move |at: usize| before.and_then(|before| before.0.get(at)).copied().unwrap_or(0);
        let new = self.0.iter().enumerate().map(move |(at, byte)| (at, byte & !had(at)));
        new.filter(|(_, byte)| *byte != 0).flat_map(|(at, byte)| {
            let set = (0..8).filter(move |bit| byte & (1 << bit) != 0);
            set.map(move |bit| at * 8 + bit)
        })
    }

    /// The members in it, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.gained(None)
    }

    /// Whether it can be about this many members: the one length there is for them, and nobody beyond the last.
    pub fn fits(&self, members: usize) -> bool {
        let spare = self.0.len() * 8 - members.min(self.0.len() * 8);
        self.0.len() == members.div_ceil(8) && self.0.last().is_none_or(|last| last.leading_zeros() as usize >= spare)
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// More than 2/3 of the weight prevoted one record in one view: perhaps it was decided there, and somebody knows (R20).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Polka {
    /// The view.
    pub view: View,
    /// The record.
    pub record: Hash,
    /// Voters and their prevote signatures, sorted by voter.
    pub prevotes: Vec<(PeerId, Signature)>,
}

/// A half-agreed record of the fork, in the first record of the branch that counts its contributions (R20).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Carried {
    /// Why it may not be passed over.
    pub polka: Polka,
    /// Its canonical bytes.
    pub record: Vec<u8>,
}

/// "I have lost the quorum; I would go on with these" (R20).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Regroup {
    /// Run, and the branch and round that are stuck; view 0.
    pub slot: Slot,
    /// Counts up; a peer signs one statement for each and never acts on a lower one.
    pub attempt: u32,
    /// The highest certified record.
    pub tip: Hash,
    /// The highest polka seen in the stuck round: its record's contributions are the first that the new branch counts.
    pub polka: Option<Polka>,
    /// Who is heard from, this peer included; sorted.
    pub survivors: Vec<PeerId>,
}
