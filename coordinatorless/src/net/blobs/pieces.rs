//! A long blob from many providers at once: a snapshot, for a newcomer.
//!
//! It is cut into pieces; each provider serves one piece at a time, so that a newcomer takes no more than one peer's share of anyone's
//! upload, and the fast serve more pieces than the slow. Every piece is verified as it comes, and what has come stays: a piece that
//! its provider gave up on goes to another from where it ended, and a fetch that was interrupted, by a restart too, asks only for
//! what is missing.

use std::collections::VecDeque;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use iroh_blobs::protocol::{ChunkRanges, ChunkRangesExt, GetRequest};
use tokio::time::{Duration, timeout};

use super::{Attempt, Blobs, FetchError, failed, iroh};
use crate::types::{Hash, PeerId};

/// Chunks of a piece, of 1024 bytes each. Whatever is shorter has one provider.
const PIECE: u64 = 4096;
/// Bytes of a chunk.
const CHUNK: u64 = 1024;
/// Providers asked at once.
const MAX_SOURCES: usize = 8;
/// How long one piece may take. A slower provider is left out, unless none is left.
const PIECE_TIME: Duration = Duration::from_secs(30);

impl Blobs {
    /// Gets what is missing of a long blob from all providers at once, as far as they give it. What is missing after that is left
    /// to [`Blobs::fetch`], which asks one after the other.
    ///
    /// # Errors
    /// It is longer than `max_len`.
    pub(super) async fn fetch_pieces(
        &self,
        hash: Hash,
        max_len: u64,
        providers: &[PeerId],
        attempts: &mut Vec<(PeerId, String)>,
    ) -> Result<(), FetchError> {
        if max_len <= PIECE * CHUNK || providers.len() < 2 {
            return Ok(());
        }
        let Some((size, mut idle)) = self.sources(hash, providers, attempts).await else {
            return Ok(());
        };
        self.within(hash, max_len, size)?;
        let mut pieces = self.missing(hash, size).await?;
        let mut running = FuturesUnordered::new();
        loop {
            while !pieces.is_empty() && running.len() < MAX_SOURCES {
                let Some(provider) = idle.pop_front() else { break };
                let piece = pieces.pop_front().unwrap_or_default();
                running.push(async move {
                    (
                        provider,
                        self.fetch_piece(hash, size, piece.clone(), provider).await,
                        piece,
                    )
                });
            }
            match running.next().await {
                None => return Ok(()),
                Some((provider, Ok(()), _)) => idle.push_back(provider),
                Some((provider, Err(attempt), piece)) => {
                    self.gave_up();
                    attempts.push((provider, attempt.to_string()));
                    pieces.push_front(piece);
                }
            }
        }
    }

    /// The blob's length as the first provider that has it proves it, and that one with those not asked yet.
    async fn sources(
        &self,
        hash: Hash,
        providers: &[PeerId],
        attempts: &mut Vec<(PeerId, String)>,
    ) -> Option<(u64, VecDeque<PeerId>)> {
        for (at, provider) in providers.iter().enumerate() {
            match self.prove_length(hash, *provider).await {
                Ok((_, size)) => return Some((size, providers[at..].iter().copied().collect())),
                Err(attempt) => {
                    self.gave_up();
                    attempts.push((*provider, attempt.to_string()));
                }
            }
        }
        None
    }

    /// What is not here yet, in pieces.
    async fn missing(&self, hash: Hash, size: u64) -> Result<VecDeque<ChunkRanges>, FetchError> {
        let held = self.store.observe(iroh(hash)).await;
        let held = held.map_err(|error| FetchError::Store(error.to_string()))?.ranges;
        let end = size.div_ceil(CHUNK);
        let missing = ChunkRanges::chunks(0..end) - &held;
        let starts = (0..end).step_by(PIECE as usize);
        let pieces = starts.map(|start| ChunkRanges::chunks(start..(start + PIECE).min(end)) & &missing);
        Ok(pieces.filter(|piece| !piece.is_empty()).collect())
    }

    async fn fetch_piece(&self, hash: Hash, size: u64, piece: ChunkRanges, provider: PeerId) -> Result<(), Attempt> {
        let piece = async {
            let connection = self.connect(provider).await?;
            // A part may have come before its last provider gave up.
            let held = self.store.observe(iroh(hash)).await.map_err(failed)?.ranges;
            let missing = piece - &held;
            if missing.is_empty() {
                return Ok(());
            }
            self.get_ranges(hash, size, connection, GetRequest::blob_ranges(iroh(hash), missing))
                .await
        };
        let late = || Attempt::Failed(format!("a piece took longer than {PIECE_TIME:?}"));
        timeout(PIECE_TIME, piece).await.unwrap_or_else(|_| Err(late()))
    }
}
