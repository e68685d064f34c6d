"""The real engine: a data plane that computes tokens with torch. Data plane; request path.

Read `executor.py` first (a plan comes in, tokens go out), then `models/decoder.py` (the forward pass),
`attention/backend.py` (the seam where kernels plug in) and `kv_memory.py` (where keys and values live).
"""
