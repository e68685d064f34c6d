"""What every analysis starts from: a run's tables, seen as stages, latencies and named sides. Observation path.

The records tile a request's life: its intervals cover [arrival, end] without gap or overlap. That is what
makes an attribution exact, so the functions here keep integer nanoseconds to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

STAGES = ("queue", "preempted", "swapped", "prefill", "decode")
"""Stages that tile a request: waiting for the first time, waiting after a preemption that dropped or that kept
its KV blocks (`swapped`, in host memory), prefill, decode."""

PARTS = ("queue", "preempted", "swapped", "prefill", "cache", "decode", "transfer", "host")
"""What a difference is attributed to: the stages, of which prefill and decode are cut further (`lab.analysis.parts`)
into model execution, KV transfers, the host's work, and what prefix-cache hits saved."""

STAGE_WORDS = {
    "queue": "queueing",
    "preempted": "waiting after preemption",
    "swapped": "waiting swapped out",
    "prefill": "prefill",
    "cache": "prefix-cache hits",
    "decode": "decode",
    "transfer": "KV transfers",
    "host": "the host",
}

STEP_PHASES = ("plan", "transfer", "prepare", "forward", "sample", "compact", "commit")
"""Stages that tile a step, control plane outside, data plane inside."""

_CAUSES = ("preempted", "swapped")
"""Causes of waiting that are stages of their own."""


class RunLike(Protocol):
    """The part of a run that analysis reads; `lab.analysis.runs.Run` is the one on disk."""

    @property
    def requests(self) -> pd.DataFrame: ...
    @property
    def steps(self) -> pd.DataFrame: ...
    @property
    def plans(self) -> pd.DataFrame: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def partial(self) -> str | bool | None: ...


def table_of(run: RunLike, table: str, columns: list[str]) -> pd.DataFrame:
    """A table of a run; an empty one of these columns where the run didn't keep it (`run.record=requests`, `steps`)."""
    import pandas as pd

    from lab.errors import RunError

    try:
        frame: pd.DataFrame = getattr(run, table)
    except RunError:
        if run.partial or (run.config.get("run") or {}).get("record", "everything") == "everything":
            raise
        return pd.DataFrame({column: [] for column in columns})
    return frame


def backend(run: RunLike) -> str:
    """`real`, `sim` or `""`: what the run's configuration says, else the name of its directory."""
    value = run.config.get("backend", "")
    if isinstance(value, Mapping):
        value = value.get("name", "")
    if value in ("real", "sim"):
        return str(value)
    path = getattr(run, "path", None)
    name = Path(path).name if path else ""
    return name if name in ("real", "sim") else ""


def name(run: RunLike) -> str:
    """What to call one run: its backend, else its directory, else `run`."""
    path = getattr(run, "path", None)
    return backend(run) or (Path(path).name if path else "") or "run"


def sides(a: RunLike, b: RunLike) -> tuple[tuple[str, str], tuple[str, str]]:
    """Keys and printed labels of a pair: `real`/`sim` where it is such a pair, else `a`/`b` and two names.

    The names are the ends of the runs' paths, as long as it takes to tell them apart: `sweep/0`, `sweep/1`.
    """
    backends = backend(a), backend(b)
    if set(backends) == {"real", "sim"}:
        return backends, backends
    paths = [Path(path).parts if (path := getattr(run, "path", None)) else () for run in (a, b)]
    for length in (1, 2, 3, 4):
        ends = [parts[-length:] for parts in paths]
        if ends[0] != ends[1] and all(_telling(end) for end in ends):
            return ("a", "b"), ("/".join(ends[0]), "/".join(ends[1]))
    return ("a", "b"), (f"{name(a)} (a)", f"{name(b)} (b)")


