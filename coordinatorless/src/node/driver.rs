//! The loop that owns the state machine, and what it does for each effect.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rand::seq::SliceRandom;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::audits::{Asking, Audit};
use super::restore::{self, read_chain};
use super::speeds::{AT_ONCE, Looked};
use super::transfer::{Wanted, there_first};
use super::{ACCUMULATOR_BRANCHES, Command, Done, ModelSource, Node, NodeError, NodeStatus, Step, Work};
use crate::net::NetEvent;
use crate::protocol::clock::Clock;
use crate::protocol::doubled::first_sequence;
use crate::protocol::event::{Event, Notice, Timer};
use crate::protocol::membership::Standing;
use crate::protocol::replayed::{Answer, Traces, ask_until};
use crate::protocol::speed::Key;
use crate::protocol::{Setup, State};
use crate::store::Store;
use crate::types::*;
use crate::wire::{Body, Keys, Scheme, Signed};

/// Newcomers that are kept informed at once.
const MAX_GUESTS: usize = 32;
/// A newcomer that is no longer heard is no longer informed.
const GUEST: Duration = Duration::from_secs(20);
/// After the last round: how long to serve those who are behind.
const LINGER: Duration = Duration::from_secs(20);
/// How long a barred peer goes on: whoever was cut off among liars finds the others meanwhile, and is not barred on their branch.
const APPEAL: Duration = Duration::from_secs(30);
/// Own accumulators kept for auditors, beyond the rounds in which a verdict may come.
const SPARE_ACCUMULATORS: u64 = 4;

/// Where the store has the first number of the last start's `Have` messages.
const SEQUENCE: &str = "sequence";

/// A finished piece of background work.
pub(super) enum Job {
    Wanted(Hash, Wanted),
    Gathered(u64, Result<Step, String>),
    Source(u64, Branch, Result<ModelSource, String>),
    Audit(Box<Audit>),
    Trace(Box<Asking>, Option<Answer>),
    Records(PeerId, Vec<Decided>),
    Speed(Key, Looked),
    Nothing,
}

