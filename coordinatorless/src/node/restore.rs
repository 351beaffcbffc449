//! A restarted peer's chain, from its store (R19).

use std::sync::Arc;

use super::{Node, NodeError};
use crate::config::RunConfig;
use crate::protocol::chain::ChainState;
use crate::protocol::sync::{branch_base, verify_next};
use crate::types::*;
use crate::wire::Scheme;

/// States with the records that follow from them, oldest first.
pub(super) type History = Vec<(ChainState, Arc<Decided>)>;

/// Rounds that the protocol looks back on: to go back to another branch, and to judge verdicts.
pub(super) fn history_window(config: &RunConfig) -> u64 {
    let verdicts = config.verification.verdict_rounds.saturating_mul(2);
    config.membership.finality_rounds.max(verdicts).saturating_add(2)
}

/// The chain as the store holds it: the tip's state, and as much history as the protocol looks back on.
pub(super) fn read_chain(node: &Node) -> Result<(ChainState, History), NodeError> {
    let (config, store) = (&node.config.run, &node.store);
    let genesis = ChainState::genesis(config);
    let Some((_, tip, _)) = store.tip()? else {
        return Ok((genesis, Vec::new()));
    };
    let from = Round(tip.0.saturating_sub(history_window(config)));
    let mut state = genesis;
    if let Some((_, bytes)) = store.state_at_or_below(from)?.filter(|(round, _)| *round > Round(0)) {
        state = ChainState::from_bytes(&bytes).map_err(|error| NodeError::Chain(error.to_string()))?;
    }
    let mut history = Vec::new();
    while state.agreed.round < tip {
        let round = state.agreed.round.next();
        let decided = store
            .record(round)?
            .ok_or_else(|| NodeError::Chain(format!("record {round} is missing")))?;
        let chain = |reason: String| NodeError::Chain(format!("record {round}: {reason}"));
        let base = branch_base(&state, config, &decided, Scheme::Ed25519).map_err(chain)?;
        let (next, _) = verify_next(&state, config, &decided, Scheme::Ed25519).map_err(chain)?;
        history.push((base, Arc::new(decided)));
        state = next;
    }
    Ok((state, history))
}
