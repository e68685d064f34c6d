"""Paged attention in plain torch: gather the context, then `scaled_dot_product_attention`. Data plane; request path.

The reference that faster kernels are held against, and the fallback where none runs. Rows of one token
(decodes, mostly) go together, padded to a common length; prompt chunks go one by one. Everything that
depends on the plan and not on the layer (indices, masks, groups) is made once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from real_engine.attention.backend import IntArray, PackedBatch
from real_engine.device import upload
from real_engine.kv_memory import KvMemory
from real_engine.models.rope import RopeTable, rotate

_SPLIT_GAIN = 256
"""Padded tokens that a further group of single-token rows must save to be worth its own kernel calls."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Single-token rows computed together."""

    rows: Tensor | None
    """int64 `[n]`: which packed rows; None when they are all of the batch, in order."""
    blocks: Tensor
    """int64 `[n * blocks each]`: cache blocks to gather."""
    mask: Tensor | None
    """`[n, 1, 1, length]`, 0 or -inf; None when no row is padded."""
    count: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence's chunk of several tokens: packed rows `first .. last`."""

    first: int
    last: int
    blocks: Tensor
    mask: Tensor | None
    """`[tokens, context]`, 0 or -inf; None when the chunk starts at 0, so that plain causality does."""
    context: int


class TorchAttention:
    """Implements `AttentionBackend` on any device, any block size."""

    name = "torch-gather-sdpa"
    block_size_multiple = 1

    def prepare(self, batch: PackedBatch, memory: KvMemory) -> TorchPrepared:
        return TorchPrepared(batch, memory)


class TorchPrepared:
    """Implements `PreparedAttention`."""

    def __init__(self, batch: PackedBatch, memory: KvMemory) -> None:
        self._memory = memory
        device = memory.device
        self._slots, self._positions = upload(device, batch.slot_mapping, batch.positions)
        self._rotation: tuple[Tensor, Tensor] | None = None
        size, dtype = memory.shape.block_size, memory.shape.dtype
        first, counts = batch.cu_seqlens_q[:-1], np.diff(batch.cu_seqlens_q)
        single = np.flatnonzero(counts == 1)
        # Longest first, so that groups are runs of similar length.
        single = single[np.argsort(-batch.seqlens_k[single], kind="stable")]
        self._rows = [
            _make_rows(group, batch, size, dtype, device)
            for group in _groups(single, batch.seqlens_k[single])
        ]
        self._chunks = [
            _make_chunk(int(i), int(first[i]), int(counts[i]), batch, size, dtype, device)
            for i in np.flatnonzero(counts != 1)
        ]

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        kv_heads, head_dim = keys.shape[2:]
        tokens, heads = len(qkv), qkv.shape[1] - 2 * kv_heads
        if self._rotation is None:
            self._rotation = rope.at(self._positions)  # the same for every layer
        qk = rotate(qkv[:, : heads + kv_heads], *self._rotation)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]
        keys.view(-1, kv_heads, head_dim).index_copy_(0, self._slots, k)
        values.view(-1, kv_heads, head_dim).index_copy_(0, self._slots, v)
        keys, values = keys.view(self._memory.blocks, -1), values.view(self._memory.blocks, -1)
        # The query heads of one KV head act as so many queries of one head: no key or value is repeated.
        grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
        out = torch.empty_like(grouped)
        for group in self._rows:
            n = group.count
            context_k = keys.index_select(0, group.blocks).view(n, -1, kv_heads, head_dim).transpose(1, 2)
            context_v = values.index_select(0, group.blocks).view(n, -1, kv_heads, head_dim).transpose(1, 2)
            if group.rows is None:
                return F.scaled_dot_product_attention(grouped, context_k, context_v, group.mask).reshape(
                    tokens, -1
                )
            attended = F.scaled_dot_product_attention(grouped[group.rows], context_k, context_v, group.mask)
            out[group.rows] = attended
        heads_first = q.transpose(0, 1).unsqueeze(0)  # [1, heads, T, head_dim]
        for chunk in self._chunks:
            if chunk.mask is None:
                # The whole context is in this chunk: no need to read it back.
                own = slice(chunk.first, chunk.last)
                context_k, context_v = k[own], v[own]
            else:
                context_k = keys.index_select(0, chunk.blocks).view(-1, kv_heads, head_dim)[: chunk.context]
                context_v = values.index_select(0, chunk.blocks).view(-1, kv_heads, head_dim)[: chunk.context]
            attended = F.scaled_dot_product_attention(
                heads_first[:, :, chunk.first : chunk.last],
                context_k.transpose(0, 1).unsqueeze(0),
                context_v.transpose(0, 1).unsqueeze(0),
                chunk.mask,
                is_causal=chunk.mask is None,
                enable_gqa=True,
            )
            out[chunk.first : chunk.last] = attended[0].transpose(0, 1).view(-1, *grouped.shape[1:])
        return out.view(tokens, -1)


def _groups(single: IntArray, lengths: IntArray) -> list[IntArray]:
    """Split rows sorted by falling length where it saves at least `_SPLIT_GAIN` tokens of padding each time."""
    if not len(single):
        return []
    # A cut before row m spares the rows from m on the difference between the first length and theirs.
    saved = (lengths[0] - lengths) * np.arange(len(single), 0, -1)
    cut = int(np.argmax(saved))
    if saved[cut] < _SPLIT_GAIN:
        return [single]
    return _groups(single[:cut], lengths[:cut]) + _groups(single[cut:], lengths[cut:])


def _make_rows(
    group: IntArray, batch: PackedBatch, size: int, dtype: torch.dtype, device: torch.device
) -> _Rows:
    lengths = batch.seqlens_k[group]
    rows = batch.cu_seqlens_q[group].astype(np.int64)
    everything = len(group) == len(batch.token_ids)
    if everything:
        # All rows in one group: packed order needs neither gathering the queries nor scattering the result.
        order = np.argsort(rows)
        group, lengths = group[order], lengths[order]
    longest = int(lengths.max())
    each = -(-longest // size)
    mask: Tensor | None = None
    if int(lengths.min()) < each * size:
        (hidden,) = upload(device, np.arange(each * size) >= lengths[:, None])
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None, :]
    blocks, places = upload(device, batch.block_table[group, :each].astype(np.int64).ravel(), rows)
    return _Rows(None if everything else places, blocks, mask, len(group))


def _make_chunk(
    i: int,
    first: int,
    tokens: int,
    batch: PackedBatch,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Chunk:
    context = int(batch.seqlens_k[i])
    (blocks,) = upload(device, batch.block_table[i, : -(-context // size)].astype(np.int64))
    mask: Tensor | None = None
    if tokens < context:
        # Row r stands at position context - tokens + r and sees everything up to itself.
        mask = torch.full((tokens, context), float("-inf"), dtype=dtype, device=device).triu_(
            context - tokens + 1
        )
    return _Chunk(first, first + tokens, blocks, mask, context)
