#!/usr/bin/env python3
"""Makes the reference models that the checkpoint tests compare against.

    python make_references.py OUTPUT_FOLDER [NAME...]

Needs torch, transformers (5.x), safetensors and numpy. Every model is tiny, has
random weights from a fixed seed, and is written as a normal Hugging Face
folder (config.json + model.safetensors), with `expected.safetensors` beside it:

    ids     u32 [2, 24]        the input
    logits  f32 [2, 24, vocab] what PyTorch computes in float64, rounded once
    loss    f32 []             mean cross-entropy, positions 0..22 predict 1..23
    grad/N  f32                d loss / d parameter N (only for some models)

Further files, where they apply:

    config_v4.json             the same model as config.json, in the spelling of
                               transformers 4 (`rope_theta` + `rope_scaling`);
                               config.json has that of transformers 5
                               (`rope_parameters`)
    config_X.json, expected_X.safetensors
                               the same weights under another rope setting
                               (X is `bands` or `explicit`): ids and logits

`bert` is an encoder and has other contents; see `make_bert`.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

SEED = 20240607
VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, FF, CONTEXT = 96, 32, 2, 4, 2, 80, 64
BATCH, LENGTH = 2, 24


class Float64Everywhere(TorchFunctionMode):
    """Turns each request for float32 into one for float64.

    `model.double()` is not enough: the model code itself goes back to float32
    in RMSNorm, in the softmax and for the rope angles.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {k: widen(v) for k, v in (kwargs or {}).items()}
        return func(*[widen(a) for a in args], **kwargs)


def generator(name):
    """A random generator that depends on the model's name and on nothing else."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))


def randomise(model, name):
    """Draws all weights, so that no bias is 0, no gain is 1 and the logits' std is about 1 to 3."""
    g = generator(name)
    with torch.no_grad():
        for n, p in model.named_parameters():  # a tied head is listed once
            draw = torch.randn(p.shape, generator=g)
            norm = "norm" in n.lower() or ".ln_" in n
            if n.endswith("bias"):
                p.copy_(0.2 * draw)
            elif norm:
                p.copy_(1.0 + 0.15 * draw)
            elif "position_embeddings" in n or "wpe" in n:
                p.copy_(0.2 * draw)
            else:
                p.copy_(0.27 * draw)


