"""Rotating queries and keys and writing keys and values to the cache, as one Triton kernel. Data plane; request path.

One program a token: it reads the token's row once, turns queries and keys, and writes keys and values to the slot. The
half-split rotation needs the other half of each head, which is loaded too, rather than rotated in place: other
threads of the program may have written there already.

Triton wants sizes that are powers of two: heads and head size are padded to one and masked (SmolLM2's 3 KV heads of 64
make a tile of 4 x 64). With TRITON_INTERPRET=1 in the environment before this is imported, it runs on the CPU.
"""

# mypy: ignore-errors
# Triton's language is Python only in spelling.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from real_engine.attention import store
from real_engine.models.rope import RopeTable


@triton.jit
def _rotate_and_store(
    qkv,
    queries,
    keys,
    values,
    cosines,
    sines,
    positions,
    slots,
    qkv_stride,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    heads_padded: tl.constexpr,
    kv_heads_padded: tl.constexpr,
    dim_padded: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    place = tl.load(positions + token)
    column = tl.arange(0, dim_padded)
    inside = column < dim
    other = (column + dim // 2) % dim  # where the other half of a pair lies
    cosine = tl.load(cosines + place * dim + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + place * dim + column, mask=inside, other=0.0).to(tl.float32)
    row = qkv + token * qkv_stride

    head = tl.arange(0, heads_padded)[:, None]
    mask = (head < heads) & inside[None, :]
    x = tl.load(row + head * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(row + head * dim + other[None, :], mask=mask, other=0.0).to(tl.float32)
    turned = x * cosine[None, :] + y * sine[None, :]
    tl.store(queries + (token * heads + head) * dim + column[None, :], turned, mask=mask)

    # Names of their own: a branch may not give a name of before another shape.
    if slot >= 0:
        kv_head = tl.arange(0, kv_heads_padded)[:, None]
        kv_mask = (kv_head < kv_heads) & inside[None, :]
        to = (slot * kv_heads + kv_head) * dim + column[None, :]
        key = row + heads * dim + kv_head * dim
        kx = tl.load(key + column[None, :], mask=kv_mask, other=0.0).to(tl.float32)
        ky = tl.load(key + other[None, :], mask=kv_mask, other=0.0).to(tl.float32)
        tl.store(keys + to, kx * cosine[None, :] + ky * sine[None, :], mask=kv_mask)
        value = row + (heads + kv_heads) * dim + kv_head * dim + column[None, :]
        tl.store(values + to, tl.load(value, mask=kv_mask, other=0.0), mask=kv_mask)


def rotate_and_store(
    qkv: Tensor, rope: RopeTable | None, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """As `real_engine.attention.store.Store` says. Computes in float32 and rounds once."""
    if rope is None:
        return store.rotate_and_store(qkv, rope, positions, slots, keys, values)
    tokens = len(qkv)
    kv_heads, dim = keys.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    assert qkv.stride(1) == dim
    assert qkv.stride(2) == 1
    assert keys.is_contiguous()
    assert values.is_contiguous()
    queries = qkv.new_empty((tokens, heads, dim))
    _rotate_and_store[(tokens,)](
        qkv,
        queries,
        keys,
        values,
        rope.cos,
        rope.sin,
        positions,
        slots,
        qkv.stride(0),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        heads_padded=triton.next_power_of_2(heads),
        kv_heads_padded=triton.next_power_of_2(kv_heads),
        dim_padded=triton.next_power_of_2(dim),
    )
    return queries
