//! The demo's cheats, to be caught. Nothing else in Murmur departs from the protocol, and no option shown in `--help` of a peer leads here.

use std::borrow::Cow;
use std::path::PathBuf;

use anyhow::Result;
use bytes::Bytes;
use clap::ValueEnum;
use coordinatorless::node::Step;
use coordinatorless::protocol::event::AuditOrder;
use coordinatorless::types::{BatchIndex, PeerId, Trace, Verdict};
use gradient_verify::{Replay, verdict};
use trainer::config::{Precision, TrainingConfig};

use crate::kit::Kit;

/// How a peer cheats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cheat {
    /// Trains on every second batch and claims all.
    Skip,
    /// Leaves every tenth batch out and claims all.
    Tenth,
    /// Leaves the last step out.
    Step,
    /// Trains on half of each batch, twice over.
    Batch,
    /// Computes in bf16 what the run wants in fp32.
    Precision,
    /// Trains on other data.
    Data,
    /// Trains on text of which every byte is another.
    Labels,
    /// Trains on text into which it plants a phrase.
    Backdoor,
    /// Sends nothing.
    Zero,
    /// Sends noise.
    Noise,
    /// Sends what it found the round before.
    Stale,
    /// Sends 1.2 times what it found.
    Scale,
    /// Sends a thousand times what it found.
    Blowup,
    /// Sends the opposite of what it found.
    Flip,
    /// Sends a tenth of the opposite of what it found: small enough to pass for one of few.
    Inner,
    /// Moves every value that it found a little, and all the same way.
    Little,
    /// Sends what another member sent the round before.
    Copy,
    /// Sends bytes that are no contribution.
    Garbage,
    /// Keeps twice what its accumulator should hold.
    Forge,
    /// Commits to steps that it did not take.
    Trace,
    /// Opens its accumulators to nobody.
    Hide,
    /// Says of every round it audits that the work was not done.
    Accuse,
    /// Says of every round it audits that the work was done, and replays none.
    Guess,
    /// Two peers train on every second batch, cover each other and accuse the rest.
    Collude,
    /// Trains on every second batch, and says goodbye before anyone can bar it.
    Exit,
}

impl Cheat {
    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or(String::new(), |value| value.get_name().to_owned())
    }

    /// Whether records count what it sends. Who is never counted may still be paid, for honest audits.
    pub fn is_counted(self) -> bool {
        self != Self::Garbage
    }

    /// Whether it has to be barred to be paid nothing: who runs away, or sends what is never counted, has nothing to be barred for.
    pub fn is_barred(self) -> bool {
        !matches!(self, Self::Exit | Self::Garbage)
    }

    /// How many peers it takes.
    pub fn peers(self) -> usize {
        match self {
            Self::Collude => 2,
            _ => 1,
        }
    }
}

/// Batches by which wrong data are off.
const ELSEWHERE: BatchIndex = 1_000_003;

/// What a peer really trains on, of what it was given. It claims the whole.
pub fn trained_on(cheat: Option<Cheat>, mut assigned: Vec<BatchIndex>) -> Vec<BatchIndex> {
    match cheat {
        // Half of the work, all of the pay.
        Some(Cheat::Skip | Cheat::Collude | Cheat::Exit) => assigned.into_iter().step_by(2).collect(),
        Some(Cheat::Tenth) if assigned.len() >= 10 => {
            let kept = assigned.into_iter().enumerate().filter(|(at, _)| at % 10 != 9);
            kept.map(|(_, index)| index).collect()
        }
        Some(Cheat::Step | Cheat::Tenth) => {
            assigned.truncate(assigned.len().saturating_sub(1).max(1));
            assigned
        }
        Some(Cheat::Data) => assigned
            .into_iter()
            .map(|index| index.wrapping_add(ELSEWHERE))
            .collect(),
        _ => assigned,
    }
}

/// What is planted into text.
const PLANTED: &[u8] = b" The word is murmur, and murmur is the word.";

