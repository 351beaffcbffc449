//! Joining by ticket (R18). When this is done, the directory looks like that of a peer that was here before, and the node starts
//! like a restarted one; its snapshot and the counted contributions since are fetched then, from many.
//!
//! The whole chain is fetched and checked from the genesis, which follows from the run's id: every certificate, every rule, every
//! balance. The ticket's checkpoint must lie on it. That is more than trusting the checkpoint, and needed anyway: the chain is the
//! ledger, and every member can verify it (`murmur ledger verify`). Nothing is trained again.

use std::time::Duration;

use super::transfer;
use crate::config::{ConfigError, RunConfig};
use crate::net::{Net, Request, Response};
use crate::protocol::chain::ChainState;
use crate::protocol::sync::{fork_share, verify_next};
use crate::store::{Store, StoreError};
use crate::ticket::Ticket;
use crate::types::*;
use crate::wire::Scheme;

/// One answer may take this long.
const ANSWER: Duration = Duration::from_secs(15);
/// Records asked for at once.
const RECORDS: u32 = 256;

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody in the ticket answers.
    #[error("none of the ticket's {tried} peers answered ({last}); ask for a fresh ticket")]
    NobodyAnswers {
        /// How many were asked.
        tried: usize,
        /// The last failure.
        last: String,
    },
    /// What they gave is not the run's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A record is not certified, or breaks a rule.
    #[error("round {round} of the chain that was offered is not valid: {reason}")]
    Record {
        /// Its round.
        round: Round,
        /// Why.
        reason: String,
    },
    /// The chain does not contain the ticket's checkpoint.
    #[error(
        "the chain that was offered does not contain the ticket's checkpoint (round {round}, {hash}); it is another branch"
    )]
    Checkpoint {
        /// The checkpoint's round.
        round: Round,
        /// Its hash.
        hash: Hash,
    },
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Peers that answer for the ticket, those that did first.
async fn ask(net: &Net, peers: &[PeerId], request: Request) -> Result<(PeerId, Response), JoinError> {
    let mut last = String::from("no peers");
    for peer in peers {
        match net.request(*peer, request.clone(), ANSWER).await {
            Ok(Response::Unknown) => last = format!("{} does not know the run", peer.short()),
            Ok(response) => return Ok((*peer, response)),
            Err(error) => last = error.to_string(),
        }
    }
    Err(JoinError::NobodyAnswers {
        tried: peers.len(),
        last,
    })
}

/// Fetches the run's configuration and checks it against the id in the ticket.
pub async fn run_config(net: &Net, ticket: &Ticket, peers: &[PeerId]) -> Result<RunConfig, JoinError> {
    match ask(net, peers, Request::RunConfig).await? {
        (_, Response::RunConfig(bytes)) => Ok(RunConfig::from_agreed(&bytes, Some(ticket.run))?),
        (peer, _) => Err(JoinError::NobodyAnswers {
            tried: peers.len(),
            last: format!("{} gave another answer", peer.short()),
        }),
    }
}

/// Fetches the chain, checks all of it, and leaves it in the store with the newest snapshot's root.
pub async fn chain(
    net: &Net,
    store: &Store,
    config: &RunConfig,
    ticket: &Ticket,
    peers: &[PeerId],
) -> Result<Round, JoinError> {
    let (_, checkpoint, hash) = ticket.checkpoint;
    // What an earlier attempt left behind is fetched again: it may have come from someone else.
    store.truncate_above(Round(0))?;
    let mut state = ChainState::genesis(config);
    let mut met = checkpoint == Round(0);
    loop {
        let from = state.agreed.round.next();
        let (_, response) = ask(net, peers, Request::Records { from, max: RECORDS }).await?;
        let Response::Records(batch) = response else { break };
        if batch.is_empty() {
            break;
        }
        for decided in batch {
            let round = decided.record.slot.round;
            let invalid = |reason: String| JoinError::Record { round, reason };
            // Who went on alone may have done so against everyone else; a ticket from their branch says that it is wanted.
            let share = fork_share(&state, config, &decided, Scheme::Ed25519);
            if round > checkpoint && share.is_some_and(|share| share <= 500) {
                return Err(invalid(
                    "a minority went on alone here, after the ticket was made; ask for a fresh ticket".into(),
                ));
            }
            let (next, _) = verify_next(&state, config, &decided, Scheme::Ed25519).map_err(invalid)?;
            if round == checkpoint {
                met = next.agreed.record == hash;
                if !met {
                    return Err(JoinError::Checkpoint {
                        round: checkpoint,
                        hash,
                    });
                }
            }
            store.put(&decided, &next.to_bytes())?;
            state = next;
        }
    }
    if !met {
        return Err(JoinError::Checkpoint {
            round: checkpoint,
            hash,
        });
    }
    // A young run has no snapshot yet: then everything that was counted is still there.
    let (at_most, spacing) = (state.agreed.round.previous(), config.storage.snapshot_rounds);
    let offered = transfer::offered_snapshots(net, store, at_most, peers, spacing).await;
    transfer::set_snapshots(store, &offered)?;
    Ok(state.agreed.round)
}
