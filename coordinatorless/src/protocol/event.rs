//! What goes into the state machine and what comes out of it: [`Event`], [`Effect`], [`Timer`], [`Notice`].

use std::sync::Arc;

use super::chain::ChainState;
use super::speed::{self, SpeedTest};
use crate::types::*;
use crate::wire::Signed;

/// Something that happened to this peer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // made once, handled at once, never stored
pub enum Event {
    /// A message whose signature was verified ([`Signed::from_link`]), brought by transport peer `from` (not necessarily its signer).
    Message {
        /// Who handed it over.
        from: PeerId,
        /// The message.
        message: Arc<Signed>,
    },
    /// A timer set by [`Effect::SetTimer`] is due.
    Timer(Timer),
    /// The steps ordered by [`Effect::Train`] are done, or nothing came of them. Not said of what was stopped.
    TrainingEnded {
        /// The order's branch.
        branch: Branch,
        /// Its round.
        round: Round,
        /// Whether there is something to encode.
        fruitful: bool,
    },
    /// A local round is encoded; its shards are held and served.
    Trained(Trained),
    /// Every shard of this blob is held and decodes strictly.
    BlobHeld {
        /// The hash sequence.
        blob: Hash,
    },
    /// The blob was fetched and does not decode, or is longer than promised.
    BlobBad {
        /// The hash sequence.
        blob: Hash,
        /// Why.
        reason: String,
    },
    /// The model after `round` on `branch` is computed.
    Applied {
        /// The branch.
        branch: Branch,
        /// The round applied (0: the genesis model).
        round: Round,
        /// The model's root.
        model_root: Hash,
    },
    /// An audit ordered by [`Effect::Audit`] is done.
    Audited(Verdict),
    /// What [`Effect::Speed`] asked for is computed.
    SpeedAnswered(SpeedAnswer),
    /// An opening asked for by [`Effect::CheckSpeed`] was looked at, or this peer's own is there.
    SpeedChecked {
        /// Of which proof.
        key: speed::Key,
        /// Whether it holds, or why not.
        outcome: Result<(), String>,
    },
    /// Decided records asked for by [`Effect::AskRecords`] (or offered by anyone): consecutive, oldest first.
    Records {
        /// Who gave them.
        from: PeerId,
        /// The records.
        records: Vec<Arc<Decided>>,
    },
    /// The certified snapshot ordered by [`Effect::Resync`] is in place.
    Resynced {
        /// The round whose model is now held.
        round: Round,
        /// Its root.
        model_root: Hash,
    },
    /// The user wants to leave.
    Leave,
}

/// The result of a local round.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The branch that [`Encode`] named.
    pub branch: Branch,
    /// The round.
    pub round: Round,
    /// The shards' hashes in order.
    pub shards: Vec<Hash>,
    /// Bytes of all shards.
    pub len: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Mean loss in millionths of a nat per token.
    pub loss_micros: u64,
    /// Merkle root over inner-step states.
    pub trace_root: Hash,
    /// Accumulator root before.
    pub accumulator_before: Hash,
    /// Accumulator root after.
    pub accumulator_after: Hash,
}

/// A proof of speed to be begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpeedOrder {
    /// The branch.
    pub branch: Branch,
    /// The record that asks.
    pub asked: Round,
    /// Its seed.
    pub seed: [u8; 32],
    /// When the claim has to be with the others, on the core's clock.
    pub until: Micros,
}

/// What was computed for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpeedAnswer {
    /// The order's branch.
    pub branch: Branch,
    /// The record that asked.
    pub asked: Round,
    /// What was computed.
    pub chains: Vec<SpeedChain>,
    /// The root over the results.
    pub root: Hash,
}

/// Another member's opening to be fetched and looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpeedCheck {
    /// The branch.
    pub branch: Branch,
    /// The proof that it is of, with claim and draw.
    pub test: SpeedTest,
    /// Whom to ask, in this order; the member itself is the last.
    pub providers: Vec<PeerId>,
}

/// Work for one round, the same for everyone who computes it (R7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainOrder {
    /// The branch.
    pub branch: Branch,
    /// The round.
    pub round: Round,
    /// The round whose model is trained from: the one before, or with overlap (R16) the one before that.
    pub base: Round,
    /// The record of that round.
    pub parent: Hash,
    /// The batches, in the order to be trained.
    pub batches: Vec<DataRange>,
    /// Tokens counted over all members before this round: the learning-rate schedule's clock.
    pub global_tokens: u64,
    /// The seed of the round.
    pub seed: [u8; 32],
    /// The accumulator root this member must start from, as far as it is known when the order is given: [`Encode`] says it for good.
    pub accumulator: Hash,
    /// When to stop, on the core's clock.
    pub until: Micros,
}

