//! From a replay to a word in the record, and to a sentence for people.

use coordinatorless::protocol::event::AuditOrder;
use coordinatorless::types::{Finding, Slot, Verdict};

use crate::replay::Replay;

/// Whether the claim stands: the distance is within `bound` (both in billionths, as the verdict states them) and the selection follows.
#[must_use]
pub fn judge(replay: &Replay, bound: f64) -> Finding {
    if replay.selection_ok && nanos(replay.distance) <= nanos(bound) {
        Finding::Agrees
    } else {
        Finding::Differs
    }
}

/// The verdict on a round that was replayed.
#[must_use]
pub fn verdict(order: &AuditOrder, replay: &Replay, bound: f64) -> Verdict {
    about(order, judge(replay, bound), nanos(replay.distance), bound)
}

/// The verdict on a member whose own word cannot be right ([`crate::ReplayError::blames_member`]): it differs, by as much as can be said.
#[must_use]
pub fn malformed(order: &AuditOrder, bound: f64) -> Verdict {
    about(order, Finding::Differs, u64::MAX, bound)
}

fn about(order: &AuditOrder, finding: Finding, distance_nanos: u64, bound: f64) -> Verdict {
    let contribution = &order.contribution;
    Verdict {
        slot: Slot {
            view: 0,
            ..contribution.commit.slot
        },
        member: contribution.member,
        draw: order.draw,
        lot: order.lot.clone(),
        finding,
        distance_nanos,
        bound_nanos: nanos(bound),
        replayed: None,
    }
}

/// Billionths, saturating; what is no number is as far as can be.
fn nanos(value: f64) -> u64 {
    if value.is_nan() {
        u64::MAX
    } else {
        (value * 1e9).round() as u64
    }
}

/// The outcome in one sentence: who, what was claimed, what the replay says, what follows.
#[must_use]
pub fn explain(order: &AuditOrder, replay: &Replay, bound: f64) -> String {
    let (member, round) = (order.contribution.member.short(), order.work.round);
    let steps = match replay.steps {
        1 => "1 step".to_owned(),
        steps => format!("{steps} steps"),
    };
    let claimed = format!("peer {member} claimed {steps} in round {round}; ");
    if replay.exact {
        return format!("{claimed}replaying them gives the same bits: it did the work it claimed");
    }
    let differs = format!(
        "replaying them gives a pseudo-gradient that differs by {} (allowed: {})",
        percent(replay.distance),
        percent(bound)
    );
    let follows = match (nanos(replay.distance) <= nanos(bound), replay.selection_ok) {
        (true, true) => "it did the work it claimed",
        (true, false) => "it did the work, but what it sent is not what that work gives",
        (false, _) => "it did not do the work it claimed",
    };
    format!("{claimed}{differs}: {follows}")
}

/// A share in percent, to three significant digits, so that what is just above a bound does not read as the bound.
fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent >= 1e6 {
        return "more than a million %".to_owned();
    }
    let digits = match percent {
        p if p >= 99.95 || p <= 0.0 => 0,
        p => (2 - p.log10().floor() as i32).clamp(0, 9) as usize,
    };
    let text = format!("{percent:.digits$}");
    let text = if digits > 0 {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}%")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use coordinatorless::types::Trace;

    use super::*;

    fn replay(distance: f64, selection_ok: bool) -> Replay {
        Replay {
            distance,
            norm_ratio: 1.0,
            exact: false,
            selection_ok,
            steps: 16,
            trace: Trace::default(),
        }
    }

    #[test]
    fn a_claim_stands_up_to_the_bound_and_not_beyond() {
        assert_eq!(judge(&replay(0.02, true), 0.02), Finding::Agrees);
        assert_eq!(judge(&replay(0.020_000_002, true), 0.02), Finding::Differs);
        assert_eq!(judge(&replay(0.0, false), 0.02), Finding::Differs);
        assert_eq!(judge(&replay(f64::MAX, true), 0.02), Finding::Differs);
        assert_eq!(judge(&replay(f64::NAN, true), 0.02), Finding::Differs);
    }

    #[test]
    fn billionths_saturate() {
        assert_eq!(nanos(0.02), 20_000_000);
        assert_eq!(nanos(f64::MAX), u64::MAX);
        assert_eq!(nanos(f64::NAN), u64::MAX);
    }

    #[test]
    fn percentages_keep_three_digits() {
        let shares = [0.0, 2e-7, 0.02, 0.0201, 0.713_29, 0.9999, 1.4, 21.0, 1e300];
        let texts: Vec<String> = shares.iter().map(|share| percent(*share)).collect();
        let expected = [
            "0%",
            "0.00002%",
            "2%",
            "2.01%",
            "71.3%",
            "100%",
            "140%",
            "2100%",
            "more than a million %",
        ];
        assert_eq!(texts, expected);
    }
}
