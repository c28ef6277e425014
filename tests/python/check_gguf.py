"""Reads GGUF files with the `gguf` package (ggml's own Python implementation), as a check of those that
throughline writes: lists metadata and tensors, and decodes every tensor.

    pip install gguf numpy
    python tests/python/check_gguf.py model.gguf [original.gguf]

With a second file, says which keys and tensors differ from it, in anything but their place in the file.
Exits with 1 if an element is not finite, or if anything differs.
"""

import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


def contents(path):
    """Values by key, and types, shapes and bytes by tensor."""
    reader = GGUFReader(path)
    fields = {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    tensors = {t.name: (t.tensor_type, t.shape.tolist(), t.data) for t in reader.tensors}
    return fields, tensors


def main(path, original=None):
    fields, tensors = contents(path)
    for key, (types, value) in fields.items():
        shown = repr(value)
        print(f"{key}: {'/'.join(t.name for t in types)} {shown[:80]}{'…' if len(shown) > 80 else ''}")
    wrong = []
    for name, (qtype, shape, data) in tensors.items():
        values = dequantize(data, qtype)
        if not np.isfinite(values).all():
            wrong.append(f"{name} is not finite")
        mean_square = np.mean(np.square(values, dtype=np.float64))
        print(f"{name}: {qtype.name} {shape}, root mean square {np.sqrt(mean_square):.4g}")
    if original is not None:
        other_fields, other_tensors = contents(original)
        same = lambda a, b: a[:2] == b[:2] and np.array_equal(a[2], b[2])  # noqa: E731
        for key in fields.keys() | other_fields.keys():
            if fields.get(key) != other_fields.get(key):
                wrong.append(f"{key} differs")
        for name in tensors.keys() | other_tensors.keys():
            if name not in tensors or name not in other_tensors or not same(tensors[name], other_tensors[name]):
                wrong.append(f"{name} differs")
    print("\n".join(sorted(wrong)) or "all is well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
