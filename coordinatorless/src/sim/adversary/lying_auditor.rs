//! Audits as it likes: says nothing, accuses whomever it may, or covers its own kind.

use super::false_work::FalseWork;
use super::{Adversary, Stage};
use crate::protocol::event::{AuditOrder, Effect, Event};
use crate::types::*;
use crate::wire::Body;

/// What it says of what it was drawn to audit.
pub(in crate::sim) enum LyingAuditor {
    /// Nothing.
    Lazy,
    /// That it differs, whatever it is.
    Accuser,
    /// That it agrees where a liar claims it, that it differs where an honest member does; and it claims work that it did not do.
    Colluder,
}

impl LyingAuditor {
    fn says(stage: &Stage<'_>, order: AuditOrder, finding: Finding) -> Vec<Effect> {
        let verdict = Verdict {
            slot: order.contribution.commit.slot,
            member: order.contribution.member,
            draw: order.draw,
            lot: order.lot,
            finding,
            distance_nanos: 1_000_000_000,
            bound_nanos: 20_000_000,
        };
        stage.tell(&stage.others(), &Body::Verdict(verdict))
    }
}

impl Adversary for LyingAuditor {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        match self {
            Self::Colluder => FalseWork::Always.hears(stage, event),
            Self::Lazy | Self::Accuser => vec![event],
        }
    }

    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let Effect::Audit(order) = effect else {
            return vec![effect];
        };
        let friend = stage.gang.iter().any(|keys| keys.id() == order.contribution.member);
        match self {
            Self::Lazy => Vec::new(),
            Self::Colluder if friend => Self::says(stage, order, Finding::Agrees),
            Self::Accuser | Self::Colluder => Self::says(stage, order, Finding::Differs),
        }
    }
}
