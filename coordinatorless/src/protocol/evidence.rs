//! Evidence of equivocation on its way into a record (R22): two votes of one voter for one slot.
//!
//! - Votes alone are evidence. An honest peer never signs two for one slot, restarts included: each is in its log before it is sent
//!   (R19). A second *commit* proves nothing, for a peer that starts again in the middle of a round trains it again, with less time
//!   left. A second *proposal* would have to be shown whole to be checked, and a proposal can fill a record by itself; who proposes
//!   twice gains nothing by it without voting twice.
//! - Two processes that vote with one key are no honest peer: they are barred like any other double voter, unless one has stopped
//!   before ([`super::doubled`]).
//! - Whoever sees the second vote signs and tells it once; others pass it on once, and repeat it with their heartbeats until a
//!   record has it. One piece for each culprit, so that nothing grows.

use super::event::Effect;
use super::{MAX_REQUESTS, State};
use crate::types::*;
use crate::wire::{Body, Signed};

/// Pieces that one heartbeat says again at most.
const REPEATED: usize = 4;

impl State {
    /// This peer's agreement saw a second vote.
    pub(super) fn caught(&mut self, evidence: Evidence) {
        let message = self.keys.sign(&Body::Evidence(evidence));
        self.evidence(message);
    }

    /// A piece of evidence, this peer's own or another's: kept for the next record, passed on once.
    pub(super) fn evidence(&mut self, message: Signed) {
        let Body::Evidence(evidence) = &message.body else {
            return;
        };
        let culprit = evidence.culprit;
        if self.evidence.contains_key(&culprit) || self.evidence.len() >= MAX_REQUESTS {
            return;
        }
        match self.chain.check_evidence(evidence, self.scheme) {
            Ok(()) => {
                self.evidence.insert(culprit, evidence.clone());
                self.out.push(Effect::Broadcast(message));
            }
            // Late news of one already barred is no sign of anything.
            Err(_) if !self.is_member(&culprit) => {}
            Err(violation) => self.reject(message.signer, "evidence", violation.to_string()),
        }
    }

    /// Says again what no record has yet.
    pub(super) fn repeat_evidence(&mut self) {
        let pieces: Vec<Evidence> = self.evidence.values().take(REPEATED).cloned().collect();
        for evidence in pieces {
            self.broadcast(Body::Evidence(evidence));
        }
    }
}
