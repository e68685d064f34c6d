"""Paged attention by our own kernel: no gather, no padding, no mask. Data plane; request path.

The kernel walks each sequence's blocks where they lie, all query heads of a KV head together, with an online
softmax (Milakov and Gimelshein 2018; FlashAttention). Decodes and prompt chunks go in one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from real_engine.attention import agreement
from real_engine.attention.backend import PackedBatch
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import PLAIN, AttentionRule
from real_engine.models.rope import RopeTable
from real_engine.native.library import LANES, SUFFIX, Kernels, pack


class NativeAttention:
    """Implements `AttentionBackend` for CPU tensors; `suits` says for which."""

    name = "native-paged"
    block_size_multiple = 1
    abilities = frozenset({"window"})

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @staticmethod
    def suits(shape: KvShape) -> bool:
        return shape.dtype in SUFFIX and shape.head_dim % LANES == 0

    def prepare(self, batch: PackedBatch, memory: KvMemory) -> NativePrepared:
        return NativePrepared(self._kernels, batch, memory)


class NativePrepared:
    """Implements `PreparedAttention`; what it holds is also read by `real_engine.native.stack`."""

    def __init__(self, kernels: Kernels, batch: PackedBatch, memory: KvMemory) -> None:
        self._kernels, self.memory = kernels, memory
        self.slots, self.positions = torch.from_numpy(batch.slot_mapping), torch.from_numpy(batch.positions)
        self.starts, self.lengths, self.table = (
            torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
            for array in (batch.cu_seqlens_q, batch.seqlens_k, batch.block_table)
        )

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable | None, rule: AttentionRule = PLAIN) -> Tensor:
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        kv_heads, dim = keys.shape[2:]
        if rope is None:
            for cache, heads in ((keys, slice(-2 * kv_heads, -kv_heads)), (values, slice(-kv_heads, None))):
                cache.view(-1, kv_heads, dim).index_copy_(0, self.slots, qkv[:, heads])
        else:
            self._kernels.rotate_and_store(qkv, rope.cos, rope.sin, self.positions, self.slots, keys, values)
        q, scale = qkv[:, : qkv.shape[1] - 2 * kv_heads], rule.scale or 1 / math.sqrt(dim)
        return self._kernels.attend(
            q, keys, values, self.starts, self.lengths, self.table, scale, rule.window or 0
        )


def agrees(kernels: Kernels, shape: KvShape, heads: int, rules: Iterable[AttentionRule] = (PLAIN,)) -> bool:
    """Whether the kernels and plain torch multiply, and attend by these rules, alike: asked at start."""
    if kernels.has_products:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn((n, 96), generator=generator).bfloat16() for n in (30, 64))
        packed = pack(weight)
        assert packed is not None
        product = kernels.product(x, packed, None, torch.float32)
        if not torch.allclose(product, x.float() @ weight.float().T, atol=1e-3):
            return False
    return agreement.agrees(NativeAttention(kernels), shape, heads, torch.device("cpu"), rules)
