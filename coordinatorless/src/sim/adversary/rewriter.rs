//! Rewrites history: a branch from the genesis on, of liars alone, longer than the real chain and with every signature in place.

use super::{Adversary, Stage, own};
use crate::protocol::beacon::VrfKeys;
use crate::protocol::chain::{ChainState, Draft};
use crate::protocol::event::Effect;
use crate::protocol::sync::branch_base;
use crate::types::*;
use crate::wire::Body;

/// Rounds by which the other history is longer.
const LONGER: u64 = 10;

/// See the module; the branch is made once for each length of the real chain.
#[derive(Default)]
pub(in crate::sim) struct Rewriter {
    branch: Vec<Decided>,
}

impl Rewriter {
    /// All liars say that only they are left.
    fn proof(stage: &Stage<'_>, genesis: &ChainState) -> Vec<(PeerId, Regroup, Signature)> {
        let mut gang: Vec<_> = stage.gang.iter().collect();
        gang.sort_by_key(|keys| keys.id());
        let statement = Regroup {
            slot: genesis.next_slot(),
            attempt: 1,
            tip: genesis.agreed.record,
            polka: None,
            survivors: gang.iter().map(|keys| keys.id()).collect(),
        };
        let signed = |keys: &&crate::wire::Keys| {
            let message = keys.sign(&Body::Regroup(statement.clone()));
            (message.signer, statement.clone(), message.signature)
        };
        gang.iter().map(signed).collect()
    }

    /// The record after `chain` as liars have it. Nobody trained; nobody needs to believe the model.
    fn next(stage: &Stage<'_>, chain: &ChainState, proof: Vec<(PeerId, Regroup, Signature)>) -> Option<Decided> {
        let round = chain.agreed.round.next();
        let proposer = chain.voters().proposer(round, 0);
        let keys = stage.gang.iter().find(|keys| keys.id() == proposer)?;
        let draft = Draft {
            parent_view: 0,
            changes: Vec::new(),
            contributions: Vec::new(),
            model_root: Hash::of(b"another model"),
            verdicts: Vec::new(),
            evidence: Vec::new(),
            speeds: Vec::new(),
            carried: None,
            beacon: VrfKeys::derive(keys).beacon(proposer, &chain.agreed.seed, round, 0),
        };
        Some(stage.certify(chain.draft(stage.config, draft), proof))
    }

    /// As many records as asked for, from the genesis on.
    pub fn rewrite(stage: &Stage<'_>, length: u64) -> Option<Vec<Decided>> {
        let genesis = ChainState::genesis(stage.config);
        let scheme = stage.keys.scheme();
        let proof = Self::proof(stage, &genesis);
        // Any record will do to learn where the branch starts.
        let probe = Self::probe(stage, &genesis, proof.clone());
        let mut chain = branch_base(&genesis, stage.config, &probe, scheme).ok()?;
        let mut branch = Vec::new();
        for at in 0..length {
            let proof = if at == 0 { proof.clone() } else { Vec::new() };
            let decided = Self::next(stage, &chain, proof)?;
            chain = chain.apply(stage.config, &decided.record, scheme).ok()?.0;
            branch.push(decided);
        }
        Some(branch)
    }

    fn probe(stage: &Stage<'_>, genesis: &ChainState, proof: Vec<(PeerId, Regroup, Signature)>) -> Decided {
        let draft = Draft {
            parent_view: 0,
            changes: Vec::new(),
            contributions: Vec::new(),
            model_root: Hash::default(),
            verdicts: Vec::new(),
            evidence: Vec::new(),
            speeds: Vec::new(),
            carried: None,
            beacon: VrfKeys::derive(stage.keys).beacon(stage.me(), &genesis.agreed.seed, Round(1), 0),
        };
        stage.certify(genesis.draft(stage.config, draft), proof)
    }
}

impl Adversary for Rewriter {
    fn turn(&mut self, stage: &mut Stage<'_>, effect: Effect) -> Vec<Effect> {
        match (own(stage, &effect).map(|message| &message.body), self.branch.last()) {
            (Some(Body::Have(have)), Some(last)) => {
                // Told on the other branch, so that it is asked for it.
                let other = Have {
                    slot: Slot {
                        round: last.record.slot.round.next(),
                        ..last.record.slot
                    },
                    tip: last.record.hash(),
                    tip_round: last.record.slot.round,
                    sequence: have.sequence,
                    ..have.clone()
                };
                vec![Effect::Broadcast(stage.keys.sign(&Body::Have(other)))]
            }
            _ => vec![effect],
        }
    }

    fn says(&mut self, stage: &mut Stage<'_>, effects: Vec<Effect>) -> Vec<Effect> {
        let length = stage.chain().agreed.round.0 + LONGER;
        if (self.branch.len() as u64) < length {
            // In steps, so that it isn't made anew for each round.
            self.branch = Self::rewrite(stage, length + LONGER).unwrap_or_default();
        }
        effects
            .into_iter()
            .flat_map(|effect| self.turn(stage, effect))
            .collect()
    }

    fn answers(&mut self, _stage: &mut Stage<'_>, _records: Vec<Decided>) -> Vec<Decided> {
        self.branch.clone()
    }
}
