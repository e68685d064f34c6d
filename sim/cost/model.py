"""The cost-model interface, and the numbers about a batch that cost models are made of. Data plane."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from lab.control.plan import Decoding, StepPlan, StepTiming


class CostModel(Protocol):
    """Durations of a step, from its plan alone.

    One that has a method `decode_time(decodes: Decoding) -> StepTiming` too, which says what `step_time` says of a
    plan with nothing but these decodes, lets runs of such steps be crossed at once.
    """

    def step_time(self, plan: StepPlan) -> StepTiming:
        """How long planning, each execution phase, and committing take, in nanoseconds."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step's cost depends on. Contexts count the tokens attended to, a token's own included."""

    rows: int
    """Tokens put through the model."""
    seqs: int
    """Requests in the batch."""
    samples: int
    """Rows that go through the LM head and the sampler."""
    decode_context: int
    """Sum of contexts over single-token items."""
    decode_padded: int
    """Single-token items times their longest context: what a padded gather reads."""
    prefill_pairs: int
    """Query-key pairs of multi-token items (causal)."""
    prefill_context: int
    """Sum of contexts at the end of multi-token items."""
    decodes: int = 0
    """Single-token items."""
    new: int = 0
    """Requests that the data plane sees for the first time."""
    reread: int = 0
    """Of `decode_context`, tokens in KV blocks that another request of the batch reads too, and has read before."""
    scattered: int = 0
    """Of `decode_context`, tokens in KV blocks that don't lie side by side. A plan doesn't say; who measures knows."""

    @classmethod
    def of_decodes(cls, decodes: Decoding) -> Batch:
        """The batch of a plan that is nothing but these decodes."""
        seqs = decodes.seqs
        padded, reread = seqs * decodes.longest, min(decodes.reread, decodes.context)
        return cls(seqs, seqs, seqs, decodes.context, padded, 0, 0, seqs, reread=reread)

    @classmethod
    def of(cls, plan: StepPlan) -> Batch:
        steady = plan.decodes
        rows = samples = decodes = steady.seqs
        context, longest, pairs, prefill = steady.context, steady.longest, 0, 0
        for work in plan.items:
            n, end = work.tokens, work.context
            rows += n
            samples += work.samples
            if n == 1:
                decodes += 1
                context += end
                longest = max(longest, end)
            else:
                pairs += n * (end - n) + n * (n + 1) // 2
                prefill += end
        padded, seqs, new = decodes * longest, len(plan.work), len(plan.new)
        return cls(
            rows, seqs, samples, context, padded, pairs, prefill, decodes, new, min(plan.reread, context)
        )

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
