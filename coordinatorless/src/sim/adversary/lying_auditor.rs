//! Audits as it likes: says nothing, accuses whomever it may, or covers its own kind.

use super::false_work::{self, FalseWork};
use super::{Adversary, Stage};
use crate::protocol::audit::asked_until;
use crate::protocol::event::{AuditOrder, Effect, Event};
use crate::protocol::replayed;
use crate::types::*;
use crate::wire::Body;

/// What it says of what it was drawn to audit.
pub(in crate::sim) enum LyingAuditor {
    /// Nothing.
    Lazy,
    /// That it differs, whatever it is.
    Accuser,
    /// That nothing was opened to it, whatever it is.
    Deaf,
    /// That it agrees where a liar claims it, that it differs where an honest member does; and it claims work that it did not do.
    Colluder,
}

impl LyingAuditor {
    /// What two who collude can always show: they agree on what neither did.
    fn vouches(stage: &Stage<'_>, order: &AuditOrder) -> Option<Replayed> {
        let (slot, member) = (order.contribution.commit.slot, order.contribution.member);
        let friend = stage.gang.iter().find(|keys| keys.id() == member)?;
        let (salt, trace) = ([0; 32], false_work::undone_steps());
        let commitment = replayed::commitment(&slot, &member, &stage.me(), &trace, &salt);
        let answer = replayed::signed(friend, &slot, &stage.me(), &commitment, &trace.root());
        Some(Replayed {
            salt,
            claimed: trace.clone(),
            trace,
            answer,
        })
    }

    fn says(stage: &Stage<'_>, order: AuditOrder, finding: Finding) -> Vec<Effect> {
        let replayed = match &order.lot {
            Some(_) if finding == Finding::Agrees => Self::vouches(stage, &order),
            _ => None,
        };
        let verdict = Verdict {
            replayed,
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
            Self::Lazy | Self::Accuser | Self::Deaf => vec![event],
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
            Self::Deaf => Self::says(stage, order, Finding::Unanswered),
            Self::Accuser | Self::Colluder => Self::says(stage, order, Finding::Differs),
        }
    }
}

/// Says that everything agrees, without a look: the world lets it guess, and ask like anyone.
#[derive(Default)]
pub(in crate::sim) struct Guesser(Vec<Verdict>);

impl Adversary for Guesser {
    fn hears(&mut self, _stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        match event {
            // Its own state would not let it out.
            Event::Audited(verdict) => {
                self.0.push(verdict);
                Vec::new()
            }
            event => vec![event],
        }
    }

    fn says(&mut self, stage: &mut Stage<'_>, mut effects: Vec<Effect>) -> Vec<Effect> {
        let round = stage.chain().agreed.round;
        let until = |verdict: &Verdict| asked_until(&stage.config.verification, verdict.slot.round);
        let all = std::mem::take(&mut self.0).into_iter();
        let (due, early): (Vec<_>, Vec<_>) = all.partition(|verdict| round > until(verdict));
        self.0 = early;
        for verdict in due {
            effects.extend(stage.tell(&stage.others(), &Body::Verdict(verdict)));
        }
        effects
    }

    fn is_lazy(&self) -> bool {
        true
    }
}
