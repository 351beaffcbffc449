//! The engine's nouns, each a thin wrapper around ours: the engine is generic over a `Context`, and this is it.
//!
//! The engine's *height* is our branch and round, its *round* our view, its *value* our record with the hash computed once. What
//! it signs and verifies are our own canonical messages, so that any peer can check a certificate without knowing the engine.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arc_malachitebft_core_types as bft;
use bft::NilOrVal;

use super::voters::{Voter, Voters};
use crate::types::*;
use crate::wire::{Body, Signed};

/// The one context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Murmur;

/// Branch and round. A later branch is higher, whatever its round, because it was begun later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) struct Height {
    pub(super) branch: Branch,
    pub(super) round: Round,
}

impl Height {
    pub(super) fn of(slot: &Slot) -> Self {
        Self {
            branch: slot.branch,
            round: slot.round,
        }
    }
    pub(super) fn next(self) -> Self {
        Self {
            round: self.round.next(),
            ..self
        }
    }
    pub(super) fn slot(self, run: RunId, view: View) -> Slot {
        Slot {
            run,
            branch: self.branch,
            round: self.round,
            view,
        }
    }
}

impl fmt::Display for Height {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.branch, self.round)
    }
}

impl bft::Height for Height {
    const ZERO: Self = Self {
        branch: 0,
        round: Round(0),
    };
    const INITIAL: Self = Self {
        branch: 0,
        round: Round(1),
    };

    fn increment_by(&self, n: u64) -> Self {
        Self {
            round: Round(self.round.0.saturating_add(n)),
            ..*self
        }
    }
    fn decrement_by(&self, n: u64) -> Option<Self> {
        Some(Self {
            round: Round(self.round.0.checked_sub(n)?),
            ..*self
        })
    }
    fn as_u64(&self) -> u64 {
        self.round.0
    }
}

/// A record with its hash. Two values are one when their hashes are.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) hash: Hash,
    pub(super) record: Arc<Record>,
}

impl Value {
    pub(super) fn new(record: Record) -> Self {
        Self {
            hash: record.hash(),
            record: Arc::new(record),
        }
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}
impl Eq for Value {}
impl PartialOrd for Value {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Value {
    fn cmp(&self, other: &Self) -> Ordering {
        self.hash.cmp(&other.hash)
    }
}

impl bft::Value for Value {
    type Id = Hash;
    fn id(&self) -> Hash {
        self.hash
    }
}

impl bft::Address for PeerId {}

impl bft::Validator<Murmur> for Voter {
    fn address(&self) -> &PeerId {
        &self.id
    }
    fn public_key(&self) -> &PeerId {
        &self.id
    }
    fn voting_power(&self) -> u64 {
        self.weight
    }
}

/// The voters behind an `Arc`: the engine clones its set often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Members(pub(super) Arc<Voters>);

impl bft::ValidatorSet<Murmur> for Members {
    fn count(&self) -> usize {
        self.0.len()
    }
    fn total_voting_power(&self) -> u64 {
        self.0.total()
    }
    fn get_by_address(&self, address: &PeerId) -> Option<&Voter> {
        self.0.find(address)
    }
    fn get_by_index(&self, index: usize) -> Option<&Voter> {
        self.0.at(index)
    }
}

/// Records travel whole in proposals, so there are no parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoPart;

impl bft::ProposalPart<Murmur> for NoPart {
    fn is_first(&self) -> bool {
        true
    }
    fn is_last(&self) -> bool {
        true
    }
}

/// A proposal as the engine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Motion {
    pub(super) height: Height,
    pub(super) round: bft::Round,
    pub(super) value: Value,
    pub(super) polka: bft::Round,
    pub(super) proposer: PeerId,
}

impl Motion {
    /// What a message says, with the record's hash computed by the caller.
    pub(super) fn new(signer: PeerId, proposal: &Proposal, value: Value) -> Self {
        Self {
            height: Height::of(&proposal.slot),
            round: bft::Round::new(proposal.slot.view),
            value,
            polka: bft::Round::from(proposal.polka_view),
            proposer: signer,
        }
    }
    pub(super) fn to_proposal(&self, run: RunId) -> Proposal {
        Proposal {
            slot: self.height.slot(run, view_of(self.round)),
            polka_view: self.polka.as_u32(),
            record: (*self.value.record).clone(),
        }
    }
}

impl bft::Proposal<Murmur> for Motion {
    fn height(&self) -> Height {
        self.height
    }
    fn round(&self) -> bft::Round {
        self.round
    }
    fn value(&self) -> &Value {
        &self.value
    }
    fn take_value(self) -> Value {
        self.value
    }
    fn pol_round(&self) -> bft::Round {
        self.polka
    }
    fn validator_address(&self) -> &PeerId {
        &self.proposer
    }
}

/// A vote as the engine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ballot {
    pub(super) height: Height,
    pub(super) round: bft::Round,
    pub(super) kind: bft::VoteType,
    pub(super) value: NilOrVal<Hash>,
    pub(super) voter: PeerId,
}

