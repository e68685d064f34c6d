"""Opens a run directory. Observation path.

    run = load("runs/20260101-120000-fcfs-1a2b3c")
    run.metrics["ttft_ms"]["p99"]
    run.steps.plot(x="start_ns", y="batch")

Tables are read when they are first asked for. A partial run opens too, and says so in `partial`; what it
lacks raises one sentence.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lab.analysis import tidy
from lab.control.observer import FleetEvent, RequestRecord, StepRecord
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Request
from lab.errors import RunError
from lab.observe import export
from lab.observe.claim import partial_reason
from lab.observe.recorder import Recorder

if TYPE_CHECKING:
    import pandas as pd

_T = TypeVar("_T")


def load(path: str | os.PathLike[str]) -> Run:
    """The run at `path`, complete or partial. Raises `RunError` when there is none."""
    where = Path(path)
    if not where.exists():
        raise RunError(f"there is no run at '{where}': no such directory")
    if not where.is_dir():
        raise RunError(f"there is no run at '{where}': it is a file; expected a run directory")
    try:
        partial = partial_reason(where)
    except RunError as error:
        inside = sorted(child.name for child in where.iterdir() if child.is_dir() and _is_run(child))
        hint = f"; did you mean {' or '.join(repr(str(where / name)) for name in inside)}?" if inside else ""
        raise RunError(f"{error}{hint}") from None
    return Run(where, partial)


class Run:
    """What a run left: pandas frames as the files have them, and the records they were made from."""

    def __init__(self, path: Path, partial: str | None) -> None:
        self.path = path
        self.partial = partial
        """Why the run isn't complete, or None."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}{', partial' if self.partial else ''})"

    # -- tables ----------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request, in order of arrival."""
        return self._frame("requests.parquet")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a step: durations and the state it left."""
        return self._frame("steps.parquet")

    @cached_property
    def plans(self) -> pd.DataFrame:
        """One row a step: decisions."""
        return self._frame("plans.parquet")

    @cached_property
    def spans(self) -> pd.DataFrame:
        """One row a span."""
        return self._frame("spans.parquet")

    @cached_property
    def latencies(self) -> pd.DataFrame:
        """One row a request, for people: times in ms (`lab/analysis/tidy.py`)."""
        return tidy.latencies(self)

    @cached_property
    def stages(self) -> pd.DataFrame:
        """One row a stretch of a request's life."""
        return tidy.stages(self)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row a generated token."""
        return tidy.tokens(self)

    @cached_property
    def phases(self) -> pd.DataFrame:
        """One row a phase of a step."""
        return tidy.phases(self)

    @cached_property
    def asked(self) -> pd.DataFrame | None:
        """What the workload's requests ask for: id, arrival_ns, prompt_tokens, output; None without a workload."""
        import pandas as pd

        if not (self.path / "workload.parquet").is_file():
            return None
        columns = ["id", "arrival_ns", "prompt_tokens", "output_len", "max_tokens"]
        frame = pd.read_parquet(self._file("workload.parquet"), columns=columns).drop_duplicates("id")
        output = frame["output_len"].fillna(frame["max_tokens"]).astype("int64")
        return frame[columns[:3]].assign(output=output)

    def prompts_as_in(self, other: Run) -> bool:
        """Whether both workloads have the same prompts, token by token, for the same requests."""
        import pyarrow.parquet as pq

        files = [run._file("workload.parquet") for run in (self, other)]
        if files[0].read_bytes() == files[1].read_bytes():
            return True
        tables = [
            pq.read_table(file, columns=["id", "pieces"]).sort_by("id").combine_chunks() for file in files
        ]
        return bool(tables[0].equals(tables[1]))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json`; keys in `lab/observe/metrics.py`."""
        return self._json("metrics.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """`environment.json`."""
        return self._json("environment.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        from omegaconf import OmegaConf

        path = self._file("config.yaml")
        try:
            config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except Exception as error:  # yaml and omegaconf have no common base
            raise RunError(f"can't read '{path}': {str(error).splitlines()[0]}") from error
        if not isinstance(config, dict):
            raise RunError(f"can't read '{path}': expected a mapping, found a {type(config).__name__}")
        return {str(key): value for key, value in config.items()}

    def all_rejected(self) -> str:
        """One sentence where every request was rejected, with the reason that most of them got; else ""."""
        counts = self.metrics.get("requests", {})
        rejected = counts.get("rejected", 0)
        if not rejected or sum(counts.values()) != rejected:
            return ""
        import pyarrow.parquet as pq  # not pandas: a simulation alone must not wait for it

        reasons = pq.read_table(self._file("requests.parquet"), columns=["reason"])["reason"].to_pylist()
        kinds = Counter(_without_numbers(reason) for reason in reasons)
        (kind, count), *others = kinds.most_common()
        example = next(reason for reason in reasons if _without_numbers(reason) == kind)
        whose = f" ({count} of them)" if others else ""
        return f"all {rejected} requests were rejected{whose}, for example: {example}"

    # -- records ---------------------------------------------------------------------------------------

    def workload(self) -> list[Request]:
        """The requests that were to be served, to serve them again."""
        return self._records("workload.parquet", export.read_workload)

    def timings(self) -> list[StepTiming]:
        """Each step's durations, in order: what a replay runs on."""
        phases = [phase.name for phase in fields(StepTiming) if phase.name != "terms"]
        columns = self.step_columns(*phases)
        return [StepTiming(*durations) for durations in zip(*columns, strict=True)]

    def step_columns(self, *names: str) -> list[list[Any]]:
        """These columns of `steps` as lists, without pandas: a simulation on recorded durations needs no more."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._file("steps.parquet")
        try:
            table = pq.ParquetFile(path).read(columns=list(names))
            return [table[name].to_pylist() for name in names]
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(f"can't read '{path}': {str(error).splitlines()[0]}") from error

    def step_plans(self) -> list[StepPlan]:
        """Each step's decisions, in order, as they were handed to the data plane."""
        workload = self.workload()
        return self._records("plans.parquet", lambda path: export.read_plans(path, workload))

    def step_records(self) -> list[StepRecord]:
        """What observers were told of steps."""
        plans = self.step_plans()
        return self._records("steps.parquet", lambda path: export.read_steps(path, plans))

    def request_records(self) -> list[RequestRecord]:
        """What observers were told of requests, in order of arrival."""
        workload = self.workload()
        return self._records("requests.parquet", lambda path: export.read_requests(path, workload))

    def fleet_events(self) -> list[FleetEvent]:
        """When replicas came and went."""
        return self._records("fleet.parquet", export.read_fleet)

    def recorded(self) -> Recorder:
        """A recorder as the run left it: spans and metrics can be computed from it anew."""
        recorder = Recorder()
        recorder.requests += self.request_records()
        recorder.steps += self.step_records()
        recorder.fleet += self.fleet_events()
        return recorder

    # -- inside ----------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            why = f" (it is partial: {self.partial})" if self.partial else ""
            raise RunError(f"the run at '{self.path}' has no '{name}'{why}")
        return path

    def _frame(self, name: str) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        path = self._file(name)
        try:
            return pd.read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"can't read '{path}': {str(error).splitlines()[0]}") from error

    def _json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"can't read '{path}': {error}") from error
        if not isinstance(value, dict):
            raise RunError(f"can't read '{path}': expected an object, found a {type(value).__name__}")
        return value

    def _records(self, name: str, read: Callable[[Path], _T]) -> _T:
        path = self._file(name)
        try:
            return read(path)
        except KeyError as error:
            raise RunError(f"'{path}' speaks of request {error}, which the run's workload lacks") from error


def _without_numbers(reason: str) -> str:
    return re.sub(r"\d+", "#", reason)


def _is_run(path: Path) -> bool:
    try:
        partial_reason(path)
    except RunError:
        return False
    return True
