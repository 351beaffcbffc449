//! A search through every state within bounds, nearest first, that stops where a rule is broken.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;

use super::fair::*;
use super::oracle::*;
use super::*;

/// Four peers in sixteen bits each. A liar's are 0: it says what it likes at any time.
type Packed = u64;
/// What went wrong, and in which world.
type Violation = (&'static str, [Peer; 4]);

/// Rounds after which a fair end must have led somewhere.
const ROUNDS: usize = 10;

fn unpack(world: Packed) -> [Peer; 4] {
    [0, 1, 2, 3].map(|at| world >> (16 * at) & 0xffff)
}

fn pack(peers: [Peer; 4]) -> Packed {
    peers.iter().rev().fold(0, |packed, peer| packed << 16 | peer)
}

/// The honest under each other's names: where each goes, and what becomes of every peer's digits.
struct Turn {
    to: [usize; 4],
    digits: Vec<u16>,
}

impl Turn {
    fn all(honest: usize) -> Vec<Self> {
        let to = (0..256).map(|code| [code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6]);
        let every = |to: &[usize; 4]| to.iter().fold(0, |set, at| set | 1 << at) == 15;
        let turns = to.filter(|to| every(to) && (honest..4).all(|liar| to[liar] == liar));
        turns.map(Self::new).collect()
    }

    fn new(to: [usize; 4]) -> Self {
        let set = |set: Set| (0..4).filter(|peer| has(set, *peer)).map(|peer| 1 << to[peer]).sum();
        let sets: [Set; 16] = std::array::from_fn(|at| set(at as Set));
        let turned = |peer: Peer, attempt| naming(attempt, sets[usize::from(named(peer, attempt))]);
        let peer = |peer: Peer| peer & digit(0) | turned(peer, 1) | turned(peer, 2) | turned(peer, 3);
        let digits = (0..=u16::MAX).map(|digits| peer(digits.into()) as u16).collect();
        Self { to, digits }
    }

    fn world(&self, peers: [Peer; 4]) -> Packed {
        let turned = self
            .to
            .iter()
            .zip(peers)
            .map(|(to, peer)| Peer::from(self.digits[peer as usize]) << (16 * to));
        turned.fold(0, |world, peer| world | peer)
    }
}

/// What is searched.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub honest: usize,
    pub attempts: u32,
    /// Whether a fifth peer, of more weight than all others, is gone from the fork for good. Else the four weigh the same.
    pub headless: bool,
    /// Whether a peer may hold what the liar said in several attempts at once.
    pub many_lies: bool,
    /// Whether in a fair end two that hear a third may not hear each other.
    pub gaps: bool,
}

#[derive(Default, Debug, PartialEq, Eq)]
pub struct Covered {
    pub states: usize,
    pub steps: usize,
    /// Fair ends, and the rounds of the longest.
    pub ends: usize,
    pub longest: usize,
}

pub struct Search {
    bounds: Bounds,
    oracle: Oracle,
    turns: Vec<Turn>,
    wholes: Vec<[Set; 4]>,
    /// States, each with the one it was first reached from.
    visited: QuickMap<Packed, Packed>,
    /// Where fair ends began, and who heard whom.
    ended: HashSet<(Packed, [Set; 4]), BuildHasherDefault<Quick>>,
    covered: Covered,
}

impl Search {
    /// Visits every state, nearest first, or says how the first broken rule comes about.
    pub fn run(bounds: Bounds, rules: Rules) -> Result<Covered, String> {
        let mut search = Self {
            bounds,
            oracle: Oracle::new(rules),
            turns: Turn::all(bounds.honest),
            wholes: wholes(bounds.honest, bounds.gaps),
            visited: QuickMap::from_iter([(0, 0)]),
            ended: HashSet::default(),
            covered: Covered::default(),
        };
        let mut layer = vec![0];
        while !layer.is_empty() {
            let mut next = Vec::new();
            for world in layer {
                let visited = search.visit(world, &mut next);
                visited.map_err(|violation| search.trail(violation, world))?;
            }
            layer = next;
        }
        search.covered.states = search.visited.len();
        Ok(search.covered)
    }

    fn visit(&mut self, world: Packed, next: &mut Vec<Packed>) -> Result<(), Violation> {
        let peers = unpack(world);
        self.check_branches(peers)?;
        self.check_ends(peers)?;
        for me in 0..self.bounds.honest {
            let mut after = self.signatures(peers, me)?;
            after.extend(self.beginnings(peers, me)?);
            self.covered.steps += after.len();
            for peers in after {
                let after = self.canonical(peers);
                self.visited.entry(after).or_insert_with(|| {
                    next.push(after);
                    world
                });
            }
        }
        Ok(())
    }

