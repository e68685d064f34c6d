"""Runs the Triton kernel under its interpreter, on the CPU; `test_triton_store.py` starts it with TRITON_INTERPRET=1.

Against the rotation written out in float64, and slot by slot.
"""

from __future__ import annotations

import sys

import torch

from real_engine.attention.triton_store import rotate_and_store
from real_engine.models.config import Rope
from real_engine.models.rope import RopeTable

SHAPES = [(9, 3, 64), (4, 2, 16), (1, 1, 80), (14, 2, 64), (5, 5, 96), (8, 8, 20)]
"""(query heads, KV heads, head size): SmolLM2's 3 x 64 and others that aren't powers of two."""


def check(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, blocks, size = 7, 5, 16
    qkv = torch.randn((tokens, heads + 2 * kv_heads, dim), generator=generator).to(dtype)
    rope = RopeTable(Rope(), dim, 300, dtype)
    positions = torch.randint(0, 300, (tokens,), generator=generator)
    slots = torch.randperm(blocks * size, generator=generator)[:tokens]
    slots[[0, 4]] = -1  # the first one too
    keys, values = (
        torch.randn((blocks, size, kv_heads, dim), generator=generator).to(dtype) for _ in range(2)
    )
    wanted_keys, wanted_values = keys.clone().view(-1, kv_heads, dim), values.clone().view(-1, kv_heads, dim)
    before = qkv.clone()
    queries = rotate_and_store(qkv, rope, positions, slots, keys, values)
    assert torch.equal(qkv, before), "the projection was written to"
    half = dim // 2
    cosine, sine = (x.double() for x in (rope.cos, rope.sin))
    turned = torch.zeros((tokens, heads + kv_heads, dim), dtype=torch.float64)
    for token in range(tokens):
        for head in range(heads + kv_heads):
            x = qkv[token, head].double()
            other = torch.cat((x[half:], x[:half]))
            turned[token, head] = x * cosine[positions[token]] + other * sine[positions[token]]
        if slots[token] >= 0:
            wanted_keys[slots[token]] = turned[token, heads:].to(dtype)
            wanted_values[slots[token]] = qkv[token, heads + kv_heads :]
    exact = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.0, "rtol": 2**-7}
    torch.testing.assert_close(queries, turned[:, :heads].to(dtype), **exact)
    torch.testing.assert_close(keys.view(-1, kv_heads, dim), wanted_keys, **exact)
    assert torch.equal(values.view(-1, kv_heads, dim), wanted_values)


def main() -> None:
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            check(*shape, dtype, seed=count)
            count += 1
    print(f"{count} shapes agree")


if __name__ == "__main__":
    sys.exit(main())
