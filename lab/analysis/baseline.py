"""What a later run is held against: one or more runs of one workload, kept as small JSON. Observation path.

A baseline has, of every run, the digest of its schedule (and of its beginnings, to say where another parts from
it), the headline metrics, each request's latencies, and, of an experiment on both backends, the simulator's errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.analysis.counterfactual import HEADLINES
from lab.analysis.files import write_atomic
from lab.analysis.frames import finished, leaves, scalars
from lab.analysis.runs import Run, load
from lab.errors import RunError, UnknownNameError

FORMAT = 1
FOLDER = Path("experiments") / "baselines"
MARKS = 32
"""At least so many beginnings of a schedule have their digests kept, where it is that long."""
MOST_REQUESTS = 256
"""Requests whose own latencies are kept; of more, evenly spread ones."""

METRICS: Mapping[str, int] = {
    "ttft_ms.p99": +1,
    "itl_ms.p99": +1,
    "e2e_ms.p99": +1,
    "throughput.output_tokens_per_s": -1,
    "goodput.attainment": -1,
    "kv.prefix_hit_ratio_tokens": -1,
    "preemptions": +1,
}
"""Metrics of a run that are compared; +1: more is worse."""


@dataclass(frozen=True)
class Measured:
    """One run, as far as a comparison needs it."""

    digest: str
    steps: int
    marks: dict[str, str]
    """Step to the digest of the schedule up to it; replica 0's."""
    metrics: dict[str, float]
    latencies_ns: dict[str, dict[str, int]]
    """`ttft` and `e2e` of each finished request."""
    errors_pct: dict[str, float] = field(default_factory=dict)
    """The simulator's error against the real engine, by metric."""
    parity: bool | None = None


@dataclass(frozen=True)
class Baseline:
    """Runs of one configuration and workload."""

    name: str
    about: dict[str, Any]
    """backend, clock, evidence, workload, policy, machine, version, revision, words (what was typed)."""
    config: dict[str, Any]
    runs: list[Measured]

    @property
    def exact(self) -> bool:
        """Whether the same code must give the same numbers: no time in them was measured."""
        return bool(self.about["evidence"] != "measured")

    def write(self, path: Path) -> None:
        """Raises `RunError` when that can't be done."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True, allow_nan=False)
        write_atomic(path, text + "\n")


def where(name: str, folder: Path = FOLDER) -> Path:
    """The file of a baseline: a path as it is, a bare name in `folder`."""
    return Path(name) if name.endswith(".json") or "/" in name else folder / f"{name}.json"


def read(path: Path) -> Baseline:
    """Raises `RunError`; for a bare name that isn't there, `UnknownNameError` with those that are."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise RunError(f"the baseline '{path}' has another format than {FORMAT}; record it again.")
        return Baseline(**{**found, "runs": [Measured(**run) for run in found["runs"]]})
    except FileNotFoundError:
        known = sorted(file.stem for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise UnknownNameError("baseline", path.stem, known, f"Looked in '{path.parent}'.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"can't read the baseline '{path}': {error}") from error


def gather(name: str, paths: Sequence[Path]) -> Baseline:
    """A baseline of these runs: repeats of one workload under one configuration.

    A path is a run directory, or that of an experiment on both backends: then it is the real side, and the
    simulator's errors come too. Raises `RunError` where they don't belong together.
    """
    found = [(path, *_measured(path)) for path in paths]
    first, about, config, _ = found[0]
    for path, other, other_config, _ in found[1:]:
        for key in ("workload", "backend", "evidence"):
            if other[key] != about[key]:
                raise RunError(
                    f"'{path}' and '{first}' differ in {key} ({other[key]} and {about[key]}); expected repeats."
                )
        changed = changes(config, other_config)
        if changed:
            raise RunError(f"'{path}' and '{first}' differ in {', '.join(changed)}; expected repeats.")
    return Baseline(name, about, config, [measured for *_, measured in found])


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Options in which two configurations differ, by their dotted names; those that only one version knows don't."""
    one, two = dict(leaves(a)), dict(leaves(b))
    return sorted(key for key in one.keys() & two.keys() if one[key] != two[key])


def _measured(path: Path) -> tuple[dict[str, Any], dict[str, Any], Measured]:
    both = (path / "diff.json").is_file() and (path / "real").is_dir()
    run = load(path / "real" if both else path)
    if run.partial:
        raise RunError(f"the run at '{run.path}' is partial ({run.partial}); a baseline takes whole ones.")
    errors: dict[str, float] = {}
    parity = None
    if both:
        said = json.loads((path / "diff.json").read_text(encoding="utf-8"))
        parity = said["replay"]["parity"]
        errors = {
            key: value
            for key in HEADLINES
            if (value := said["metrics"].get(key, {}).get("error_pct")) is not None
        }
    said, config = (
        run.environment,
        {key: value for key, value in run.config.items() if key not in ("run", "cache_dir")},
    )
    about = {
        "backend": said["backend"].get("name") or ("real" if said["evidence"] == "measured" else "sim"),
        "clock": said["clock"],
        "evidence": said["evidence"],
        "workload": _workload(run),
        "policy": config["policy"]["name"],
        "machine": f"{said['cpu']}, {said['cores']} cores",
        "revision": said["git"]["revision"],
        "words": [word for word in said["argv"][1:] if "=" in word and not word.startswith("run.")],
    }
    numbers = scalars(run.metrics)
    measured = Measured(
        digest=str(run.metrics["plan_digest"]),
        steps=int(numbers["steps"]),
        marks=_marks(run),
        metrics={key: numbers[key] for key in METRICS if key in numbers},
        latencies_ns=_latencies(run),
        errors_pct=errors,
        parity=parity,
    )
    return about, config, measured


def _workload(run: Run) -> str:
    """Names what the requests ask for, whatever else later versions let a request say."""
    h = hashlib.blake2b(digest_size=8)
    for request in sorted(run.workload(), key=lambda request: (request.arrival, request.id)):
        asked = (request.id, request.arrival, request.output_limit, request.prompt.pieces)
        h.update(repr(asked).encode())
    return h.hexdigest()


def _marks(run: Run) -> dict[str, str]:
    """After steps that are multiples of a power of two, so that runs of other lengths share most of them."""
    if not (run.path / "steps.parquet").is_file():
        return {}
    steps = run.steps[run.steps["replica"] == 0]
    stride = 1 << max(0, (len(steps) // MARKS).bit_length() - 1)
    kept = steps[steps["step"] % stride == 0]
    return {str(step): str(digest) for step, digest in zip(kept["step"], kept["digest"], strict=True)}


def _latencies(run: Run) -> dict[str, dict[str, int]]:
    done = finished(run.requests)
    kept = done.iloc[:: -(-len(done) // MOST_REQUESTS) or 1]
    return {
        what: {str(name): int(value) for name, value in kept[f"{what}_ns"].items()}
        for what in ("ttft", "e2e")
    }
