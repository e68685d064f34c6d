"""Measured kernels in place of peaks: the times of the very products and attentions a model is made of. Data plane.

A `Kernels` holds one model's curves on one device; `sim/cost/table_files.py` makes it from files. Straight lines
between measured points; outside of them the time grows as the roofline does, which is counted (`outside`) and said
after the run, as is everything that had to stand in for something unmeasured (`notes`). Nothing is faster than the
roofline. The host's work isn't in kernels measured alone: its coefficients stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.control.plan import Decoding, Work
from sim.cost.curves import Curve, Surface
from sim.cost.physical import ALONE, MEASURED, PERFECT, Coefficients, Parallel, PhysicalCost
from sim.cost.terms import StepCost
from sim.hardware import Hardware
from sim.model_shape import ModelShape


@dataclass
class Kernels:
    """Seconds, for one device's share of the model. None where nothing was measured."""

    linear: Curve
    """All linear layers but experts, by rows of one group."""
    head: Curve | None = None
    """The LM head, by rows."""
    experts: Curve | None = None
    """One device's part of all mixtures of experts, evenly spread, by rows of all groups."""
    context: Curve | None = None
    """One layer's attention of a prompt of so many tokens."""
    generation: Surface | None = None
    """One layer's attention of (requests, context of each) single tokens."""
    reduce: Curve | None = None
    """One all-reduce, by bytes."""
    source: str = ""
    notes: list[str] = field(default_factory=list)
    """What stood in for what wasn't measured."""


class TablesCost(PhysicalCost):
    """`PhysicalCost` whose parts are looked up."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        kernels: Kernels,
        coefficients: Coefficients = MEASURED,
        parallel: Parallel = ALONE,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        super().__init__(shape, hardware, coefficients, parallel, graph_sizes)
        self.kernels = kernels
        self._bound = PhysicalCost(shape, hardware, PERFECT, parallel)
        self._context = None if kernels.context is None else kernels.context.convex()
        self.steps = 0
        """Steps that were asked for."""
        self.outside: Counter[str] = Counter()
        """How often a kernel was asked for a size beyond what was measured."""

    def cost_of(self, decodes: Decoding, items: Sequence[Work]) -> StepCost:
        self.steps += 1
        return super().cost_of(decodes, items)

    def linear(self, rows: float) -> float:
        """Of experts, the busiest device does what each would with as many more rows as it has more of them."""
        kernels = self.kernels
        own = rows / self.parallel.groups
        took = kernels.linear(own)
        if own > kernels.linear.end:
            self.outside["linear layers"] += 1
        if self.shape.mixture is None:
            return took
        if kernels.experts is None:
            return took + self.expert_time(rows)
        busiest = rows * self.parallel.skew
        if busiest > kernels.experts.end:
            self.outside["experts"] += 1
        return took + max(kernels.experts(busiest), self._bound.expert_time(rows))

    def head(self, seqs: float) -> float:
        kernels = self.kernels
        return super().head(seqs) if kernels.head is None else kernels.head(seqs)

    def attention(self, decodes: Decoding, items: Sequence[Work]) -> tuple[float, float]:
        """A chunk takes what its end takes as a prompt, less what its beginning would: the same query-key pairs.

        That, or its tokens as a prompt of their own and reading the context before them, whichever is longer. All
        chunks of a step share one launch. Windows shorten contexts before they are looked up. Groups that serve
        requests of their own each do their part of this, and launch all the same.
        """
        bound, bound_tokens = super().attention(decodes, items)
        kernels, groups = self.kernels, self.parallel.groups
        context, generation = self._context, kernels.generation
        chunks = tokens = 0.0
        for kind in self.shape.kinds:
            window = kind.window or 1 << 60
            seqs, total = decodes.seqs, float(min(decodes.context, decodes.seqs * window))
            launch, took = 0.0, 0.0
            for item in items:
                n, end = item.tokens, item.context
                if n == 1:
                    seqs, total = seqs + 1, total + min(end, window)
                    continue
                least = self.chunk_s(n, end, kind)
                if context is None:
                    took += least
                    continue
                reach = min(end, n + window)
                if reach > context.end:
                    self.outside["attention of prompts"] += 1
                launch = context(1)
                took += max(context(reach) - context(reach - n), context(n) - launch, least)
            chunks += kind.count * (launch * groups + took)
            if seqs and generation is not None:
                each = total / seqs
                if not generation.covers(seqs / groups, each):
                    self.outside["attention of single tokens"] += 1
                tokens += kind.count * generation(seqs / groups, each) * groups
        return max(chunks, bound), max(tokens, bound_tokens)

    def reduce_s(self, size: float) -> float:
        """One all-reduce as measured, which includes its launch on the device."""
        reduce = self.kernels.reduce
        if reduce is None:
            return super().reduce_s(size)
        if size > reduce.end:
            self.outside["all-reduce"] += 1
        return reduce(size)

    def dispatch_s(self, rows: float) -> float:
        """An all-to-all wasn't measured, so it has a launch, whether all-reduces have or not."""
        unsaid = super().launch_s - self.launch_s - self._expert_link.latency_s
        return super().dispatch_s(rows) + max(unsaid, 0.0)

    @property
    def launch_s(self) -> float:
        return super().launch_s if self.kernels.reduce is None else 0.0

    def account(self) -> dict[str, object]:
        """For the run's record: how often the tables didn't reach, and what stood in."""
        return {"steps": self.steps, "outside": dict(self.outside), "notes": self.kernels.notes}

    def warnings(self) -> list[str]:
        """Sentences about that, for people."""
        said = [f"cost.tables: {note}." for note in self.kernels.notes]
        if self.outside:
            most = ", ".join(f"{name} {count:,} times" for name, count in self.outside.most_common())
            said.append(
                f"cost.tables: in {self.steps:,} steps, sizes beyond what was measured were extrapolated by the "
                f"roofline: {most}."
            )
        return said
