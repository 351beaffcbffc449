#!/usr/bin/env python3
"""What training ahead of agreement (`timing.overlap = 1`) gains over slow links, and what it costs: real peers of the real binary, each in a
network namespace of its own behind a line of so many Mbit/s.

    launch/benches/overlap.py --algorithm diloco --mbit 20 --secs 180
    launch/benches/overlap.py --algorithm sparse --mbit 1 --rounds 40

Needs root, tc, and a release build (target/release/murmur). Prints one JSON object: without and with overlap, one after the other, the same run
otherwise. Rounds count once all peers are members. `--set KEY=VALUE` changes a value of both runs.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MURMUR = ROOT / "launch" / "murmur"

RUN = """
name = "overlap"
text = {text}
[training]
seq_len = 64
batch_sequences = 4
max_inner_steps = 400
[membership]
round_batches = 400
weight_delay = 1
weight_window = 6
regroup_secs = 30.0
[timing]
view_secs = 3.0
[storage]
snapshot_rounds = 8
"""


def sh(command):
    subprocess.run(command.split(), check=True)


class Lan:
    """Hosts on one switch, each behind a slow line."""

    def __init__(self, hosts, mbit):
        self.mark = f"ov{os.getpid()}"
        self.made = []
        try:
            self.make(hosts, mbit)
        except BaseException:
            self.close()
            raise

    def make(self, hosts, mbit):
        switch = self.add("s")
        sh(f"ip -n {switch} link add br0 type bridge")
        sh(f"ip -n {switch} link set br0 up")
        for i in range(hosts):
            host = self.add(f"h{i}")
            sh(f"ip -n {host} link add eth0 type veth peer name h{i} netns {switch}")
            sh(f"ip -n {host} addr add 10.9.0.{i + 1}/24 dev eth0")
            sh(f"ip -n {host} link set eth0 up")
            sh(f"ip -n {switch} link set h{i} master br0")
            sh(f"ip -n {switch} link set h{i} up")
            for at, dev in [(host, "eth0"), (switch, f"h{i}")]:
                sh(f"tc -n {at} qdisc add dev {dev} root tbf rate {mbit}mbit burst 16kb limit 128kb")

    def add(self, name):
        full = self.mark + name
        sh(f"ip netns add {full}")
        self.made.append(full)
        sh(f"ip -n {full} link set lo up")
        return full

    def host(self, i):
        return f"{self.mark}h{i}"

    def close(self):
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False)


class Peer:
    def __init__(self, lan, home, i, *args):
        self.dir = home / f"p{i}"
        log = open(home / f"p{i}.log", "ab")
        here = ["--dir", f"p{i}", "--relay", "none", "--bind", f"10.9.0.{i + 1}:4000", "--threads", "1", "--device", "cpu"]
        command = ["ip", "netns", "exec", lan.host(i), MURMUR, *args, *here]
        self.process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)

    def status(self):
        try:
            return json.loads((self.dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def events(self, kind):
        try:
            lines = (self.dir / "events.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if f'"{kind}"' in line and line.endswith("}")]


def until(what, seconds, holds):
    begun = time.monotonic()
    while not (value := holds()):
        if time.monotonic() - begun > seconds:
            sys.exit(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return value


def run(args, overlap, home):
    lan, peers = Lan(args.peers, args.mbit), []
    try:
        text = [str(Path(path).resolve()) for path in args.text]
        (home / "run.toml").write_text(RUN.format(text=json.dumps(text or ["demo"])))
        sets = [f"training.algorithm={args.algorithm}", f"timing.train_secs={args.train}", f"timing.collect_secs={args.collect}"]
        sets += [f"timing.fetch_secs={args.collect}", f"timing.overlap={overlap}", *args.set]
        given = [word for one in sets for word in ("--set", one)]
        peers.append(Peer(lan, home, 0, "new", "run.toml", *given))
        until("the founder's first round", 120, lambda: peers[0].events("round_decided"))
        ticket = subprocess.run([MURMUR, "ticket", "--dir", "p0"], cwd=home, capture_output=True, text=True, check=True)
        for i in range(1, args.peers):
            peers.append(Peer(lan, home, i, "join", ticket.stdout.strip()))
        counted = lambda: (peers[0].events("round_decided") or [{}])[-1].get("contributors", [])
        until("all count", 600, lambda: len(counted()) == args.peers)
        begun, first = time.time(), peers[0].status()["round"]
        over = lambda: (
            peers[0].status().get("round", 0) >= first + args.rounds if args.rounds else time.time() > begun + args.secs
        )
        until("the end", 3000, over)
        last = peers[0].status()["round"] if args.rounds == 0 else first + args.rounds
        inside = lambda peer: [line for line in peer.events("round_decided") if first < line["round"] <= last]
        rounds = inside(peers[0])
        spans = [line["round_secs"] for peer in peers for line in inside(peer)]
        trained = sum(line["utilisation"] * line["round_secs"] for peer in peers for line in inside(peer))
        secs = rounds[-1]["t"] - begun
        for peer in peers:
            peer.process.send_signal(signal.SIGINT)
        for peer in peers:
            peer.process.wait(60)
        found = subprocess.run([MURMUR, "eval", "--dir", "p0", "--json"], cwd=home, capture_output=True, text=True, check=True)
        audits = [line["verdict"] for line in peers[0].events("audit")]
        return {
            "rounds": len(rounds),
            "secs": round(secs, 1),
            "utilisation": round(trained / sum(spans), 3),
            "utilisation_by_peer": [
                round(sum(l["utilisation"] * l["round_secs"] for l in inside(p)) / sum(l["round_secs"] for l in inside(p)), 3)
                for p in peers
            ],
            "round_secs_median": round(statistics.median(spans), 2),
            "train_secs_median": round(statistics.median(line["train_secs"] for peer in peers for line in inside(peer)), 2),
            "counted_mean": round(statistics.mean(len(line["contributors"]) for line in rounds), 2),
            "tokens_per_sec": round(sum(line["tokens"] for line in rounds) / secs),
            "tokens": sum(line["tokens"] for line in rounds),
            "val_loss": json.loads(found.stdout.splitlines()[-1])["loss"],
            "audits": {verdict: audits.count(verdict) for verdict in sorted(set(audits))},
        }
    finally:
        for peer in peers:
            peer.process.kill()
            peer.process.wait()
        lan.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--algorithm", default="sparse")
    parser.add_argument("--mbit", type=float, default=20.0)
    parser.add_argument("--train", type=float, default=4.0, help="timing.train_secs")
    parser.add_argument("--collect", type=float, default=12.0, help="timing.collect_secs")
    parser.add_argument("--secs", type=float, default=180.0)
    parser.add_argument("--rounds", type=int, default=0, help="as many rounds instead of seconds")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", type=int, choices=[0, 1], help="without or with overlap only")
    args = parser.parse_args()
    report = {}
    for overlap in [0, 1] if args.only is None else [args.only]:
        with tempfile.TemporaryDirectory() as home:
            report[f"overlap = {overlap}"] = run(args, overlap, Path(home))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
