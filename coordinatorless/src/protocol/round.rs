//! One round, from the assignment to the decision (R8, R10 to R15).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::chain::{Draft, MAX_CHANGES, MAX_EVIDENCE, subject};
use super::event::{Effect, Notice, Timer};
use super::planted::{Bug, planted};
use super::roster::Roster;
use super::{State, audit, log, micros, regroup};
use crate::agreement::Output;
use crate::types::*;
use crate::wire::{Body, Signed};

/// Views in which leaving out a widely held commit costs the vote (R12), and in which records that name steps of proofs of speed are made.
pub(super) const CENSORSHIP_VIEWS: View = 2;
/// Proposals under examination at once: two values per view are possible, and few views are in play.
const MAX_CHECKS: usize = 8;

/// What belongs to the round in progress and goes with it.
#[derive(Default)]
pub(super) struct RoundState {
    /// When the last decision was seen: deadlines count from here.
    pub began: Micros,
    pub commits: BTreeMap<PeerId, Contribution>,
    pub commit_seen: BTreeMap<PeerId, Micros>,
    /// Members of the blobs that commits name.
    authors: BTreeMap<Hash, PeerId>,
    pub held: BTreeSet<Hash>,
    /// Places of the members whose contribution is held here.
    pub holding: BTreeSet<usize>,
    /// By place: the weight of those who say that they hold this member's contribution.
    pub weight: Vec<u64>,
    /// By place: since when that has been enough, and held here too.
    pub wide_since: BTreeMap<usize, Micros>,
    pub bad: BTreeSet<Hash>,
    pub last_blob: Micros,
    pub have_planned: bool,
    /// Messages of the next round that came early: one commit a member.
    early: BTreeMap<PeerId, Signed>,
    /// The view for which the engine awaits this peer's record.
    wanted: Option<View>,
    checks: Vec<Check>,
    pub voting_since: Option<Micros>,
    timing: Timing,
}

/// How the last decided round went, for its notice.
#[derive(Clone, Copy, Default)]
struct Timing {
    train: Micros,
    exchange: Micros,
    agree: Micros,
    span: Micros,
    busy: Micros,
}

/// A proposal that follows the rules of the chain and waits for its blobs (R11).
struct Check {
    view: View,
    came: Micros,
    hash: Hash,
    record: Arc<Record>,
    /// What this peer alone holds against it; a polka overrules that.
    objection: Option<String>,
}

impl RoundState {
    pub fn keep_early(&mut self, message: Signed) {
        // Members only, one each: bounded by the membership.
        self.early.insert(message.signer, message);
    }

    /// Remembers a member's commit.
    pub fn committed(&mut self, now: Micros, contribution: Contribution) {
        self.authors.insert(contribution.commit.blob, contribution.member);
        self.commit_seen.insert(contribution.member, now);
        self.commits.insert(contribution.member, contribution);
    }

    /// Who committed to this blob, in a commit or as a proposal names it.
    pub fn author(&self, blob: &Hash) -> Option<PeerId> {
        let named = || {
            let all = self.checks.iter().flat_map(|check| &check.record.contributions);
            all.into_iter()
                .find(|one| one.commit.blob == *blob)
                .map(|one| one.member)
        };
        self.authors.get(blob).copied().or_else(named)
    }

    /// Shards of every commit in play.
    pub fn shards(&self) -> impl Iterator<Item = Hash> + '_ {
        let named = self.checks.iter().flat_map(|check| &check.record.contributions);
        self.commits
            .values()
            .chain(named)
            .flat_map(|one| one.commit.shards.iter().copied())
    }

    pub fn load(&self) -> usize {
        self.commits.len() + self.held.len() + self.bad.len() + self.early.len() + self.checks.len()
    }
}

