//! This peer's answers to the run's challenges of speed, computed by the thread that trains, between two of its steps; and the eye on others' openings.
//!
//! A claim has to be with the others when the time is over, so computing ends at [`SHARE`] of it. Matrices grow as long as a link of the next size can be
//! expected to end in time: a slow machine shows its speed by small ones.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use coordinatorless::node::{CheckSpeed, Done};
use coordinatorless::protocol::event::{SpeedAnswer, SpeedOrder};
use coordinatorless::protocol::speed::{MAX_ROW, SpeedTest};
use coordinatorless::types::{PeerId, Round, SpeedChain};
use gradient_verify::flops::{Answer, Challenge, RUN_SAMPLES, Start, answer_while, deepest, spoken, verify};
use tch::Device;
use trainer::config::Precision;
use trainer::products::Chain;

use crate::kit::Kit;

/// Of the time from the order to when the claim is due, how much is computed for.
const SHARE: f64 = 0.75;
/// Sides of the chains, and by which share of the time each ends.
const SIDES: [usize; 4] = [256, 512, 1024, 2048];
const ENDS: [f64; 4] = [0.1, 0.3, 0.6, 1.0];
/// The same where a device wants more at once.
const SIDES_ELSEWHERE: [usize; 2] = [2048, 4096];
const ENDS_ELSEWHERE: [f64; 2] = [0.3, 1.0];
/// Products from one commitment to the next, where more than one show anything, as far as [`MAX_ROW`] lets them.
const DEPTH: usize = 4;
/// Answers kept until they are drawn from: who is asked again was asked records ago.
const KEPT: usize = 2;

/// What there is to do for a proof of speed.
pub enum Task {
    /// Compute.
    Prove {
        /// For what.
        order: SpeedOrder,
        /// When the claim is due.
        deadline: Instant,
    },
    /// Open what was drawn.
    Open(Box<SpeedTest>),
}

/// Makes chains on a device.
pub fn start(device: Device) -> impl Fn(&[f32], &[f32], usize, u32, Precision) -> Result<Chain, String> {
    move |x, b, side, modulus, precision| {
        Chain::new(x, b, side, modulus, precision, device).map_err(|error| error.to_string())
    }
}

/// A peer's own proofs.
pub struct Prover {
    me: PeerId,
    precision: Precision,
    /// The first of its devices, which answers for all.
    device: Device,
    answers: VecDeque<(Round, Answer)>,
}

impl Prover {
    /// Nothing asked yet.
    pub fn new(me: PeerId, precision: Precision, device: Device) -> Self {
        Self {
            me,
            precision: spoken(precision),
            device,
            answers: VecDeque::new(),
        }
    }

    /// Does it; what cannot be done is told in the log, and then there is no proof.
    pub fn take(&mut self, task: Task) -> Option<Done> {
        let (asked, done) = match task {
            Task::Prove { order, deadline } => (order.asked, self.prove(&order, deadline)),
            Task::Open(test) => (test.asked, self.open(&test)),
        };
        done.unwrap_or_else(|error| {
            tracing::warn!(%asked, "no proof of this peer's speed: {error:#}");
            None
        })
    }

    fn prove(&mut self, order: &SpeedOrder, deadline: Instant) -> Result<Option<Done>> {
        let begun = Instant::now();
        let time = deadline.saturating_duration_since(begun).mul_f64(SHARE);
        let start = start(self.device);
        let Some(answer) = prove(self.me, &order.seed, self.precision, self.device, time, &start)? else {
            return Err(anyhow!(
                "it was due {:?} after it was asked for here",
                deadline.saturating_duration_since(begun)
            ));
        };
        let chains: Vec<SpeedChain> = answer.challenge().chains().iter().map(SpeedChain::from).collect();
        tracing::debug!(asked = %order.asked, flops = answer.challenge().flops() as f64, secs = begun.elapsed().as_secs_f64(), "computed for a proof of speed");
        let done = Done::SpeedAnswered(SpeedAnswer {
            branch: order.branch,
            asked: order.asked,
            chains,
            root: answer.root(),
        });
        self.answers.push_back((order.asked, answer));
        let over = self.answers.len().saturating_sub(KEPT);
        self.answers.drain(..over);
        Ok(Some(done))
    }

