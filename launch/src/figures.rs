//! What the event logs of several peers say together. Every figure of the demo's report comes from here, so that anyone can recompute
//! it from the files that the demo leaves behind.

use std::collections::{BTreeMap, BTreeSet};

use coordinatorless::types::{Hash, PeerId};
use serde::Serialize;

use crate::events::{Event, Line};

/// A round as the logs tell it, of the branch that lasted.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundFigures {
    /// The branch it was decided on.
    pub branch: u32,
    /// Its record.
    pub record: Hash,
    /// The model's root after it.
    pub model_root: Hash,
    /// Counted tokens by member.
    pub tokens_by: BTreeMap<PeerId, u64>,
    /// Mean training loss.
    pub loss: f64,
}

/// One peer's share.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PeerFigures {
    /// Who.
    pub id: PeerId,
    /// The last round it decided.
    pub rounds: u64,
    /// The model's root after that round.
    pub model_root: Hash,
    /// Bytes it sent.
    pub bytes_sent: u64,
    /// The share of its time that it spent training, over the rounds that it lived through.
    pub utilisation: f64,
    /// Rounds in which its contribution counts.
    pub counted: u64,
    /// Tokens that count.
    pub tokens: u64,
}

/// A cheat that was proven.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Caught {
    /// Who.
    pub id: PeerId,
    /// The audited round.
    pub round: u64,
    /// Relative L2 distance between claim and replay.
    pub rel_l2: f64,
    /// The largest that passes.
    pub bound: f64,
}

/// What the logs say together.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Rounds by number.
    pub rounds: BTreeMap<u64, RoundFigures>,
    /// Places where two peers tell different records or models of one round of one branch.
    pub disagreements: Vec<String>,
    /// Peers in the order of the logs.
    pub peers: Vec<PeerFigures>,
    /// Peers whose process ended without a farewell and started again.
    pub killed: Vec<PeerId>,
    /// Those of them that decided rounds again.
    pub rejoined: Vec<PeerId>,
    /// Members who were let in during the run and counted.
    pub joined: Vec<PeerId>,
    /// Members whose points were taken.
    pub caught: Vec<Caught>,
    /// Auditors, each with a member whose claim it said to differ. Who did not answer an audit, being away, is not accused of anything.
    pub accused: BTreeSet<(PeerId, PeerId)>,
    /// The latest loss on held-out text: (round, loss).
    pub evals: BTreeMap<u64, f64>,
    /// From the first start to the last round.
    pub seconds: f64,
}

impl Figures {
    /// Reads the logs of these peers.
    pub fn of(logs: &[(PeerId, Vec<Line>)]) -> Self {
        let mut figures = Self::default();
        let mut told: BTreeMap<(u32, u64), (Hash, Hash, PeerId)> = BTreeMap::new();
        for (id, lines) in logs {
            for line in lines {
                figures.compare(*id, &line.event, &mut told);
                figures.round(&line.event);
                figures.audit(&line.event);
            }
            figures.lives(*id, lines);
        }
        for (id, lines) in logs {
            let peer = figures.peer(*id, lines);
            figures.peers.push(peer);
        }
        let let_in: BTreeSet<PeerId> = all(logs)
            .filter_map(|event| match event {
                Event::MemberJoined { peer, .. } => Some(*peer),
                _ => None,
            })
            .collect();
        figures.joined = let_in
            .into_iter()
            .filter(|id| figures.counted(id) > 0 && !figures.killed.contains(id))
            .collect();
        figures.seconds = span(logs);
        figures
    }

    /// Whether all peers tell the same of every round that they share.
    pub fn roots_equal(&self) -> bool {
        self.disagreements.is_empty() && !self.rounds.is_empty()
    }

    /// Tokens counted over all rounds.
    pub fn tokens(&self) -> u64 {
        self.rounds.values().flat_map(|round| round.tokens_by.values()).sum()
    }

    /// The loss of every round in which somebody counted.
    pub fn losses(&self) -> Vec<(f64, f64)> {
        self.rounds
            .iter()
            .filter(|(_, round)| !round.tokens_by.is_empty())
            .map(|(number, round)| (*number as f64, round.loss))
            .collect()
    }

    /// Rounds in which a member counts.
    fn counted(&self, id: &PeerId) -> u64 {
        self.rounds
            .values()
            .filter(|round| round.tokens_by.contains_key(id))
            .count() as u64
    }

    /// R21: a later branch's round stands in the place of an earlier one's.
    fn round(&mut self, event: &Event) {
        let Event::RoundDecided {
            round,
            branch,
            record,
            model_root,
            tokens_by,
            loss,
            ..
        } = event
        else {
            return;
        };
        let stands = self.rounds.get(round).is_none_or(|known| known.branch < *branch);
        if stands {
            let tokens_by = tokens_by.clone();
            let figures = RoundFigures {
                branch: *branch,
                record: *record,
                model_root: *model_root,
                tokens_by,
                loss: *loss,
            };
            self.rounds.insert(*round, figures);
        }
    }

