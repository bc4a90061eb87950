from __future__ import annotations
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e5m2")
