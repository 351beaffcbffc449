//! Checking a certificate: the one proof of a decision that needs no trust in whoever shows it.

use super::voters::Voters;
use crate::types::*;
use crate::wire::{Body, Scheme, Signed};

/// Why a certificate proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Voters are not sorted, or one stands there twice.
    #[error("voters out of order or repeated: {voter} does not come after the one before it")]
    Order {
        /// The one out of place.
        voter: PeerId,
    },
    /// A voter of that round is expected.
    #[error("{voter} has no vote in this round")]
    Stranger {
        /// Who is none.
        voter: PeerId,
    },
    /// More than 2/3 of the weight is needed.
    #[error("too little weight: expected more than 2/3 of {total}, found {found}")]
    Weight {
        /// All voters' weight.
        total: u64,
        /// The weight behind the certificate.
        found: u64,
    },
    /// A signature does not fit a vote for this record in this slot.
    #[error("vote signature of {voter} does not fit")]
    Signature {
        /// Whose.
        voter: PeerId,
    },
}

/// Checks that more than 2/3 of the weight signed a precommit to exactly this record in exactly this slot.
pub(super) fn check(voters: &Voters, certificate: &Certificate, scheme: Scheme) -> Result<(), CertificateError> {
    let vote = Vote {
        slot: certificate.slot,
        kind: VoteKind::Precommit,
        record: Some(certificate.record),
    };
    check_votes(voters, &vote, &certificate.votes, scheme)
}

/// The same for the prevotes of a polka in the round of `slot`.
pub(super) fn check_polka(voters: &Voters, slot: Slot, polka: &Polka, scheme: Scheme) -> Result<(), CertificateError> {
    let vote = Vote {
        slot: Slot {
            view: polka.view,
            ..slot
        },
        kind: VoteKind::Prevote,
        record: Some(polka.record),
    };
    check_votes(voters, &vote, &polka.prevotes, scheme)
}

/// Checks that more than 2/3 of the weight signed this very vote. Cheap checks come first, so that rubbish costs no signature
/// verification.
fn check_votes(
    voters: &Voters,
    vote: &Vote,
    votes: &[(PeerId, Signature)],
    scheme: Scheme,
) -> Result<(), CertificateError> {
    let mut found = 0u64;
    let mut before: Option<PeerId> = None;
    for (voter, _) in votes {
        if before.is_some_and(|before| before >= *voter) {
            return Err(CertificateError::Order { voter: *voter });
        }
        before = Some(*voter);
        match voters.weight_of(voter) {
            0 => return Err(CertificateError::Stranger { voter: *voter }),
            // Voters are distinct members here, so the sum is at most the total.
            weight => found += weight,
        }
    }
    if !voters.quorum(found) {
        return Err(CertificateError::Weight {
            total: voters.total(),
            found,
        });
    }
    for (voter, signature) in votes {
        let signed = Signed {
            signer: *voter,
            body: Body::Vote(vote.clone()),
            signature: *signature,
        };
        signed
            .verify(scheme)
            .map_err(|_| CertificateError::Signature { voter: *voter })?;
    }
    Ok(())
}
