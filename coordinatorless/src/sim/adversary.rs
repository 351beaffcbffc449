//! Peers that lie. A liar holds real keys and runs the real [`State`] inside; what it hears, says and serves passes through an
//! [`Adversary`], which may change, drop or add anything that those keys can sign. Everything it sends takes the way of real bytes:
//! the wire's codec decodes it or refuses it, as it would on a socket.
//!
//! What is promised of a run (`check`) is promised to honest peers: nobody owes a liar progress, and it may be slashed. One cheat a
//! file; each draws from a random source of its own, seeded by the run and the peer, so that a run repeats itself.

use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::protocol::State;
use crate::protocol::chain::{ChainState, Draft};
use crate::protocol::event::{Effect, Event};
use crate::types::*;
use crate::wire::{Body, Keys, Signed};

mod boaster;
mod censor;
mod dodger;
mod double_voter;
mod equivocating_proposer;
pub(super) mod false_work;
mod garbage_blobs;
mod impersonator;
mod join_flooder;
mod lapse_abuser;
mod lying_auditor;
mod lying_have;
mod lying_server;
mod malformed;
mod replayer;
mod rewriter;
mod rule_breaker;
mod silent_proposer;
mod stale_committer;
mod swap;
mod withholder;

/// Peers of a scenario that lie in the same way.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Liars {
    /// How.
    pub kind: LiarKind,
    /// Who.
    pub peers: Vec<usize>,
}

macro_rules! cheats {
    ($($(#[$doc:meta])* $kind:ident => $make:expr;)*) => {
        /// The ways to lie that the simulator knows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum LiarKind {
            $($(#[$doc])* $kind,)*
        }

        impl LiarKind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            pub(super) fn adversary(self) -> Box<dyn Adversary> {
                match self {
                    $(Self::$kind => Box::new($make),)*
                }
            }
        }
    };
}

cheats! {
    /// Proposes one record to some and another to the others, and votes for each where it was shown.
    EquivocatingProposer => equivocating_proposer::EquivocatingProposer::default();
    /// Signs two votes for one slot.
    DoubleVoter => double_voter::DoubleVoter;
    /// Commits, and hands its blob to nobody.
    Withholder => withholder::Withholder::All;
    /// Commits, and hands its blob to some.
    SelectiveWithholder => withholder::Withholder::Selective;
    /// Claims to hold every blob.
    HaveEverything => lying_have::LyingHave::Everything(Vec::new());
    /// Claims to hold nothing.
    HaveNothing => lying_have::LyingHave::Nothing;
    /// Claims to hear nobody.
    HearsNobody => lying_have::LyingHave::HearsNobody;
    /// Proposes records that break a rule.
    RuleBreaker => rule_breaker::RuleBreaker::default();
    /// Leaves one honest member out of its records.
    Censor => censor::Censor::default();
    /// Says it doesn't hear an honest member, and proposes to lapse it.
    LapseAbuser => lapse_abuser::LapseAbuser::default();
    /// Never proposes.
    SilentProposer => silent_proposer::SilentProposer;
    /// Publishes contributions that don't decode.
    GarbageBlobs => garbage_blobs::GarbageBlobs::default();
    /// Commits old work again.
    StaleCommitter => stale_committer::StaleCommitter::default();
    /// Plays others' messages again.
    Replayer => replayer::Replayer::default();
    /// Speaks in others' names.
    Impersonator => impersonator::Impersonator;
    /// Sends bytes that are no message.
    Malformed => malformed::Malformed::default();
    /// Serves records that were never decided.
    LyingServer => lying_server::LyingServer;
    /// Serves a history of its own.
    Rewriter => rewriter::Rewriter::default();
    /// Asks to join under ever new names.
    JoinFlooder => join_flooder::JoinFlooder::default();
    /// Claims work that it did not do, in every round.
    FalseWork => false_work::FalseWork::Always;
    /// The same in one round of ten.
    FalseWorkNowAndThen => false_work::FalseWork::Tenth;
    /// Claims work that it did not do, and opens its accumulators to nobody.
    WithheldOpening => false_work::FalseWork::Unopened;
    /// The same, and is away for as long as anyone asks.
    Dodger => dodger::Dodger::new(1);
    /// The same in one round of four.
    DodgerNowAndThen => dodger::Dodger::new(4);
    /// Does its work, and tells nobody its steps.
    UntoldSteps => false_work::FalseWork::Untold;
    /// Does its work, and commits to steps that it did not take.
    OtherSteps => false_work::FalseWork::Mistold;
    /// Audits nothing that it was drawn to audit.
    LazyAuditor => lying_auditor::LyingAuditor::Lazy;
    /// Says of whatever it audits that it agrees, with a trace that it made up.
    GuessingAuditor => lying_auditor::Guesser::default();
    /// Says of whatever it audits that it differs.
    FalseAccuser => lying_auditor::LyingAuditor::Accuser;
    /// Says of whatever it audits that nothing was opened to it.
    DeafAuditor => lying_auditor::LyingAuditor::Deaf;
    /// Claims work that it did not do, covers other liars and accuses the honest.
    Colluder => lying_auditor::LyingAuditor::Colluder;
    /// Claims ten times the speed that it has.
    TenfoldBoaster => boaster::Boaster::Tenfold;
    /// Claims its speed after the time is over.
    LateBoaster => boaster::Boaster::Late(None);
    /// Tells its claim to every other member only.
    HalfBoaster => boaster::Boaster::Half;
    /// Claims its speed and opens nothing.
    SealedBoaster => boaster::Boaster::Sealed;
}

/// What a liar has at hand when it lies.
pub(super) struct Stage<'a> {
    pub config: &'a RunConfig,
    pub keys: &'a Keys,
    /// Its own honest state.
    pub state: &'a State,
    /// Keys of all liars of the run: they work together.
    pub gang: &'a [Keys],
    pub rng: &'a mut ChaCha12Rng,
}

impl Stage<'_> {
    pub fn chain(&self) -> &Arc<ChainState> {
        self.state.chain()
    }

    pub fn me(&self) -> PeerId {
        self.keys.id()
    }

    /// Every other active member, sorted.
    pub fn others(&self) -> Vec<PeerId> {
        self.chain().active().filter(|id| *id != self.me()).collect()
    }

    /// Active members that don't lie, sorted.
    pub fn honest(&self) -> Vec<PeerId> {
        let honest = |id: &PeerId| !self.gang.iter().any(|keys| keys.id() == *id);
        self.chain().active().filter(honest).collect()
    }

    /// A signed message to each of these.
    pub fn tell(&self, whom: &[PeerId], body: &Body) -> Vec<Effect> {
        let message = self.keys.sign(body);
        whom.iter().map(|to| Effect::Send(*to, message.clone())).collect()
    }

    /// The record as decided by all liars together, and by nobody else.
    pub fn certify(&self, record: Record, regroup: Vec<(PeerId, Regroup, Signature)>) -> Decided {
        let vote = Vote {
            slot: record.slot,
            kind: VoteKind::Precommit,
            record: Some(record.hash()),
        };
        let signed = self.gang.iter().map(|keys| keys.sign(&Body::Vote(vote.clone())));
        let mut votes: Vec<_> = signed.map(|message| (message.signer, message.signature)).collect();
        votes.sort();
        let certificate = Certificate {
            slot: record.slot,
            record: record.hash(),
            votes,
        };
        Decided {
            record,
            certificate,
            regroup,
        }
    }

    /// The record with other contributions, and with what follows from them set right again.
    pub fn recount(&self, record: &Record, contributions: Vec<Contribution>) -> Record {
        let record = record.clone();
        let draft = Draft {
            parent_view: record.parent_view,
            changes: record.changes,
            contributions,
            model_root: record.model_root,
            verdicts: record.verdicts,
            evidence: record.evidence,
            speeds: record.speeds,
            carried: None,
            beacon: record.beacon,
        };
        self.chain().draft(self.config, draft)
    }
}

