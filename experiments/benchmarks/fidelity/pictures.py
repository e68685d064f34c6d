"""The figures of docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.fidelity import vllm_run
from experiments.benchmarks.fidelity.case import summary
from experiments.benchmarks.fidelity.prediction import TARGETS
from lab.analysis.drawing import _STYLE, SIDE_COLOURS
from lab.analysis.runs import Run

WIDTH = 7.2
DPI = 90


def _figure(*shape: int, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(_STYLE)
    return pyplot.subplots(*shape, figsize=(WIDTH, height), layout="constrained")


def curves(run: Path, out: Path) -> None:
    """Running, waiting and KV % of the real vLLM run, measured and simulated; and E2E's distribution."""
    seen = vllm_run.described(run).run(vllm_run.workload(run))
    figure, axes = _figure(4, 1, height=6.4)
    for axis, (name, points) in zip(axes, vllm_run.curves(seen, run).items(), strict=False):
        seconds, real, sim = zip(*points, strict=True)
        axis.plot(seconds, real, color=SIDE_COLOURS["real"], label="measured", linewidth=1.2)
        axis.plot(seconds, sim, color=SIDE_COLOURS["sim"], label="simulated", linewidth=1.2)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    axes[2].set_xlabel("s")
    axes[0].legend(ncols=2, loc="lower center")
    for values, side in ((vllm_run.measured(run), "real"), (seen.latencies(), "sim")):
        ordered = sorted(values["E2E"])
        share = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes[3].step(ordered, share, where="post", color=SIDE_COLOURS[side], linewidth=1.2)
        axes[3].axvline(summary(values)["E2E mean"], color=SIDE_COLOURS[side], linewidth=0.8, linestyle=":")
    axes[3].set_xlabel("E2E, s (dotted: mean)")
    axes[3].set_ylabel("share of requests")
    axes[0].set_title("One vLLM 0.19 run on an RTX 4090, and its simulation from the description alone")
    _save(figure, out / "fidelity-vllm.png")


def errors(found: Mapping[str, Any], out: Path) -> None:
    """Own engine: each workload's errors, as calibrated and at the machine's pace, on the repeats' spread as a band."""
    rows = found["workloads"]
    shown = ("TTFT mean", "TTFT p50", "TTFT p99", "TPOT mean", "E2E mean")
    figure, axes = _figure(1, len(shown), height=0.24 * len(rows) + 1.3)
    names = list(rows)
    for axis, what in zip(axes, shown, strict=True):
        for place, name in enumerate(names):
            row = rows[name]
            if what not in row["errors_pct"]:
                continue
            half = row["repeats_spread_pct"][what] / 2
            axis.barh(place, 2 * half, left=-half, color="#DDDDDD", height=0.8)
            for errors, filled in (("as_calibrated_pct", "none"), ("errors_pct", SIDE_COLOURS["sim"])):
                axis.plot(
                    row[errors][what],
                    place,
                    "o",
                    color=SIDE_COLOURS["sim"],
                    markerfacecolor=filled,
                    markersize=4,
                )
        if what in TARGETS:
            for end in (-TARGETS[what], TARGETS[what]):
                axis.axvline(end, color="#888888", linewidth=0.8, linestyle=":")
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_title(what)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), names if what == shown[0] else [""] * len(names))
        axis.set_xlabel("%")
    legend = (
        "filled: at the machine's pace; hollow: as calibrated; grey: the engine's repeats; dotted: target"
    )
    figure.suptitle(legend, fontsize="small")
    _save(figure, out / "fidelity-own.png")


def ablations(found: Mapping[str, Mapping[str, Mapping[str, float]]], out: Path) -> None:
    """Change of mean E2E and TTFT without each mechanism, on each deployment."""
    figure, axes = _figure(1, 2, height=3.6)
    colours = list(SIDE_COLOURS.values())
    for axis, what in zip(axes, ("TTFT", "E2E"), strict=True):
        for place, (title, table) in enumerate(list(found.items())[:2]):
            names = [name for name in table if not name.startswith("(")]
            at = [i + 0.4 * place for i in range(len(names))]
            axis.barh(at, [table[n][what] for n in names], height=0.38, color=colours[place], label=title)
        axis.set_yticks([i + 0.2 for i in range(len(names))], names if what == "TTFT" else [""] * len(names))
        axis.invert_yaxis()
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_xlabel(f"change of mean {what} without it, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    _save(figure, out / "fidelity-ablations.png")


def timelines(real: Run, sim: Run, name: str, out: Path) -> None:
    """One own-engine workload: running and waiting, measured and predicted."""
    figure, axes = _figure(2, 1, height=3.2)
    for axis, column in zip(axes, ("running", "waiting"), strict=True):
        for run, side in ((real, "real"), (sim, "sim")):
            steps = run.steps
            axis.step(
                steps["start_ns"] / 1e9, steps[column], where="post", color=SIDE_COLOURS[side], linewidth=1.0,
                label={"real": "measured", "sim": "predicted"}[side],
            )  # fmt: skip
        axis.set_ylabel(column)
    axes[1].set_xlabel("s")
    axes[0].legend(ncols=2)
    axes[0].set_title(f"SmolLM2 on our own engine: {name}")
    _save(figure, out / "fidelity-timeline.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    print(path)
