//! `murmur audit --round R --member M`: a member's round, replayed from what a peer's directory holds.
//!
//! Nobody's word is taken: the chain is replayed from genesis, the model is built from a snapshot that the chain certifies and the
//! contributions counted since, and the member's accumulators are the blobs that its signed commit names. Those are held by the member itself
//! and by whoever has audited it; everything else by every peer, for two snapshots' time (R17). `--fetch` gets from them what the directory lacks.

mod held;

use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use coordinatorless::config::RunConfig;
use coordinatorless::protocol::chain::ChainState;
use coordinatorless::protocol::event::AuditOrder;
use coordinatorless::protocol::replayed;
use coordinatorless::protocol::sync::{branch_base, verify_next};
use coordinatorless::protocol::train_order;
use coordinatorless::store::Store;
use coordinatorless::types::{Decided, Finding, PeerId, Round, SignedVerdict};
use coordinatorless::wire::Scheme;
use gradient_verify::{Replay, explain, judge};
use serde_json::json;
use trainer::local::set_threads;
use trainer::model::Model;

use self::held::Held;
use super::ledger::bare;
use super::print_json;
use crate::cli::AuditArgs;
use crate::device::{device, threads};
use crate::failure::usage;
use crate::kit::Kit;
use crate::peer_dir::PeerDir;
use crate::side;

/// Replays, and tells. A difference is a failure (exit code 1).
///
/// # Errors
/// No such round or member (exit code 2); the directory lacks what the replay needs; or the replay differs from what was claimed.
pub fn run(round: u64, member: &str, args: &AuditArgs) -> Result<()> {
    let dir = PeerDir::find(args.source.dir.dir.as_deref())?;
    let (config, round) = (dir.run_config()?, Round(round));
    let compute_on = device(Some(&args.device))?;
    let threads = threads(args.threads)?;
    let records = bare::open(dir.path()).map_err(usage)?;
    let mut found = find(&config, &records.store, round, member)?;
    let held = Held::open(&dir, &config, args.fetch.then(|| found.likely()))?;
    let source = held.model_after(&records.store, found.order.work.base, round)?;
    let commit = &found.order.contribution.commit;
    let shards = held.shards(commit).with_context(|| {
        format!(
            "the contribution of {} to round {round}",
            found.order.contribution.member.short()
        )
    })?;
    let kit = Kit::open(config, &dir, threads)?;
    let opened = held.opened(&kit, &mut found)?;
    set_threads(threads);
    let agreed = kit.rebuild(&source)?;
    let mut model = Model::new(&kit.model, compute_on)?;
    let began = Instant::now();
    let replayed = side::replayed(&kit, &mut model, &found.order, &agreed, &shards, &opened);
    let secs = began.elapsed().as_secs_f64();
    let bound = kit.config.verification.bound;
    let traces = Traced::of(&found, &records.store, &kit.config, replayed.as_ref().ok());
    let outcome = match replayed {
        Ok(replay) => Outcome::of(&found.order, &replay, bound),
        Err(error) if error.blames_member() => Outcome {
            finding: Finding::Differs,
            replay: None,
            words: format!("peer {}: {error}", found.order.contribution.member.short()),
        },
        Err(error) => return Err(error).context("the round cannot be replayed here"),
    };
    let bounds = (bound, kit.config.verification.trace_bound);
    tell(args.json, &found, &outcome, &traces, bounds, secs)?;
    match outcome.finding {
        Finding::Agrees => Ok(()),
        _ => Err(anyhow!("the replay differs from what was claimed")),
    }
}

/// What the chain says of the round.
struct Found {
    order: AuditOrder,
    /// What auditors said of it, each with the round of the record that has it.
    verdicts: Vec<(Round, SignedVerdict)>,
    /// From what followed which leaves they opened.
    leaf_seeds: Vec<[u8; 32]>,
    /// Who takes part by now, and may be there.
    members: Vec<PeerId>,
}

