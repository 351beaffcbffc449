//! The loop that owns the state machine, and what it does for each effect.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::task::JoinSet;

use super::transfer::{self, SnapshotEntry, Wanted};
use super::{Command, Done, ModelSource, Node, NodeError, NodeStatus, Step, Work};
use crate::net::{NetEvent, Request, Response, SnapshotInfo, StatusInfo};
use crate::protocol::chain::ChainState;
use crate::protocol::event::{AuditOrder, Effect, Event, Notice, Timer};
use crate::protocol::sync::{branch_base, verify_next};
use crate::protocol::{Setup, State};
use crate::types::*;
use crate::wire::{Body, Keys, Scheme, Signed};

/// Newcomers that are kept informed at once.
const MAX_GUESTS: usize = 32;
/// A newcomer that is no longer heard is no longer informed.
const GUEST: Duration = Duration::from_secs(20);
/// Records handed out in one answer, in bytes at most.
const ANSWER_BYTES: usize = 4 << 20;
/// After the last round: how long to serve those who are behind.
const LINGER: Duration = Duration::from_secs(20);
/// Own accumulators kept for auditors, beyond the rounds in which a verdict may come.
const SPARE_ACCUMULATORS: u64 = 4;

/// A finished piece of background work.
enum Job {
    Wanted(Hash, Wanted),
    Gathered(u64, Step),
    Source(u64, Branch, Result<ModelSource, String>),
    Audit(Box<AuditReady>),
    Records(PeerId, Vec<Decided>),
    Nothing,
}

struct AuditReady {
    order: AuditOrder,
    source: Result<ModelSource, String>,
    shards: Vec<Bytes>,
    accumulators: Option<(Bytes, Bytes)>,
}

struct Driver {
    node: Node,
    state: State,
    keys: Keys,
    began: Instant,
    timers: BTreeMap<Timer, Micros>,
    jobs: JoinSet<Job>,
    fetching: HashSet<Hash>,
    /// Decided records that wait to be gathered and applied, and whether one is under way.
    applying: VecDeque<Arc<Decided>>,
    busy: bool,
    epoch: u64,
    training: u64,
    /// Own accumulator roots by round.
    accumulators: BTreeMap<Round, Hash>,
    shared: HashSet<Hash>,
    guests: BTreeMap<PeerId, Instant>,
    members: Vec<PeerId>,
    model: Option<(Round, Hash)>,
    last: Option<Notice>,
    finished_at: Option<Instant>,
    leaving_at: Option<Instant>,
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

impl Driver {
    async fn new(node: Node, keys: Keys) -> Result<Self, NodeError> {
        let (chain, history) = read_chain(&node)?;
        // A height's log is whole unless the store says that it was torn away with its file.
        let wal = Some(node.store.wal_entries()?);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let setup = Setup {
            config: node.config.run.clone(),
            keys: keys.clone(),
            chain,
            history,
            wal: wal.clone(),
            join: Some(node.config.payout_address.clone()),
            sequence: u64::try_from(since_epoch.as_millis()).unwrap_or(0) * 1000,
            last_round: node.config.last_round,
        };
        let mut shared = HashSet::new();
        for file in &node.config.shared_files {
            shared.insert(node.net.put_file(file).await?);
        }
        let mut driver = Self {
            state: State::new(setup),
            keys,
            began: Instant::now(),
            timers: BTreeMap::new(),
            jobs: JoinSet::new(),
            fetching: HashSet::new(),
            applying: VecDeque::new(),
            busy: false,
            epoch: 0,
            training: 0,
            accumulators: BTreeMap::new(),
            shared,
            guests: BTreeMap::new(),
            members: Vec::new(),
            model: None,
            last: None,
            finished_at: None,
            leaving_at: None,
            node,
        };
        let round = driver.state.chain().agreed.round;
        let branch = driver.state.chain().agreed.branch;
        let effects = driver.state.start(driver.now(), wal.as_deref());
        driver.carry_out(effects)?;
        driver.load_model(branch, round);
        Ok(driver)
    }

    /// Microseconds since the start, from 1 on.
    fn now(&self) -> Micros {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
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
                _ = beat.tick() => self.report().await,
            }
            self.fire_timers()?;
            if self.is_over() {
                return Ok(());
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), NodeError> {
        let effects = self.state.handle(self.now(), event);
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
            NetEvent::Request { request, reply, .. } => {
                let _gone = reply.send(self.answer(request).await);
                Ok(())
            }
            NetEvent::Rejected { from, kind, reason } => {
                self.notice(Notice::Rejected { from, kind, reason });
                Ok(())
            }
        }
    }

