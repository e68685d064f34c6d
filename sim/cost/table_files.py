"""Measured kernels from files: aiconfigurator's Parquet tables, or Vidur's profiling CSV. Data plane.

Both measure one device. Each is reduced at once to the curves of one model, laid out as it will run, so that a
simulated step costs a few look-ups whatever the tables' size. What a table lacks (a width of heads, a data type)
is scaled from the nearest that it has by the roofline, and noted.

- aiconfigurator (Apache-2.0): `gemm_perf`, `context_attention_perf`, `generation_attention_perf`,
  `custom_allreduce_perf`, `moe_perf`; milliseconds; sizes of messages in elements.
- Vidur (MLSys 2024): `mlp.csv`, `attention.csv`, `all_reduce.csv`; milliseconds; sizes of messages in bytes.
"""

from __future__ import annotations

import bisect
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.errors import ConfigError
from sim.cost.curves import Curve, Surface, blend
from sim.cost.physical import PERFECT, Parallel, PhysicalCost
from sim.cost.tables import Kernels
from sim.hardware import Hardware
from sim.model_shape import ModelShape

MS = 1e-3
Row = Mapping[str, Any]


def load(directory: Path, shape: ModelShape, hardware: Hardware, parallel: Parallel) -> Kernels:
    """One model's kernels from whichever kind of tables lies there. Raises `ConfigError` in one sentence."""
    bound = PhysicalCost(shape, hardware, PERFECT, parallel)
    try:
        for file, read in (("gemm_perf.parquet", _measured), ("mlp.csv", _vidur)):
            if (directory / file).is_file():
                found = read(directory, bound)
                if parallel.groups > 1:
                    found.notes.append(
                        "all-to-alls between devices with experts weren't measured, so they are the physical model's"
                    )
                return found
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(f"tables in '{directory}' can't be used: {error!r}") from error
    raise ConfigError(
        f"no tables in '{directory}'; expected gemm_perf.parquet and its like (aiconfigurator), or mlp.csv and "
        "attention.csv (Vidur)"
    )


def _measured(directory: Path, bound: PhysicalCost) -> Kernels:
    return _Tables(directory, bound).kernels()


