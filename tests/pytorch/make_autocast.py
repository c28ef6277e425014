#!/usr/bin/env python3
"""Makes the gradients in mixed precision that tests/reference_models.rs compares with.

    python make_autocast.py DATA_FOLDER

Needs torch, transformers and safetensors. Reads the weights and the first batch of tiny_gpt2 and tiny_llama in the folder
(tests/data), runs them on a CPU under PyTorch's autocast to float16, with the loss scaled by 4096 for the backward pass,
and writes `tiny_X_autocast.safetensors`:

    loss      f32   mean cross-entropy under autocast
    grad/N    f32   of the gradient of parameter N, scaled back: every element, or of larger ones 509 in equal distances
    error/N   f32   norm(autocast - f32) / norm(f32) of all its elements
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SCALE, MOST = 4096.0, 509


def models():
    gpt2 = GPT2Config(vocab_size=65, n_positions=32, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                      attn_pdrop=0.0)
    llama = LlamaConfig(vocab_size=65, hidden_size=48, intermediate_size=136, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5,
                        tie_word_embeddings=False)
    for config in (gpt2, llama):
        config._attn_implementation = "eager"
    yield "tiny_gpt2", GPT2LMHeadModel(gpt2)
    yield "tiny_llama", LlamaForCausalLM(llama)


def gradients(model, x, y, mixed):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16, enabled=mixed):
        logits = model(x, use_cache=False).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
    (loss * SCALE).backward()
    return loss.detach().float(), {n: p.grad.detach().float() / SCALE for n, p in model.named_parameters()}


def main(folder):
    for name, model in models():
        model = model.eval()
        weights = load_file(folder / f"{name}.safetensors")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        batches = load_file(folder / f"{name}_batches.safetensors")
        x, y = (batches[key].long().reshape(11, 3, 32)[0] for key in "xy")
        full_loss, full = gradients(model, x, y, False)
        loss, mixed = gradients(model, x, y, True)
        print(name, f"loss {full_loss:.5f} in f32, {loss:.5f} in mixed precision")
        out = {"loss": loss}
        for n, got in mixed.items():
            flat = got.flatten()
            stride = -(-flat.numel() // MOST)
            out[f"grad/{n}"] = flat[::stride].contiguous()
            out[f"error/{n}"] = (got - full[n]).norm() / full[n].norm()
            print(f"    {n:50} {out[f'error/{n}']:.2e}")
        save_file(out, folder / f"{name}_autocast.safetensors")


main(Path(sys.argv[1]))