    fn frame(&mut self, from: PeerId, bytes: Bytes) -> Result<(), NodeError> {
        let message = match Signed::from_frame(&bytes, Scheme::Ed25519) {
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
        match &message.body {
            Body::Join(_) => {
                if self.guests.len() < MAX_GUESTS || self.guests.contains_key(&message.signer) {
                    self.guests.insert(message.signer, Instant::now());
                    self.keep_connections();
                }
                self.handle(Event::Message { from, message })
            }
            _ => self.handle(Event::Message { from, message }),
        }
    }

    fn keep_connections(&mut self) {
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

    /// What other peers may ask.
    async fn answer(&self, request: Request) -> Response {
        let agreed = &self.state.chain().agreed;
        match request {
            Request::Status => Response::Status(StatusInfo {
                run: agreed.run,
                branch: agreed.branch,
                round: agreed.round.next(),
                tip: agreed.record,
                tip_round: agreed.round,
            }),
            Request::RunConfig => Response::RunConfig(self.node.config.run.to_canonical_toml().into_bytes()),
            Request::Records { from, max } => {
                let records = self.node.store.records(from, max.min(512)).unwrap_or_default();
                let mut size = 0;
                // Whatever their size, one record goes through: it has the same limit.
                let fits = |decided: &Decided| {
                    size += 400 * (1 + decided.record.contributions.len() + decided.certificate.votes.len() / 3);
                    size <= ANSWER_BYTES
                };
                Response::Records(records.into_iter().take_while(fits).collect())
            }
            Request::Record { hash } => Response::Record(self.node.store.by_hash(hash).ok().flatten().map(Box::new)),
            Request::Snapshot => {
                let certified = |entry: &&SnapshotEntry| entry.round < agreed.round;
                match transfer::snapshots(&self.node.store).iter().rev().find(certified) {
                    Some(entry) => Response::Snapshot(SnapshotInfo {
                        branch: entry.branch,
                        round: entry.round,
                        model_root: entry.model_root,
                        model_len: entry.model_len,
                    }),
                    None => Response::Unknown,
                }
            }
        }
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
                    self.node.host.stop.up_to(self.training);
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
            } => {
                for shard in shards {
                    self.node.net.put(shard).await?;
                }
                self.accumulators
                    .insert(trained.round, self.node.net.put_file(&accumulator).await?);
                let keep = self.node.config.run.verification.verdict_rounds * 2 + SPARE_ACCUMULATORS;
                let oldest = Round(trained.round.0.saturating_sub(keep));
                self.accumulators = self.accumulators.split_off(&oldest);
                self.handle(Event::Trained(trained))
            }
            Done::Idle { round, reason } => {
                if let Some(reason) = reason {
                    self.notice(Notice::Warning(format!("no contribution to round {round}: {reason}")));
                }
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
            Done::Audited(verdict) => self.handle(Event::Audited(verdict)),
        }
    }

    async fn keep_snapshot(
        &mut self,
        branch: Branch,
        round: Round,
        root: Hash,
        file: &std::path::Path,
    ) -> Result<(), NodeError> {
        let held = self.node.net.put_file(file).await?;
        if held != root {
            let reason = format!("the snapshot file of round {round} is torn: expected {root}, found {held}");
            self.notice(Notice::Warning(reason));
            return Ok(());
        }
        let model_len = tokio::fs::metadata(file).await.map(|meta| meta.len()).unwrap_or(0);
        let mut all = transfer::snapshots(&self.node.store);
        all.retain(|entry| entry.round < round);
        all.push(SnapshotEntry {
            branch,
            round,
            model_root: root,
            model_len,
        });
        // R17: the last two, with everything counted since the older.
        let dropped = all.len().saturating_sub(2);
        for old in all.drain(..dropped) {
            let _gone = tokio::fs::remove_file(file.with_file_name(format!("{}.safetensors", old.model_root))).await;
        }
        transfer::set_snapshots(&self.node.store, &all)?;
        self.node.store.keep_state(round)?;
        self.collect_garbage()
    }

    /// Drops blobs that neither R17 nor the round in progress nor an auditor needs.
    fn collect_garbage(&mut self) -> Result<(), NodeError> {
        let mut keep = self.shared.clone();
        let snapshots = transfer::snapshots(&self.node.store);
        keep.extend(snapshots.iter().map(|entry| entry.model_root));
        keep.extend(self.accumulators.values());
        let mut at = snapshots.first().map_or(Round(1), |entry| entry.round);
        while let Some(decided) = self.node.store.record(at)? {
            for one in &decided.record.contributions {
                keep.extend(&one.commit.shards);
                keep.extend([one.commit.accumulator_before, one.commit.accumulator_after]);
            }
            at = at.next();
        }
        keep.extend(self.state.current_shards());
        self.node.net.retain(keep);
        Ok(())
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
            Job::Gathered(epoch, step) if epoch == self.epoch => {
                let round = step.decided.record.slot.round;
                let snapshot = round.0 % self.node.config.run.storage.snapshot_rounds == 0;
                self.give(Work::Apply { epoch, step, snapshot })
            }
            Job::Source(epoch, branch, Ok(source)) if epoch == self.epoch => {
                self.give(Work::Load { epoch, branch, source })
            }
            Job::Source(epoch, _, Err(reason)) if epoch == self.epoch => Err(NodeError::Chain(reason)),
            Job::Audit(ready) => {
                // Who is not heard has not refused to answer: no verdict at all.
                let member = ready.order.contribution.member;
                if ready.accumulators.is_none() && !self.state.alive(self.now()).contains(&member) {
                    return Ok(());
                }
                let AuditReady {
                    order,
                    source,
                    shards,
                    accumulators,
                } = *ready;
                match source {
                    Ok(source) => self.give(Work::Audit {
                        order,
                        source,
                        shards,
                        accumulators,
                    }),
                    Err(reason) => {
                        self.notice(Notice::Warning(format!("an audit could not be done: {reason}")));
                        Ok(())
                    }
                }
            }
            Job::Records(from, records) => self.handle(Event::Records { from, records }),
            Job::Gathered(..) | Job::Source(..) | Job::Nothing => Ok(()),
        }
    }

