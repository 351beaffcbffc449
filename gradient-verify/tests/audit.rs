//! Audits from end to end on a tiny model: honest members agree to the bit or nearly so, every cheat is found, and hostile bytes accuse nobody
//! else.
#![allow(clippy::unwrap_used)]

use coordinatorless::protocol::event::{AuditOrder, TrainOrder};
use coordinatorless::types::*;
use gradient_verify::accumulator_proof::{leaf_count, prove};
use gradient_verify::{Audit, Replay, ReplayError, accumulator_bytes, explain, judge, malformed, replay, verdict};
use tch::Device;
use trainer::arms::Rounds;
use trainer::compress::{self, AnyCodec, Codec, DenseCodec, SparseCodec};
use trainer::config::{ModelConfig, TrainingConfig};
use trainer::local::{LocalRound, RoundInputs, local_round, set_threads};
use trainer::model::{Model, init_flat};

const STEPS: u32 = 8;
const BOUND: f64 = 0.02;

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 64,
        dim: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        ffn: 64,
        max_seq_len: 32,
        ..ModelConfig::demo()
    }
}

fn training() -> TrainingConfig {
    let mut training = TrainingConfig {
        seq_len: 16,
        batch_sequences: 4,
        max_inner_steps: STEPS,
        ..TrainingConfig::default()
    };
    training.schedule.warmup_tokens = 0;
    training
}

fn codec() -> AnyCodec {
    AnyCodec::Sparse(SparseCodec::new(tiny().param_count(), 4096, 64, 0.95).unwrap())
}

/// Four sequences of 17 tokens, other ones for another `salt`.
fn batch(salt: u32) -> Vec<Vec<u32>> {
    let token = |i: u32, j: u32| (salt.wrapping_mul(2_654_435_761) ^ ((i * 31 + j) * 40_503)) % 61;
    (0..4).map(|i| (0..17).map(|j| token(i, j)).collect()).collect()
}

fn train(theta: &[f32], batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>) -> LocalRound {
    set_threads(1);
    let mut model = Model::new(&tiny(), Device::Cpu).unwrap();
    let inputs = RoundInputs {
        theta,
        state: &[],
        global_tokens: 5000,
        batches,
        keep_going: &mut |_| true,
        observe: &mut |_, _| (),
    };
    local_round(&mut model, &training(), inputs).unwrap()
}

fn accumulator_root(values: &[f32]) -> Hash {
    Hash(compress::accumulator_root(values))
}

