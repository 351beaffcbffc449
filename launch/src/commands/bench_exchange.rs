//! `murmur bench exchange`: peers average a vector over real connections, from pseudo-gradients that are ready to a model that is moved.
//!
//! Every peer is a process with an endpoint of its own. On `go` each encodes its vector, stores the shards, tells the others their hashes, fetches
//! theirs, checks and sums all of them and applies the sum: the codec, the network and the sum of a real round, without agreement. This process
//! only gives the signal and takes the time until the last peer has applied; then it compares what they hold.
//!
//! ```text
//! peer -> here    {"addr": ...}                 where it listens
//! here -> peer    {"peers": [addr, ...]}        everyone's addresses
//! peer -> here    {"ready": true}               linked with everyone
//! here -> peer    {"go": round}
//! peer -> here    {"applied": {...}}            the model is moved
//! peer -> here    {"root": "..."}               its hash
//! ```

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use coordinatorless::net::{Net, NetConfig, NetEvent, Relay};
use coordinatorless::types::{Hash, PeerId, RunId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;
use tokio::task::{JoinSet, block_in_place};
use trainer::aggregate::{Rule, Weighted, aggregate_by};
use trainer::apply::{OuterRate, apply_with};
use trainer::bench_codec::heavy_tailed;
use trainer::compress::{AnyCodec, Codec, DenseCodec, SparseCodec, accumulator_root};

use super::print_json;
use crate::cli::{BenchExchangeArgs, ExchangePeerArgs};
use crate::failure::usage;

/// Parameters in a chunk.
const CHUNK: usize = 4096;
/// Decay of the accumulator.
const BETA: f32 = 0.95;
/// Times that a shard is asked for.
const ATTEMPTS: u32 = 3;
/// How long anything on the network may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a peer says when it has applied a round.
#[derive(Debug, Serialize, Deserialize)]
struct Applied {
    encode_seconds: f64,
    fetch_seconds: f64,
    apply_seconds: f64,
    contribution_bytes: u64,
}

pub fn run(args: &BenchExchangeArgs) -> Result<()> {
    let mut peers = (0..args.peers)
        .map(|number| Peer::start(args, number))
        .collect::<Result<Vec<_>>>()?;
    let addresses: Vec<Value> = peers.iter_mut().map(|peer| peer.hear("addr")).collect::<Result<_>>()?;
    peers
        .iter_mut()
        .try_for_each(|peer| peer.tell(&json!({"peers": addresses})))?;
    peers.iter_mut().try_for_each(|peer| peer.hear("ready").map(drop))?;
    let mut seconds = Vec::new();
    let mut last = Vec::new();
    // The first round fills buffers and is not counted.
    for round in 0..=u32::from(args.rounds) {
        let began = Instant::now();
        peers.iter_mut().try_for_each(|peer| peer.tell(&json!({"go": round})))?;
        let applied = peers
            .iter_mut()
            .map(|peer| peer.hear("applied"))
            .collect::<Result<Vec<_>>>()?;
        if round > 0 {
            seconds.push(began.elapsed().as_secs_f64());
        }
        last = applied
            .into_iter()
            .map(serde_json::from_value)
            .collect::<Result<Vec<Applied>, _>>()?;
        let roots = peers
            .iter_mut()
            .map(|peer| peer.hear("root"))
            .collect::<Result<Vec<_>>>()?;
        ensure!(
            roots.iter().all(|root| *root == roots[0]),
            "peers hold different models: {roots:?}"
        );
    }
    seconds.sort_by(f64::total_cmp);
    tell(args, seconds[seconds.len() / 2], &last)
}

fn tell(args: &BenchExchangeArgs, median: f64, last: &[Applied]) -> Result<()> {
    let slowest = |of: fn(&Applied) -> f64| last.iter().map(of).fold(0.0, f64::max);
    let bytes = last.iter().map(|applied| applied.contribution_bytes).max().unwrap_or(0);
    let (encode, fetch, apply) = (
        slowest(|applied| applied.encode_seconds),
        slowest(|applied| applied.fetch_seconds),
        slowest(|applied| applied.apply_seconds),
    );
    if args.json {
        return print_json(&json!({
            "peer": "murmur", "n": args.peers, "mib": args.mib, "k": args.k, "dense": args.dense, "rounds": args.rounds,
            "s_median": median, "encode_s": encode, "fetch_s": fetch, "apply_s": apply, "contribution_bytes": bytes,
        }));
    }
    println!(
        "{} peers, {} MiB of fp32, {}: {median:.3} s from ready to applied (median of {}); the slowest of the last round: encode {encode:.3}, fetch {fetch:.3}, sum and apply {apply:.3} s; {bytes} bytes a contribution; all models equal",
        args.peers,
        args.mib,
        if args.dense {
            "every value".to_owned()
        } else {
            format!("k = {}", args.k)
        },
        args.rounds,
    );
    Ok(())
}

/// A peer's process, and its ends of the pipes.
struct Peer {
    child: Child,
    to: Option<ChildStdin>,
    from: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    fn start(args: &BenchExchangeArgs, number: u16) -> Result<Self> {
        let own = std::env::current_exe().context("this program's file is unknown")?;
        let mut command = match &args.netns {
            None => Command::new(&own),
            Some(prefix) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &format!("{prefix}{number}")]).arg(&own);
                command
            }
        };
        command.args(["bench", "exchange-peer", "--number", &number.to_string()]);
        command.args(["--mib", &args.mib.to_string(), "--k", &args.k.to_string()]);
        if args.dense {
            command.arg("--dense");
        }
        if args.netns.is_some() {
            command.arg("--everywhere");
        }
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| usage(format!("peer {number} cannot be started: {error}")))?;
        let from = BufReader::new(child.stdout.take().context("the peer has no stdout")?).lines();
        Ok(Self {
            to: child.stdin.take(),
            child,
            from,
        })
    }

    fn tell(&mut self, message: &Value) -> Result<()> {
        let to = self.to.as_mut().context("the peer was let go")?;
        writeln!(to, "{message}").context("a peer went away")
    }

    /// What the peer says next, which must be `key`.
    fn hear(&mut self, key: &str) -> Result<Value> {
        let line = self
            .from
            .next()
            .context("a peer ended early; its last words are above")??;
        let mut said: Value = serde_json::from_str(&line).with_context(|| format!("a peer said {line:?}"))?;
        match said.get_mut(key) {
            Some(value) => Ok(value.take()),
            None => bail!("a peer said {line}, expected {key}"),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Without input it ends by itself; one that hangs must not outlive the bench.
        drop(self.to.take());
        for _ in 0..50 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `murmur bench exchange-peer`: one peer of the bench.
pub fn peer(args: &ExchangePeerArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(exchange(args))
}

async fn exchange(args: &ExchangePeerArgs) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut node = Node::start(args, folder.path()).await?;
    let mut orders = orders();
    say(&json!({"addr": node.net.addr().await}))?;
    while let Some(line) = orders.recv().await {
        let mut order: Value = serde_json::from_str(&line).with_context(|| format!("not an order: {line:?}"))?;
        if let Some(peers) = order.get_mut("peers") {
            node.meet(peers.take()).await?;
            say(&json!({"ready": true}))?;
        } else if let Some(round) = order.get("go").and_then(Value::as_u64) {
            let applied = node.round(round as u32).await?;
            say(&json!({"applied": applied}))?;
            say(&json!({"root": blake3::Hash::from(accumulator_root(&node.theta)).to_hex().as_str()}))?;
        }
    }
    node.net.shutdown().await;
    Ok(())
}

/// The lines of stdin, read on a thread of their own; it ends with the input.
fn orders() -> Receiver<String> {
    let (lines, orders) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                break;
            }
        }
    });
    orders
}