    fn give(&self, work: Work) -> Result<(), NodeError> {
        self.node
            .host
            .work
            .send(work)
            .map_err(|_| NodeError::Host("its thread ended".into()))
    }

    fn notice(&mut self, notice: Notice) {
        if matches!(notice, Notice::Advanced { .. }) {
            self.last = Some(notice.clone());
        }
        // A log that cannot keep up loses lines, not rounds.
        if self.node.notices.try_send(notice).is_err() {
            tracing::warn!("the event log is behind; an event was dropped");
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) -> Result<(), NodeError> {
        for effect in effects {
            self.effect(effect)?;
        }
        Ok(())
    }

    fn effect(&mut self, effect: Effect) -> Result<(), NodeError> {
        match effect {
            // Both return when the bytes are on disk: nothing after them leaves this peer before.
            Effect::Persist(entry) => self.node.store.wal_append(&entry)?,
            Effect::ClearWal => self.node.store.wal_clear()?,
            Effect::Store { decided, state } => self.node.store.put(&decided, &state.to_bytes())?,
            Effect::Broadcast(message) => {
                let announced = matches!(message.body, Body::Join(_));
                let frame = Bytes::from(message.to_frame());
                if announced {
                    self.node.net.announce(frame.clone());
                }
                self.node.net.broadcast(frame);
            }
            Effect::Send(to, message) => self.node.net.send(to, message.to_frame().into()),
            Effect::SetTimer(timer, at) => drop(self.timers.insert(timer, at)),
            Effect::CancelTimer(timer) => drop(self.timers.remove(&timer)),
            Effect::Train(order) => {
                self.training += 1;
                let left = Duration::from_micros(order.until.saturating_sub(self.now()));
                self.give(Work::Train {
                    id: self.training,
                    order,
                    deadline: Instant::now() + left,
                })?;
            }
            Effect::StopTraining(_) => self.node.host.stop.up_to(self.training),
            Effect::Fetch { commit, providers, .. } => self.fetch(commit, providers),
            Effect::Apply(decided) => {
                self.applying.push_back(decided);
                self.apply_next();
            }
            Effect::Rollback { branch, round } => {
                self.node.store.truncate_above(round)?;
                self.applying.clear();
                self.load_model(branch, round);
            }
            Effect::Resync { round, .. } => {
                // Whatever was wrong with the model in memory, it is built again from certified bytes.
                let branch = self.state.chain().agreed.branch;
                self.load_model(branch, round);
            }
            Effect::Audit(order) => self.prepare_audit(order),
            Effect::AskRecords { peer, from } => {
                let net = self.node.net.clone();
                self.jobs.spawn(async move {
                    match net
                        .request(peer, Request::Records { from, max: 256 }, Duration::from_secs(10))
                        .await
                    {
                        Ok(Response::Records(records)) => Job::Records(peer, records),
                        _ => Job::Nothing,
                    }
                });
            }
            Effect::Members(members) => {
                self.members = members;
                self.keep_connections();
            }
            Effect::Notice(notice) => self.notice(notice),
        }
        Ok(())
    }

    fn fetch(&mut self, commit: Commit, mut providers: Vec<PeerId>) {
        if !self.fetching.insert(commit.blob) {
            return;
        }
        providers.retain(|id| *id != self.keys.id());
        let (net, check, blob) = (self.node.net.clone(), self.node.host.check.clone(), commit.blob);
        self.jobs
            .spawn(async move { Job::Wanted(blob, transfer::want(net, commit, providers, check).await) });
    }

    /// One record at a time: gathered, then applied.
    fn apply_next(&mut self) {
        if self.busy {
            return;
        }
        let Some(decided) = self.applying.pop_front() else {
            return;
        };
        self.busy = true;
        let (net, epoch, others) = (self.node.net.clone(), self.epoch, self.others());
        self.jobs
            .spawn(async move { Job::Gathered(epoch, transfer::gather(&net, decided, &others).await) });
    }

    /// Builds the model after `round` from the newest snapshot and the counted bytes since.
    fn load_model(&mut self, branch: Branch, round: Round) {
        self.epoch += 1;
        self.busy = true;
        self.model = None;
        let (net, store, epoch, others) = (
            self.node.net.clone(),
            self.node.store.clone(),
            self.epoch,
            self.others(),
        );
        self.jobs.spawn(async move {
            let source = transfer::model_source(&net, &store, round, &others).await;
            Job::Source(epoch, branch, source)
        });
    }

    fn prepare_audit(&mut self, order: AuditOrder) {
        let (net, store, others) = (self.node.net.clone(), self.node.store.clone(), self.others());
        let zero = self.node.config.run.verification.accumulator_zero;
        self.jobs.spawn(async move {
            let (member, commit) = (order.contribution.member, order.contribution.commit.clone());
            let source = transfer::model_source(&net, &store, order.work.round.previous(), &others).await;
            let shards = transfer::fetch_contribution(&net, &commit, &others)
                .await
                .unwrap_or_default();
            let accumulators = transfer::accumulators(&net, &commit, zero, member).await;
            Job::Audit(Box::new(AuditReady {
                order,
                source,
                shards,
                accumulators,
            }))
        });
    }

    /// Who may hold blobs: the members, and whoever is linked.
    fn others(&self) -> Vec<PeerId> {
        let me = self.keys.id();
        let linked = self.node.net.connected();
        let all: BTreeSet<PeerId> = self
            .members
            .iter()
            .copied()
            .chain(linked)
            .filter(|id| *id != me)
            .collect();
        all.into_iter().collect()
    }

    async fn report(&mut self) {
        self.keep_connections();
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
    }
}

/// The chain as the store holds it: the tip's state, and as much history as the protocol looks back on.
fn read_chain(node: &Node) -> Result<(ChainState, Vec<(ChainState, Arc<Decided>)>), NodeError> {
    let (config, store) = (&node.config.run, &node.store);
    let genesis = ChainState::genesis(config);
    let Some((_, tip, _)) = store.tip()? else {
        return Ok((genesis, Vec::new()));
    };
    let window = config
        .membership
        .finality_rounds
        .max(config.verification.verdict_rounds * 2)
        + 2;
    let from = Round(tip.0.saturating_sub(window));
    let mut state = genesis;
    if let Some((_, bytes)) = store.state_at_or_below(from)?.filter(|(round, _)| *round > Round(0)) {
        state = ChainState::from_bytes(&bytes).map_err(|error| NodeError::Chain(error.to_string()))?;
    }
    let mut history = Vec::new();
    while state.agreed.round < tip {
        let round = state.agreed.round.next();
        let decided = store
            .record(round)?
            .ok_or_else(|| NodeError::Chain(format!("record {round} is missing")))?;
        let chain = |reason: String| NodeError::Chain(format!("record {round}: {reason}"));
        let base = branch_base(&state, config, &decided, Scheme::Ed25519).map_err(chain)?;
        let (next, _) = verify_next(&state, config, &decided, Scheme::Ed25519).map_err(chain)?;
        history.push((base, Arc::new(decided)));
        state = next;
    }
    Ok((state, history))
}