/// One peer at work. Only this task touches the state machine.
pub(super) struct Driver {
    pub node: Node,
    pub state: State,
    pub keys: Keys,
    pub began: Instant,
    pub clock: Clock,
    pub timers: BTreeMap<Timer, Micros>,
    pub jobs: JoinSet<Job>,
    /// The last record's round, for those who wait for one.
    pub decided: watch::Sender<Round>,
    pub fetching: HashSet<Hash>,
    /// Decided records that wait to be gathered and applied, and whether one is under way.
    pub applying: VecDeque<Arc<Decided>>,
    pub busy: bool,
    pub epoch: u64,
    /// The number of the last piece of training, and its round.
    pub training: (u64, Round),
    /// Own accumulator roots of the last rounds of each branch, oldest first.
    pub accumulators: VecDeque<(Branch, Round, Hash)>,
    /// Own traces, and which auditors were answered.
    pub traces: Traces,
    /// Openings of proofs of speed that hold, for those who ask; and those that are being asked for.
    pub openings: BTreeMap<Key, Bytes>,
    pub looking: HashSet<Key>,
    /// Who was asked for an opening and gave none, or a wrong one.
    pub no_use: BTreeMap<Key, BTreeMap<PeerId, Instant>>,
    /// Places for those that are looked at.
    pub judging: Arc<Semaphore>,
    pub shared: HashSet<Hash>,
    pub guests: BTreeMap<PeerId, Instant>,
    pub members: Vec<PeerId>,
    pub model: Option<(Round, Hash)>,
    pub last: Option<Notice>,
    pub finished_at: Option<Instant>,
    pub leaving_at: Option<Instant>,
    /// Since when this peer is barred, and for what, if it saw that itself.
    pub barred_at: Option<Instant>,
    pub barred_for: Option<(Round, &'static str)>,
}

/// Runs a node until it is told to leave, its last round is done, or something it cannot live without fails.
pub async fn run(node: Node) -> Result<(), NodeError> {
    let keys = Keys::new(node.config.secret, Scheme::Ed25519);
    let mut driver = Driver::new(node, keys).await?;
    let result = driver.go().await;
    driver.node.host.stop.up_to(u64::MAX);
    driver.jobs.abort_all();
    driver.node.net.shutdown().await;
    result
}

/// The first number of this start's `Have` messages, noted before any is sent.
fn next_sequence(store: &Store) -> Result<u64, NodeError> {
    let noted = store.meta_get(SEQUENCE)?.and_then(|bytes| bytes.try_into().ok());
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall = u64::try_from(wall.as_micros()).unwrap_or(u64::MAX);
    let sequence = first_sequence(noted.map_or(0, u64::from_le_bytes), wall, rand::random());
    store.meta_put(SEQUENCE, &sequence.to_le_bytes())?;
    Ok(sequence)
}

impl Driver {
    async fn new(node: Node, keys: Keys) -> Result<Self, NodeError> {
        let (chain, history) = read_chain(&node)?;
        let round = chain.agreed.round;
        // R19: a member whose log is gone listens for one round. A newcomer, or a run that begins, has signed nothing.
        let begun = round > Round(0);
        let lost = begun && chain.member(&keys.id()).is_some() && node.store.wal_was_lost()?;
        let wal = if lost { None } else { Some(node.store.wal_entries()?) };
        let sequence = next_sequence(&node.store)?;
        let setup = Setup {
            config: node.config.run.clone(),
            keys: keys.clone(),
            chain,
            history,
            wal,
            join: Some(node.config.payout_address.clone()),
            sequence,
            last_round: node.config.last_round,
            steps: None,
        };
        let mut shared = HashSet::new();
        for file in &node.config.shared_files {
            shared.insert(node.net.put_file(file).await?);
        }
        let mut jobs = JoinSet::new();
        let written = restore::written(&node.config, &node.store);
        let putting = restore::put_back(node.net.clone(), node.store.clone(), written);
        jobs.spawn(async move {
            putting.await;
            Job::Nothing
        });
        let mut driver = Self {
            traces: node.store.traces()?,
            state: State::new(setup),
            keys,
            began: Instant::now(),
            clock: Clock::new(0, 1),
            timers: BTreeMap::new(),
            jobs,
            decided: watch::Sender::new(Round(0)),
            fetching: HashSet::new(),
            applying: VecDeque::new(),
            // Until the first model is asked for: what the log decides at once is applied to it, not before it.
            busy: true,
            epoch: 0,
            training: (0, Round(0)),
            accumulators: restore::accumulators(&node.config, round),
            openings: BTreeMap::new(),
            looking: HashSet::new(),
            no_use: BTreeMap::new(),
            judging: Arc::new(Semaphore::new(AT_ONCE)),
            shared,
            guests: BTreeMap::new(),
            members: Vec::new(),
            model: None,
            last: None,
            finished_at: None,
            leaving_at: None,
            barred_at: None,
            barred_for: None,
            node,
        };
        let branch = driver.state.chain().agreed.branch;
        driver.decided.send_replace(round);
        let effects = driver.state.start(driver.now());
        driver.carry_out(effects)?;
        // O8: the model that the work in flight is trained from, then the last.
        let (base, last) = (driver.state.chain().base(), driver.node.store.record(round)?);
        match last.filter(|_| base < round && driver.has_work_in_flight()) {
            Some(last) => {
                driver.load_model(branch, base);
                // Before what the log decided at once.
                driver.applying.push_front(Arc::new(last));
            }
            None => driver.load_model(branch, round),
        }
        Ok(driver)
    }

    /// Whether this peer has work that was handed out a record ago (R16).
    fn has_work_in_flight(&self) -> bool {
        let (chain, me) = (self.state.chain(), self.keys.id());
        let work = chain.agreed.in_flight.as_ref();
        chain.is_active(&me) && work.is_some_and(|work| work.shares.iter().any(|share| share.member == me))
    }

    /// The core's time: microseconds since the start, less what this process stood still.
    pub(super) fn now(&self) -> Micros {
        self.clock.at(self.elapsed())
    }

