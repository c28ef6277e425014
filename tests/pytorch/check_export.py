#!/usr/bin/env python3
"""Checks a model that throughline exported against transformers.

    python check_export.py FOLDER [--tolerance 1e-3]

FOLDER holds config.json and model.safetensors as exported, and
expected.safetensors with `ids` (u32 [B, T]) and `logits` (f32 [B, T, vocab]) as
throughline computed them. The model is run in float64. Exits with 1 if any
logit is off by more than the tolerance, or if the folder isn't a complete
checkpoint in transformers' eyes.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def fail(message):
    print(f"FAIL: {message}", file=sys.stderr)
    sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()

    for name in ["config.json", "expected.safetensors"]:
        if not (args.folder / name).is_file():
            fail(f"{args.folder} has no {name}")
    expected = load_file(args.folder / "expected.safetensors")
    for name in ["ids", "logits"]:
        if name not in expected:
            fail(f"expected.safetensors has no tensor `{name}`; it has {', '.join(sorted(expected))}")
    ids, logits = expected["ids"].to(torch.int64), expected["logits"].double()
    if ids.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        fail(f"ids are {list(ids.shape)} and logits {list(logits.shape)}; [B, T] and [B, T, vocab] are wanted")

    torch.set_num_threads(1)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            args.folder, attn_implementation="eager", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        fail(f"transformers can't load {args.folder}: {error}")
    # transformers only warns about these, and draws what is missing at random.
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        if info.get(kind):
            fail(f"{kind.replace('_', ' ')} in the checkpoint: {sorted(map(str, info[kind]))}")

    model = model.double().eval()
    if ids.numel() and int(ids.max()) >= model.config.vocab_size:
        fail(f"ids go up to {int(ids.max())}, but the vocabulary has {model.config.vocab_size}")
    with torch.no_grad():
        actual = model(ids, use_cache=False).logits
    if actual.shape != logits.shape:
        fail(f"transformers' logits are {list(actual.shape)}, those exported {list(logits.shape)}")
    difference = (actual - logits).abs()
    if not torch.isfinite(difference).all():
        fail("there are logits that aren't finite")
    worst = difference.max().item()
    if worst > args.tolerance:
        at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        fail(f"max abs difference {worst:.3e} > {args.tolerance:.1e}, at [batch, position, token] = {at}: "
             f"transformers {actual[tuple(at)]:.6f}, exported {logits[tuple(at)]:.6f}; "
             f"mean abs difference {difference.mean():.3e}")
    print(f"ok: {type(model).__name__}, {list(ids.shape)} ids, max abs difference {worst:.3e} "
          f"(logits' std {actual.std():.3f})")


if __name__ == "__main__":
    main()