/// A member's round as the auditor gets it.
struct Case {
    codec: AnyCodec,
    theta: Vec<f32>,
    order: AuditOrder,
    shards: Vec<Vec<u8>>,
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Case {
    /// A commit of all steps, made of this pseudo-gradient, this accumulator and this trace root.
    fn new(theta: &[f32], before: &[f32], delta: &[f32], trace_root: [u8; 32]) -> Self {
        Self::of(codec(), theta, before, delta, trace_root)
    }

    /// The same with another codec.
    fn of(codec: AnyCodec, theta: &[f32], before: &[f32], delta: &[f32], trace_root: [u8; 32]) -> Self {
        let encoded = codec.encode(before, delta).unwrap();
        let slot = Slot {
            run: RunId([7; 32]),
            branch: 0,
            round: Round(7),
            view: 0,
        };
        let (accumulator_before, accumulator_after) =
            (accumulator_root(before), accumulator_root(&encoded.accumulator));
        let shards: Vec<Hash> = encoded.shards.iter().map(|shard| Hash::of(shard)).collect();
        let commit = Commit {
            slot,
            base: Round(6),
            parent: Hash::default(),
            model_root: Hash::default(),
            blob: Hash::default(),
            shards,
            len: encoded.shards.iter().map(|shard| shard.len() as u64).sum(),
            tokens: u64::from(STEPS) * training().tokens_per_step(),
            loss_micros: 0,
            trace_root: Hash(trace_root),
            accumulator_before,
            accumulator_after,
        };
        let batches = [(0, 5), (40, 7)].map(|(start, len)| DataRange { start, len, returns: 0 });
        let work = TrainOrder {
            branch: 0,
            round: slot.round,
            base: commit.base,
            parent: commit.parent,
            batches: batches.to_vec(),
            global_tokens: 5000,
            seed: [0; 32],
            accumulator: accumulator_before,
            until: 0,
        };
        let contribution = Contribution {
            member: PeerId([0xab; 32]),
            commit,
            signature: Signature([0; 64]),
        };
        Self {
            codec,
            theta: theta.to_vec(),
            order: AuditOrder {
                work,
                contribution,
                draw: 0,
                lot: None,
                accusation: None,
                leaf_seed: [0; 32],
            },
            shards: encoded.shards,
            before: accumulator_bytes(before),
            after: accumulator_bytes(&encoded.accumulator),
        }
    }

    /// Opens these bytes as e', and commits to them.
    fn keeping(mut self, after: Vec<u8>) -> Self {
        self.order.contribution.commit.accumulator_after = Hash::of(&after);
        self.after = after;
        self
    }

    /// Sends these shards, and commits to them.
    fn sending(mut self, shards: Vec<Vec<u8>>) -> Self {
        self.order.contribution.commit.shards = shards.iter().map(|shard| Hash::of(shard)).collect();
        self.shards = shards;
        self
    }

    fn replay_with(&self, batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>) -> Result<Replay, ReplayError> {
        self.replay_opened(batches, None, [&self.before, &self.after])
    }

    /// The same by these leaves alone.
    fn replay_leaves(&self, leaves: &[u64], before: &[u8], after: &[u8]) -> Result<Replay, ReplayError> {
        self.replay_opened(&mut |step| Some(batch(step)), Some(leaves), [before, after])
    }

    fn replay_opened(
        &self,
        batches: &mut dyn FnMut(u32) -> Option<Vec<Vec<u32>>>,
        leaves: Option<&[u64]>,
        [before, after]: [&[u8]; 2],
    ) -> Result<Replay, ReplayError> {
        set_threads(1);
        let shards: Vec<&[u8]> = self.shards.iter().map(Vec::as_slice).collect();
        replay(Audit {
            model: &mut Model::new(&tiny(), Device::Cpu).unwrap(),
            training: &training(),
            algorithm: &Rounds::new(self.codec.clone(), &training()).unwrap(),
            theta: &self.theta,
            order: &self.order,
            batches,
            shards: &shards,
            leaves,
            accumulator_before: before,
            accumulator_after: after,
            accumulator_zero: Hash(compress::accumulator_zero_root(tiny().param_count())),
        })
    }

    /// The same with the proofs that the member gives of them.
    fn by_leaves(&self, leaves: &[u64]) -> Result<Replay, ReplayError> {
        let [before, after] = [&self.before, &self.after].map(|bytes| prove(bytes, leaves).unwrap());
        self.replay_leaves(leaves, &before, &after)
    }

    fn replay(&self) -> Result<Replay, ReplayError> {
        self.replay_with(&mut |step| Some(batch(step)))
    }
}

fn theta() -> Vec<f32> {
    init_flat(&tiny(), 1)
}

/// An accumulator as it is in mid-run: that of two earlier rounds.
fn accumulator() -> Vec<f32> {
    (0..2).fold(vec![0.0; tiny().param_count()], |accumulator, round| {
        let delta = train(&theta(), &mut |step| Some(batch(100 + 10 * round + step))).delta;
        codec().encode(&accumulator, &delta).unwrap().accumulator
    })
}

fn honest_round() -> LocalRound {
    train(&theta(), &mut |step| Some(batch(step)))
}

fn honest() -> Case {
    let round = honest_round();
    Case::new(&theta(), &accumulator(), &round.delta, round.trace_root)
}

/// A cheat that commits to this pseudo-gradient and to the trace root of honest work.
fn claiming(delta: &[f32]) -> Case {
    Case::new(&theta(), &accumulator(), delta, honest_round().trace_root)
}

#[test]
fn an_honest_round_is_reproduced_to_the_bit() {
    let found = honest().replay().unwrap();
    assert_eq!(
        (
            found.distance,
            found.norm_ratio,
            found.exact,
            found.selection_ok,
            found.steps
        ),
        (0.0, 1.0, true, true, STEPS)
    );
    assert_eq!(judge(&found, BOUND), Finding::Agrees);
}

#[test]
fn an_honest_round_agrees_by_its_bytes_alone() {
    // Another trace root: as from other hardware, whose states differ in their last bits. Only the roundings of the claim remain.
    let round = honest_round();
    for accumulator in [vec![0.0; tiny().param_count()], accumulator()] {
        let found = Case::new(&theta(), &accumulator, &round.delta, [1; 32])
            .replay()
            .unwrap();
        assert!(!found.exact && found.selection_ok && found.distance < 1e-6, "{found:?}");
        assert!((found.norm_ratio - 1.0).abs() < 1e-6, "{found:?}");
    }
}

#[test]
fn an_honest_round_on_other_hardware_agrees() {
    // A hundred times the noise that honest fp32 replays show.
    let round = honest_round();
    let mut sign = 1.0;
    let noisy: Vec<f32> = round
        .delta
        .iter()
        .map(|delta| {
            sign = -sign;
            delta * (1.0 + sign * 1e-4)
        })
        .collect();
    let found = Case::new(&theta(), &accumulator(), &noisy, [1; 32]).replay().unwrap();
    assert!(
        (5e-5..2e-4).contains(&found.distance) && found.selection_ok,
        "{found:?}"
    );
    assert_eq!(judge(&found, BOUND), Finding::Agrees);
}

#[test]
fn skipping_half_of_the_batches_is_found() {
    let round = train(&theta(), &mut |step| (step < STEPS / 2).then(|| batch(step)));
    let found = Case::new(&theta(), &accumulator(), &round.delta, round.trace_root)
        .replay()
        .unwrap();
    assert!(found.distance > 0.3, "{found:?}");
    assert_eq!(judge(&found, BOUND), Finding::Differs);
    // The same batches again in place of the others.
    let round = train(&theta(), &mut |step| Some(batch(step % (STEPS / 2))));
    let found = claiming(&round.delta).replay().unwrap();
    assert!(found.distance > 0.3, "{found:?}");
}

#[test]
fn one_step_left_out_is_found() {
    let round = train(&theta(), &mut |step| (step < STEPS - 1).then(|| batch(step)));
    let found = claiming(&round.delta).replay().unwrap();
    assert_eq!(judge(&found, BOUND), Finding::Differs, "{found:?}");
}

#[test]
fn wrong_data_is_found() {
    let noise = |step: u32| {
        let token = |i: u32, j: u32| (step * 1_000_003 + i * 7919 + j * j * 104_729 + j * 31) % 64;
        Some((0..4).map(|i| (0..17).map(|j| token(i, j)).collect()).collect())
    };
    let found = claiming(&train(&theta(), &mut { noise }).delta).replay().unwrap();
    assert!(found.distance > 1.0, "{found:?}");
}

#[test]
fn scaling_sign_flips_and_idleness_are_found() {
    let round = honest_round();
    for (factor, distance) in [(1.2, 0.2), (-1.0, 2.0), (0.0, 1.0)] {
        let delta: Vec<f32> = round.delta.iter().map(|delta| delta * factor).collect();
        let found = claiming(&delta).replay().unwrap();
        assert!((found.distance - distance).abs() < 1e-4, "{factor}: {found:?}");
        assert!(
            (found.norm_ratio - f64::from(factor.abs())).abs() < 1e-4,
            "{factor}: {found:?}"
        );
        assert_eq!(judge(&found, BOUND), Finding::Differs, "{factor}");
    }
}

#[test]
fn every_value_sent_is_held_to_the_same() {
    let dense = || AnyCodec::Dense(DenseCodec::new(tiny().param_count()).unwrap());
    let (round, zeros) = (honest_round(), vec![0.0; tiny().param_count()]);
    let case = |delta: &[f32], trace| Case::of(dense(), &theta(), &zeros, delta, trace);
    let honest = case(&round.delta, round.trace_root).replay().unwrap();
    assert!(honest.exact && honest.selection_ok);
    let by_its_bytes = case(&round.delta, [1; 32]).replay().unwrap();
    assert!(!by_its_bytes.exact && by_its_bytes.selection_ok);
    assert!(by_its_bytes.distance < 1e-5, "{}", by_its_bytes.distance);
    let scaled: Vec<f32> = round.delta.iter().map(|value| 1.2 * value).collect();
    let found = case(&scaled, round.trace_root).replay().unwrap();
    assert!((found.distance - 0.2).abs() < 1e-3, "{}", found.distance);
    // What an accumulator could hide from a distance, it may not hold here.
    let kept: Vec<f32> = round
        .delta
        .iter()
        .zip(&scaled)
        .map(|(value, sent)| value - sent)
        .collect();
    let hidden = case(&scaled, round.trace_root)
        .keeping(accumulator_bytes(&kept))
        .replay()
        .unwrap();
    assert!(!hidden.selection_ok);
}

#[test]
fn a_false_accumulator_is_found() {
    let case = honest();
    // What was sent is still in it.
    let round = honest_round();
    let unspent: Vec<f32> = accumulator()
        .iter()
        .zip(&round.delta)
        .map(|(e, d)| 0.95 * e + d)
        .collect();
    let zeros = vec![0; case.after.len()];
    for after in [accumulator_bytes(&unspent), zeros] {
        let found = honest().keeping(after).replay().unwrap();
        assert!(!found.exact, "{found:?}");
        assert_eq!(judge(&found, BOUND), Finding::Differs, "{found:?}");
    }
}

#[test]
fn the_opposite_sent_is_found_whatever_the_accumulator_says() {
    // Honest work, but the signs sent are flipped; the accumulator takes the difference, so that the distance alone shows nothing.
    let case = honest();
    let codec = codec();
    let round = honest_round();
    let sum: Vec<f32> = accumulator()
        .iter()
        .zip(&round.delta)
        .map(|(e, d)| 0.95 * e + d)
        .collect();
    let minus: Vec<f32> = sum.iter().map(|value| -value).collect();
    let zeros = vec![0.0; sum.len()];
    let shards = codec.encode(&zeros, &minus).unwrap().shards;
    let sent = codec.to_dense(&shards).unwrap();
    let after: Vec<f32> = sum.iter().zip(&sent).map(|(sum, sent)| sum - sent).collect();
    let case = case.sending(shards).keeping(accumulator_bytes(&after));
    let found = case.replay().unwrap();
    assert!(
        found.distance < 1e-5 && !found.selection_ok && !found.exact,
        "{found:?}"
    );
    assert_eq!(judge(&found, BOUND), Finding::Differs);
    assert!(explain(&case.order, &found, BOUND).ends_with("what it sent is not what that work gives"));
}

#[test]
fn bytes_that_are_not_the_committed_ones_accuse_nobody() {
    let mut case = honest();
    case.after[5] ^= 1;
    assert!(!case.replay().unwrap_err().blames_member());
    let mut case = honest();
    case.before.truncate(8);
    assert!(!case.replay().unwrap_err().blames_member());
    let mut case = honest();
    case.shards[0][9] ^= 1;
    assert!(matches!(case.replay(), Err(ReplayError::Shard { shard: 0 })));
    case.shards.clear();
    assert!(matches!(case.replay(), Err(ReplayError::Shard { shard: 0 })));
    let mut case = honest();
    case.shards.push(Vec::new());
    assert!(matches!(case.replay(), Err(ReplayError::Shard { shard: 1 })));
}

#[test]
fn malformed_accumulators_that_were_committed_to_are_held_against_the_member() {
    let nan: Vec<u8> = accumulator_bytes(&vec![f32::NAN; tiny().param_count()]);
    for after in [Vec::new(), vec![0; 3], nan] {
        let error = honest().keeping(after).replay().unwrap_err();
        assert!(error.blames_member(), "{error}");
    }
    let verdict = malformed(&honest().order, BOUND);
    assert_eq!((verdict.finding, verdict.distance_nanos), (Finding::Differs, u64::MAX));
}

#[test]
fn extreme_but_finite_accumulators_give_a_finite_distance() {
    for value in [f32::MAX, f32::MIN, 1e-45] {
        let values = vec![value; tiny().param_count()];
        let mut case = honest().keeping(accumulator_bytes(&values));
        case.before = accumulator_bytes(&values);
        case.order.contribution.commit.accumulator_before = accumulator_root(&values);
        let found = case.replay().unwrap();
        assert!(found.distance.is_finite() && found.norm_ratio.is_finite(), "{found:?}");
        assert_eq!(judge(&found, BOUND), Finding::Differs, "{value}");
    }
}

#[test]
fn committed_shards_that_do_not_decode_are_an_error() {
    let mut shards = honest().shards;
    shards[0].push(0);
    assert!(matches!(honest().sending(shards).replay(), Err(ReplayError::Decode(_))));
}

#[test]
fn work_that_was_not_assigned_is_refused_unreplayed() {
    let step = training().tokens_per_step();
    for tokens in [0, 1, step - 1, step + 1, step * u64::from(STEPS + 1), u64::MAX] {
        let mut case = honest();
        case.order.contribution.commit.tokens = tokens;
        let error = case
            .replay_with(&mut |_| panic!("nothing is to be trained"))
            .unwrap_err();
        assert!(
            matches!(error, ReplayError::Work { .. }) && error.blames_member(),
            "{tokens}: {error}"
        );
    }
    let mut case = honest();
    case.order.work.batches = vec![DataRange {
        start: 0,
        len: 3,
        returns: 0,
    }];
    assert!(matches!(case.replay(), Err(ReplayError::Work { most: 3, .. })));
}

#[test]
fn data_that_cannot_be_had_accuse_nobody() {
    for have in [0, 3] {
        let result = honest().replay_with(&mut |step| (step < have).then(|| batch(step)));
        let error = result.unwrap_err();
        assert!(
            matches!(error, ReplayError::MissingBatch { step, claimed: STEPS } if step == have),
            "{error}"
        );
        assert!(!error.blames_member());
    }
}

#[test]
fn a_shorter_claim_is_replayed_only_as_far_as_it_goes() {
    let round = train(&theta(), &mut |step| (step < 3).then(|| batch(step)));
    let mut case = Case::new(&theta(), &accumulator(), &round.delta, round.trace_root);
    case.order.contribution.commit.tokens = 3 * training().tokens_per_step();
    let found = case.replay_with(&mut |step| Some(batch(step))).unwrap();
    assert!(found.exact && found.steps == 3, "{found:?}");
}

#[test]
fn a_few_leaves_show_what_the_whole_shows() {
    let count = leaf_count(tiny().param_count());
    assert!(count >= 5, "{count}");
    let leaves: Vec<u64> = (0..count).step_by(2).collect();
    let found = honest().by_leaves(&leaves).unwrap();
    assert!(found.exact && found.selection_ok && found.distance == 0.0, "{found:?}");
    let round = honest_round();
    let elsewhere = Case::new(&theta(), &accumulator(), &round.delta, [1; 32]);
    let found = elsewhere.by_leaves(&leaves).unwrap();
    assert!(!found.exact && found.selection_ok && found.distance < 1e-6, "{found:?}");
    for skipped in [1, STEPS / 2] {
        let done = STEPS - skipped;
        let lazy = train(&theta(), &mut |step| (step < done).then(|| batch(step)));
        let case = Case::new(&theta(), &accumulator(), &lazy.delta, lazy.trace_root);
        let (part, whole) = (case.by_leaves(&leaves).unwrap(), case.replay().unwrap());
        assert_eq!(judge(&part, BOUND), Finding::Differs);
        let ratio = part.distance / whole.distance;
        println!(
            "{skipped} of {STEPS} steps left out: {:.4} by {} of {count} leaves, {:.4} by all",
            part.distance,
            leaves.len(),
            whole.distance
        );
        assert!((0.5..2.0).contains(&ratio), "{} {}", part.distance, whole.distance);
    }
}

#[test]
fn a_newcomers_zeros_are_opened_by_saying_nothing() {
    let (round, zeros) = (honest_round(), vec![0.0; tiny().param_count()]);
    let case = Case::new(&theta(), &zeros, &round.delta, round.trace_root);
    let leaves = [1, 3];
    let after = prove(&case.after, &leaves).unwrap();
    let found = case.replay_leaves(&leaves, &[], &after).unwrap();
    assert!(found.exact && found.selection_ok, "{found:?}");
    // Who did not begin with zeros has something to show.
    assert!(
        !honest()
            .replay_leaves(&leaves, &[], &after)
            .unwrap_err()
            .blames_member()
    );
}

#[test]
fn a_leaf_that_was_falsified_is_found_where_it_is_opened() {
    let case = honest();
    let mut after = case.after.clone();
    // Three values a little larger in the third leaf.
    for at in [0, 40, 400] {
        let bytes = &mut after[3 * 16_384 + at..][..4];
        let value = f32::from_le_bytes(bytes.try_into().unwrap());
        bytes.copy_from_slice(&(value + 0.05).to_le_bytes());
    }
    let false_one = case.keeping(after);
    let found = false_one.by_leaves(&[0, 3]).unwrap();
    assert!(!found.exact);
    assert_eq!(judge(&found, BOUND), Finding::Differs, "{found:?}");
    // Elsewhere it does not show: the auditor's lot decides, which nobody knew when this was committed to.
    assert!(false_one.by_leaves(&[0, 2]).unwrap().exact);
    // A proof of other leaves than those asked for accuses nobody.
    let [before, after] = [&false_one.before, &false_one.after].map(|bytes| prove(bytes, &[0, 2]).unwrap());
    assert!(
        !false_one
            .replay_leaves(&[0, 3], &before, &after)
            .unwrap_err()
            .blames_member()
    );
}

#[test]
fn a_replay_gives_the_trace_whose_root_the_trainer_signed() {
    let round = honest_round();
    let trace = honest().replay().unwrap().trace;
    assert_eq!(trace.root(), Hash(round.trace_root));
    assert!(trace.steps().eq(round.numbers.iter().copied()));
    for steps in 0..5 {
        let leaves = &round.trace[..steps];
        let part = Trace(trace.0[..steps].to_vec());
        assert_eq!(part.root().0, trainer::local::trace_root(leaves), "{steps} steps");
        assert_eq!(trace.parts(&part, 1e-3), Some(steps));
    }
    // A quarter of the steps may stray, one more may not.
    let quarter = round.numbers.len() / 4;
    let mut bent = round.numbers.clone();
    bent[6..].iter_mut().take(quarter).for_each(|step| step.1 *= 1.002);
    assert_eq!(trace.parts(&Trace::of(bent.clone()), 1e-3), None);
    bent[5].0 = f32::NAN;
    assert_eq!(trace.parts(&Trace::of(bent.clone()), 1e-3), Some(5));
    assert_eq!(trace.parts(&Trace::of(bent), 1e-2), None);
}

#[test]
fn a_verdict_names_the_round_the_member_and_both_numbers() {
    let case = honest();
    let mut found = case.replay().unwrap();
    found.exact = false;
    found.distance = 0.713;
    let verdict = verdict(&case.order, &found, BOUND);
    let expected = Verdict {
        slot: case.order.contribution.commit.slot,
        member: PeerId([0xab; 32]),
        draw: 0,
        lot: None,
        finding: Finding::Differs,
        distance_nanos: 713_000_000,
        bound_nanos: 20_000_000,
        replayed: None,
    };
    assert_eq!(verdict, expected);
    assert_eq!(
        explain(&case.order, &found, BOUND),
        "peer ababababab claimed 8 steps in round 7; replaying them gives a pseudo-gradient that differs by 71.3% (allowed: 2%): it did not do \
         the work it claimed"
    );
}