    fn elapsed(&self) -> Micros {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    async fn go(&mut self) -> Result<(), NodeError> {
        let mut beat = tokio::time::interval(Duration::from_millis(500));
        loop {
            let next = self.timers.values().min().copied();
            let wake = next.map_or(Duration::from_secs(1), |at| {
                Duration::from_micros(at.saturating_sub(self.now()))
            });
            tokio::select! {
                event = self.node.events.recv() => match event {
                    Some(event) => self.network(event).await?,
                    None => return Err(NodeError::Host("the network task ended".into())),
                },
                done = self.node.host.done.recv() => match done {
                    Some(done) => self.host(done).await?,
                    None => return Err(NodeError::Host("its thread ended".into())),
                },
                Some(job) = self.jobs.join_next(), if !self.jobs.is_empty() => self.job(job.unwrap_or(Job::Nothing))?,
                command = self.node.commands.recv() => self.command(command)?,
                () = tokio::time::sleep(wake) => {}
                _ = beat.tick() => self.report().await?,
            }
            self.clock.read(self.elapsed());
            self.fire_timers()?;
            if self.is_over() {
                return Ok(());
            }
        }
    }

    pub(super) fn handle(&mut self, event: Event) -> Result<(), NodeError> {
        let effects = self.state.handle(self.now(), event);
        if self.state.is_doubled() {
            return Err(NodeError::KeyInUse);
        }
        self.decided.send_replace(self.state.chain().agreed.round);
        self.carry_out(effects)
    }

    fn fire_timers(&mut self) -> Result<(), NodeError> {
        let now = self.now();
        let due: Vec<Timer> = self
            .timers
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(timer, _)| *timer)
            .collect();
        for timer in due {
            // One timer's handler may cancel another.
            if self.timers.get(&timer).is_some_and(|at| *at <= now) {
                self.timers.remove(&timer);
                self.handle(Event::Timer(timer))?;
            }
        }
        Ok(())
    }

    /// The end: told to leave, or done and everyone else is there too.
    fn is_over(&mut self) -> bool {
        if self.leaving_at.is_some_and(|at| at.elapsed() > Duration::from_secs(1)) {
            return true;
        }
        let round = self.state.chain().agreed.round;
        let applied = self.model.is_some_and(|(at, _)| at == round) && self.applying.is_empty() && !self.busy;
        if !self.state.is_finished() || !applied {
            return false;
        }
        let since = *self.finished_at.get_or_insert_with(Instant::now);
        let alive = self.state.alive(self.now());
        let others_there = self.state.tips().all(|(id, tip)| tip >= round || !alive.contains(&id));
        // A last moment, so that the others hear that this peer is there.
        (others_there && since.elapsed() > Duration::from_secs(3)) || since.elapsed() > LINGER
    }

    async fn network(&mut self, event: NetEvent) -> Result<(), NodeError> {
        match event {
            NetEvent::Frame { from, bytes } => self.frame(from, bytes),
            NetEvent::Connected(_) | NetEvent::Disconnected(_) => Ok(()),
            NetEvent::Request { from, request, reply } => {
                let _gone = reply.send(self.answer(from, request).await);
                Ok(())
            }
            NetEvent::Rejected { from, kind, reason } => {
                self.notice(Notice::Rejected { from, kind, reason });
                Ok(())
            }
        }
    }

    fn frame(&mut self, from: PeerId, bytes: Bytes) -> Result<(), NodeError> {
        let run = self.state.chain().agreed.run;
        let message = match Signed::from_link(&bytes, from, run, Scheme::Ed25519) {
            Ok(message) => message,
            Err(error) => {
                self.notice(Notice::Rejected {
                    from,
                    kind: "message",
                    reason: error.to_string(),
                });
                return Ok(());
            }
        };
        let room = self.guests.len() < MAX_GUESTS || self.guests.contains_key(&message.signer);
        if matches!(message.body, Body::Join(_)) && room {
            self.guests.insert(message.signer, Instant::now());
            self.keep_connections();
        }
        let message = Arc::new(message);
        self.handle(Event::Message { from, message })
    }

    pub(super) fn keep_connections(&mut self) {
        self.guests.retain(|_, at| at.elapsed() < GUEST);
        let guests = self.guests.keys().copied();
        let wanted: BTreeSet<PeerId> = self
            .members
            .iter()
            .copied()
            .chain(guests)
            .filter(|id| *id != self.keys.id())
            .collect();
        self.node.net.set_members(wanted.into_iter().collect());
    }

