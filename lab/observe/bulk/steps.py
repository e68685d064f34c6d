"""Steps by column: the table of steps and their spans, thousands of steps at once. Observation path.

From rows, as the control plane tells them to whoever keeps no plans (`lab.control.observer.StepRow`), or from records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

import numpy as np

from lab.control.observer import STEP_NUMBERS, StepRecord, StepRow, StepTotals, row_of
from lab.control.plan import TERMS, RankTiming, StepPlan
from lab.observe.boundaries import BOUNDARIES, Boundary
from lab.observe.bulk.spans import CODES, Piece, Plain, attributes, laid_out, quoted
from lab.observe.columns import STEPS
from lab.observe.identity import replica_trace, span_ids
from lab.observe.parquet import empty_lists


class StepBatch:
    """Steps by column; at least one."""

    def __init__(self, rows: Sequence[StepRow]) -> None:
        import pyarrow as pa

        packed, digests, self._policies, self._terms, plans, ranks = zip(*rows, strict=True)
        self.count = len(rows)
        numbers = np.frombuffer(b"".join(packed), np.int64).reshape(self.count, -1)
        self.numbers: dict[str, Any] = dict(zip(STEP_NUMBERS, np.ascontiguousarray(numbers.T), strict=True))
        self._modelled = any(self._terms)
        self._digests = pa.array(digests, pa.string())
        told = {n: plan for n, plan in enumerate(plans) if plan is not None}
        self._admitting = {n: plan for n, plan in told.items() if plan.admitted}
        self._plans: dict[int, StepPlan] = {
            n: plan
            for n, plan in told.items()
            if plan.preempted
            or plan.rejected
            or plan.swap_out
            or plan.swap_in
            or plan.copies
            or plan.compactions
        }
        """Those that decided more than work and admission: few."""
        self._ranks: dict[int, tuple[RankTiming, ...]] = (
            {n: each for n, each in enumerate(ranks) if each} if any(ranks) else {}
        )
        own = self.numbers
        times = ("transfer_ns", "prepare_ns", "forward_ns", "sample_ns", "compact_ns")
        own["execute_ns"] = sum(own[name] for name in times)
        own["total_ns"] = own["plan_ns"] + own["execute_ns"] + own["commit_ns"]
        for name, number in _COUNTS.items():
            own[name] = self._column({n: number(plan) for n, plan in self._plans.items()})

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> StepBatch:
        """The same from records."""
        return cls([row_of(step) for step in steps])

    def columns(self) -> list[Any]:
        """The columns of the table of steps, in the order of `lab.observe.columns.STEPS`."""
        own = self.numbers
        said = own | {
            "step": own["index"],
            "start_ns": own["now"],
            "end_ns": own["now"] + own["total_ns"],
            "policy": self._policies,
            "digest": self._digests,
            "ranks": self._rank_lists(),
            **{f"{term}_term_ns": self._term(place) for place, term in enumerate(TERMS)},
        }
        return [said[name] for name, _, _ in STEPS]

    def add_to(self, totals: Callable[[int], StepTotals]) -> None:
        """Add them to the sums of their replicas."""
        own = self.numbers
        for replica in np.unique(own["replica"]).tolist():
            at = np.flatnonzero(own["replica"] == replica)
            first, last = int(at[0]), int(at[-1])
            total = totals(replica)
            held, took = own["blocks_held"][at], own["total_ns"][at]
            if not total.steps:
                total.start = int(own["now"][first])
                total.blocks = int(sum(own[f"blocks_{kind}"][first] for kind in ("free", "cached", "held")))
            total.steps += len(at)
            total.end = int(own["now"][last] + own["total_ns"][last])
            total.time_ns += int(took.sum())
            # In two halves: the sum of the whole products could be more than 64 bits hold.
            total.held_ns += (int((held * (took >> 20)).sum()) << 20) + int((held * (took & _LOW)).sum())
            total.peak_held = max(total.peak_held, int(held.max()))
            total.digest = self._digests[last].as_py()
            total.evicted += int(own["evicted"][at].sum())
            total.preempted += int(own["preempted"][at].sum())
            total.moved += int(own["moved_blocks"][at].sum())

    # -- inside ----------------------------------------------------------------------------------------

    def _column(self, some: Mapping[int, int]) -> Any:
        """A column of zeros but for `some` steps."""
        column = np.zeros(self.count, np.int64)
        if some:
            column[list(some)] = list(some.values())
        return column

    def _term(self, place: int) -> Any:
        """One term of the modelled steps; None if no step has any."""
        import pyarrow as pa

        if not self._modelled:
            return pa.nulls(self.count, pa.int64())
        column = pa.array([terms[place] if terms else None for terms in self._terms], pa.int64())
        return column if column.null_count else column.to_numpy()

    def _rank_lists(self) -> Any:
        if not self._ranks:
            return empty_lists("ranks", self.count)
        return [[dataclasses.asdict(part) for part in self._ranks.get(n, ())] for n in range(self.count)]

    def _named(self, plans: Mapping[int, StepPlan], ids: Callable[[StepPlan], Sequence[str]]) -> Any:
        """Lists of requests as JSON."""
        import pyarrow as pa

        if not plans:
            return "[]"
        said = ["[]"] * self.count
        for n, plan in plans.items():
            said[n] = _list(ids(plan))
        return pa.array(said, pa.string())

    def spans(self, workload: str) -> list[Any]:
        """The columns of their spans, as `lab.observe.spans.step_spans` gives them one by one."""
        import pyarrow as pa

        own, pieces = self.numbers, list[Piece]()
        replicas, trace_of = np.unique(own["replica"], return_inverse=True)
        traces = [replica_trace(workload, replica) for replica in replicas.tolist()]
        halves = np.array([int(trace[:16], 16) for trace in traces], np.uint64)[trace_of]
        index = own["index"]

        def put(
            boundary: Boundary,
            parents: Any,
            starts: Any,
            ends: Any,
            *values: Any,
            at: Any = None,
            ordinals: Any = index,
        ) -> Any:
            """A span of each step, or of the steps `at`; returns ids by step."""
            if at is not None:
                if not len(at):
                    return None
                starts, ends, parents, ordinals = starts[at], ends[at], parents[at], ordinals[at]
                values = tuple(value[at] if isinstance(value, np.ndarray) else value for value in values)
            ids = span_ids(halves if at is None else halves[at], boundary.name, ordinals)
            said = attributes(boundary, len(ids), *values)
            pieces.append(Piece(CODES[boundary.name], at, ids, parents, starts, ends, said))
            if at is None:
                return ids
            every = np.zeros(self.count, np.uint64)
            every[at] = ids
            return every

        start, planned = own["now"], own["now"] + own["plan_ns"]
        executed, end = planned + own["execute_ns"], own["now"] + own["total_ns"]
        about = (index, own["replica"], quoted(self._policies), Plain(self._digests))
        root = put(_STEP, None, start, end, *about)
        admitted = self._named(self._admitting, lambda plan: plan.admitted)
        preempted = self._named(self._plans, lambda plan: [request for request, _ in plan.preempted])
        rejected = self._named(self._plans, lambda plan: [request for request, _ in plan.rejected])
        state = [own[name] for name in ("running", "waiting", "blocks_free", "blocks_cached", "blocks_held")]
        plan = put(_PLAN, root, start, planned, admitted, preempted, rejected, *state)
        for boundary, name, ordinals in (
            (_ALLOCATE, "allocated", index),
            (_EVICT, "evicted", index),
            (_RELEASE, "released_plan", 2 * index),
        ):
            at = np.flatnonzero(own[name])
            put(boundary, plan, planned, planned, own[name], at=at, ordinals=ordinals)

        tokens = own["prefill_tokens"] + own["decode_tokens"]
        batch = [own[name] for name in ("batch", "prefill_tokens", "decode_tokens", "context_tokens")]
        terms = [self._term(place) if self._modelled else None for place in range(len(TERMS))]
        execute = put(_EXECUTE, root, planned, executed, *batch, *terms)
        ready = planned + own["transfer_ns"]
        prepared = ready + own["prepare_ns"]
        forwarded = prepared + own["forward_ns"]
        sampled = forwarded + own["sample_ns"]
        moves = {n: (p.swap_out, p.swap_in, p.copies) for n, p in self._plans.items()}
        moves = {n: kinds for n, kinds in moves.items() if any(kinds)}
        moved = [
            self._column({n: sum(len(move.pairs) for move in kinds[kind]) for n, kinds in moves.items()})
            for kind in range(3)
        ]
        at = np.array(list(moves), np.int64)
        put(_TRANSFER, execute, planned, ready, *moved, *[None] * 7, at=at)
        put(_PREPARE, execute, ready, prepared)
        put(_FORWARD, execute, prepared, forwarded, tokens)
        put(_SAMPLE, execute, forwarded, sampled, own["samples"])
        at = np.flatnonzero(own["compactions"])
        lost = (own["compactions"], own["compacted_blocks"], own["dropped_tokens"])
        put(_COMPACT, execute, sampled, executed, *lost, at=at)
        for place in range(max(map(len, self._ranks.values()), default=0)):
            parts = {n: each[place] for n, each in self._ranks.items() if len(each) > place}
            at = np.array(list(parts), np.int64)

            def part(name: str, parts: Mapping[int, RankTiming] = parts) -> Any:
                return self._column({n: getattr(each, name) for n, each in parts.items()})

            ordinals, cut, cuts = index + (part("rank") << 40), planned, [planned]
            for phase in ("transfer_ns", "prepare_ns", "forward_ns", "sample_ns", "compact_ns"):
                cut = np.minimum(cut + part(phase), executed)
                cuts.append(cut)
            about = tuple(part(name) for name in _ABOUT_RANK)
            rank = put(_RANK, execute, planned, cut, *about, at=at, ordinals=ordinals)
            at = np.array([n for n, each in parts.items() if each.rank], np.int64)
            put(_PREPARE, rank, cuts[1], cuts[2], at=at, ordinals=ordinals)
            put(_FORWARD, rank, cuts[2], cuts[3], tokens, at=at, ordinals=ordinals)
            put(_SAMPLE, rank, cuts[3], cuts[4], own["samples"], at=at, ordinals=ordinals)
        commit = put(_COMMIT, root, executed, end)
        at = np.flatnonzero(own["released_commit"])
        put(_RELEASE, commit, end, end, own["released_commit"], at=at, ordinals=2 * index + 1)
        return laid_out(self.count, pieces, pa.array(traces), trace_of.astype(np.int32))


def _list(words: Sequence[str]) -> str:
    return f"[{','.join(map(encode_basestring, words))}]"


_COUNTS: dict[str, Callable[[StepPlan], int]] = {
    "preempted": lambda plan: len(plan.preempted),
    "rejected": lambda plan: len(plan.rejected),
    "moved_blocks": lambda plan: plan.moved_blocks,
    "dropped_tokens": lambda plan: plan.dropped_tokens,
    "copied_blocks": lambda plan: plan.copied_blocks,
    "compactions": lambda plan: len(plan.compactions),
    "compacted_blocks": lambda plan: sum(len(item.blocks) for item in plan.compactions),
}
"""What only the plans of some steps have."""

_LOW = (1 << 20) - 1
_STEP, _PLAN, _EXECUTE, _COMMIT = (BOUNDARIES[f"step{part}"] for part in ("", ".plan", ".execute", ".commit"))
_PREPARE, _FORWARD, _SAMPLE = (BOUNDARIES[f"step.{part}"] for part in ("prepare", "forward", "sample"))
_ALLOCATE, _EVICT, _RELEASE = (BOUNDARIES[f"kv.{part}"] for part in ("allocate", "evict", "release"))
_TRANSFER, _COMPACT, _RANK = (BOUNDARIES[name] for name in ("kv.transfer", "kv.compact", "step.rank"))
_ABOUT_RANK = ("rank", "tensor", "pipeline", "communication_ns", "down_ns", "up_ns")
