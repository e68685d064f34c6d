"""Every boundary a request or a step crosses, declared once. Observation path.

A span is emitted by code that reads its declaration here (`lab/observe/spans.py`), the same code for both
backends, so the two can't differ in names, parents or attributes. `emitted_at` names the code whose work the
span shows: from a bar in a timeline to the line that drew it (`source_line`).

Attribute names follow OpenTelemetry's GenAI conventions where they have one and `lab.*` where they don't.

    request (root, one trace a request)       step (root, one trace a replica; linked to its requests)
    ├── request.admit                         ├── step.plan
    ├── request.route                         │   ├── kv.allocate
    ├── request.queue    one a waiting time   │   ├── kv.evict
    ├── request.prefill                       │   └── kv.release    preemption, abort
    └── request.decode                        ├── step.execute
                                              │   ├── kv.transfer   swapping out and in
    gateway.scale (root, one trace)           │   ├── step.prepare
                                              │   ├── step.forward
                                              │   ├── step.sample
                                              │   ├── kv.compact    KV that compression gives up
                                              │   └── step.rank     one for each rank, if there are several
                                              └── step.commit
                                                  └── kv.release    finish
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lab.control.plan import TERMS
from lab.observe.source import ROOT, locate

Plane = Literal["control", "data"]
PathName = Literal["request", "state", "observation"]
AttributeType = Literal["string", "int", "double", "boolean", "string[]"]
Attribute: TypeAlias = tuple[str, AttributeType]
Value: TypeAlias = str | int | float | bool | tuple[str, ...]

SCHEMA_VERSION = 1
"""Goes up when a span, parent, attribute or column changes its name or meaning."""

EPOCH_NS = 946_684_800 * 10**9
"""2000-01-01: where a run's time 0 lies on the calendar. Never 1970, whose 0 OTLP/JSON leaves out."""

