//! Real peers that cannot dial each other: they train through a relay of their own, `murmur relay`, and count each other.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::netns::{Namespaces, ip};
use common::{Running, decided, events, leave, said};
use serde_json::Value;

const RUN: &str = r#"
max_inner_steps = 8
[membership]
round_batches = 8
[timing]
train_secs = 2.0
[storage]
snapshot_rounds = 4
"#;

/// Where the relay is, and how peers name it.
const RELAY: &str = "10.78.0.100:3340";

fn until(home: &Path, hosts: &[&str], what: &str, secs: u64, holds: impl Fn() -> bool) -> f64 {
    let begun = Instant::now();
    while !holds() {
        let logs = || {
            hosts
                .iter()
                .map(|host| format!("{host}: {}\n", said(home, host)))
                .collect::<String>()
        };
        assert!(
            begun.elapsed().as_secs() < secs,
            "not within {secs} s: {what}\n{}",
            logs()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    begun.elapsed().as_secs_f64()
}

/// A public segment with the relay on it.
fn segment(net: &mut Namespaces, home: &Path) -> Running {
    net.add_switch("s");
    net.add("r");
    net.plug("r", "eth0", "10.78.0.100/24", "s");
    let relay = net.murmur(home, "r", &["relay", "--bind", RELAY]);
    until(home, &["r"], "the relay is up", 10, || said(home, "r").contains(RELAY));
    relay
}

/// Whether a host gets through to an address: a refusal is an answer.
fn reaches(net: &Namespaces, from: &str, to: &str) -> bool {
    let script = format!("timeout 4 bash -c 'exec 3<>/dev/tcp/{to}'");
    let (open, said) = net.sh(from, &script);
    open || said.contains("refused")
}

fn start(net: &Namespaces, home: &Path, host: &str, args: &[&str]) -> Running {
    let url = format!("http://{RELAY}");
    let local = ["--dir", host, "--relay", &url, "--threads", "1", "--device", "cpu"];
    net.murmur(home, host, &[args, &local].concat())
}

/// Starts a run of these hosts, the first its founder, and waits until each of them counts every one of them in one round.
fn all_count_all(net: &Namespaces, home: &Path, hosts: &[&str]) -> Vec<Running> {
    common::run_file(home, "apart", RUN);
    let mut peers = vec![start(net, home, hosts[0], &["new", "run.toml"])];
    common::wait(home, hosts[0], &["round>=1"]);
    let ticket = String::from_utf8(common::murmur(home, &["ticket", "--dir", hosts[0]]).stdout).unwrap();
    peers.extend(
        hosts[1..]
            .iter()
            .map(|host| start(net, home, host, &["join", ticket.trim()])),
    );
    let ids: Vec<Value> = hosts
        .iter()
        .map(|host| {
            until(home, hosts, "it starts", 60, || {
                !events(home, host, "started").is_empty()
            });
            events(home, host, "started")[0]["peer"].clone()
        })
        .collect();
    let counts = |line: &Value| {
        let counted = line["contributors"].as_array().unwrap();
        ids.iter().all(|id| counted.contains(id))
    };
    let secs = until(home, hosts, "all count all", 120, || {
        hosts.iter().all(|host| decided(home, host).iter().any(counts))
    });
    println!(
        "all {} counted in one round {secs:.1} s after the last was started",
        hosts.len()
    );
    let round = decided(home, hosts[0]).iter().rev().find(|line| counts(line)).unwrap()["round"].clone();
    let root = |host: &str| {
        let mut at = decided(home, host).into_iter().filter(|line| line["round"] == round);
        at.next().map(|line| line["model_root"].clone())
    };
    until(home, hosts, "all applied that round", 60, || {
        hosts.iter().all(|host| root(host).is_some())
    });
    assert!(hosts.iter().all(|host| root(host) == root(hosts[0])));
    peers
}

fn all_leave(home: &Path, hosts: &[&str], peers: Vec<Running>) {
    for (host, peer) in hosts.iter().zip(peers).rev() {
        leave(home, host, peer);
    }
}

#[test]
#[ignore = "makes network namespaces: needs root"]
fn netns_two_peers_that_reach_only_a_relay_count_each_other() {
    let home = tempfile::tempdir().unwrap();
    let (home, mut net) = (home.path(), Namespaces::new("r"));
    let relay = segment(&mut net, home);
    let hosts = ["a", "b"];
    for (i, host) in hosts.iter().enumerate() {
        net.add(host);
        net.plug(host, "eth0", &format!("10.78.0.{}/24", i + 1), "s");
        // Isolated ports of a bridge reach the relay's, and not each other.
        ip(&format!(
            "-n {} link set dev {host} type bridge_slave isolated on",
            net.of("s")
        ));
    }
    assert!(reaches(&net, "a", "10.78.0.100/9") && reaches(&net, "b", "10.78.0.100/9"));
    assert!(!reaches(&net, "a", "10.78.0.2/9") && !reaches(&net, "b", "10.78.0.1/9"));
    let peers = all_count_all(&net, home, &hosts);
    all_leave(home, &hosts, peers);
    leave(home, "r", relay);
}

#[test]
#[ignore = "makes network namespaces: needs root"]
fn netns_two_peers_behind_address_translation_count_each_other_and_one_outside() {
    let home = tempfile::tempdir().unwrap();
    let (home, mut net) = (home.path(), Namespaces::new("n"));
    let relay = segment(&mut net, home);
    for (i, (host, router)) in [("a", "ra"), ("b", "rb")].into_iter().enumerate() {
        let home_switch = format!("s{host}");
        net.add_switch(&home_switch);
        net.add(router);
        net.plug(router, "eth0", &format!("10.78.0.{}/24", i + 10), "s");
        net.plug(router, "eth1", "192.168.7.1/24", &home_switch);
        net.add(host);
        // Both homes have the same addresses, as homes do.
        net.plug(host, "eth0", "192.168.7.2/24", &home_switch);
        ip(&format!("-n {} route add default via 192.168.7.1", net.of(host)));
        let translate = "sysctl -qw net.ipv4.ip_forward=1 && nft 'add table ip nat; \
            add chain ip nat out { type nat hook postrouting priority 100 ; }; add rule ip nat out oifname eth0 masquerade'";
        let (done, words) = net.sh(router, translate);
        if !done {
            println!("skipped: no address translation here (nft: {})", words.trim());
            return;
        }
    }
    net.add("c");
    net.plug("c", "eth0", "10.78.0.3/24", "s");
    assert!(reaches(&net, "a", "10.78.0.3/9") && !reaches(&net, "c", "192.168.7.2/9"));
    let hosts = ["a", "b", "c"];
    let peers = all_count_all(&net, home, &hosts);
    all_leave(home, &hosts, peers);
    leave(home, "r", relay);
}