/// What was trained is to be sent: accumulator, selection, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encode {
    /// The order, as it was given.
    pub work: TrainOrder,
    /// The branch to which it is promised: another than the order's, if there was a regroup in between.
    pub branch: Branch,
    /// The accumulator root to start from: that after the last counted commit.
    pub accumulator: Hash,
}

/// One member's round to replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditOrder {
    /// The audited round's work, as it was assigned (its `until` is meaningless).
    pub work: TrainOrder,
    /// Who is audited, with the signed commit.
    pub contribution: Contribution,
    /// 0 drawn by its own lot, 1 asked about an accusation like everyone who votes.
    pub draw: u8,
    /// What drew this peer, in the first draw.
    pub lot: Option<Lot>,
    /// The accusation to be confirmed or cleared, in the second draw.
    pub accusation: Option<Accused>,
    /// What the leaves of the accumulators to be opened follow from ([`AuditOrder::leaves`]).
    pub leaf_seed: [u8; 32],
}

/// What an audit is to confirm or to clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accused {
    /// Of what.
    pub finding: Finding,
    /// By whom: it may have what the member opened.
    pub by: PeerId,
    /// Whether it takes a replay to tell. Where a member is said to have told nothing, it is only asked.
    pub replay: bool,
}

/// Leaves of an accumulator that an audit opens.
pub const OPENED_LEAVES: usize = 100;

impl AuditOrder {
    /// Which of `count` leaves of an accumulator this audit opens, ascending; `None`: all of them, where there are few. Nobody but the
    /// auditor could know before it was drawn; afterwards anyone can work it out. The last one is always among them: it proves the length, so
    /// that who holds these leaves can hand them on.
    pub fn leaves(&self, count: u64) -> Option<Vec<u64>> {
        if count <= 4 * OPENED_LEAVES as u64 {
            return None;
        }
        let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/audit-leaves");
        let mut random = hasher.update(&self.leaf_seed).finalize_xof();
        let mut chosen = std::collections::BTreeSet::from([count - 1]);
        // A quarter at most is chosen, so this comes to an end soon.
        while chosen.len() < OPENED_LEAVES {
            let mut bytes = [0; 8];
            random.fill(&mut bytes);
            chosen.insert(u64::from_le_bytes(bytes) % count);
        }
        Some(chosen.into_iter().collect())
    }
}

/// Something for the driver to do. Effects are carried out in order; nothing after a [`Effect::Persist`] may leave this peer before
/// its bytes are on disk.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // made once, carried out at once, never stored
pub enum Effect {
    /// Append to the write-ahead log and fsync.
    Persist(Vec<u8>),
    /// A new height begins: what the log holds so far is no longer needed.
    ClearWal,
    /// Store a decided record, with the chain state after it.
    Store {
        /// The record and its certificate.
        decided: Arc<Decided>,
        /// The state after it.
        state: Arc<ChainState>,
    },
    /// To every member directly, over as many peers as there are.
    Broadcast(Signed),
    /// To these peers directly: in a crowd not everything concerns everyone.
    Multicast {
        /// Whom.
        to: Arc<[PeerId]>,
        /// What.
        message: Signed,
    },
    /// To one peer.
    Send(PeerId, Signed),
    /// Wake me at this time. A timer that is set again moves.
    SetTimer(Timer, Micros),
    /// Never mind.
    CancelTimer(Timer),
    /// Train, then [`Event::TrainingEnded`]. One at a time: the next is ordered once this one ended or was stopped.
    Train(TrainOrder),
    /// Encode what was trained, then [`Event::Trained`].
    Encode(Encode),
    /// Stop training for this round; whatever comes of it is not wanted any more.
    StopTraining(Round),
    /// Fetch these shards and check that they decode; then [`Event::BlobHeld`] or [`Event::BlobBad`]. Repeated with more providers.
    Fetch {
        /// Whose contribution.
        member: PeerId,
        /// Its commit: blob, shards, length.
        commit: Commit,
        /// Who is known to hold it, its author first.
        providers: Vec<PeerId>,
    },
    /// Apply the record's contributions to the model, fetching what is missing; then [`Event::Applied`]. A snapshot is due after
    /// rounds that are multiples of `storage.snapshot_rounds`.
    Apply(Arc<Decided>),
    /// Go back to the model after this round (records above it are void), then [`Event::Applied`] for it.
    Rollback {
        /// The branch whose records remain.
        branch: Branch,
        /// The round to go back to.
        round: Round,
    },
    /// This peer's model root is not the certified one (R14): get the certified model of this round; then [`Event::Resynced`].
    Resync {
        /// The round.
        round: Round,
        /// The certified root.
        model_root: Hash,
        /// Who may have it.
        providers: Vec<PeerId>,
    },
    /// Replay a member's round; then [`Event::Audited`].
    Audit(AuditOrder),
    /// Compute for a proof of speed, before anything else; then [`Event::SpeedAnswered`].
    Speed(SpeedOrder),
    /// Open what was drawn of this peer's own claim, and serve it; then [`Event::SpeedChecked`].
    OpenSpeed(Box<SpeedTest>),
    /// Fetch another member's opening and look at it; then [`Event::SpeedChecked`]. Repeated while there is none.
    CheckSpeed(Box<SpeedCheck>),
    /// Ask a peer for decided records from this round on; then [`Event::Records`].
    AskRecords {
        /// Whom.
        peer: PeerId,
        /// From which round on.
        from: Round,
    },
    /// Who is a member now: keep connections to these.
    Members(Vec<PeerId>),
    /// For the event log.
    Notice(Notice),
}

