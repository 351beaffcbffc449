"""What PyTorch's own optimizers make of a tiny model's parameters in 100 steps: writes trainer/tests/fixtures/optimizers.json.

usage: optimizer_fixture.py > trainer/tests/fixtures/optimizers.json        (torch 2.13.0)

Initial values and gradients come from formulas in exactly representable numbers, which trainer/tests/optimizers.rs repeats; every
third parameter is written. Two groups as in Murmur: norms are not decayed. Muon takes the matrices, AdamW the rest.

torch.optim.Muon casts its Newton-Schulz iteration to bfloat16, whatever the parameters are. That cast alone is left out here (the
iteration below is PyTorch's but for it), because Murmur iterates in single precision. Its other settings: adjust_lr_fn is
"match_rms_adamw", which is Murmur's scale; PyTorch's default, "original", would be another learning rate for each shape.
"""
import json

import torch
import torch.optim._muon as muon

STEPS, LR, DECAY = 100, 2**-8, 0.125
DIM, FFN, VOCAB, HEADS, KV_HEADS = 8, 8, 8, 2, 1
KV = KV_HEADS * DIM // HEADS
# name, shape, kind, in the order of the flat vector
SHAPES = (
    [("vector", (VOCAB, DIM))]
    + [("norm", (DIM,))] * 3
    + [("matrix", s) for s in ((DIM, DIM), (KV, DIM), (KV, DIM), (DIM, DIM), (FFN, DIM), (FFN, DIM), (DIM, FFN))]
)


def initial(i):
    return ((i * 37 + 11) % 64 - 32) / 64


def gradient(step, i):
    return ((i * 29 + step * 53 + i * i * (step + 3) % 31) % 128 - 64) / 256


def newton_schulz(grad, coefficients, steps, eps):
    a, b, c = coefficients
    x = grad  # PyTorch: grad.bfloat16()
    if grad.size(0) > grad.size(1):
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def run(make):
    parts, start = [], 0
    for kind, shape in SHAPES:
        count = torch.Size(shape).numel()
        values = torch.tensor([initial(i) for i in range(start, start + count)]).view(shape)
        parts.append((kind, start, torch.nn.Parameter(values)))
        start += count
    optimizers = make(lambda *kinds: [p for kind, _, p in parts if kind in kinds])
    for step in range(STEPS):
        for _, first, p in parts:
            p.grad = torch.tensor([gradient(step, i) for i in range(first, first + p.numel())]).view(p.shape)
        for optimizer in optimizers:
            optimizer.step()
    flat = torch.cat([p.detach().flatten() for _, _, p in parts])
    return [float(f"{x:.9g}") for x in flat[::3].tolist()]


def groups(of):
    decayed, norms = of("vector", "matrix"), of("norm")
    return [dict(params=decayed, weight_decay=DECAY), dict(params=norms, weight_decay=0.0)]


def adamw(of):
    return [torch.optim.AdamW(groups(of), lr=LR, betas=(0.9, 0.95), eps=1e-8)]


def sgd(of):
    return [torch.optim.SGD(groups(of), lr=LR, momentum=0.95)]


def muon_and_adamw(of):
    rest = [dict(params=of("vector"), weight_decay=DECAY), dict(params=of("norm"), weight_decay=0.0)]
    return [
        torch.optim.Muon(of("matrix"), lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.95), eps=1e-8),
    ]


# Guard against a PyTorch whose Muon is another: without the replacement the same call must go through.
assert callable(muon._zeropower_via_newtonschulz)
muon._zeropower_via_newtonschulz = newton_schulz
torch.set_num_threads(1)
print(json.dumps(dict(torch=torch.__version__.split("+")[0], adamw=run(adamw), sgd=run(sgd), muon=run(muon_and_adamw))))
