//! Who trains on which batches (R7): one stream, one cursor, returned data first. Pure, so everyone knows everyone's batches.

use super::planted::{Bug, planted};
use crate::types::*;

/// A range given back this often by members who delivered nothing is given up as poison (R7).
pub const MAX_RETURNS: u8 = 3;

/// The assignment of a round, and what of cursor and pool it leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Each member's batches in the order they are to be trained; members in hand-out order.
    pub members: Vec<(PeerId, Vec<DataRange>)>,
    /// The cursor after it.
    pub cursor: BatchIndex,
    /// Returned data that nobody was given, sorted.
    pub pool: Vec<DataRange>,
    /// Where in `members` each is, sorted by id.
    places: Vec<(PeerId, usize)>,
}

impl Assignment {
    /// Hands out `quotas` batches, first from `pool`, then from the stream at `cursor`.
    pub fn new(quotas: &[(PeerId, u64)], mut cursor: BatchIndex, pool: &[DataRange]) -> Self {
        let mut pool: std::collections::VecDeque<DataRange> = pool.iter().copied().collect();
        let mut members = Vec::with_capacity(quotas.len());
        for (id, quota) in quotas {
            let (mut left, mut ranges) = (*quota, Vec::new());
            while left > 0
                && let Some(range) = pool.pop_front()
            {
                let (taken, rest) = split(range, left);
                left -= taken.len;
                ranges.push(taken);
                if let Some(rest) = rest {
                    pool.push_front(rest);
                }
            }
            if left > 0 {
                ranges.push(DataRange {
                    start: cursor,
                    len: left,
                    returns: 0,
                });
                cursor += left;
            }
            members.push((*id, ranges));
        }
        Self {
            cursor,
            pool: pool.into(),
            ..Self::of_members(members)
        }
    }

    /// One that was made earlier: these batches, with nothing left of cursor and pool to hand on.
    pub fn of_members(members: Vec<(PeerId, Vec<DataRange>)>) -> Self {
        let mut places: Vec<(PeerId, usize)> = members.iter().enumerate().map(|(at, (id, _))| (*id, at)).collect();
        places.sort_unstable();
        Self {
            members,
            cursor: 0,
            pool: Vec::new(),
            places,
        }
    }

    /// A member's batches; none if it has none.
    pub fn of(&self, member: &PeerId) -> &[DataRange] {
        let place = self.places.binary_search_by_key(member, |(id, _)| *id).ok();
        place
            .and_then(|at| self.members.get(self.places[at].1))
            .map_or(&[], |(_, ranges)| ranges)
    }

    /// How many batches a member has.
    pub fn quota(&self, member: &PeerId) -> u64 {
        self.of(member).iter().map(|range| range.len).sum()
    }

    /// What goes back when each member did a prefix of its batches: `(returned, retired)`, both sorted. Data of a member that was
    /// there and delivered nothing counts one return more; the rest of a member that ran out of time does not, nor does that of one
    /// who had gone by then (R16).
    pub fn leftovers(
        &self,
        done: impl Fn(&PeerId) -> u64,
        there: impl Fn(&PeerId) -> bool,
    ) -> (Vec<DataRange>, Vec<DataRange>) {
        let (mut returned, mut retired) = (Vec::new(), Vec::new());
        for (id, ranges) in &self.members {
            let mut skip = done(id);
            let silent = skip == 0 && there(id);
            for range in ranges {
                let used = if planted(Bug::CountTwice) {
                    0
                } else {
                    skip.min(range.len)
                };
                skip -= used;
                if used == range.len {
                    continue;
                }
                let returns = range.returns.saturating_add(u8::from(silent));
                let rest = DataRange {
                    start: range.start + used,
                    len: range.len - used,
                    returns,
                };
                if returns >= MAX_RETURNS {
                    retired.push(rest)
                } else {
                    returned.push(rest)
                }
            }
        }
        returned.sort();
        retired.sort();
        (returned, retired)
    }
}

fn split(range: DataRange, at_most: u64) -> (DataRange, Option<DataRange>) {
    if range.len <= at_most {
        return (range, None);
    }
    let taken = DataRange { len: at_most, ..range };
    (
        taken,
        Some(DataRange {
            start: range.start + at_most,
            len: range.len - at_most,
            ..range
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(n: u8) -> PeerId {
        PeerId([n; 32])
    }

    fn batches<'a>(ranges: impl IntoIterator<Item = &'a DataRange>) -> Vec<u64> {
        let mut all: Vec<u64> = ranges.into_iter().flat_map(|r| r.start..r.start + r.len).collect();
        all.sort();
        all
    }

    #[test]
    fn returned_data_goes_first_and_to_the_first_in_line() {
        let pool = [DataRange {
            start: 3,
            len: 2,
            returns: 1,
        }];
        let assignment = Assignment::new(&[(peer(1), 3), (peer(2), 2)], 100, &pool);
        assert_eq!(batches(assignment.of(&peer(1))), [3, 4, 100]);
        assert_eq!(batches(assignment.of(&peer(2))), [101, 102]);
        assert_eq!((assignment.cursor, assignment.pool.len()), (103, 0));
    }

    #[test]
    fn a_range_that_three_silent_members_had_is_retired() {
        let mut pool = vec![DataRange {
            start: 0,
            len: 4,
            returns: 0,
        }];
        for round in 1..=3 {
            let assignment = Assignment::new(&[(peer(1), 4)], 50, &pool);
            let (returned, retired) = assignment.leftovers(|_| 0, |_| true);
            assert_eq!(retired.len(), usize::from(round == 3));
            pool = returned;
        }
        assert!(pool.is_empty());
    }

    #[test]
    fn data_of_a_member_that_went_away_is_no_sign_of_poison() {
        let mut pool = vec![DataRange {
            start: 0,
            len: 4,
            returns: 0,
        }];
        for _ in 0..2 * MAX_RETURNS {
            let assignment = Assignment::new(&[(peer(1), 4)], 50, &pool);
            let (returned, retired) = assignment.leftovers(|_| 0, |_| false);
            assert_eq!((returned.as_slice(), retired.len()), (pool.as_slice(), 0));
            pool = returned;
        }
    }

    proptest! {
        /// Every batch below the cursor is either done, in the pool, returned or retired: exactly once.
        #[test]
        fn data_is_counted_exactly_once_or_returned(
            quotas in proptest::collection::vec(1u64..20, 1..6),
            done in proptest::collection::vec(0u64..25, 6),
            lens in proptest::collection::vec(1u64..9, 0..5),
        ) {
            let mut start = 0;
            let pool: Vec<_> = lens.iter().map(|len| {
                let range = DataRange { start, len: *len, returns: 0 };
                start += len;
                range
            }).collect();
            let quotas: Vec<_> = quotas.iter().enumerate().map(|(i, q)| (peer(i as u8), *q)).collect();
            let assignment = Assignment::new(&quotas, start, &pool);
            let did = |id: &PeerId| done[id.0[0] as usize].min(assignment.quota(id));
            let (returned, retired) = assignment.leftovers(did, |id| id.0[0] % 2 == 0);
            let mut seen = batches(assignment.pool.iter().chain(&returned).chain(&retired));
            for (id, ranges) in &assignment.members {
                let mine: Vec<u64> = ranges.iter().flat_map(|r| r.start..r.start + r.len).collect();
                seen.extend(mine.into_iter().take(did(id) as usize));
            }
            seen.sort();
            prop_assert_eq!(seen, (0..assignment.cursor).collect::<Vec<_>>());
        }
    }
}
