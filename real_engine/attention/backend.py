"""The seam where attention kernels plug in. Data plane; request path.

A step has one `PackedBatch`: the tokens of all its requests one after another, prompt chunks and single
decode tokens alike. A backend looks at it once (`prepare`) and is then called once per layer. The metadata is
what flash-attn's varlen functions take, so a GPU backend needs no translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from real_engine.kv_memory import KvMemory
from real_engine.models.config import PLAIN, AttentionRule
from real_engine.models.rope import RopeTable

IntArray = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's tokens, on the host. `S` sequences (in plan order), `T` tokens in all."""

    token_ids: IntArray
    """int64 `[T]`."""
    positions: IntArray
    """int64 `[T]`: place of each token in its sequence."""
    cu_seqlens_q: IntArray
    """int32 `[S + 1]`: sequence i's new tokens are rows `cu_seqlens_q[i] .. cu_seqlens_q[i + 1]`."""
    seqlens_k: IntArray
    """int32 `[S]`: tokens sequence i attends to, the new ones included. Its last row is at `seqlens_k[i] - 1`."""
    block_table: IntArray
    """int32 `[S, most blocks]`: cache blocks of each sequence, in order, padded with block 0."""
    slot_mapping: IntArray
    """int64 `[T]`: where each token's key and value go, as block * block_size + offset."""
    sample_rows: IntArray
    """int64: rows whose logits are wanted, in plan order."""

    @classmethod
    def by_hand(
        cls, chunks: Sequence[tuple[Sequence[int], int, Sequence[int]]], block_size: int
    ) -> PackedBatch:
        """A batch for checks: of each sequence its next token ids, how many came before them, and its blocks. All
        rows are sampled."""
        ids, starts, blocks = zip(*chunks, strict=True)
        counts = np.array([len(part) for part in ids])
        table = np.zeros((len(chunks), max(map(len, blocks))), np.int32)
        for row, found in enumerate(blocks):
            table[row, : len(found)] = found
        owner = np.repeat(np.arange(len(chunks)), counts)
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        return cls(
            token_ids=np.concatenate([np.asarray(part, np.int64) for part in ids]),
            positions=positions,
            cu_seqlens_q=np.cumsum([0, *counts]).astype(np.int32),
            seqlens_k=(np.array(starts) + counts).astype(np.int32),
            block_table=table,
            slot_mapping=table[owner, positions // block_size].astype(np.int64) * block_size
            + positions % block_size,
            sample_rows=np.arange(len(positions)),
        )


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What a step of one token a sequence says of itself, as tensors on the device. `B` sequences."""

    positions: Tensor
    """int64 `[B]`."""
    slots: Tensor
    """int64 `[B]`: as `PackedBatch.slot_mapping`; -1 for a row that only pads: its key and value go nowhere."""
    lengths: Tensor
    """int32 `[B]`: as `PackedBatch.seqlens_k`; 0 for a row that only pads: it attends to nothing."""
    table: Tensor
    """int32 `[B, most blocks]`."""


class PreparedAttention(Protocol):
    """Attention of one step."""

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable | None, rule: AttentionRule = PLAIN) -> Tensor:
        """Rotate queries and keys (not without `rope`), store keys and values at their slots, then attend.

        `qkv` `[T, heads + 2 * kv_heads, head_dim]` is the projection's own result and may be overwritten.
        All of the layer's keys and values are stored before any is read: a sequence may have a block in its
        table that another sequence of the same step fills. Gives `[T, heads * head_dim]`.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute causal attention over the paged cache."""

    name: str
    """As run manifests write it down; results differ in speed by several times between backends."""
    block_size_multiple: int
    """Block sizes must be a multiple of this (1 for any; flash-attn 2 needs 256)."""
    abilities: frozenset[str]
    """Which parts of an `AttentionRule` beyond its scale it computes: `window`, `softcap`."""

    def prepare(self, batch: PackedBatch, memory: KvMemory) -> PreparedAttention:
        """Do everything that is the same for all layers."""
        ...


@runtime_checkable
class GraphableAttention(AttentionBackend, Protocol):
    """One whose decode steps can be recorded and done again with other numbers in the same tensors."""

    def prepare_static(self, rows: DecodeRows, memory: KvMemory) -> PreparedAttention:
        """A step of decodes that reads `rows` whenever it is done, never on the host."""
        ...
