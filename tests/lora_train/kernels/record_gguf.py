"""Records what the `gguf` package (0.19.0, MIT) makes of random blocks of every format: `python record_gguf.py > gguf_blocks.json`.

The package is needed here only; the test reads the file.
"""

from __future__ import annotations

import base64
import json

import gguf
import numpy as np

# Bytes at which a block's fp16 scales stand: random bytes would be NaN there.
SCALES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip


def main() -> None:
    draws, found = np.random.default_rng(20), {}
    for kind, places in SCALES.items():
        form = gguf.GGMLQuantizationType[kind.upper()]
        raw = draws.integers(0, 256, (2, gguf.GGML_QUANT_SIZES[form][1]), dtype=np.uint8)
        for place in places:
            raw[:, place : place + 2] = draws.standard_normal((2, 1)).astype(np.float16).view(np.uint8)
        numbers = gguf.quants.dequantize(raw, form).astype(np.float32)
        found[kind] = {"raw": base64.b64encode(raw.tobytes()).decode(), "numbers": base64.b64encode(numbers.tobytes()).decode()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
