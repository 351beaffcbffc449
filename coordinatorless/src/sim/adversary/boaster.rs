//! Shows more speed than it has, or tries to: claims what it did not compute, claims late, tells some only, opens nothing.

use super::{Adversary, Stage, own};
use crate::protocol::event::{Effect, Event, SpeedAnswer};
use crate::wire::Body;

/// How.
pub(in crate::sim) enum Boaster {
    /// Claims ten times what it computed.
    Tenfold,
    /// Computes for as long as it takes, here until the next record.
    Late(Option<SpeedAnswer>),
    /// Tells its claim to every other member only, the proposers perhaps among them.
    Half,
    /// Opens nothing.
    Sealed,
}

impl Adversary for Boaster {
    fn hears(&mut self, stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        let here = stage.chain().agreed.round;
        match (self, event) {
            (Self::Tenfold, Event::SpeedAnswered(mut answer)) => {
                answer.chains.iter_mut().for_each(|chain| chain.products *= 10);
                vec![Event::SpeedAnswered(answer)]
            }
            (Self::Late(kept), Event::SpeedAnswered(answer)) => {
                *kept = Some(answer);
                Vec::new()
            }
            (Self::Late(kept), event) => match kept.take_if(|answer| answer.asked < here) {
                Some(answer) => vec![Event::SpeedAnswered(answer), event],
                None => vec![event],
            },
            (_, event) => vec![event],
        }
    }

    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        let claims = own(stage, &effect).is_some_and(|message| matches!(message.body, Body::Speed(_)));
        match (self, effect) {
            (Self::Half, Effect::Broadcast(message)) if claims => {
                let some = stage.others().into_iter().step_by(2);
                some.map(|to| Effect::Send(to, message.clone())).collect()
            }
            (Self::Sealed, Effect::OpenSpeed(_)) => Vec::new(),
            (_, effect) => vec![effect],
        }
    }
}
