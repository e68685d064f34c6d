"""Other simulators on the requests of simulator.py: Vidur, and BLIS. They come as checkouts; nothing of them is here.

Both get the same arrivals and lengths, steps of 512 tokens and 256 requests at once, blocks of 16, one replica of an 8B
model on one device. Their durations are their own.

- **Vidur** (MLSys 2024, github microsoft/vidur): its own Python with numpy, pandas, scikit-learn, wandb, kaleido,
  ddsketch, plotly_express, matplotlib, seaborn, fasteners. Its predictor is its default, random forests, at one point
  of its grid of 27 and with two folds: the forests only fill tables before the simulation begins, which are kept in
  the checkout's `cache/`. A run fills them first, unmeasured. Where the checkout lacks the table of attention (9 MB),
  attention comes from this simulator's physical model, written in that table's format.
- **BLIS** (github inference-sim/inference-sim), built with `go build -o blis .` in its checkout.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lab.control.request import Request

CHUNK, SEQUENCES, LONGEST = 512, 256, 16_384


class Took(NamedTuple):
    """What a process of its own took."""

    wall: float
    cpu: float
    memory: float
    """Peak, MB."""


class Row(NamedTuple):
    """One way of running another simulator."""

    name: str
    took: Took
    start: float
    """Seconds that the same command takes for a single request."""
    batch: float | None
    """Requests in a step, on average, where it tells."""


def timed(
    command: Sequence[str], folder: Path, cores: set[int] | None = None, home: str | None = None
) -> Took:
    """Runs it, in `home`; raises with the end of what it said when it fails."""
    began = time.perf_counter()
    with (folder / "said").open("w+") as said:
        child = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=home,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores) if cores else None,
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}: it failed\n{said.read()[-2000:]}")
    return Took(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


# --- Vidur ---------------------------------------------------------------------------------------------------

MODEL, DEVICE = "meta-llama/Meta-Llama-3-8B", "a100"
_FOREST = "random_forrest_execution_time_predictor_config"


def vidur(checkout: str, python: str, requests: Sequence[Request], folder: Path) -> Iterator[Row]:
    """Without metrics, then with those that it writes by default (its plots apart: they need a browser)."""
    checkout = str(Path(checkout).resolve())
    python = (
        python if os.sep not in python else os.path.abspath(python)
    )  # a link into an environment stays one
    attention = Path(checkout, "data", "profiling", "compute", DEVICE, MODEL, "attention.csv")
    if not attention.is_file():
        print(f"Vidur: no {attention.name} for {MODEL} on {DEVICE}; attention is the physical model's")
        attention = Path(checkout, "cache", "physical_attention.csv")
        attention.parent.mkdir(exist_ok=True)
        attention.write_text("\n".join(attention_rows()) + "\n")
    core = {min(os.sched_getaffinity(0))}
    for name, trace in (("one", requests[:1]), ("all", requests)):
        rows = (f"{r.arrival / 1e9},{len(r.prompt)},{r.output_limit}" for r in trace)
        text = "\n".join(("arrived_at,num_prefill_tokens,num_decode_tokens", *rows))
        (folder / f"{name}.csv").write_text(text + "\n")

    def command(name: str, metrics: bool) -> list[str]:
        words = {
            "replica_config_device": DEVICE,
            "replica_config_model_name": MODEL,
            "cluster_config_num_replicas": 1,
            "replica_config_tensor_parallel_size": 1,
            "replica_config_num_pipeline_stages": 1,
            "request_generator_config_type": "trace_replay",
            "trace_request_generator_config_trace_file": folder / f"{name}.csv",
            "trace_request_generator_config_max_tokens": LONGEST,
            "replica_scheduler_config_type": "sarathi",
            "sarathi_scheduler_config_batch_size_cap": SEQUENCES,
            "sarathi_scheduler_config_chunk_size": CHUNK,
            f"{_FOREST}_attention_input_file": attention,
            f"{_FOREST}_prediction_max_prefill_chunk_size": CHUNK,
            f"{_FOREST}_prediction_max_batch_size": SEQUENCES,
            f"{_FOREST}_prediction_max_tokens_per_request": LONGEST,
            f"{_FOREST}_k_fold_cv_splits": 2,
            f"{_FOREST}_num_estimators": 250,
            f"{_FOREST}_max_depth": 16,
            f"{_FOREST}_min_samples_split": 2,
            "metrics_config_output_dir": folder / f"vidur-{name}-{metrics}",
            "log_level": "warning",
        }
        flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        flags.append("--no-metrics_config_store_plots")
        if not metrics:
            flags += ["--no-metrics_config_write_metrics", "--no-metrics_config_enable_chrome_trace"]
        return [python, "-m", "vidur.main", *flags]

    timed(command("one", False), folder, None, checkout)
    for metrics in (False, True):
        start = timed(command("one", metrics), folder, core, checkout)
        took = timed(command("all", metrics), folder, core, checkout)
        batch = _vidurs_batch(folder / f"vidur-all-{metrics}") if metrics else None
        yield Row("Vidur+" if metrics else "Vidur", took, start.wall, batch)


def _vidurs_batch(output: Path) -> float | None:
    """Mean requests in a batch, from its trace of batches."""
    for file in output.glob("*/chrome_trace.json"):
        sizes: list[int] = [
            event["args"]["batch_size"] for event in json.loads(file.read_text())["traceEvents"]
        ]
        return sum(sizes) / len(sizes)
    return None


def attention_rows() -> Iterator[str]:
    """A table of attention in Vidur's format: medians in ms of one layer's kernels, from the physical model."""
    from lab.control.plan import Decoding, Work
    from sim import hardware, model_shape
    from sim.cost.physical import PhysicalCost

    shape = model_shape.load("llama-3.1-8b")
    cost = PhysicalCost(shape, hardware.load("a100_80g"))
    ops = ("attn_prefill", "attn_decode", "attn_kv_cache_save", "attn_input_reshape", "attn_output_reshape")
    yield ",".join(
        (
            *(f"time_stats.{op}.median" for op in ops),
            "n_embd,n_q_head,n_kv_head,block_size,num_tensor_parallel_workers,max_model_len",
            "batch_size,prefill_chunk_size,kv_cache_size,is_prefill",
        )
    )
    fixed = f"{shape.hidden},{shape.heads},{shape.kv_heads},16,1,{LONGEST}"
    cached = (0, *(64 << power for power in range(9)))
    for chunk, before in itertools.product(range(64, CHUNK + 1, 64), cached):
        chunks, _ = cost.attention(Decoding(), (Work("any", before, chunk, True),))
        yield f"{1e3 * chunks / shape.layers},0,0.02,0,0,{fixed},1,{chunk},{before},True"
    for batch, before in itertools.product((1, 2, 4, 8, 16, 32, 64, 128, 256), cached):
        _, tokens = cost.attention(Decoding(batch, batch * before, before), ())
        yield f"0,{1e3 * tokens / shape.layers},0.02,0,0,{fixed},{batch},0,{before},False"


# --- BLIS ----------------------------------------------------------------------------------------------------

_COLUMNS = (
    *("request_id", "client_id", "tenant_id", "slo_class", "session_id", "round_index", "prefix_group"),
    *(
        "prefix_length",
        "streaming",
        "input_tokens",
        "output_tokens",
        "text_tokens",
        "image_tokens",
        "audio_tokens",
    ),
    *("video_tokens", "reason_ratio", "model", "deadline_us", "server_input_tokens", "arrival_time_us"),
    *("send_time_us", "first_chunk_time_us", "last_chunk_time_us", "num_chunks", "status", "error_message"),
    "finish_reason",
)


def blis(checkout: str, requests: Sequence[Request], folder: Path) -> Iterator[Row]:
    """Its replay of a trace as it is by default, and with the router's copy of the cache never stale: the copies taken
    every 50 ms, which one replica has no use for, are most of its time."""
    core = {min(os.sched_getaffinity(0))}
    for name, trace in (("one", requests[:1]), ("all", requests)):
        (folder / f"{name}.yaml").write_text(
            "trace_version: 2\ntime_unit: us\nmode: real\nwarm_up_requests: 0\n"
        )
        (folder / f"{name}.csv").write_text(
            "\n".join([",".join(_COLUMNS), *itertools.starmap(_line, enumerate(trace))]) + "\n"
        )

    def command(name: str, delay: int) -> list[str]:
        words = {
            "trace-header": folder / f"{name}.yaml",
            "trace-data": folder / f"{name}.csv",
            "model": "meta-llama/llama-3.1-8b-instruct",
            "model-config-folder": "model_configs/llama-3.1-8b-instruct",
            "hardware": "A100-80",
            "tp": 1,
            "cache-signal-delay": delay,
            "max-num-batched-tokens": CHUNK,
            "max-num-seqs": SEQUENCES,
            "total-kv-blocks": 27_000,
            "log": "error",
        }
        flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        return [str(Path(checkout, "blis").resolve()), "replay", *flags]

    for what, delay in (("BLIS", 50_000), ("BLIS, cache live", 0)):
        start = timed(command("one", delay), folder, core, checkout)
        took = timed(command("all", delay), folder, core, checkout)
        yield Row(what, took, start.wall, None)


def _line(index: int, request: Request) -> str:
    at = round(request.arrival / 1e3)
    told = {
        "request_id": index,
        "input_tokens": len(request.prompt),
        "text_tokens": len(request.prompt),
        "output_tokens": request.output_limit,
        "arrival_time_us": at,
        "send_time_us": at,
        "status": "ok",
        "streaming": "true",
        "finish_reason": "length",
    }
    blank = {"client_id", "tenant_id", "slo_class", "session_id", "prefix_group", "model", "error_message"}
    return ",".join(str(told.get(column, "" if column in blank else 0)) for column in _COLUMNS)