impl State {
    /// Begins the round after the chain's last record.
    pub(super) fn start_round(&mut self, now: Micros, vote: bool) {
        self.voters = Arc::new(self.chain.voters());
        self.roster = Roster::new(&self.chain, &self.voters, &self.keys.id()).after(&self.roster);
        self.assignment = self.chain.assignment(&self.config);
        let early = std::mem::take(&mut self.round.early);
        let timing = self.round.timing;
        self.round = RoundState {
            began: now,
            timing,
            ..RoundState::default()
        };
        self.listening = !vote;
        let members: BTreeSet<PeerId> = self.chain.active().collect();
        self.haves.retain(|id, _| members.contains(id));
        self.have_signatures.retain(|id, _| members.contains(id));
        self.heard.retain(|id, _| members.contains(id));
        self.count_haves(now);
        let (chain, config, scheme) = (self.chain.clone(), self.config.clone(), self.scheme);
        self.requests
            .retain(|_, change| chain.check_change(&config, change, scheme).is_ok());
        self.verdicts.retain(|_, verdict| chain.awaits(verdict));
        self.evidence
            .retain(|_, evidence| chain.check_evidence(evidence, scheme).is_ok());
        self.out.push(Effect::SetTimer(
            Timer::Collect,
            now + micros(self.config.timing.collect_secs),
        ));
        let (branch, round) = self.height();
        if vote && !self.is_finished() {
            // What the log holds of other heights is skipped; of this one, nothing may be signed otherwise again.
            let outputs = self.agreement.start(now, branch, round, self.voters.clone(), &self.wal);
            self.agreed(now, outputs);
        } else {
            // R19: the log is gone; a vote of this height may have been sent. Listen for one round, and say nothing at all:
            // who hears a heartbeat counts on a vote that cannot come, and would neither decide nor regroup without it.
            self.agreement.stop();
        }
        for message in early.into_values() {
            self.commit(now, &message);
        }
        self.review_speeds(now);
        self.review_training(now);
        self.order_encoding();
        self.promise(now);
        self.order_training(now);
    }

    /// A proposal or vote, for the engine.
    pub(super) fn ballot(&mut self, now: Micros, message: &Signed) {
        let slot = message.body.slot();
        let (branch, round) = self.height();
        if slot.branch != branch || slot.round > round.next() {
            return self.maybe_behind(now, message.signer, slot);
        }
        let outputs = self.agreement.message(now, message);
        self.agreed(now, outputs);
        // This vote may have completed the polka that overrules an objection.
        if self.round.checks.iter().any(|check| check.objection.is_some()) {
            self.recheck(now);
        }
        self.recheck_boasts(now);
    }

    /// What is heard may make a proof of speed believable, or overrule this peer.
    pub(super) fn recheck_boasts(&mut self, now: Micros) {
        if self.round.checks.iter().any(|check| !check.record.speeds.is_empty()) {
            self.recheck(now);
        }
    }

