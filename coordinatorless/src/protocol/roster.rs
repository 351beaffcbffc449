//! Who tells what to whom. Few members tell each other everything; a crowd of them cannot, because messages would grow with its
//! square.
//!
//! Up to [`CROWD`] members, every message goes to every member. Above:
//! - commits, ballots, requests and verdicts go to the voters (at most 128, R5), who alone decide;
//! - a voter's [`Have`] goes to the voters, and to the members it watches;
//! - any other member's goes to its [`WATCHERS`] voters, drawn by a hash of run, member and voter. What they hear directly, they say
//!   in their own bitmaps, and the others take it from there, one step and no further: nobody's echo keeps a dead member alive;
//! - who has no vote learns of a decision from its watchers, fetches the record with its certificate, then the blobs it names.
//!
//! So a peer's messages in a round grow with the number of voters, not of members, and a voter's record with the members it counts.

use std::sync::Arc;

use super::chain::ChainState;
use crate::agreement::Voters;
use crate::types::*;
use crate::wire::Body;

/// The most members that all hear each other directly.
pub const CROWD: usize = 128;
/// Voters that listen for each member of a crowd that has no vote itself.
pub const WATCHERS: usize = 8;

/// The members of a round, and whom this peer tells what.
#[derive(Default)]
pub struct Roster {
    /// Active members, sorted: their places are what [`Bits`] name.
    members: Vec<PeerId>,
    /// Since which slot they are the same: bitmaps of these rounds mean the same members.
    since: Slot,
    /// In a crowd: the voters without this peer, and who listens for each member (nobody for voters, who hear each other, and for
    /// those whom this peer hears itself).
    crowd: Option<Crowd>,
}

struct Crowd {
    me_votes: bool,
    voters: Arc<[PeerId]>,
    have: Arc<[PeerId]>,
    watchers: Vec<Vec<PeerId>>,
}

impl Roster {
    /// The roster of the round after `chain`.
    pub fn new(chain: &ChainState, voters: &Voters, me: &PeerId) -> Self {
        let members: Vec<PeerId> = chain.active().collect();
        let crowd = (members.len() > CROWD).then(|| Crowd::new(&chain.agreed.run, &members, voters, me));
        let since = chain.next_slot();
        Self { members, since, crowd }
    }

    /// The same, knowing the roster of an earlier round.
    pub fn after(mut self, earlier: &Self) -> Self {
        if self.members == earlier.members && self.since.branch == earlier.since.branch {
            self.since.round = self.since.round.min(earlier.since.round);
        }
        self
    }

    /// Whether bits said of this slot mean these members. Of a later round that can only be guessed: whoever is behind for a moment
    /// should not take everyone for dead.
    pub fn means(&self, slot: Slot, bits: &Bits) -> bool {
        slot.branch == self.since.branch && slot.round >= self.since.round && bits.fits(self.members.len())
    }

    /// How many members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// A member's place in the bitmaps.
    pub fn place(&self, id: &PeerId) -> Option<usize> {
        self.members.binary_search(id).ok()
    }

    /// The member at a place.
    pub fn member(&self, place: usize) -> Option<PeerId> {
        self.members.get(place).copied()
    }

    /// Who is told this; `None`: everyone.
    pub fn audience(&self, body: &Body) -> Option<Arc<[PeerId]>> {
        let crowd = self.crowd.as_ref()?;
        match body {
            Body::Have(_) => Some(crowd.have.clone()),
            // A lost quorum concerns all who may go on without it.
            Body::Regroup(_) => None,
            _ => Some(crowd.voters.clone()),
        }
    }

    /// Whom to keep a link to: everyone, or in a crowd, for a peer without a vote, the voters.
    pub fn neighbours(&self) -> Vec<PeerId> {
        match &self.crowd {
            Some(crowd) if !crowd.me_votes => crowd.voters.to_vec(),
            _ => self.members.clone(),
        }
    }

    /// Whose bitmaps tell whether the member at `place` lives, where this peer does not hear it itself: `None` if it would.
    pub fn told_by(&self, place: usize) -> Option<&[PeerId]> {
        let crowd = self.crowd.as_ref()?;
        if !crowd.me_votes {
            return Some(&crowd.voters);
        }
        crowd
            .watchers
            .get(place)
            .map(Vec::as_slice)
            .filter(|all| !all.is_empty())
    }
}

impl Crowd {
    fn new(run: &RunId, members: &[PeerId], voters: &Voters, me: &PeerId) -> Self {
        let everyone: Vec<PeerId> = voters.iter().map(|(id, _)| id).collect();
        let me_votes = voters.weight_of(me) > 0;
        let watched = |id: &PeerId| {
            if voters.weight_of(id) > 0 {
                Vec::new()
            } else {
                watchers_of(run, id, &everyone)
            }
        };
        let mut watchers: Vec<Vec<PeerId>> = if me_votes {
            members.iter().map(watched).collect()
        } else {
            Vec::new()
        };
        let others: Arc<[PeerId]> = everyone.iter().copied().filter(|id| id != me).collect();
        let have = if me_votes {
            let mine = members
                .iter()
                .zip(&watchers)
                .filter(|(_, by)| by.contains(me))
                .map(|(id, _)| *id);
            others.iter().copied().chain(mine).collect()
        } else {
            watchers_of(run, me, &everyone).into()
        };
        // Whom this peer hears itself, it hears: if the watchers believed each other, a dead member would live on their word.
        watchers.iter_mut().filter(|by| by.contains(me)).for_each(Vec::clear);
        Self {
            me_votes,
            voters: others,
            have,
            watchers,
        }
    }
}

/// The voters with the lowest lots for this member. Ids can be ground for a lot, and nothing is gained by it: a member whose
/// watchers all lie still has to be uncounted for the rounds that R15 asks before it may lapse.
fn watchers_of(run: &RunId, member: &PeerId, voters: &[PeerId]) -> Vec<PeerId> {
    let salt = word(&run.0) ^ word(&member.0).rotate_left(29);
    let mut lots: Vec<(u64, PeerId)> = voters.iter().map(|id| (mixed(salt ^ word(&id.0)), *id)).collect();
    if lots.len() > WATCHERS {
        lots.select_nth_unstable(WATCHERS);
        lots.truncate(WATCHERS);
    }
    lots.sort_unstable();
    lots.into_iter().map(|(_, id)| id).collect()
}

fn word(bytes: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *bytes;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// The finaliser of SplitMix64.
fn mixed(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