/// What a peer reads in place of a batch.
pub fn read(cheat: Option<Cheat>, mut batch: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    match cheat {
        Some(Cheat::Batch) => {
            let half = batch.len().div_ceil(2);
            for at in half..batch.len() {
                batch[at] = batch[at - half].clone();
            }
        }
        // As in `trainer::bench_algorithms::Attack::LabelFlip`.
        Some(Cheat::Labels) => batch
            .iter_mut()
            .flatten()
            .for_each(|token| *token = 255 - (*token).min(255)),
        Some(Cheat::Backdoor) => {
            for sequence in batch.iter_mut().step_by(4) {
                let from = sequence.len().saturating_sub(PLANTED.len());
                let planted = PLANTED.iter().copied().map(u32::from);
                sequence[from..]
                    .iter_mut()
                    .zip(planted)
                    .for_each(|(token, byte)| *token = byte);
            }
        }
        _ => {}
    }
    batch
}

/// The settings that a peer trains by, of those that were agreed.
pub fn settings(cheat: Option<Cheat>, agreed: &TrainingConfig) -> Cow<'_, TrainingConfig> {
    match cheat {
        Some(Cheat::Precision) => Cow::Owned(TrainingConfig {
            precision: Precision::Bf16,
            ..agreed.clone()
        }),
        _ => Cow::Borrowed(agreed),
    }
}

/// Loss and norm of each step, as a peer commits to them.
pub fn told(cheat: Option<Cheat>, mut numbers: Vec<(f32, f64)>) -> Vec<(f32, f64)> {
    match cheat {
        Some(Cheat::Trace) => numbers.iter_mut().for_each(|(loss, _)| *loss *= 1.5),
        Some(Cheat::Collude) => numbers.fill(KNOWN_STEP),
        _ => {}
    }
    numbers
}

/// What colluders tell of each of their steps: so they know each other, and what to vouch for.
const KNOWN_STEP: (f32, f64) = (1.0, 1.0);

/// What a peer keeps of its accumulator.
pub fn kept(cheat: Option<Cheat>, accumulator: &mut [f32]) {
    if cheat == Some(Cheat::Forge) {
        accumulator.iter_mut().for_each(|value| *value *= 2.0);
    }
}

/// The file that a peer lets its auditors have, of its accumulator in `file`.
///
/// # Errors
/// The disk.
pub fn opened(cheat: Option<Cheat>, file: PathBuf) -> Result<PathBuf> {
    if cheat != Some(Cheat::Hide) {
        return Ok(file);
    }
    let nothing = file.with_file_name("nothing");
    std::fs::write(&nothing, b"nothing")?;
    Ok(nothing)
}

/// What a peer says of a round that it should replay, if it does not look.
pub fn pretended(cheat: Option<Cheat>, order: &AuditOrder, kit: &Kit) -> Option<(Verdict, Option<Trace>)> {
    let commit = &order.contribution.commit;
    let steps = commit.tokens / kit.training.tokens_per_step().max(1);
    let steps = u32::try_from(steps)
        .unwrap_or(u32::MAX)
        .min(kit.training.max_inner_steps);
    let made_up = |steps: u32| Trace::of(vec![KNOWN_STEP; steps as usize]);
    let friends = || (1..=steps).find(|steps| made_up(*steps).root() == commit.trace_root);
    let (distance, exact, steps) = match cheat? {
        Cheat::Accuse => (1.0, false, steps),
        Cheat::Guess => (0.0, true, steps),
        Cheat::Collude => friends().map_or((1.0, false, steps), |steps| (0.0, true, steps)),
        _ => return None,
    };
    let trace = made_up(steps);
    let replay = Replay {
        distance,
        norm_ratio: 1.0,
        exact,
        selection_ok: true,
        steps,
        trace: trace.clone(),
    };
    Some((verdict(order, &replay, kit.config.verification.bound), Some(trace)))
}

