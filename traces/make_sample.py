"""Writes the committed chat sample: `python -m traces.make_sample`. Request path.

A small chat service: sessions begin at random (Poisson), each under one of three shared system prompts, and
go on for a geometric number of turns. A person reads the reply at speaking pace, thinks, and types again.
Everything comes from the seed through `random.Random.random` and rounding, so the file is the same bytes on
any machine; a test holds the committed file to it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Final

from lab.control.request import stream_of

SEED: Final = 2024
REQUESTS: Final = 300
SESSIONS_PER_S: Final = 0.36
MORE_TURNS: Final = 0.76  # chance of another turn: about 4 turns a session
MAX_TURNS: Final = 9
MAX_CONTEXT: Final = 1200
MS_PER_TOKEN: Final = 60  # how long the reply takes to come and be read
SYSTEMS: Final = (
    ("assistant", 64, "acme"),
    ("assistant", 64, "globex"),
    ("tutor", 96, "initech"),
    ("coder", 48, "hooli"),
)


def stream(seed: int, component: str) -> random.Random:
    """The random stream of one named component."""
    return random.Random(stream_of("sample", seed, component))


def lognormal(rng: random.Random, mean: float, cv: float, low: float, high: float) -> float:
    """One lognormal draw with the given mean and coefficient of variation, kept in [low, high]."""
    variance = math.log1p(cv * cv)
    z = NormalDist().inv_cdf((rng.random() + 2**-54) / (1 + 2**-53))
    return min(max(math.exp(math.log(mean) - variance / 2 + z * math.sqrt(variance)), low), high)


def rows(seed: int = SEED, requests: int = REQUESTS) -> list[dict[str, object]]:
    """The first `requests` turns by arrival, in the format of README.md."""
    starts, kinds = stream(seed, "session starts"), stream(seed, "session kinds")
    turns: list[tuple[int, str, int, dict[str, object]]] = []
    now_ms = 0.0
    for index in range(requests):  # every session has a turn, so these are enough
        session = f"s{index:03d}"
        system = SYSTEMS[int(kinds.random() * len(SYSTEMS))]
        for row in _session(seed, session, round(now_ms), system):
            turns.append((int(str(row["arrival_ms"])), session, int(str(row["turn"])), row))
        now_ms -= 1000 * math.log(1 - starts.random()) / SESSIONS_PER_S
    turns.sort(key=lambda turn: turn[:3])
    return [row for _, _, _, row in turns[:requests]]


def _session(
    seed: int, session: str, arrival_ms: int, system: tuple[str, int, str]
) -> Iterator[dict[str, object]]:
    rng = stream(seed, session)
    label, system_tokens, tenant = system
    context = system_tokens
    for turn in range(MAX_TURNS):
        user = round(lognormal(rng, 48, 0.8, 20, 200))
        output = round(lognormal(rng, 40, 0.7, 6, 128))
        context += user + output
        if context > MAX_CONTEXT:
            return
        row: dict[str, object] = {
            "arrival_ms": arrival_ms,
            "session": session,
            "turn": turn,
            "tenant": tenant,
        }
        if turn == 0:
            row |= {"system": label, "system_tokens": system_tokens}
        yield row | {"user_tokens": user, "output_tokens": output}
        think_ms = lognormal(rng, 6000, 1.0, 1500, 60_000)
        arrival_ms += MS_PER_TOKEN * output + round(think_ms)
        if rng.random() > MORE_TURNS:
            return


def text(seed: int = SEED, requests: int = REQUESTS) -> str:
    """The file's contents."""
    return "".join(json.dumps(row, separators=(", ", ": ")) + "\n" for row in rows(seed, requests))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample and say where."""
    parser = argparse.ArgumentParser(description="Write a chat trace of our own making.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "samples" / "chat.jsonl")
    options = parser.parse_args(arguments)
    if options.requests < 1:
        parser.error(f"--requests is {options.requests}; expected an integer >= 1")
    try:
        options.out.write_text(text(options.seed, options.requests), encoding="utf-8", newline="\n")
    except OSError as error:
        parser.error(f"can't write '{options.out}': {error.strerror}")
    print(f"wrote {options.requests} requests to {options.out}")


if __name__ == "__main__":
    main()