    fn open(&mut self, test: &SpeedTest) -> Result<Option<Done>> {
        let drawn = test.drawn.context("nothing was drawn")?;
        let at = self.answers.iter().position(|(asked, answer)| {
            let claimed = test.claim.as_ref().map(|claim| claim.root);
            *asked == test.asked && claimed == Some(answer.root())
        });
        let Some((_, answer)) = at.and_then(|at| self.answers.remove(at)) else {
            return Err(anyhow!(
                "what was computed for it is gone; this peer was started again since"
            ));
        };
        let opening = answer.open(&drawn.seed, RUN_SAMPLES, &start(self.device))?;
        Ok(Some(Done::SpeedOpened {
            key: test.key(),
            opening: Bytes::from(opening),
        }))
    }
}

/// As many products as there is time for.
fn prove(
    me: PeerId,
    seed: &[u8; 32],
    precision: Precision,
    device: Device,
    time: Duration,
    start: &Start<'_>,
) -> Result<Option<Answer>> {
    let (sides, ends) = match device {
        Device::Cpu => (&SIDES[..], &ENDS[..]),
        _ => (&SIDES_ELSEWHERE[..], &ENDS_ELSEWHERE[..]),
    };
    let kinds: Vec<(usize, usize)> = sides.iter().map(|side| (*side, depth(*side, precision))).collect();
    let begun = Instant::now();
    let mut pace = Pace::new(&kinds, ends, time.as_secs_f64());
    let mut more = |kind: usize, links: usize| pace.more(kind, links, begun.elapsed().as_secs_f64());
    Ok(answer_while(me, seed, precision, &kinds, &mut more, start)?)
}

/// Products from one commitment to the next.
fn depth(side: usize, precision: Precision) -> usize {
    let most = usize::try_from(MAX_ROW).unwrap_or(usize::MAX) / (side * side);
    DEPTH.min(deepest(precision)).min(most).max(1)
}

/// What there is time for.
struct Pace<'a> {
    kinds: &'a [(usize, usize)],
    ends: &'a [f64],
    /// Seconds in all.
    time: f64,
    /// Operations a second of the last link, its beginning included, and when it began.
    rate: f64,
    since: f64,
}

impl<'a> Pace<'a> {
    fn new(kinds: &'a [(usize, usize)], ends: &'a [f64], time: f64) -> Self {
        Self {
            kinds,
            ends,
            time,
            rate: f64::INFINITY,
            since: 0.0,
        }
    }

    fn operations(&self, kind: usize) -> f64 {
        let (side, depth) = self.kinds[kind];
        2.0 * depth as f64 * (side as f64).powi(3)
    }

    /// Whether another link of this kind can be expected to end in time, `now` seconds after the beginning.
    fn fits(&self, kind: usize, now: f64) -> bool {
        now + self.operations(kind) / self.rate < self.time
    }

    /// Whether to compute another link of this kind, `links` of which are done. The first link of all may take long: its library has just been
    /// loaded. So a kind goes on past its share while no larger one would fit.
    fn more(&mut self, kind: usize, links: usize, now: f64) -> bool {
        if links > 0 {
            self.rate = self.operations(kind) / (now - self.since).max(1e-9);
        }
        self.since = now;
        let larger = |kind: usize| (kind + 1..self.kinds.len()).any(|larger| self.fits(larger, now));
        let share = self.ends[kind] * self.time;
        self.fits(kind, now) && (links == 0 || now < share || !larger(kind))
    }
}

