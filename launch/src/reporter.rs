//! What people and scripts see of a running peer: `events.jsonl`, `status.json`, a line a round.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use coordinatorless::config::RunConfig;
use coordinatorless::ledger::Ledger;
use coordinatorless::net::Net;
use coordinatorless::node::NodeStatus;
use coordinatorless::protocol::event::Notice;
use coordinatorless::protocol::membership::Standing;
use coordinatorless::ticket::{PeerAddr, Ticket};
use coordinatorless::types::{Finding, PeerId, RunId, SignedVerdict};
use tokio::sync::{mpsc, watch};

use crate::events::{Event, EventLog, now};
use crate::held_out::HeldOut;
use crate::peer_dir::{KnownPeer, PeerDir};
use crate::progress::{Progress, RoundLine};
use crate::status::{MemberStatus, OwnStatus, Status};
use crate::units::Bytes;

/// Rounds over which paces are told.
const PACE_ROUNDS: usize = 16;
/// Peers named in a ticket.
const TICKET_PEERS: usize = 8;
/// Different refusals counted apart.
const REFUSALS: usize = 1024;

/// Writes down what happens to one peer.
pub struct Reporter {
    dir: PeerDir,
    me: PeerId,
    run: RunId,
    config: RunConfig,
    net: Net,
    log: EventLog,
    progress: Progress,
    traffic: (u64, u64),
    told_traffic: (u64, u64),
    loss: Option<f64>,
    val_loss: Option<f64>,
    moved: Instant,
    /// (Unix seconds, tokens of the run, own points) after the last rounds.
    pace: VecDeque<(f64, u64, u128)>,
    /// Seconds of the last rounds, and of those the ones spent training.
    busy: VecDeque<(f64, f64)>,
    refused: BTreeMap<(PeerId, &'static str, String), u64>,
    met: Vec<KnownPeer>,
    /// Whether a founder has printed its ticket.
    invited: bool,
    /// Rounds whose records came from others and whose model is not here yet: (from, to).
    resync: Option<(u64, u64)>,
    /// Bytes received and seconds spent on it so far.
    resync_cost: (u64, f64),
    /// Whether the disk's limit was told to be passed.
    disk_told: bool,
    max_disk: Option<u64>,
}

impl Reporter {
    /// For this peer.
    pub fn new(
        dir: PeerDir,
        me: PeerId,
        config: RunConfig,
        net: Net,
        log: EventLog,
        progress: Progress,
        max_disk: Option<u64>,
    ) -> Self {
        Self {
            run: config.id(),
            met: dir.met(),
            invited: false,
            dir,
            me,
            config,
            net,
            log,
            progress,
            traffic: (0, 0),
            told_traffic: (0, 0),
            loss: None,
            val_loss: None,
            moved: Instant::now(),
            pace: VecDeque::new(),
            busy: VecDeque::new(),
            refused: BTreeMap::new(),
            resync: None,
            resync_cost: (0, 0.0),
            disk_told: false,
            max_disk,
        }
    }

    /// Reports until the node is gone; gives the log back for the last line.
    pub async fn run(
        mut self,
        mut notices: mpsc::Receiver<Notice>,
        mut evals: mpsc::Receiver<(u64, HeldOut)>,
        mut status: watch::Receiver<Option<NodeStatus>>,
    ) -> EventLog {
        let mut written = Instant::now() - Duration::from_secs(1);
        loop {
            tokio::select! {
                notice = notices.recv() => match notice {
                    Some(notice) => {
                        self.traffic = self.net.traffic();
                        self.notice(notice);
                    }
                    None => break,
                },
                Some((round, found)) = evals.recv() => {
                    self.val_loss = Some(found.loss);
                    self.write(Event::eval(round, found));
                }
                Ok(()) = status.changed() => {
                    let told = status.borrow_and_update().clone();
                    if let Some(told) = told && written.elapsed() >= Duration::from_millis(400) {
                        written = Instant::now();
                        self.status(&told).await;
                    }
                }
            }
        }
        let last = status.borrow().clone();
        if let Some(last) = last {
            self.status(&last).await;
        }
        self.log
    }

