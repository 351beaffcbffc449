//! What a node gives to others, and what it keeps for them (R17).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::NodeError;
use super::driver::Driver;
use super::restore::history_window;
use super::transfer::{self, SnapshotEntry};
use crate::net::{Request, Response, SnapshotInfo, StatusInfo};
use crate::protocol::event::Notice;
use crate::protocol::replayed::Ask;
use crate::types::*;

/// A snapshot stays at least this long, if there are no more than so many.
const YOUNG: Duration = Duration::from_secs(30);
const MAX_YOUNG: usize = 8;

/// Records handed out in one answer, in bytes at most.
const ANSWER_BYTES: usize = 4 << 20;

impl Driver {
    /// What other peers may ask.
    pub(super) async fn answer(&mut self, from: PeerId, request: Request) -> Response {
        if let Request::Trace(ask) = &request {
            return self.tell_trace(from, ask);
        }
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
            Request::Snapshot { at_most } => {
                let usable = |entry: &&SnapshotEntry| {
                    entry.round < agreed.round && entry.round <= at_most && transfer::on_chain(&self.node.store, entry)
                };
                match transfer::snapshots(&self.node.store).iter().rev().find(usable) {
                    Some(entry) => Response::Snapshot(SnapshotInfo {
                        branch: entry.branch,
                        round: entry.round,
                        model_root: entry.model_root,
                        model_len: entry.model_len,
                    }),
                    None => Response::Unknown,
                }
            }
            Request::Speed { branch, asked, member } => self.tell_speed(branch, asked, member),
            Request::Trace(_) => Response::Unknown,
        }
    }

    /// R25: one answer for each auditor, noted before it leaves.
    fn tell_trace(&mut self, auditor: PeerId, ask: &Ask) -> Response {
        let (chain, config) = (self.state.chain().clone(), self.node.config.run.clone());
        let answer = match self.traces.answer(&chain, &config, &self.keys, auditor, ask) {
            Ok(answer) => answer,
            Err(why) => {
                tracing::debug!(auditor = %auditor.short(), round = %ask.slot.round, why, "no trace for an auditor");
                return Response::Unknown;
            }
        };
        match self.node.store.keep_traces(&self.traces) {
            Ok(()) => Response::Trace(answer),
            Err(error) => {
                tracing::warn!(%error, "no trace for an auditor");
                Response::Unknown
            }
        }
    }

    pub(super) async fn keep_snapshot(
        &mut self,
        branch: Branch,
        round: Round,
        root: Hash,
        file: &Path,
    ) -> Result<(), NodeError> {
        let held = self.node.net.put_file(file).await?;
        self.node.net.flush_blobs().await?;
        if held != root {
            let reason = format!("the snapshot file of round {round} is torn: expected {root}, found {held}");
            self.notice(Notice::Warning(reason));
            return Ok(());
        }
        let model_len = tokio::fs::metadata(file).await.map(|meta| meta.len()).unwrap_or(0);
        let mut all = transfer::snapshots(&self.node.store);
        // Those of this round and later are of a branch that was left.
        let mut dropped: Vec<SnapshotEntry> = all.extract_if(.., |entry| entry.round >= round).collect();
        all.push(SnapshotEntry {
            branch,
            round,
            model_root: root,
            model_len,
        });
        let finality = self.node.config.run.membership.finality_rounds;
        let folder = file.parent().unwrap_or(Path::new("."));
        dropped.extend(superseded(&mut all, self.kept(), finality, |entry| {
            is_young(folder, entry)
        }));
        for old in dropped.iter().filter(|old| old.model_root != root) {
            let _gone = tokio::fs::remove_file(snapshot_file(folder, old)).await;
        }
        transfer::set_snapshots(&self.node.store, &all)?;
        self.node.store.keep_state(round)?;
        let back = Round(round.0.saturating_sub(history_window(&self.node.config.run)));
        if let Some((oldest, _)) = self.node.store.state_at_or_below(back)? {
            self.node.store.release_states_below(oldest)?;
        }
        self.collect_garbage()
    }

    /// R17: the last two snapshots. With overlap (R16) one more: a round is replayed from the model of a record before.
    fn kept(&self) -> usize {
        2 + self.node.config.run.timing.overlap as usize
    }

    /// Drops blobs that neither R17 nor the round in progress nor an auditor needs.
    fn collect_garbage(&mut self) -> Result<(), NodeError> {
        let mut keep = self.shared.clone();
        let snapshots = transfer::snapshots(&self.node.store);
        keep.extend(snapshots.iter().map(|entry| entry.model_root));
        keep.extend(self.accumulators.iter().map(|(_, _, root)| root));
        let bases = bases(&snapshots, self.kept(), self.node.config.run.storage.snapshot_rounds);
        for (i, (branch, base)) in bases.iter().enumerate() {
            // Of a branch that may be gone back to: up to where it was left. The rest follows from the next snapshot.
            let next = bases.get(i + 1).map(|next| next.1);
            let mut at = base.next();
            while next.is_none_or(|next| at <= next)
                && let Some(decided) = self.node.store.record(at)?
            {
                if i + self.kept() < bases.len() && decided.record.slot.branch != *branch {
                    break;
                }
                for one in &decided.record.contributions {
                    keep.extend(&one.commit.shards);
                    keep.extend([one.commit.accumulator_before, one.commit.accumulator_after]);
                }
                at = at.next();
            }
        }
        keep.extend(self.state.current_shards());
        self.node.net.retain(keep);
        Ok(())
    }
}

