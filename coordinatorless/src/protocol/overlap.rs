//! Overlap (R16): with `timing.overlap = 1` nobody idles while a round's contributions travel and its record is agreed.
//!
//! ```text
//!                     record r-1                      record r
//! the network   ---------|-- exchange and agree on r -----|-- exchange and agree on r+1 ---
//! the trainer   ---------|-- train r+1 from model r-1 ----|-- train r+2 from model r -------
//!                        `-- encode r, commit r           `-- encode r+1, commit r+1
//! ```
//!
//! - **O1** Round `r+1` is trained from the model of record `r-1`, and everything else about it comes from there too: who has work, which
//!   batches, the token count that the schedule follows, the seed. Rounds 1 and 2 are both trained from the genesis.
//! - **O2** So each record hands out the work of the round *after* the one in flight. The state after record `r-1` holds the work of round
//!   `r` as it was handed out a record earlier ([`InFlight`]), in full and never changed; cursor and pool are those after it. The work of
//!   round `r+1` follows from that state, and is frozen into the state after record `r`.
//! - **O3** Every batch is in one place: counted, retired, waiting in the pool, in flight, or beyond the cursor. What a record counts and
//!   returns is measured against the work that was in flight.
//! - **O4** Who has left, lapsed or been barred by the time a round is decided is not counted in it, though it has work in flight: that
//!   goes back with the record, and is no sign of poison. A newcomer taken in by record `r` has its first work in round `r+2`.
//! - **O5** The accumulator waits: what is sent in round `r+1` is made of `e`, and `e` depends on whether round `r` was counted. So a commit is
//!   signed after the record before it, names that as its parent, and names base and root of the model really trained from; both are checked
//!   against the state, like the accumulator.
//! - **O6** A regroup leaves the work in flight as it is: what the survivors have trained is promised again on the new branch, and what the
//!   others had goes back with the first record. The work after that is handed out anew to the survivors, from the same cursor and pool,
//!   whether or not the first record carries another over (R20).
//! - **O7** Training that the chain has no more use for is stopped: where a rollback (R21) or a healed replica (R14) changes what the round is
//!   trained from or on. Where it changes neither, training goes on.
//! - **O8** A restarted peer trains the round in flight again, from the model of the record before last, if there is time.
//!
//! **What it costs.** Gradients are taken one record late: a step is made from where the model was, not from where it is, so the outer rate
//! that a run can bear is lower, and a round teaches a little less. A member that leaves loses one round's work, and a newcomer waits one round
//! longer. It pays where exchange and agreement take a good part of a round.

use rkyv::{Archive, Deserialize, Serialize};

use super::assignment::Assignment;
use super::chain::ChainState;
use super::event::TrainOrder;
use crate::config::RunConfig;
use crate::types::*;

/// One member's work in the round in flight.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Whose.
    pub member: PeerId,
    /// The speed that its quota was made from.
    pub speed: u64,
    /// Its batches, in the order to be trained.
    pub batches: Vec<DataRange>,
}

/// The work that the next record counts, as the record before the last handed it out.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct InFlight {
    /// The round whose model it is trained from.
    pub base: Round,
    /// That round's record.
    pub record: Hash,
    /// The root of that model; of the genesis model no record says it before the first.
    pub model_root: Option<Hash>,
    /// Tokens counted by then.
    pub tokens: u64,
    /// The seed after that record.
    pub seed: [u8; 32],
    /// Who has what, in hand-out order.
    pub shares: Vec<Share>,
}

impl InFlight {
    /// What `state` hands out, frozen; `model_root` is that of its model, where it is known.
    pub fn freeze(state: &ChainState, handed_out: &Assignment, model_root: Option<Hash>) -> Self {
        let shares = handed_out.members.iter().map(|(member, batches)| Share {
            member: *member,
            speed: state.member(member).map_or(0, |known| known.speed),
            batches: batches.clone(),
        });
        Self {
            base: state.agreed.round,
            record: state.agreed.record,
            model_root,
            tokens: state.agreed.tokens,
            seed: state.agreed.seed,
            shares: shares.collect(),
        }
    }

    /// Who has what.
    pub fn assignment(&self) -> Assignment {
        let members = self.shares.iter().map(|share| (share.member, share.batches.clone()));
        Assignment::of_members(members.collect())
    }

    /// Batches that it holds.
    pub fn batches(&self) -> u64 {
        let all = self.shares.iter().flat_map(|share| &share.batches);
        all.map(|range| range.len).sum()
    }
}

impl ChainState {
    /// The round whose model the next record's work is trained from (O1).
    pub fn base(&self) -> Round {
        self.agreed
            .in_flight
            .as_ref()
            .map_or(self.agreed.round, |work| work.base)
    }

    /// The root of that model, where `model_root` is that of the model after this state's record.
    pub fn base_root(&self, model_root: Hash) -> Hash {
        let frozen = self.agreed.in_flight.as_ref();
        frozen.and_then(|work| work.model_root).unwrap_or(model_root)
    }
}

/// A member's work in the round after `chain`, which anyone can derive.
pub fn train_order(chain: &ChainState, config: &RunConfig, member: &PeerId, until: Micros) -> TrainOrder {
    let Some(work) = &chain.agreed.in_flight else {
        return handed_out(chain, config, member, until);
    };
    let own = work.shares.iter().find(|share| share.member == *member);
    TrainOrder {
        base: work.base,
        parent: work.record,
        batches: own.map(|share| share.batches.clone()).unwrap_or_default(),
        global_tokens: work.tokens,
        seed: work.seed,
        ..common(chain, config, member, until)
    }
}

/// With overlap, a member's work in the round after that: what it does while the next record is agreed. Its accumulator isn't known yet (O5).
pub fn order_ahead(chain: &ChainState, config: &RunConfig, member: &PeerId, until: Micros) -> Option<TrainOrder> {
    chain.agreed.in_flight.as_ref()?;
    let ahead = handed_out(chain, config, member, until);
    Some(TrainOrder {
        round: ahead.round.next(),
        ..ahead
    })
}

/// What `chain` hands out to a member.
fn handed_out(chain: &ChainState, config: &RunConfig, member: &PeerId, until: Micros) -> TrainOrder {
    TrainOrder {
        batches: chain.hand_out(config).of(member).to_vec(),
        ..common(chain, config, member, until)
    }
}

/// Everything but the batches, of work that is handed out by `chain` itself.
fn common(chain: &ChainState, config: &RunConfig, member: &PeerId, until: Micros) -> TrainOrder {
    let zero = config.verification.accumulator_zero;
    TrainOrder {
        branch: chain.agreed.branch,
        round: chain.agreed.round.next(),
        base: chain.agreed.round,
        parent: chain.agreed.record,
        batches: Vec::new(),
        global_tokens: chain.agreed.tokens,
        seed: chain.agreed.seed,
        accumulator: chain.member(member).map_or(zero, |member| member.accumulator),
        until,
    }
}
