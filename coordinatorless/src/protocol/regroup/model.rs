//! The rules of regrouping, walked through at random in a small world: the very functions that the protocol runs
//! ([`highest_attempt`], [`surviving`], [`replaces`], [`complete`], [`branch_number`]), under every kind of event.
//!
//! Three honest peers and a liar of equal weight. The honest are together, split in two or all apart; statements are delivered in
//! any order or never; a peer may crash at any time and come back with its log: its own statements and what it acted on, but
//! nothing that it heard. The liar says another thing to everyone.
//!
//! Three attempts are walked through, 800 seeded walks of 60 steps, in which anyone may be suspected wrongly and the split changes;
//! [`exhaustive`] goes through every state within bounds instead, and forgets what was heard after each step. In every state: an
//! honest peer has one statement for each attempt (it is asked to sign again only for a later one); nobody acts on an attempt below
//! another it acted on; two peers on one branch number agree on who is on it, and have another number if they don't; and no two
//! records can be decided on one branch, even if the liar votes for both, because the honest vote once. And from where a walk ends,
//! once the honest hear each other and the liar is silent, a bounded number of rounds leads to a branch that can decide, which takes
//! the others along (R21).
#![allow(clippy::unwrap_used)]

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::*;
use crate::wire::Keys;

mod exhaustive;
mod fair;
mod oracle;
mod search;

const HONEST: usize = 3;
const LIAR: usize = 3;
/// Attempts at most, those of a fair end included.
const ATTEMPTS: usize = 12;
/// Rounds after which a fair end must have led somewhere.
const FAIR: usize = 5;

/// Sets of peers are bit masks; an empty one is a statement that isn't there.
type Set = u8;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    /// Own statements, by peer and attempt: that is in the log.
    mine: [[Set; ATTEMPTS]; HONEST],
    /// The attempt acted on: so is that.
    acted: [usize; HONEST],
    /// Statements heard, by peer, attempt and signer.
    heard: [[[Set; 4]; ATTEMPTS]; HONEST],
}

struct Model {
    ids: Vec<PeerId>,
    keys: Vec<Keys>,
}

impl Model {
    fn new() -> Self {
        let mut keys: Vec<Keys> = (1..=4).map(|n| Keys::new([n; 32], Scheme::KeyedHash)).collect();
        keys.sort_by_key(Keys::id);
        let ids = keys.iter().map(Keys::id).collect();
        Self { ids, keys }
    }

    fn peers(&self, set: Set) -> Vec<PeerId> {
        (0..4)
            .filter(|at| set & (1 << at) != 0)
            .map(|at| self.ids[at])
            .collect()
    }

    fn set(&self, peers: &[PeerId]) -> Set {
        (0..4)
            .filter(|at| peers.contains(&self.ids[*at]))
            .map(|at| 1 << at)
            .sum()
    }

    fn statement(&self, attempt: usize, survivors: Set) -> Regroup {
        let slot = Slot {
            run: RunId([0; 32]),
            branch: 0,
            round: Round(1),
            view: 0,
        };
        Regroup {
            slot,
            attempt: attempt as u32,
            tip: Hash::of(b"fork"),
            polka: None,
            survivors: self.peers(survivors),
        }
    }

    fn statements(&self, world: &World, peer: usize) -> Statements {
        let mut statements = Statements::new();
        for (attempt, heard) in world.heard[peer].iter().enumerate() {
            for (signer, set) in heard.iter().enumerate().filter(|(_, set)| **set != 0) {
                let statement = (self.statement(attempt, *set), Signature([0; 64]));
                statements.insert((attempt as u32, self.ids[signer]), statement);
            }
        }
        statements
    }

    /// What the rules let a peer sign next if it hears these.
    fn signs(&self, world: &World, peer: usize, alive: Set) -> (usize, Set) {
        let (statements, alive) = (self.statements(world, peer), self.peers(alive));
        let highest = highest_attempt(world.acted[peer] as u32, &alive, &statements) as usize;
        let last = (1..ATTEMPTS).rev().find(|attempt| world.mine[peer][*attempt] != 0);
        let attempt = next_attempt(last.map(|last| last as u32), highest as u32) as usize;
        let before = last.map(|last| self.statement(last, world.mine[peer][last]));
        let going_on = surviving(&self.ids[peer], attempt as u32, &alive, before.as_ref(), &statements);
        (attempt, self.set(&going_on))
    }

