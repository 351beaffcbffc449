//! The play itself: start all, tell every round, kill one, bring it back, let a newcomer in, until the last round is everyone's.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coordinatorless::protocol::replayed::parted;
use coordinatorless::types::PeerId;

use super::prepare::Stage;
use super::swarm::Peer;
use crate::cheat::Cheat;
use crate::cli::{DemoArgs, Kill};
use crate::events::{Event, Line, Tail};
use crate::peer_dir::PeerDir;
use crate::progress::{Progress, RoundLine};
use crate::status::Status;

/// How often the logs are read.
const GLANCE: Duration = Duration::from_millis(50);

/// When what happens.
struct Plot {
    /// Whom to kill, and after which round.
    kill: Option<(usize, u64)>,
    /// After which round to bring it back.
    back: u64,
    /// After which round a newcomer joins.
    join: u64,
}

impl Plot {
    fn of(args: &DemoArgs, stage: &Stage) -> Self {
        let at = (args.rounds / 3).max(1);
        let honest: Vec<usize> = (0..stage.peers.len()).filter(|i| !stage.cheats.contains(i)).collect();
        let draw = blake3::hash(&args.seed.to_le_bytes()).as_bytes()[0];
        let victim = match args.kill {
            Kill::Random => honest.get(usize::from(draw) % honest.len().max(1)).copied(),
            Kill::Founder => Some(0),
            Kill::None => None,
        };
        Self {
            kill: victim.map(|victim| (victim, at)),
            back: at + (args.rounds / 6).max(1),
            join: (args.rounds / 2).max(1),
        }
    }
}

/// What has happened so far.
struct Watch<'a> {
    args: &'a DemoArgs,
    progress: &'a Progress,
    tails: Vec<Tail>,
    /// The last round each peer decided.
    rounds: Vec<u64>,
    /// The last round anybody decided.
    round: u64,
    /// When that was seen.
    moved: Instant,
    killed: bool,
    back: bool,
    joined: bool,
    /// Those whose process stops by itself, soon after.
    barred: BTreeSet<PeerId>,
}

/// Plays until every peer that is meant to run has decided the last round.
///
/// # Errors
/// A peer cannot be started, ends by itself for good, or nothing moves any more.
pub fn run(args: &DemoArgs, stage: &mut Stage, progress: &Progress) -> Result<()> {
    let plot = Plot::of(args, stage);
    let rounds = args.rounds.to_string();
    let start = ["peer", "--rounds", &rounds];
    for peer in &mut stage.peers {
        peer.start(&start)?;
    }
    let timing = &stage.config.timing;
    // Longer than any wait of the protocol, several views and a regroup included.
    let patience = Duration::from_secs_f64(
        60.0 + 4.0 * (timing.collect_secs + timing.fetch_secs) + 10.0 * stage.config.membership.regroup_secs,
    );
    let count = stage.peers.len();
    let tails = stage.peers.iter().map(|peer| Tail::new(peer.dir.path())).collect();
    let mut watch = Watch {
        args,
        progress,
        tails,
        rounds: vec![0; count],
        round: 0,
        moved: Instant::now(),
        killed: plot.kill.is_none(),
        back: plot.kill.is_none(),
        joined: false,
        barred: BTreeSet::new(),
    };
    loop {
        watch.read_logs(stage);
        watch.act(&plot, stage, &start)?;
        watch.check_ends(stage)?;
        if watch.is_over(stage) {
            return Ok(());
        }
        if watch.moved.elapsed() > patience {
            bail!(
                "nothing has moved for {:.0} s\n{}",
                patience.as_secs_f64(),
                last_words(&stage.peers)
            );
        }
        std::thread::sleep(GLANCE);
    }
}

