//! The core's time, from a clock that may be wrong.
//!
//! The core wants a clock that never goes back and that runs at about the right rate; machines have others. A process is stopped for a
//! minute, a virtual machine sleeps for a night or moves to a host with another clock, somebody sets the time. After such a leap
//! every deadline would be over and everyone would seem to have been silent for hours, although nobody had a chance to be heard;
//! after a step back every timer would be hours away. So time passes by small steps only: a longer one counts as `LEAP`, and a step
//! back as none. Who drives the core reads the machine's clock through this.

use super::{BEAT, Micros};

/// The longest step that counts in full: a living process has a heartbeat in between, and it is shorter than any silence that says
/// something about others.
const LEAP: Micros = 2 * BEAT;

/// The clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// What the machine showed last.
    raw: Micros,
    /// What that came to.
    now: Micros,
}

impl Clock {
    /// A clock that starts when the machine shows `raw`, at `now`.
    pub fn new(raw: Micros, now: Micros) -> Self {
        Self { raw, now }
    }

    /// The core's time while the machine shows `raw`.
    pub fn at(&self, raw: Micros) -> Micros {
        self.now + raw.saturating_sub(self.raw).min(LEAP)
    }

    /// The same, remembered: later steps are taken from here.
    pub fn read(&mut self, raw: Micros) -> Micros {
        (self.now, self.raw) = (self.at(raw), raw);
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::SECOND;

    #[test]
    fn time_passes_by_small_steps_whatever_the_machine_shows() {
        let mut clock = Clock::new(5 * SECOND, 1);
        assert_eq!(clock.read(6 * SECOND), SECOND + 1);
        // Hours ahead, and hours back.
        assert_eq!(clock.read(9999 * SECOND), SECOND + 1 + LEAP);
        assert_eq!(clock.read(3 * SECOND), SECOND + 1 + LEAP);
        assert_eq!(clock.at(4 * SECOND), 2 * SECOND + 1 + LEAP);
        assert_eq!(clock.read(4 * SECOND), 2 * SECOND + 1 + LEAP);
    }
}
