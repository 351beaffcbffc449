//! A limit in bytes per second, shared by every transfer that it is to hold down together.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How much may go at once after a pause.
const BURST: Duration = Duration::from_millis(250);

/// A pace: each taker is told when its bytes are due (a virtual scheduling clock, ITU-T I.371's GCRA).
#[derive(Debug)]
pub(super) struct Rate {
    bytes_per_sec: u64,
    due: Mutex<Instant>,
}

impl Rate {
    /// At most `bytes_per_sec` (at least 1).
    pub fn new(bytes_per_sec: u64) -> Self {
        Self {
            bytes_per_sec: bytes_per_sec.max(1),
            due: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may go.
    pub async fn take(&self, bytes: u64) {
        let until = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let start = (*due).max(now.checked_sub(BURST).unwrap_or(now));
            *due = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_sec as f64);
            *due
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ten_takers_together_stay_within_the_rate() {
        let rate = Rate::new(100_000);
        let start = Instant::now();
        futures::future::join_all((0..10).map(|_| rate.take(10_000))).await;
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_secs(1) - BURST, "{elapsed:?}");
        assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
    }
}
