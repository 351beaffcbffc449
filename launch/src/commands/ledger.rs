//! `murmur ledger show|verify`: the record chain as anyone can replay it from a peer's directory, live or not.

pub mod bare;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use coordinatorless::config::RunConfig;
use coordinatorless::ledger::{Account, PROOFS};
use coordinatorless::protocol::chain::ChainState;
use coordinatorless::protocol::sync::verify_next;
use coordinatorless::store::{Store, StoreError};
use coordinatorless::types::{Decided, Hash, PeerId, Round};
use coordinatorless::wire::Scheme;
use serde::Serialize;
use serde_json::json;

use super::print_json;
use crate::cli::LedgerCommand;
use crate::failure::usage;
use crate::peer_dir::PeerDir;
use crate::units::thousands;

/// Does what was asked.
pub fn run(command: &LedgerCommand) -> Result<()> {
    match command {
        LedgerCommand::Show(args) => show(&PeerDir::find(args.dir.dir.as_deref())?, args.json),
        LedgerCommand::Verify(args) => verify_command(&PeerDir::find(args.dir.dir.as_deref())?, args.json),
    }
}

/// A chain that was replayed from genesis.
#[derive(Debug)]
pub struct Verified {
    /// Records replayed.
    pub records: u64,
    /// The last one's hash.
    pub record: Hash,
    /// Root of the balances after it.
    pub ledger_root: Hash,
    accounts: Vec<Account>,
}

impl Verified {
    /// A member's points, provisional and vested.
    pub fn points_of(&self, id: &PeerId) -> u128 {
        self.accounts
            .iter()
            .find(|account| account.id == *id)
            .map_or(0, |account| account.provisional_points() + account.vested)
    }
}

/// The first place where a chain is not what it should be.
#[derive(Debug, Serialize)]
struct Bad {
    round: u64,
    what: String,
    expected: String,
    found: String,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "record {}: {}: expected {}, found {}",
            self.round, self.what, self.expected, self.found
        )
    }
}

impl std::error::Error for Bad {}

/// Replays the chain of a peer's directory from genesis: every signature, certificate, rule and root.
///
/// # Errors
/// The first record that does not verify; or a directory without records (exit code 2).
pub fn verify(dir: &PeerDir) -> Result<Verified> {
    let config = dir.run_config()?;
    let records = bare::open(dir.path()).map_err(|error| match error.downcast_ref() {
        Some(StoreError::Missing { .. }) => usage(format!("{} holds no records yet", dir.path().display())),
        // Not one page can be read: what comes first is gone with the rest.
        Some(StoreError::Damaged(_) | StoreError::Database(_)) => unreadable(Round(1), &error).into(),
        _ => error,
    })?;
    let state = replay(&config, &records.store)?;
    Ok(Verified {
        records: state.agreed.round.0,
        record: state.agreed.record,
        ledger_root: state.ledger.root(),
        accounts: state.ledger.accounts,
    })
}

fn replay(config: &RunConfig, store: &Store) -> Result<ChainState> {
    let mut state = ChainState::genesis(config);
    loop {
        let round = state.agreed.round.next();
        // One at a time: a record that cannot be read must not hide one before it that breaks a rule.
        let read = store.records(round, 1).map_err(|error| unreadable(round, &error))?;
        let Some(decided) = read.first() else { break };
        let found = decided.record.slot.round;
        if found != round {
            let bad = Bad {
                round: round.0,
                what: "the record is missing".into(),
                expected: round.to_string(),
                found: found.to_string(),
            };
            return Err(bad.into());
        }
        state = verify_next(&state, config, decided, Scheme::Ed25519)
            .map_err(|why| Bad {
                round: round.0,
                what: why,
                expected: expected(decided),
                found: decided.record.hash().to_string(),
            })?
            .0;
    }
    stored_state(store, &state)?;
    Ok(state)
}

/// What should stand in the place of a record that does not verify.
fn expected(decided: &Decided) -> String {
    if decided.record.hash() == decided.certificate.record {
        "a record that follows from the one before, with its certificate".to_owned()
    } else {
        format!("{}, which was certified", decided.certificate.record)
    }
}