    fn compare(&mut self, id: PeerId, event: &Event, told: &mut BTreeMap<(u32, u64), (Hash, Hash, PeerId)>) {
        let Event::RoundDecided {
            round,
            branch,
            record,
            model_root,
            ..
        } = event
        else {
            return;
        };
        let (other_record, other_root, other) = *told.entry((*branch, *round)).or_insert((*record, *model_root, id));
        for (what, ours, theirs) in [
            ("record", *record, other_record),
            ("model root", *model_root, other_root),
        ] {
            if ours != theirs {
                self.disagreements.push(format!(
                    "round {round} of branch {branch}: {} has the {what} {}, {} has {}",
                    id.short(),
                    ours.short(),
                    other.short(),
                    theirs.short()
                ));
            }
        }
    }

    fn audit(&mut self, event: &Event) {
        match event {
            Event::Audit {
                auditor,
                member,
                verdict,
                ..
            } if verdict == "differs" => {
                self.accused.insert((*auditor, *member));
            }
            Event::Eval { round, val_loss, .. } => {
                self.evals.insert(*round, *val_loss);
            }
            _ => {}
        }
        if let Event::Audit {
            round,
            member,
            verdict,
            rel_l2,
            bound,
            ..
        } = event
            && verdict != "agrees"
            && !self
                .caught
                .iter()
                .any(|caught| (caught.id, caught.round) == (*member, *round))
        {
            // Proven only with the slash; the rest is dropped by `proven`.
            self.caught.push(Caught {
                id: *member,
                round: *round,
                rel_l2: *rel_l2,
                bound: *bound,
            });
        }
    }

    /// Starts without a farewell before them are the ends of killed processes.
    fn lives(&mut self, id: PeerId, lines: &[Line]) {
        let (mut up, mut killed, mut back) = (false, false, false);
        for line in lines {
            match line.event {
                Event::Started { .. } => {
                    killed |= up;
                    up = true;
                }
                Event::Stopped { .. } => up = false,
                Event::RoundDecided { .. } => back |= killed,
                _ => {}
            }
        }
        if killed {
            self.killed.push(id);
        }
        if back {
            self.rejoined.push(id);
        }
    }

    fn peer(&self, id: PeerId, lines: &[Line]) -> PeerFigures {
        let mut peer = PeerFigures {
            id,
            counted: self.counted(&id),
            ..PeerFigures::default()
        };
        peer.tokens = self.rounds.values().filter_map(|round| round.tokens_by.get(&id)).sum();
        let (mut busy, mut all) = (0.0, 0.0);
        for line in lines {
            if let Event::RoundDecided {
                round,
                model_root,
                bytes_sent,
                round_secs,
                utilisation,
                ..
            } = &line.event
            {
                peer.bytes_sent += bytes_sent;
                busy += utilisation * round_secs;
                all += round_secs;
                if *round >= peer.rounds {
                    (peer.rounds, peer.model_root) = (*round, *model_root);
                }
            }
        }
        peer.utilisation = if all > 0.0 { busy / all } else { 0.0 };
        peer
    }
}

/// Cheats whose points were taken, by any log, each with the round that it was convicted of: several may have been found to differ by then. Of who was
/// barred for what it said of others there is no distance.
pub fn proven(figures: &Figures, logs: &[(PeerId, Vec<Line>)]) -> Vec<Caught> {
    let slashed: BTreeMap<PeerId, u64> = all(logs)
        .filter_map(|event| match event {
            Event::Slashed { member, round, .. } => Some((*member, *round)),
            _ => None,
        })
        .collect();
    let found = |(id, round): (&PeerId, &u64)| {
        let of = |caught: &&Caught| (caught.id, caught.round) == (*id, *round);
        figures.caught.iter().find(of).cloned().unwrap_or(Caught {
            id: *id,
            round: *round,
            rel_l2: 0.0,
            bound: 0.0,
        })
    };
    slashed.iter().map(found).collect()
}

fn all(logs: &[(PeerId, Vec<Line>)]) -> impl Iterator<Item = &Event> {
    logs.iter().flat_map(|(_, lines)| lines.iter().map(|line| &line.event))
}

