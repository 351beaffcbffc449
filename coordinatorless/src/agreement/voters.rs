//! Who votes on a record, with what weight, and in which order they propose (R5, R10).

use crate::types::*;

/// A voter and its weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Voter {
    pub(super) id: PeerId,
    pub(super) weight: u64,
}

/// The voters of one round, sorted by id, each with a weight above zero. The same on every peer that holds the same records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Voters {
    members: Vec<Voter>,
    total: u64,
    seed: [u8; 32],
    last: Vec<PeerId>,
}

impl Voters {
    /// The most weight one voter can have here. R5 keeps the sum at 2^32, so this is never met by a record that follows the rules;
    /// it keeps the engine's `3 * total` inside a `u64` whatever comes.
    const MAX_WEIGHT: u64 = 1 << 48;
    /// The most voters. R5 says 128; the rest is room for runs that choose otherwise.
    const MAX_VOTERS: usize = 1 << 12;

    /// The voters of a round. Who has no weight is no voter; of a peer named twice the larger weight counts. `seed` is that of the
    /// last record; `last` are the proposers whose views failed lately, who come last in the order of proposing (R10).
    pub fn new(mut voters: Vec<(PeerId, u64)>, seed: [u8; 32], mut last: Vec<PeerId>) -> Self {
        voters.retain(|(_, weight)| *weight > 0);
        voters.sort_unstable_by_key(|(id, weight)| (*id, std::cmp::Reverse(*weight)));
        voters.dedup_by_key(|(id, _)| *id);
        voters.truncate(Self::MAX_VOTERS);
        let members: Vec<Voter> = voters
            .into_iter()
            .map(|(id, weight)| Voter {
                id,
                weight: weight.min(Self::MAX_WEIGHT),
            })
            .collect();
        last.sort_unstable();
        last.dedup();
        Self {
            total: members.iter().map(|voter| voter.weight).sum(),
            members,
            seed,
            last,
        }
    }

    /// How many voters.
    pub fn len(&self) -> usize {
        self.members.len()
    }
    /// Whether nobody votes: nothing can be agreed on then.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
    /// The weight of a peer, 0 for one that does not vote.
    pub fn weight_of(&self, peer: &PeerId) -> u64 {
        self.find(peer).map_or(0, |voter| voter.weight)
    }
    /// How many voters come before this peer in the order of ids.
    pub fn rank(&self, peer: &PeerId) -> usize {
        self.members.partition_point(|voter| voter.id < *peer)
    }
    /// The weight of all voters together.
    pub fn total(&self) -> u64 {
        self.total
    }
    /// Whether `weight` is more than 2/3 of the total.
    pub fn quorum(&self, weight: u64) -> bool {
        3 * u128::from(weight) > 2 * u128::from(self.total)
    }
    /// Whether `weight` is more than 1/3 of the total, so that at least one of those behind it is honest.
    pub fn honest(&self, weight: u64) -> bool {
        3 * u128::from(weight) > u128::from(self.total)
    }
    /// Voters and weights, sorted by voter.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, u64)> + '_ {
        self.members.iter().map(|voter| (voter.id, voter.weight))
    }

    /// Who proposes in this view (R10): the views walk a weighted draw without replacement, so that each of `n` views in a row has
    /// another proposer; then the walk begins anew. Without voters it is the peer of zeros, whom nobody can be.
    pub fn proposer(&self, round: Round, view: View) -> PeerId {
        self.proposing(round, view).map_or(PeerId::default(), |voter| voter.id)
    }

    pub(super) fn find(&self, peer: &PeerId) -> Option<&Voter> {
        self.members
            .binary_search_by_key(peer, |voter| voter.id)
            .ok()
            .and_then(|at| self.members.get(at))
    }
    pub(super) fn at(&self, index: usize) -> Option<&Voter> {
        self.members.get(index)
    }

    pub(super) fn proposing(&self, round: Round, view: View) -> Option<&Voter> {
        let place = usize::try_from(view).ok()?.checked_rem(self.members.len())?;
        let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/proposer");
        let mut random = hasher.update(&self.seed).update(&round.0.to_le_bytes()).finalize_xof();
        let (mut late, mut first): (Vec<&Voter>, Vec<&Voter>) = self
            .members
            .iter()
            .partition(|voter| self.last.binary_search(&voter.id).is_ok());
        let mut drawn = None;
        for _ in 0..=place {
            let mut bytes = [0; 16];
            random.fill(&mut bytes);
            let pool = if first.is_empty() { &mut late } else { &mut first };
            drawn = draw(pool, u128::from_le_bytes(bytes));
        }
        drawn
    }
}

/// Takes one voter out of `pool`, each with a chance proportional to its weight. `random` is uniform over 128 bits and weights sum
/// to less than 2^60, so the bias of the remainder is below 2^-68.
fn draw<'a>(pool: &mut Vec<&'a Voter>, random: u128) -> Option<&'a Voter> {
    let total: u128 = pool.iter().map(|voter| u128::from(voter.weight)).sum();
    let mut ticket = random.checked_rem(total)?;
    let at = pool.iter().position(|voter| {
        let weight = u128::from(voter.weight);
        let hit = ticket < weight;
        if !hit {
            ticket -= weight;
        }
        hit
    })?;
    Some(pool.remove(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(byte: u8) -> PeerId {
        PeerId([byte; 32])
    }

    #[test]
    fn as_many_views_as_voters_have_as_many_proposers_then_repeat() {
        let voters = Voters::new(
            (1..=7).map(|n| (peer(n), u64::from(n) * 100)).collect(),
            [3; 32],
            vec![],
        );
        for round in 1..20 {
            let walk = |from: View| {
                (from..from + 7)
                    .map(|view| voters.proposer(Round(round), view))
                    .collect::<Vec<_>>()
            };
            let mut seen = walk(0);
            assert_eq!(seen, walk(7));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 7);
        }
    }

    #[test]
    fn those_who_failed_lately_propose_last() {
        let voters = Voters::new(
            (1..=5).map(|n| (peer(n), 10)).collect(),
            [9; 32],
            vec![peer(4), peer(2)],
        );
        for round in 1..50 {
            for view in 0..3 {
                let proposer = voters.proposer(Round(round), view);
                assert!(proposer != peer(2) && proposer != peer(4), "round {round} view {view}");
            }
        }
    }

    #[test]
    fn the_first_proposer_is_drawn_in_proportion_to_weight() {
        let voters = Voters::new(vec![(peer(1), 1), (peer(2), 3)], [5; 32], vec![]);
        let heavy = (0..4000)
            .filter(|round| voters.proposer(Round(*round), 0) == peer(2))
            .count();
        assert!(
            (2850..3150).contains(&heavy),
            "expected about 3000 of 4000, found {heavy}"
        );
    }

    #[test]
    fn exactly_two_thirds_is_no_quorum() {
        let voters = Voters::new(
            vec![(peer(1), 1), (peer(2), 1), (peer(3), 1), (peer(4), 0)],
            [0; 32],
            vec![],
        );
        assert_eq!((voters.len(), voters.total()), (3, 3));
        assert!(!voters.quorum(2));
        assert!(voters.quorum(3));
        assert_eq!(voters.weight_of(&peer(4)), 0);
    }

    #[test]
    fn nobody_proposes_where_nobody_votes() {
        let voters = Voters::new(vec![(peer(1), 0)], [0; 32], vec![]);
        assert!(voters.is_empty());
        assert_eq!(voters.proposer(Round(1), 0), PeerId::default());
    }
}