/// From where contributions are kept: the snapshots that are held, and as long as they are fewer than `kept`, where the one before
/// them was: the start of the run, or of whoever loaded a model in the middle.
fn bases(snapshots: &[SnapshotEntry], kept: usize, spacing: u64) -> Vec<(Branch, Round)> {
    let missing = kept.saturating_sub(snapshots.len()) as u64;
    let mut held: Vec<_> = snapshots.iter().map(|entry| (entry.branch, entry.round)).collect();
    if missing > 0 {
        let (branch, first) = held.first().copied().unwrap_or((0, Round(0)));
        held.insert(
            0,
            (branch, Round(first.0.saturating_sub(missing.saturating_mul(spacing)))),
        );
    }
    held
}

pub(super) fn snapshot_file(folder: &Path, entry: &SnapshotEntry) -> PathBuf {
    folder.join(format!("{}.safetensors", entry.model_root))
}

/// Whether somebody who was told of this snapshot may still be fetching it, or what was counted since.
fn is_young(folder: &Path, entry: &SnapshotEntry) -> bool {
    let written = std::fs::metadata(snapshot_file(folder, entry)).and_then(|meta| meta.modified());
    written.is_ok_and(|written| written.elapsed().unwrap_or_default() < YOUNG)
}

/// Takes out what need not be kept. R17: the last `least`, with everything counted since the oldest; some more while they are young,
/// since rounds may be shorter than a transfer; and while a branch may still be gone back to (R21), the newest snapshot from before
/// it was left: those who come back may be too few to have one.
fn superseded(
    all: &mut Vec<SnapshotEntry>,
    least: usize,
    finality: u64,
    young: impl Fn(&SnapshotEntry) -> bool,
) -> Vec<SnapshotEntry> {
    let Some(newest) = all.last().copied() else {
        return Vec::new();
    };
    let older = all.len().saturating_sub(least);
    let kept: Vec<bool> = all
        .iter()
        .enumerate()
        .map(|(i, entry)| {
            let last_of_its_branch = all.get(i + 1).is_some_and(|next| next.branch != entry.branch);
            let open = newest.round.0 - entry.round.0 <= finality.saturating_mul(2);
            i >= older || (last_of_its_branch && open) || (i + MAX_YOUNG >= all.len() && young(entry))
        })
        .collect();
    let mut at = kept.iter();
    all.extract_if(.., |_| !at.next().copied().unwrap_or(true)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(branch: u32, round: u64) -> SnapshotEntry {
        SnapshotEntry {
            branch,
            round: Round(round),
            model_root: Hash::of(&round.to_be_bytes()),
            model_len: 1,
        }
    }

    /// Snapshots left when they come one after the other.
    fn left(rounds: impl IntoIterator<Item = (u32, u64)>) -> Vec<(u32, u64)> {
        let mut all = Vec::new();
        for (branch, round) in rounds {
            all.push(at(branch, round));
            superseded(&mut all, 2, 64, |entry| entry.model_len > 1);
        }
        all.iter().map(|entry| (entry.branch, entry.round.0)).collect()
    }

    #[test]
    fn the_last_two_snapshots_stay() {
        assert_eq!(left((1..9).map(|i| (0, i * 4))), [(0, 28), (0, 32)]);
    }

    #[test]
    fn young_snapshots_stay_up_to_eight() {
        let mut all: Vec<SnapshotEntry> = (1..=12).map(|i| at(0, i * 4)).collect();
        superseded(&mut all, 2, 64, |entry| entry.round >= Round(36));
        assert_eq!(all.first().map(|entry| entry.round), Some(Round(36)));
        let mut all: Vec<SnapshotEntry> = (1..=12).map(|i| at(0, i * 4)).collect();
        superseded(&mut all, 2, 64, |_| true);
        assert_eq!(all.len(), MAX_YOUNG);
    }

    #[test]
    fn what_was_counted_before_the_first_snapshot_stays_until_the_second() {
        let rounds = |entries: &[SnapshotEntry], kept| {
            let bases = bases(entries, kept, 8);
            bases.iter().map(|(_, round)| round.0).collect::<Vec<_>>()
        };
        assert_eq!(rounds(&[], 2), [0]);
        assert_eq!(rounds(&[at(0, 8)], 2), [0, 8]);
        assert_eq!(rounds(&[at(0, 8), at(0, 16)], 2), [8, 16]);
        assert_eq!(rounds(&[at(0, 8), at(0, 16)], 3), [0, 8, 16], "overlap keeps one more");
        assert_eq!(rounds(&[at(0, 16)], 2), [8, 16], "whoever loaded the model of round 9");
        assert_eq!(rounds(&[at(0, 16)], 3), [0, 16]);
    }

    #[test]
    fn the_last_of_a_branch_that_may_be_gone_back_to_stays() {
        let alone = (1..10).map(|i| (if i <= 3 { 0 } else { 7 }, i * 4));
        assert_eq!(left(alone), [(0, 12), (7, 32), (7, 36)]);
        // Long after, nobody goes back.
        let final_by_now = (1..60).map(|i| (if i <= 3 { 0 } else { 7 }, i * 4));
        assert_eq!(left(final_by_now), [(7, 232), (7, 236)]);
    }
}