    fn command(&mut self, command: Option<Command>) -> Result<(), NodeError> {
        match command {
            Some(Command::Nudge(reply)) => {
                let _gone = reply.send(());
                Ok(())
            }
            Some(Command::Leave) | None => {
                if self.leaving_at.is_none() {
                    self.leaving_at = Some(Instant::now());
                    self.node.host.stop.up_to(self.training.0);
                    self.handle(Event::Leave)?;
                }
                Ok(())
            }
        }
    }

    async fn host(&mut self, done: Done) -> Result<(), NodeError> {
        match done {
            Done::Trained {
                trained,
                shards,
                accumulator,
                trace,
            } => {
                for shard in shards {
                    self.node.net.put(shard).await?;
                }
                let root = self.node.net.put_file(&accumulator).await?;
                self.node.net.flush_blobs().await?;
                self.traces
                    .keep(&self.node.config.run, trained.branch, trained.round, trace);
                self.node.store.keep_traces(&self.traces)?;
                let keep = self.node.config.run.verification.verdict_rounds * 2 + SPARE_ACCUMULATORS;
                let oldest = Round(trained.round.0.saturating_sub(keep));
                // Those of a branch that was left do not grow old, as in `Traces::keep`.
                self.accumulators
                    .retain(|(branch, round, _)| *branch != trained.branch || *round >= oldest);
                self.accumulators.push_back((trained.branch, trained.round, root));
                let most = usize::try_from(keep.saturating_mul(ACCUMULATOR_BRANCHES as u64)).unwrap_or(usize::MAX);
                let over = self.accumulators.len().saturating_sub(most);
                self.accumulators.drain(..over);
                self.handle(Event::Trained(trained))
            }
            Done::TrainingEnded {
                branch,
                round,
                fruitful,
                reason,
            } => {
                if let Some(reason) = reason {
                    self.idle(round, &reason);
                }
                self.handle(Event::TrainingEnded {
                    branch,
                    round,
                    fruitful,
                })
            }
            Done::Idle { round, reason } => {
                self.idle(round, &reason);
                Ok(())
            }
            Done::Applied {
                epoch,
                branch,
                round,
                model_root,
                snapshot,
            } if epoch == self.epoch => {
                self.busy = false;
                self.model = Some((round, model_root));
                if let Some(file) = snapshot {
                    self.keep_snapshot(branch, round, model_root, &file).await?;
                }
                self.handle(Event::Applied {
                    branch,
                    round,
                    model_root,
                })?;
                self.apply_next();
                Ok(())
            }
            Done::Failed { epoch, reason } if epoch == self.epoch => Err(NodeError::Host(reason)),
            Done::Applied { .. } | Done::Failed { .. } => Ok(()),
            Done::SpeedAnswered(answer) => self.handle(Event::SpeedAnswered(answer)),
            Done::SpeedOpened { key, opening } => self.opened_speed(key, opening),
            Done::Audited { verdict, trace } => {
                let accused = self.state.chain().accusation(&verdict).map(|open| open.finding);
                let about_steps = accused == Some(Finding::Untold) && verdict.finding == Finding::Agrees;
                // By then the member does not tell them, and an accusation has no time to lose.
                let chain = self.state.chain();
                let late = chain.agreed.round >= ask_until(&self.node.config.run, chain, &verdict);
                let bare = verdict.finding == Finding::Differs && late;
                match trace.filter(|_| (verdict.draw == 0 && !bare) || about_steps) {
                    Some(trace) => {
                        self.ask_for_trace(verdict, trace);
                        Ok(())
                    }
                    None => self.handle(Event::Audited(verdict)),
                }
            }
        }
    }

    fn idle(&mut self, round: Round, reason: &str) {
        self.notice(Notice::Warning(format!("no contribution to round {round}: {reason}")));
    }

