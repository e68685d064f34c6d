"""Paged attention in plain torch: gather the context, then `scaled_dot_product_attention`. Data plane; request path.

The reference that faster kernels are held against, and the fallback where none runs. Rows of one token
(decodes, mostly) go together, padded to a common length; prompt chunks go one by one. Everything that
depends on the plan and not on the layer (indices, masks, groups) is made once a step, and once more for layers with
a sliding window that some sequence has outgrown: they read the whole context, and their masks hide what lies before
the window. (Blocks outside all windows stay allocated: other requests may share them.)
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
from real_engine.models.config import PLAIN, AttentionRule
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


_Layout = tuple[list[_Rows], list[_Chunk]]


class TorchAttention:
    """Implements `AttentionBackend` on any device, any block size."""

    name = "torch-gather-sdpa"
    block_size_multiple = 1
    abilities = frozenset(("window", "softcap"))

    def prepare(self, batch: PackedBatch, memory: KvMemory) -> TorchPrepared:
        return TorchPrepared(batch, memory)


class TorchPrepared:
    """Implements `PreparedAttention`."""

    def __init__(self, batch: PackedBatch, memory: KvMemory) -> None:
        self._memory, self._batch = memory, batch
        device = memory.device
        self._slots, self._positions = upload(device, batch.slot_mapping, batch.positions)
        self._rotations: dict[RopeTable, tuple[Tensor, Tensor]] = {}
        self._longest = int(batch.seqlens_k.max(initial=0))
        self._layouts: dict[int | None, _Layout] = {None: self._layout(None)}

    def _layout(self, window: int | None) -> _Layout:
        """Groups, indices and masks for layers with this window."""
        batch, device = self._batch, self._memory.device
        size, dtype = self._memory.shape.block_size, self._memory.shape.dtype
        first, counts = batch.cu_seqlens_q[:-1], np.diff(batch.cu_seqlens_q)
        single = np.flatnonzero(counts == 1)
        # Longest first, so that groups are runs of similar length.
        single = single[np.argsort(-batch.seqlens_k[single], kind="stable")]
        rows = [
            _make_rows(group, batch, size, dtype, device, window)
            for group in _groups(single, batch.seqlens_k[single])
        ]
        chunks = [
            _make_chunk(int(i), int(first[i]), int(counts[i]), batch, size, dtype, device, window)
            for i in np.flatnonzero(counts != 1)
        ]
        return rows, chunks

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable | None, rule: AttentionRule = PLAIN) -> Tensor:
        keys, values = self._memory.keys[layer], self._memory.values[layer]
        kv_heads, head_dim = keys.shape[2:]
        tokens, heads = len(qkv), qkv.shape[1] - 2 * kv_heads
        qk = qkv[:, : heads + kv_heads]
        if rope is not None:
            if rope not in self._rotations:
                self._rotations[rope] = rope.at(self._positions)  # the same for every layer that uses it
            qk = rotate(qk, *self._rotations[rope])
        window = rule.window if rule.window is not None and rule.window < self._longest else None
        if window not in self._layouts:
            self._layouts[window] = self._layout(window)
        rows, chunks = self._layouts[window]
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]
        keys.view(-1, kv_heads, head_dim).index_copy_(0, self._slots, k)
        values.view(-1, kv_heads, head_dim).index_copy_(0, self._slots, v)
        keys, values = keys.view(self._memory.blocks, -1), values.view(self._memory.blocks, -1)
        # The query heads of one KV head act as so many queries of one head: no key or value is repeated.
        grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
        out = torch.empty_like(grouped)
        for group in rows:
            n = group.count
            context_k = keys.index_select(0, group.blocks).view(n, -1, kv_heads, head_dim).transpose(1, 2)
            context_v = values.index_select(0, group.blocks).view(n, -1, kv_heads, head_dim).transpose(1, 2)
            if group.rows is None:
                return _attend(grouped, context_k, context_v, group.mask, rule).reshape(tokens, -1)
            out[group.rows] = _attend(grouped[group.rows], context_k, context_v, group.mask, rule)
        heads_first = q.transpose(0, 1).unsqueeze(0)  # [1, heads, T, head_dim]
        for chunk in chunks:
            if chunk.mask is None:
                # The whole context is in this chunk: no need to read it back.
                own = slice(chunk.first, chunk.last)
                context_k, context_v = k[own], v[own]
            else:
                context_k = keys.index_select(0, chunk.blocks).view(-1, kv_heads, head_dim)[: chunk.context]
                context_v = values.index_select(0, chunk.blocks).view(-1, kv_heads, head_dim)[: chunk.context]
            attended = _attend(
                heads_first[:, :, chunk.first : chunk.last],
                context_k.transpose(0, 1).unsqueeze(0),
                context_v.transpose(0, 1).unsqueeze(0),
                chunk.mask,
                rule,
                causal=chunk.mask is None,
            )
            out[chunk.first : chunk.last] = attended[0].transpose(0, 1).view(-1, *grouped.shape[1:])
        return out.view(tokens, -1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: AttentionRule, *, causal: bool = False
) -> Tensor:
    """`q` `[n, heads, queries, dim]`, `k` and `v` `[n, kv_heads, context, dim]`; gives what `q` is like."""
    if rule.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)).float() * (rule.scale or q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if causal:
        mask = scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


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
    group: IntArray,
    batch: PackedBatch,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None,
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
    if int(lengths.min()) < each * size or (window is not None and window < longest):
        place, ends = np.arange(each * size), lengths[:, None]
        outside = place >= ends
        if window is not None:
            outside |= place < ends - window
        (hidden,) = upload(device, outside)
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
    window: int | None,
) -> _Chunk:
    context = int(batch.seqlens_k[i])
    (blocks,) = upload(device, batch.block_table[i, : -(-context // size)].astype(np.int64))
    mask: Tensor | None = None
    if tokens < context or (window is not None and window < context):
        # Row r stands at position context - tokens + r and sees everything up to itself, within the window.
        place = context - tokens
        mask = torch.full((tokens, context), float("-inf"), dtype=dtype, device=device).triu_(place + 1)
        if window is not None:
            mask += torch.full_like(mask, float("-inf")).tril_(place - window)
    return _Chunk(first, first + tokens, blocks, mask, context)
