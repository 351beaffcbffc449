"""Averaging 64 MiB of fp32 among 4 peers: Murmur beside gloo's all-reduce and hivemind's averager, in one run on one machine.

usage: exchange_vs_others.py MURMUR [--mib 64] [--rounds 3] [--hivemind SCRIPT] [--mbit 100 20]
Needs torch; SCRIPT is a program that takes N MIB ROUNDS and prints a JSON line with `s_median` (without it hivemind is left out). With `--mbit` peers
also meet in network namespaces, each behind a token bucket of that rate both ways; that needs root, iproute2 and Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PEERS = 4
LAN = f"mx{os.getpid()}"


def gloo_peer(rank, address, mib, rounds):
    """One rank: a warm-up, then the median over rounds, printed by rank 0."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR=address, MASTER_PORT="29517")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PEERS)
    x, times = torch.randn(mib << 18), []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        x /= PEERS
        dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps({"s_median": statistics.median(times[1:])}))


def last_json(command, **options):
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout
    return json.loads(output.strip().splitlines()[-1])


def gloo(args, rounds, netns=None):
    def start(rank):
        address = "10.78.0.1" if netns else "127.0.0.1"
        own = [sys.executable, __file__, "gloo-peer", str(rank), address, str(args.mib), str(rounds)]
        inside = ["ip", "netns", "exec", f"{netns}{rank}"] if netns else []
        env = dict(os.environ, GLOO_SOCKET_IFNAME="eth0" if netns else "lo")
        return subprocess.Popen(inside + own, stdout=subprocess.PIPE, text=True, env=env)

    ranks = [start(rank) for rank in range(PEERS)]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("a gloo rank failed")
    return json.loads(outputs[0])["s_median"]


def murmur(args, *options):
    command = [args.murmur, "bench", "exchange", "--json", "--peers", str(PEERS), "--mib", str(args.mib)]
    return last_json(command + ["--rounds", str(args.rounds), *options])["s_median"]


def ip(command):
    subprocess.run(["ip", *command.split()], check=True)


def shaped(mbit):
    """Namespaces LAN0.. on a switch, every cable limited both ways."""
    ip(f"netns add {LAN}s")
    ip(f"-n {LAN}s link add br0 type bridge")
    ip(f"-n {LAN}s link set br0 up")
    for peer in range(PEERS):
        ip(f"netns add {LAN}{peer}")
        ip(f"-n {LAN}{peer} link set lo up")
        ip(f"-n {LAN}{peer} link add eth0 type veth peer name port{peer} netns {LAN}s")
        ip(f"-n {LAN}{peer} addr add 10.78.0.{peer + 1}/24 dev eth0")
        ip(f"-n {LAN}{peer} link set eth0 up")
        ip(f"-n {LAN}s link set port{peer} master br0")
        ip(f"-n {LAN}s link set port{peer} up")
        for where, device in [(f"{LAN}{peer}", "eth0"), (f"{LAN}s", f"port{peer}")]:
            ip(f"netns exec {where} tc qdisc add dev {device} root tbf rate {mbit}mbit burst 64kb latency 100ms")


def unshaped():
    for name in [f"{LAN}s", *(f"{LAN}{peer}" for peer in range(PEERS))]:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def told(link, seconds):
    own = seconds["murmur"]
    ratios = {f"{name}_over_murmur": round(value / own, 1) for name, value in seconds.items() if name != "murmur"}
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    print(json.dumps({"link": link, **rounded, **ratios}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("murmur")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hivemind")
    parser.add_argument("--mbit", type=int, nargs="*", default=[])
    args = parser.parse_args()
    seconds = {"murmur": murmur(args), "murmur_dense": murmur(args, "--dense"), "gloo": gloo(args, args.rounds)}
    if args.hivemind:
        command = [sys.executable, args.hivemind, str(PEERS), str(args.mib), str(args.rounds)]
        seconds["hivemind"] = last_json(command)["s_median"]
    told("loopback", seconds)
    for mbit in args.mbit:
        try:
            shaped(mbit)
            # A round of gloo takes a minute at 20 Mbit/s; one is enough.
            told(f"{mbit} Mbit/s", {"murmur": murmur(args, "--netns", LAN), "gloo": gloo(args, 1, LAN)})
        finally:
            unshaped()


if __name__ == "__main__":
    if sys.argv[1:2] == ["gloo-peer"]:
        gloo_peer(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
