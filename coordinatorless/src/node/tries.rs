//! When a member that gives an auditor no answer has refused, and when it is asked again.
//!
//! Soon at first, later once a second. It has refused with the [`REFUSALS`]th answer in a row that it could have given and did not, once it has had ten
//! seconds to change its mind or half of the time for the verdict is over. Who is gone, has just come back, or is behind has not refused, and is asked
//! until two more records at most can have the verdict; that it has opened nothing is said then, too, if it had ten seconds: in rounds of a fraction of
//! a second nobody can tell who is gone from who is slow. Who begins to open and does not end has refused with the second such answer.

use std::time::{Duration, Instant};

use super::audits::OPENING;
use super::effects::AGAIN;
use crate::protocol::replayed::{REFUSALS, Window};
use crate::types::Round;

/// Answers that do not end which are a refusal.
const STALLS: u32 = 2;
/// How long a member that gives none may still change its mind, unless half of the time for the verdict is over before; and the least for one that
/// is not there.
const REOPENING: Duration = Duration::from_secs(10);
/// Before somebody is asked again for the first times, and how many those are: rounds may be short.
const SOON: Duration = Duration::from_millis(250);
const AT_FIRST: u32 = 12;
/// Before somebody is asked again that cannot answer now.
const LATER: Duration = Duration::from_secs(2);

/// How often somebody was asked that gave no answer.
pub struct Tries {
    began: Instant,
    /// The last record then.
    record: Round,
    /// When it was asked last.
    asked: Instant,
    all: u32,
    /// Each time able to answer, in a row, and when it was first asked of these.
    refused: u32,
    since: Instant,
    /// Of these, those in a row that were waited for in vain for a whole patience.
    stalled: u32,
}

/// What follows when an accumulator was not opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Ask again after this.
    Ask(Duration),
    /// It has refused, or there is no time left to ask again.
    Accuse,
    /// It may have been unable, and there was hardly any time.
    Drop,
}

impl Tries {
    /// The first question is asked now, with `record` the last one.
    pub fn new(now: Instant, record: Round) -> Self {
        Self {
            began: now,
            record,
            asked: now,
            all: 0,
            refused: 0,
            since: now,
            stalled: 0,
        }
    }

    /// How long ago it was asked first.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The last record when it was asked first.
    pub fn record(&self) -> Round {
        self.record
    }

    /// It is asked once more then.
    pub fn ask_at(&mut self, at: Instant) {
        self.asked = at;
    }

    /// It gave no answer once more, and whether it could have.
    pub fn again(&mut self, able: bool, now: Instant) {
        self.all = self.all.saturating_add(1);
        if self.refused == 0 {
            self.since = self.asked;
        }
        self.refused = if able { self.refused.saturating_add(1) } else { 0 };
        let stalled = able && now - self.asked >= OPENING;
        self.stalled = if stalled { self.stalled.saturating_add(1) } else { 0 };
    }

    fn is_able(&self) -> bool {
        self.refused > 0
    }

    /// Before it is asked again.
    pub fn pause(&self) -> Duration {
        match self.is_able() {
            true if self.all <= AT_FIRST => SOON,
            true => AGAIN,
            false => LATER,
        }
    }

    /// Whether it gave no answer often enough in a row, each time able to.
    pub fn has_refused(&self) -> bool {
        self.refused >= REFUSALS
    }

    /// What to do now, with `record` the last one.
    pub fn next(&self, now: Instant, record: Round, window: &Window) -> Next {
        let late = now - self.since >= REOPENING || record >= window.half;
        match (self.has_refused() && late) || self.stalled >= STALLS {
            true => Next::Accuse,
            false if record < window.end => Next::Ask(self.pause()),
            false if now - self.began >= REOPENING => Next::Accuse,
            false => Next::Drop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window {
        half: Round(14),
        end: Round(16),
    };

    /// What follows after questions at these seconds, each with whether the member was able and how long it was waited for; `record` is the last one.
    fn after(questions: &[(u64, bool, u64)], record: u64) -> Next {
        let began = Instant::now();
        let at = |secs| began + Duration::from_secs(secs);
        let (mut tries, mut now) = (Tries::new(began, Round(10)), began);
        for (asked, able, waited) in questions {
            tries.ask_at(at(*asked));
            now = at(asked + waited);
            tries.again(*able, now);
        }
        tries.next(now, Round(record), &WINDOW)
    }

    #[test]
    fn who_was_able_and_gave_nothing_three_times_has_refused_when_it_is_late() {
        let thrice = [(0, true, 0); 3];
        assert_eq!(after(&thrice, 11), Next::Ask(SOON), "it may change its mind");
        let often: Vec<_> = (0..13).map(|_| (0, true, 0)).collect();
        assert_eq!(after(&often, 11), Next::Ask(AGAIN));
        assert_eq!(after(&[(0, true, 0), (4, true, 0), (9, true, 1)], 11), Next::Accuse);
        assert_eq!(after(&thrice, 14), Next::Accuse, "rounds are short");
        assert_eq!(after(&thrice[1..], 14), Next::Ask(SOON), "twice is not enough");
        let endless = [(0, true, 30), (31, true, 30)];
        assert_eq!(after(&endless, 11), Next::Accuse, "answers that do not end");
        assert_eq!(after(&endless[1..], 11), Next::Ask(SOON), "it may have been the line");
        assert_eq!(
            after(&[(0, false, 30); 2], 11),
            Next::Ask(LATER),
            "it went away over it"
        );
    }

    #[test]
    fn who_goes_silent_is_asked_until_hardly_a_record_can_have_the_verdict() {
        let gone = [(0, true, 0), (1, true, 0), (2, false, 3), (600, false, 3)];
        assert_eq!(after(&gone, 15), Next::Ask(LATER), "who is gone has not refused");
        assert_eq!(after(&gone, 16), Next::Accuse, "it has opened nothing");
        assert_eq!(after(&gone[..3], 16), Next::Drop, "within six seconds");
        let back = [(605, true, 0), (605, true, 0), (606, true, 0)];
        assert_eq!(
            after(&[&gone[..], &back].concat(), 11),
            Next::Ask(SOON),
            "it has just come back"
        );
        assert_eq!(after(&[&gone[..], &back].concat(), 14), Next::Accuse);
        assert_eq!(after(&[&gone[..], &back, &[(615, true, 0)]].concat(), 11), Next::Accuse);
    }
}
