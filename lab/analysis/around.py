"""What each side saw at one step, and why it chose what it chose. Observation path.

A run keeps what was decided, not what a policy thought. But the engine's limits are in the configuration, and queue
and running set follow from the requests' intervals; so for a request that one side worked on and the other didn't,
what stood in its way is computed: it wasn't there, or tokens, slots or blocks ran out, or others came first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.frames import RunLike, intervals

if TYPE_CHECKING:
    import pandas as pd

NEIGHBOURS = 2
"""Steps shown before and after the divergent one."""

_SHOWN = (
    "start_ns",
    "end_ns",
    "batch",
    "prefill_tokens",
    "decode_tokens",
    "running",
    "waiting",
    "blocks_free",
)


def queue_and_running(run: RunLike, now: int, replica: int) -> tuple[list[str], list[str]]:
    """Who waited and who ran just before the plan made at `now`, each by arrival."""
    requests = whole(run)
    there = requests[
        (requests["arrival_ns"] <= now)
        & (requests["end_ns"] >= now)
        & requests["replica"].isin([replica, -1])
    ]
    order = dict(zip(there["id"], zip(there["arrival_ns"], there["seq"], strict=True), strict=True))
    ended = set(there.loc[there["end_ns"] <= now, "id"])
    pieces = intervals(there)
    start, end = pieces["start_ns"], pieces["end_ns"]
    queued = pieces["stage"].isin(("queue", "preempted", "swapped"))
    # A queue interval that ends now ends by this plan; one that begins now by preemption does so too.
    waits = queued & (end >= now) & ((start < now) | ((start == now) & (pieces["stage"] == "queue")))
    runs = ~queued & (start < now) & (end >= now)
    waiting = set(pieces.loc[waits, "id"]) - ended
    running = set(pieces.loc[runs, "id"]) - ended - waiting
    by_arrival = [str(i) for i in sorted(order, key=lambda i: order[i])]
    return [i for i in by_arrival if i in waiting], [i for i in by_arrival if i in running]


def neighbours(run: RunLike, step: int, replica: int) -> list[dict[str, int]]:
    """The steps around this one, a row each."""
    steps = run.steps[(run.steps["replica"] == replica) & (run.steps["step"] - step).abs().le(NEIGHBOURS)]
    return [
        {"step": int(row["step"]), **{name: int(row[name]) for name in _SHOWN}}
        for row in steps.sort_values("step").to_dict("records")
    ]


def limits(run: RunLike) -> dict[str, int | None]:
    """token_budget, max_seqs and block_size, as far as the configuration says them."""
    config = run.config
    engine, kv = config.get("engine") or {}, config.get("kv") or {}
    return {
        "token_budget": engine.get("token_budget"),
        "max_seqs": engine.get("max_seqs", config.get("max_seqs")),
        "block_size": kv.get("block_size"),
    }


def reasons(run: RunLike, seen: dict[str, Any], requests: list[str], label: str) -> list[dict[str, str]]:
    """Why `label` left these requests out of the step that it saw so."""
    rows = whole(run).drop_duplicates("id").set_index("id")
    return [{"request": r, "side": label, "why": _why(run, seen, r, rows)} for r in requests]


def _why(run: RunLike, seen: dict[str, Any], request: str, rows: pd.DataFrame) -> str:
    now = seen["now_ns"]
    if request not in rows.index:
        return "it never came here"
    row: dict[Any, Any] = rows.loc[request].to_dict()
    if row["arrival_ns"] > now:
        return f"it arrived {(row['arrival_ns'] - now) / 1e6:.3f} ms later"
    if request in seen["preempted"]:
        return "it was preempted in this step"
    if request in seen["rejected"]:
        return "it was rejected in this step"
    if row["end_ns"] <= now:
        return f"it had ended ({row['outcome']})"
    limit = limits(run)
    tokens, slots, free = sum(item["tokens"] for item in seen["work"]), seen["running"], _left(seen)
    if limit["token_budget"] and tokens >= limit["token_budget"]:
        return f"the step's tokens were spent ({tokens} of {limit['token_budget']})"
    if request not in seen["running_set"]:
        if limit["max_seqs"] and slots >= limit["max_seqs"]:
            return f"every slot was taken ({slots} of {limit['max_seqs']})"
        need = -(-int(row["prompt_tokens"]) // limit["block_size"]) if limit["block_size"] else 1
        if free < need:
            return f"its prompt needs up to {need} KV blocks and {free} were left"
    return "room was left, so the policy passed it over"


def _left(seen: dict[str, Any]) -> int:
    left: int = seen["blocks_free"] + seen["blocks_cached"]
    return left


def place(seen: dict[str, Any], request: str) -> str:
    """`3rd of 12 waiting by arrival`, for a request that was chosen from the queue; else that it ran."""
    queue = seen["queue"]
    if request in queue:
        return f"{_nth(queue.index(request) + 1)} of {len(queue)} waiting by arrival"
    return "running" if request in seen["running_set"] else "arrived now"


def _nth(number: int) -> str:
    last = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{last}"


def whole(run: RunLike) -> pd.DataFrame:
    """A run's requests, also those that aren't compared."""
    frame: pd.DataFrame = getattr(run, "whole", run).requests
    return frame


def rule(found: dict[str, Any], keys: tuple[str, str], labels: tuple[str, str]) -> str:
    """What rule two plans made from the same clock and arrivals disagree about, as one clause; "" if unknown."""
    if found["cause"] != "rule" or found["difference"] is None:
        return ""
    sides, difference = [found[key] for key in keys], found["difference"]
    if difference["rejected"][keys[0]] or difference["rejected"][keys[1]]:
        return "who is rejected"
    if difference["preempted"][keys[0]] or difference["preempted"][keys[1]]:
        return "who is preempted"
    works = [{item["request"]: item for item in side["work"]} for side in sides]
    for request in works[0]:
        starts = [work[request]["start"] if request in work else None for work in works]
        if None not in starts and starts[0] != starts[1] and request in sides[0]["admitted"]:
            x, y = starts
            return f"the prefix cache: it supplied {x} tokens of {request} in {labels[0]}, {y} in {labels[1]}"
    totals = [sum(item["tokens"] for item in side["work"]) for side in sides]
    if _bound(totals, [side["limits"]["token_budget"] for side in sides], [s["most_tokens"] for s in sides]):
        return f"the step's token budget: {labels[0]} took {totals[0]} tokens, {labels[1]} {totals[1]}"
    counts = [side["running"] for side in sides]
    if _bound(counts, [side["limits"]["max_seqs"] for side in sides], [s["most_running"] for s in sides]):
        return f"how many requests may run: {counts[0]} in {labels[0]}, {counts[1]} in {labels[1]}"
    if any(difference["work"][key] for key in keys):
        return "who goes first: the same requests were there and others were chosen"
    firsts = [side["admitted"] for side in sides]
    if sorted(firsts[0]) == sorted(firsts[1]) and firsts[0] != firsts[1]:
        turn = next(i for i, (x, y) in enumerate(zip(*firsts, strict=True)) if x != y)
        return f"who goes first: {firsts[0][turn]} in {labels[0]}, {firsts[1][turn]} in {labels[1]}"
    if difference["changed"]:
        return "how many tokens a request gets"
    if difference["order"]:
        return "the order of the batch"
    if difference["blocks"]:
        reused = any(side["blocks_cached"] or side["evicted"] for side in sides)
        return "which cached KV blocks are evicted" if reused else "which free KV blocks are taken"
    return ""


def _bound(values: list[int], configured: list[int | None], most: list[int | None]) -> bool:
    """Whether a limit kept the smaller of two values down: the configured one, or what its run never went beyond."""
    if values[0] == values[1]:
        return False
    less = values.index(min(values))
    return values[less] == most[less] or any(v == c for v, c in zip(values, configured, strict=True))
