//! Answers who catches up with records that were never decided: changed, certified by too few, cut, shifted, of another run, or
//! made up; and claims a tip far ahead, so that it is asked.

use rand::RngExt;

use super::{Adversary, Stage, own};
use crate::protocol::beacon::VrfKeys;
use crate::protocol::chain::Draft;
use crate::protocol::event::Effect;
use crate::types::*;
use crate::wire::Body;

pub(in crate::sim) struct LyingServer;

impl LyingServer {
    /// The next record as this liar alone would have it.
    fn made_up(stage: &Stage<'_>) -> Decided {
        let chain = stage.chain();
        let round = chain.agreed.round.next();
        let draft = Draft {
            parent_view: 0,
            changes: Vec::new(),
            contributions: Vec::new(),
            model_root: stage.state.model_root().unwrap_or_default(),
            verdicts: Vec::new(),
            evidence: Vec::new(),
            speeds: Vec::new(),
            carried: None,
            beacon: VrfKeys::derive(stage.keys).beacon(stage.me(), &chain.agreed.seed, round, 0),
        };
        stage.certify(chain.draft(stage.config, draft), Vec::new())
    }
}

impl Adversary for LyingServer {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        match own(stage, &effect).map(|message| &message.body) {
            Some(Body::Have(have)) => {
                let have = Have {
                    tip: Hash::of(b"far ahead"),
                    tip_round: Round(have.tip_round.0 + stage.rng.random_range(1..100)),
                    ..have.clone()
                };
                vec![Effect::Broadcast(stage.keys.sign(&Body::Have(have)))]
            }
            _ => vec![effect],
        }
    }

    fn answers(&mut self, stage: &mut Stage<'_>, mut records: Vec<Decided>) -> Vec<Decided> {
        let Some(first) = records.first().map(|one| one.record.clone()) else {
            return vec![Self::made_up(stage)];
        };
        match stage.rng.random_range(0..7) {
            // The certificate stays, the record changes.
            0 => records[0].record.contributions.clear(),
            // The record changes, and all liars certify it.
            1 => {
                let record = Record {
                    contributions: Vec::new(),
                    ..first
                };
                records[0] = stage.certify(record, Vec::new());
            }
            // Certified by too few.
            2 => records[0].certificate.votes.truncate(1),
            // One voter for all.
            3 => {
                if let Some(vote) = records[0].certificate.votes.first().copied() {
                    records[0].certificate.votes.fill(vote);
                }
            }
            // Cut, and shifted.
            4 => records.truncate(records.len() / 2),
            5 => drop(records.remove(0)),
            // Of another run.
            _ => records.iter_mut().for_each(|one| one.record.slot.run = RunId([9; 32])),
        }
        records
    }
}
