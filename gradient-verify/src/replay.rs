//! The audit: train the member's round again, and hold its bytes against the outcome.
//!
//! With e and e' the accumulators that the commit names, and `sent` what its shards decode to, an honest member has
//!
//! ```text
//! a  = fl(fl(beta * e) + d)        d: its pseudo-gradient
//! e' = fl(a - sent)
//! ```
//!
//! so its bytes say what its pseudo-gradient was: `claim = e' + sent - fl(beta * e)`, but for two roundings. The auditor computes d from agreed
//! state (model, batches, token count), compares the two, and checks that `sent` is the selection of `a` ([`crate::tolerance`]).
//!
//! Where auditor and member compute alike to the last bit, nothing need be tolerated: if the replay ends in the member's trace root and encodes to
//! its shards and its accumulator, the replay is exact. Nothing is concluded from a trace root that differs, nor from one that
//! agrees by itself: states reached honestly say nothing of what was sent.
//!
//! Of a long accumulator a hundred leaves are opened ([`crate::accumulator_proof`]). Training again gives all of d, the shards all of `sent`; claim and
//! selection are then looked at in these leaves alone. Work that was not done shows in all of them; what was falsified in some only, by chance.

use std::ops::Range;

use coordinatorless::protocol::event::AuditOrder;
use coordinatorless::types::{Commit, Hash, Trace};
use trainer::arms::Algorithm;
use trainer::compress::{ACCUMULATOR_LEAF, AnyCodec, Codec, CodecError, DecodeError};
use trainer::config::TrainingConfig;
use trainer::local::{LocalError, LocalRound, RoundInputs, local_round};
use trainer::model::Model;

use crate::accumulator_proof::open_leaves;
use crate::opening::{Opening, OpeningError, Which};
use crate::tolerance::{Distance, Selection, Sums};

/// One member's round and all that is needed to judge it.
pub struct Audit<'a> {
    /// A model of the run's shape, to replay with; what it holds does not matter. Device and threads set which bits come out.
    pub model: &'a mut Model,
    /// The run's training.
    pub training: &'a TrainingConfig,
    /// The run's way of training together.
    pub algorithm: &'a dyn Algorithm,
    /// The agreed parameters before the audited round, flat.
    pub theta: &'a [f32],
    /// The work as it was assigned, and the commit.
    pub order: &'a AuditOrder,
    /// The batches of `order.work`, by step from 0; `None` past the end, or if the data cannot be had.
    pub batches: &'a mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
    /// The contribution's shards, in the commit's order.
    pub shards: &'a [&'a [u8]],
    /// The leaves of the accumulators that are opened, ascending; `None`: all. Only where the codec's chunk is a leaf.
    pub leaves: Option<&'a [u64]>,
    /// What the commit's `accumulator_before` names: little-endian `f32`, one a parameter; or the proof of its `leaves`. Empty for zeros.
    pub accumulator_before: &'a [u8],
    /// What the commit's `accumulator_after` names.
    pub accumulator_after: &'a [u8],
    /// The root of an accumulator of zeros, which nobody sends.
    pub accumulator_zero: Hash,
}

/// What a replay showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// Relative L2 distance between the pseudo-gradient claimed and the one replayed; finite.
    pub distance: f64,
    /// Length of the one claimed, relative to the one replayed.
    pub norm_ratio: f64,
    /// Whether training, encoding and accumulator were reproduced bit for bit.
    pub exact: bool,
    /// Whether what was sent is what the codec makes of accumulator and pseudo-gradient.
    pub selection_ok: bool,
    /// Inner steps replayed: those that the commit claims.
    pub steps: u32,
    /// What they came to here: what an auditor binds itself to before it hears the member (`coordinatorless::protocol::replayed`).
    pub trace: Trace,
}