    fn write(&mut self, event: Event) {
        if let Err(error) = self.log.write(event) {
            tracing::error!("{error:#}");
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Decided { .. } => {}
            Notice::Advanced { .. } => self.advanced(notice),
            Notice::Joined(peer, round) => {
                self.write(Event::MemberJoined { peer, round: round.0, reason: "asked to take part".into() });
            }
            Notice::Lapsed(peer, round) => {
                self.progress.note(&format!("{} has been silent and lapsed", peer.short()));
                self.write(Event::MemberLapsed { peer, round: round.0, reason: "silent for too long".into() });
            }
            Notice::Left(peer, round) => self.write(Event::MemberLeft { peer, round: round.0, reason: "said goodbye".into() }),
            Notice::Regrouped { branch, round, survivors } => {
                self.progress.note(&format!("too few were left to decide; {} survivors go on as branch {branch}", survivors.len()));
                self.write(Event::Regrouped { branch, round: round.0, survivors });
            }
            Notice::Switched { from, to, fork } => self.warn(format!("left branch {from} for branch {to} after round {fork}, which has more weight")),
            Notice::PermanentSplit { branch, fork } => self.warn(format!(
                "met branch {branch}, split off after round {fork}; this peer has been on its own branch for too long to change"
            )),
            Notice::CaughtUp { from, to } => {
                let first = self.resync.map_or(from.0, |(first, _)| first.min(from.0));
                self.resync = Some((first, to.0));
            }
            Notice::Rejected { from, kind, reason } => self.refused(from, kind, reason),
            Notice::Audit(signed) => self.audit(&signed),
            Notice::Speed { member, asked, proven } => {
                let gflops = proven.map(gflops);
                if gflops.is_none() && member == self.me {
                    self.progress.note("this peer was asked for its speed and showed nothing in time; its reward for staying does not grow until it does");
                }
                self.write(Event::Speed { member, asked: asked.0, gflops });
            }
            Notice::Slashed { member, points, round, proof } => {
                let points = u64::try_from(points).unwrap_or(u64::MAX);
                let evidence = format!("in round {round}: {proof}");
                self.progress.note(&if member == self.me {
                    format!("this peer was barred {evidence}; {points} points taken, and it soon stops")
                } else {
                    format!("{} was caught cheating {evidence}; {points} points taken", member.short())
                });
                self.write(Event::Slashed { member, points, evidence, round: round.0 });
            }
            Notice::Unpaid { member, points, round, finding } => {
                let points = u64::try_from(points).unwrap_or(u64::MAX);
                let what = match finding {
                    Finding::Unanswered => format!("did not open to its auditors what it sent in round {round}"),
                    _ => format!("told its auditors no steps of round {round}, or others than it took"),
                };
                self.progress.note(&match member == self.me {
                    true => format!("this peer {what}: {points} of its points are not paid"),
                    false => format!("{} {what}: {points} of its points are not paid", member.short()),
                });
                self.write(Event::Unpaid { member, points, finding: finding.word().to_owned(), round: round.0 });
            }
            Notice::Warning(text) => self.warn(text),
        }
    }

    fn warn(&mut self, text: String) {
        self.progress.note(&text);
        self.write(Event::Warning { text });
    }

    fn advanced(&mut self, notice: Notice) {
        let Notice::Advanced {
            branch,
            round,
            record,
            model_root,
            contributors,
            loss_micros,
            train,
            exchange,
            agree,
            span,
            busy,
        } = notice
        else {
            return;
        };
        let secs = |micros: u64| micros as f64 / 1e6;
        let sent = (
            self.traffic.0.saturating_sub(self.told_traffic.0),
            self.traffic.1.saturating_sub(self.told_traffic.1),
        );
        self.told_traffic = self.traffic;
        let tokens_by: BTreeMap<PeerId, u64> = contributors.into_iter().collect();
        let (tokens, loss) = (tokens_by.values().sum(), secs(loss_micros));
        if tokens > 0 {
            self.loss = Some(loss);
        }
        self.progress.round(&RoundLine {
            round: round.0,
            of: None,
            loss,
            tokens,
            contributors: tokens_by.len(),
            secs: self.moved.elapsed().as_secs_f64(),
            sent: sent.0,
        });
        self.caught_up(round.0, sent.1);
        self.moved = Instant::now();
        self.busy.push_back((secs(span), secs(busy)));
        if self.busy.len() > PACE_ROUNDS {
            self.busy.pop_front();
        }
        self.write(Event::RoundDecided {
            round: round.0,
            branch,
            record,
            model_root,
            contributors: tokens_by.keys().copied().collect(),
            tokens_by,
            tokens,
            loss,
            train_secs: secs(train),
            exchange_secs: secs(exchange),
            agree_secs: secs(agree),
            round_secs: secs(span),
            utilisation: share(secs(busy), secs(span)).unwrap_or_default(),
            bytes_sent: sent.0,
            bytes_received: sent.1,
        });
    }

