#!/usr/bin/env python3
"""Trains one model twice, by `murmur train` and by PyTorch, on the same batches from the same beginning, and compares the loss curves.

usage: curve_vs_torch.py MURMUR [--preset 5m] [--rounds 16] [--steps 25] [--device cpu] [--precision fp32] [--text PATH ...] [--keep DIR] [--json]

MURMUR is the binary. Needs Python with torch, transformers and safetensors. transformers makes the model of the preset's shape with random
weights; `murmur train` starts from its folder with one peer, AdamW with carried moments and dense contributions, so that a round is
nothing but a pause. `murmur data batches` tells which tokens each step saw; transformers' own LlamaForCausalLM trains on the same with
torch.optim.AdamW. A row a round: the mean training loss of each side and how far they are apart. Exit code 0 only if every round is
within 1% and at least one round learnt something (the last loss below 0.8 of the first).
"""
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

# As `murmur` has them: dim, layers, heads, kv_heads, ffn.
PRESETS = {"1m": (128, 5, 4, 4, 384), "5m": (256, 7, 8, 4, 704), "16m": (384, 10, 6, 3, 1024)}
SEQ, BATCH, LR, DECAY, WARM_UP = 256, 8, 1e-3, 0.1, 102_400


def start(folder, preset):
    """A model of the preset's shape with transformers' own random weights."""
    dim, layers, heads, kv_heads, ffn = PRESETS[preset]
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=SEQ, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def run_file(args, total):
    text = json.dumps([str(pathlib.Path(path).resolve()) if path != "demo" else path for path in args.text])
    return f"""
name = "curve"
text = {text}
tokenizer = "bytes"
[model]
from = "start"
[training]
seq_len = {SEQ}
batch_sequences = {BATCH}
max_inner_steps = {args.steps}
precision = "{args.precision}"
outer_rate = 1.0
[training.optimizer]
kind = "adamw"
state = "carry"
lr = {LR}
weight_decay = {DECAY}
beta1 = 0.9
beta2 = 0.95
[training.schedule]
warmup_tokens = {WARM_UP}
total_tokens = {total}
min_ratio = 0.1
[training.compression]
algorithm = "dense"
[timing]
train_secs = 3000.0
[membership]
round_batches = {args.steps}
[verification]
audit_permille = 0
"""


def murmur_losses(args, home):
    """Mean training loss of each round."""
    command = [args.murmur, "train", home / "run.toml", "--dir", home / "peer", f"--rounds={args.rounds}", f"--device={args.device}"]
    env = {**os.environ, "MURMUR_THREADS": str(args.threads)}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in open(home / "peer" / "events.jsonl")]
    return {event["round"]: event["loss"] for event in events if "loss" in event}


def batches(args, home):
    """The tokens of each step, in the order of training."""
    command = [args.murmur, "data", "batches", home / "peer", f"--count={args.rounds * args.steps}", "--tokens", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    for line in process.stdout:
        yield torch.tensor(json.loads(line)["tokens"])


def rate(tokens, total):
    """The learning rate of the round that begins after so many tokens: warm-up from a tenth, then a cosine to a tenth."""
    if tokens < WARM_UP:
        return LR * (0.1 + 0.9 * tokens / WARM_UP)
    return LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (tokens - WARM_UP) / (total - WARM_UP))))


def torch_losses(args, home, total):
    torch.set_num_threads(args.threads)
    model = transformers.LlamaForCausalLM.from_pretrained(home / "start", dtype=torch.float32, attn_implementation="sdpa").to(args.device)
    norms = [p for p in model.parameters() if p.dim() == 1]
    others = [p for p in model.parameters() if p.dim() > 1]
    groups = [dict(params=norms, weight_decay=0.0), dict(params=others, weight_decay=DECAY)]
    optimizer = torch.optim.AdamW(groups, LR, betas=(0.9, 0.95), eps=1e-8)
    losses, step = {}, 0
    for tokens in batches(args, home):
        tokens = tokens.to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = rate(step // args.steps * args.steps * SEQ * BATCH, total)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.setdefault(1 + step // args.steps, []).append(loss.item())
        step += 1
    return {number: sum(all) / len(all) for number, all in losses.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("murmur", help="the murmur binary")
    p.add_argument("--preset", choices=PRESETS, default="5m")
    p.add_argument("--rounds", type=int, default=16)
    p.add_argument("--steps", type=int, default=25, help="of a round")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--text", nargs="+", default=["demo"])
    p.add_argument("--keep", type=pathlib.Path, help="leave everything in this new folder")
    p.add_argument("--json", action="store_true")
    args = p.parse_args()
    args.murmur = str(pathlib.Path(args.murmur).resolve())
    total = args.rounds * args.steps * SEQ * BATCH
    with tempfile.TemporaryDirectory() as temporary:
        home = args.keep or pathlib.Path(temporary)
        home.mkdir(exist_ok=True)
        start(home / "start", args.preset)
        (home / "run.toml").write_text(run_file(args, total))
        ours = murmur_losses(args, home)
        theirs = torch_losses(args, home, total)
    rows = [dict(round=r, murmur=ours[r], torch=theirs[r], apart=ours[r] / theirs[r] - 1) for r in sorted(theirs)]
    worst = max(abs(row["apart"]) for row in rows)
    if args.json:
        print(json.dumps(dict(rows=rows, worst=worst)))
    else:
        for row in rows:
            print(f"round {row['round']:3}: murmur {row['murmur']:.4f}, PyTorch {row['torch']:.4f}, apart {100 * row['apart']:+.3f}%")
        print(f"{len(rows) * args.steps * SEQ * BATCH:,} tokens; the furthest apart: {100 * worst:.3f}%")
    sys.exit(0 if worst <= 0.01 and ours[args.rounds] < 0.8 * ours[1] else 1)


if __name__ == "__main__":
    main()
