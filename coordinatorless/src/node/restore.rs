//! A restarted peer's chain, from its store (R19), and what it wrote itself and others may ask for, from its files.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Node, NodeError};
use crate::config::RunConfig;
use crate::net::Net;
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

/// Rounds that training may be ahead of the last record (R16).
const AHEAD: u64 = 2;

/// Where the store has the folders whose files the blob store was told of.
const FOLDERS: &str = "folders";

/// Puts the files that this peer wrote itself back into the blob store where that has lost them. It knows them by their whole paths, so all are put back
/// after the peer's directory was moved. Returns its accumulators, for auditors: a round makes one at most, so counted back from the newest none is taken
/// for older than it is.
pub(super) async fn put_back(node: &Node, last: Round) -> Result<VecDeque<(Branch, Round, Hash)>, NodeError> {
    let (config, store) = (&node.config, &node.store);
    let written = config.accumulators.iter().map(|(_, file)| file);
    let folders = folders(config.snapshots.iter().chain(written));
    let moved = store.meta_get(FOLDERS)?.is_none_or(|noted| noted != folders);
    for file in &config.snapshots {
        put_back_file(&node.net, file, moved).await;
    }
    let (mut ages, mut accumulators) = (BTreeMap::new(), VecDeque::new());
    for (branch, file) in config.accumulators.iter().rev() {
        let age: &mut u64 = ages.entry(*branch).or_default();
        let round = Round(last.0.saturating_add(AHEAD).saturating_sub(*age));
        *age += 1;
        if let Some(root) = put_back_file(&node.net, file, moved).await {
            accumulators.push_front((*branch, round, root));
        }
    }
    if moved {
        node.net.flush_blobs().await?;
        store.meta_put(FOLDERS, &folders)?;
    }
    Ok(accumulators)
}

/// The file's hash, if that is its name and the blob store has it now.
async fn put_back_file(net: &Net, file: &Path, moved: bool) -> Option<Hash> {
    let name = Hash::from_hex(file.file_stem()?.to_str()?)?;
    if !moved && net.has(name).await {
        return Some(name);
    }
    match net.put_file(file).await {
        Ok(found) => (found == name).then_some(name),
        Err(error) => {
            tracing::warn!("{} cannot be given to those who ask for it: {error}", file.display());
            None
        }
    }
}

/// The folders of these files, each once.
fn folders<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Vec<u8> {
    let absolute = |file: &PathBuf| std::path::absolute(file).unwrap_or_else(|_| file.clone());
    let all: BTreeSet<PathBuf> = files
        .map(absolute)
        .filter_map(|file| Some(file.parent()?.to_owned()))
        .collect();
    let mut bytes = Vec::new();
    for folder in all {
        bytes.extend(folder.as_os_str().as_encoded_bytes());
        bytes.push(0);
    }
    bytes
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