/// The state that the store keeps of the last round must be the one that the records lead to.
fn stored_state(store: &Store, state: &ChainState) -> Result<()> {
    let round = state.agreed.round;
    let Some(bytes) = store.state(round).map_err(|error| unreadable(round, &error))? else {
        return Ok(());
    };
    let stored = ChainState::from_bytes(&bytes).map(|stored| (stored.state_root(), stored.ledger.root()));
    let replayed = (state.state_root(), state.ledger.root());
    match stored {
        Ok(stored) if stored == replayed => Ok(()),
        Ok((_, found)) => Err(Bad {
            round: round.0,
            what: "the stored balances".into(),
            expected: replayed.1.to_string(),
            found: found.to_string(),
        }
        .into()),
        Err(error) => Err(unreadable(round, &error).into()),
    }
}

fn unreadable(round: Round, error: &dyn std::fmt::Display) -> Bad {
    Bad {
        round: round.0,
        what: "the record cannot be read".into(),
        expected: "whole, canonical bytes".into(),
        found: error.to_string(),
    }
}

fn verify_command(dir: &PeerDir, json: bool) -> Result<()> {
    let started = Instant::now();
    let result = verify(dir);
    let secs = started.elapsed().as_secs_f64();
    match result {
        Ok(verified) if json => print_json(&json!({
            "ok": true, "records": verified.records, "record": verified.record, "ledger_root": verified.ledger_root,
            "first_bad": null, "secs": secs,
        })),
        Ok(verified) => {
            println!(
                "records      {}, every signature, rule and root checked from genesis ({secs:.1} s)",
                verified.records
            );
            println!("record       {}", verified.record);
            println!("ledger root  {}", verified.ledger_root);
            Ok(())
        }
        Err(error) => {
            let Some(bad) = error.downcast_ref::<Bad>() else {
                return Err(error);
            };
            if json {
                let records = bad.round.saturating_sub(1);
                print_json(&json!({
                    "ok": false, "records": records, "record": null, "ledger_root": null, "first_bad": bad, "secs": secs,
                }))?;
            }
            bail!("{bad}");
        }
    }
}

fn show(dir: &PeerDir, json: bool) -> Result<()> {
    let store = Store::open_read_only(dir.path()).map_err(usage)?;
    let Some((_, round, _)) = store.tip()? else {
        return Err(usage(format!("{} holds no records yet", dir.path().display())));
    };
    let bytes = store
        .state(round)?
        .with_context(|| format!("the store has no balances of round {round}"))?;
    let ledger = ChainState::from_bytes(&bytes)?.ledger;
    if json {
        let members: Vec<_> = ledger.accounts.iter().map(|account| json!({
            "id": account.id, "address": account.address, "tokens": account.tokens, "provisional": points(account.provisional_points()),
            "vested": points(account.vested), "slashed": points(account.slashed), "unpaid": points(account.unpaid), "paid": 0, "strikes": account.strikes,
            "audits": account.audits, "proofs": account.proofs,
        })).collect();
        return print_json(&json!({"round": round, "issued": points(ledger.issued), "members": members}));
    }
    println!(
        "balances after round {round}; {} points issued",
        thousands(ledger.issued)
    );
    println!(
        "  member            tokens  provisional       vested      slashed       unpaid  strikes  audits  proofs  address"
    );
    for account in &ledger.accounts {
        println!(
            "  {}  {:>12}  {:>11}  {:>11}  {:>11}  {:>11}  {:>7}  {:>6}  {:>6}  {}",
            account.id.short(),
            thousands(account.tokens),
            thousands(account.provisional_points()),
            thousands(account.vested),
            thousands(account.slashed),
            thousands(account.unpaid),
            account.strikes,
            account.audits,
            account.proofs,
            account.address
        );
    }
    let waits = |account: &&Account| account.proofs < PROOFS && account.provisional_points() > 0;
    let audited = dir.run_config()?.verification.audit_permille > 0;
    if audited && ledger.accounts.iter().any(|account| waits(&account)) {
        println!("points vest once {PROOFS} audits have proven a member's work");
    }
    Ok(())
}

/// JSON numbers end at 64 bits.
fn points(points: u128) -> u64 {
    u64::try_from(points).unwrap_or(u64::MAX)
}
