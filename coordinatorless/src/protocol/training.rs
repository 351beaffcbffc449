//! This peer's own local rounds (R8): ordered, trained, encoded, promised.
//!
//! Without overlap all of it belongs to the round in progress. With overlap (R16) a round is trained while the one before it is agreed, and
//! encoded and promised once that is decided; so there are two rounds at most here, one of which is being trained.

use std::collections::BTreeMap;

use super::event::{Effect, Encode, Notice, TrainOrder, Trained};
use super::overlap::{order_ahead, train_order};
use super::{State, micros};
use crate::types::*;
use crate::wire::Body;

/// Models remembered: that of the last round, and the one before.
const MODELS: usize = 2;

/// A local round of this peer's, and how far it has come.
struct Local {
    order: TrainOrder,
    /// The model that it trains from.
    model_root: Hash,
    began: Micros,
    ended: Option<Micros>,
    /// Whether there is something to encode, once it has ended.
    fruitful: bool,
    /// The branch to which it was to be encoded, once that was ordered.
    encoding: Option<Branch>,
    encoded: Option<Trained>,
}

/// What this peer trains, has trained, and could train from.
#[derive(Default)]
pub(super) struct Training {
    /// By round.
    locals: BTreeMap<Round, Local>,
    /// Roots of the models that are at hand, by round.
    models: BTreeMap<Round, Hash>,
    /// The last decision seen, or the start: from there on it is counted how long this peer trains.
    from: Micros,
    /// Since when it trains, if it does, and for how long it had before.
    since: Option<Micros>,
    spent: Micros,
}

impl Training {
    fn is_running(&self) -> bool {
        self.locals.values().any(|local| local.ended.is_none())
    }

    /// A model is there.
    pub fn holds(&mut self, round: Round, model_root: Hash) {
        self.models.insert(round, model_root);
        while self.models.len() > MODELS {
            self.models.pop_first();
        }
    }

    /// The models are built anew.
    pub fn forget_models(&mut self) {
        self.models.clear();
    }

    /// When the training for a round began and ended.
    pub fn times(&self, round: Round) -> (Option<Micros>, Option<Micros>) {
        let local = self.locals.get(&round);
        (local.map(|local| local.began), local.and_then(|local| local.ended))
    }

    fn paused(&mut self, now: Micros) {
        let since = self.since.take();
        self.spent += since.map_or(0, |since| now.saturating_sub(since));
    }

    /// The time since this was asked last, and how much of it this peer trained.
    pub fn take_spent(&mut self, now: Micros) -> (Micros, Micros) {
        let running = self.since.is_some();
        self.paused(now);
        self.since = running.then_some(now);
        let span = now.saturating_sub(std::mem::replace(&mut self.from, now));
        (span, std::mem::take(&mut self.spent))
    }
}

/// Whether two orders are for the same work: on whichever branch, and from whichever accumulator, which is no part of training.
fn same_work(one: &TrainOrder, other: &TrainOrder) -> bool {
    let work = |order: &TrainOrder| (order.round, order.base, order.parent, order.global_tokens, order.seed);
    work(one) == work(other) && one.batches == other.batches
}

impl State {
    /// Whether this peer trains at all.
    fn may_train(&self) -> bool {
        !self.leaving && !self.is_finished() && self.is_member(&self.keys.id())
    }

    /// Whether it may promise something in the round in progress. Where a record is carried over, that round's work is done (R20); who
    /// listens says nothing (R19).
    fn may_commit(&self) -> bool {
        self.may_train() && !self.listening && !self.regroup.is_carrying()
    }

    /// The chain has moved: local rounds that it has no more use for are dropped (O7), and stopped if they run.
    pub(super) fn review_training(&mut self, now: Micros) {
        let (me, round) = (self.keys.id(), self.height().1);
        let (chain, config) = (self.chain.clone(), self.config.clone());
        let in_flight = chain.agreed.in_flight.as_ref().and_then(|work| work.model_root);
        // What is over needs no look at who has which work.
        let wanted = |local: &Local| {
            let of = local.order.round;
            let order = match of {
                _ if of == round => Some(train_order(&chain, &config, &me, 0)),
                _ if of == round.next() => order_ahead(&chain, &config, &me, 0),
                _ => None,
            };
            let astray = of == round && in_flight.is_some_and(|root| root != local.model_root);
            order.is_some_and(|order| same_work(&order, &local.order)) && !astray
        };
        let dropped: Vec<Round> = self
            .training
            .locals
            .iter()
            .filter(|(_, local)| !wanted(local))
            .map(|(round, _)| *round)
            .collect();
        for round in dropped {
            if let Some(local) = self.training.locals.remove(&round)
                && local.ended.is_none()
            {
                self.training.paused(now);
                self.out.push(Effect::StopTraining(round));
            }
        }
    }

    /// Work begins once the model is there: first the round in progress, then with overlap the one after.
    pub(super) fn order_training(&mut self, now: Micros) {
        if !self.may_train() || self.training.is_running() {
            return;
        }
        let (me, (_, round)) = (self.keys.id(), self.height());
        let until = now + micros(self.config.timing.train_secs);
        let (chain, config) = (self.chain.clone(), self.config.clone());
        if self.may_commit() && !self.training.locals.contains_key(&round) {
            self.train(now, train_order(&chain, &config, &me, until));
        }
        let wanted = self.last_round.is_none_or(|last| round < last) && !self.training.is_running();
        if wanted
            && !self.training.locals.contains_key(&round.next())
            && let Some(order) = order_ahead(&chain, &config, &me, until)
        {
            self.train(now, order);
        }
    }

