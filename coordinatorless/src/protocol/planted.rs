//! Bugs that the simulator must find. They exist only where this crate tests itself; elsewhere `planted` is the constant `false`.

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

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in everything that this thread runs, or none.
#[cfg(test)]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is there.
#[cfg(test)]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this bug is there: never, but in tests.
#[cfg(not(test))]
pub const fn planted(_bug: Bug) -> bool {
    false
}
