//! Who takes part, who votes with which weight (R5), and how much work each is given (R7, R15).

use rkyv::{Archive, Deserialize, Serialize};

use crate::config::RunConfig;
use crate::types::*;

/// Where a member stands.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Takes part.
    Active,
    /// Silent or gone; may join again and finds its weight and points as they faded.
    Away,
    /// Caught cheating; never again.
    Banned,
}

/// One member, as the agreed state knows it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its id.
    pub id: PeerId,
    /// Its VRF key.
    pub vrf_key: [u8; 32],
    /// Where it stands.
    pub standing: Standing,
    /// The first round that it takes part in (0: genesis).
    pub joined: Round,
    /// Tokens that the genesis credits it with per round of the window.
    pub genesis_tokens: u64,
    /// Counted tokens by round, oldest first, within the trailing window.
    pub work: Vec<(Round, u64)>,
    /// Verified throughput relative to the others; the mean over active members is [`MEAN_SPEED`].
    pub speed: u64,
    /// Rounds in a row without a counted contribution.
    pub uncounted: u32,
    /// Accumulator root after the last counted commit (R19).
    pub accumulator: Hash,
    /// Operations a microsecond that it showed last (`protocol::speed`); 0: none yet.
    pub proven: u64,
    /// Whether it was asked for a proof of speed since, and gave none.
    pub owes: bool,
}

impl Member {
    /// Whether work of this round was counted, as far as it is remembered: as long as it weighs or can be audited.
    pub fn worked_in(&self, round: Round) -> bool {
        self.work.iter().any(|(at, _)| *at == round)
    }
}

/// The speed of an average member.
pub const MEAN_SPEED: u64 = 1 << 20;
/// At most this many vote; anyone may train (R5).
pub const MAX_VOTERS: usize = 128;
/// Most members a run may have at once.
pub const MAX_MEMBERS: usize = 1024;
/// The largest sum of weights (R5): three times it is far below what the agreement engine can add.
const MAX_TOTAL_WEIGHT: u128 = 1 << 32;

/// Weights of all active members for `round` (R5), heaviest 128, sorted by id; those of weight 0 are left out.
pub fn weights(config: &RunConfig, members: &[Member], round: Round) -> Vec<(PeerId, u64)> {
    let window = config.membership.weight_window;
    let newest = round.0.saturating_sub(config.membership.weight_delay);
    let oldest = newest.saturating_sub(window);
    let fading = window.saturating_sub(newest);
    let mut raw: Vec<(PeerId, u128)> = members
        .iter()
        .filter(|member| member.standing == Standing::Active)
        .map(|member| {
            let worked = member.work.iter().filter(|(at, _)| at.0 > oldest && at.0 <= newest);
            let worked: u128 = worked.map(|(_, tokens)| u128::from(*tokens)).sum();
            (
                member.id,
                worked + u128::from(member.genesis_tokens) * u128::from(fading),
            )
        })
        .filter(|(_, weight)| *weight > 0)
        .collect();
    raw.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    raw.truncate(MAX_VOTERS);
    cap(&mut raw);
    let total: u128 = raw.iter().map(|(_, weight)| weight).sum();
    let mut scaled: Vec<(PeerId, u64)> = raw
        .into_iter()
        .map(|(id, weight)| {
            let weight = if total > MAX_TOTAL_WEIGHT - MAX_VOTERS as u128 {
                (weight * (MAX_TOTAL_WEIGHT - MAX_VOTERS as u128) / total).max(1)
            } else {
                weight
            };
            (id, u64::try_from(weight).unwrap_or(u64::MAX))
        })
        .collect();
    scaled.sort();
    scaled
}

/// From five voters on, nobody has more than a quarter of the total (R5). `raw` is sorted, heaviest first. With the `k` heaviest
/// capped at `c`, the total is `k*c + rest`, so `c = rest / (4 - k)`; the smallest `k` that leaves nobody above it is the answer.
fn cap(raw: &mut [(PeerId, u128)]) {
    if raw.len() < 5 {
        return;
    }
    let total: u128 = raw.iter().map(|(_, weight)| weight).sum();
    let mut rest = total;
    for k in 0..4usize {
        let limit = rest / (4 - k as u128);
        if raw[k].1 <= limit {
            if k > 0 {
                raw[..k].iter_mut().for_each(|(_, weight)| *weight = limit);
            }
            return;
        }
        rest -= raw[k].1;
    }
    // All four heaviest exceed every limit only when the rest weighs almost nothing: then they share alike.
    let limit = raw[4].1.max(1);
    raw[..4].iter_mut().for_each(|(_, weight)| *weight = limit);
}

