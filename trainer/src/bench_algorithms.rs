//! `murmur bench algorithms`: every way of training together, on the same model, tokens, seeds and numbers of learning rates tried.
//!
//! Workers take their turns on this machine, but all that would travel is really encoded, decoded strictly and summed by [`crate::aggregate`]; bytes
//! are those of the blobs. In reading order: [`plan`] (what is compared), [`simulate`](mod@simulate) (one run), [`attack`] (what liars
//! send), [`mod@bench`] (all runs of a plan, side by side, each kept in a file so that a bench that was stopped goes on), [`report`] (tables),
//! [`capture`](mod@capture) (what a worker encodes, for the bench of the codec).
//!
//! Runs compare at equal tokens: a worker that misses a round leaves its batches to later rounds, and liars' tokens do not count.

pub mod attack;
pub mod bench;
pub mod capture;
pub mod plan;
pub mod report;
pub mod simulate;

pub use attack::Attack;
pub use bench::{Bench, BenchError, Progress};
pub use capture::{Captured, capture};
pub use plan::{Arm, Kind, Plan, Preset, Series, Setting, Task, Trouble};
pub use report::Report;
pub use simulate::{Data, Outcome, Point, simulate};