    /// A peer hears a statement; whether that changes anything.
    fn hear(&self, world: &mut World, peer: usize, attempt: usize, signer: usize, said: Set) -> bool {
        let statement = |set: Set| (set != 0).then(|| (self.statement(attempt, set), Signature([0; 64])));
        let mine = statement(world.mine[peer][attempt]).map(|(mine, _)| self.keys[peer].sign(&Body::Regroup(mine)));
        let known = statement(world.heard[peer][attempt][signer]);
        let fresh = statement(said).is_some_and(|(new, _)| replaces(mine.as_ref(), known.as_ref(), &new));
        if fresh {
            world.heard[peer][attempt][signer] = said;
        }
        fresh
    }

    /// Lets a peer act on what it holds, as the rules say.
    fn act(&self, world: &mut World, peer: usize) {
        let mine: BTreeMap<u32, Signed> = (1..ATTEMPTS)
            .filter(|attempt| world.mine[peer][*attempt] != 0)
            .map(|attempt| {
                let body = Body::Regroup(self.statement(attempt, world.mine[peer][attempt]));
                (attempt as u32, self.keys[peer].sign(&body))
            })
            .collect();
        let acted = world.acted[peer] as u32;
        if let Some(proof) = complete(&self.ids[peer], acted, &mine, &self.statements(world, peer)) {
            let attempt = proof[0].1.attempt;
            assert!(attempt > acted, "acted on a lower attempt");
            world.acted[peer] = attempt as usize;
        }
    }

    /// Everything that may happen next while these honest peers hear each other, and the liar.
    fn next(&self, world: &World, groups: &[Set], suspected: &[usize], attempts: usize) -> Vec<World> {
        let mut next = Vec::new();
        for peer in 0..HONEST {
            let group = groups.iter().find(|group| **group & (1 << peer) != 0).unwrap() | 1 << LIAR;
            // Signs, with everyone in its group or all but one of the suspected.
            let without = |other: &usize| group & !(1 << other) | 1 << peer;
            let mut alive: Vec<Set> = suspected.iter().map(without).collect();
            alive.push(group);
            alive.sort_unstable();
            alive.dedup();
            for alive in alive {
                let (attempt, survivors) = self.signs(world, peer, alive);
                if attempt <= attempts {
                    let mut after = world.clone();
                    after.mine[peer][attempt] = survivors;
                    self.act(&mut after, peer);
                    next.push(after);
                }
            }
            // Hears an honest peer's statement, or whatever the liar says to it.
            for attempt in 1..=attempts {
                for other in (0..HONEST).filter(|other| *other != peer && group & (1 << other) != 0) {
                    let mut after = world.clone();
                    if self.hear(&mut after, peer, attempt, other, world.mine[other][attempt]) {
                        self.act(&mut after, peer);
                        next.push(after);
                    }
                }
                for said in (0..16).filter(|set| set & (1 << peer) != 0 && set & (1 << LIAR) != 0) {
                    let mut after = world.clone();
                    if self.hear(&mut after, peer, attempt, LIAR, said) {
                        self.act(&mut after, peer);
                        next.push(after);
                    }
                }
            }
            // Crashes and comes back with its log.
            if world.heard[peer] != [[0; 4]; ATTEMPTS] {
                let mut after = world.clone();
                after.heard[peer] = [[0; 4]; ATTEMPTS];
                next.push(after);
            }
        }
        next
    }

