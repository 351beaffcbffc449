//! The demo's cheats, to be caught. Nothing else in Murmur departs from the protocol, and no option shown in `--help` of a peer leads here.

use coordinatorless::types::BatchIndex;

use crate::cli::Cheat;

/// Batches by which wrong data are off.
const ELSEWHERE: BatchIndex = 1_000_003;

/// What a peer really trains on, of what it was given. It claims the whole.
pub fn trained_on(cheat: Option<Cheat>, mut assigned: Vec<BatchIndex>) -> Vec<BatchIndex> {
    match cheat {
        // Half of the work, all of the pay.
        Some(Cheat::Skip) => assigned.into_iter().step_by(2).collect(),
        Some(Cheat::Step) => {
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

/// What a peer makes of its pseudo-gradient before it sends it. `last` is that of the round before, if there was one.
pub fn sent(cheat: Option<Cheat>, delta: &mut [f32], last: &[f32]) {
    let scale = |delta: &mut [f32], by: f32| delta.iter_mut().for_each(|value| *value *= by);
    match cheat {
        Some(Cheat::Scale) => scale(delta, 1.2),
        Some(Cheat::Blowup) => scale(delta, 1000.0),
        Some(Cheat::Flip) => scale(delta, -1.0),
        Some(Cheat::Zero) => delta.fill(0.0),
        Some(Cheat::Noise) => noise(delta),
        Some(Cheat::Stale) if last.len() == delta.len() => delta.copy_from_slice(last),
        _ => {}
    }
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
        assert_eq!(trained_on(Some(Cheat::Data), vec![1, 2]), [1_000_004, 1_000_005]);
        assert_eq!(trained_on(None, vec![1, 2]), [1, 2]);
        assert_eq!(trained_on(Some(Cheat::Flip), vec![1, 2]), [1, 2]);
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