impl Found {
    /// Who may hold what was opened, the likeliest first: whoever audited it, the member itself, other members.
    fn likely(&self) -> Vec<PeerId> {
        let auditors = self.verdicts.iter().map(|(_, one)| one.auditor);
        let member = std::iter::once(self.order.contribution.member);
        let mut likely: Vec<PeerId> = Vec::new();
        for id in auditors.chain(member).chain(self.members.iter().copied()) {
            if !likely.contains(&id) {
                likely.push(id);
            }
        }
        likely
    }
}

/// Replays the chain from genesis, every rule checked, up to the end: verdicts come in later records.
fn find(config: &RunConfig, store: &Store, round: Round, member: &str) -> Result<Found> {
    let (mut state, mut order, mut verdicts) = (ChainState::genesis(config), None, Vec::new());
    let mut leaf_seeds = std::collections::BTreeSet::new();
    loop {
        let next = state.agreed.round.next();
        let Some(decided) = store.records(next, 1)?.into_iter().next() else {
            break;
        };
        if next == round {
            order = Some(ordered(config, &state, &decided, member)?);
        }
        if let Some(AuditOrder { contribution, .. }) = &order {
            let about =
                |one: &&SignedVerdict| (one.verdict.slot.round, one.verdict.member) == (round, contribution.member);
            let said = decided.record.verdicts.iter().filter(about);
            verdicts.extend(said.map(|one| (next, one.clone())));
            leaf_seeds.extend(
                verdicts
                    .iter()
                    .filter_map(|(_, one)| one.verdict.lot.as_ref())
                    .map(|lot| lot.output),
            );
        }
        state = verify_next(&state, config, &decided, Scheme::Ed25519)
            .map_err(|why| anyhow!("record {next}: {why}; `murmur ledger verify` says more"))?
            .0;
    }
    let last = state.agreed.round;
    let order = order.ok_or_else(|| {
        usage(format!(
            "--round {round}: this directory's records go from round 1 to {last}"
        ))
    })?;
    Ok(Found {
        order,
        verdicts,
        leaf_seeds: leaf_seeds.into_iter().collect(),
        members: state.active().collect(),
    })
}

/// The work of the member whose id begins so, as the record of its round has it.
fn ordered(config: &RunConfig, state: &ChainState, decided: &Decided, member: &str) -> Result<AuditOrder> {
    let record = &decided.record;
    if record.carried.is_some() {
        return Err(usage(format!(
            "--round {}: its work was done before its branch began, and cannot be audited there",
            record.slot.round
        )));
    }
    let known: Vec<PeerId> = record.contributions.iter().map(|one| one.member).collect();
    let named: Vec<_> = record
        .contributions
        .iter()
        .filter(|one| one.member.to_string().starts_with(member))
        .collect();
    let [contribution] = named.as_slice() else {
        let counted: Vec<String> = known.iter().map(PeerId::short).collect();
        let how_many = if named.is_empty() {
            "no member"
        } else {
            "several members"
        };
        return Err(usage(format!(
            "--member {member}: {how_many} counted in round {} begin so; there are {}",
            record.slot.round,
            counted.join(", ")
        )));
    };
    let before = branch_base(state, config, decided, Scheme::Ed25519).map_err(|why| anyhow!(why))?;
    Ok(AuditOrder {
        work: train_order(&before, config, &contribution.member, 0),
        contribution: (*contribution).clone(),
        draw: 0,
        lot: None,
        accusation: None,
        leaf_seed: [0; 32],
    })
}

/// The member's trace against the replay's, where this directory knows it: the member's own, or shown by an auditor that agreed.
enum Traced {
    Unknown,
    Agree,
    /// The first step that differs, from 0.
    Parts(usize),
}

impl Traced {
    fn of(found: &Found, store: &Store, config: &RunConfig, replay: Option<&Replay>) -> Self {
        let root = found.order.contribution.commit.trace_root;
        let shown = found
            .verdicts
            .iter()
            .filter_map(|(_, one)| one.verdict.replayed.as_ref());
        let shown = shown
            .map(|shown| shown.claimed.clone())
            .find(|trace| trace.root() == root);
        let own = || store.traces().ok()?.find(root);
        let (Some(claimed), Some(replay)) = (shown.or_else(own), replay) else {
            return Self::Unknown;
        };
        match replay.trace.parts(&claimed, config.verification.trace_bound) {
            Some(step) => Self::Parts(step),
            None => Self::Agree,
        }
    }