    /// Carries out what the engine says.
    pub(super) fn agreed(&mut self, now: Micros, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::GetRecord { view, .. } => {
                    self.round.wanted = Some(view);
                    self.try_propose(now);
                }
                Output::Check { view, record, .. } => self.examine(now, view, record),
                Output::Persist(entry) => {
                    if !planted(Bug::SkipTheLog) {
                        self.out.push(Effect::Persist(log::agreement(&entry)));
                    }
                    self.wal.push(entry);
                }
                Output::Publish(message) => {
                    self.round.voting_since.get_or_insert(now);
                    self.spread(message);
                }
                Output::SetTimer(timer, at) => self.out.push(Effect::SetTimer(Timer::Agreement(timer), at)),
                Output::CancelTimer(timer) => self.out.push(Effect::CancelTimer(Timer::Agreement(timer))),
                Output::Decided { record, certificate } => {
                    let decided = Decided {
                        record: (*record).clone(),
                        certificate,
                        regroup: self.regroup.take_proof(),
                    };
                    self.speeds.live = true;
                    return self.decided(now, Arc::new(decided));
                }
                Output::Equivocation { peer, what, evidence } => {
                    self.reject(peer, what, "two messages for one slot".into());
                    if let Some(evidence) = evidence {
                        self.caught(*evidence);
                    }
                }
            }
        }
    }

    /// R10: proposes, when it is this peer's turn and either everything that can be expected is widely held or time is up.
    pub(super) fn try_propose(&mut self, now: Micros) {
        let (Some(view), Some(model_root)) = (self.round.wanted, self.model) else {
            return;
        };
        let due = self.round.began + micros(self.config.timing.collect_secs);
        if self.regroup.insists(view).is_some() {
            // R20: nobody would vote for less. Once the blobs are held, there is nothing to wait for.
            let held = self
                .regroup
                .carries()
                .all(|one| self.round.held.contains(&one.commit.blob));
            let carried = self.regroup.carried().map(|carried| carried.polka.view);
            if carried < self.regroup.insists(view) || !held {
                return;
            }
        } else if view == 0 && now < due && !self.all_expected_held(now) {
            return;
        }
        self.round.wanted = None;
        let record = self.write_record(now, view, model_root);
        let round = self.height().1;
        let outputs = self.agreement.propose(now, round, view, record);
        self.agreed(now, outputs);
    }

    /// Whether every member that has work and is heard has a commit that more than 2/3 of the weight holds.
    fn all_expected_held(&self, now: Micros) -> bool {
        let mut any = false;
        for (id, _) in &self.assignment.members {
            let contribution = self.round.commits.get(id);
            if !self.is_member(id) {
                continue; // O4
            }
            let settled =
                contribution.is_some_and(|one| self.round.bad.contains(&one.commit.blob) || self.widely_held(one));
            // Whether it is alive is asked last: of many members, that is the dear question.
            if !settled && self.is_alive(now, id) {
                return false;
            }
            any |= settled;
        }
        any
    }

    fn widely_held(&self, one: &Contribution) -> bool {
        self.round.held.contains(&one.commit.blob) && self.voters.quorum(self.weight_holding(&one.member))
    }

    fn write_record(&self, now: Micros, view: View, model_root: Hash) -> Record {
        let round = self.height().1;
        let carried = self.regroup.carried();
        let base_root = self.chain.base_root(model_root);
        let held = |one: &&Contribution| one.commit.model_root == base_root && self.widely_held(one);
        let contributions = match carried {
            Some(_) => self.regroup.carries().cloned().collect(),
            None => self.round.commits.values().filter(held).cloned().collect(),
        };
        let lapses = self.silent_members(now).into_iter().map(Change::Lapse);
        let asked = self.requests.values().cloned();
        let mut changes: Vec<Change> = asked.chain(lapses).collect();
        changes.sort_by_key(subject);
        changes.dedup_by_key(|change| subject(change));
        changes.truncate(MAX_CHANGES);
        let draft = Draft {
            parent_view: self.parent_view,
            changes,
            contributions,
            model_root,
            verdicts: self.pressing_verdicts(),
            evidence: self.evidence.values().take(MAX_EVIDENCE).cloned().collect(),
            speeds: self.speed_steps(view),
            beacon: self.vrf.beacon(self.keys.id(), &self.chain.agreed.seed, round, view),
            carried,
        };
        self.chain.draft(&self.config, draft)
    }

    /// What a record has room for: first what accuses, confirms or clears, since nothing follows from a first audit that agrees.
    fn pressing_verdicts(&self) -> Vec<SignedVerdict> {
        let idle = |signed: &&SignedVerdict| signed.verdict.draw == 0 && signed.verdict.finding == Finding::Agrees;
        let mut verdicts: Vec<&SignedVerdict> = self.verdicts.values().collect();
        // Stable: by key within each kind, as the map has them.
        verdicts.sort_by_key(idle);
        let mut verdicts = self.chain.fitting(verdicts);
        verdicts.sort_by_key(|signed| audit::key(signed));
        verdicts.into_iter().cloned().collect()
    }

    /// R15: members that more than 2/3 of the weight say they have not heard, one a record (the rule allows more of many).
    fn silent_members(&self, now: Micros) -> Option<PeerId> {
        let slot = self.chain.next_slot();
        let candidates = self.chain.agreed.members.iter().filter(|member| {
            let change = Change::Lapse(member.id);
            self.chain.check_change(&self.config, &change, self.scheme).is_ok() && !self.hears(now, &member.id)
        });
        let missing = |id: &PeerId| -> u64 {
            let Some(place) = self.roster.place(id) else { return 0 };
            let says = |voter: &PeerId| {
                let have = self.haves.get(voter).filter(|have| have.slot == slot);
                have.is_some_and(|have| !have.heard.has(place))
            };
            self.voters
                .iter()
                .filter(|(voter, _)| says(voter))
                .map(|(_, weight)| weight)
                .sum()
        };
        candidates
            .map(|member| member.id)
            .find(|id| self.voters.quorum(missing(id)))
    }

    /// Whether this peer, or who listens for it, heard the member within the rounds that R15 asks for.
    fn hears(&self, now: Micros, id: &PeerId) -> bool {
        let place = self.roster.place(id);
        self.heard_lately(now, id) || place.is_some_and(|place| self.told_heard(now, place))
    }

    /// Whether this peer itself heard the member within these rounds.
    pub(super) fn heard_lately(&self, now: Micros, id: &PeerId) -> bool {
        let round = self.height().1;
        let lately = |at: &Round| at.0 + self.config.membership.lapse_rounds > round.0;
        self.hears_now(now, id) || self.heard.get(id).is_some_and(|(_, at)| lately(at))
    }

    /// R11, first half: does it follow the rules? Then it waits for its blobs.
    fn examine(&mut self, now: Micros, view: View, record: Arc<Record>) {
        let hash = record.hash();
        if self
            .round
            .checks
            .iter()
            .any(|check| check.hash == hash && check.view == view)
        {
            return self.recheck(now);
        }
        let lawful = match self.lawful(view, &record, hash) {
            Ok(()) => true,
            Err(reason) => {
                let from = self.voters.proposer(record.slot.round, view);
                self.reject(from, "proposal", reason);
                false
            }
        };
        // Commits that came only with the record are as good as any.
        for contribution in record
            .contributions
            .iter()
            .filter(|_| lawful && record.carried.is_none())
        {
            let (signer, signature) = (contribution.member, contribution.signature);
            self.commit(
                now,
                &Signed {
                    signer,
                    body: Body::Commit(contribution.commit.clone()),
                    signature,
                },
            );
        }
        if lawful {
            if self.round.checks.len() >= MAX_CHECKS {
                self.round.checks.remove(0);
            }
            let objection = self.objection(now, view, &record);
            if let Some(reason) = objection.clone().filter(|_| !self.agreement.has_polka(&hash)) {
                let from = self.voters.proposer(record.slot.round, view);
                self.reject(from, "proposal", reason);
            }
            self.round.checks.push(Check {
                view,
                came: now,
                hash,
                record,
                objection,
            });
            self.fetch_named();
        }
        self.recheck(now);
    }

    /// Fetches what proposals name, whichever of a member's commits that is: the commit seen first here may be another.
    pub(super) fn fetch_named(&mut self) {
        let voters: Vec<PeerId> = self.voters.iter().map(|(id, _)| id).collect();
        let mut fetches = Vec::new();
        let named = self.round.checks.iter().flat_map(|check| &check.record.contributions);
        for one in named.chain(self.regroup.carries()) {
            let blob = &one.commit.blob;
            if !self.round.held.contains(blob) && !self.round.bad.contains(blob) {
                let providers = std::iter::once(one.member).chain(voters.iter().copied()).collect();
                fetches.push(Effect::Fetch {
                    member: one.member,
                    commit: one.commit.clone(),
                    providers,
                });
            }
        }
        self.out.extend(fetches);
    }

    fn lawful(&self, view: View, record: &Record, hash: Hash) -> Result<(), String> {
        if record.beacon.view > view {
            return Err("its beacon is from a later view".into());
        }
        // R20, G4: locks are kept.
        let carried = record.carried.as_ref().map(|carried| carried.polka.view);
        if carried < self.regroup.insists(view) {
            return Err(format!(
                "polka carried over: expected view {:?} or later, found {carried:?}",
                self.regroup.insists(view)
            ));
        }
        self.step(record, hash)
            .map(drop)
            .map_err(|violation| violation.to_string())
    }

    /// What only this peer's own ears and clock tell against a record. A judgement like that changes with time, and whoever is
    /// locked on a record cannot wait for it: once more than 2/3 of the weight have prevoted the record, more than 1/3 of it honest
    /// and of another mind, it counts no more. Else those locked and those who object block each other for good.
    fn objection(&self, now: Micros, view: View, record: &Record) -> Option<String> {
        let lapsed = record.changes.iter().find_map(|change| match change {
            Change::Lapse(id) => Some(id).filter(|id| self.hears(now, id)),
            _ => None,
        });
        if let Some(id) = lapsed {
            return Some(format!("it lapses {}, who is heard", id.short()));
        }
        // Certificates of two views may both be valid for the parent; who saw the other one must not be stuck for good.
        let other_parent = record.parent_view != self.parent_view && self.chain.agreed.round > Round(0);
        (other_parent && view < CENSORSHIP_VIEWS).then(|| {
            format!(
                "parent_view: expected {}, found {}",
                self.parent_view, record.parent_view
            )
        })
    }

    /// R11, second half: votes for what is lawful, held in full, of the same model, and no censorship (R12).
    pub(super) fn recheck(&mut self, now: Micros) {
        let Some(model) = self.model else { return };
        let ready: Vec<Hash> = self
            .round
            .checks
            .iter()
            .filter(|check| check.record.model_root == model)
            .filter(|check| {
                let mut named = check.record.contributions.iter();
                named.all(|one| self.round.held.contains(&one.commit.blob) || planted(Bug::VoteWithoutHolding))
            })
            .filter(|check| {
                let mine = || check.objection.is_none() && !self.censors(check) && !self.boasts(check);
                self.agreement.has_polka(&check.hash) || mine()
            })
            .map(|check| check.hash)
            .collect();
        self.round.checks.retain(|check| !ready.contains(&check.hash));
        for hash in ready {
            let outputs = self.agreement.valid(now, hash);
            self.agreed(now, outputs);
        }
    }

    /// Whether it names a step of a proof of speed that this peer has no reason to believe, yet. Later than in these views somebody may be locked on it.
    fn boasts(&self, check: &Check) -> bool {
        check.view < CENSORSHIP_VIEWS && self.unseen_speed(&check.record).is_some()
    }

    fn censors(&self, check: &Check) -> bool {
        // R20: what a branch carries over is all that it may count.
        if check.view >= CENSORSHIP_VIEWS || check.record.carried.is_some() {
            return false;
        }
        let patience = micros(self.config.timing.censor_secs);
        let contributions = &check.record.contributions;
        let named = |member: &PeerId| contributions.binary_search_by_key(member, |one| one.member).is_ok();
        self.round.commits.values().any(|one| {
            let place = self.roster.place(&one.member);
            let since = place.and_then(|place| self.round.wide_since.get(&place));
            let countable = one.commit.model_root == self.chain.base_root(check.record.model_root);
            countable && since.is_some_and(|since| since + patience <= check.came) && !named(&one.member)
        })
    }

    /// R13: a record is decided, by this peer's engine or by a certificate that was checked.
    pub(super) fn decided(&mut self, now: Micros, decided: Arc<Decided>) {
        let record = &decided.record;
        let (next, notices) = match self.step(record, decided.certificate.record) {
            Ok(applied) => applied,
            Err(violation) => {
                // More than 2/3 of the weight decided what this peer's rules forbid: another build, or a broken disk. Never guess.
                let warning = format!(
                    "round {} was decided against this peer's rules: {violation}",
                    record.slot.round
                );
                self.agreement.stop();
                return self.out.push(Effect::Notice(Notice::Warning(warning)));
            }
        };
        let round = record.slot.round;
        self.note_timing(now, record);
        self.out.push(Effect::Store {
            decided: decided.clone(),
            state: next.clone(),
        });
        // Only now: a crash in between must find either the record or what was signed for it.
        self.out.push(Effect::ClearWal);
        self.wal.clear();
        // R14: the certified model is another than mine.
        if self.model.is_some_and(|mine| mine != record.model_root) {
            let providers = decided
                .certificate
                .votes
                .iter()
                .map(|(id, _)| *id)
                .filter(|id| *id != self.keys.id());
            let providers = providers.collect();
            self.resync(round.previous(), record.model_root, providers);
        }
        self.out.push(Effect::Notice(Notice::Decided {
            branch: record.slot.branch,
            round,
            record: next.agreed.record,
            view: decided.certificate.slot.view,
            contributors: contributors(record),
            loss_micros: mean_loss(record),
        }));
        self.out.extend(notices.into_iter().map(Effect::Notice));
        self.out.push(Effect::Apply(decided.clone()));
        self.history.insert(round, (self.chain.clone(), decided.clone()));
        let keep = self
            .config
            .membership
            .finality_rounds
            .max(self.config.verification.verdict_rounds * 2)
            + 2;
        while self.history.len() as u64 > keep {
            self.history.pop_first();
        }
        let members_changed = !record.changes.is_empty() || next.active().ne(self.chain.active());
        self.chain = next;
        self.model = None;
        self.parent_view = decided.certificate.slot.view;
        self.regroup = regroup::RegroupState::default();
        if members_changed {
            let roster = Roster::new(&self.chain, &self.chain.voters(), &self.keys.id());
            self.out.push(Effect::Members(roster.neighbours()));
        }
        self.start_round(now, true);
        self.order_audits();
    }

    /// R14: the model after `round` has another root than the record after it certifies.
    fn resync(&mut self, round: Round, model_root: Hash, providers: Vec<PeerId>) {
        let warning = format!("this peer's model after round {round} is not the agreed one; it is fetched anew");
        self.out.push(Effect::Notice(Notice::Warning(warning)));
        self.training.forget_models();
        self.out.push(Effect::Resync {
            round,
            model_root,
            providers,
        });
    }

    fn note_timing(&mut self, now: Micros, record: &Record) {
        let seen = |one: &Contribution| self.round.commit_seen.get(&one.member).copied();
        let last_commit = record.contributions.iter().filter_map(seen).max();
        let (began, ended) = self.training.times(record.slot.round);
        // With overlap it ended before this round began, and was sent only then.
        let sent = ended.map(|end| end.max(self.round.began));
        let (span, busy) = self.training.take_spent(now);
        self.round.timing = Timing {
            train: ended.zip(began).map_or(0, |(end, began)| end - began),
            exchange: sent.map_or(0, |sent| self.round.last_blob.saturating_sub(sent)),
            agree: last_commit.map_or(0, |at| now - at),
            span,
            busy,
        };
    }

    /// The model after a round is there.
    pub(super) fn applied(&mut self, now: Micros, branch: Branch, round: Round, model_root: Hash) {
        let known = self.history.get(&round).map(|(_, decided)| decided.record.slot.branch);
        if branch != self.chain.agreed.branch && known.is_some_and(|known| known != branch) {
            return; // begun on a branch that was left meanwhile
        }
        if let Some((_, decided)) = self
            .history
            .get(&round)
            .filter(|(_, decided)| decided.record.slot.branch == branch)
        {
            let (record, timing) = (&decided.record, self.round.timing);
            self.out.push(Effect::Notice(Notice::Advanced {
                branch,
                round,
                record: decided.certificate.record,
                model_root,
                contributors: contributors(record),
                loss_micros: mean_loss(record),
                train: timing.train,
                exchange: timing.exchange,
                agree: timing.agree,
                span: timing.span,
                busy: timing.busy,
            }));
        }
        self.training.holds(round, model_root);
        let tip = self.chain.agreed.round;
        if round != tip {
            // Catching up: the next record says what this root must be.
            if let Some((_, next)) = self.history.get(&round.next())
                && next.record.model_root != model_root
                && round < tip
            {
                let (model_root, providers) = (next.record.model_root, self.haves.keys().copied().collect());
                self.resync(round, model_root, providers);
            }
            // O8: the round in flight may need just this one.
            return self.order_training(now);
        }
        self.model = Some(model_root);
        self.order_training(now);
        self.recheck(now);
        self.try_propose(now);
    }
}

fn contributors(record: &Record) -> Vec<(PeerId, u64)> {
    record
        .contributions
        .iter()
        .map(|one| (one.member, one.commit.tokens))
        .collect()
}

/// Token-weighted mean of the stated losses, in millionths.
fn mean_loss(record: &Record) -> u64 {
    let weighted = |one: &Contribution| u128::from(one.commit.loss_micros) * u128::from(one.commit.tokens);
    let sum: u128 = record.contributions.iter().map(weighted).sum();
    let tokens: u128 = record
        .contributions
        .iter()
        .map(|one| u128::from(one.commit.tokens))
        .sum();
    u64::try_from(sum / tokens.max(1)).unwrap_or(u64::MAX)
}