class _Tables:
    """aiconfigurator's."""

    def __init__(self, directory: Path, bound: PhysicalCost) -> None:
        self._directory, self._bound = directory, bound
        self._shape, self._tensor = bound.shape, bound.parallel.tensor
        self._notes: list[str] = []

    def kernels(self) -> Kernels:
        shape, tensor, bound = self._shape, self._tensor, self._bound
        products, head, sparse = self._products()
        gemms = self._gemms(
            {"bfloat16": "bfloat16", "fp8": "fp8"}.get(shape.weights or shape.dtype, "bfloat16")
        )
        sizes = sorted({m for m, _, _ in gemms})
        plane = _planes(gemms)
        linear: dict[float, float] = {
            m: sum(count * self._product(plane, m, n, k) for (n, k), count in products.items()) for m in sizes
        }
        found = Kernels(
            linear=Curve(linear, bound.dense_time),
            head=Curve({m: self._product(plane, m, *head) for m in sizes}, bound.head),
            context=self._context(),
            generation=self._generation(),
            source=str(self._directory),
        )
        if sparse:
            found.experts = self._experts(sparse)
        if tensor > 1:
            found.reduce = self._reduce()
        found.notes = list(dict.fromkeys(self._notes))
        return found

    def _products(self) -> tuple[dict[tuple[int, int], int], tuple[int, int], int]:
        """(n, k) of every product and how often it is done in a step, those of the head, and layers with experts."""
        shape, t = self._shape, self._tensor
        h = shape.hidden
        found: dict[tuple[int, int], int] = defaultdict(int)
        layers = shape.layers
        if shape.mla is None:
            kv = -(-shape.kv_heads // t) * shape.head_dim
            found[(shape.heads * shape.head_dim // t + 2 * kv, h)] += layers
            found[(h, shape.heads * shape.head_dim // t)] += layers
        else:
            mla, heads = shape.mla, shape.heads // t
            query = heads * (mla.nope + mla.rope)
            if mla.q_rank is None:
                found[(query + mla.kv_rank + mla.rope, h)] += layers
            else:
                found[(mla.q_rank + mla.kv_rank + mla.rope, h)] += layers
                found[(query, mla.q_rank)] += layers
            found[(heads * (mla.nope + mla.value), mla.kv_rank)] += layers
            found[(h, heads * mla.value)] += layers
        sparse = sum(kind.count for kind in shape.kinds if kind.sparse)
        widths = [(shape.intermediate, layers - sparse)]
        if shape.mixture is not None:
            widths.append((shape.mixture.shared, sparse))
            found[(shape.mixture.count, h)] += sparse
        for width, count in widths:
            if width and count:
                found[((shape.matrices - 1) * width // t, h)] += count
                found[(h, width // t)] += count
        return found, (shape.vocab // t, h), sparse

    def _rows(self, name: str, **want: Any) -> list[dict[str, Any]]:
        import pyarrow.parquet as parquet

        filters = [(key, "in" if isinstance(value, set) else "==", value) for key, value in want.items()]
        path = self._directory / f"{name}_perf.parquet"
        return list(parquet.read_table(path, filters=filters or None).to_pylist())

    def _gemms(self, dtype: str) -> dict[tuple[int, int, int], float]:
        rows = self._rows("gemm", gemm_dtype=dtype)
        if not rows:
            self._notes.append(f"there are no products in {dtype}, so those in bfloat16 stand in")
            rows = self._rows("gemm", gemm_dtype="bfloat16")
        elif self._shape.weights in ("int4", "int8"):
            self._notes.append(f"products with {self._shape.weights} weights are as those in bfloat16")
        return {(row["m"], row["n"], row["k"]): row["latency"] * MS for row in rows}

    def _product(self, plane: Mapping[int, _Plane], m: int, n: int, k: int) -> float:
        took, inside = plane[m](n, k)
        if inside:
            return took
        self._notes.append(f"a product of {n} x {k} lies beyond the tables and grows as the roofline does")
        near_n, near_k = plane[m].nearest(n, k)
        return took * self._roof(m, n, k) / self._roof(m, near_n, near_k)

    def _roof(self, m: float, n: int, k: int) -> float:
        shape, device = self._shape, self._bound.hardware
        peak = device.peak("fp8" if shape.weights == "fp8" else shape.dtype)
        return max(2 * m * n * k / peak, n * k * shape.weight_width / device.memory_bytes_s)

    # -- attention -------------------------------------------------------------------------------------

    def _heads(self) -> tuple[int, int]:
        return self._shape.heads // self._tensor, -(-self._shape.kv_heads // self._tensor)

    def _attention(self, name: str, keys: Callable[[Row], Any]) -> dict[Any, float] | None:
        """Times by `keys` for this model's heads: between the nearest numbers of query heads at the nearest number
        of KV heads, then scaled to its own of those and to its head size."""
        shape = self._shape
        if shape.mla is not None:
            self._notes.append("attention over a latent KV wasn't measured, so it is the roofline's")
            return None
        kv_dtype = {"fp8": "fp8", "int8": "fp8"}.get(shape.kv, "bfloat16")
        rows = self._rows(name, kv_cache_dtype=kv_dtype)
        scale = 1.0
        if not rows:
            self._notes.append(
                f"there is no attention with {kv_dtype} KV, so that in bfloat16 stands in, halved"
            )
            rows, scale = self._rows(name, kv_cache_dtype="bfloat16"), 0.5
        heads, kv_heads = self._heads()
        there = sorted({row["num_key_value_heads"] for row in rows if row["num_key_value_heads"] <= heads})
        near_kv = min(there, key=lambda n: (abs(n - kv_heads), -n))
        rows = [row for row in rows if row["num_key_value_heads"] == near_kv]
        if near_kv != kv_heads:
            self._notes.append(f"attention with {kv_heads} KV heads is scaled from {near_kv}")
            scale *= kv_heads / near_kv
        if shape.head_dim != rows[0]["head_dim"]:
            self._notes.append(
                f"attention with heads of {shape.head_dim} is scaled from {rows[0]['head_dim']}"
            )
            scale *= shape.head_dim / rows[0]["head_dim"]
        by_size: dict[Any, dict[int, float]] = defaultdict(dict)
        for row in rows:
            by_size[keys(row)][row["num_heads"]] = row["latency"] * MS * scale
        return {size: blend(sorted(times.items()), heads) for size, times in by_size.items()}

    def _context(self) -> Curve | None:
        bound = self._bound

        def pick(row: Row) -> tuple[int, int]:
            return (row["batch_size"], row["isl"])

        times = self._attention("context_attention", pick)
        if times is None:
            return None
        kind = bound.shape.kinds[0]
        plain = type(kind)(kind.count, None, kind.sparse)
        return Curve(
            {isl: took for (batch, isl), took in times.items() if batch == 1},
            lambda n: bound.chunk_s(round(n), round(n), plain),
        )

    def _generation(self) -> Surface | None:
        bound = self._bound
        times = self._attention("generation_attention", lambda row: (row["batch_size"], row["step"] + 1))
        if times is None:
            return None
        return Surface(times, lambda seqs, context: seqs * context * bound.token_s)

    # -- the rest --------------------------------------------------------------------------------------

    def _experts(self, layers: int) -> Curve | None:
        shape, mixture, parallel = self._shape, self._shape.mixture, self._bound.parallel
        assert mixture is not None
        even = PhysicalCost(shape, self._bound.hardware, PERFECT, replace(parallel, imbalance=1.0))
        want = {"hidden_size": shape.hidden, "inter_size": mixture.size, "topk": mixture.per_token}
        want |= {"num_experts": mixture.count}
        want |= {"moe_tp_size": parallel.expert_cut, "moe_ep_size": parallel.expert}
        rows = self._rows("moe", moe_dtype="fp8" if shape.weights == "fp8" else "bfloat16", **want)
        if not rows:
            self._notes.append(
                "a mixture of experts like this, laid out like this, wasn't measured, so it is the physical model's"
            )
            return None
        spread = min(row["distribution"] for row in rows)  # balanced, where there is that
        if spread != "balanced":
            self._notes.append(f"experts were measured under a {spread} choice, not an even one")
        points = {
            row["num_tokens"]: layers * row["latency"] * MS for row in rows if row["distribution"] == spread
        }
        return Curve(points, even.expert_time)

    def _reduce(self) -> Curve | None:
        rows = self._rows("custom_allreduce", num_gpus=self._tensor, backend="vllm_graph")
        if not rows:
            self._notes.append(
                f"an all-reduce of {self._tensor} devices wasn't measured, so it is the physical model's"
            )
            return None
        points = {row["message_size"] * 2.0: row["latency"] * MS for row in rows}  # bfloat16
        return Curve(points, self._bound.reduce_s)


class _Plane:
    """Times of products of one height over (n, k): bilinear inside, the nearest edge outside."""

    def __init__(self, times: Mapping[tuple[int, int], float]) -> None:
        self._by_k: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for (n, k), took in sorted(times.items()):
            self._by_k[k].append((n, took))
        self._ks = sorted(self._by_k)

    def nearest(self, n: int, k: int) -> tuple[int, int]:
        """What lies inside: a corner of the grid may be missing, so n's reach depends on k."""
        near = min(max(k, self._ks[0]), self._ks[-1])
        rows = [self._by_k[one] for one in self._around(near)]
        low, high = max(row[0][0] for row in rows), min(row[-1][0] for row in rows)
        return int(min(max(n, low), high)), near

    def _around(self, k: int) -> list[int]:
        at = bisect.bisect_left(self._ks, k)
        return [k] if self._ks[at] == k else self._ks[at - 1 : at + 1]

    def __call__(self, n: int, k: int) -> tuple[float, bool]:
        at, near = self.nearest(n, k)
        took = blend([(one, blend(self._by_k[one], at)) for one in self._around(near)], near)
        return took, (at, near) == (n, k)


def _planes(gemms: Mapping[tuple[int, int, int], float]) -> dict[int, _Plane]:
    by_m: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
    for (m, n, k), took in gemms.items():
        by_m[m][n, k] = took
    return {m: _Plane(times) for m, times in by_m.items()}


# --- Vidur ---------------------------------------------------------------------------------------------------

_LAYER = {
    "input_layernorm": 1,
    "attn_pre_proj": 1,
    "attn_rope": 1,
    "attn_post_proj": 1,
    "post_attention_layernorm": 1,
    "mlp_up_proj": 1,
    "mlp_act": 1,
    "mlp_down_proj": 1,
    "add": 2,
}
"""What a layer consists of beside attention, and how often."""


def _vidur(directory: Path, bound: PhysicalCost) -> Kernels:
    shape, tensor = bound.shape, bound.parallel.tensor
    rows = [row for row in _csv(directory / "mlp.csv") if int(row["num_tensor_parallel_workers"]) == tensor]
    sizes = {int(row["n_embd"]) for row in rows}
    if sizes != {shape.hidden}:
        raise ConfigError(
            f"mlp.csv in '{directory}' was measured with a hidden size of {sorted(sizes)} on {tensor} devices; "
            f"{shape.name} has {shape.hidden}"
        )
    notes = ["Vidur's tables have no LM head, so it is the physical model's"]
    linear: dict[float, float] = {}
    for row in rows:
        layer = sum(count * _median(row, name) for name, count in _LAYER.items())
        linear[float(row["num_tokens"])] = shape.layers * layer
    found = Kernels(
        linear=Curve(linear, bound.dense_time),
        source=str(directory),
        notes=notes,
    )
    attention = directory / "attention.csv"
    if attention.is_file():
        _vidur_attention(attention, bound, found)
    else:
        notes.append("there is no attention.csv, so attention is the roofline's")
    reduce = directory / "all_reduce.csv"
    if tensor > 1 and reduce.is_file():
        points = {
            float(row["size"]): _median(row, "all_reduce")
            for row in _csv(reduce)
            if int(row["num_workers"]) == tensor
        }
        found.reduce = Curve(points, bound.reduce_s) if points else None
    return found


def _vidur_attention(path: Path, bound: PhysicalCost, found: Kernels) -> None:
    context: dict[float, float] = {}
    generation: dict[tuple[float, float], float] = {}
    heads = (bound.shape.heads, bound.shape.kv_heads)
    for row in _csv(path):
        if int(row["num_tensor_parallel_workers"]) != bound.parallel.tensor:
            continue
        if (int(row["n_q_head"]), int(row["n_kv_head"])) != heads:
            raise ConfigError(f"'{path}' was measured with other heads than {bound.shape.name}'s {heads}")
        batch, cached = float(row["batch_size"]), float(row["kv_cache_size"])
        if row["is_prefill"] == "True":
            if batch == 1 and cached == 0:
                context[float(row["prefill_chunk_size"])] = _median(row, "attn_prefill")
        else:
            generation[batch, cached + 1] = _median(row, "attn_decode")
    kind = bound.shape.kinds[0]
    plain = type(kind)(kind.count, None, kind.sparse)
    if context:
        found.context = Curve(context, lambda n: bound.chunk_s(round(n), round(n), plain))
    if generation:
        found.generation = Surface(generation, lambda seqs, each: seqs * each * bound.token_s)


def _csv(path: Path) -> Iterable[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _median(row: Mapping[str, str], name: str) -> float:
    """Seconds; 0 for what wasn't measured apart."""
    return float(row.get(f"time_stats.{name}.median") or 0.0) * MS