    /// How many steps agree before one does not; `None` if nobody knows, or all do.
    fn agree(&self) -> Option<usize> {
        match self {
            Self::Parts(step) => Some(*step),
            Self::Unknown | Self::Agree => None,
        }
    }

    fn words(&self) -> Option<String> {
        match self {
            Self::Unknown => None,
            Self::Agree => Some("agree".to_owned()),
            Self::Parts(step) => Some(replayed::parted(*step)),
        }
    }
}

/// What came of it.
struct Outcome {
    finding: Finding,
    replay: Option<Replay>,
    words: String,
}

impl Outcome {
    fn of(order: &AuditOrder, replay: &Replay, bound: f64) -> Self {
        Self {
            finding: judge(replay, bound),
            replay: Some(replay.clone()),
            words: explain(order, replay, bound),
        }
    }
}

/// The first step, from 0, in which the traces that a record shows part.
fn parted(signed: &SignedVerdict, trace_bound: f64) -> Option<usize> {
    signed.verdict.replayed.as_ref()?.parted(trace_bound)
}

fn tell(
    json: bool,
    found: &Found,
    outcome: &Outcome,
    traces: &Traced,
    (bound, trace_bound): (f64, f64),
    secs: f64,
) -> Result<()> {
    let contribution = &found.order.contribution;
    let replay = outcome.replay.as_ref();
    if json {
        let verdicts: Vec<_> = found.verdicts.iter().map(|(at, one)| json!({
            "record": at, "auditor": one.auditor, "draw": one.verdict.draw, "verdict": one.verdict.finding.word(),
            "rel_l2": one.verdict.distance_nanos as f64 / 1e9, "steps_agree": parted(one, trace_bound),
        })).collect();
        return print_json(&json!({
            "round": contribution.commit.slot.round, "member": contribution.member, "verdict": outcome.finding.word(),
            "rel_l2": replay.map(|replay| replay.distance), "norm_ratio": replay.map(|replay| replay.norm_ratio),
            "selection_ok": replay.map(|replay| replay.selection_ok), "exact": replay.map(|replay| replay.exact),
            "steps": replay.map(|replay| replay.steps), "steps_agree": traces.agree(), "bound": bound, "words": outcome.words, "recorded": verdicts, "secs": secs,
        }));
    }
    println!("{}", outcome.words);
    if let Some(words) = traces.words() {
        println!("  steps      {words}");
    }
    if let Some(replay) = replay {
        println!(
            "  distance   {:.3e}, relative L2; at most {bound} passes",
            replay.distance
        );
        println!("  length     {:.6} of the replay's", replay.norm_ratio);
        println!(
            "  selection  {}",
            if replay.selection_ok {
                "what the codec sends of it"
            } else {
                "not what the codec sends of it"
            }
        );
        println!(
            "  replayed   {} steps in {secs:.1} s{}",
            replay.steps,
            if replay.exact { ", the same bits" } else { "" }
        );
    }
    for (at, one) in &found.verdicts {
        let draw = if one.verdict.draw == 0 {
            "drawn by its lot"
        } else {
            "asked as everyone was"
        };
        println!(
            "  record {at}: {}, {draw}, said it {}{}",
            one.auditor.short(),
            match one.verdict.finding {
                Finding::Agrees => "agrees".to_owned(),
                Finding::Differs => format!("differs by {:.3}", one.verdict.distance_nanos as f64 / 1e9),
                Finding::Unanswered => "did not open its accumulators".to_owned(),
                Finding::Untold => "did not tell its steps, or others".to_owned(),
            },
            parted(one, trace_bound).map_or(String::new(), |step| format!(": {}", replayed::parted(step)))
        );
    }
    println!("verdict: {}", outcome.finding.word());
    Ok(())
}
