#!/usr/bin/env python3
"""Murmur's training step beside PyTorch's, on one machine, in alternation: tokens per second and peak memory.

usage: trainer_vs_torch.py MURMUR [--pairs 5] [--threads N] [--steps 10] [--shapes small vocabulary smollm2] [--peers eager bf16 compile]
                           [--device cpu] [--json]

MURMUR is the binary (target/release/murmur). Needs Python with torch 2.13.0. For each shape and peer, `murmur bench trainer` and the same decoder in
PyTorch run in turn, each in its own process; a row tells the median of each side and the median of the pairs' ratios. Both train the same
work on random tokens: forward, backward, gradient clipping to norm 1, AdamW (PyTorch: fused=True), warm-up steps not counted, median over the
steps. Memory is the process' peak; on a GPU (`--device cuda`, shapes smollm2-gpu and 1b) it is the most that the device held,
looked at ten times a second. Absolute times differ from machine to machine; ratios of one run count.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {
    "small": dict(dim=256, layers=6, heads=8, kv_heads=8, ffn=688, vocab=256, seq=256, batch=8, tied=False),
    "vocabulary": dict(dim=512, layers=8, heads=8, kv_heads=8, ffn=1376, vocab=50257, seq=512, batch=4, tied=False),
    "smollm2": dict(dim=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152, seq=512, batch=1, tied=True),
    "smollm2-gpu": dict(dim=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152, seq=1024, batch=16, tied=True),
    "1b": dict(dim=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=49152, seq=2048, batch=4, tied=True),
}
# PyTorch's way: eager in fp32, with TF32, under bf16 autocast, and compiled; and the precision that Murmur is measured in beside it.
PEERS = {"eager": "fp32", "tf32": "tf32", "bf16": "bf16", "compile": "fp32", "compile-tf32": "tf32", "compile-bf16": "bf16"}
WARM_UP = 3


def torch_side(shape, peer, steps, threads, device):
    """Trains in this process and prints one JSON line."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    torch.set_default_device(device)
    torch.backends.cuda.matmul.allow_tf32 = PEERS[peer] == "tf32"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    dim, heads, kv_heads, ffn, vocab = (shape[k] for k in ("dim", "heads", "kv_heads", "ffn", "vocab"))
    head = dim // heads

    def tables(seq):
        wave = 1e4 ** (-torch.arange(0, head, 2) / head)
        angle = torch.arange(seq)[:, None] * wave
        return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([angle.sin(), angle.sin()], -1)

    def turn(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
            self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head, False)
            self.out = nn.Linear(dim, dim, False)
            self.gate, self.up = nn.Linear(dim, ffn, False), nn.Linear(dim, ffn, False)
            self.down = nn.Linear(ffn, dim, False)

        def forward(self, x, cos, sin):
            batch, seq, _ = x.shape
            rows = self.qkv(self.norm1(x)).view(batch, seq, -1, head).transpose(1, 2)
            q, k, v = rows.split([heads, kv_heads, kv_heads], 1)
            y = F.scaled_dot_product_attention(
                turn(q, cos, sin).to(v.dtype), turn(k, cos, sin).to(v.dtype), v, is_causal=True, enable_gqa=heads != kv_heads
            )
            x = x + self.out(y.transpose(1, 2).reshape(batch, seq, dim))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocab, dim)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.norm, self.head = nn.RMSNorm(dim, 1e-5), nn.Linear(dim, vocab, False)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)
            if shape["tied"]:
                self.head.weight = self.embedding.weight
            cos, sin = tables(shape["seq"])
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)

        def forward(self, given, asked):
            x = self.embedding(given)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), asked.flatten())

    model = Decoder()
    run = torch.compile(model) if peer.startswith("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds = []
    began = time.perf_counter()
    for step in range(WARM_UP + steps):
        tokens = torch.randint(0, vocab, (shape["batch"], shape["seq"] + 1))
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=PEERS[peer] == "bf16"):
            loss = run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
        # As in `murmur bench trainer`.
        if len(seconds) >= 3 and time.perf_counter() - began > 60:
            break
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in status else 0
    rate = shape["batch"] * shape["seq"] / statistics.median(seconds)
    print(json.dumps(dict(tokens_per_sec=rate, peak_mem_bytes=peak, loss=loss.item())))