    /// A resync ends when the model is that of the last round fetched. What came in since the round before it, and the time since, are
    /// its cost: rounds that are caught up with one after the other add up.
    fn caught_up(&mut self, round: u64, received: u64) {
        let Some((from_round, to_round)) = self.resync else {
            return;
        };
        self.resync_cost.0 += received;
        self.resync_cost.1 += self.moved.elapsed().as_secs_f64();
        if round < to_round {
            return;
        }
        self.resync = None;
        let (bytes, secs) = std::mem::take(&mut self.resync_cost);
        self.write(Event::Resynced {
            from_round,
            to_round,
            bytes,
            secs,
            reason: "was behind".into(),
        });
    }

    fn audit(&mut self, signed: &SignedVerdict) {
        let verdict = &signed.verdict;
        let trace_bound = self.config.verification.trace_bound;
        let steps_agree = verdict.replayed.as_ref().and_then(|shown| shown.parted(trace_bound));
        self.write(Event::Audit {
            round: verdict.slot.round.0,
            auditor: signed.auditor,
            member: verdict.member,
            verdict: verdict.finding.word().into(),
            rel_l2: verdict.distance_nanos as f64 / 1e9,
            bound: verdict.bound_nanos as f64 / 1e9,
            steps_agree,
        });
    }

    /// The first, the second, the fourth, the eighth … of a kind is told: a flood does not fill the disk.
    fn refused(&mut self, from: PeerId, kind: &'static str, reason: String) {
        if self.refused.len() >= REFUSALS {
            self.refused.clear();
        }
        let count = self.refused.entry((from, kind, reason.clone())).or_insert(0);
        *count += 1;
        let count = *count;
        if count.is_power_of_two() {
            self.write(Event::Rejected {
                from,
                kind: kind.into(),
                reason,
                count,
            });
        }
    }

    async fn status(&mut self, told: &NodeStatus) {
        let agreed = &told.chain.agreed;
        let ledger = &told.chain.ledger;
        let own = points(ledger, &self.me);
        if self
            .pace
            .back()
            .is_none_or(|(_, tokens, points)| (*tokens, *points) != (agreed.tokens, own))
        {
            self.pace.push_back((now(), agreed.tokens, own));
            if self.pace.len() > PACE_ROUNDS {
                self.pace.pop_front();
            }
        }
        let (tokens_per_sec, points_per_sec) = self.paces();
        let addr = PeerAddr::from(&self.net.addr().await);
        let ticket = self.ticket(told, &addr);
        self.invite(ticket.as_deref());
        let status = Status {
            run: self.run,
            name: self.config.name.clone(),
            branch: agreed.branch,
            round: told.model.map_or(0, |(round, _)| round.0),
            record: agreed.record,
            model_root: told.model.map(|(_, root)| root).unwrap_or_default(),
            loss: self.loss,
            val_loss: self.val_loss,
            tokens: agreed.tokens,
            tokens_per_sec,
            members: members(told),
            me: OwnStatus {
                id: self.me,
                points: u64::try_from(own).unwrap_or(u64::MAX),
                earning_per_hour: 3600.0 * points_per_sec,
                utilisation: self.utilisation(),
                upload: told.traffic.0,
                download: told.traffic.1,
                disk: told.disk,
            },
            ticket,
            pid: std::process::id(),
            addresses: addr.direct.iter().map(ToString::to_string).collect(),
            updated: now(),
        };
        if let Err(error) = status.write(self.dir.path()) {
            tracing::error!("{error:#}");
        }
        self.remember_met();
        self.watch_disk(told.disk);
    }

