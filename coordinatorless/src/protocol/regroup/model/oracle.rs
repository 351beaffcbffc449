//! The rules as a search asks them: peers in digits, and what each sight leads to by the real functions, asked once.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::*;

/// One peer in four-bit digits: digit 0 is the attempt it acted on, digit n the survivors it named in attempt n, 0 for none. It is
/// what its log tells it after a crash.
pub type Peer = u64;

pub fn digit(attempt: u32) -> Peer {
    15 << (4 * attempt)
}

pub fn named(peer: Peer, attempt: u32) -> Set {
    (peer >> (4 * attempt) & 15) as Set
}

/// The digit of a statement.
pub fn naming(attempt: u32, survivors: Set) -> Peer {
    Peer::from(survivors) << (4 * attempt)
}

pub fn acted(peer: Peer) -> u32 {
    (peer & 15) as u32
}

/// The attempts that a peer signed for.
pub fn attempts(peer: Peer) -> impl DoubleEndedIterator<Item = u32> {
    (1..16).filter(move |attempt| named(peer, *attempt) != 0)
}

pub fn last(peer: Peer) -> Option<u32> {
    attempts(peer).next_back()
}

/// The members of the branch that a peer is on; on the fork, all four.
pub fn members(peer: Peer) -> Set {
    match acted(peer) {
        0 => 15,
        attempt => named(peer, attempt),
    }
}

pub fn has(set: Set, peer: usize) -> bool {
    set & (1 << peer) != 0
}

/// Whether a peer's branch can't decide with these. At the fork nobody can who waits for a heavier one that is gone.
pub fn lost_quorum(peer: Peer, alive: Set, headless: bool) -> bool {
    let minority = alive.count_ones() * 3 <= members(peer).count_ones() * 2;
    minority || headless && acted(peer) == 0
}

type Surviving = fn(&PeerId, u32, &[PeerId], Option<&Regroup>, &Statements) -> Vec<PeerId>;
type Complete = fn(&PeerId, u32, &BTreeMap<u32, Signed>, &Statements) -> Option<Vec<log::Statement>>;

/// The rules under search; a test puts a broken one in.
#[derive(Clone, Copy)]
pub struct Rules {
    pub next: fn(Option<u32>, u32) -> u32,
    pub surviving: Surviving,
    pub complete: Complete,
    pub number: fn(&Regroup) -> Branch,
}

pub const REAL: Rules = Rules {
    next: next_attempt,
    surviving,
    complete,
    number: branch_number,
};

/// What a peer goes by in one step: its own log in its own place, and of the others what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sight {
    pub me: usize,
    pub alive: Set,
    pub held: [Peer; 4],
}

/// What a peer signs next, and whether at once: else its last statement is given time first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Next {
    pub attempt: u32,
    pub survivors: Set,
    pub at_once: bool,
}

/// Sights are many and small, and nobody picks them to collide.
#[derive(Default)]
pub struct Quick(u64);

impl Hasher for Quick {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }
    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }
    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub type QuickMap<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

pub struct Oracle {
    model: Model,
    rules: Rules,
    signs: QuickMap<Sight, Next>,
    acts: QuickMap<Sight, Option<u32>>,
    replaces: QuickMap<[Set; 3], bool>,
}

impl Oracle {
    pub fn new(rules: Rules) -> Self {
        Self {
            model: Model::new(),
            rules,
            signs: QuickMap::default(),
            acts: QuickMap::default(),
            replaces: QuickMap::default(),
        }
    }

    fn statement(&self, peer: Peer, attempt: u32) -> Regroup {
        self.model.statement(attempt as usize, named(peer, attempt))
    }

    fn held(&self, sight: &Sight) -> Statements {
        let others = (0..4).filter(|signer| *signer != sight.me);
        let keys = others.flat_map(|signer| attempts(sight.held[signer]).map(move |attempt| (signer, attempt)));
        let entry = |(signer, attempt): (usize, u32)| {
            let statement = self.statement(sight.held[signer], attempt);
            ((attempt, self.model.ids[signer]), (statement, Signature([0; 64])))
        };
        keys.map(entry).collect()
    }

    pub fn signs(&mut self, mut sight: Sight) -> Next {
        let (own, at) = (sight.held[sight.me], last(sight.held[sight.me]));
        // Of what it said itself it goes by the last only.
        sight.held[sight.me] = own & (digit(0) | at.map_or(0, digit));
        if let Some(known) = self.signs.get(&sight) {
            return *known;
        }
        let (me, alive, held) = (
            self.model.ids[sight.me],
            self.model.peers(sight.alive),
            self.held(&sight),
        );
        let highest = highest_attempt(acted(own), &alive, &held);
        let attempt = (self.rules.next)(at, highest);
        let before = at.map(|at| self.statement(own, at));
        let going_on = (self.rules.surviving)(&me, attempt, &alive, before.as_ref(), &held);
        let next = Next {
            attempt,
            survivors: self.model.set(&going_on),
            at_once: at.is_none_or(|at| at < highest),
        };
        self.signs.insert(sight, next);
        next
    }

    /// The attempt that a peer acts on, if any.
    pub fn acts(&mut self, sight: Sight) -> Option<u32> {
        if let Some(known) = self.acts.get(&sight) {
            return *known;
        }
        let (own, keys) = (sight.held[sight.me], &self.model.keys[sight.me]);
        let sign = |attempt| (attempt, keys.sign(&Body::Regroup(self.statement(own, attempt))));
        let mine = attempts(own).map(sign).collect();
        let proof = (self.rules.complete)(&keys.id(), acted(own), &mine, &self.held(&sight));
        let attempt = proof.map(|proof| proof[0].1.attempt);
        self.acts.insert(sight, attempt);
        attempt
    }

    /// Whether a statement takes the place of one known of the same signer and attempt, beside the peer's own.
    pub fn replaces(&mut self, mine: Set, known: Set, new: Set) -> bool {
        let model = &self.model;
        *self.replaces.entry([mine, known, new]).or_insert_with(|| {
            let said = |set: Set| (set != 0).then(|| (model.statement(1, set), Signature([0; 64])));
            let mine = said(mine).map(|(mine, _)| model.keys[0].sign(&Body::Regroup(mine)));
            replaces(mine.as_ref(), said(known).as_ref(), &model.statement(1, new))
        })
    }

    /// The number of the branch that a peer is on.
    pub fn branch(&self, peer: Peer) -> Branch {
        match acted(peer) {
            0 => 0,
            attempt => (self.rules.number)(&self.statement(peer, attempt)),
        }
    }
}
