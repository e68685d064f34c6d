"""A toy server that leaves run tables behind, so that analysis is tested on data that obeys the real rules.

One step at a time: running requests decode one token each, waiting ones enter while a slot and blocks are
there, prompts go in by chunks, and when blocks run out the youngest running request is preempted. Intervals
tile every request's life, and digests chain over the decisions, as in a real run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Cost = Callable[[int, int, int, int], int]
"""(step, prefill tokens, decode tokens, context tokens) -> nanoseconds of `forward`."""

BLOCK = 16


def linear(base: int = 2_000_000, token: int = 30_000, context: int = 200) -> Cost:
    return lambda step, prefill, decode, ctx: base + token * (prefill + decode) + context * ctx


def noisy(cost: Cost, seed: int, spread: float = 0.2) -> Cost:
    """`cost` times a factor that depends on the step alone."""
    return lambda step, *shape: int(
        cost(step, *shape) * random.Random(f"{seed}/{step}").uniform(1 - spread, 1 + spread)
    )


def measured(steps: pd.DataFrame, otherwise: Cost) -> Cost:
    """The durations of a recorded run, step by step."""
    recorded = {int(s): int(d) for s, d in zip(steps["step"], steps["forward_ns"], strict=True)}
    return lambda step, *shape: recorded.get(step, otherwise(step, *shape))


@dataclass(frozen=True)
class ToyRun:
    requests: pd.DataFrame
    steps: pd.DataFrame
    plans: pd.DataFrame
    metrics: dict[str, Any]
    config: dict[str, Any]
    partial: bool = False
    path: Path | None = None
    environment: dict[str, Any] = field(default_factory=lambda: {"python": "3.11", "cpu": "toy"})


@dataclass
class _Live:
    id: str
    seq: int
    arrival: int
    prompt: int
    output: int
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    intervals: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    work: int = 0

    @property
    def known(self) -> int:
        return self.prompt + len(self.tokens)

    def enter(self, phase: str, now: int, cause: str = "", step: int = -1) -> None:
        if self.intervals:
            last = self.intervals[-1]
            if last["phase"] == phase and phase != "queue":
                last["last_step"] = step
                return
            last["end_ns"] = now
        self.intervals.append(
            {
                "phase": phase,
                "start_ns": now,
                "end_ns": now,
                "cause": cause,
                "first_step": step,
                "last_step": step,
            }
        )


def toy_run(
    seed: int = 0,
    count: int = 40,
    backend: str = "sim",
    cost: Cost | None = None,
    rate_per_s: float = 40.0,
    max_seqs: int = 8,
    budget: int = 256,
    blocks: int = 200,
    swap_order_from_step: int | None = None,
    partial: bool = False,
    path: Path | None = None,
) -> ToyRun:
    """Serve `count` seeded requests. `swap_order_from_step` plants a divergence: last come, first served."""
    rng = random.Random(f"toy/{seed}")
    now, waiting, running, todo = 0, [], [], []  # type: ignore[var-annotated]
    for i in range(count):
        now += int(rng.expovariate(rate_per_s) * 1e9)
        todo.append(_Live(f"r{i:04d}", i, now, rng.randint(8, 180), rng.randint(1, 40)))
    everyone, cost, free = list(todo), cost or linear(), list(range(blocks))
    steps: list[dict[str, Any]] = []
    plans: list[dict[str, Any]] = []
    now, digest = 0, "0" * 32
    while todo or waiting or running:
        if not waiting and not running and todo[0].arrival > now:
            now = todo[0].arrival
        while todo and todo[0].arrival <= now:
            live = todo.pop(0)
            live.enter("queue", live.arrival, "arrival")
            waiting.append(live)
        index, left = len(steps), budget
        work: list[tuple[_Live, int, int, list[int]]] = []
        admitted: list[str] = []
        preempted: list[str] = []
        stood = len(free)

        def take(live: _Live, tokens: int) -> list[int] | None:
            need = -(-(live.computed + tokens) // BLOCK) - len(live.blocks)
            if need > len(free):
                return None
            return [free.pop(0) for _ in range(need)]

        released_plan = 0
        for live in list(running):
            if live not in running:
                continue
            tokens = min(left, live.known - live.computed)
            if tokens <= 0:
                continue
            while (got := take(live, tokens)) is None:
                victim = running.pop()
                work = [item for item in work if item[0] is not victim]
                released_plan += len(victim.blocks)
                free.extend(victim.blocks)
                victim.blocks, victim.computed = [], 0
                victim.preemptions += 1
                victim.enter("queue", now, "preempted")
                waiting.append(victim)
                preempted.append(victim.id)
                if victim is live:
                    break
            if got is not None:
                live.blocks += got
                work.append((live, live.computed, tokens, got))
                left -= tokens
        newest = swap_order_from_step is not None and index >= swap_order_from_step
        waiting.sort(key=lambda live: -live.seq if newest else live.seq)
        while waiting and not preempted and len(running) < max_seqs and left > 0:
            live = waiting[0]
            tokens = min(left, live.known - live.computed)
            if (-(-live.known // BLOCK)) > len(free) or (got := take(live, tokens)) is None:
                break
            waiting.pop(0)
            running.append(live)
            admitted.append(live.id)
            live.blocks += got
            work.append((live, live.computed, tokens, got))
            left -= tokens
        prefill = sum(t for live, s, t, _ in work if s + t <= live.prompt or t > 1)
        decode = sum(t for _, _, t, _ in work) - prefill
        context = sum(s + t for _, s, t, _ in work)
        told = [(live.id, s, t, b) for live, s, t, b in work]
        digest = hashlib.blake2b(repr((digest, told, preempted)).encode(), digest_size=16).hexdigest()
        phases = {"plan_ns": 0, "prepare_ns": 50_000, "forward_ns": cost(index, prefill, decode, context)}
        phases |= {"sample_ns": 20_000 * len(work), "commit_ns": 0}
        end = now + sum(phases.values())
        held = sum(len(live.blocks) for live in running)
        samples = [s + t == live.known for live, s, t, _ in work]
        plans.append(
            {
                "step": index,
                "now_ns": now,
                "digest": digest,
                "request": [live.id for live, *_ in work],
                "start": [s for _, s, _, _ in work],
                "tokens": [t for _, _, t, _ in work],
                "samples": samples,
                "blocks": [b for *_, b in work],
                "admitted": admitted,
                "preempted": preempted,
                "rejected": [],
            }
        )
        for (live, start, tokens, _), sampled in zip(work, samples, strict=True):
            live.enter("decode" if start >= live.prompt and tokens == 1 else "prefill", now, step=index)
            live.computed += tokens
            live.work += tokens
            if sampled:
                live.tokens.append(end)
        gone = [live for live in running if len(live.tokens) == live.output]
        steps.append(
            {"step": index, "replica": 0, "start_ns": now}
            | phases
            | {
                "end_ns": end,
                "batch": len(work),
                "prefill_tokens": prefill,
                "decode_tokens": decode,
                "context_tokens": context,
                "samples": sum(samples),
                "running": len(running),
                "waiting": len(waiting),
                "blocks_free": len(free) * 2 // 3,
                "blocks_cached": len(free) - len(free) * 2 // 3,
                "blocks_held": held,
                "allocated": max(0, stood - len(free)),
                "evicted": 0,
                "released_plan": released_plan,
                "released_commit": sum(len(live.blocks) for live in gone),
                "preempted": len(preempted),
                "rejected": 0,
                "digest": digest,
            }
        )
        for live in gone:
            running.remove(live)
            free.extend(live.blocks)
            live.intervals[-1]["end_ns"] = end
        now = end
    requests = _requests(everyone)
    frame = pd.DataFrame(steps) if steps else _empty_steps()
    config = {
        "backend": backend,
        "policy": {"name": "fcfs", "window": 64},
        "kv": {"blocks": blocks, "block_size": BLOCK},
        "max_seqs": max_seqs,
        "trace": {"name": "toy", "seed": seed},
    }
    plan_frame = pd.DataFrame(plans) if plans else pd.DataFrame(columns=_PLAN_COLUMNS)
    return ToyRun(requests, frame, plan_frame, _metrics(requests, frame, blocks), config, partial, path)


_PLAN_COLUMNS = [
    "step",
    "now_ns",
    "digest",
    "request",
    "start",
    "tokens",
    "samples",
    "blocks",
    "admitted",
    "preempted",
    "rejected",
]


def _empty_steps() -> pd.DataFrame:
    full = toy_run(count=1).steps
    return full.iloc[:0]


def _requests(everyone: list[_Live]) -> pd.DataFrame:
    rows = []
    for live in everyone:
        times = {
            p: sum(i["end_ns"] - i["start_ns"] for i in live.intervals if i["phase"] == p)
            for p in ("queue", "prefill", "decode")
        }
        rows.append(
            {
                "id": live.id,
                "seq": live.seq,
                "tenant": "",
                "session": "",
                "priority": 0,
                "arrival_ns": live.arrival,
                "end_ns": live.tokens[-1],
                "outcome": "finished",
                "reason": "length",
                "replica": 0,
                "admit_reason": "always",
                "route_reason": "single",
                "prompt_tokens": live.prompt,
                "output_tokens": live.output,
                "cached_tokens": 0,
                "cached_blocks": 0,
                "computed_tokens": live.work,
                "preemptions": live.preemptions,
                "first_scheduled_ns": live.intervals[0]["end_ns"],
                "first_token_ns": live.tokens[0],
                "last_token_ns": live.tokens[-1],
                "queue_ns": times["queue"],
                "prefill_ns": times["prefill"],
                "decode_ns": times["decode"],
                "ttft_slo_ns": None,
                "tpot_slo_ns": None,
                "token_times_ns": np.asarray(live.tokens, dtype=np.int64),
                "intervals": live.intervals,
                "output": [],
            }
        )
    if not rows:
        return toy_run(count=1).requests.iloc[:0]
    return pd.DataFrame(rows)


def _metrics(requests: pd.DataFrame, steps: pd.DataFrame, blocks: int) -> dict[str, Any]:
    def stats(values: pd.Series[Any]) -> dict[str, float | None]:
        ms = values / 1e6
        if ms.empty:
            return dict.fromkeys(("mean", "p50", "p90", "p99"))
        return {"mean": float(ms.mean())} | {f"p{q}": float(ms.quantile(q / 100)) for q in (50, 90, 99)}

    several = requests[requests["output_tokens"] > 1]
    gaps = [np.diff(times) for times in requests["token_times_ns"] if len(times) > 1]
    seconds = float(steps["end_ns"].max()) / 1e9 if len(steps) else 0.0
    tokens = int(requests["output_tokens"].sum())
    total = tokens + int(requests["prompt_tokens"].sum())
    return {
        "requests": {"finished": len(requests), "rejected": 0, "aborted": 0},
        "ttft_ms": stats(requests["first_token_ns"] - requests["arrival_ns"]),
        "tpot_ms": stats(
            (several["last_token_ns"] - several["first_token_ns"]) / (several["output_tokens"] - 1)
        ),
        "itl_ms": stats(pd.Series(np.concatenate(gaps) if gaps else [], dtype="float64")),
        "e2e_ms": stats(requests["last_token_ns"] - requests["arrival_ns"]),
        "queue_ms": stats(requests["queue_ns"]),
        "throughput": {
            "requests_per_s": len(requests) / seconds if seconds else None,
            "output_tokens_per_s": tokens / seconds if seconds else None,
            "total_tokens_per_s": total / seconds if seconds else None,
        },
        "kv": {
            "prefix_hit_ratio_tokens": 0.0,
            "prefix_hit_ratio_blocks": 0.0,
            "evictions": 0,
            "peak_blocks": int(steps["blocks_held"].max()) if len(steps) else 0,
        },
        "preemptions": int(requests["preemptions"].sum()),
        "steps": len(steps),
        "duration_s": seconds,
        "plan_digest": str(steps["digest"].iloc[-1]) if len(steps) else "",
        "wall_s": 0.1,
    }


def pair(seed: int = 0, **options: Any) -> tuple[ToyRun, ToyRun, ToyRun]:
    """(real, sim, sim with real's durations) of one workload: a noisy machine and a biased model of it."""
    machine = noisy(linear(), seed)
    real = toy_run(seed, backend="real", cost=machine, **options)
    sim = toy_run(seed, cost=linear(token=34_000), **options)
    return real, sim, toy_run(seed, cost=measured(real.steps, linear()), **options)
