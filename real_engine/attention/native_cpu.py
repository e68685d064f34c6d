"""Paged attention by our own kernel: no gather, no padding, no mask. Data plane; request path.

The kernel walks each sequence's blocks where they lie, all query heads of a KV head together, with an online
softmax (Milakov and Gimelshein 2018; FlashAttention). Decodes and prompt chunks go in one call.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from real_engine.attention.backend import PackedBatch
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import PLAIN, AttentionRule, Rope
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


def agrees(kernels: Kernels, shape: KvShape, heads: int) -> bool:
    """Whether the kernels and plain torch attend, and multiply, alike, on a small batch of decodes and chunks: asked at
    start, since a kernel that is wrong on some processor would spoil results in silence."""
    generator = torch.Generator().manual_seed(0)
    size, lengths, chunks = (
        shape.block_size,
        [3 * shape.block_size + 1, 5, 2 * shape.block_size, 1],
        [1, 5, 7, 1],
    )
    chunks = [min(chunk, length) for chunk, length in zip(chunks, lengths, strict=True)]
    each = [-(-length // size) for length in lengths]
    small = KvShape(1, shape.kv_heads, shape.head_dim, size, shape.dtype)
    memories = [KvMemory(small, sum(each)) for _ in range(2)]
    for tensors in zip(*((m.keys[0], m.values[0]) for m in memories), strict=True):
        filling = torch.randn(tensors[0].shape, generator=generator)
        for tensor in tensors:
            tensor.copy_(filling)
    table = np.zeros((len(lengths), max(each)), np.int32)
    order = iter(np.random.default_rng(0).permutation(sum(each)))
    for row, count in enumerate(each):
        table[row, :count] = [next(order) for _ in range(count)]
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, chunks, strict=True)])
    owner = np.repeat(np.arange(len(lengths)), chunks)
    batch = PackedBatch(
        token_ids=np.zeros(sum(chunks), np.int64),
        positions=positions,
        cu_seqlens_q=np.cumsum([0, *chunks]).astype(np.int32),
        seqlens_k=np.array(lengths, np.int32),
        block_table=table,
        slot_mapping=table[owner, positions // size].astype(np.int64) * size + positions % size,
        sample_rows=np.zeros(0, np.int64),
    )

    qkv = torch.randn((sum(chunks), heads + 2 * shape.kv_heads, shape.head_dim), generator=generator)
    qkv, rope = qkv.to(shape.dtype), RopeTable(Rope(), shape.head_dim, max(lengths), shape.dtype)
    theirs = TorchAttention().prepare(batch, memories[1]).forward(0, qkv.clone(), rope).float()
    ours = NativeAttention(kernels).prepare(batch, memories[0]).forward(0, qkv, rope).float()
    if kernels.has_products:
        x, weight = (torch.randn((n, 96), generator=generator).bfloat16() for n in (30, 64))
        packed = pack(weight)
        assert packed is not None
        product = kernels.product(x, packed, None, torch.float32)
        if not torch.allclose(product, x.float() @ weight.float().T, atol=1e-3):
            return False
    return bool(torch.allclose(ours, theirs, atol=2e-5 if shape.dtype == torch.float32 else 2e-2))