impl Watch<'_> {
    fn read_logs(&mut self, stage: &Stage) {
        for i in 0..self.tails.len() {
            for line in self.tails[i].next() {
                self.tell(i, line, stage);
            }
        }
    }

    fn tell(&mut self, i: usize, line: Line, stage: &Stage) {
        let peer = &stage.peers[i];
        match line.event {
            Event::RoundDecided {
                round,
                loss,
                tokens,
                contributors,
                bytes_sent,
                ..
            } => {
                self.rounds[i] = self.rounds[i].max(round);
                if round <= self.round {
                    return;
                }
                let secs = self.moved.elapsed().as_secs_f64();
                (self.round, self.moved) = (round, Instant::now());
                let of = Some(self.args.rounds);
                self.progress.round(&RoundLine {
                    round,
                    of,
                    loss,
                    tokens,
                    contributors: contributors.len(),
                    secs,
                    sent: bytes_sent,
                });
            }
            // Each is told once: by the first of the list, or by whoever stands in while that one is down.
            Event::MemberLapsed { peer: gone, round, .. } if self.speaks(i, stage) => {
                self.progress.note(&format!(
                    "{} has been silent; without it from round {} on",
                    gone.short(),
                    round + 1
                ));
            }
            Event::Regrouped { survivors, .. } if self.speaks(i, stage) => {
                self.progress.note(&format!(
                    "too few were left to decide: {} survivors go on together",
                    survivors.len()
                ));
            }
            Event::Audit {
                member,
                auditor,
                round,
                verdict,
                rel_l2,
                bound,
                steps_agree,
            } if self.speaks(i, stage) => {
                let (auditor, member) = (auditor.short(), member.short());
                let from = steps_agree.map_or(String::new(), |step| format!("; {}", parted(step)));
                match verdict.as_str() {
                    "differs" => self.progress.note(&format!(
                        "{auditor} replayed round {round} of {member} and got something else: distance {rel_l2:.3}, at most {bound} passes{from}"
                    )),
                    "unanswered" => self.progress.note(&format!(
                        "{auditor} was opened no accumulators of round {round} by {member}"
                    )),
                    "untold" => self.progress.note(&format!(
                        "{auditor} was told no steps of round {round} of {member}, or others than it took"
                    )),
                    _ => {}
                }
            }
            Event::Slashed {
                member,
                points,
                evidence,
                ..
            } => {
                if self.speaks(i, stage) {
                    self.progress.note(&format!(
                        "caught: {}, {evidence}; its {points} points are gone",
                        member.short()
                    ));
                }
                self.barred.insert(member);
            }
            Event::Warning { text } => self.progress.note(&format!("{}: {text}", peer.id.short())),
            Event::Resynced {
                from_round, to_round, ..
            } if to_round > from_round => {
                self.progress.note(&format!(
                    "{} fetched rounds {from_round} to {to_round} from the others",
                    peer.id.short()
                ));
            }
            _ => {}
        }
    }

    /// Whether peer `i` is the first in the list that is meant to run.
    fn speaks(&self, i: usize, stage: &Stage) -> bool {
        stage.peers.iter().position(|peer| peer.wanted) == Some(i)
    }

    fn act(&mut self, plot: &Plot, stage: &mut Stage, start: &[&str]) -> Result<()> {
        if let Some((victim, at)) = plot.kill {
            let peer = &mut stage.peers[victim];
            if !self.killed && self.round >= at {
                peer.kill();
                self.killed = true;
                let name = if victim == 0 { "the founder" } else { "one peer" };
                self.progress
                    .note(&format!("SIGKILL for {name}, {}; the others go on", peer.id.short()));
            }
            if self.killed && !self.back && self.round >= plot.back {
                peer.start(start)?;
                self.back = true;
                self.progress
                    .note(&format!("{} is started again from its directory", peer.id.short()));
            }
        }
        if !self.joined && self.round >= plot.join {
            self.join(stage)?;
        }
        Ok(())
    }

    /// A newcomer with nothing but a ticket from whoever is live.
    fn join(&mut self, stage: &mut Stage) -> Result<()> {
        let live = stage.peers.iter().filter(|peer| peer.wanted).find_map(|peer| {
            let status = Status::read(peer.dir.path()).filter(Status::is_live)?;
            status.ticket.map(|ticket| (peer.id, ticket))
        });
        let Some((host, ticket)) = live else { return Ok(()) };
        let dir = PeerDir::new(stage.folder.join("newcomer"));
        dir.create()?;
        let id = dir.key()?.id();
        let mut peer = Peer::new(id, dir, Vec::new());
        let rounds = self.args.rounds.to_string();
        let local = [
            "--bind",
            "127.0.0.1:0",
            "--relay",
            "none",
            "--device",
            "cpu",
            "--threads",
            "1",
        ];
        peer.start(&[&["join", &ticket, "--rounds", &rounds][..], &local].concat())
            .context("the newcomer")?;
        self.progress.note(&format!(
            "a newcomer, {}, joins with a ticket from {}",
            id.short(),
            host.short()
        ));
        self.tails.push(Tail::new(peer.dir.path()));
        self.rounds.push(0);
        stage.peers.push(peer);
        self.joined = true;
        Ok(())
    }

    fn check_ends(&self, stage: &mut Stage) -> Result<()> {
        let mut ended = None;
        let cheats = stage.cheats.clone();
        for (at, (peer, round)) in stage.peers.iter_mut().zip(&self.rounds).enumerate() {
            let Some(status) = peer.unexpected_end() else { continue };
            // A peer that has the last round, and sees that the others have it too, is done; so is one that is barred, or meant to run away.
            let leaves = self.args.cheat == Some(Cheat::Exit) && cheats.contains(&at);
            if leaves && status.success() {
                self.progress
                    .note(&format!("{} said goodbye, and was not barred by then", peer.id.short()));
            } else if self.barred.contains(&peer.id) {
                self.progress.note(&format!(
                    "{} has stopped: nothing that a barred peer does counts",
                    peer.id.short()
                ));
            } else if !(status.success() && *round >= self.args.rounds) {
                self.progress.note(&format!(
                    "{} ended by itself ({status}); its last words:\n{}",
                    peer.id.short(),
                    peer.last_words()
                ));
                ended = Some(peer.id);
            }
        }
        match ended {
            Some(id) => bail!("{} ended by itself, which no peer of the demo should", id.short()),
            None => Ok(()),
        }
    }

    fn is_over(&self, stage: &Stage) -> bool {
        let everyone = stage
            .peers
            .iter()
            .zip(&self.rounds)
            .all(|(peer, round)| !peer.wanted || *round >= self.args.rounds);
        self.joined && self.back && everyone
    }
}

fn last_words(peers: &[Peer]) -> String {
    peers
        .iter()
        .map(|peer| format!("    {}:\n{}", peer.id.short(), peer.last_words()))
        .collect::<Vec<_>>()
        .join("\n")
}