/// Why there is no comparison. Only where [`ReplayError::blames_member`] says so is it the member's doing.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// An accumulator is not the one committed to, or not one at all.
    #[error(transparent)]
    Opening(#[from] OpeningError),
    /// The commit claims work that was not assigned.
    #[error("the commit claims {tokens} tokens, but a step has {step_tokens} and at most {most} steps were to be done")]
    Work {
        /// Tokens claimed.
        tokens: u64,
        /// Tokens of one step.
        step_tokens: u64,
        /// Batches assigned, or the most steps of a round if that is less.
        most: u64,
    },
    /// A shard is missing, left over, or not the one committed to.
    #[error("shard {shard} is not the one that the commit names")]
    Shard {
        /// Its number from 0.
        shard: usize,
    },
    /// The shards do not decode. Members vote for what decodes, so a counted contribution that does not means that this peer's codec differs.
    #[error("a counted contribution does not decode: {0}")]
    Decode(#[from] DecodeError),
    /// Model, codec and configuration do not belong together.
    #[error("{what} has {found} parameters, the codec {expected}")]
    Params {
        /// What does not fit.
        what: &'static str,
        /// Parameters of the codec.
        expected: usize,
        /// Parameters found.
        found: usize,
    },
    /// What was replayed cannot be encoded.
    #[error("replay: {0}")]
    Codec(#[from] CodecError),
    /// The data could not be had.
    #[error("no batch for step {step} of the {claimed} that the commit claims")]
    MissingBatch {
        /// The first step without.
        step: u32,
        /// Steps claimed.
        claimed: u32,
    },
    /// Training failed here.
    #[error("replay: {0}")]
    Local(#[from] LocalError),
    /// Training here left the numbers.
    #[error("the replay's pseudo-gradient is {value} at parameter {index}")]
    Diverged {
        /// The first such parameter.
        index: usize,
        /// The value.
        value: f32,
    },
}

impl ReplayError {
    /// Whether the member's own signed word is what cannot be right. Everything else may be the auditor's or the network's fault and must accuse
    /// nobody.
    #[must_use]
    pub fn blames_member(&self) -> bool {
        match self {
            Self::Opening(OpeningError::Length { .. } | OpeningError::NotFinite { .. }) | Self::Work { .. } => true,
            Self::Opening(OpeningError::Root { .. } | OpeningError::Proof { .. })
            | Self::Shard { .. }
            | Self::Decode(_)
            | Self::Codec(_)
            | Self::Params { .. }
            | Self::MissingBatch { .. }
            | Self::Local(_)
            | Self::Diverged { .. } => false,
        }
    }
}

/// Trains the member's round again and compares.
///
/// # Errors
/// See [`ReplayError`]. All bytes are checked before anything is trained.
pub fn replay<'a>(audit: Audit<'a>) -> Result<Replay, ReplayError> {
    let Audit { algorithm, theta, .. } = audit;
    let codec = &*algorithm.codec_of(audit.order.work.round.0);
    let commit = &audit.order.contribution.commit;
    let models = [
        ("the agreed model", theta.len()),
        ("the model", audit.model.layout().total),
    ];
    if let Some((what, found)) = models.into_iter().find(|(_, found)| *found != codec.params()) {
        let expected = codec.params();
        return Err(ReplayError::Params { what, expected, found });
    }
    let steps = claimed_steps(audit.order, audit.training)?;
    check_shards(commit, audit.shards)?;
    let parts = parts(codec, audit.leaves)?;
    let zero = audit.accumulator_zero;
    let open = |which, bytes: &'a [u8], root: &Hash| -> Result<Opened<'a>, OpeningError> {
        if bytes.is_empty() && *root == zero {
            return Ok(Opened::Values(vec![0.0; parts.iter().map(|part| part.len()).sum()]));
        }
        match audit.leaves {
            None => Opening::open(which, bytes, root, codec.params()).map(Opened::Bytes),
            Some(leaves) => open_leaves(which, bytes, root, codec.params(), leaves).map(Opened::Values),
        }
    };
    let before = open(Which::Before, audit.accumulator_before, &commit.accumulator_before)?;
    let after = open(Which::After, audit.accumulator_after, &commit.accumulator_after)?;
    let sent = codec.to_dense(audit.shards)?;

    let round = train(audit.model, audit.training, theta, audit.order, audit.batches, steps)?;
    let claim = Claim {
        before,
        after,
        sent: &sent,
        parts: &parts,
    };
    let trace_root = round.trace_root;
    let trace = Trace::of(round.numbers);
    let vector = algorithm.vector(round.delta);
    let reproduced = || match audit.leaves {
        None => claim.is_reproduced(codec, audit.shards, &vector),
        Some(_) => claim.is_reproduced_in_part(codec, &vector),
    };
    if trace_root == commit.trace_root.0 && reproduced() {
        return Ok(Replay {
            distance: 0.0,
            norm_ratio: 1.0,
            exact: true,
            selection_ok: true,
            steps,
            trace,
        });
    }
    let (distance, selection_ok) = claim.compare(codec, &rounded(codec, vector)?, theta);
    Ok(Replay {
        distance: distance.relative,
        norm_ratio: distance.norm_ratio,
        exact: false,
        selection_ok,
        steps,
        trace,
    })
}

/// The steps that the commit claims: a prefix of the batches assigned, and no more than a round has.
fn claimed_steps(order: &AuditOrder, training: &TrainingConfig) -> Result<u32, ReplayError> {
    let (tokens, step_tokens) = (order.contribution.commit.tokens, training.tokens_per_step());
    let assigned = order
        .work
        .batches
        .iter()
        .fold(0u64, |sum, range| sum.saturating_add(range.len));
    let most = assigned.min(u64::from(training.max_inner_steps));
    let steps = tokens
        .checked_div(step_tokens)
        .filter(|steps| tokens % step_tokens == 0 && (1..=most).contains(steps));
    steps
        .and_then(|steps| u32::try_from(steps).ok())
        .ok_or(ReplayError::Work {
            tokens,
            step_tokens,
            most,
        })
}

fn check_shards(commit: &Commit, shards: &[&[u8]]) -> Result<(), ReplayError> {
    if let Some(shard) = (0..commit.shards.len().max(shards.len()))
        .find(|shard| shards.get(*shard).map(|bytes| Hash::of(bytes)).as_ref() != commit.shards.get(*shard))
    {
        return Err(ReplayError::Shard { shard });
    }
    Ok(())
}

/// What the codec leaves of a vector by itself. Eight bits round every value and keep nothing of what they lose; the others keep it, or lose nothing.
fn rounded(codec: &AnyCodec, vector: Vec<f32>) -> Result<Vec<f32>, ReplayError> {
    match codec {
        AnyCodec::Int8(codec) => Ok(codec.to_dense(&codec.encode(&[], &vector)?.shards)?),
        AnyCodec::Sparse(_) | AnyCodec::Levels(_) | AnyCodec::Dense(_) => Ok(vector),
    }
}

/// The member's round again, with exactly `steps` steps, however long it takes.
fn train(
    model: &mut Model,
    training: &TrainingConfig,
    theta: &[f32],
    order: &AuditOrder,
    batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
    steps: u32,
) -> Result<LocalRound, ReplayError> {
    let mut missing = None;
    let inputs = RoundInputs {
        theta,
        state: &[],
        global_tokens: order.work.global_tokens,
        batches: &mut |step| {
            let batch = batches(step);
            missing = missing.or(batch.is_none().then_some(step));
            batch
        },
        keep_going: &mut |done| done < steps,
        observe: &mut |step, loss| tracing::debug!(step, loss, "replayed"),
    };
    let result = local_round(model, training, inputs);
    if let Some(step) = missing {
        return Err(ReplayError::MissingBatch { step, claimed: steps });
    }
    let round = result?;
    match round.delta.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, &value)) => Err(ReplayError::Diverged { index, value }),
        None => Ok(round),
    }
}

