//! Openings of proofs of speed: asked of others, looked at beside the main task, kept for those who ask.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::driver::{Driver, Job};
use super::{NodeError, Work};
use crate::net::{Request, Response};
use crate::protocol::event::{Event, SpeedCheck, SpeedOrder};
use crate::protocol::speed::Key;
use crate::types::*;

/// How long the member itself may take to hand over its opening, over a slow line and to several at once; and how long another who has it.
const ANSWER: Duration = Duration::from_secs(20);
const HANDING_ON: Duration = Duration::from_secs(5);
/// Openings that are looked at at once: it takes a good part of a second of a core for each.
pub(super) const AT_ONCE: usize = 2;
/// Others of those who have it that are asked, one after the other, before the member.
const OTHERS: usize = 2;
/// Who gave no opening, or a wrong one, is not asked again for so long.
const NO_USE: Duration = Duration::from_secs(10);

/// What came of asking for one.
pub(super) enum Looked {
    /// It holds.
    Holds(Bytes),
    /// Nobody gave one that does: who gave none in time, or a wrong one, and why the last of these is wrong.
    Nothing(Vec<PeerId>, Option<String>),
}

impl Driver {
    /// Before anything else: the time runs already.
    pub(super) fn prove_speed(&self, order: SpeedOrder) -> Result<(), NodeError> {
        let left = Duration::from_micros(order.until.saturating_sub(self.now()));
        self.give(Work::Speed {
            order,
            deadline: Instant::now() + left,
        })
    }

    /// Asks one after the other, and looks at what they give. Who failed before is not asked again, but for the member.
    pub(super) fn look_at_speed(&mut self, check: SpeedCheck) {
        let SpeedCheck {
            branch,
            test,
            mut providers,
        } = check;
        let (key, member) = (test.key(), test.member);
        let chain = self.state.chain();
        self.no_use
            .retain(|key, _| chain.speed_test(&key.0).is_some_and(|test| test.key() == *key));
        let failed = self.no_use.get(&key);
        let useless = |id: &PeerId| {
            let at = failed.and_then(|failed| failed.get(id));
            at.is_some_and(|at| at.elapsed() < NO_USE)
        };
        providers.retain(|id| *id == member || !useless(id));
        let others = providers.iter().filter(|id| **id != member).take(OTHERS);
        let asked = providers.iter().filter(|id| **id == member);
        let providers: Vec<PeerId> = others.chain(asked).copied().collect();
        if providers.is_empty() || !self.looking.insert(key) {
            return;
        }
        let places = self.judging.clone();
        let (net, judge) = (self.node.net.clone(), self.node.host.check_speed.clone());
        self.jobs.spawn(async move {
            let (mut failed, mut wrong) = (Vec::new(), None);
            for provider in providers {
                let asked = test.asked;
                let request = Request::Speed { branch, asked, member };
                let patience = if provider == member { ANSWER } else { HANDING_ON };
                failed.extend(Some(provider).filter(|id| *id != member));
                let Ok(Response::Speed(opening)) = net.request(provider, request, patience).await else {
                    continue;
                };
                let (test, judge, opening) = (test.clone(), judge.clone(), Bytes::from(opening));
                let held = opening.clone();
                // Never closed; without a place it is looked at all the same.
                let _place = places.acquire().await;
                match tokio::task::spawn_blocking(move || judge(&test, &opening)).await {
                    Ok(Ok(())) => return Job::Speed(key, Looked::Holds(held)),
                    // What others hand on is their word, not the member's.
                    Ok(Err(reason)) if provider == member => wrong = Some(reason),
                    _ => {}
                }
            }
            Job::Speed(key, Looked::Nothing(failed, wrong))
        });
    }

    pub(super) fn looked_at_speed(&mut self, key: Key, looked: Looked) -> Result<(), NodeError> {
        self.looking.remove(&key);
        match looked {
            Looked::Holds(opening) => {
                self.keep_opening(key, opening);
                self.handle(Event::SpeedChecked { key, outcome: Ok(()) })
            }
            Looked::Nothing(failed, wrong) => {
                let now = failed.into_iter().map(|id| (id, Instant::now()));
                self.no_use.entry(key).or_default().extend(now);
                match wrong {
                    Some(reason) => self.handle(Event::SpeedChecked {
                        key,
                        outcome: Err(reason),
                    }),
                    None => Ok(()),
                }
            }
        }
    }

    /// This peer's own.
    pub(super) fn opened_speed(&mut self, key: Key, opening: Bytes) -> Result<(), NodeError> {
        self.keep_opening(key, opening);
        self.handle(Event::SpeedChecked { key, outcome: Ok(()) })
    }

    /// As many as there are open proofs.
    fn keep_opening(&mut self, key: Key, opening: Bytes) {
        let chain = self.state.chain();
        let open = |key: &Key| chain.speed_test(&key.0).is_some_and(|test| test.key() == *key);
        self.openings.retain(|key, _| open(key));
        if open(&key) {
            self.openings.insert(key, opening);
        }
    }

    /// What is asked for, if it is here.
    pub(super) fn tell_speed(&self, branch: Branch, asked: Round, member: PeerId) -> Response {
        let chain = self.state.chain();
        let test = chain.speed_test(&member).filter(|test| test.asked == asked);
        let here = test.filter(|_| chain.agreed.branch == branch);
        match here.and_then(|test| self.openings.get(&test.key())) {
            Some(opening) => Response::Speed(opening.to_vec()),
            None => Response::Unknown,
        }
    }
}
