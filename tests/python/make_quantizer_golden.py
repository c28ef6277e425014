"""Makes tests/data/quantizer_golden.safetensors: rows of all kinds of values, and the blocks that ggml's
reference quantisers (`quantize_row_*_ref`) make of them.

    pip install numpy safetensors
    python tests/python/make_quantizer_golden.py libggml-base.so tests/data/quantizer_golden.safetensors

The library is a part of llama.cpp (https://github.com/ggml-org/llama.cpp), built for a processor without
fused multiply-adds, as on x86-64 by default:

    cmake -B build -DBUILD_SHARED_LIBS=ON && cmake --build build --target ggml-base

The committed file was made with ggml 0.25.3, as llama-cpp-python 0.3.36 has it. `source` is F32
[n, 256]; <type> is U8, the rows' blocks one after another.
"""

import ctypes
import sys

import numpy as np
from safetensors.numpy import save_file

SIZES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "F16": (1, 2), "BF16": (1, 2),
}  # fmt: skip
FUNCTIONS = {
    "F16": "ggml_fp32_to_fp16_row",
    "BF16": "ggml_fp32_to_bf16_row_ref",
}


def rows(rng):
    """Rows of 256 that are unlike each other."""
    n = 256
    normal = rng.normal(0, 0.05, (3, n))
    yield from normal
    yield rng.uniform(-1, 1, n)
    yield rng.uniform(0, 1, n)  # a minimum above zero counts as zero
    yield rng.uniform(2, 3, n)
    yield -rng.uniform(2, 3, n)
    yield rng.standard_cauchy(n)
    yield np.where(rng.uniform(size=n) < 0.02, 40.0, 1e-3) * rng.normal(0, 1, n)
    yield np.round(rng.normal(0, 4, n)) / 2  # halves, which many scales take to ties
    yield (np.arange(n) % 31 - 15.5) * 0.25
    yield rng.normal(0, 1, n).astype(np.float16)
    yield np.zeros(n)
    yield np.where(np.arange(n) % 2 == 0, -0.0, 0.0)
    yield np.full(n, 0.7)
    yield np.full(n, -0.7)
    one = np.zeros(n)
    one[77] = -3.0
    yield one
    yield np.where(np.arange(n) < 128, 0, rng.normal(0, 1, n))  # groups without elements
    yield rng.normal(0, 1, n) * 10.0 ** (np.arange(n) // 32 - 5)  # groups of all sizes
    yield rng.normal(0, 1e-6, n)  # scales that are subnormal in f16
    yield rng.normal(0, 1e-12, n)  # scales that are zero in f16
    yield rng.normal(0, 3e-17, n)  # below ggml's least scale
    yield rng.normal(0, 2e4, n).clip(-6e4, 6e4)
    yield rng.normal(0, 1e-4, n) + 1000


def main(library, out):
    ggml = ctypes.CDLL(library)
    source = np.stack([np.asarray(row, dtype=np.float32) for row in rows(np.random.default_rng(16))])
    tensors = {"source": source}
    for name, (length, size) in SIZES.items():
        blocks = np.zeros(source.size // length * size, dtype=np.uint8)
        function = getattr(ggml, FUNCTIONS.get(name, f"quantize_row_{name[0].lower() + name[1:]}_ref"))
        function(
            source.ctypes.data_as(ctypes.c_void_p),
            blocks.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(source.size),
        )
        tensors[name] = blocks
    save_file(tensors, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
