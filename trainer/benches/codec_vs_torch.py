"""Encoding beside the same in PyTorch: error feedback, `torch.topk`, sign and mean, indices sorted and packed in 12 bits.

usage: codec_vs_torch.py MURMUR [--params 16777216] [--k 64] [--threads 1]
Needs torch. MURMUR is the binary; both run on the same number of threads, one after the other, three times in alternation; medians are told.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch

CHUNK, BETA = 4096, 0.95


def encode(accumulator, delta, k):
    """One round: bytes, and the accumulator that is left."""
    a = accumulator.mul(BETA).add_(delta).view(-1, CHUNK)
    index = a.abs().topk(k, sorted=False).indices.sort().values
    values = a.gather(1, index)
    scale = values.abs().mean(1, keepdim=True)
    a.scatter_add_(1, index, -torch.sign(values) * scale)
    pairs = index.view(-1, 2)
    packed = torch.stack(
        [pairs[:, 0] & 255, (pairs[:, 0] >> 8) | (pairs[:, 1] & 15) << 4, pairs[:, 1] >> 4], 1
    ).to(torch.uint8)
    signs = (values < 0).view(-1, 8).to(torch.uint8)
    signs = (signs << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    codes = scale.log2().mul(8).round().clamp(-224, 31).add(224).to(torch.uint8)
    return b"".join(part.numpy().tobytes() for part in (packed, signs, codes)), a.view(-1)


def torch_speed(params, k, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    delta = 1e-3 * torch.randn(params) * torch.randn(params).exp()
    _, accumulator = encode(torch.zeros(params), delta, k)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        data, _ = encode(accumulator, delta, k)
        times.append(time.perf_counter() - start)
    return 4e-9 * params / min(times), len(data) / params


def murmur_speed(binary, params, k, threads):
    command = [binary, "bench", "codec", "--json", "--params", str(params), "--k", str(k), "--threads", str(threads)]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["rows"][0]
    return row["encode_gb_s"], row["bytes_per_param"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("murmur")
    parser.add_argument("--params", type=int, default=1 << 24, help="a multiple of 4096")
    parser.add_argument("--k", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    ours, theirs = [], []
    for _ in range(3):
        ours.append(murmur_speed(args.murmur, args.params, args.k, args.threads))
        theirs.append(torch_speed(args.params, args.k, args.threads))
    speed = [statistics.median(speed for speed, _ in rows) for rows in (ours, theirs)]
    print(json.dumps({
        "params": args.params,
        "k": args.k,
        "threads": args.threads,
        "murmur_gb_s": round(speed[0], 3),
        "torch_gb_s": round(speed[1], 3),
        "ratio": round(speed[0] / speed[1], 2),
        "murmur_bytes_per_param": ours[0][1],
        "torch_bytes_per_param": theirs[0][1],
    }))


if __name__ == "__main__":
    main()
