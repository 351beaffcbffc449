#!/usr/bin/env python3
"""Real peers on this machine, as processes of the real binary: how soon decisions fall, how soon a killed peer is noticed,
whether memory stays flat, and what many names for one machine are worth.

    launch/benches/real_peers.py crash --peers 16      # decisions, then one SIGKILL
    launch/benches/real_peers.py soak --rounds 2000    # four peers, one of them killed and started again every minute
    launch/benches/real_peers.py sybils --names 10     # one core under one name, then under ten, beside an honest core

Needs a release build (target/release/murmur). Prints JSON.
"""

import argparse
import json
import random
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
name = "bench"
text = ["text.txt"]
[model]
dim = {dim}
layers = 1
heads = 2
ffn = {ffn}
[training]
seq_len = {seq}
batch_sequences = 2
max_inner_steps = {steps}
[membership]
round_batches = {batches}
weight_delay = 1
weight_window = 6
regroup_secs = {regroup}
[timing]
train_secs = {train}
collect_secs = {collect}
fetch_secs = 2.0
view_secs = 1.0
[storage]
snapshot_rounds = 8
"""
# The shape of its model, where nothing is measured of that.
TINY = {"dim": 32, "ffn": 64, "seq": 32}


class Peer:
    all = []

    def __init__(self, home, name, *args, core=None):
        self.home, self.name, self.dir = home, name, home / name
        log = open(home / f"{name}.log", "ab")
        here = ["--relay", "none", "--bind", "127.0.0.1:0"]
        command = [MURMUR, *args, "--dir", name, *here, "--threads", "1"]
        if core is not None:
            command = ["taskset", "--cpu-list", str(core), *command]
        self.process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)
        Peer.all.append(self)

    def status(self):
        try:
            return json.loads((self.dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def rounds(self):
        try:
            lines = (self.dir / "events.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if '"round_decided"' in line and line.endswith("}")]

    def memory(self):
        """Resident bytes without pages of files: libtorch and the record store are mapped."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def until(what, seconds, holds, pause=0.1):
    begun = time.monotonic()
    while not (value := holds()):
        if time.monotonic() - begun > seconds:
            sys.exit(f"not within {seconds} s: {what}")
        time.sleep(pause)
    return value


def start(home, count, core=lambda number: None, **shape):
    """So many members, each on the core that is its own, or on any."""
    rng = random.Random(7)
    words = ["peer", "round", "record", "weight", "ledger", "shard", "model", "gradient"]
    (home / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(4000)))
    (home / "run.toml").write_text(RUN.format(**(TINY | shape)))
    peers = [Peer(home, "p0", "new", "run.toml", core=core(0))]
    until("the founder's first round", 60, lambda: len(peers[0].rounds()) >= 1)
    ticket = subprocess.run([MURMUR, "ticket", "--dir", "p0"], cwd=home, capture_output=True, text=True, check=True)
    for i in range(1, count):
        peers.append(Peer(home, f"p{i}", "join", ticket.stdout.strip(), core=core(i)))
    full = lambda: all(len(peer.status().get("members", [])) == count for peer in peers)
    until(f"{count} members", 300, full, 0.5)
    return peers


