"""The command line. `shared` has `measured/`, `gpu_tables/` and `traces/`; what isn't there is left out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.fidelity import ablations, gate, kernels, vllm_run
from experiments.benchmarks.fidelity.workloads import Named, asked_again, offered
from lab.cli import guarded
from lab.control.request import Request
from lab.errors import ConfigError

if TYPE_CHECKING:
    from experiments.benchmarks.fidelity.own import Setup

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("run", "kernels", "ablations", "own")
OPTIONS = {
    "shared": "folder with measured/, gpu_tables/ and traces/ (DIPTYCH_SHARED, or ../shared)",
    "dir": "own: where runs and calibration are kept (runs/fidelity)",
    "model": "own: smollm2 or tiny",
    "count": "own: requests a workload (60)",
    "repeats": "own: real runs of each workload (3)",
    "threads": "own: torch's threads (its own choice)",
    "scale": "own: lengths are divided by so much more (1)",
    "only": "own: workloads whose name has this in it",
    "seconds": "own: measure for so long, then stop; call again to go on",
    "baseline": "the errors to hold against (experiments/baselines/fidelity.json)",
    "out": "write everything as JSON here",
    "markdown": "write the tables of docs/fidelity.md here",
    "pictures": "draw the figures into this folder",
}
AZURE = Named(
    "Azure conversation", "azure_2023_conv", {"offset": 2000, "limit": 600}, "azure_2023_conv.csv.gz"
)
AZURE_RATE = 2.5


def shared() -> Path:
    return Path(os.environ.get("DIPTYCH_SHARED", ROOT.parent / "shared"))


def deterministic(root: Path, parts: Sequence[str] = PARTS, *, control: bool = True) -> dict[str, Any]:
    """Everything that two runs agree on, of what `root` has (and of `control`: see `ablations.table`)."""
    found: dict[str, Any] = {}
    runs = sorted(path.parent for path in (root / "measured").glob("*/requests.jsonl"))
    if "run" in parts and runs:
        found["run"] = vllm_run.compare(runs[0])
    if "kernels" in parts and (root / "gpu_tables").is_dir():
        found["kernels"] = kernels.compare(root / "gpu_tables")
    if "ablations" in parts and runs:
        case = vllm_run.described(runs[0])
        workloads: dict[str, list[Request]] = {"vLLM run": vllm_run.workload(runs[0])}
        if (root / "traces" / AZURE.file).is_file():
            azure = AZURE.requests(root / "traces")
            workloads[AZURE.name] = offered(azure, AZURE_RATE)
            half = azure[: len(azure) // 2]
            workloads["asked again"] = offered(asked_again(half, case.block_size), AZURE_RATE)
        found["ablations"] = {
            name: ablations.table(case, requests, control=control) for name, requests in workloads.items()
        }
    return found


def own(options: dict[str, str], root: Path) -> dict[str, Any] | None:
    """Measure what is missing and, when nothing is, predict it. None: not finished yet."""
    from experiments.benchmarks.fidelity.own import measure
    from experiments.benchmarks.fidelity.prediction import compare

    setup = _setup(options, root)
    if not measure(setup, float(options.get("seconds", "inf"))):
        return None
    found = compare(setup)
    (setup.directory / "own.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _setup(options: dict[str, str], root: Path) -> Setup:
    from experiments.benchmarks.fidelity.own import Setup

    numbers = {key: int(options[key]) for key in ("count", "repeats", "threads", "scale") if key in options}
    traces = root / "traces"
    return Setup(
        Path(options.get("dir", "runs/fidelity")),
        model=options.get("model", "smollm2"),
        traces=traces if traces.is_dir() else None,
        only=options.get("only", ""),
        **numbers,
    )


def main(words: Sequence[str]) -> int:
    flags = {word for word in words if word.startswith("--")}
    options = dict(word.split("=", 1) for word in words if "=" in word)
    parts = [word for word in words if "=" not in word and word not in flags]
    known = ("--check", "--record")
    for given, among in ((flags, known), (options, OPTIONS), (parts, PARTS)):
        for word in given:
            if word not in among:
                listed = "\n".join(f"  {name}=  {about}" for name, about in OPTIONS.items())
                raise ConfigError(
                    f"'{word}' is unknown; expected of {', '.join(PARTS)}, of {', '.join(known)}, and options\n{listed}"
                )
    root = Path(options.get("shared", shared()))
    found = deterministic(root, parts or PARTS)
    if "own" in parts:
        predicted = own(options, root)
        if predicted is None:
            return 0
        found["own"] = predicted
    if not found:
        raise ConfigError(f"'{root}' has none of measured/, gpu_tables/ and traces/; set shared=DIR.")
    _say(found)
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "markdown" in options:
        from experiments.benchmarks.fidelity.markdown import tables

        Path(options["markdown"]).write_text(tables(found), encoding="utf-8")
    if "pictures" in options:
        _draw(found, root, options)
    baseline = Path(options.get("baseline", ROOT / gate.FILE))
    if "--record" in flags:
        gate.record(found, baseline)
        print(f"baseline: {baseline}")
    if "--check" in flags:
        grown = gate.check(found, baseline)
        print("\n".join(grown) or "no error has grown by more than its noise")
        return 1 if grown else 0
    return 0


def _say(found: dict[str, Any]) -> None:
    if "run" in found:
        print(vllm_run.show(found["run"]))
    if "kernels" in found:
        print(kernels.show(found["kernels"]))
    for name, table in found.get("ablations", {}).items():
        print(ablations.show(table, name))
    if "own" in found:
        from experiments.benchmarks.fidelity import prediction

        print(prediction.show(found["own"]))


def _draw(found: dict[str, Any], root: Path, options: dict[str, str]) -> None:
    from experiments.benchmarks.fidelity import pictures

    out = Path(options["pictures"])
    if "run" in found:
        pictures.curves(root / "measured" / found["run"]["run"], out)
    if "ablations" in found:
        pictures.ablations(found["ablations"], out)
    if "own" in found:
        pictures.errors(found["own"], out)
        pictures.timelines(*_pair(options, found["own"]["workloads"], root), out)


def _pair(options: dict[str, str], workloads: Sequence[str], root: Path) -> tuple[Any, Any, str]:
    """(a real run, its prediction, its name) for the picture of one workload: the starved one where it is there."""
    import tempfile

    from experiments.benchmarks.fidelity.own import simulate

    setup = _setup(options, root)
    name = "little KV" if "little KV" in workloads else list(workloads)[-1]
    workload = next(w for w in setup.workloads() if w.name == name)
    with tempfile.TemporaryDirectory(prefix="diptych-fidelity-") as temporary:
        sim = simulate(setup, setup.config(), setup.fit(), workload, Path(temporary) / "sim")
        assert len(sim.steps)  # read before the directory is gone
    return setup.ran(name)[0], sim, name


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
