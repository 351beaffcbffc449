//! Work shared out over scoped threads by contiguous ranges. Results come back in order, so that nothing depends on who ran
//! when.

use std::ops::Range;
use std::thread;

/// Threads that this machine offers; one if it does not say.
#[must_use]
pub(crate) fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Divides `0..items` into at most `parts` ranges of nearly equal length, none empty.
pub(crate) fn split(items: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = parts.clamp(1, items.max(1));
    (0..parts)
        .map(move |part| items * part / parts..items * (part + 1) / parts)
        .filter(|range| !range.is_empty())
}

/// Runs all jobs side by side, the last one here, and returns their results in order. A panic in one goes on here.
pub(crate) fn run<R: Send>(mut jobs: Vec<impl FnOnce() -> R + Send>) -> Vec<R> {
    let Some(last) = jobs.pop() else { return Vec::new() };
    thread::scope(|scope| {
        let spawned: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
        let last = last();
        let join = |handle: thread::ScopedJoinHandle<'_, R>| {
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let mut results: Vec<R> = spawned.into_iter().map(join).collect();
        results.push(last);
        results
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_everything_once_in_order() {
        for (items, parts) in [(0, 4), (1, 4), (7, 3), (8, 8), (100, 7)] {
            let covered: Vec<usize> = split(items, parts).flatten().collect();
            assert_eq!(covered, (0..items).collect::<Vec<_>>());
        }
    }
}
