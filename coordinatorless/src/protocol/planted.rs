//! Bugs that the simulator must find. They exist only in builds with the Cargo feature `planted-bugs`, which nothing but the
//! simulator's own tests asks for; elsewhere `planted` is the constant `false`.

/// A mistake that could be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A prevote for a record whose blobs are not held (R11).
    VoteWithoutHolding,
    /// Contributions are summed in the order in which they came (R13).
    SumInArrivalOrder,
    /// Votes leave before they are in the log (R19).
    SkipTheLog,
    /// What was counted goes out again (R7).
    CountTwice,
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in everything that this thread runs, or none.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::plant;
#[cfg(feature = "planted-bugs")]
pub(crate) use switch::planted;

/// Whether this bug is there: never, in a build without the feature.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn planted(_bug: Bug) -> bool {
    false
}