impl Ballot {
    pub(super) fn new(signer: PeerId, vote: &Vote) -> Self {
        Self {
            height: Height::of(&vote.slot),
            round: bft::Round::new(vote.slot.view),
            kind: match vote.kind {
                VoteKind::Prevote => bft::VoteType::Prevote,
                VoteKind::Precommit => bft::VoteType::Precommit,
            },
            value: vote.record.map_or(NilOrVal::Nil, NilOrVal::Val),
            voter: signer,
        }
    }
    pub(super) fn to_vote(&self, run: RunId) -> Vote {
        Vote {
            slot: self.height.slot(run, view_of(self.round)),
            kind: match self.kind {
                bft::VoteType::Prevote => VoteKind::Prevote,
                bft::VoteType::Precommit => VoteKind::Precommit,
            },
            record: match self.value {
                NilOrVal::Nil => None,
                NilOrVal::Val(hash) => Some(hash),
            },
        }
    }
}

impl bft::Vote<Murmur> for Ballot {
    fn height(&self) -> Height {
        self.height
    }
    fn round(&self) -> bft::Round {
        self.round
    }
    fn value(&self) -> &NilOrVal<Hash> {
        &self.value
    }
    fn take_value(self) -> NilOrVal<Hash> {
        self.value
    }
    fn vote_type(&self) -> bft::VoteType {
        self.kind
    }
    fn validator_address(&self) -> &PeerId {
        &self.voter
    }
    fn extension(&self) -> Option<&bft::SignedExtension<Murmur>> {
        None
    }
    fn take_extension(&mut self) -> Option<bft::SignedExtension<Murmur>> {
        None
    }
    fn extend(self, _: bft::SignedExtension<Murmur>) -> Self {
        self
    }
}

/// Signatures are ours; keys are peer ids. The secret never enters the engine: it asks for signatures by effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signing;

impl bft::SigningScheme for Signing {
    type DecodingError = std::array::TryFromSliceError;
    type Signature = Signature;
    type PublicKey = PeerId;
    type PrivateKey = ();

    fn decode_signature(bytes: &[u8]) -> Result<Signature, Self::DecodingError> {
        bytes.try_into().map(Signature)
    }
    fn encode_signature(signature: &Signature) -> Vec<u8> {
        signature.0.to_vec()
    }
    fn decode_public_key(bytes: &[u8]) -> Result<PeerId, Self::DecodingError> {
        bytes.try_into().map(PeerId)
    }
    fn encode_public_key(key: &PeerId) -> Vec<u8> {
        key.0.to_vec()
    }
}

impl bft::Context for Murmur {
    type Address = PeerId;
    type Height = Height;
    type ProposalPart = NoPart;
    type Proposal = Motion;
    type Validator = Voter;
    type ValidatorSet = Members;
    type Timeouts = bft::LinearTimeouts;
    type Value = Value;
    type Vote = Ballot;
    type Extension = ();
    type SigningScheme = Signing;

    fn select_proposer<'a>(&self, set: &'a Members, height: Height, round: bft::Round) -> &'a Voter {
        match set.0.proposing(height.round, view_of(round)) {
            Some(voter) => voter,
            // `Agreement::start` refuses a set without voters.
            None => unreachable!("no height is started without voters"),
        }
    }

    fn new_proposal(
        &self,
        height: Height,
        round: bft::Round,
        value: Value,
        polka: bft::Round,
        proposer: PeerId,
    ) -> Motion {
        Motion {
            height,
            round,
            value,
            polka,
            proposer,
        }
    }
    fn new_prevote(&self, height: Height, round: bft::Round, value: NilOrVal<Hash>, voter: PeerId) -> Ballot {
        Ballot {
            height,
            round,
            kind: bft::VoteType::Prevote,
            value,
            voter,
        }
    }
    fn new_precommit(&self, height: Height, round: bft::Round, value: NilOrVal<Hash>, voter: PeerId) -> Ballot {
        Ballot {
            height,
            round,
            kind: bft::VoteType::Precommit,
            value,
            voter,
        }
    }
}

/// The engine's round as our view. It is nil only before a height starts, where no view is asked for.
pub(super) fn view_of(round: bft::Round) -> View {
    round.as_u32().unwrap_or(0)
}

/// A vote of the engine as the message that travels.
pub(super) fn signed_vote(run: RunId, vote: &bft::SignedVote<Murmur>) -> Signed {
    Signed {
        signer: vote.message.voter,
        body: Body::Vote(vote.message.to_vote(run)),
        signature: vote.signature,
    }
}

/// A proposal of the engine as the message that travels.
pub(super) fn signed_proposal(run: RunId, proposal: &bft::SignedProposal<Murmur>) -> Signed {
    Signed {
        signer: proposal.message.proposer,
        body: Body::Proposal(Box::new(proposal.message.to_proposal(run))),
        signature: proposal.signature,
    }
}
