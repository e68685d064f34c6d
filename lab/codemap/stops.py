"""What the map shows: the code of every declared boundary, and the stops between them. Observation path.

A stop is named by its symbol alone. Its line and sentence come from the source, its plane from its module's
docstring, its place in the order, its callers and its count from a run (`lab/codemap/watch.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lab.observe.boundaries import DECLARED, PathName
from lab.observe.source import ROOT, Place, bases, first_sentence, locate, module_doc

PATHS: tuple[PathName, ...] = get_args(PathName)

_CORE = "lab/control/core.py:EngineCore"
_POOL = "lab/state/blocks.py:BlockPool"
_EXECUTE = "lab/control/executor.py:Executor.execute"
_RUNDIR = "lab/observe/rundir.py:RunDirectory"
_OBSERVER = "lab/control/observer.py:Observer"
_LATER = "lab/analysis"


@dataclass(frozen=True, slots=True)
class Stop:
    """A function on the map. `contract` is the protocol's method that it answers to, `twin` the real engine's."""

    symbol: str
    paths: tuple[PathName, ...]
    contract: str = ""
    twin: str = ""

    @property
    def elsewhere(self) -> bool:
        """It is the real engine's own, which a simulation doesn't call."""
        return self.symbol.startswith("real_engine/")

    @property
    def after(self) -> bool:
        """It starts from the files of a run, so no run calls it."""
        return self.symbol.startswith(_LATER)


_BETWEEN = (
    Stop("sim/driver.py:Simulation.run", ("request",), twin="real_engine/driver.py:SteppedRun.run"),
    Stop("lab/control/gateway.py:Gateway.ended", ("request",)),
    Stop("lab/control/step.py:StepBuilder.run", ("request", "state"), contract="lab/policy.py:Step.run"),
    Stop(
        "lab/control/step.py:StepBuilder.run_decodes", ("request",), contract="lab/policy.py:Step.run_decodes"
    ),
    Stop("lab/control/step.py:StepBuilder.preempt", ("state",), contract="lab/policy.py:Step.preempt"),
    Stop("lab/state/prefix.py:ContentChain.upto", ("state",)),
    Stop(f"{_POOL}.match", ("state",)),
    Stop(f"{_POOL}.pin", ("state",)),
    Stop(f"{_POOL}.take_run", ("state",)),
    Stop(f"{_POOL}.publish", ("state",)),
    Stop("lab/state/tiers.py:HostTier.take", ("state",)),
    Stop("lab/state/tiers.py:HostTier.release", ("state",)),
    Stop(f"{_CORE}.observe", ("observation",)),
    Stop("lab/observe/recorder.py:Recorder.on_step", ("observation",), contract=f"{_OBSERVER}.on_step"),
    Stop("lab/observe/recorder.py:Recorder.on_request", ("observation",), contract=f"{_OBSERVER}.on_request"),
    Stop("lab/observe/logs.py:JsonLog.on_step", ("observation",), contract=f"{_OBSERVER}.on_step"),
    Stop(f"{_RUNDIR}.save", ("observation",)),
    Stop("lab/observe/metrics.py:summarise", ("observation",)),
    Stop("lab/observe/prometheus.py:prometheus_text", ("observation",)),
    Stop("lab/observe/export.py:write_spans_of", ("observation",)),
    Stop("lab/observe/bulk/requests.py:RequestBatch.spans", ("observation",)),
    Stop("lab/observe/bulk/steps.py:StepBatch.spans", ("observation",)),
    Stop("lab/analysis/runs.py:load", ("observation",)),
    Stop("lab/analysis/diff.py:diff", ("observation",)),
    Stop("lab/analysis/report.py:write_report", ("observation",)),
)
"""Code that a request, its state or what is said of them passes on the way between declared boundaries."""


def stops() -> list[Stop]:
    """Every stop: the boundaries' own code on the paths they declare, and what lies between."""
    paths: dict[str, dict[PathName, None]] = {}
    for boundary in DECLARED:
        paths.setdefault(boundary.emitted_at, {})[boundary.path] = None
    declared = [
        Stop(
            "sim/executor.py:SimExecutor.execute",
            tuple(on),
            contract=symbol,
            twin="real_engine/executor.py:TorchExecutor.execute",
        )
        if symbol == _EXECUTE
        else Stop(symbol, tuple(on))
        for symbol, on in paths.items()
    ]
    return [*declared, *_BETWEEN]


def spans_at(stop: Stop) -> list[str]:
    """The declared spans whose work this code does."""
    own = (stop.symbol, stop.contract)
    return [boundary.name for boundary in DECLARED if boundary.emitted_at in own]


def place(stop: Stop, root: Path = ROOT) -> Place:
    """Where a stop stands, with a sentence: its own docstring's, its contract's, its class's or a policy's rule.

    Raises `LookupError` where the code has moved on and the map hasn't.
    """
    own = locate(stop.symbol, root)
    if own.file.startswith("policies/"):  # its rule stands at the top of its file
        return Place(own.symbol, own.line, first_sentence(module_doc(own.file, root)))
    if own.doc:
        return own
    candidates = [stop.contract] if stop.contract else []
    method = own.name.rpartition(".")[2]
    if own.owner != own.symbol:
        candidates += [f"lab/policy.py:{base}.{method}" for base in bases(own.owner, root)]
        candidates += [f"lab/policy.py:{base}" for base in bases(own.owner, root)]
        candidates += [own.owner]
    for symbol in candidates:
        try:
            doc = locate(symbol, root).doc
        except LookupError:
            if symbol == stop.contract:
                raise
            continue
        if doc:
            return Place(own.symbol, own.line, doc)
    return Place(own.symbol, own.line, first_sentence(module_doc(own.file, root)))


def plane(file: str, root: Path = ROOT) -> str:
    """`control` or `data`, as the module's docstring says; observers belong to neither and say `observation`."""
    if file.startswith("policies/"):
        return "control"
    text = module_doc(file, root).lower()
    if "observation path" in text and not file.startswith("lab/control/"):
        return "observation"
    found = re.search(r"\b(control|data)\s+plane", text)
    return found[1] if found else "control"