/// The timers of the state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// Heartbeat and repair, every second.
    Beat,
    /// This peer's own collection ends: propose with what is there (R10).
    Collect,
    /// The quiet moment after the last commit that could come has come.
    Settled,
    /// A timeout of the agreement engine.
    Agreement(AgreementTimer),
}

/// A timeout of the agreement, keyed by kind and view (trap 6 of the engine: it names no height, so the height is here).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgreementTimer {
    /// The branch.
    pub branch: Branch,
    /// The round.
    pub round: Round,
    /// The engine's kind of timeout, as a number of the agreement module's own.
    pub kind: u8,
    /// The view.
    pub view: View,
}

/// Something people or scripts may want to know (`events.jsonl`).
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant)] // a few a round, moved once
pub enum Notice {
    /// A record was decided. Model root and timings come with [`Notice::Advanced`].
    Decided {
        /// Branch.
        branch: Branch,
        /// Round.
        round: Round,
        /// The record's hash.
        record: Hash,
        /// The view that decided.
        view: View,
        /// Counted members and their tokens.
        contributors: Vec<(PeerId, u64)>,
        /// Token-weighted mean loss that members stated, in millionths.
        loss_micros: u64,
    },
    /// A decided record has been applied to the model.
    Advanced {
        /// Branch.
        branch: Branch,
        /// Round.
        round: Round,
        /// The record's hash.
        record: Hash,
        /// The root after applying it.
        model_root: Hash,
        /// Counted members and their tokens.
        contributors: Vec<(PeerId, u64)>,
        /// Token-weighted mean loss, in millionths.
        loss_micros: u64,
        /// Microseconds this peer trained in the round.
        train: Micros,
        /// From the end of its training to the last blob needed.
        exchange: Micros,
        /// From the last commit held to the decision.
        agree: Micros,
        /// From the decision before to this one.
        span: Micros,
        /// Of that, how long this peer was training, for whichever round.
        busy: Micros,
    },
    /// A member joined.
    Joined(PeerId, Round),
    /// A member lapsed.
    Lapsed(PeerId, Round),
    /// A member left.
    Left(PeerId, Round),
    /// Survivors went on as a new branch.
    Regrouped {
        /// The new branch.
        branch: Branch,
        /// Its first round.
        round: Round,
        /// Who goes on.
        survivors: Vec<PeerId>,
    },
    /// Records were taken from another branch, ours rolled back.
    Switched {
        /// From this branch.
        from: Branch,
        /// To this one.
        to: Branch,
        /// The fork: the last common round.
        fork: Round,
    },
    /// A branch was met that this peer may never join (R21b).
    PermanentSplit {
        /// The other branch.
        branch: Branch,
        /// The fork.
        fork: Round,
    },
    /// Records were fetched from others.
    CaughtUp {
        /// From.
        from: Round,
        /// To.
        to: Round,
    },
    /// A message, blob or record was refused.
    Rejected {
        /// Who sent or signed it.
        from: PeerId,
        /// The kind of thing.
        kind: &'static str,
        /// Why.
        reason: String,
    },
    /// A verdict entered a record.
    Audit(SignedVerdict),
    /// A proof of speed ended.
    Speed {
        /// Whose.
        member: PeerId,
        /// The record that asked for it.
        asked: Round,
        /// Operations a microsecond that it showed; `None`: it showed nothing.
        proven: Option<u64>,
    },
    /// Unvested points were taken.
    Slashed {
        /// Whose.
        member: PeerId,
        /// How many (GFLOP).
        points: u128,
        /// The round of the cheat.
        round: Round,
        /// What proves it, in plain words.
        proof: &'static str,
    },
    /// Points are not paid, as a round that was drawn was not opened, or its steps were not told.
    Unpaid {
        /// Whose.
        member: PeerId,
        /// How many (GFLOP).
        points: u128,
        /// The round.
        round: Round,
        /// What more than a third of the weight says.
        finding: Finding,
    },
    /// A finding that needs a person: what, in plain words.
    Warning(String),
}
