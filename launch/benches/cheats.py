#!/usr/bin/env python3
"""Swarms of real processes in which one peer of five cheats in every round: whether and when it is barred, what it keeps, and what it does to
the loss of the model that the others are left with, beside the same swarm without it, of four, and beside five that do not cheat.

    launch/benches/cheats.py target/release/murmur                     # every cheat, one run each
    launch/benches/cheats.py target/release/murmur --runs 3 flip skip  # these, three seeds each

Rounds end with their batches, not by the clock, so every run trains on the same number of tokens a round. Prints a table in Markdown; with --keep DIR
each run's report is kept there, and what stopped goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHEATS = {
    "skip": "half of the batches",
    "tenth": "a tenth of the batches",
    "step": "one step fewer",
    "batch": "half of each batch, twice over",
    "precision": "bf16 in place of fp32",
    "labels": "every byte of the text another",
    "backdoor": "a phrase planted into every fourth sequence",
    "data": "other data",
    "zero": "nothing",
    "noise": "noise",
    "stale": "the round before once more",
    "scale": "times 1.2",
    "blowup": "times 1000",
    "flip": "the opposite",
    "inner": "a tenth of the opposite",
    "little": "every value moved a little, all the same way",
    "copy": "what another sent the round before",
    "garbage": "bytes that are no contribution",
    "forge": "twice what its accumulator should hold",
    "trace": "steps that it did not take",
    "hide": "its accumulators opened to nobody",
    "accuse": "every round that it audits said to differ",
    "guess": "every round that it audits said to agree, unseen",
    "collude": "two of seven: half of the batches, each covered by the other, the rest accused",
    "exit": "half of the batches in two rounds, then goodbye",
}
# How many it takes, where that is not one of five.
SEVERAL = {"collude": (2, 7)}

SETS = [
    "model.dim=64",
    "model.layers=2",
    "model.heads=2",
    "model.ffn=128",
    "training.seq_len=64",
    "timing.train_secs=60",
    "timing.collect_secs=70",
]


def demo(args, seed, cheat, peers):
    """One run of so many peers: its report, and who has how many points."""
    name = cheat or (f"honest-of-{peers}" if peers != args.peers - 1 else "honest")
    file = Path(args.keep) / f"{name}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "demo"
        command = [args.murmur, "demo", "--json", "--dir", folder, "--peers", peers, "--rounds", args.rounds]
        command += ["--seed", seed, "--kill", "none"]
        if cheat:
            command += ["--cheat", cheat]
        if args.text:
            command += ["--text", args.text]
        for one in SETS + ["verification.audit_permille=400"]:
            command += ["--set", one]
        ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if not ended.stdout.strip():
            sys.exit(f"{cheat}, seed {seed}: {ended.stderr}")
        report = json.loads(ended.stdout.splitlines()[-1])
        show = [args.murmur, "ledger", "show", "--json", "--dir", folder / "peer-1"]
        ledger = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    report["points"] = {one["id"]: one["provisional"] + one["vested"] for one in ledger["members"]}
    file.write_text(json.dumps(report))
    print(f"{name}, seed {seed}: loss {report['val_loss']:.4f} {report['faults'] or ''}", file=sys.stderr)
    return report


def kept(report, cheater):
    """Its points, as a share of what an honest peer has that was there from the first."""
    others = set(report["joined"]) | set(report["cheats"])
    honest = [points for one, points in report["points"].items() if one not in others]
    return report["points"][cheater] / statistics.mean(honest)


def baseline(args, honest):
    """The losses of so many honest peers without a cheat, by seed."""
    return [demo(args, seed, None, honest)["val_loss"] for seed in range(1, args.runs + 1)]


def beside(runs, honest):
    """How much higher the losses are than honest ones of the same seeds: the mean, and its standard error."""
    higher = [report["val_loss"] / loss - 1 for report, loss in zip(runs, honest)]
    error = f" ± {statistics.stdev(higher) / len(higher) ** 0.5:.1%}" if len(higher) > 2 else ""
    return f"{statistics.mean(higher):+.1%}{error}"


def row(args, cheat):
    cheats, peers = SEVERAL.get(cheat, (1, args.peers))
    runs = [demo(args, seed, cheat, peers) for seed in range(1, args.runs + 1)]
    without, as_many = (beside(runs, baseline(args, honest)) for honest in (peers - cheats, peers))
    caught = [one for report in runs for one in report["caught"]]
    barred = len({(at, one["id"]) for at, report in enumerate(runs) for one in report["caught"]})
    share = statistics.mean(kept(report, one) for report in runs for one in report["cheats"])
    wronged = sum(len(report["accused_honest"]) for report in runs)
    when = f"{statistics.mean(one['round'] for one in caught):.1f}" if caught else ""
    far = [one["rel_l2"] for one in caught if one["bound"] > 0 and one["rel_l2"] < 1e9]
    distance = f"{statistics.mean(far):.2g}" if far else ""
    faults = sum(len(report["faults"]) for report in runs)
    print(
        f"| `{cheat}`: {CHEATS[cheat]} | {distance} | {barred} of {cheats * len(runs)} | {when} | {share:.0%} "
        f"| {without} | {as_many} | {wronged} | {faults} |",
        flush=True,
    )


def table(args):
    honest = baseline(args, args.peers - 1)
    print(f"loss of {args.peers - 1} peers without a cheat: {', '.join(f'{loss:.4f}' for loss in honest)}\n")
    print("| cheat, in every round | distance (0.01 passes) | barred | round | points kept | loss beside those without it | beside as many honest | honest accused | faults |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cheat in args.cheats or CHEATS:
        row(args, cheat)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("murmur")
    parser.add_argument("cheats", nargs="*", metavar="CHEAT", help=", ".join(CHEATS))
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--text", help="in place of the plays")
    parser.add_argument("--keep", metavar="DIR")
    args = parser.parse_intermixed_args()
    # The honest runs stand beside every cheat, so they are made once in any case.
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or folder
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        table(args)


if __name__ == "__main__":
    main()
