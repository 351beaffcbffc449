//! Two processes with one key: somebody copied a peer's directory and started both.
//!
//! Each believes that it is the peer. They answer each other's questions, commit to the same work, and sooner or later sign two votes
//! for one slot, for which the key is barred (R22). No signature tells them apart, so one has to stop before that, and say why.
//!
//! - The numbers of a start's [`Have`] messages are above those of every earlier start ([`first_sequence`]), so of two processes one
//!   always counts higher: the one started later, as a rule. It goes on, since whoever started it is there; the other stops.
//! - The two have no link to each other. But the others hear both, one after the other: whoever gets an old number straight from the
//!   peer that had a higher one sends the higher one back. It bears the peer's own signature, so it needs nobody's word for it, and
//!   nobody else can make one.
//! - A peer that sees a number of its own that it never came to signs nothing from then on.
//! - What the other process prevoted counts here as it does with everyone else: a polka that only its vote completes may have locked
//!   others, and without this peer they may be too few to decide.
//!
//! Until the first word comes back the two may vote apart. Then the key is barred, as it has to be: nobody can tell this from a lie.

use super::State;
use super::event::Effect;
use crate::types::*;
use crate::wire::{Body, Signed};

/// Between the first numbers of two starts at least: as many as a process sends in three months. In microseconds it is 17 s, so that of
/// two processes started from one disk the later counts higher, unless the disk's last start was only just before.
const STARTS_APART: u64 = 1 << 24;

/// The first number of a start's [`Have`] messages. `last` is that of the start before, as the disk has it (0: none known), `wall` the
/// microseconds since 1970 by this machine's clock, which may have been set back in between. `lot` is drawn anew by each start, so that
/// two from one disk differ.
pub fn first_sequence(last: u64, wall: u64, lot: u16) -> u64 {
    let next = if last == 0 {
        0
    } else {
        last.saturating_add(STARTS_APART)
    };
    wall.max(next).saturating_add(lot.into())
}

impl State {
    /// Whether another process has taken over this peer's key: then this one has said its last word, and should stop.
    pub fn is_doubled(&self) -> bool {
        self.doubled
    }

    /// A message with this peer's own signature: an echo, or not this process's.
    pub(super) fn own(&mut self, now: Micros, message: &Signed) {
        match &message.body {
            Body::Have(have) => {
                self.doubled |= have.slot.run == self.chain.agreed.run && have.sequence > self.sequence;
            }
            Body::Vote(vote) if (vote.slot.branch, vote.slot.round) == self.height() => self.ballot(now, message),
            _ => {}
        }
    }

    /// This peer handed over an old number itself: it is told the highest that it was ever heard with.
    pub(super) fn answer_double(&mut self, signer: PeerId) {
        let known = self.haves.get(&signer).zip(self.have_signatures.get(&signer));
        if let Some((have, signature)) = known {
            let message = Signed {
                signer,
                body: Body::Have(have.clone()),
                signature: *signature,
            };
            self.out.push(Effect::Send(signer, message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_counts_from_above_all_earlier_ones_whatever_the_clock_shows() {
        let now = 1_800_000_000_000_000;
        let minute = 60_000_000;
        let first = first_sequence(0, now, 7);
        assert_eq!(first, now + 7);
        assert!(
            first_sequence(first, now / 2, 0) >= first + STARTS_APART,
            "the clock was set back"
        );
        let copies = |later: u64| first_sequence(first, now + minute + later, 0);
        assert!(copies(1_000_000) > copies(0) + 900_000, "of two copies the later");
        assert_ne!(
            first_sequence(first, now, 1),
            first_sequence(first, now, 2),
            "two copies at once"
        );
    }
}