def _telling(end: tuple[str, ...]) -> bool:
    """Whether a path's end is more than a side's name or a sweep's number."""
    return len(end) > 1 or bool(end and not end[0].isdigit() and end[0] not in ("real", "sim", "replay"))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping under dotted names, in sorted order; lists count as leaves."""
    for key in sorted(tree, key=str):
        value = tree[key]
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a `metrics.json` under its dotted name (`ttft_ms.p50`)."""
    return {
        key: value
        for key, value in leaves(metrics)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def finished(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests that got all their tokens, indexed by id, with integer times and `e2e_ns`, `ttft_ns`."""
    done = requests[(requests["outcome"] == "finished") & requests["first_token_ns"].notna()]
    done = done.drop_duplicates("id").set_index("id", drop=False).sort_index()
    whole = dict.fromkeys(("arrival_ns", "first_token_ns", "last_token_ns", "end_ns"), "int64")
    done = done.astype(whole)
    return done.assign(
        e2e_ns=done["last_token_ns"] - done["arrival_ns"], ttft_ns=done["first_token_ns"] - done["arrival_ns"]
    )


def asked(run: RunLike) -> pd.DataFrame | None:
    """What each request of the run's workload asks for: id, arrival_ns, prompt_tokens, output (most tokens).

    None where the run has no workload table.
    """
    found: pd.DataFrame | None = getattr(run, "asked", None)
    return found


def stages_of(*runs: RunLike) -> tuple[str, ...]:
    """The stages to show for these runs: `swapped` only where anything was."""
    swapped = any("swapped" in set(intervals(run.requests)["stage"]) for run in runs)
    return tuple(stage for stage in STAGES if swapped or stage != "swapped")


def intervals(requests: pd.DataFrame) -> pd.DataFrame:
    """One row an interval: id, stage (of `STAGES`), start_ns, end_ns, first_step, last_step."""
    import pandas as pd

    rows = [
        (
            request,
            piece["cause"] if piece["phase"] == "queue" and piece["cause"] in _CAUSES else piece["phase"],
            piece["start_ns"],
            piece["end_ns"],
            piece.get("first_step", -1),
            piece.get("last_step", -1),
        )
        for request, pieces in zip(requests["id"], requests["intervals"], strict=True)
        for piece in _items(pieces)
    ]
    columns = ["id", "stage", "start_ns", "end_ns", "first_step", "last_step"]
    frame = pd.DataFrame.from_records(rows, columns=columns)
    return frame.astype(dict.fromkeys(columns[2:], "int64"))


def stage_times(done: pd.DataFrame, pieces: pd.DataFrame, until: str) -> pd.DataFrame:
    """Nanoseconds of each stage of each request, up to the moment in its column `until` (index id)."""
    clipped = pieces[pieces["id"].isin(done.index)]
    limit = done[until].reindex(clipped["id"]).to_numpy()
    lengths = clipped["end_ns"].clip(upper=limit) - clipped["start_ns"].clip(upper=limit)
    table = (
        lengths.groupby([clipped["id"], clipped["stage"]]).sum().unstack(fill_value=0)
        if len(clipped)
        else lengths.to_frame().iloc[:0]
    )
    return table.reindex(index=done.index, columns=list(STAGES), fill_value=0).astype("int64")


def gaps_ns(done: pd.DataFrame) -> NDArray[np.int64]:
    """Inter-token gaps of all requests pooled, nanoseconds."""
    import numpy as np

    parts = [
        np.diff(np.asarray(times, dtype=np.int64)) for times in done["token_times_ns"] if _size(times) > 1
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def tpot_ns(done: pd.DataFrame) -> pd.Series[float]:
    """Mean time per output token after the first, for requests with at least two (index id)."""
    several = done[done["output_tokens"] >= 2]
    return (several["last_token_ns"] - several["first_token_ns"]) / (several["output_tokens"] - 1)


def items(value: object) -> list[Any]:
    """A list column's cell as a list, whatever Parquet made of it (array, list, None)."""
    return list(_items(value))


def _items(value: object) -> Iterable[Any]:
    return value if isinstance(value, Sequence) or hasattr(value, "__array__") else ()  # type: ignore[return-value]


def _size(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0