fn say(message: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{message}")?;
    Ok(out.flush()?)
}

/// A peer: its network, its model, and what it would send.
struct Node {
    net: Net,
    events: Receiver<NetEvent>,
    codec: AnyCodec,
    others: usize,
    theta: Vec<f32>,
    delta: Vec<f32>,
    accumulator: Vec<f32>,
    sums: Vec<i64>,
    /// Shard hashes heard, by round and peer: others may be a round ahead.
    heard: BTreeMap<(u32, PeerId), Vec<Hash>>,
}

impl Node {
    async fn start(args: &ExchangePeerArgs, folder: &std::path::Path) -> Result<Self> {
        let params = (args.mib as usize) << 18;
        let codec = match args.dense {
            true => AnyCodec::Dense(DenseCodec::new(params)?),
            false => AnyCodec::Sparse(SparseCodec::new(params, CHUNK, args.k, BETA).map_err(usage)?),
        };
        let secret = *blake3::Hasher::new()
            .update(b"murmur/bench-exchange")
            .update(&u64::from(args.number).to_le_bytes())
            .finalize()
            .as_bytes();
        let bind = if args.everywhere { "0.0.0.0:0" } else { "127.0.0.1:0" };
        let (net, events) = Net::start(NetConfig {
            secret,
            run: RunId([7; 32]),
            bind: Some(bind.parse()?),
            relay: Relay::None,
            dir: folder.to_owned(),
            max_upload: None,
            max_download: None,
            known: Vec::new(),
        })
        .await?;
        Ok(Self {
            net,
            events,
            codec,
            others: 0,
            theta: heavy_tailed(params, 0),
            delta: heavy_tailed(params, 1 + u64::from(args.number)),
            accumulator: vec![0.0; params],
            sums: Vec::new(),
            heard: BTreeMap::new(),
        })
    }

    /// Links with everyone.
    async fn meet(&mut self, peers: Value) -> Result<()> {
        for peer in peers.as_array().context("no list of peers")? {
            self.net.know(serde_json::from_value(peer.clone())?);
        }
        let everyone = self.net.known();
        let members: Vec<PeerId> = everyone.iter().map(|addr| PeerId(*addr.id.as_bytes())).collect();
        self.others = members.iter().filter(|id| **id != self.net.id()).count();
        self.net.set_members(members);
        while self.net.connected().len() < self.others {
            self.event().await?;
        }
        Ok(())
    }

