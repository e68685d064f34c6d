"""A device that needn't be there: its cost model and KV blocks, from descriptions of device and model. Data plane."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lab.config import MOST_BLOCKS, Config
from lab.control.executor import Capacity
from lab.errors import ConfigError
from lab.observe.bill import Power
from lab.topology import GroupConfig
from sim import hardware, model_shape
from sim.capacity import RESERVED_GIB, blocks_that_fit
from sim.cost.physical import GRAPH_SIZES, MEASURED, PERFECT, Coefficients, Parallel, PhysicalCost
from sim.cost.tables import TablesCost


def group_config(cfg: Config, group: GroupConfig) -> Config:
    """The configuration of one group's replicas: what it says of itself, else what `cost` says of all."""
    own: dict[str, Any] = {
        "hardware": group.hardware,
        "tensor_parallel": group.tp,
        "pipeline_parallel": group.pp,
        "microbatches": group.microbatches,
    }
    if group.hardware is not None and cfg.cost.name == "tables":
        raise ConfigError(
            f"hardware={group.hardware} of a replica group has no measured kernels: cost.tables are one device's; "
            "expected cost=physical or roofline."
        )
    cost = replace(cfg.cost, **{key: value for key, value in own.items() if value is not None})
    return replace(cfg, cost=cost)


def shaped_cost(cfg: Config, group: GroupConfig | None = None) -> PhysicalCost:
    """The cost model that `cost=roofline` and its like ask for; of a replica group."""
    wanted = cfg.cost
    shape = model_shape.load(wanted.model or cfg.model.name)
    shape = shape.quantised(wanted.weights or "", wanted.kv or "")
    parallel = Parallel(
        wanted.tensor_parallel or cfg.engine.tensor_parallel,
        wanted.pipeline_parallel or cfg.engine.pipeline_parallel,
        wanted.microbatches,
        *((group.ep or 1, group.imbalance) if group is not None else ()),
    )
    given = {field.name: getattr(wanted, field.name) for field in fields(Coefficients)}
    base = PERFECT if wanted.name == "roofline" else MEASURED
    coefficients = replace(base, **{key: value for key, value in given.items() if value is not None})
    device = hardware.load(wanted.hardware or hardware.USUAL)
    graphs = GRAPH_SIZES if cfg.mechanisms.graph_padding else ()
    if wanted.tables is None:
        return PhysicalCost(shape, device, coefficients, parallel, graphs)
    from sim.cost import table_files

    parallel.check(shape)
    kernels = table_files.load(Path(wanted.tables).expanduser(), shape, device, parallel)
    return TablesCost(shape, device, kernels, coefficients, parallel, graphs)


def described_capacity(cfg: Config, cost: PhysicalCost) -> Capacity:
    """KV blocks as configured, else as many as fit beside the model."""
    shape, size = cost.shape, cfg.kv.block_size
    blocks = cfg.kv.blocks or blocks_that_fit(
        shape,
        cost.hardware,
        utilization=cfg.engine.memory_utilization,
        block_size=size,
        token_budget=cfg.engine.token_budget,
        max_seqs=cfg.engine.max_seqs,
        parallel=cost.parallel,
        reserved_gib=RESERVED_GIB if cfg.cost.reserved_gib is None else cfg.cost.reserved_gib,
    )
    return Capacity(
        min(blocks, MOST_BLOCKS),
        size,
        shape.max_context,
        shape.vocab,
        cfg.kv.host_blocks,
        round(shape.kv_bytes_per_token * size),
        cfg.kv.transfer_gb_s,
    )


def power(cost: PhysicalCost) -> Power:
    """What one replica draws and costs."""
    device = cost.hardware
    return Power(cost.parallel.devices, device.idle_w, device.tdp_w, device.price_per_hour)