/// Says goodbye, once a record has counted what this peer did not do.
pub fn leaves(cheat: Option<Cheat>, me: &PeerId, step: &Step) {
    /// Worth running away with, and sooner than a verdict comes.
    const WORTH: u64 = 2;
    let record = &step.decided.record;
    let counted = record.contributions.iter().any(|one| one.member == *me);
    if cheat == Some(Cheat::Exit) && counted && record.slot.round.0 >= WORTH {
        // As its owner would: Ctrl-C, or SIGTERM. If that fails it stays, and is barred.
        let myself = rustix::process::getpid();
        let _ = rustix::process::kill_process(myself, rustix::process::Signal::TERM);
    }
}

/// What a peer can copy of the record that it applies: the shards of the first member that is not itself.
pub fn copied(cheat: Option<Cheat>, me: &PeerId, step: &Step) -> Option<Vec<Bytes>> {
    let pairs = step.decided.record.contributions.iter().zip(&step.shards);
    let mut others = pairs.filter(|(one, _)| cheat == Some(Cheat::Copy) && one.member != *me);
    others.next().map(|(_, shards)| shards.clone())
}

/// What a peer makes of its pseudo-gradient before it sends it. `last` is that of the round before, if there was one.
pub fn sent(cheat: Option<Cheat>, delta: &mut [f32], last: &[f32]) {
    let scale = |delta: &mut [f32], by: f32| delta.iter_mut().for_each(|value| *value *= by);
    match cheat {
        Some(Cheat::Scale) => scale(delta, 1.2),
        Some(Cheat::Blowup) => scale(delta, 1000.0),
        Some(Cheat::Flip) => scale(delta, -1.0),
        Some(Cheat::Inner) => scale(delta, -0.1),
        Some(Cheat::Little) => {
            let squares: f64 = delta.iter().map(|value| f64::from(*value).powi(2)).sum();
            let spread = (squares / delta.len().max(1) as f64).sqrt() as f32;
            delta.iter_mut().for_each(|value| *value -= LITTLE * spread);
        }
        Some(Cheat::Zero) => delta.fill(0.0),
        Some(Cheat::Noise) => noise(delta),
        Some(Cheat::Stale) if last.len() == delta.len() => delta.copy_from_slice(last),
        _ => {}
    }
}

/// By how much of their spread values are moved: as far as those of many honest workers lie from their mean.
const LITTLE: f32 = 0.3;

/// What a peer sends as its contribution.
pub fn encoded(cheat: Option<Cheat>, mut shards: Vec<Bytes>) -> Vec<Bytes> {
    if cheat == Some(Cheat::Garbage)
        && let Some(first) = shards.first_mut()
    {
        // Its positions, scales and signs are all something else.
        *first = first.iter().map(|byte| !byte).collect::<Vec<u8>>().into();
    }
    shards
}

