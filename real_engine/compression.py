"""KV compression: whose content goes, layer by layer, and where what stays moves to. Data plane; state path.

The control plane has said how many blocks a request gives up and which come free (`lab.control.plan.Compaction`).
Here the compression policy's `score` looks at the layers' keys. In each layer, blocks that are to stay but lie where
blocks come free are copied over blocks that go: as many as needed, never more than come free. Past tokens have no
order for attention, since their keys carry their positions; sinks, recent blocks and the last one keep their places.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lab import plugins
from lab.control.plan import Compaction, StepPlan
from lab.control.request import RequestId
from lab.errors import ExecutorError
from lab.policy import CompressionPolicy
from real_engine.attention.backend import IntArray, PackedBatch, PreparedAttention
from real_engine.kv_memory import KvMemory
from real_engine.models.config import PLAIN, AttentionRule, ModelShape
from real_engine.models.rope import RopeTable, rotate


class Queries:
    """Implements `PreparedAttention`: the one it stands before, with a look at some rows' queries on the way."""

    def __init__(
        self, inner: PreparedAttention, rows: dict[RequestId, int], positions: Tensor, kv_heads: int
    ) -> None:
        self._inner, self._kv_heads = inner, kv_heads
        self._order = {name: i for i, name in enumerate(rows)}
        self._rows = torch.tensor(list(rows.values()), device=positions.device)
        self._positions = positions
        self._seen: list[Tensor] = []

    def forward(self, layer: int, qkv: Tensor, rope: RopeTable | None, rule: AttentionRule = PLAIN) -> Tensor:
        queries = qkv[self._rows, : qkv.shape[1] - 2 * self._kv_heads]
        if rope is not None:
            queries = rotate(queries, *rope.at(self._positions))
        scale = qkv.shape[-1] ** -0.5 if rule.scale is None else rule.scale
        self._seen.append(queries.float() * scale)
        return self._inner.forward(layer, qkv, rope, rule)

    def of(self, name: RequestId) -> Tensor:
        """float32 `[layers, heads, head_dim]`: the last token's queries, at its position, scaled."""
        row = self._order[name]
        return torch.stack([queries[row] for queries in self._seen])


class Compressor:
    """Chooses and moves, in the cache of a model of this shape."""

    def __init__(self, memory: KvMemory, shape: ModelShape) -> None:
        self._memory = memory
        self._windows = any(rule.window is not None for rule in shape.attention)

    def asking(self, plan: StepPlan) -> frozenset[RequestId]:
        """Requests whose rule looks at queries. Raises `ExecutorError` for a model that can't be compressed."""
        if self._windows:
            raise ExecutorError(
                f"step {plan.index} gives up KV, and the model attends within a window of so many tokens, which "
                "can't be counted where some are gone; expected compression=none"
            )
        return frozenset(
            item.request for item in plan.compactions if item.rule and _policy(item.rule).needs_query
        )

    def watch(
        self,
        asking: Collection[RequestId],
        plan: StepPlan,
        batch: PackedBatch,
        attention: PreparedAttention,
    ) -> Queries:
        """What stands before `attention` in this step."""
        last = zip(plan.work, (batch.cu_seqlens_q[1:] - 1).tolist(), strict=True)
        rows = {work.request: row for work, row in last if work.request in asking}
        positions = torch.from_numpy(batch.positions[list(rows.values())]).to(self._memory.device)
        return Queries(attention, rows, positions, self._memory.shape.kv_heads)

    def choose(self, item: Compaction, table: IntArray, used: int, queries: Queries | None) -> None:
        """Bring what stays out of the blocks that come free. `table` holds `used` tokens.

        Raises `ExecutorError` when the rule's scores aren't one number a token and layer.
        """
        if not item.rule:
            return
        policy, memory, size = _policy(item.rule), self._memory, self._memory.shape.block_size
        count, full = len(item.blocks), used // size
        first, last = item.sinks, full - item.recent
        blocks = torch.from_numpy(table[: -(-used // size)]).to(memory.device, torch.int64)
        keys = torch.stack([layer[blocks].flatten(0, 1)[:used] for layer in memory.keys]).float()
        query = queries.of(item.request) if queries and policy.needs_query else None
        scores: Any = policy.score(keys, query)
        if not isinstance(scores, Tensor) or scores.shape != keys.shape[:2]:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ExecutorError(
                f"compression policy '{item.rule}' gave scores {found}; expected a tensor {tuple(keys.shape[:2])}"
            )
        worth = scores[:, first * size : last * size].reshape(len(scores), -1, size).mean(-1)
        goes = worth.argsort(dim=1, stable=True)[:, :count].tolist()
        middle = table[first:last].tolist()
        for layer, gone in enumerate(goes):
            holes = sorted(index for index in gone if index >= count)
            if holes:
                stays = sorted(set(range(count)).difference(gone))
                source, target = ([middle[i] for i in part] for part in (stays, holes))
                for tensor in (memory.keys[layer], memory.values[layer]):
                    tensor[target] = tensor[source]


@cache
def _policy(rule: str) -> type[CompressionPolicy]:
    """The class that a plan names. Raises `UnknownNameError`, `ConfigError`."""
    found: type[CompressionPolicy] = plugins.load("compression", rule)
    return found
