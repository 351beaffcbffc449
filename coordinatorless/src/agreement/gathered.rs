//! Votes gathered beside the engine, for two gaps that its own books leave where certificates travel as single votes.
//!
//! - *Polkas in spite of double votes.* The engine counts the first vote of each voter. A liar who prevotes a record towards some
//!   and nil towards others could so lock some peers on a record whose polka the others never see, for good. Here both of its votes
//!   are kept, and the polka is handed over as a whole. So are those of another process with this peer's own key.
//! - *Voters far ahead.* The engine drops votes of more than ten views ahead. A peer that slept through more would never learn that
//!   the others are there. Here the latest such vote of each voter is kept; more than 1/3 of the weight in one view is proof enough.

use std::collections::{BTreeMap, BTreeSet};

use arc_malachitebft_core_types as bft;

use super::context::{Ballot, Height, Murmur};
use super::voters::Voters;
use crate::types::*;

/// How many views ahead the engine takes votes and proposals (its `MAX_FUTURE_ROUND_LOOKAHEAD`).
pub(super) const LOOKAHEAD: View = 10;

/// Prevotes for one record in one view, and their weight.
#[derive(Default)]
struct Prevotes {
    votes: BTreeMap<PeerId, Signature>,
    weight: u64,
}

/// The books. Bounded: for each view within reach a voter has one prevote, and one more for each known record (the engine knows at
/// most two a view); far ahead it has one vote.
#[derive(Default)]
pub(super) struct Gathered {
    prevotes: BTreeMap<(View, Hash), Prevotes>,
    first: BTreeSet<(View, PeerId)>,
    handed: BTreeSet<(View, Hash)>,
    ahead: BTreeMap<PeerId, (Vote, Signature)>,
}

impl Gathered {
    /// Notes a prevote within reach; its record counts if it is `known` or the voter's first of the view. Gives the polka once, when
    /// this vote completes it.
    pub(super) fn prevote(
        &mut self,
        height: Height,
        voters: &Voters,
        voter: PeerId,
        vote: &Vote,
        signature: Signature,
        known: bool,
    ) -> Option<bft::PolkaCertificate<Murmur>> {
        let (view, record) = (vote.slot.view, vote.record?);
        let first = self.first.insert((view, voter));
        if !first && !known {
            return None;
        }
        let prevotes = self.prevotes.entry((view, record)).or_default();
        if prevotes.votes.insert(voter, signature).is_none() {
            prevotes.weight += voters.weight_of(&voter);
        }
        let complete = voters.quorum(prevotes.weight) && self.handed.insert((view, record));
        complete.then(|| {
            let votes = prevotes.votes.iter().map(|(peer, signature)| (*peer, *signature));
            polka(height, view, record, votes.collect())
        })
    }

    /// Whether prevotes for a record are a polka in some view.
    pub(super) fn has_polka(&self, record: &Hash, voters: &Voters) -> bool {
        let mut of_record = self.prevotes.iter().filter(|((_, of), _)| of == record);
        of_record.any(|(_, prevotes)| voters.quorum(prevotes.weight))
    }

    /// The prevotes noted for a record in a view.
    pub(super) fn prevotes(&self, view: View, record: Hash) -> impl Iterator<Item = (PeerId, Signature)> + '_ {
        let prevotes = self.prevotes.get(&(view, record)).into_iter();
        prevotes
            .flat_map(|prevotes| &prevotes.votes)
            .map(|(peer, signature)| (*peer, *signature))
    }

    /// Notes a vote beyond [`LOOKAHEAD`]. Gives a certificate when more than 1/3 of the weight stands in its view.
    pub(super) fn ahead(
        &mut self,
        height: Height,
        voters: &Voters,
        voter: PeerId,
        vote: &Vote,
        signature: Signature,
    ) -> Option<bft::RoundCertificate<Murmur>> {
        let view = vote.slot.view;
        if self.ahead.get(&voter).is_none_or(|(held, _)| held.slot.view < view) {
            self.ahead.insert(voter, (vote.clone(), signature));
        }
        let there = || self.ahead.iter().filter(|(_, (vote, _))| vote.slot.view == view);
        if !voters.honest(there().map(|(voter, _)| voters.weight_of(voter)).sum()) {
            return None;
        }
        Some(skip(
            height,
            view,
            there().map(|(voter, (vote, signature))| (*voter, vote, *signature)),
        ))
    }

    /// Forgets votes that are no longer far ahead.
    pub(super) fn reached(&mut self, view: View) {
        self.ahead.retain(|_, (vote, _)| vote.slot.view > view);
    }
}

/// Prevotes for one record as the engine's certificate of a polka.
pub(super) fn polka(
    height: Height,
    view: View,
    record: Hash,
    votes: Vec<(PeerId, Signature)>,
) -> bft::PolkaCertificate<Murmur> {
    bft::PolkaCertificate {
        height,
        round: bft::Round::new(view),
        value_id: record,
        polka_signatures: votes
            .into_iter()
            .map(|(peer, signature)| bft::PolkaSignature::new(peer, signature))
            .collect(),
    }
}

/// Votes of one view as the engine's certificate that this view was reached.
fn skip<'a>(
    height: Height,
    view: View,
    votes: impl Iterator<Item = (PeerId, &'a Vote, Signature)>,
) -> bft::RoundCertificate<Murmur> {
    let signatures = votes.map(|(voter, vote, signature)| {
        let ballot = Ballot::new(voter, vote);
        bft::RoundSignature::new(ballot.kind, ballot.value, voter, signature)
    });
    bft::RoundCertificate {
        height,
        round: bft::Round::new(view),
        cert_type: bft::RoundCertificateType::Skip,
        round_signatures: signatures.collect(),
    }
}
