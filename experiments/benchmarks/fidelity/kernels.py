"""The physical model beside steps made of measured kernels, and interpolation beside points that were left out."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lab.control.plan import Decoding, Work
from sim import hardware, model_shape
from sim.cost import table_files
from sim.cost.curves import Curve
from sim.cost.physical import ALONE, PhysicalCost
from sim.cost.tables import TablesCost

FOLDERS = {"a100_sxm": "a100_80g"}
MODELS = ("llama-3.1-8b", "qwen2.5-7b")

SHAPES: dict[str, tuple[Decoding, tuple[Work, ...]]] = {
    "1 decode at 1,000": (Decoding(1, 1000, 1000), ()),
    "32 decodes at 1,000": (Decoding(32, 32_000, 1000), ()),
    "128 decodes at 1,000": (Decoding(128, 128_000, 1000), ()),
    "prompt of 512": (Decoding(), (Work("a", 0, 512, True),)),
    "prompt of 2,048": (Decoding(), (Work("a", 0, 2048, True),)),
    "32 decodes + 512": (Decoding(32, 32_000, 1000), (Work("a", 0, 512, True),)),
}


def compare(root: Path) -> dict[str, Any]:
    """For each device and model: the physical model's error by shape, percent of a step, and the interpolation's."""
    found: dict[str, Any] = {}
    for directory in sorted(path for path in root.iterdir() if (path / "gemm_perf.parquet").is_file()):
        device = hardware.load(FOLDERS.get(directory.name, directory.name))
        for name in MODELS:
            shape = model_shape.load(name)
            kernels = table_files.load(directory, shape, device, ALONE)
            tables, physical = TablesCost(shape, device, kernels), PhysicalCost(shape, device)
            errors = {
                label: 100
                * (physical.cost_of(decodes, items).total / tables.cost_of(decodes, items).total - 1)
                for label, (decodes, items) in SHAPES.items()
            }
            found[f"{device.name}, {name}"] = {
                "physical_pct": errors,
                "interpolation_pct": left_out(kernels.linear),
            }
    return found


def left_out(curve: Curve) -> float:
    """Mean error of the line between two neighbours at the point between them, percent."""
    xs, ys = curve.xs, curve.ys
    gaps = []
    for i in range(1, len(xs) - 1):
        share = (xs[i] - xs[i - 1]) / (xs[i + 1] - xs[i - 1])
        line = ys[i - 1] + share * (ys[i + 1] - ys[i - 1])
        gaps.append(100 * abs(line / ys[i] - 1))
    return statistics.fmean(gaps)


def show(found: dict[str, Any]) -> str:
    lines = ["physical model against measured kernels, % of the step"]
    lines.append(f"  {'':26}" + "".join(f"{label:>22}" for label in SHAPES) + "   linear layers left out")
    for name, row in found.items():
        cells = "".join(f"{row['physical_pct'][label]:+22.1f}" for label in SHAPES)
        lines.append(f"  {name:26}{cells}   {row['interpolation_pct']:.1f} %")
    return "\n".join(lines)