    /// What the run needs is kept whatever it takes (R17), so all that is left to do is to tell, once until it is below again.
    fn watch_disk(&mut self, used: u64) {
        let Some(limit) = self.max_disk else { return };
        let over = used > limit;
        if over && !self.disk_told {
            self.warn(format!(
                "{} on disk, over the {} of --max-disk; the run needs all of it, so nothing is dropped: raise --max-disk or make room",
                Bytes(used),
                Bytes(limit)
            ));
        }
        self.disk_told = over;
    }

    /// Tokens of the run and own points per second, over the last rounds.
    fn paces(&self) -> (f64, f64) {
        let (Some(first), Some(last)) = (self.pace.front(), self.pace.back()) else {
            return (0.0, 0.0);
        };
        let secs = last.0 - first.0;
        if secs <= 0.0 {
            return (0.0, 0.0);
        }
        (
            last.1.saturating_sub(first.1) as f64 / secs,
            last.2.saturating_sub(first.2) as f64 / secs,
        )
    }

    /// The share of the last rounds' time spent training.
    fn utilisation(&self) -> Option<f64> {
        let each = self.busy.iter();
        let (span, busy) = each.fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        share(busy, span)
    }

    /// R3: this peer and others that it knows the addresses of, with the last certified record.
    fn ticket(&self, told: &NodeStatus, own: &PeerAddr) -> Option<String> {
        let agreed = &told.chain.agreed;
        if own.direct.is_empty() && own.relay.is_none() {
            return None;
        }
        let alive = |addr: &PeerAddr| addr.id != self.me && told.alive.contains(&addr.id);
        let known = self.net.known();
        let others = known.iter().map(PeerAddr::from).filter(alive);
        let peers = std::iter::once(own.clone()).chain(others).take(TICKET_PEERS).collect();
        Some(
            Ticket {
                run: self.run,
                checkpoint: (agreed.branch, agreed.round, agreed.record),
                peers,
            }
            .to_string(),
        )
    }

    /// Whoever created the run by itself prints the ticket, once it can be reached.
    fn invite(&mut self, ticket: Option<&str>) {
        let alone = self.config.genesis.len() == 1 && self.config.genesis[0].id == self.me;
        if let Some(ticket) = ticket.filter(|_| alone && !self.invited) {
            self.progress.line(&format!("others join with: murmur join {ticket}"));
            self.progress.line(&format!(
                "a fresh ticket, later: murmur ticket --dir {}",
                self.dir.path().display()
            ));
            self.invited = true;
        }
    }

    fn remember_met(&mut self) {
        let met: Vec<KnownPeer> = self
            .net
            .known()
            .iter()
            .map(|addr| KnownPeer::from(&PeerAddr::from(addr)))
            .filter(|known| known.id != self.me)
            .collect();
        if met != self.met && !met.is_empty() {
            if let Err(error) = self.dir.write_met(&met) {
                tracing::warn!("{error:#}");
            }
            self.met = met;
        }
    }
}

/// Operations a microsecond in billions a second.
fn gflops(proven: u64) -> f64 {
    proven as f64 / 1000.0
}

/// `part` of `whole`, where there is any.
fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

fn points(ledger: &Ledger, id: &PeerId) -> u128 {
    ledger
        .get(id)
        .map_or(0, |account| account.provisional_points().saturating_add(account.vested))
}

fn members(told: &NodeStatus) -> Vec<MemberStatus> {
    let (agreed, ledger) = (&told.chain.agreed, &told.chain.ledger);
    let total: u64 = told.weights.iter().map(|(_, weight)| weight).sum();
    let weight = |id: &PeerId| {
        told.weights
            .iter()
            .find(|(voter, _)| voter == id)
            .map_or(0, |(_, weight)| *weight)
    };
    let members = agreed
        .members
        .iter()
        .filter(|member| member.standing == Standing::Active);
    members
        .map(|member| {
            let last_round = member.work.last().map(|(round, _)| round.0);
            let state = if told.alive.contains(&member.id) {
                "training"
            } else {
                "silent"
            };
            MemberStatus {
                id: member.id,
                weight: weight(&member.id) as f64 / total.max(1) as f64,
                tokens: ledger.get(&member.id).map_or(0, |account| account.tokens),
                points: u64::try_from(points(ledger, &member.id)).unwrap_or(u64::MAX),
                last_round,
                gflops: (member.proven > 0).then(|| gflops(member.proven)),
                state: state.into(),
            }
        })
        .collect()
}