fn span(logs: &[(PeerId, Vec<Line>)]) -> f64 {
    let lines = || logs.iter().flat_map(|(_, lines)| lines);
    let first = lines().map(|line| line.t).fold(f64::INFINITY, f64::min);
    let decided = lines().filter(|line| matches!(line.event, Event::RoundDecided { .. }));
    let last = decided.map(|line| line.t).fold(first, f64::max);
    if first.is_finite() { last - first } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId([n; 32])
    }

    fn decided(round: u64, branch: u32, root: &[u8], members: &[(u8, u64)]) -> Event {
        let tokens_by: BTreeMap<PeerId, u64> = members.iter().map(|(n, tokens)| (peer(*n), *tokens)).collect();
        Event::RoundDecided {
            round,
            branch,
            record: Hash::of(&[round as u8, branch as u8]),
            model_root: Hash::of(root),
            contributors: tokens_by.keys().copied().collect(),
            tokens: tokens_by.values().sum(),
            tokens_by,
            loss: 5.0 - round as f64,
            train_secs: 1.0,
            exchange_secs: 0.1,
            agree_secs: 0.1,
            round_secs: round as f64,
            utilisation: 1.0 / (round + 1) as f64,
            bytes_sent: 100,
            bytes_received: 50,
        }
    }

    fn log(n: u8, events: Vec<Event>) -> (PeerId, Vec<Line>) {
        (
            peer(n),
            events
                .into_iter()
                .enumerate()
                .map(|(i, event)| Line { t: i as f64, event })
                .collect(),
        )
    }

    fn started(n: u8) -> Event {
        Event::Started { peer: peer(n), pid: 1 }
    }

    #[test]
    fn figures_add_up_over_peers_and_rounds() {
        let a = log(
            1,
            vec![
                started(1),
                decided(1, 0, b"x", &[(1, 10), (2, 20)]),
                decided(2, 0, b"y", &[(1, 10)]),
            ],
        );
        let b = log(
            2,
            vec![
                started(2),
                decided(1, 0, b"x", &[(1, 10), (2, 20)]),
                decided(2, 0, b"y", &[(1, 10)]),
            ],
        );
        let figures = Figures::of(&[a, b]);
        assert!(figures.roots_equal());
        assert_eq!((figures.tokens(), figures.rounds.len(), figures.seconds), (40, 2, 2.0));
        let shares: Vec<(u64, u64, u64)> = figures
            .peers
            .iter()
            .map(|p| (p.counted, p.tokens, p.bytes_sent))
            .collect();
        assert_eq!(shares, [(2, 20, 200), (1, 20, 200)]);
        // Half of one second and a third of two.
        assert!((figures.peers[0].utilisation - (0.5 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(figures.losses(), [(1.0, 4.0), (2.0, 3.0)]);
    }

    #[test]
    fn a_peer_that_tells_another_root_is_named() {
        let a = log(1, vec![decided(1, 0, b"x", &[])]);
        let b = log(2, vec![decided(1, 0, b"z", &[])]);
        let figures = Figures::of(&[a, b]);
        assert!(!figures.roots_equal());
        assert!(
            figures.disagreements[0].contains("round 1 of branch 0"),
            "{:?}",
            figures.disagreements
        );
        assert!(!Figures::of(&[]).roots_equal(), "no round at all is no agreement");
    }

    #[test]
    fn a_branch_that_lost_counts_nothing() {
        let a = log(
            1,
            vec![
                decided(1, 0, b"x", &[(1, 10)]),
                decided(2, 0, b"old", &[(1, 10)]),
                decided(2, 1, b"new", &[(2, 7)]),
            ],
        );
        let figures = Figures::of(&[a]);
        assert!(figures.roots_equal());
        assert_eq!(figures.tokens(), 17);
        assert_eq!(
            (figures.peers[0].counted, figures.peers[0].model_root),
            (1, Hash::of(b"new"))
        );
    }

    #[test]
    fn a_kill_is_a_start_without_a_farewell_and_a_return_needs_a_round() {
        let good = log(
            1,
            vec![started(1), Event::Stopped { reason: String::new() }, started(1)],
        );
        let gone = log(2, vec![started(2), started(2)]);
        let back = log(3, vec![started(3), started(3), decided(1, 0, b"x", &[])]);
        let figures = Figures::of(&[good, gone, back]);
        assert_eq!(figures.killed, [peer(2), peer(3)]);
        assert_eq!(figures.rejoined, [peer(3)]);
    }

    #[test]
    fn a_newcomer_is_one_that_was_let_in_and_counted() {
        let joined = |n| Event::MemberJoined {
            peer: peer(n),
            round: 1,
            reason: String::new(),
        };
        let a = log(1, vec![joined(5), joined(6), decided(2, 0, b"x", &[(5, 10)])]);
        assert_eq!(Figures::of(&[a]).joined, [peer(5)]);
    }

    #[test]
    fn an_accusation_is_not_a_proof() {
        let found = |n, verdict: &str| Event::Audit {
            round: 3,
            auditor: peer(9),
            member: peer(n),
            verdict: verdict.into(),
            rel_l2: 0.5,
            bound: 0.02,
            steps_agree: None,
        };
        let slashed = Event::Slashed {
            member: peer(1),
            points: 7,
            evidence: String::new(),
            round: 3,
        };
        let logs = [log(
            9,
            vec![
                found(1, "differs"),
                found(2, "differs"),
                found(3, "unanswered"),
                slashed,
            ],
        )];
        let figures = Figures::of(&logs);
        assert_eq!(figures.accused.len(), 2);
        assert_eq!(
            proven(&figures, &logs),
            [Caught {
                id: peer(1),
                round: 3,
                rel_l2: 0.5,
                bound: 0.02
            }]
        );
    }
}