    fn train(&mut self, now: Micros, order: TrainOrder) {
        let in_flight = self.chain.agreed.in_flight.as_ref();
        let agreed = in_flight
            .filter(|work| work.base == order.base)
            .and_then(|work| work.model_root);
        // The model that it needs: there, and not one that went astray and is being fetched anew (R14).
        let held = self.training.models.get(&order.base).copied();
        let Some(model_root) = held.filter(|held| agreed.is_none_or(|agreed| agreed == *held)) else {
            return;
        };
        if order.batches.is_empty() {
            return;
        }
        self.training.since = Some(now);
        let local = Local {
            order: order.clone(),
            model_root,
            began: now,
            ended: None,
            fruitful: false,
            encoding: None,
            encoded: None,
        };
        self.training.locals.insert(order.round, local);
        self.out.push(Effect::Train(order));
    }

    /// The steps of a local round are done.
    pub(super) fn training_ended(&mut self, now: Micros, branch: Branch, round: Round, fruitful: bool) {
        let local = self.training.locals.get_mut(&round);
        let Some(local) = local.filter(|local| local.order.branch == branch && local.ended.is_none()) else {
            return; // stopped, or of a branch that was left meanwhile
        };
        (local.ended, local.fruitful) = (Some(now), fruitful);
        self.training.paused(now);
        self.order_encoding();
        self.order_training(now);
    }

    /// O5: what was trained is encoded once it is known whether this peer's last contribution counts.
    pub(super) fn order_encoding(&mut self) {
        if !self.may_commit() {
            return;
        }
        let (me, (branch, round)) = (self.keys.id(), self.height());
        let zero = self.config.verification.accumulator_zero;
        let accumulator = self.chain.member(&me).map_or(zero, |member| member.accumulator);
        let local = self.training.locals.get_mut(&round);
        let Some(local) = local.filter(|local| local.fruitful && local.encoding.is_none()) else {
            return;
        };
        local.encoding = Some(branch);
        self.out.push(Effect::Encode(Encode {
            work: local.order.clone(),
            branch,
            accumulator,
        }));
    }

    /// R8: the local round is encoded; promise it.
    pub(super) fn trained(&mut self, now: Micros, trained: Trained) {
        let local = self.training.locals.get_mut(&trained.round);
        let expected = |local: &&mut Local| local.encoding == Some(trained.branch) && local.encoded.is_none();
        let Some(local) = local.filter(expected) else {
            return;
        };
        local.encoded = Some(trained);
        self.promise(now);
    }

    /// Commits what is encoded of the round in progress; again on a branch that goes on from the same record (O6).
    pub(super) fn promise(&mut self, now: Micros) {
        let me = self.keys.id();
        if !self.may_commit() || self.round.commits.contains_key(&me) {
            return;
        }
        let Some(local) = self.training.locals.get(&self.height().1) else {
            return;
        };
        let Some(trained) = local.encoded.clone() else { return };
        let shards: Vec<u8> = trained.shards.iter().flat_map(|shard| shard.0).collect();
        let commit = Commit {
            slot: self.chain.next_slot(),
            base: local.order.base,
            parent: self.chain.agreed.record,
            model_root: local.model_root,
            blob: Hash::of(&shards),
            shards: trained.shards,
            len: trained.len,
            tokens: trained.tokens,
            loss_micros: trained.loss_micros,
            trace_root: trained.trace_root,
            accumulator_before: trained.accumulator_before,
            accumulator_after: trained.accumulator_after,
        };
        let message = self.keys.sign(&Body::Commit(commit.clone()));
        let blob = commit.blob;
        let contribution = Contribution {
            member: me,
            commit,
            signature: message.signature,
        };
        if let Err(violation) = self
            .chain
            .check_commit(&self.config, &self.assignment, &contribution, self.scheme)
        {
            let warning = format!("this peer's own contribution breaks a rule and was not sent: {violation}");
            return self.out.push(Effect::Notice(Notice::Warning(warning)));
        }
        self.round.committed(now, contribution);
        self.spread(message);
        self.blob_held(now, blob);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_that_goes_on_over_a_decision_counts_in_both_rounds() {
        let mut training = Training::default();
        assert_eq!(training.take_spent(10), (10, 0));
        training.since = Some(14);
        assert_eq!(training.take_spent(20), (10, 6));
        training.paused(23);
        training.paused(25);
        assert_eq!(training.take_spent(30), (10, 3));
        assert_eq!(training.take_spent(30), (0, 0));
    }

    #[test]
    fn the_models_of_the_last_two_rounds_are_at_hand() {
        let mut training = Training::default();
        for round in 1..=3 {
            training.holds(Round(round), Hash::of(&[round as u8]));
        }
        assert_eq!(
            training.models.keys().copied().collect::<Vec<_>>(),
            [Round(2), Round(3)]
        );
        training.forget_models();
        assert!(training.models.is_empty());
    }
}