LINK: tuple[Attribute, ...] = (
    ("lab.link.role", "string"),
    ("lab.seq.n_tokens", "int"),
    ("lab.seq.phase", "string"),
)
"""Attributes of the links from a step to the requests it worked on."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """One kind of span. `parents` names what it may lie in; `None` is the root of a trace.

    `plane`: who acts, the deciding control plane or the computing data plane. `path`: what moves over it,
    a request, state (KV blocks), or an observation. Attributes in `optional` are left out when without value.
    """

    name: str
    parents: tuple[str | None, ...]
    plane: Plane
    path: PathName
    attributes: tuple[Attribute, ...]
    emitted_at: str
    doc: str
    optional: frozenset[str] = frozenset()
    kind: Literal["SERVER", "INTERNAL"] = "INTERNAL"


_CORE = "lab/control/core.py:EngineCore"
_POOL = "lab/state/blocks.py:BlockPool"
_EXECUTOR = "lab/control/executor.py:Executor.execute"

_TERMS: tuple[Attribute, ...] = tuple((f"lab.cost.{term}_ns", "int") for term in TERMS)

DECLARED: tuple[Boundary, ...] = (
    Boundary(
        name="request",
        parents=(None,),
        plane="control",
        path="request",
        kind="SERVER",
        emitted_at="lab/control/gateway.py:Gateway.submit",
        doc="A request from its arrival to its last token, or to its refusal.",
        attributes=(
            ("gen_ai.operation.name", "string"),
            ("gen_ai.provider.name", "string"),
            ("gen_ai.request.model", "string"),
            ("gen_ai.request.max_tokens", "int"),
            ("gen_ai.request.temperature", "double"),
            ("gen_ai.request.top_p", "double"),
            ("gen_ai.request.top_k", "int"),
            ("gen_ai.request.seed", "int"),
            ("gen_ai.usage.input_tokens", "int"),
            ("gen_ai.usage.output_tokens", "int"),
            ("gen_ai.usage.cache_read.input_tokens", "int"),
            ("gen_ai.response.finish_reasons", "string[]"),
            ("gen_ai.response.time_to_first_chunk", "double"),
            ("gen_ai.conversation.id", "string"),
            ("error.type", "string"),
            ("lab.request.id", "string"),
            ("lab.request.seq", "int"),
            ("lab.request.outcome", "string"),
            ("lab.request.reason", "string"),
            ("lab.request.tenant", "string"),
            ("lab.request.priority", "int"),
            ("lab.request.preemptions", "int"),
            ("lab.request.cached_blocks", "int"),
            ("lab.request.computed_tokens", "int"),
            ("lab.request.dropped_tokens", "int"),
            ("lab.slo.ttft_ns", "int"),
            ("lab.slo.tpot_ns", "int"),
            ("lab.replica", "int"),
        ),
        optional=frozenset(
            {
                "gen_ai.response.finish_reasons",
                "gen_ai.response.time_to_first_chunk",
                "gen_ai.conversation.id",
                "error.type",
                "lab.request.tenant",
                "lab.request.dropped_tokens",
                "lab.slo.ttft_ns",
                "lab.slo.tpot_ns",
            }
        ),
    ),
    Boundary(
        name="request.admit",
        parents=("request",),
        plane="control",
        path="request",
        emitted_at="lab/control/gateway.py:Gateway.submit",
        doc="The admission policy said whether the request enters, and why. An instant.",
        attributes=(
            ("lab.admit.admitted", "boolean"),
            ("lab.admit.reason", "string"),
            ("lab.admit.ingest_lag_ns", "int"),
        ),
    ),
    Boundary(
        name="request.route",
        parents=("request",),
        plane="control",
        path="request",
        emitted_at="lab/control/gateway.py:Gateway.submit",
        doc="The routing policy chose a replica, and why. An instant; absent when the gateway refused.",
        attributes=(("lab.route.replica", "int"), ("lab.route.reason", "string")),
    ),
    Boundary(
        name="request.queue",
        parents=("request",),
        plane="control",
        path="request",
        emitted_at=f"{_CORE}.add",
        doc="The request waited: since its arrival, or since it was preempted, or swapped out, which keeps its KV.",
        attributes=(("lab.queue.cause", "string"), ("lab.queue.visit", "int")),
    ),
    Boundary(
        name="request.prefill",
        parents=("request",),
        plane="data",
        path="request",
        emitted_at=f"{_CORE}.plan",
        doc="The request ran and its known tokens were being computed, pauses between chunks included.",
        attributes=(("lab.step.first", "int"), ("lab.step.last", "int")),
    ),
    Boundary(
        name="request.decode",
        parents=("request",),
        plane="data",
        path="request",
        emitted_at=f"{_CORE}.commit",
        doc="The request ran and generated token after token.",
        attributes=(("lab.step.first", "int"), ("lab.step.last", "int")),
    ),
    Boundary(
        name="step",
        parents=(None,),
        plane="control",
        path="request",
        emitted_at="lab/control/loop.py:serve",
        doc="One engine iteration. Linked to every request it worked on.",
        attributes=(
            ("lab.step.index", "int"),
            ("lab.replica", "int"),
            ("lab.policy", "string"),
            ("lab.plan.digest", "string"),
        ),
    ),
    Boundary(
        name="step.plan",
        parents=("step",),
        plane="control",
        path="request",
        emitted_at=f"{_CORE}.plan",
        doc="The scheduling policy formed the batch. The counts are those right after it.",
        attributes=(
            ("lab.plan.admitted", "string[]"),
            ("lab.plan.preempted", "string[]"),
            ("lab.plan.rejected", "string[]"),
            ("lab.requests.running", "int"),
            ("lab.requests.waiting", "int"),
            ("lab.kv.blocks_free", "int"),
            ("lab.kv.blocks_cached", "int"),
            ("lab.kv.blocks_held", "int"),
        ),
    ),
    Boundary(
        name="kv.allocate",
        parents=("step.plan",),
        plane="control",
        path="state",
        emitted_at=f"{_POOL}.take",
        doc="KV blocks were taken for the batch. An instant at the end of planning, with the step's total.",
        attributes=(("lab.kv.blocks", "int"),),
    ),
    Boundary(
        name="kv.evict",
        parents=("step.plan",),
        plane="control",
        path="state",
        emitted_at=f"{_POOL}.evict",
        doc="Cached blocks lost their content to make room. An instant at the end of planning.",
        attributes=(("lab.kv.blocks", "int"),),
    ),
    Boundary(
        name="kv.release",
        parents=("step.plan", "step.commit"),
        plane="control",
        path="state",
        emitted_at=f"{_POOL}.release",
        doc="Blocks were given back: by preemption or abort while planning, by finished requests at commit.",
        attributes=(("lab.kv.blocks", "int"),),
    ),
    Boundary(
        name="step.execute",
        parents=("step",),
        plane="data",
        path="request",
        emitted_at=_EXECUTOR,
        doc="The data plane carried the plan out. A modelled step says what its time is made of.",
        attributes=(
            ("lab.batch.requests", "int"),
            ("lab.batch.prefill_tokens", "int"),
            ("lab.batch.decode_tokens", "int"),
            ("lab.batch.context_tokens", "int"),
            *_TERMS,
        ),
        optional=frozenset(name for name, _ in _TERMS),
    ),
    Boundary(
        name="kv.transfer",
        parents=("step.execute", "request"),
        plane="data",
        path="state",
        emitted_at=_EXECUTOR,
        doc="KV blocks of swapped requests were copied to the host, then others back; blocks that several outputs of a "
        "request share were copied before one writes on. Absent when none was. In a request: its KV moved to the "
        "replica that decodes it, after waiting for room there (`room_ns`) and for the link (`queue_ns`, both).",
        attributes=(
            ("lab.kv.blocks_out", "int"),
            ("lab.kv.blocks_in", "int"),
            ("lab.kv.blocks_copied", "int"),
            ("lab.transfer.source", "int"),
            ("lab.transfer.destination", "int"),
            ("lab.transfer.tokens", "int"),
            ("lab.transfer.bytes", "int"),
            ("lab.transfer.room_ns", "int"),
            ("lab.transfer.queue_ns", "int"),
            ("lab.transfer.wire_ns", "int"),
        ),
        optional=frozenset(
            f"lab.{name}"
            for name in (
                "kv.blocks_out",
                "kv.blocks_in",
                "kv.blocks_copied",
                "transfer.source",
                "transfer.destination",
                "transfer.tokens",
                "transfer.bytes",
                "transfer.room_ns",
                "transfer.queue_ns",
                "transfer.wire_ns",
            )
        ),
    ),
    Boundary(
        name="step.prepare",
        parents=("step.execute", "step.rank"),
        plane="data",
        path="request",
        emitted_at=_EXECUTOR,
        doc="The plan was turned into the tensors of a packed batch.",
        attributes=(),
    ),
    Boundary(
        name="step.forward",
        parents=("step.execute", "step.rank"),
        plane="data",
        path="request",
        emitted_at=_EXECUTOR,
        doc="The model ran.",
        attributes=(("lab.batch.tokens", "int"),),
    ),
    Boundary(
        name="step.sample",
        parents=("step.execute", "step.rank"),
        plane="data",
        path="request",
        emitted_at=_EXECUTOR,
        doc="The next tokens were drawn.",
        attributes=(("lab.batch.samples", "int"),),
    ),
    Boundary(
        name="kv.compact",
        parents=("step.execute",),
        plane="data",
        path="state",
        emitted_at=_EXECUTOR,
        doc="Requests gave up KV beyond what compression lets them keep; what stays moved. Absent when none did.",
        attributes=(
            ("lab.kv.requests", "int"),
            ("lab.kv.blocks", "int"),
            ("lab.kv.dropped_tokens", "int"),
        ),
    ),
    Boundary(
        name="step.rank",
        parents=("step.execute",),
        plane="data",
        path="request",
        emitted_at="real_engine/parallel/rank.py:RankExecutor.follow",
        doc="One rank's part of the step, laid to the step's beginning: clocks may disagree, down and up say by how "
        "much. Its phases lie in it, but for rank 0, whose phases are the step's own. Absent when one process "
        "computes.",
        attributes=(
            ("lab.rank", "int"),
            ("lab.rank.tensor", "int"),
            ("lab.rank.pipeline", "int"),
            ("lab.rank.communication_ns", "int"),
            ("lab.rank.down_ns", "int"),
            ("lab.rank.up_ns", "int"),
        ),
    ),
    Boundary(
        name="step.commit",
        parents=("step",),
        plane="control",
        path="request",
        emitted_at=f"{_CORE}.commit",
        doc="The sampled tokens were put to the requests' accounts, and finished requests left.",
        attributes=(),
    ),
    Boundary(
        name="gateway.scale",
        parents=(None,),
        plane="control",
        path="request",
        emitted_at="lab/control/fleet.py:Fleet.look",
        doc="A replica came or went: at the beginning, by the scaling policy's decision, at the end. An instant.",
        attributes=(
            ("lab.replica", "int"),
            ("lab.scale.event", "string"),
            ("lab.scale.target", "int"),
            ("lab.scale.reason", "string"),
        ),
    ),
)

BOUNDARIES: dict[str, Boundary] = {boundary.name: boundary for boundary in DECLARED}
"""Every declaration by name, in the order of the picture above."""


def source_line(boundary: Boundary, root: Path = ROOT) -> tuple[Path, int]:
    """File and line of `boundary.emitted_at`, found by parsing, without an import.

    `root` is the checkout (default: the one this file lies in). Raises `LookupError` when the name is gone.
    """
    try:
        place = locate(boundary.emitted_at, root)
    except LookupError as error:
        raise LookupError(f"boundary '{boundary.name}' is emitted at {error.args[0]}") from error
    return root / place.file, place.line
