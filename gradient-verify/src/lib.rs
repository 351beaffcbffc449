//! Proof instead of trust: replays another member's round from agreed state and says what differs. It never uses the network: what a
//! member must open is handed in as bytes.
//!
//! Who audits whom is drawn in private, from the record's seed (`coordinatorless::protocol::audit`); this crate does the audit. Read in this order:
//!
//! 1. [`opening`]: the accumulators that a commit names, as bytes; what is checked before they are believed to be the ones.
//!    [`accumulator_proof`]: some leaves of them, where they are long, each with its path to the root.
//! 2. [`mod@replay`]: the same batches from the same model, and what the member's bytes claim the outcome was.
//! 3. [`tolerance`]: how far apart two pseudo-gradients are, and whether what was sent is what the codec would have sent.
//! 4. [`mod@verdict`]: a finding for the record, and the same in plain words.
//!
//! The same idea beyond training, for anything that one machine computed and another can check without asking it:
//!
//! 5. [`proof`]: the file of a proof: which model, who says so, strict bytes.
//! 6. [`inference`]: this model wrote this text.
//! 7. [`evaluation`]: this model finds these texts, or these answers, so likely.
//! 8. [`flops`]: this peer did so many operations within this time.
//!
//! What an audit holds a member to is the whole chain from batches to bytes: the pseudo-gradient is the one that its batches give; what it sent
//! and what it kept add up to accumulator plus pseudo-gradient; and what it sent is the selection of that sum. Two gaps remain, and
//! both are narrow: an accumulator that was falsified in a round nobody audited is taken as it is later (it fades by `beta` each
//! round, and contributions are clipped to the median norm), and a scale may be off by up to [`tolerance::SCALE_SLACK`].

pub mod accumulator_proof;
pub mod evaluation;
pub mod flops;
pub mod inference;
pub mod opening;
pub mod proof;
pub mod replay;
pub mod tolerance;
mod tree;
pub mod verdict;

pub use opening::{OpeningError, accumulator_bytes};
pub use replay::{Audit, Replay, ReplayError, replay};
pub use verdict::{explain, judge, malformed, verdict};