    /// Takes one event in.
    async fn event(&mut self) -> Result<()> {
        let next = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        match next
            .context("nothing came for ten minutes")?
            .context("the network is gone")?
        {
            NetEvent::Frame { from, bytes } => {
                let (round, hashes) = read(&bytes).with_context(|| format!("{from} sent something else"))?;
                self.heard.insert((round, from), hashes);
            }
            NetEvent::Rejected { from, kind, reason } => bail!("{from}: {kind}: {reason}"),
            _ => {}
        }
        Ok(())
    }

    async fn round(&mut self, round: u32) -> Result<Applied> {
        let began = Instant::now();
        let encoded = block_in_place(|| self.codec.encode_with(&self.accumulator, &self.delta, 1))?;
        self.accumulator = encoded.accumulator;
        let own: Vec<Bytes> = encoded.shards.into_iter().map(Bytes::from).collect();
        let mut hashes = Vec::new();
        for shard in &own {
            hashes.push(self.net.put(shard.clone()).await?);
        }
        self.net.broadcast(written(round, &hashes));
        let encode = began.elapsed();
        while self
            .heard
            .range((round, PeerId([0; 32]))..=(round, PeerId([255; 32])))
            .count()
            < self.others
        {
            self.event().await?;
        }
        let later = self.heard.split_off(&(round + 1, PeerId([0; 32])));
        let heard = std::mem::replace(&mut self.heard, later);
        let mut all = vec![own];
        all.extend(
            self.fetch(heard.into_iter().map(|((_, from), hashes)| (from, hashes)))
                .await?,
        );
        let fetch = began.elapsed() - encode;
        block_in_place(|| self.apply(&all))?;
        Ok(Applied {
            encode_seconds: encode.as_secs_f64(),
            fetch_seconds: fetch.as_secs_f64(),
            apply_seconds: (began.elapsed() - encode - fetch).as_secs_f64(),
            contribution_bytes: all[0].iter().map(|shard| shard.len() as u64).sum(),
        })
    }

    /// Every peer's shards, all at once.
    async fn fetch(&self, heard: impl Iterator<Item = (PeerId, Vec<Hash>)>) -> Result<Vec<Vec<Bytes>>> {
        let limit = self.codec.max_total_bytes();
        let mut fetches = JoinSet::new();
        for (from, hashes) in heard {
            for (place, hash) in hashes.into_iter().enumerate() {
                let net = self.net.clone();
                fetches.spawn(async move {
                    // On a busy machine a transfer may stall and be given up; what came is not fetched again.
                    let mut left = ATTEMPTS;
                    while let Err(error) = net.fetch(hash, limit, vec![from], PATIENCE).await {
                        left -= 1;
                        ensure!(left > 0, "{error}");
                    }
                    let shard = net.get(hash).await?.context("a blob that was fetched is gone")?;
                    anyhow::Ok(((from, place), shard))
                });
            }
        }
        let mut shards: BTreeMap<PeerId, BTreeMap<usize, Bytes>> = BTreeMap::new();
        while let Some(fetched) = fetches.join_next().await {
            let ((from, place), shard) = fetched??;
            shards.entry(from).or_default().insert(place, shard);
        }
        Ok(shards
            .into_values()
            .map(|shards| shards.into_values().collect())
            .collect())
    }

    /// Checks, sums and applies.
    fn apply(&mut self, all: &[Vec<Bytes>]) -> Result<()> {
        let weighted: Vec<Weighted<'_, Bytes>> = all.iter().map(|shards| Weighted { tokens: 1, shards }).collect();
        let sums = std::mem::take(&mut self.sums);
        let update = aggregate_by(&self.codec, &weighted, Rule::default(), 1, sums)?;
        apply_with(&mut self.theta, &update, OuterRate::new(1.0)?, 1)?;
        self.sums = update.into_sums();
        Ok(())
    }
}

/// A frame: the round, then the hash of each shard.
fn written(round: u32, hashes: &[Hash]) -> Bytes {
    let mut frame = round.to_le_bytes().to_vec();
    hashes.iter().for_each(|hash| frame.extend_from_slice(&hash.0));
    frame.into()
}

fn read(frame: &[u8]) -> Option<(u32, Vec<Hash>)> {
    let (round, rest) = frame.split_first_chunk::<4>()?;
    let (hashes, []) = rest.as_chunks::<32>() else {
        return None;
    };
    Some((
        u32::from_le_bytes(*round),
        hashes.iter().map(|hash| Hash(*hash)).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_tells_round_and_hashes_and_nothing_else_is_one() {
        let hashes = vec![Hash([3; 32]), Hash([4; 32])];
        assert_eq!(read(&written(9, &hashes)), Some((9, hashes)));
        assert_eq!(read(&[1, 2, 3]), None);
        assert_eq!(read(&[0; 37]), None);
    }
}
