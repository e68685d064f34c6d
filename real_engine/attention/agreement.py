"""Whether an attention backend computes what plain torch does, on a small batch: asked at start. Data plane.

A kernel that is wrong on some processor would spoil results in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from real_engine.attention.backend import AttentionBackend, PackedBatch
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import PLAIN, AttentionRule, Rope
from real_engine.models.rope import RopeTable


def agrees(
    attention: AttentionBackend,
    shape: KvShape,
    heads: int,
    device: torch.device,
    rules: Iterable[AttentionRule] = (PLAIN,),
) -> bool:
    """Layers of these rules, on decodes and prompt chunks together and on decodes alone, against `TorchAttention`.

    Windows are cut so that they matter in contexts as short as these.
    """
    size = shape.block_size
    rules = [
        rule if rule.window is None else replace(rule, window=min(rule.window, size + 3)) for rule in rules
    ]
    mixed = [(3 * size + 1, 1), (5, 5), (2 * size, 7), (1, 1)]
    decodes = [(3 * size + 1, 1), (2 * size, 1), (1, 1)]
    cases = [(batch, rule) for batch in (mixed, decodes) for rule in dict.fromkeys(rules)]
    return all(_same(attention, shape, heads, device, *case) for case in cases)


def _same(
    attention: AttentionBackend,
    shape: KvShape,
    heads: int,
    device: torch.device,
    sequences: list[tuple[int, int]],
    rule: AttentionRule,
) -> bool:
    """`sequences` are (context, new tokens) of each."""
    generator = torch.Generator().manual_seed(0)
    size = shape.block_size
    lengths, chunks = ([one[i] for one in sequences] for i in (0, 1))
    chunks = [min(chunk, length) for chunk, length in zip(chunks, lengths, strict=True)]
    each = [-(-length // size) for length in lengths]
    small = KvShape(1, shape.kv_heads, shape.head_dim, size, shape.dtype)
    memories = [KvMemory(small, sum(each), device) for _ in range(2)]
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
    qkv, rope = (
        qkv.to(device, shape.dtype),
        RopeTable(Rope(), shape.head_dim, max(lengths), shape.dtype, device),
    )
    outputs = [
        backend.prepare(batch, memory).forward(0, qkv.clone(), rope, rule).float()
        for backend, memory in zip((TorchAttention(), attention), memories, strict=True)
    ]
    atol = 2e-5 if shape.dtype == torch.float32 else 2e-2
    pairs = [outputs, [m.keys[0].float() for m in memories], [m.values[0].float() for m in memories]]
    return all(torch.allclose(ours, theirs, atol=atol, rtol=atol) for theirs, ours in pairs)
