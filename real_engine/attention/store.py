"""Rotating a step's queries and keys and writing its keys and values to the cache, in plain torch. Data plane.

What `triton_store.py` does in one kernel, for where there is no Triton. Nothing is read on the host and every shape is
known before it runs, so that a CUDA graph can record it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from real_engine.models.rope import RopeTable, rotate


class Store(Protocol):
    """One way to do it."""

    def __call__(
        self,
        qkv: Tensor,
        rope: RopeTable | None,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """The rotated queries `[tokens, heads, head_dim]`; keys, rotated, and values go to one layer's cache. Without
        `rope` nothing is rotated.

        `qkv` `[tokens, heads + 2 * kv_heads, head_dim]`; int64 `positions` and `slots` `[tokens]`, a slot being
        block * block_size + offset, or -1: that token's key and value go nowhere. `keys` and `values`
        `[blocks, block_size, kv_heads, head_dim]`.
        """
        ...


def rotate_and_store(
    qkv: Tensor, rope: RopeTable | None, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """As `Store` says. The first token must have a slot, unless the cache holds nothing yet."""
    kv_heads, dim = keys.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    qk = qkv[:, : heads + kv_heads]
    if rope is not None:
        qk = rotate(qk, *rope.at(positions))
    # A token without a slot writes once more what the first token writes: dropping it would take a shape that
    # depends on the numbers, which a graph can't have, and a spare slot would take a block of the cache.
    nowhere = slots < 0
    places = torch.where(nowhere, slots[:1], slots).clamp_(min=0)
    for cache, new in ((keys, qk[:, heads:]), (values, qkv[:, heads + kv_heads :])):
        kept = torch.where(nowhere[:, None, None], new[:1], new)
        cache.view(-1, kv_heads, dim).index_copy_(0, places, kept)
    return qk[:, :heads]