/// The parameters that are compared, chunk by chunk: those of the leaves opened, or all.
fn parts(codec: &AnyCodec, leaves: Option<&[u64]>) -> Result<Vec<Range<usize>>, ReplayError> {
    // Of what a dense codec sends, any part can be looked at by itself.
    let chunk = match codec {
        AnyCodec::Sparse(codec) => codec.chunk(),
        AnyCodec::Levels(codec) => codec.chunk(),
        AnyCodec::Dense(_) | AnyCodec::Int8(_) => ACCUMULATOR_LEAF,
    };
    let part = |from: usize| from..from.saturating_add(chunk).min(codec.params());
    let Some(leaves) = leaves else {
        return Ok((0..codec.params()).step_by(chunk).map(part).collect());
    };
    if chunk != ACCUMULATOR_LEAF {
        return Err(ReplayError::Params {
            what: "a leaf",
            expected: chunk,
            found: ACCUMULATOR_LEAF,
        });
    }
    let from = |leaf: &u64| usize::try_from(*leaf).map_or(codec.params(), |leaf| leaf.saturating_mul(chunk));
    Ok(leaves.iter().map(|leaf| part(from(leaf).min(codec.params()))).collect())
}

/// An accumulator, or its opened leaves one after the other.
enum Opened<'a> {
    Bytes(Opening<'a>),
    Values(Vec<f32>),
}