/// Batches for each active member that may train in `round`, in the order in which data is handed out: the reliable first, so that
/// data which came back goes to those who deliver.
pub fn quotas(config: &RunConfig, members: &[Member], round: Round) -> Vec<(PeerId, u64)> {
    let mut ready: Vec<&Member> = members
        .iter()
        .filter(|member| member.standing == Standing::Active && member.joined <= round)
        .collect();
    ready.sort_by_key(|member| (member.uncounted, member.id));
    let total: u128 = ready.iter().map(|member| u128::from(member.speed)).sum::<u128>().max(1);
    let batches = u128::from(config.membership.round_batches);
    ready
        .into_iter()
        .map(|member| {
            let share = (batches * u128::from(member.speed) + total / 2) / total;
            let share = u64::try_from(share).unwrap_or(u64::MAX);
            (member.id, share.clamp(1, config.membership.max_quota))
        })
        .collect()
}

/// Throughput after a round in which `done` of `quota` batches were counted. A member that does all it is given may get more; one
/// that runs out of time gets what it did; one that delivers nothing gets half (R15), so that a dead peer soon costs nothing.
///
/// `asked` is the speed that the quota was made from: the present one, but with overlap (R16) that of a record before. What was done
/// is measured against it: measured against a speed that has been corrected meanwhile, the same shortfall would be taken off twice, and
/// quotas would swing for good.
pub fn speed_after(speed: u64, asked: u64, quota: u64, done: u64) -> u64 {
    let next = if done >= quota {
        speed.max(asked + asked / 8)
    } else if done > 0 {
        u64::try_from(u128::from(asked) * u128::from(2 * done + 1) / u128::from(2 * quota)).unwrap_or(asked)
    } else {
        speed / 2
    };
    next.clamp(MEAN_SPEED / 1024, MEAN_SPEED * 1024)
}

/// Scales the speeds of active members to the mean [`MEAN_SPEED`].
pub fn normalise_speeds(members: &mut [Member]) {
    let active = || |member: &&mut Member| member.standing == Standing::Active;
    let (count, total) = members
        .iter_mut()
        .filter(active())
        .fold((0u128, 0u128), |(n, t), m| (n + 1, t + u128::from(m.speed)));
    if count == 0 || total == 0 {
        return;
    }
    for member in members.iter_mut().filter(active()) {
        let scaled = u128::from(member.speed) * u128::from(MEAN_SPEED) * count / total;
        member.speed = u64::try_from(scaled).unwrap_or(MEAN_SPEED).max(MEAN_SPEED / 1024);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_of_five_has_more_than_a_quarter() {
        for weights in [
            [900u128, 40, 30, 20, 10],
            [50, 50, 50, 50, 1],
            [1, 1, 1, 1, 1],
            [400, 390, 5, 5, 5],
        ] {
            let mut raw: Vec<_> = weights
                .iter()
                .enumerate()
                .map(|(i, w)| (PeerId([i as u8; 32]), *w))
                .collect();
            cap(&mut raw);
            let total: u128 = raw.iter().map(|(_, w)| w).sum();
            assert!(
                raw.iter().all(|(_, w)| *w > 0 && w * 4 <= total + 4),
                "{weights:?} -> {raw:?}"
            );
        }
    }

    #[test]
    fn a_member_that_delivers_nothing_soon_gets_little() {
        let mut speed = MEAN_SPEED;
        for _ in 0..4 {
            speed = speed_after(speed, speed, 15, 0);
        }
        assert_eq!(speed, MEAN_SPEED / 16);
        assert!(speed_after(MEAN_SPEED, MEAN_SPEED, 10, 10) > MEAN_SPEED);
        let half = speed_after(MEAN_SPEED, MEAN_SPEED, 10, 5);
        assert!(half > MEAN_SPEED / 2 && half < MEAN_SPEED * 6 / 10);
    }

    #[test]
    fn a_quota_made_a_record_ago_settles_on_what_a_member_can_do() {
        // It does a quarter of what the mean does; what it is given follows from the speed of a record before.
        let (mut asked, mut speed) = (MEAN_SPEED, MEAN_SPEED);
        let given = |speed: u64| (speed * 40 / MEAN_SPEED).max(1);
        let mut last = Vec::new();
        for round in 0..24 {
            let quota = given(asked);
            let next = speed_after(speed, asked, quota, quota.min(10));
            (asked, speed) = (speed, next);
            if round >= 8 {
                last.push(given(speed));
            }
        }
        assert!(last.iter().all(|quota| (9..=13).contains(quota)), "{last:?}");
    }
}
