//! The shortest form of a failing run that can be found: fewer rounds, fewer faults, no liars, for as long as the same promise
//! breaks. What mends something stays: a run that nothing mends stands still for no fault of its own. What is left is small enough
//! to read, and becomes a regression file.

use super::{Report, Scenario, run};

/// Runs tried at most: a search that takes all night helps nobody.
const TRIES: usize = 200;

/// A scenario no longer than `scenario` that breaks the same promise, and its report. `None` if `scenario` breaks none.
pub fn shrink(scenario: &Scenario) -> Option<(Scenario, Report)> {
    let mut best = scenario.spelled_out();
    let mut report = run(&best);
    let broken = report.violations.first()?.invariant;
    let mut tries = 0;
    let mut try_it = |candidate: Scenario, best: &mut Scenario, report: &mut Report| {
        tries += 1;
        if tries > TRIES || candidate.check().is_err() {
            return false;
        }
        let found = run(&candidate);
        let same = found.violations.iter().any(|violation| violation.invariant == broken);
        if same {
            (*best, *report) = (candidate, found);
        }
        same
    };
    while best.rounds > 1 {
        let rounds = best.rounds / 2;
        if !try_it(Scenario { rounds, ..best.clone() }, &mut best, &mut report) {
            break;
        }
    }
    let mut at = 0;
    while at < best.liars.len() {
        let mut candidate = best.clone();
        candidate.liars.remove(at);
        at += usize::from(!try_it(candidate, &mut best, &mut report));
    }
    // Halves first, then one by one.
    let mut span = best.faults.len().div_ceil(2);
    while span > 0 {
        let mut from = 0;
        while from < best.faults.len() {
            let mut candidate = best.clone();
            let mut at = 0..;
            let cut = from..from + span;
            candidate
                .faults
                .retain(|fault| fault.mends() || !at.next().is_some_and(|at: usize| cut.contains(&at)));
            if candidate.faults.len() == best.faults.len() {
                break;
            }
            if !try_it(candidate, &mut best, &mut report) {
                from += span;
            }
        }
        span /= 2;
    }
    Some((best, report))
}
