"""Makes tests/data/golden.gguf: a small file as the `gguf` package (ggml's own Python implementation)
writes it, with metadata of every type and tensors of several. throughline must read it and write the
same bytes.

    pip install gguf numpy
    python tests/python/make_gguf_golden.py tests/data/golden.gguf

The committed file was made with gguf 0.19.0.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

rng = np.random.default_rng(16)
writer = GGUFWriter(sys.argv[1], "llama")
writer.add_custom_alignment(64)
writer.add_name("harbour")
writer.add_uint8("a.u8", 200)
writer.add_int8("a.i8", -100)
writer.add_uint16("a.u16", 60_000)
writer.add_int16("a.i16", -30_000)
writer.add_uint32("a.u32", 4_000_000_000)
writer.add_int32("a.i32", -2_000_000_000)
writer.add_uint64("a.u64", 1 << 63)
writer.add_int64("a.i64", -(1 << 62))
writer.add_float32("a.f32", 1e-5)
writer.add_float64("a.f64", 0.1)
writer.add_bool("a.yes", True)
writer.add_string("a.text", "tide: ½ « ⚓ »\n")
writer.add_array("b.texts", ["", "a", "⚓"])
writer.add_array("b.numbers", [1, -1, 3])
writer.add_array("b.floats", [0.5, -1.5])
writer.add_array("b.flags", [True, False])
for name, shape, qtype in [
    ("token_embd.weight", (3, 64), GGMLQuantizationType.Q8_0),
    ("blk.0.attn_q.weight", (5, 32), GGMLQuantizationType.Q5_1),
    ("blk.0.attn_norm.weight", (7,), GGMLQuantizationType.F32),
    ("blk.0.four", (2, 3, 1, 5), GGMLQuantizationType.F16),
    ("blk.0.ffn_up.weight", (2, 96), GGMLQuantizationType.Q4_1),
]:
    values = rng.normal(0, 1, shape).astype(np.float32)
    data = quantize(values, qtype)
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, data, raw_dtype=qtype)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
assert len(GGUFReader(sys.argv[1]).tensors) == 5