def crash(home, count):
    peers = start(home, count, steps=80, batches=20 * count, train=4.0, collect=6.0, regroup=60.0)
    begun = time.time()
    settled = lambda: [line for line in peers[0].rounds() if line["t"] > begun + 60]
    rounds = until("ten rounds", 300, lambda: len(settled()) >= 10 and settled(), 1.0)
    victim = peers.pop(count // 2)
    me = next(line for line in (victim.dir / "events.jsonl").read_text().splitlines() if '"started"' in line)
    me = json.loads(me)["peer"]
    victim.kill()
    killed = time.time()

    def unheard(peer):
        states = {member["id"]: member["state"] for member in peer.status().get("members", [])}
        # Who has lapsed meanwhile is no longer listed.
        return bool(states) and states.get(me) != "training"

    noticed = {}
    def all_noticed():
        for peer in peers:
            if peer.name not in noticed and unheard(peer):
                noticed[peer.name] = time.time() - killed
        return len(noticed) == len(peers)
    until("the crash is noticed", 60, all_noticed, 0.02)
    decided = lambda: [line for line in peers[0].rounds() if line["t"] > killed]
    after = until("four rounds more", 200, lambda: len(decided()) >= 4 and decided())
    spans = [b["t"] - a["t"] for a, b in zip(rounds, rounds[1:])]
    spans_after = [after[0]["t"] - killed] + [b["t"] - a["t"] for a, b in zip(after, after[1:])]
    return {
        "peers": count,
        "agree_secs_median": statistics.median(line["agree_secs"] for line in rounds),
        "agree_secs_worst": max(line["agree_secs"] for line in rounds),
        "round_secs_median": statistics.median(spans),
        "counted_median": statistics.median(len(line["contributors"]) for line in rounds),
        "crash_noticed_by_all_secs": max(noticed.values()),
        "rounds_after_the_crash_secs": [round(span, 2) for span in spans_after],
    }


def soak(home, goal):
    peers = start(home, 4, steps=2, batches=8, train=1.0, collect=1.5, regroup=5.0)
    samples, churns, last = [], 0, time.monotonic()
    while True:
        time.sleep(1.0)
        done = peers[0].status().get("round", 0)
        samples.append((done, peers[0].memory()))
        if done >= goal:
            break
        if time.monotonic() - last > 60:
            last, churns = time.monotonic(), churns + 1
            peers[3].kill()
            peers[3] = Peer(home, "p3", "join")
    quarter = lambda n: statistics.median(mem for done, mem in samples if (n - 1) * goal / 4 <= done < n * goal / 4)
    quarters = [quarter(n) for n in (1, 2, 3, 4)]
    return {
        "rounds": done,
        "times_killed": churns,
        "memory_by_quarter_mb": [round(mem / 1e6, 1) for mem in quarters],
        "last_by_second_quarter": round(quarters[3] / quarters[1], 3),
    }


def one_core(home, names):
    """Three honest peers share one core, so many names the other: the names' share of the points earned and of the weight, once it has followed."""
    home.mkdir()
    shape = {"dim": 96, "ffn": 192, "seq": 64, "steps": 1000, "batches": 4000, "train": 6.0, "collect": 9.0, "regroup": 60.0}
    peers = start(home, 3 + names, lambda number: 0 if number < 3 else 1, **shape)
    look = lambda: {member["id"]: member for member in peers[0].status().get("members", [])}
    rounds = lambda: peers[0].status()["round"]
    settled = rounds() + 12
    until("weight follows work", 600, lambda: rounds() >= settled, 0.5)
    before, begun = look(), rounds()
    until("twelve rounds more", 600, lambda: rounds() >= begun + 12, 0.5)
    after = look()
    mine = {peer.status()["me"]["id"] for peer in peers[3:]}
    share = lambda of: sum(of(one) for one in mine) / sum(of(one) for one in after)
    report = {
        "names": names,
        "share_of_tokens": round(share(lambda one: after[one]["tokens"] - before[one]["tokens"]), 3),
        "share_of_points": round(share(lambda one: after[one]["points"] - before[one]["points"]), 3),
        "share_of_weight": round(share(lambda one: after[one]["weight"]), 3),
    }
    for peer in peers:
        peer.kill()
    return report


def sybils(home, names):
    """The same core under one name and under many."""
    return [one_core(home / f"names-{count}", count) for count in (1, names)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("crash").add_argument("--peers", type=int, default=16)
    commands.add_parser("soak").add_argument("--rounds", type=int, default=2000)
    commands.add_parser("sybils").add_argument("--names", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        try:
            runs = {
                "crash": lambda: crash(Path(home), args.peers),
                "soak": lambda: soak(Path(home), args.rounds),
                "sybils": lambda: sybils(Path(home), args.names),
            }
            report = runs[args.command]()
            print(json.dumps(report, indent=1))
        finally:
            # Whatever came in between, no peer stays behind.
            for peer in Peer.all:
                peer.kill()


if __name__ == "__main__":
    main()
