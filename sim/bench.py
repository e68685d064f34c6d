"""A bench for the data plane: batches of a wanted shape, made by hand and timed. Data plane."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from lab.control.executor import Executor
from lab.control.plan import GENESIS, Move, StepPlan, StepTiming, Work
from lab.control.request import Prompt, Request, Segment, stream_of
from sim.cost.model import Batch

Sample: TypeAlias = tuple[Batch, StepTiming]
TOGETHER = 4
"""Blocks of a request that lie side by side in a new pool, about: a prompt's do, those of its answer don't."""
IN_A_ROW = 3
"""Steps of a shape of decodes; the first meets caches full of something else, and isn't counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch to measure: decodes of about one context, and prompt chunks of (start, tokens) each."""

    decodes: int = 0
    context: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    side_by_side: bool = False
    """Blocks as a new pool hands them out: `TOGETHER` in a row, and elsewhere the next."""
    shared: int = 0
    """Of the decodes' contexts, leading tokens that they have in common, in blocks that all of them hold."""

    def contexts(self) -> list[int]:
        """The decodes' contexts: from a quarter to seven quarters of `context`, as uneven as in a real batch.

        Equal contexts, or whole blocks, would need no padding, and measure a case that never happens.
        """
        if self.decodes == 1:
            return [self.context + 3]
        own = self.context - self.shared
        step = 1.5 * own / max(1, self.decodes - 1)
        return [self.shared + own // 4 + round(step * i) + 3 for i in range(self.decodes)]

    @property
    def reach(self) -> int:
        """The longest context while it is measured."""
        row = 0 if self.chunks else IN_A_ROW - 1
        return row + max([*self.contexts(), *(start + tokens for start, tokens in self.chunks)])

    @property
    def tokens(self) -> int:
        return self.decodes + sum(tokens for _, tokens in self.chunks)

    def label(self) -> str:
        parts = [f"{self.decodes} decodes at about {self.context}"] if self.decodes else []
        parts += [f"{self.shared} of it shared"] if self.shared else []
        parts += ["side by side"] if self.side_by_side else []
        parts += (
            [f"{len(self.chunks)} x {self.chunks[0][1]} prompt tokens at {self.chunks[0][0]}"]
            if self.chunks
            else []
        )
        return " + ".join(parts)


class Bench:
    """Makes plans for shapes by hand and times them, on these KV blocks (all there are)."""

    def __init__(
        self, executor: Executor, blocks: Sequence[int] | None = None, *, name: str = "calibration"
    ) -> None:
        self._executor, self._name = executor, name
        self._count = 0
        self._next = 0
        order = list(range(executor.capacity.blocks) if blocks is None else blocks)
        rows = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
        random.Random(0).shuffle(rows)
        self._new = [block for row in rows for block in row]
        """Blocks as a pool hands them out that is new."""
        random.Random(0).shuffle(order)
        self._order = order
        """Blocks as a pool hands them out that was in use for a while: next to nothing lies side by side."""
        self._gone: tuple[str, ...] = ()

    def measure(self, shape: Shape) -> list[Sample]:
        """A shape once; if it is decodes alone, a row of steps after a first one, as they come in a run."""
        capacity = self._executor.capacity
        size = capacity.block_size
        row = 1 if shape.chunks else IN_A_ROW
        requests: list[Request] = []
        works: list[Work] = []
        items = [(context - 1, 1) for context in shape.contexts()] + list(shape.chunks)
        order = self._new if shape.side_by_side else self._order
        common = self._blocks(order, shape.shared // size)
        reread = max(0, shape.decodes - 1) * len(common) * size
        for index, (start, tokens) in enumerate(items):
            self._count += 1
            name = f"{self._name}-{self._count}"
            prompt = Prompt((Segment(stream_of(name), 0, start + tokens),))
            held = common if index < shape.decodes else ()
            blocks = (*held, *self._blocks(order, -(-(start + tokens + row - 1) // size) - len(held)))
            requests.append(Request(id=name, prompt=prompt, output_len=row))
            works.append(Work(name, start, tokens, True, blocks))
        names = tuple(request.id for request in requests)
        # Introduced in a plan of their own: what a newcomer costs is no part of a batch's shape.
        self._executor.execute(StepPlan(0, 0, (), GENESIS, tuple(requests), names, released=self._gone))
        self._gone = names
        found = []
        for _ in range(row):
            plan = StepPlan(0, 0, tuple(works), GENESIS, reread=reread)
            result = self._executor.execute(plan)
            timing = StepTiming(0, result.prepare_ns, result.forward_ns, result.sample_ns, 0)
            batch = Batch.of(plan)
            if not shape.side_by_side:
                batch = replace(batch, scattered=batch.decode_context)
            found.append((batch, timing))
            works = [Work(work.request, work.start + 1, 1, True, ()) for work in works]
        return found[1:] or found

    def _blocks(self, order: Sequence[int], count: int) -> tuple[int, ...]:
        """As many of the next blocks."""
        self._next += count
        return tuple(order[i % len(order)] for i in range(self._next - count, self._next))

    def write(self) -> None:
        """Have every block written: memory that nobody wrote is one page, read over and over."""
        first, *rest = sorted(self._order)
        pairs = tuple((first, block) for block in rest)
        if pairs:
            self._executor.execute(StepPlan(0, 0, (), GENESIS, copies=(Move(self._name, pairs),)))

    def finish(self) -> None:
        self._executor.execute(StepPlan(0, 0, (), GENESIS, released=self._gone))