def in_float64(model_class, config, weights):
    """The same model, its weights widened, its rope frequencies computed in float64."""
    config._attn_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        with Float64Everywhere():
            model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    # The checkpoint lists neither a tied head nor the rope's buffers.
    missing, unexpected = model.load_state_dict({k: v.double() for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    assert not missing or config.tie_word_embeddings
    assert all(p.dtype == torch.float64 for p in model.parameters())
    return model.eval()


def random_ids(name, batch=BATCH, length=LENGTH):
    return torch.randint(0, VOCAB, (batch, length), generator=generator(name + "/ids"))


def expect(model_class, config, weights, ids, with_loss=True, with_gradients=False):
    """What `expected.safetensors` holds for a language model."""
    model = in_float64(model_class, config, weights)
    with Float64Everywhere():
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    assert logits.dtype == torch.float64
    # Against the library's own way, whose float32 islands cost some 1e-6.
    with torch.no_grad():
        islands = (model(ids, use_cache=False).logits - logits).abs().max().item()
    assert islands < 1e-3, islands
    print(f"    logits std {logits.std():.2f}  loss {loss:.4f}  |model.double() - float64| {islands:.1e}")
    out = {"ids": ids.to(torch.uint32), "logits": logits.detach().float()}
    if with_loss:
        out["loss"] = loss.detach().float()
    if with_gradients:
        loss.backward()
        for n, p in model.named_parameters():
            out["grad/" + n] = p.grad.float()
    return out


def store(tensors, path):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def weights_of(model):
    """The state as it is stored: a tied head only once."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    return state


def spelt_as_v4(config, type_key="rope_type"):
    """The dictionary of a version 5 config.json, as version 4 would have written it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type")
    config["rope_scaling"] = None if rope_type == "default" else {type_key: rope_type, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.1"
    return dict(sorted(config.items()))


def write_json(value, path):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def make(out, name, model_class, config, *, gradients=False, v4=None, variants=(), dtypes=(), sharded=False):
    """One language model and what was asked for beside it.

    v4        the key that names the rope type in config_v4.json; None: no such file
    variants  (suffix, config): another rope setting for the same weights
    dtypes    (suffix, dtype): folders NAME_suffix with the weights rounded to dtype
    sharded   also a folder NAME_sharded: the same weights in several files
    """
    print(name)
    folder = out / name
    model = model_class(config).eval()
    randomise(model, name)
    weights = weights_of(model)
    ids = random_ids(name)
    # Before `in_float64`, which marks the config.
    model.save_pretrained(folder, safe_serialization=True)
    store(expect(model_class, config, weights, ids, with_gradients=gradients), folder / "expected.safetensors")
    if v4:
        written = json.loads((folder / "config.json").read_text())
        write_json(spelt_as_v4(written, v4), folder / "config_v4.json")
        # Both spellings mean the same to the library.
        again = type(config).from_pretrained(folder / "config_v4.json")
        meant = {k: v for k, v in again.rope_parameters.items() if k != "type"}  # the old key is kept beside the new
        assert meant == config.rope_parameters, (meant, config.rope_parameters)
    for suffix, other in variants:
        print(f"  {suffix}")
        other.architectures, other.dtype = [model_class.__name__], "float32"
        other.to_json_file(folder / f"config_{suffix}.json")
        store(expect(model_class, other, weights, ids, with_loss=False), folder / f"expected_{suffix}.safetensors")
    for suffix, dtype in dtypes:
        print(f"  {suffix}")
        rounded = {k: v.to(dtype) for k, v in weights.items()}
        narrow = model_class(type(config)(**config.to_diff_dict())).to(dtype)
        narrow.load_state_dict(rounded, strict=not config.tie_word_embeddings)
        narrow.save_pretrained(out / f"{name}_{suffix}", safe_serialization=True)
        store(expect(model_class, config, rounded, ids), out / f"{name}_{suffix}" / "expected.safetensors")
    if sharded:
        model.save_pretrained(out / f"{name}_sharded", safe_serialization=True, max_shard_size="20KB")


def make_bert(out):
    """A post-norm encoder (BertModel). `expected.safetensors`:

    ids             u32 [2, 12]
    attention_mask  u32 [2, 12]     0 = padding: the second sequence from position 7 on
    token_types     u32 [2, 12]     used for `hidden_types` only; else all are of type 0
    hidden          f32 [2, 12, 32] no mask
    hidden_masked   f32 [2, 12, 32] with the mask (padding attends to the rest, too)
    mean_pooled     f32 [2, 32]     mean of hidden_masked where the mask is 1, divided by its L2 norm
    hidden_types    f32 [2, 12, 32] no mask, with token_types
    """
    print("bert")
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FF, max_position_embeddings=CONTEXT, type_vocab_size=2, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12, pad_token_id=0,
    )
    model = BertModel(config).eval()
    randomise(model, "bert")
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.save_pretrained(out / "bert", safe_serialization=True)

    ids = random_ids("bert", 2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = config.pad_token_id
    types = torch.zeros_like(ids)
    types[0, 5:] = 1
    types[1, 4:] = 1
    reference = in_float64(BertModel, config, weights)
    with Float64Everywhere(), torch.no_grad():
        hidden = reference(ids).last_hidden_state
        masked = reference(ids, attention_mask=mask).last_hidden_state
        typed = reference(ids, token_type_ids=types).last_hidden_state
        keep = mask.unsqueeze(-1).double()
        pooled = F.normalize((masked * keep).sum(1) / keep.sum(1), dim=-1)
    print(f"    hidden std {hidden.std():.2f}  mask moves {(hidden - masked)[1].abs().max():.2f}"
          f"  types move {(hidden - typed).abs().max():.2f}")
    store({
        "ids": ids.to(torch.uint32), "attention_mask": mask.to(torch.uint32), "token_types": types.to(torch.uint32),
        "hidden": hidden.float(), "hidden_masked": masked.float(), "mean_pooled": pooled.float(),
        "hidden_types": typed.float(),
    }, out / "bert" / "expected.safetensors")


def shape(**more):
    """The names that Llama and its relatives share, and this file's sizes."""
    return dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, intermediate_size=FF, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    ) | more


def rope(kind="default", theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def llama3(theta=10000.0, context=16):
    scaling = rope("llama3", theta, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=context)
    # Heads wider than WIDTH / HEADS, and every bias there is.
    return LlamaConfig(**shape(head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), **scaling)


def yarn(theta=10000.0, **more):
    return LlamaConfig(**shape(), **rope("yarn", theta, factor=4.0, original_max_position_embeddings=16, **more))


MODELS = {
    "gpt2": lambda out: make(
        out, "gpt2", GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FF, n_positions=CONTEXT,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
        gradients=True),
    "llama": lambda out: make(
        out, "llama", LlamaForCausalLM, LlamaConfig(**shape(), **rope()), gradients=True, v4="rope_type",
        dtypes=[("f16", torch.float16), ("bf16", torch.bfloat16)]),
    # `bands`: settings under which one frequency is kept, one is blended and the rest is divided;
    # those of `llama3` itself keep none.
    "llama3": lambda out: make(
        out, "llama3", LlamaForCausalLM, llama3(), v4="rope_type", variants=[("bands", llama3(context=32))]),
    # Its version 4 file has the older key `type`.
    "llama_linear": lambda out: make(
        out, "llama_linear", LlamaForCausalLM, LlamaConfig(**shape(), **rope("linear", factor=4.0)), v4="type"),
    # `explicit`: every optional key but mscale, and a ramp with a value strictly inside (0, 1).
    "llama_yarn": lambda out: make(
        out, "llama_yarn", LlamaForCausalLM, yarn(), v4="rope_type",
        variants=[("explicit", yarn(theta=50.0, beta_fast=4.0, beta_slow=0.5, attention_factor=1.25, truncate=False))]),
    "mistral": lambda out: make(
        out, "mistral", MistralForCausalLM, MistralConfig(**shape(sliding_window=None), **rope())),
    "mistral_window": lambda out: make(
        out, "mistral_window", MistralForCausalLM, MistralConfig(**shape(sliding_window=8), **rope())),
    "qwen2": lambda out: make(
        out, "qwen2", Qwen2ForCausalLM, Qwen2Config(**shape(tie_word_embeddings=True, rms_norm_eps=1e-6), **rope()),
        gradients=True, sharded=True),
    # A smaller feed-forward, to keep the folder with its gradients small.
    "qwen3": lambda out: make(
        out, "qwen3", Qwen3ForCausalLM,
        Qwen3Config(**shape(head_dim=16, intermediate_size=56, tie_word_embeddings=True, rms_norm_eps=1e-6),
                    **rope(theta=1000000.0)),
        gradients=True, v4="rope_type"),
    "bert": make_bert,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all, if none is given")
    args = parser.parse_args()
    unknown = set(args.names) - set(MODELS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in args.names or MODELS:
        for old in [args.output / name, *args.output.glob(f"{name}_*")]:
            # `llama` also makes llama_f16 and llama_bf16, but llama_linear is a model of its own.
            if old.is_dir() and (old.name == name or old.name not in MODELS):
                shutil.rmtree(old)
        MODELS[name](args.output)


if __name__ == "__main__":
    main()
