"""Makes tests/data/quant_golden.safetensors: random blocks of every quantised type and their values
as the `gguf` package (ggml's own Python implementation) decodes them, and for the types that
throughline also writes, random values and the blocks that `gguf` makes of them.

    pip install gguf numpy safetensors
    python tests/python/make_quant_golden.py tests/data/quant_golden.safetensors

The committed file was made with gguf 0.19.0. <type>.blocks is U8 [n, bytes of a block],
<type>.values F32 [n, elements of a block]; <type>.source F32 [n, elements] and <type>.quantized U8
are the other direction.
"""

import sys

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

BLOCKS = 3
# Where a block's f16 scales are, in bytes.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
WRITTEN = ["Q4_0", "Q4_1", "Q8_0"]

rng = np.random.default_rng(20)
tensors = {}
for name, scales in SCALES.items():
    qtype = GGMLQuantizationType[name]
    length, size = GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    # Scales of any 16 bits would be NaN or huge at times.
    for at in scales:
        d = rng.normal(0, 0.1, (BLOCKS, 1)).astype("<f2")
        d[-1] = 3e-6  # a subnormal one
        blocks[:, at : at + 2] = d.view(np.uint8)
    tensors[f"{name}.blocks"] = blocks
    tensors[f"{name}.values"] = dequantize(blocks, qtype).astype(np.float32).reshape(BLOCKS, length)
for name in WRITTEN:
    source = rng.normal(0, 1, (BLOCKS, 32)).astype(np.float32)
    source[-1] = 0
    tensors[f"{name}.source"] = source
    tensors[f"{name}.quantized"] = quantize(source, GGMLQuantizationType[name])
save_file(tensors, sys.argv[1])
