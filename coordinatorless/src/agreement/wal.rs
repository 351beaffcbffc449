//! Entries of the write-ahead log: what the engine must know again after a crash, so that it never signs two different messages
//! for one slot (R19). The engine's inputs have no encoding of their own; these have our canonical one.

use std::collections::BTreeSet;

use arc_malachitebft_core_consensus as core;
use arc_malachitebft_core_types as bft;
use bft::{Validity, ValueOrigin};
use core::{Input, ProposedValue};
use rkyv::{Archive, Deserialize, Serialize};

use super::context::{Ballot, Height, Motion, Murmur, Value, view_of};
use super::effects::{kind_of, timeout_of};
use super::gathered;
use crate::types::*;
use crate::wire::{Canonical, MAX_RECORD, WireError};

/// The longest entry: one that carries a record.
const MAX_ENTRY: usize = MAX_RECORD + 4096;

/// One entry.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
enum Entry {
    /// A vote was taken in, perhaps this peer's own.
    Vote(PeerId, Vote, Signature),
    /// So was a proposal.
    Proposal(PeerId, Box<Proposal>, Signature),
    /// A timeout fired: its slot and kind.
    Timeout(Slot, u8),
    /// A record was found valid; the slot's view and the peer say in which proposal.
    Valid(Slot, PeerId, Box<Record>),
    /// More than 2/3 of the prevotes for one record were seen together.
    Polka(Slot, Hash, Vec<(PeerId, Signature)>),
}

/// Encodes what the engine wants logged. `None` for inputs that the engine does not log.
pub(super) fn encode(run: RunId, height: Height, input: &Input<Murmur>) -> Option<Vec<u8>> {
    let entry = match input {
        Input::Vote(vote) => Entry::Vote(vote.message.voter, vote.message.to_vote(run), vote.signature),
        Input::Proposal(proposal) => {
            let motion = &proposal.message;
            Entry::Proposal(motion.proposer, Box::new(motion.to_proposal(run)), proposal.signature)
        }
        Input::TimeoutElapsed(timeout) => {
            Entry::Timeout(height.slot(run, view_of(timeout.round)), kind_of(timeout.kind))
        }
        Input::ProposedValue(value, _) => Entry::Valid(
            value.height.slot(run, view_of(value.round)),
            value.proposer,
            Box::new((*value.value.record).clone()),
        ),
        Input::PolkaCertificate(polka) => Entry::Polka(
            polka.height.slot(run, view_of(polka.round)),
            polka.value_id,
            polka
                .polka_signatures
                .iter()
                .map(|signature| (signature.address, signature.signature))
                .collect(),
        ),
        Input::StartHeight(..) | Input::RoundCertificate(_) | Input::Propose(_) | Input::SyncValueResponse(_) => {
            return None;
        }
    };
    Some(entry.to_canonical())
}

/// Decodes an entry. `Ok(None)` if it belongs to another run or height.
fn decode(run: RunId, height: Height, bytes: &[u8]) -> Result<Option<Input<Murmur>>, WireError> {
    if bytes.len() > MAX_ENTRY {
        return Err(WireError::Long {
            expected: MAX_ENTRY,
            found: bytes.len(),
        });
    }
    let entry = Entry::from_canonical(bytes)?;
    let slot = match &entry {
        Entry::Vote(_, vote, _) => vote.slot,
        Entry::Proposal(_, proposal, _) => proposal.slot,
        Entry::Timeout(slot, _) | Entry::Valid(slot, ..) | Entry::Polka(slot, ..) => *slot,
    };
    if slot.run != run || Height::of(&slot) != height {
        return Ok(None);
    }
    let round = bft::Round::new(slot.view);
    let input = match entry {
        Entry::Vote(signer, vote, signature) => {
            Input::Vote(bft::SignedMessage::new(Ballot::new(signer, &vote), signature))
        }
        Entry::Proposal(signer, proposal, signature) => {
            let value = Value::new(proposal.record.clone());
            Input::Proposal(bft::SignedMessage::new(
                Motion::new(signer, &proposal, value),
                signature,
            ))
        }
        Entry::Timeout(_, kind) => Input::TimeoutElapsed(bft::Timeout::new(
            round,
            timeout_of(kind).ok_or(WireError::Kind { found: kind })?,
        )),
        Entry::Valid(_, proposer, record) => {
            let value = Value::new(*record);
            Input::ProposedValue(proposed(height, round, proposer, value), ValueOrigin::Consensus)
        }
        Entry::Polka(_, record, votes) => Input::PolkaCertificate(gathered::polka(height, slot.view, record, votes)),
    };
    Ok(Some(input))
}

/// Whether an entry is one, of whatever run and height.
pub(super) fn readable(bytes: &[u8]) -> bool {
    bytes.len() <= MAX_ENTRY && Entry::from_canonical(bytes).is_ok()
}

/// A record that was found valid, as the engine wants to be told.
pub(super) fn proposed(height: Height, round: bft::Round, proposer: PeerId, value: Value) -> ProposedValue<Murmur> {
    ProposedValue {
        height,
        round,
        valid_round: bft::Round::Nil,
        proposer,
        value,
        validity: Validity::Valid,
    }
}

/// What a height's log says.
pub(super) struct Replay {
    /// The inputs in order.
    pub(super) inputs: Vec<Input<Murmur>>,
    /// Whether every entry could be read, but for a last one that was torn while it was written: nothing was sent after that. An
    /// unreadable entry with others behind it may have been a vote, so whoever replays such a log must not sign.
    pub(super) whole: bool,
}

/// Reads a height's log.
pub(super) fn read(run: RunId, me: PeerId, height: Height, entries: &[Vec<u8>]) -> Replay {
    let mut replay = Replay {
        inputs: Vec::with_capacity(entries.len()),
        whole: true,
    };
    for (index, entry) in entries.iter().enumerate() {
        match decode(run, height, entry) {
            Ok(input) => replay.inputs.extend(input),
            Err(error) => {
                let torn = index + 1 == entries.len();
                tracing::warn!(%height, index, torn, %error, "an entry of the agreement's log can't be read");
                replay.whole &= torn;
            }
        }
    }
    replay.inputs = without_unsent_records(replay.inputs, me);
    replay
}

/// Leaves out own records whose proposal was never logged, hence never sent. The engine keeps two records a view and drops what
/// comes after: a proposer that lost power twice between a record and its proposal would not find its third one again, and would
/// go on to propose a fourth.
fn without_unsent_records(inputs: Vec<Input<Murmur>>, me: PeerId) -> Vec<Input<Murmur>> {
    let sent: BTreeSet<Hash> = inputs
        .iter()
        .filter_map(|input| match input {
            Input::Proposal(proposal) => Some(proposal.message.value.hash),
            _ => None,
        })
        .collect();
    let unsent = |input: &Input<Murmur>| match input {
        Input::ProposedValue(value, _) => value.proposer == me && !sent.contains(&value.value.hash),
        _ => false,
    };
    inputs.into_iter().filter(|input| !unsent(input)).collect()
}
