#!/usr/bin/env python3
"""Makes the steps of Muon and AdamW that tests/muon.rs compares with.

    python make_muon.py OUTPUT_FILE

Needs torch with torch.optim.Muon (2.9 or later) and safetensors. PyTorch makes updates orthogonal in bfloat16; here
that function runs in float64, its text else unchanged. Matrices are written input-major, `[inputs, outputs]`, where
PyTorch has `[outputs, inputs]`. The file:

    start/N       f32   parameter N before the first step
    grad/I/N      f32   its gradient in step I
    SETTING/N     f32   the parameter after the last step, computed in float64, rounded once

Settings: `original` and `match` are PyTorch's `original` and `match_rms_adamw`, the second without Nesterov's momentum;
`clipped` is the first with gradients clipped to a global norm of 0.5. `bias` is AdamW's.
"""

import inspect
import sys

import torch
from safetensors.torch import save_file
from torch.optim import _muon

SHAPES = {"wide": (20, 12), "tall": (12, 20), "square.0": (16, 16), "square.1": (16, 16), "odd": (7, 5), "bias": (9,)}
STEPS = 4


def in_float64():
    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count("torch.bfloat16") == 1
    exec(source.replace("torch.bfloat16", "torch.float64"), vars(_muon))


def random(shape, scale, generator):
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).float()


def written(tensor):
    """As the file has it: input-major."""
    return tensor.detach().T.contiguous().float() if tensor.ndim == 2 else tensor.detach().float()


def run(start, grads, nesterov, adjust, max_norm):
    params = {name: torch.nn.Parameter(value.double()) for name, value in start.items()}
    matrices = [p for p in params.values() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW([params["bias"]], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in grads:
        for name, grad in step.items():
            params[name].grad = grad.double()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
        muon.step()
        adamw.step()
    return params


def main():
    in_float64()
    generator = torch.Generator().manual_seed(7)
    start = {name: random(shape, 0.1, generator) for name, shape in SHAPES.items()}
    # The first steps' gradients are larger, so that clipping changes what the momentum is.
    grads = [{name: random(shape, 0.5**i, generator) for name, shape in SHAPES.items()} for i in range(STEPS)]
    tensors = {f"start/{name}": written(value) for name, value in start.items()}
    for i, step in enumerate(grads):
        tensors |= {f"grad/{i}/{name}": written(value) for name, value in step.items()}
    settings = {
        "original": (True, "original", 0.0),
        "match": (False, "match_rms_adamw", 0.0),
        "clipped": (True, "original", 0.5),
    }
    for setting, arguments in settings.items():
        final = run(start, grads, *arguments)
        tensors |= {f"{setting}/{name}": written(value) for name, value in final.items()}
    save_file(tensors, sys.argv[1])


if __name__ == "__main__":
    main()