    fn job(&mut self, job: Job) -> Result<(), NodeError> {
        match job {
            Job::Wanted(blob, outcome) => {
                self.fetching.remove(&blob);
                match outcome {
                    Wanted::Held => self.handle(Event::BlobHeld { blob }),
                    Wanted::Bad(reason) => self.handle(Event::BlobBad { blob, reason }),
                    Wanted::Missing => Ok(()),
                }
            }
            Job::Gathered(epoch, Ok(step)) if epoch == self.epoch => {
                let round = step.decided.record.slot.round;
                let snapshot = round.0 % self.node.config.run.storage.snapshot_rounds == 0;
                self.give(Work::Apply { epoch, step, snapshot })
            }
            Job::Gathered(epoch, Err(reason)) if epoch == self.epoch => {
                tracing::warn!(reason, "catching up by a snapshot instead");
                self.applying.clear();
                let agreed = &self.state.chain().agreed;
                self.load_model(agreed.branch, agreed.round);
                Ok(())
            }
            Job::Source(epoch, branch, Ok(source)) if epoch == self.epoch => {
                self.give(Work::Load { epoch, branch, source })
            }
            Job::Source(epoch, _, Err(reason)) if epoch == self.epoch => {
                // Nobody can give it right now; somebody may come back who can.
                self.notice(Notice::Warning(format!(
                    "the model cannot be built yet, trying again: {reason}"
                )));
                self.applying.clear();
                let agreed = &self.state.chain().agreed;
                self.load_model(agreed.branch, agreed.round);
                Ok(())
            }
            Job::Audit(audit) => self.hear_opened(audit),
            Job::Trace(asking, answer) => self.hear_trace(*asking, answer),
            Job::Speed(key, looked) => self.looked_at_speed(key, looked),
            Job::Records(from, records) => {
                let records = records.into_iter().map(Arc::new).collect();
                self.handle(Event::Records { from, records })
            }
            Job::Gathered(..) | Job::Source(..) | Job::Nothing => Ok(()),
        }
    }

    pub(super) fn give(&self, work: Work) -> Result<(), NodeError> {
        self.node
            .host
            .work
            .send(work)
            .map_err(|_| NodeError::Host("its thread ended".into()))
    }

    /// Nothing that a barred peer does counts: training on would waste its owner's power.
    fn must_not_be_barred(&mut self) -> Result<(), NodeError> {
        let me = self.state.chain().member(&self.keys.id());
        if me.is_none_or(|me| me.standing != Standing::Banned) {
            self.barred_at = None;
            return Ok(());
        }
        let since = *self.barred_at.get_or_insert_with(Instant::now);
        if since.elapsed() < APPEAL {
            return Ok(());
        }
        let why = match self.barred_for {
            Some((round, proof)) => format!("in round {round}, {proof}"),
            None => "the records in this directory say so".to_owned(),
        };
        Err(NodeError::Barred(why))
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        match &notice {
            Notice::Advanced { .. } => self.last = Some(notice.clone()),
            Notice::Slashed {
                member, round, proof, ..
            } if *member == self.keys.id() => self.barred_for = Some((*round, proof)),
            _ => {}
        }
        // A log that cannot keep up loses lines, not rounds.
        if self.node.notices.try_send(notice).is_err() {
            tracing::warn!("the event log is behind; an event was dropped");
        }
    }

    /// Who may hold blobs: the members, and whoever is linked. First those to whom a connection is open, and of these the members, since anyone may
    /// be linked; otherwise by chance, so that no well-chosen id comes first.
    pub(super) fn others(&self) -> Vec<PeerId> {
        let net = &self.node.net;
        let (mut all, mut linked) = (self.members.clone(), net.connected());
        for group in [&mut all, &mut linked] {
            group.shuffle(&mut rand::rng());
        }
        all.extend(linked);
        there_first(net, all)
    }

    async fn report(&mut self) -> Result<(), NodeError> {
        // Whoever goes on without a directory trains, and is paid, with a key that is lost.
        self.node.store.must_be_there()?;
        self.keep_connections();
        self.must_not_be_barred()?;
        let status = NodeStatus {
            chain: self.state.chain().clone(),
            model: self.model,
            last: self.last.clone(),
            alive: self.state.alive(self.now()),
            weights: self.state.voters().iter().collect(),
            traffic: self.node.net.traffic(),
            disk: self.node.net.disk_bytes().await,
        };
        if let Some(budget) = self.node.config.disk_budget.filter(|budget| status.disk > *budget) {
            tracing::warn!(
                disk = status.disk,
                budget,
                "blobs take more than their budget; nothing the run needs is dropped for it"
            );
        }
        self.node.status.send_replace(Some(status));
        Ok(())
    }
}