def murmur_side(binary, shape, precision, steps, threads, device):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items() if name != "tied"]
    flags += ["--tied"] if shape["tied"] else []
    flags += [f"--steps={steps}", f"--threads={threads}", f"--precision={precision}", f"--device={device}", "--json"]
    return run([binary, "bench", "trainer", *flags], device)


def run(command, device):
    """What the command prints as JSON, and on a GPU the most bytes that the device held meanwhile."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    process, most = subprocess.Popen(command, stdout=subprocess.PIPE), 0
    while device == "cuda" and process.poll() is None:
        most = max(most, int(subprocess.run(query, check=True, stdout=subprocess.PIPE).stdout.split()[0]) << 20)
        time.sleep(0.1)
    out = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    return {**json.loads(out), "device_bytes": most}


def compare(args, name, peer):
    """Rows of one shape against one peer: medians over the pairs."""
    shape, precision = SHAPES[name], PEERS[peer]
    ours, theirs = [], []
    for _ in range(args.pairs):
        report = murmur_side(args.murmur, shape, precision, args.steps, args.threads, args.device)
        held = {"peak_mem_bytes": report["device_bytes"]} if report["device_bytes"] else {}
        ours.append({**report["rows"][0], **held, "peak": report["peak"][f"{precision}_gflops"]})
        command = [sys.executable, __file__, "-", "--torch", name, peer, f"--steps={args.steps}", f"--threads={args.threads}"]
        report = run([*command, f"--device={args.device}"], args.device)
        held = {"peak_mem_bytes": report["device_bytes"]} if report["device_bytes"] else {}
        theirs.append({**report, **held})
    middle = lambda rows, key: statistics.median(row[key] for row in rows)
    return dict(
        shape=name,
        peer=peer,
        precision=precision,
        threads=args.threads,
        murmur_tokens_per_sec=middle(ours, "tokens_per_sec"),
        torch_tokens_per_sec=middle(theirs, "tokens_per_sec"),
        ratio=statistics.median(a["tokens_per_sec"] / b["tokens_per_sec"] for a, b in zip(ours, theirs)),
        ratio_of_bests=max(a["tokens_per_sec"] for a in ours) / max(b["tokens_per_sec"] for b in theirs),
        murmur_peak_mem_bytes=middle(ours, "peak_mem_bytes"),
        predicted_mem_bytes=middle(ours, "predicted_mem_bytes"),
        torch_peak_mem_bytes=middle(theirs, "peak_mem_bytes"),
        peak_share=max(a["gflops"] for a in ours) / max(a["peak"] for a in ours),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("murmur", help="the murmur binary")
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "vocabulary", "smollm2"])
    p.add_argument("--peers", nargs="+", choices=PEERS, default=["eager", "bf16", "compile"])
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--json", action="store_true")
    p.add_argument("--torch", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.torch:
        return torch_side(SHAPES[args.torch[0]], args.torch[1], args.steps, args.threads, args.device)
    rows = []
    for name in args.shapes:
        for peer in args.peers:
            row = compare(args, name, peer)
            rows.append(row)
            if not args.json:
                mb = {key: row[key] / 1e6 for key in row if key.endswith("_bytes")}
                print(
                    f"{name} {row['precision']} against {peer}: {row['murmur_tokens_per_sec']:.0f} and "
                    f"{row['torch_tokens_per_sec']:.0f} tokens/s, ratio {row['ratio']:.2f} (of the bests {row['ratio_of_bests']:.2f}), "
                    f"{100 * row['peak_share']:.0f}% of the peak; {mb['murmur_peak_mem_bytes']:.0f} MB "
                    f"({mb['predicted_mem_bytes']:.0f} predicted) and {mb['torch_peak_mem_bytes']:.0f} MB",
                    flush=True,
                )
    if args.json:
        print(json.dumps(dict(rows=rows)))


if __name__ == "__main__":
    main()