/// Whether another's opening shows what it claims.
pub fn checker(kit: &Arc<Kit>) -> CheckSpeed {
    let precision = kit.training.precision;
    Arc::new(move |test, opening| {
        let (claim, drawn) = match (&test.claim, &test.drawn) {
            (Some(claim), Some(drawn)) => (claim, drawn),
            _ => return Err("nothing was claimed or drawn".to_owned()),
        };
        let challenge = Challenge::of_run(test, precision).map_err(|error| error.to_string())?;
        let shown = verify(&challenge, &claim.root, &drawn.seed, RUN_SAMPLES, opening);
        shown.map(drop).map_err(|error| error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use coordinatorless::protocol::speed::{Claimed, Drawn, operations};

    const ME: PeerId = PeerId([3; 32]);

    fn order() -> SpeedOrder {
        SpeedOrder {
            branch: 0,
            asked: Round(7),
            seed: [5; 32],
            until: 0,
        }
    }

    /// A claim of what was computed, and what a later record drew.
    fn test_of(done: &Done) -> SpeedTest {
        let Done::SpeedAnswered(answer) = done else {
            panic!("{done:?}")
        };
        SpeedTest {
            member: ME,
            asked: answer.asked,
            seed: [5; 32],
            claim: Some(Claimed {
                since: Round(8),
                chains: answer.chains.clone(),
                root: answer.root,
            }),
            drawn: Some(Drawn {
                since: Round(9),
                seed: [6; 32],
            }),
        }
    }

    fn judge(test: &SpeedTest, opening: &[u8]) -> bool {
        let challenge = Challenge::of_run(test, Precision::Fp32).unwrap();
        let root = test.claim.as_ref().unwrap().root;
        verify(&challenge, &root, &test.drawn.unwrap().seed, RUN_SAMPLES, opening).is_ok()
    }

    #[test]
    fn a_proof_ends_in_time_and_holds_and_more_than_was_done_does_not() {
        let mut prover = Prover::new(ME, Precision::Fp32, Device::Cpu);
        let deadline = Instant::now() + Duration::from_millis(1500);
        let done = prover
            .take(Task::Prove {
                order: order(),
                deadline,
            })
            .unwrap();
        let test = test_of(&done);
        assert!(operations(&test.claim.as_ref().unwrap().chains) > 0);
        let Some(Done::SpeedOpened { opening, .. }) = prover.take(Task::Open(Box::new(test.clone()))) else {
            panic!("no opening")
        };
        assert!(judge(&test, &opening));
        assert!(prover.take(Task::Open(Box::new(test.clone()))).is_none(), "opened once");

        let mut more = test.clone();
        more.claim.as_mut().unwrap().chains[0].products *= 2;
        assert!(!judge(&more, &opening));
        let other = SpeedTest {
            member: PeerId([4; 32]),
            ..test
        };
        assert!(!judge(&other, &opening), "another's id");
    }

    /// Seconds spent, and links of each kind, on a machine that does so many operations a second, where the very first link takes longer.
    fn paced(time: f64, rate: f64, first: f64) -> (f64, Vec<usize>) {
        let kinds = SIDES.map(|side| (side, DEPTH));
        let mut pace = Pace::new(&kinds, &ENDS, time);
        let (mut now, mut all) = (0.0, Vec::new());
        for kind in 0..kinds.len() {
            let mut links = 0;
            while pace.more(kind, links, now) {
                now += pace.operations(kind) / rate + if now == 0.0 { first } else { 0.0 };
                links += 1;
            }
            all.push(links);
        }
        (now, all)
    }

    #[test]
    fn slow_machines_and_slow_beginnings_show_what_they_can_in_the_time_there_is() {
        for (time, rate, first) in [
            (2.25, 200e9, 0.0),
            (2.25, 20e9, 0.0),
            (2.25, 2e9, 0.0),
            (2.25, 200e9, 0.5),
            (1.1, 10e9, 0.3),
            (0.5, 50e9, 0.2),
        ] {
            let (spent, links) = paced(time, rate, first);
            assert!(spent < time, "{rate}, {first}: {spent} of {time}");
            assert!(spent > 0.6 * time, "{rate}, {first}: {spent} of {time}, {links:?}");
        }
        assert!(paced(2.25, 200e9, 0.0).1.iter().all(|links| *links > 0), "every size");
        assert_eq!(paced(2.25, 2e9, 0.0).1[3], 0, "what would not end in time is not begun");
    }

    #[test]
    fn where_the_time_is_over_nothing_is_claimed() {
        let mut prover = Prover::new(ME, Precision::Fp32, Device::Cpu);
        let deadline = Instant::now();
        assert!(
            prover
                .take(Task::Prove {
                    order: order(),
                    deadline
                })
                .is_none()
        );
    }
}