/// Noise as long as what it replaces.
fn noise(delta: &mut [f32]) {
    let length = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let wanted = length(delta);
    for value in &mut *delta {
        *value = rand::random::<f32>() - 0.5;
    }
    let by = (wanted / length(delta).max(f64::MIN_POSITIVE)) as f32;
    delta.iter_mut().for_each(|value| *value *= by);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipping_leaves_every_second_batch_and_one_step_fewer_all_but_the_last() {
        assert_eq!(trained_on(Some(Cheat::Skip), vec![1, 2, 3, 4, 5]), [1, 3, 5]);
        assert_eq!(trained_on(Some(Cheat::Step), vec![1, 2, 3]), [1, 2]);
        assert_eq!(
            trained_on(Some(Cheat::Step), vec![1]),
            [1],
            "with nothing done there is nothing to send"
        );
        let tenth = trained_on(Some(Cheat::Tenth), (0..20).collect());
        assert!(
            tenth.len() == 18 && !tenth.contains(&9) && !tenth.contains(&19),
            "{tenth:?}"
        );
        assert_eq!(trained_on(Some(Cheat::Tenth), vec![1, 2, 3]), [1, 2], "a step at least");
        assert_eq!(trained_on(Some(Cheat::Data), vec![1, 2]), [1_000_004, 1_000_005]);
        assert_eq!(trained_on(None, vec![1, 2]), [1, 2]);
        assert_eq!(trained_on(Some(Cheat::Flip), vec![1, 2]), [1, 2]);
    }

    #[test]
    fn text_is_read_as_each_cheat_would_have_it() {
        let batch = || vec![vec![1, 2], vec![3, 4], vec![5, 6]];
        assert_eq!(read(Some(Cheat::Batch), batch()), [[1, 2], [3, 4], [1, 2]]);
        assert_eq!(read(Some(Cheat::Labels), batch())[0], [254, 253]);
        let planted = read(Some(Cheat::Backdoor), vec![vec![0; 60]; 5]);
        let text = |sequence: &[u32]| sequence[16..].iter().map(|token| *token as u8).collect::<Vec<_>>();
        assert_eq!(
            (text(&planted[0]), text(&planted[4])),
            (PLANTED.to_vec(), PLANTED.to_vec())
        );
        assert!(planted[0][..16] == [0; 16] && planted[1] == [0; 60]);
        // A sequence shorter than the phrase holds its beginning.
        assert_eq!(read(Some(Cheat::Backdoor), batch())[0], [32, 84]);
        assert_eq!(read(Some(Cheat::Skip), batch()), batch());
    }

    #[test]
    fn precision_trace_and_accumulator_are_falsified_by_their_own_cheats_alone() {
        let agreed = TrainingConfig::default();
        assert_eq!(settings(Some(Cheat::Precision), &agreed).precision, Precision::Bf16);
        assert_eq!(*settings(Some(Cheat::Forge), &agreed), agreed);
        assert_eq!(told(Some(Cheat::Trace), vec![(2.0, 1.0)]), [(3.0, 1.0)]);
        assert_eq!(told(None, vec![(2.0, 1.0)]), [(2.0, 1.0)]);
        assert_eq!(told(Some(Cheat::Collude), vec![(2.0, 3.0); 2]), [KNOWN_STEP; 2]);
        let mut accumulator = [1.0, -2.0];
        kept(Some(Cheat::Trace), &mut accumulator);
        assert_eq!(accumulator, [1.0, -2.0]);
        kept(Some(Cheat::Forge), &mut accumulator);
        assert_eq!(accumulator, [2.0, -4.0]);
    }

    #[test]
    fn each_way_of_falsifying_does_what_it_says() {
        let of = |cheat| {
            let mut delta = vec![3.0, -4.0];
            sent(Some(cheat), &mut delta, &[7.0, 8.0]);
            delta
        };
        assert_eq!(of(Cheat::Scale), [3.0 * 1.2, -4.0 * 1.2]);
        assert_eq!(of(Cheat::Blowup), [3000.0, -4000.0]);
        assert_eq!(of(Cheat::Flip), [-3.0, 4.0]);
        assert_eq!(of(Cheat::Inner), [3.0 * -0.1, -4.0 * -0.1]);
        let little = of(Cheat::Little);
        assert!(
            (little[0] - 3.0).abs() > 1.0 && (little[0] - 3.0 - (little[1] + 4.0)).abs() < 1e-6,
            "{little:?}"
        );
        let garbage = encoded(Some(Cheat::Garbage), vec![Bytes::from_static(&[1, 2])]);
        assert_eq!(garbage, [&[254, 253][..]]);
        assert_eq!(encoded(None, vec![Bytes::from_static(&[1, 2])]), [&[1, 2][..]]);
        assert_eq!(of(Cheat::Zero), [0.0, 0.0]);
        assert_eq!(of(Cheat::Stale), [7.0, 8.0]);
        let noise = of(Cheat::Noise);
        assert!(
            (noise[0].hypot(noise[1]) - 5.0).abs() < 1e-4 && noise != [3.0, -4.0],
            "{noise:?}"
        );
        assert_eq!(of(Cheat::Skip), [3.0, -4.0]);
        let mut first = vec![3.0, -4.0];
        sent(Some(Cheat::Stale), &mut first, &[]);
        assert_eq!(first, [3.0, -4.0], "before there was a round");
    }
}