    /// What must hold in every state.
    fn check(&self, world: &World) {
        for peer in 0..HONEST {
            let branch = world.mine[peer][world.acted[peer]];
            assert!(
                world.acted[peer] == 0 || branch & (1 << peer) != 0,
                "on a branch without itself"
            );
            let (size, honest, liar) = (
                branch.count_ones(),
                (branch & 7).count_ones(),
                u32::from(branch >> LIAR & 1),
            );
            let quorum = size * 2 / 3 + 1;
            assert!((quorum - liar) * 2 > honest, "two records on one branch");
        }
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            let on = |peer: usize| (world.acted[peer], world.mine[peer][world.acted[peer]]);
            let number = |(attempt, set)| branch_number(&self.statement(attempt, set));
            assert_eq!(number(on(one)) == number(on(other)), on(one) == on(other));
        }
    }

    /// Whether the branch that this peer is on can decide without the liar.
    fn lives(&self, world: &World, peer: usize) -> bool {
        let (attempt, branch) = (world.acted[peer], world.mine[peer][world.acted[peer]]);
        let on = (0..HONEST).filter(|other| world.acted[*other] == attempt && world.mine[*other][attempt] == branch);
        let size = if attempt == 0 { 4 } else { branch.count_ones() };
        on.count() as u32 * 3 > size * 2
    }

    /// From here on the honest hear each other, everything arrives, and the liar is silent: the rounds until something decides.
    fn fair_end(&self, mut world: World) -> Option<usize> {
        for round in 0..=FAIR {
            if (0..HONEST).any(|peer| self.lives(&world, peer)) {
                return Some(round);
            }
            for peer in 0..HONEST {
                let branch = world.mine[peer][world.acted[peer]];
                // On the fork, three of four are a quorum; on a branch, those of its members who are honest may be too few.
                let alive = if world.acted[peer] == 0 { 7 } else { branch & 7 };
                let size = if world.acted[peer] == 0 { 4 } else { branch.count_ones() };
                if alive.count_ones() * 3 <= size * 2 {
                    let (attempt, survivors) = self.signs(&world, peer, alive);
                    world.mine[peer][attempt] = survivors;
                    self.act(&mut world, peer);
                }
            }
            for peer in 0..HONEST {
                for other in (0..HONEST).filter(|other| *other != peer) {
                    for attempt in 1..ATTEMPTS {
                        let said = world.mine[other][attempt];
                        self.hear(&mut world, peer, attempt, other, said);
                        // Who began a branch with the liar says so again, and shows the liar's statement: it is in the log.
                        if world.acted[other] == attempt && said & (1 << LIAR) != 0 {
                            self.hear(&mut world, peer, attempt, LIAR, said);
                        }
                    }
                }
                self.act(&mut world, peer);
            }
        }
        None
    }
}

fn first() -> World {
    World {
        mine: [[0; ATTEMPTS]; HONEST],
        acted: [0; HONEST],
        heard: [[[0; 4]; ATTEMPTS]; HONEST],
    }
}

const SPLITS: [&[Set]; 3] = [&[0b111], &[0b011, 0b100], &[0b001, 0b010, 0b100]];
const STUCK: &str = "nobody can decide, however long the links hold";

#[test]
fn random_walks_over_three_attempts_keep_the_rules_and_lead_to_a_decision() {
    let (model, mut rng) = (Model::new(), ChaCha12Rng::seed_from_u64(1));
    let (mut steps, mut longest, mut branches) = (0, 0, 0);
    for walk in 0..800 {
        let mut world = first();
        for _ in 0..60 {
            // The split changes now and then, and heals.
            let mut next = model.next(&world, SPLITS[(walk + steps / 20) % 3], &[0, 1, 2, LIAR], 3);
            if next.is_empty() {
                break;
            }
            world = next.swap_remove(rng.random_range(0..next.len()));
            model.check(&world);
            steps += 1;
        }
        branches += usize::from(world.acted != [0; HONEST]);
        longest = longest.max(
            model
                .fair_end(world.clone())
                .unwrap_or_else(|| panic!("{STUCK}: {world:?}")),
        );
    }
    println!("{steps} steps, {branches} walks onto a branch; a decision is at most {longest} fair rounds away");
    assert!(branches > 100);
}

#[test]
fn a_liar_that_tells_one_survivor_something_else_keeps_it_off_no_branch() {
    let (model, mut world) = (Model::new(), first());
    (0..HONEST).for_each(|peer| world.mine[peer][1] = 0b1111);
    // Peer 0 hears first that the liar would go on without peer 1; the others hear what they say themselves.
    assert!(model.hear(&mut world, 0, 1, LIAR, 0b1101));
    for peer in [1, 2] {
        for signer in (0..4).filter(|signer| *signer != peer) {
            model.hear(&mut world, peer, 1, signer, 0b1111);
        }
        model.act(&mut world, peer);
    }
    assert_eq!(world.acted, [0, 1, 1]);
    assert!(model.fair_end(world).is_some(), "{STUCK}");
}
