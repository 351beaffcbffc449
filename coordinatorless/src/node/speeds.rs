//! Openings of proofs of speed: asked of others, looked at beside the main task, kept for those who ask.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::driver::{Driver, Job};
use super::{NodeError, Work};
use crate::net::{Request, Response};
use crate::protocol::event::{Event, SpeedCheck, SpeedOrder};
use crate::protocol::speed::SpeedTest;
use crate::types::*;

/// How long one peer may take to hand over an opening.
const ANSWER: Duration = Duration::from_secs(20);

/// What came of asking for one.
pub(super) enum Looked {
    /// It holds.
    Holds(Bytes),
    /// The member itself gave what does not hold.
    Fails(String),
    /// Nobody gave one that does.
    Missing,
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

    /// Asks one after the other, and looks at what they give. One question for each proof at a time.
    pub(super) fn look_at_speed(&mut self, check: SpeedCheck) {
        let SpeedCheck {
            branch,
            test,
            providers,
        } = check;
        if !self.looking.insert((test.member, test.asked)) {
            return;
        }
        let (net, judge) = (self.node.net.clone(), self.node.host.check_speed.clone());
        self.jobs.spawn(async move {
            let (member, asked) = (test.member, test.asked);
            let mut looked = Looked::Missing;
            for provider in providers {
                let request = Request::Speed { branch, asked, member };
                let Ok(Response::Speed(opening)) = net.request(provider, request, ANSWER).await else {
                    continue;
                };
                let (test, judge, opening) = (test.clone(), judge.clone(), Bytes::from(opening));
                let held = opening.clone();
                let judged = tokio::task::spawn_blocking(move || judge(&test, &opening)).await;
                match judged {
                    Ok(Ok(())) => {
                        looked = Looked::Holds(held);
                        break;
                    }
                    // What others hand on is their word, not the member's.
                    Ok(Err(reason)) if provider == member => looked = Looked::Fails(reason),
                    _ => {}
                }
            }
            Job::Speed(member, asked, looked)
        });
    }

    pub(super) fn looked_at_speed(&mut self, member: PeerId, asked: Round, looked: Looked) -> Result<(), NodeError> {
        self.looking.remove(&(member, asked));
        let outcome = match looked {
            Looked::Missing => return Ok(()),
            Looked::Fails(reason) => Err(reason),
            Looked::Holds(opening) => {
                self.keep_opening(member, asked, opening);
                Ok(())
            }
        };
        self.handle(Event::SpeedChecked { member, asked, outcome })
    }

    /// This peer's own.
    pub(super) fn opened_speed(&mut self, asked: Round, opening: Bytes) -> Result<(), NodeError> {
        let member = self.keys.id();
        self.keep_opening(member, asked, opening);
        let outcome = Ok(());
        self.handle(Event::SpeedChecked { member, asked, outcome })
    }

    /// As many as there are open proofs.
    fn keep_opening(&mut self, member: PeerId, asked: Round, opening: Bytes) {
        let chain = self.state.chain();
        let open = |(member, asked): &(PeerId, Round)| {
            chain
                .speed_test(member)
                .is_some_and(|test: &SpeedTest| test.asked == *asked)
        };
        self.openings.retain(|key, _| open(key));
        if open(&(member, asked)) {
            self.openings.insert((member, asked), opening);
        }
    }

    /// What is asked for, if it is here.
    pub(super) fn tell_speed(&self, branch: Branch, asked: Round, member: PeerId) -> Response {
        let here = self.state.chain().agreed.branch == branch;
        match self.openings.get(&(member, asked)).filter(|_| here) {
            Some(opening) => Response::Speed(opening.to_vec()),
            None => Response::Unknown,
        }
    }
}
