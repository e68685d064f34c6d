"""The fit of this machine's real engine: where it is kept, when it is made again, what stands in for it. Data plane.

A calibration belongs to a machine, a model and whatever else of the configuration changes a step's time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lab import plugins, ranks
from lab.backend import Backend, kv_blocks
from lab.config import Config, cache_dir
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.step import Limits
from sim.cost.linear import FORMAT, LinearCost

REFERENCE = Path(__file__).parent / "cost" / "reference.json"
"""Coefficients measured on a reference machine, for when this one hasn't been measured."""

NOISY_PCT = 50.0
"""A calibration whose repeats lie further apart than this (median over shapes) deserves a warning."""


def calibration_file(cfg: Config, environment: Mapping[str, str]) -> Path:
    """Where the fit for this machine, model, dtype, threads, ranks and step limits is kept."""
    key = {
        "format": FORMAT,
        "machine": [platform.node(), platform.machine(), _cpu()],
        "model": cfg.model.name,
        "dtype": cfg.model.dtype,
        "threads": cfg.engine.threads,
        "attention": cfg.engine.attention,
        **({"quantization": cfg.model.quantization} if cfg.model.quantization != "none" else {}),
        "engine": [cfg.engine.token_budget, cfg.engine.max_seqs],
        "kv": [cfg.kv.block_size],
    }
    if cfg.engine.device != "auto":
        key["device"] = cfg.engine.device
    if ranks.world(cfg) > 1:
        key["ranks"] = [cfg.engine.tensor_parallel, cfg.engine.pipeline_parallel]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    name = "".join(c if c.isalnum() else "-" for c in Path(cfg.model.name).name)
    return cache_dir(cfg, environment) / "calibration" / f"{name}-{cfg.model.dtype}-{digest}.json"


def fitted(cfg: Config, console: Console, beside: Backend | None) -> LinearCost:
    """The fit that is kept for this machine and model, or a new one, or the reference machine's."""
    path = calibration_file(cfg, os.environ)
    if path.exists() and not (cfg.cost.recalibrate and beside is not None):
        if cfg.cost.recalibrate:
            console.say("cost.recalibrate=true measures the real engine, so it needs backend=both.")
        cost = LinearCost.load(path)
        _warn_if_noisy(cost, console)
        measured = cost.measured_on.get("threads")
        if beside is not None and beside.about.get("threads") != measured:
            console.say(
                f"The calibration was made with {measured} threads and the engine runs with "
                f"{beside.about.get('threads')}: simulated durations will be off. cost.recalibrate=true measures again."
            )
        return cost
    if beside is None:
        console.say(
            "This machine has no calibration for this model: step times come from the reference machine "
            "(backend=both measures this one)."
        )
        return LinearCost.load(REFERENCE)
    cost = _calibrate(cfg, console, beside)
    _warn_if_noisy(cost, console)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(cost.to_json(), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        console.say(f"The calibration is used but can't be kept at '{path}': {error.strerror}.")
    return cost


def _warn_if_noisy(cost: LinearCost, console: Console) -> None:
    spread = cost.measured_on["quality"]["repeat_spread_pct"]
    if spread > NOISY_PCT:
        console.say(
            f"The calibration was made on a busy machine (equal batches took up to {spread:.0f} % longer from one "
            "time to the next): simulated durations will be off. cost.recalibrate=true measures again."
        )


def _calibrate(cfg: Config, console: Console, beside: Backend) -> LinearCost:
    from sim.calibrate import calibrate

    about = {**beside.about, "cpu": _cpu(), "capacity": asdict(beside.capacity)}
    with console.progress("Calibrating", 100) as update:
        cost = calibrate(
            beside.executor,
            plugins.create("policy", "fcfs"),
            plugins.create("eviction", "lru"),
            Limits(cfg.engine.token_budget, cfg.engine.max_seqs),
            about=about,
            notify=lambda done, total, what: update(round(100 * done / total), what),
        )
    quality = cost.measured_on["quality"]
    console.say(
        f"Calibrated on {quality['grid_shapes']} batch shapes: mean error {quality['grid_error_pct']['mean_abs']} % "
        f"on them, {quality['holdout_error_pct']['mean_abs']} % on {quality['holdout_steps']} steps it never saw."
    )
    kinds = quality["holdout_by_shape_pct"].items()
    console.say("On batches left out: " + ", ".join(f"{kind} {e['mean_abs']} %" for kind, e in kinds) + ".")
    return cost


def fitted_capacity(cfg: Config, cost: LinearCost) -> Capacity:
    """The data plane's, as configured and as the engine that was measured had it."""
    known = cost.measured_on.get("capacity", {})
    return Capacity(
        kv_blocks(cfg),
        cfg.kv.block_size,
        int(known.get("max_context", 8192)),
        int(known.get("vocab_size", 49152)),
        cfg.kv.host_blocks,
        int(known["block_bytes"]) * cfg.kv.block_size // int(known["block_size"]),
        cfg.kv.transfer_gb_s,
    )


def _cpu() -> str:
    from lab.observe.environment import cpu_model

    return cpu_model()
