//! What a node gives to others, and what it keeps for them (R17).

use super::NodeError;
use super::driver::Driver;
use super::transfer::{self, SnapshotEntry};
use crate::net::{Request, Response, SnapshotInfo, StatusInfo};
use crate::protocol::event::Notice;
use crate::types::*;

/// Records handed out in one answer, in bytes at most.
const ANSWER_BYTES: usize = 4 << 20;

impl Driver {
    /// What other peers may ask.
    pub(super) async fn answer(&self, request: Request) -> Response {
        let agreed = &self.state.chain().agreed;
        match request {
            Request::Status => Response::Status(StatusInfo {
                run: agreed.run,
                branch: agreed.branch,
                round: agreed.round.next(),
                tip: agreed.record,
                tip_round: agreed.round,
            }),
            Request::RunConfig => Response::RunConfig(self.node.config.run.to_canonical_toml().into_bytes()),
            Request::Records { from, max } => {
                let records = self.node.store.records(from, max.min(512)).unwrap_or_default();
                let mut size = 0;
                // Whatever their size, one record goes through: it has the same limit.
                let fits = |decided: &Decided| {
                    size += 400 * (1 + decided.record.contributions.len() + decided.certificate.votes.len() / 3);
                    size <= ANSWER_BYTES
                };
                Response::Records(records.into_iter().take_while(fits).collect())
            }
            Request::Record { hash } => Response::Record(self.node.store.by_hash(hash).ok().flatten().map(Box::new)),
            Request::Snapshot => {
                let certified = |entry: &&SnapshotEntry| entry.round < agreed.round;
                match transfer::snapshots(&self.node.store).iter().rev().find(certified) {
                    Some(entry) => Response::Snapshot(SnapshotInfo {
                        branch: entry.branch,
                        round: entry.round,
                        model_root: entry.model_root,
                        model_len: entry.model_len,
                    }),
                    None => Response::Unknown,
                }
            }
        }
    }

    pub(super) async fn keep_snapshot(
        &mut self,
        branch: Branch,
        round: Round,
        root: Hash,
        file: &std::path::Path,
    ) -> Result<(), NodeError> {
        let held = self.node.net.put_file(file).await?;
        if held != root {
            let reason = format!("the snapshot file of round {round} is torn: expected {root}, found {held}");
            self.notice(Notice::Warning(reason));
            return Ok(());
        }
        let model_len = tokio::fs::metadata(file).await.map(|meta| meta.len()).unwrap_or(0);
        let mut all = transfer::snapshots(&self.node.store);
        all.retain(|entry| entry.round < round);
        all.push(SnapshotEntry {
            branch,
            round,
            model_root: root,
            model_len,
        });
        // R17: the last two, with everything counted since the older.
        let dropped = all.len().saturating_sub(2);
        for old in all.drain(..dropped) {
            let _gone = tokio::fs::remove_file(file.with_file_name(format!("{}.safetensors", old.model_root))).await;
        }
        transfer::set_snapshots(&self.node.store, &all)?;
        self.node.store.keep_state(round)?;
        self.collect_garbage()
    }

    /// Drops blobs that neither R17 nor the round in progress nor an auditor needs.
    fn collect_garbage(&mut self) -> Result<(), NodeError> {
        let mut keep = self.shared.clone();
        let snapshots = transfer::snapshots(&self.node.store);
        keep.extend(snapshots.iter().map(|entry| entry.model_root));
        keep.extend(self.accumulators.values());
        let mut at = snapshots.first().map_or(Round(1), |entry| entry.round);
        while let Some(decided) = self.node.store.record(at)? {
            for one in &decided.record.contributions {
                keep.extend(&one.commit.shards);
                keep.extend([one.commit.accumulator_before, one.commit.accumulator_after]);
            }
            at = at.next();
        }
        keep.extend(self.state.current_shards());
        self.node.net.retain(keep);
        Ok(())
    }
}
