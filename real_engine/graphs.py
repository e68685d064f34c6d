"""Decode steps as recorded graphs: a whole forward pass in one call. Data plane; request path.

A decode step of a small batch is hundreds of short kernels, and launching them takes longer than running them. A CUDA
graph is launched once. It does again exactly what was recorded, on the same memory: so there is one graph for each of
a few batch sizes, a batch is padded to the next of them, and its numbers are written into the tensors that the graph
reads. Rows that pad have no slot (nothing is stored) and no context (nothing is attended to).

The head stays outside: it runs on the rows that sample only, and its float32 logits for the largest batch would be the
largest buffer of all. Prompts, and batches beyond the largest size, run eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from real_engine.attention.backend import DecodeRows, GraphableAttention, PackedBatch
from real_engine.device import upload
from real_engine.kv_memory import KvMemory
from real_engine.models.decoder import Decoder

T = TypeVar("T")
Hidden = tuple[Tensor, Tensor | None]
"""What `Decoder.hidden` gives."""


class GraphDevice(Protocol):
    """Something that can record work and do it again."""

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record `run`; returns what it gave, and a function that does it again into the same tensors."""
        ...


class CudaGraphs:
    """CUDA's. All graphs share one pool of memory: only one runs at a time, and the largest, recorded first, sets
    its size."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        # Once outside, on a stream of its own: kernels are compiled and libraries take their workspaces.
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        if self._pool is None:
            self._pool = graph.pool()
        return out, graph.replay


@dataclass(frozen=True, slots=True)
class _Recorded:
    hidden: Hidden
    replay: Callable[[], None]


def sizes_up_to(most: int) -> list[int]:
    """Batch sizes to record, rising: 1, 2, 4, 8, every multiple of 16 below `most`, and `most` itself."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


class DecodeGraphs:
    """All graphs of one decoder on one cache, and the tensors that they read."""

    def __init__(
        self,
        decoder: Decoder,
        attention: GraphableAttention,
        memory: KvMemory,
        device: GraphDevice,
        *,
        most: int,
        max_context: int,
    ) -> None:
        """Records one graph for each of `sizes_up_to(most)`. The cache must be empty: its first slot is written to."""
        self.sizes = sizes_up_to(most)
        self._device = memory.device

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._token_ids = zeros(torch.int64, most)
        self._rows = DecodeRows(
            positions=zeros(torch.int64, most),
            slots=zeros(torch.int64, most).fill_(-1),
            lengths=zeros(torch.int32, most),
            table=zeros(torch.int32, most, -(-max_context // memory.shape.block_size)),
        )
        self._recorded: dict[int, _Recorded] = {}
        with torch.inference_mode():
            for size in reversed(self.sizes):  # the largest first: the others fit into its memory
                self._recorded[size] = self._record(decoder, attention, memory, device, size)

    def load(self, batch: PackedBatch) -> Callable[[], Hidden] | None:
        """Write a batch into the graphs' tensors; what is returned runs it. None for one that has to run eagerly.

        The hidden states may have rows beyond the batch's, and hold until the next one is run.
        """
        count = len(batch.seqlens_k)
        if count != len(batch.token_ids) or count > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, count)]
        used = batch.block_table.shape[1]
        rows = self._rows
        token_ids, positions, slots, lengths, table = upload(
            self._device,
            _padded(batch.token_ids, size, 0),
            _padded(batch.positions, size, 0),
            _padded(batch.slot_mapping, size, -1),
            _padded(batch.seqlens_k, size, 0),
            batch.block_table,
        )
        self._token_ids[:size].copy_(token_ids)
        rows.positions[:size].copy_(positions)
        rows.slots[:size].copy_(slots)
        rows.lengths[:size].copy_(lengths)
        rows.table[:count, :used].copy_(table)  # what is left of earlier batches lies beyond every length
        recorded = self._recorded[size]

        def run() -> Hidden:
            recorded.replay()
            return recorded.hidden

        return run

    def _record(
        self,
        decoder: Decoder,
        attention: GraphableAttention,
        memory: KvMemory,
        device: GraphDevice,
        size: int,
    ) -> _Recorded:
        rows, token_ids = self._rows, self._token_ids[:size]
        mine = DecodeRows(rows.positions[:size], rows.slots[:size], rows.lengths[:size], rows.table[:size])
        prepared = attention.prepare_static(mine, memory)
        return _Recorded(*device.capture(lambda: decoder.hidden(token_ids, prepared)))


def _padded(array: np.ndarray[Any, Any], size: int, filling: int) -> np.ndarray[Any, Any]:
    out = np.full(size, filling, array.dtype)
    out[: len(array)] = array
    return out
