//! A restarted peer's chain, from its store (R19), and what it wrote itself and others may ask for, from its files.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::serve::snapshot_file;
use super::{Node, NodeConfig, NodeError, transfer};
use crate::config::RunConfig;
use crate::net::Net;
use crate::protocol::chain::ChainState;
use crate::protocol::sync::{branch_base, verify_next};
use crate::store::Store;
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
/// Where the store has the folder in which the blob store last knew all that this peer wrote.
const KNOWN_IN: &str = "known_in";

/// Own accumulators as they lie on disk, to be kept for auditors: each as if it were of the newest round, for files tell none.
pub(super) fn accumulators(config: &NodeConfig, last: Round) -> VecDeque<(Branch, Round, Hash)> {
    let newest = Round(last.0.saturating_add(AHEAD));
    let named = config
        .accumulators
        .iter()
        .filter_map(|(branch, file)| Some((branch, named(file)?)));
    named.map(|(branch, root)| (*branch, newest, root)).collect()
}

/// The files that this peer wrote itself for others to fetch, each with its hash: what nobody else has comes first, the newest of it before all.
pub(super) fn written(config: &NodeConfig, store: &Store) -> Vec<(Hash, PathBuf)> {
    let accumulators = config.accumulators.iter().rev();
    let accumulators = accumulators.filter_map(|(_, file)| Some((named(file)?, file.clone())));
    let snapshots = transfer::snapshots(store).into_iter().rev();
    let snapshots = snapshots.map(|entry| (entry.model_root, snapshot_file(&config.snapshots, &entry)));
    accumulators
        .chain(snapshots.filter(|(_, file)| file.exists()))
        .collect()
}

/// The hash that a file is named by.
fn named(file: &Path) -> Option<Hash> {
    Hash::from_hex(file.file_name()?.to_str()?)
}

/// Puts these files back into the blob store where it has lost them. It knows them by their whole paths, so after the peer's directory was moved it has
/// lost all of them, whatever it says.
pub(super) async fn put_back(net: Net, store: Arc<Store>, files: Vec<(Hash, PathBuf)>) {
    let folder = std::path::absolute(net.blobs_folder()).unwrap_or_default();
    let folder = folder.as_os_str().as_encoded_bytes();
    let noted = store.meta_get(KNOWN_IN).ok().flatten();
    let moved = noted.is_none_or(|noted| noted != folder);
    let mut all = true;
    for (name, file) in files {
        if !moved && net.has(name).await {
            continue;
        }
        // A torn one comes under another name, and goes as garbage.
        if let Err(error) = net.put_file(&file).await {
            all = false;
            tracing::warn!("{} cannot be given to those who ask for it: {error}", file.display());
        }
    }
    if moved && all {
        let noted = match net.flush_blobs().await {
            Ok(()) => store.meta_put(KNOWN_IN, folder).map_err(NodeError::from),
            Err(error) => Err(NodeError::from(error)),
        };
        if let Err(error) = noted {
            tracing::warn!("what this peer wrote will be read once more at the next start: {error}");
        }
    }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::net::{NetConfig, Relay};

    async fn started(dir: &Path) -> Net {
        let config = NetConfig {
            secret: [7; 32],
            run: RunId([1; 32]),
            bind: Some(([127, 0, 0, 1], 0).into()),
            relay: Relay::None,
            dir: dir.to_owned(),
            max_upload: None,
            max_download: None,
            known: Vec::new(),
        };
        Net::start(config).await.unwrap().0
    }

    /// Whether each of these is there to be read, after another start in this folder that puts them back.
    async fn put_back_in(dir: &Path, files: &[(Hash, PathBuf)]) -> Vec<bool> {
        let net = started(dir).await;
        let store = Arc::new(Store::open(dir).unwrap());
        put_back(net.clone(), store, files.to_vec()).await;
        let mut there = Vec::new();
        for (name, _) in files {
            there.push(
                net.get(*name)
                    .await
                    .is_ok_and(|bytes| bytes.is_some_and(|bytes| Hash::of(&bytes) == *name)),
            );
        }
        net.shutdown().await;
        there
    }

    #[tokio::test]
    async fn what_a_peer_wrote_is_put_back_where_the_blob_store_lost_it() {
        let temp = tempfile::tempdir().unwrap();
        let (old, new) = (temp.path().join("old"), temp.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        let write = |at: &Path, fills: &[u8]| -> Vec<(Hash, PathBuf)> {
            let each = fills.iter().map(|fill| {
                let bytes = [*fill; 40_000];
                let (name, file) = (Hash::of(&bytes), at.join(Hash::of(&bytes).to_string()));
                std::fs::write(&file, bytes).unwrap();
                (name, file)
            });
            each.collect()
        };
        let files = write(&old, &[1, 2]);
        std::fs::write(&files[1].1, [2; 39_000]).unwrap();
        assert_eq!(put_back_in(&old, &files).await, [true, false], "one is torn");

        // Nothing is read again that the blob store knows: a file that is gone is not missed.
        let files = write(&old, &[1, 2, 3]);
        std::fs::remove_file(&files[0].1).unwrap();
        assert_eq!(put_back_in(&old, &files).await, [false, true, true]);
        assert!(Store::open(&old).unwrap().meta_get(KNOWN_IN).unwrap().is_some());

        std::fs::rename(&old, &new).unwrap();
        let gone = [(files[0].0, new.join(files[0].0.to_string()))];
        let files = [&gone[..], &write(&new, &[2, 3])].concat();
        assert_eq!(put_back_in(&new, &files).await, [false, true, true]);
        let noted = || Store::open(&new).unwrap().meta_get(KNOWN_IN).unwrap().unwrap();
        assert!(
            !noted().ends_with(b"new/blobs"),
            "one could not be read: all are read again"
        );
        write(&new, &[1]);
        assert_eq!(put_back_in(&new, &files).await, [true; 3]);
        assert!(noted().ends_with(b"new/blobs"));

        std::fs::remove_dir_all(new.join("blobs")).unwrap();
        assert_eq!(put_back_in(&new, &files).await, [true; 3]);
    }
}
