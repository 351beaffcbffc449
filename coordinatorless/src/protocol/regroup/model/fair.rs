//! Fair ends of a search: some peers hear each other from a moment on, and nobody else is heard.

use super::oracle::*;
use super::*;

/// A liar, and whoever is cut off: nothing is heard of it.
pub const GONE: Peer = 0xffff;

pub struct Fair {
    pub peers: [Peer; 4],
    /// What each holds of each.
    held: [[Peer; 4]; 4],
    /// Whom each hears.
    links: [Set; 4],
    headless: bool,
    /// Who is heard but says nothing about survivors.
    mute: Set,
}

impl Fair {
    pub fn new(peers: [Peer; 4], links: [Set; 4], headless: bool, mute: Set) -> Self {
        let held = [[0; 4]; 4];
        Self {
            peers,
            held,
            links,
            headless,
            mute,
        }
    }

    /// What was said before has all arrived, or nothing of it. Those in `agreed` hold statements of everyone silent that agree with
    /// their own, the others such as don't.
    pub fn hearing(mut self, agreed: Set, arrived: bool) -> Self {
        for (me, other) in self.pairs() {
            let silent = self.peers[other] == GONE;
            self.held[me][other] = match silent {
                false if arrived => self.peers[other] & !digit(0),
                false => 0,
                true if has(agreed, me) => naming_it(self.peers[me], other),
                true => attempts(naming_it(self.peers[me], other))
                    .map(|at| naming(at, 1 << other))
                    .sum(),
            };
        }
        self
    }

    /// Those who are heard by anyone, and every other peer.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        self.group()
            .flat_map(|me| (0..4).filter(move |other| *other != me).map(move |other| (me, other)))
    }

    pub fn group(&self) -> impl Iterator<Item = usize> + use<> {
        let peers = self.peers;
        (0..4).filter(move |peer| peers[*peer] != GONE)
    }

    /// What a peer goes by: it hears members of its branch only.
    pub fn sight(&self, me: usize) -> Sight {
        let mut held = self.held[me];
        held[me] = self.peers[me];
        let alive = members(self.peers[me]) & (self.links[me] | self.mute | 1 << me);
        Sight { me, alive, held }
    }

    fn on(&self, peer: usize) -> (u32, Set) {
        (acted(self.peers[peer]), members(self.peers[peer]))
    }

    /// Whether a peer's branch can decide with those it hears that are on it.
    fn decides(&self, peer: usize) -> bool {
        let beside = self.sight(peer).alive;
        let with = self
            .group()
            .filter(|other| has(beside, *other) && self.on(*other) == self.on(peer));
        !lost_quorum(self.peers[peer], with.map(|other| 1 << other).sum(), self.headless)
    }

    pub fn lives(&self) -> bool {
        self.group().any(|peer| self.decides(peer))
    }

    /// Whether of two branches that can decide one leaves out whoever is on the other.
    pub fn parted(&self) -> bool {
        let names = |one: usize, other: usize| has(members(self.peers[one]), other);
        let together = |one, other| self.on(one) != self.on(other) && names(one, other) && names(other, one);
        let mut alive = self.group().filter(|peer| self.decides(*peer));
        !alive.any(|one| self.group().any(|other| self.decides(other) && together(one, other)))
    }

    /// Of those who lost the quorum, whoever must catch up with the others signs; only where nobody must, all sign for another
    /// attempt.
    pub fn sign(&mut self, oracle: &mut Oracle) {
        let lost = self
            .group()
            .filter(|me| lost_quorum(self.peers[*me], self.sight(*me).alive, self.headless));
        let next: Vec<(usize, Next)> = lost.map(|me| (me, oracle.signs(self.sight(me)))).collect();
        let hurry = next.iter().any(|(_, next)| next.at_once);
        for (me, next) in next.into_iter().filter(|(_, next)| next.at_once || !hurry) {
            self.peers[me] |= naming(next.attempt, next.survivors);
        }
    }

    /// The latest statement is said again and again, and so are those that one's branch began with.
    pub fn deliver(&mut self, oracle: &mut Oracle) {
        let links = self.links;
        for (to, from) in self.pairs().filter(|(to, from)| has(links[*to], *from)) {
            let said = self.peers[from];
            if let Some(attempt) = last(said) {
                self.hear(oracle, to, attempt, from, named(said, attempt));
            }
            let (began, branch) = self.on(from);
            for signer in (0..4).filter(|signer| began > 0 && *signer != to && has(branch, *signer)) {
                self.hear(oracle, to, began, signer, branch);
            }
        }
    }

    fn hear(&mut self, oracle: &mut Oracle, to: usize, attempt: u32, signer: usize, said: Set) {
        let (mine, known) = (named(self.peers[to], attempt), named(self.held[to][signer], attempt));
        if oracle.replaces(mine, known, said) {
            self.held[to][signer] = self.held[to][signer] & !digit(attempt) | naming(attempt, said);
        }
    }
}

/// The statements of a peer in which it names another.
pub fn naming_it(peer: Peer, other: usize) -> Peer {
    let with = attempts(peer).filter(|attempt| has(named(peer, *attempt), other));
    with.map(|attempt| peer & digit(attempt)).sum()
}

/// Every way in which some of the honest hear each other and form one whole; with gaps, not each need hear each.
pub fn wholes(honest: usize, gaps: bool) -> Vec<[Set; 4]> {
    let pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)];
    let ways = (0..64).map(|way: Set| {
        let mut links = [0; 4];
        for at in (0..6).filter(|at| has(way, *at)) {
            let (one, other) = pairs[at];
            links[one] |= 1 << other;
            links[other] |= 1 << one;
        }
        links
    });
    // Who is all alone hears itself.
    let alone = (0..honest).map(|peer| std::array::from_fn(|at| Set::from(at == peer) << peer));
    alone.chain(ways.filter(|links| whole(links, honest, gaps))).collect()
}

fn whole(links: &[Set; 4], honest: usize, gaps: bool) -> bool {
    let group: Set = links.iter().fold(0, |group, links| group | links);
    let mut reached = group & group.wrapping_neg();
    for _ in 0..4 {
        reached |= (0..4)
            .filter(|peer| has(reached, *peer))
            .map(|peer| links[peer])
            .fold(0, |all, links| all | links);
    }
    let closed = (0..4).all(|peer| links[peer] == 0 || links[peer] | 1 << peer == group);
    group != 0 && group >> honest == 0 && reached == group && (gaps || closed)
}