/// A way to lie. What isn't written here a liar does honestly.
pub(super) trait Adversary {
    /// What reaches its state of what it hears.
    fn hears(&mut self, _stage: &mut Stage<'_>, event: Event) -> Vec<Event> {
        vec![event]
    }
    /// What it does of what its state says.
    fn says(&mut self, stage: &mut Stage<'_>, effects: Vec<Effect>) -> Vec<Effect> {
        effects
            .into_iter()
            .flat_map(|effect| self.turn(stage, effect))
            .collect()
    }
    /// What it does instead of one effect.
    fn turn(&mut self, _stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        vec![effect]
    }
    /// Bytes of its own making, sent as they are.
    fn frames(&mut self, _stage: &mut Stage<'_>) -> Vec<(PeerId, Vec<u8>)> {
        Vec::new()
    }
    /// Whether it says of what it audits that it agrees, and replays nothing.
    fn is_lazy(&self) -> bool {
        false
    }
    /// An auditor asks it to open what it committed to here, until this record.
    fn is_asked(&mut self, _commit: &Commit, _until: Round) {}
    /// Whether it says nothing to anyone for now.
    fn is_away(&self) -> bool {
        false
    }
    /// Whether it hands this blob to that peer.
    fn serves(&self, _blob: &Hash, _to: &PeerId) -> bool {
        true
    }
    /// Whether it made this blob, and made it of garbage.
    fn garbage(&self, _blob: &Hash) -> bool {
        false
    }
    /// What it answers to a question for these decided records.
    fn answers(&mut self, _stage: &mut Stage<'_>, records: Vec<Decided>) -> Vec<Decided> {
        records
    }
}

/// The message of a broadcast that this peer signed itself.
fn own<'a>(stage: &Stage<'_>, effect: &'a Effect) -> Option<&'a Signed> {
    match effect {
        Effect::Broadcast(message) | Effect::Send(_, message) if message.signer == stage.me() => Some(message),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
