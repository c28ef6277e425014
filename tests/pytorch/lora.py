#!/usr/bin/env python3
"""Makes the adapters of tests/data/lora with PEFT, and the numbers that the tests compare with.

    python lora.py OUTPUT_FOLDER BASE_FOLDER

Needs torch, transformers (5.x), peft, safetensors and numpy. BASE_FOLDER is tests/data/hf, whose models `llama` (grouped
queries, a head of its own) and `gpt2` (q, k and v in one layer, a tied head) are the bases. Each folder that is written
holds an adapter as PEFT saves it (adapter_config.json, adapter_model.safetensors), and `expected.safetensors`:

    tokens       u32 [10, 2, 25]     a batch for each step: the first 24 are the inputs, the last 24 the targets
    logits       f32 [2, 24, 96]     base and adapter, for the first batch
    merged       f32 [2, 24, 96]     the same of `merge_and_unload` in f32
    loss         f32 [10]            mean cross-entropy before each of ten steps, each with its own batch
    start/N      f32                 parameter N of the adapter, as in adapter_model.safetensors
    grad/N       f32                 d loss / d N for the first batch, before clipping
    final/N      f32                 N after ten steps

N are this crate's names, and matrices are `[inputs, outputs]`: `h.0.attn.q.lora_a`. All but `merged` is computed in
float64 and rounded once. The steps are AdamW's with a learning rate of 0.01, betas of 0.9 and 0.95, an eps of 1e-8, a
weight decay of 0.1 for all (they are matrices), and gradients clipped to a global norm of 1.

`llama_patterns` has ranks and alphas that differ by layer, rank-stabilised scales, modules that are trained whole, and
bf16 tensors. Of the numbers, only `tokens` (one batch), `logits` and `merged` are there.
"""

import argparse
import shutil
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from make_references import Float64Everywhere, VOCAB, generator, in_float64

STEPS, BATCH, LENGTH = 10, 2, 24
LLAMA = {
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}
GPT2 = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def ours(tensors):
    """The tensors of an adapter by our names and in our layout. q, k and v of GPT-2 share the first matrix."""
    out = {}
    for name, value in tensors.items():
        name = name.removeprefix("base_model.model.").replace(".default.", ".")
        _, layers, i, *module, matrix, _ = name.split(".")
        module = (LLAMA if layers == "layers" else GPT2)[".".join(module)]
        stem, value = f"h.{i}.{module}", value.detach().T.contiguous().float()
        if matrix == "lora_A":
            out[f"{stem}.lora_a"] = value
        elif module == "attn.qkv":
            for part, third in zip("qkv", value.chunk(3, dim=1)):
                out[f"h.{i}.attn.{part}.lora_b"] = third.contiguous()
        else:
            out[f"{stem}.lora_b"] = value
    return out


def randomise(model, name):
    """Draws all that is trained, so that no second matrix is zero."""
    g = generator(f"lora/{name}")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                draw = torch.randn(p.shape, generator=g).to(p.dtype)
                p.copy_(0.15 * draw if "lora_" in n else p + 0.1 * draw)


def losses(model, tokens):
    with Float64Everywhere():
        logits = model(tokens[:, :-1], use_cache=False).logits
        return logits, F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


def train(model, tokens):
    """What `expected.safetensors` has of ten steps."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n and p.dtype == torch.float64 and p.ndim == 2 for n, p in params.items())
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    found, values = {}, []
    for step in range(STEPS):
        logits, loss = losses(model, tokens[step])
        optimizer.zero_grad()
        loss.backward()
        values.append(loss.item())
        if step == 0:
            found["logits"] = logits.detach().float()
            found |= {f"grad/{n}": g for n, g in ours({n: p.grad for n, p in params.items()}).items()}
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        print(f"    loss {loss:.4f}  norm of the gradient {norm:.2f}")
        optimizer.step()
    found["loss"] = torch.tensor(values, dtype=torch.float64).float()
    return found | {f"final/{n}": p for n, p in ours(params).items()}


def make(out, base, name, model_class, config_class, lora, *, steps=STEPS, modules=(), dtype=torch.float32):
    print(name)
    weights = load_file(base / "model.safetensors")
    config = config_class.from_pretrained(base)
    adapted = get_peft_model(in_float64(model_class, config, weights), lora)
    randomise(adapted, name)
    adapted.eval()
    tokens = torch.randint(0, VOCAB, (max(steps, 1), BATCH, LENGTH + 1), generator=generator(f"lora/{name}/ids"))

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    # What is saved is what is computed with.
    state = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in state.values():
            p.copy_(p.to(dtype))
    plain = model_class.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    saved = get_peft_model(plain, LoraConfig(**lora_settings(lora)))
    with torch.no_grad():
        for n, p in saved.named_parameters():
            if p.requires_grad:
                p.copy_(state[n])
    saved.peft_config["default"].base_model_name_or_path = f"hf/{base.name}"
    saved.save_pretrained(folder, save_embedding_layers=False)
    if dtype is not torch.float32:
        stored = {n: p.to(dtype) for n, p in load_file(folder / "adapter_model.safetensors").items()}
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)

    found = {"tokens": tokens.to(torch.uint32)}
    if steps:
        found |= {f"start/{n}": p for n, p in ours(load_file(folder / "adapter_model.safetensors")).items()}
        found |= train(adapted, tokens)
    else:
        with torch.no_grad():
            found["logits"] = losses(adapted, tokens[0])[0].float()
    with torch.no_grad():
        found["merged"] = saved.merge_and_unload().eval()(tokens[0, :, :-1], use_cache=False).logits
    difference = (found["merged"] - found["logits"]).abs().max()
    plain = model_class.from_pretrained(base, attn_implementation="eager").eval()
    with torch.no_grad():
        moved = (plain(tokens[0, :, :-1], use_cache=False).logits - found["logits"]).abs().max()
    print(f"    merged differs by {difference:.1e}, the base by {moved:.2f}")
    assert difference < 1e-4 < 1e-1 < moved
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "expected.safetensors")


def lora_settings(lora):
    """The arguments that a LoraConfig was made from."""
    fields = ["r", "lora_alpha", "target_modules", "fan_in_fan_out", "task_type", "rank_pattern", "alpha_pattern",
              "use_rslora", "modules_to_save"]
    return {field: getattr(lora, field) for field in fields}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("bases", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    llama, gpt2 = (args.bases / "llama", LlamaForCausalLM, LlamaConfig), (args.bases / "gpt2", GPT2LMHeadModel, GPT2Config)
    common = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM")

    def run(name, base, lora, **more):
        make(args.output, base[0], name, base[1], base[2], LoraConfig(**common | lora), **more)

    run("llama", llama, dict(target_modules="all-linear"))
    run("gpt2", gpt2, dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    run("llama_patterns", llama, dict(
        target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True, modules_to_save=["lm_head", "norm"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3}, alpha_pattern={"^model.layers.0.+v_proj": 5},
    ), steps=0, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