    /// Worlds that differ in the names of the honest only are one.
    fn canonical(&self, peers: [Peer; 4]) -> Packed {
        let turned = self.turns.iter().map(|turn| turn.world(peers));
        turned.min().unwrap_or_default()
    }

    /// How it came to this: the digits of each peer, state by state.
    fn trail(&self, (what, peers): Violation, world: Packed) -> String {
        let mut trail = vec![world];
        while let Some(world) = trail.last().filter(|world| **world != 0) {
            trail.extend(self.visited.get(world).copied());
        }
        let worlds = trail.iter().rev().map(|world| format!("{:04x?}", unpack(*world)));
        format!("{what}: {peers:04x?} after {}", worlds.collect::<Vec<_>>().join(" "))
    }

    /// What a peer may sign next.
    fn signatures(&mut self, peers: [Peer; 4], me: usize) -> Result<Vec<[Peer; 4]>, Violation> {
        let sights = self.sights(peers, me);
        let sign = |sight| self.oracle.signs(sight);
        let mut signed: Vec<_> = sights
            .into_iter()
            .map(sign)
            .map(|next| (next.attempt, next.survivors))
            .collect();
        signed.sort_unstable();
        signed.dedup();
        let within = |(attempt, _): &(u32, Set)| *attempt <= self.bounds.attempts;
        let sign = |(attempt, survivors)| {
            let mut after = peers;
            after[me] |= naming(attempt, survivors);
            match named(peers[me], attempt) {
                0 if has(survivors, me) => Ok(after),
                0 => Err(("leaves itself out", after)),
                _ => Err(("signs twice for one attempt", peers)),
            }
        };
        signed.into_iter().filter(within).map(sign).collect()
    }

    /// What a peer may act on next.
    fn beginnings(&mut self, peers: [Peer; 4], me: usize) -> Result<Vec<[Peer; 4]>, Violation> {
        let sights = self.agreed_sights(peers, me);
        let mut acted: Vec<u32> = sights.into_iter().filter_map(|sight| self.oracle.acts(sight)).collect();
        acted.sort_unstable();
        acted.dedup();
        acted
            .into_iter()
            .map(|attempt| begin(peers, me, attempt, self.bounds.honest))
            .collect()
    }

    /// Everything that a peer may go by when it signs: whom it hears, and what it holds of them.
    fn sights(&self, peers: [Peer; 4], me: usize) -> Vec<Sight> {
        let (mut held, branch) = ([0; 4], members(peers[me]));
        held[me] = peers[me];
        let mut sights = vec![Sight {
            me,
            alive: 1 << me,
            held,
        }];
        for other in (0..4).filter(|other| *other != me && has(branch, *other)) {
            let options = if other < self.bounds.honest {
                parts(peers[other])
            } else {
                self.lies(me)
            };
            let mut hearing = Vec::new();
            for mut sight in sights.iter().copied() {
                sight.alive |= 1 << other;
                hearing.extend(options.iter().map(|option| {
                    sight.held[other] = *option;
                    sight
                }));
            }
            sights.append(&mut hearing);
        }
        sights.retain(|sight| lost_quorum(peers[me], sight.alive, self.bounds.headless));
        sights
    }

    /// What the liar may have said to a peer. All that doesn't name that peer is alike to it.
    fn lies(&self, me: usize) -> Vec<Peer> {
        let sets = (0..16).filter(|set| has(*set, LIAR) && (has(*set, me) || *set == 1 << LIAR));
        let mut lies = vec![0];
        for attempt in 1..=self.bounds.attempts {
            let before = if self.bounds.many_lies { lies.clone() } else { vec![0] };
            let more = |set| before.iter().map(move |held| held | naming(attempt, set));
            lies.extend(sets.clone().flat_map(more));
        }
        lies
    }

    /// Sights in which all that was said in some attempts has arrived, and a liar agrees.
    fn agreed_sights(&self, peers: [Peer; 4], me: usize) -> Vec<Sight> {
        let sight = |arrived: Peer| {
            let mut held = peers.map(|said| said & arrived);
            (self.bounds.honest..4).for_each(|liar| held[liar] = naming_it(peers[me], liar) & arrived);
            held[me] = peers[me];
            Sight { me, alive: 15, held }
        };
        let every: Peer = (1..=self.bounds.attempts).map(digit).sum();
        parts(every).into_iter().map(sight).collect()
    }