impl Opened<'_> {
    fn values(&self) -> Box<dyn Iterator<Item = f32> + '_> {
        match self {
            Self::Bytes(opening) => Box::new(opening.values()),
            Self::Values(values) => Box::new(values.iter().copied()),
        }
    }
}

/// What the member's bytes say.
struct Claim<'a> {
    before: Opened<'a>,
    after: Opened<'a>,
    /// One value a parameter, zero where nothing was sent.
    sent: &'a [f32],
    /// What is looked at.
    parts: &'a [Range<usize>],
}

impl Claim<'_> {
    /// Whether encoding `delta` gives the same shards and the same accumulator, bit for bit.
    fn is_reproduced(&self, codec: &AnyCodec, shards: &[&[u8]], delta: &[f32]) -> bool {
        let before: Vec<f32> = self.before.values().collect();
        // A sum that is not finite is nothing an honest member has encoded; the comparison below says how far off it is.
        let Ok(encoded) = codec.encode(&before, delta) else {
            return false;
        };
        let bits = |value: f32| value.to_bits();
        encoded.shards == shards
            && encoded
                .accumulator
                .into_iter()
                .map(bits)
                .eq(self.after.values().map(bits))
    }

    /// Whether, in the leaves opened, what was kept is to the bit what is left of accumulator and `delta`, and what was sent is the selection of it.
    fn is_reproduced_in_part(&self, codec: &AnyCodec, delta: &[f32]) -> bool {
        let AnyCodec::Sparse(codec) = codec else { return false };
        let (mut before, mut after, mut selection) = (self.before.values(), self.after.values(), Selection::default());
        let mut kept = Vec::new();
        self.parts.iter().all(|part| {
            let (sent, delta) = (&self.sent[part.clone()], &delta[part.clone()]);
            kept.clear();
            kept.extend(after.by_ref().take(sent.len()));
            let values = kept.iter().zip(sent).zip(delta.iter().zip(before.by_ref()));
            let mut same = values.map(|((kept, sent), (delta, before))| {
                let sum = codec.beta() * before + delta;
                kept.to_bits() == (sum - sent).to_bits()
            });
            same.all(|same| same) && selection.follows(&kept, sent, codec.k())
        })
    }

    /// Distance between the pseudo-gradient claimed and `delta`, and whether the selection follows in every chunk.
    fn compare(&self, codec: &AnyCodec, delta: &[f32], theta: &[f32]) -> (Distance, bool) {
        let (mut before, mut after) = (self.before.values(), self.after.values());
        let (mut sums, mut selection, mut selection_ok) = (Sums::default(), Selection::default(), true);
        let (mut kept, mut claim) = (Vec::new(), Vec::new());
        // A dense codec reads no accumulator and leaves zeros: all that it took in, it sent.
        let beta = match codec {
            AnyCodec::Sparse(codec) => codec.beta(),
            AnyCodec::Levels(codec) => codec.beta(),
            AnyCodec::Dense(_) | AnyCodec::Int8(_) => 0.0,
        };
        for part in self.parts {
            let [sent, delta, theta] = [self.sent, delta, theta].map(|all| &all[part.clone()]);
            kept.clear();
            kept.extend(after.by_ref().take(sent.len()));
            claim.clear();
            let values = kept.iter().zip(sent).zip(before.by_ref());
            claim.extend(values.map(|((kept, sent), before)| {
                // The product is rounded as its author rounded it, the sum is exact.
                f64::from(*kept) + f64::from(*sent) - f64::from(beta * before)
            }));
            sums.add(&claim, delta, theta);
            selection_ok &= match codec {
                AnyCodec::Sparse(codec) => selection.follows(&kept, sent, codec.k()),
                AnyCodec::Levels(_) => Selection::in_order(&kept, sent),
                AnyCodec::Dense(_) | AnyCodec::Int8(_) => kept.iter().all(|kept| *kept == 0.0),
            };
        }
        (sums.distance(), selection_ok)
    }
}
