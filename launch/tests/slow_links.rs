//! Four real peers, each in a network namespace of its own behind a line of 20 Mbit/s that drops what its short queue cannot hold,
//! and, where nftables are installed, every fiftieth packet besides. One is cut off for longer than any connection lasts in silence, and comes back. Needs root; the gate says so where it is not.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::netns::{Namespaces, ip};
use common::{Running, decided, events, leave, said};
use serde_json::Value;

const RUN: &str = r#"
max_inner_steps = 40
[membership]
round_batches = 80
weight_delay = 1
weight_window = 6
regroup_secs = 8.0
regroup_minority_factor = 20.0
[timing]
train_secs = 1.5
collect_secs = 2.5
fetch_secs = 1.0
view_secs = 1.0
[storage]
snapshot_rounds = 4
"#;

/// How long one is cut off: QUIC gives a silent connection up after 30 s at most.
const CUT: Duration = Duration::from_secs(45);

/// Hosts on one switch, each behind a slow line; all of it goes when the test does.
struct Lan {
    names: Namespaces,
    hosts: usize,
}

/// The switch.
const SWITCH: &str = "s";

impl Lan {
    fn new(hosts: usize) -> Self {
        let mut names = Namespaces::new("l");
        names.add_switch(SWITCH);
        for i in 0..hosts {
            let host = name(i);
            names.add(&host);
            names.plug(&host, "eth0", &format!("{}/24", address(i)), SWITCH);
            for (at, dev) in [(host.as_str(), "eth0"), (SWITCH, host.as_str())] {
                let at = names.of(at);
                ip(&format!(
                    "netns exec {at} tc qdisc add dev {dev} root tbf rate 20mbit burst 16kb limit 48kb"
                ));
            }
        }
        Self { names, hosts }
    }

    /// Plugs a host's cable in, or pulls it.
    fn plug(&self, host: usize, state: &str) {
        ip(&format!("-n {} link set {} {state}", self.names.of(SWITCH), name(host)));
    }

    /// From now on every host loses one packet in fifty that comes in; `false` where there is no nftables to do it.
    fn lose(&self) -> bool {
        let script = "nft add table inet loss && \
            nft 'add chain inet loss in { type filter hook input priority 0 ; }' && \
            nft add rule inet loss in ip protocol udp numgen random mod 50 '<' 1 drop";
        (0..self.hosts).all(|host| self.names.sh(&name(host), script).0)
    }

    /// Packets that the queues dropped so far.
    fn dropped(&self) -> u64 {
        let drops = |host: usize| {
            let (_, text) = self.names.sh(SWITCH, &format!("tc -s qdisc show dev {}", name(host)));
            let count = text.split("dropped ").nth(1).and_then(|rest| rest.split(',').next());
            count.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        (0..self.hosts).map(drops).sum()
    }

    fn start(&self, home: &Path, host: usize, args: &[&str]) -> Running {
        let (name, bind) = (name(host), format!("{}:0", address(host)));
        let own = [
            "--dir",
            &name,
            "--bind",
            &bind,
            "--relay",
            "none",
            "--threads",
            "1",
            "--device",
            "cpu",
        ];
        self.names.murmur(home, &name, &[args, &own].concat())
    }
}

fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn name(host: usize) -> String {
    format!("p{host}")
}

fn last_round(home: &Path, host: usize) -> u64 {
    decided(home, &name(host))
        .last()
        .map_or(0, |line| line["round"].as_u64().unwrap())
}

fn until(home: &Path, what: &str, secs: u64, holds: impl Fn() -> bool) -> f64 {
    let begun = Instant::now();
    while !holds() {
        let logs: Vec<String> = (0..4)
            .map(|i| format!("{}: {}", name(i), said(home, &name(i))))
            .collect();
        assert!(
            begun.elapsed().as_secs() < secs,
            "not within {secs} s: {what}\n{}",
            logs.join("\n")
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    begun.elapsed().as_secs_f64()
}

/// Whether the founder counts this peer in a round after `from`.
fn counted(home: &Path, id: &Value, from: u64) -> bool {
    decided(home, &name(0))
        .iter()
        .filter(|line| line["round"].as_u64() > Some(from))
        .any(|line| line["contributors"].as_array().unwrap().contains(id))
}

#[test]
#[ignore = "makes network namespaces: needs root"]
fn netns_a_peer_cut_off_for_45_seconds_comes_back_over_slow_links() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::run_file(home, "slow", RUN);
    let lan = Lan::new(4);
    let mut peers = vec![lan.start(home, 0, &["new", "run.toml"])];
    common::wait(home, "p0", &["round>=1"]);
    let ticket = common::murmur(home, &["ticket", "--dir", "p0"]).stdout;
    let ticket = String::from_utf8(ticket).unwrap();
    peers.extend((1..4).map(|i| lan.start(home, i, &["join", ticket.trim()])));
    let ids: Vec<Value> = (0..4)
        .map(|i| {
            until(home, "it starts", 60, || !events(home, &name(i), "started").is_empty());
            events(home, &name(i), "started")[0]["peer"].clone()
        })
        .collect();
    until(home, "all four count", 90, || ids.iter().all(|id| counted(home, id, 0)));

    println!(
        "{}",
        if lan.lose() {
            "one packet in fifty is lost"
        } else {
            "no packets are lost on purpose: nft is not installed"
        }
    );

    let before = last_round(home, 0);
    lan.plug(3, "down");
    std::thread::sleep(CUT);
    let missed = last_round(home, 0);
    lan.plug(3, "up");
    assert!(missed >= before + 3, "rounds {before} to {missed}");
    let secs = until(home, "it counts again", 60, || counted(home, &ids[3], missed));
    println!(
        "rounds {before} to {missed} went on without the one that was cut off; it counted again {secs:.1} s after; {} packets dropped",
        lan.dropped()
    );

    let goal = last_round(home, 0) + 2;
    until(home, "two rounds more", 60, || {
        (0..4).all(|i| last_round(home, i) >= goal)
    });
    let root = |host: usize| {
        let lines = decided(home, &name(host)).into_iter().rev();
        let mut at = lines.filter(|line| line["round"].as_u64() == Some(goal));
        at.next().map(|line| line["model_root"].clone())
    };
    assert!((1..4).all(|host| root(host) == root(0)));
    for (host, peer) in peers.into_iter().enumerate().rev() {
        leave(home, &name(host), peer);
    }
}