    fn check_branches(&self, peers: [Peer; 4]) -> Result<(), Violation> {
        let on = |peer: usize| {
            (
                (acted(peers[peer]), members(peers[peer])),
                self.oracle.branch(peers[peer]),
            )
        };
        for (one, other) in (0..self.bounds.honest).flat_map(|one| (0..one).map(move |other| (one, other))) {
            let ((one, its_number), (other, other_number)) = (on(one), on(other));
            if (one == other) != (its_number == other_number) {
                return Err(("two branches with one number, or two numbers for one", peers));
            }
        }
        Ok(())
    }

    /// However the links are cut from here on: those who still hear each other come to a branch that can decide.
    fn check_ends(&mut self, peers: [Peer; 4]) -> Result<(), Violation> {
        for links in self.wholes.clone() {
            let start = std::array::from_fn(|peer| if links[peer] == 0 { GONE } else { peers[peer] });
            if !self.ended.insert((pack(start), links)) {
                continue;
            }
            let silent = |peer: Peer| (0..4).any(|other| start[other] == GONE && naming_it(peer, other) != 0);
            let hopeful = (0..4).filter(|peer| start[*peer] != GONE && silent(start[*peer]));
            let hopeful: Set = hopeful.map(|peer| 1 << peer).sum();
            let agreed = (0..16)
                .filter(|agreed| agreed & !hopeful == 0)
                .map(|agreed| (agreed, 0));
            for (agreed, mute) in agreed.chain(self.mute_liar(start)) {
                for arrived in [false, true] {
                    let fair = Fair::new(start, links, self.bounds.headless, mute);
                    self.fair_end(fair.hearing(agreed, arrived))?;
                }
            }
        }
        Ok(())
    }

    /// A liar that is heard but says nothing holds up no regroup. Where its weight counts as heard, on a branch or among equals, it
    /// can hold up decisions, and no rule here is against that.
    fn mute_liar(&self, start: [Peer; 4]) -> Option<(Set, Set)> {
        let on_its_branch = |peer: &Peer| acted(*peer) != 0 && has(members(*peer), LIAR);
        let mut group = start.iter().filter(|peer| **peer != GONE);
        let counts = !self.bounds.headless || group.any(on_its_branch);
        (self.bounds.honest == HONEST && !counts).then_some((0, 1 << LIAR))
    }

    /// Rounds in which whoever lost its quorum signs, and everything arrives.
    fn fair_end(&mut self, mut fair: Fair) -> Result<(), Violation> {
        let start = fair.peers;
        for round in 0..=ROUNDS {
            if fair.lives() {
                self.covered.ends += 1;
                self.covered.longest = self.covered.longest.max(round);
                let parted = fair.parted();
                return parted
                    .then_some(())
                    .ok_or(("two branches for those who name each other", start));
            }
            fair.sign(&mut self.oracle);
            fair.deliver(&mut self.oracle);
            for me in fair.group() {
                if let Some(attempt) = self.oracle.acts(fair.sight(me)) {
                    fair.peers = begin(fair.peers, me, attempt, self.bounds.honest)?;
                }
            }
        }
        Err(("nobody can decide, however long the links hold", start))
    }
}

/// Every part of what a peer said.
fn parts(said: Peer) -> Vec<Peer> {
    let with = |parts: Vec<Peer>, attempt| {
        let more = parts.iter().map(|part| part | said & digit(attempt)).collect();
        [parts, more].concat()
    };
    attempts(said).fold(vec![0], with)
}

/// A peer acts on an attempt, if it may.
fn begin(mut peers: [Peer; 4], me: usize, attempt: u32, honest: usize) -> Result<[Peer; 4], Violation> {
    if attempt <= acted(peers[me]) {
        return Err(("acts on no attempt above the last it acted on", peers));
    }
    let branch = named(peers[me], attempt);
    let said_so = |peer: usize| peers[peer] == GONE || named(peers[peer], attempt) == branch;
    if !(0..honest).filter(|peer| has(branch, *peer)).all(said_so) {
        return Err(("enters a branch whose survivors didn't all say the same", peers));
    }
    peers[me] = peers[me] & !digit(0) | Peer::from(attempt);
    Ok(peers)
}
