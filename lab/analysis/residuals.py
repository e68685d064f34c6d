"""How wrong step times are, by the shape of the step: which term of a cost model is off. Observation path.

Only steps that did the same work on both sides count (equal digests, or the same tokens after the runs parted), so a
residual is the duration's alone. The map bins it by powers of two of tokens, context and batch. The terms ask which
single fact about the batch a residual is proportional to: a coefficient that is off by a factor leaves a residual of
exactly that shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.aligned import Aligned, work_items
from lab.analysis.frames import STEP_PHASES, RunLike, table_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

FACTS = {
    "step": "step",
    "tokens": "token",
    "batch": "request in the batch",
    "samples": "sampled token",
    "prefill_tokens": "prompt token",
    "decode_tokens": "decoded token",
    "context_tokens": "token of context",
    "prefill_pairs": "query-key pair of prefill",
    "decode_context": "token of context of decodes",
    "decode_padded": "token of padded decode context",
}
"""Facts about a step's batch, and what one unit of each is."""

_SUMS = {
    "tokens": ("prefill_tokens", "decode_tokens"),
    "prefill_tokens": ("tokens",),
    "decode_tokens": ("tokens", "batch", "samples"),
    "batch": ("decode_tokens", "samples"),
    "samples": ("decode_tokens", "batch"),
    "context_tokens": ("decode_context",),
    "decode_context": ("context_tokens", "decode_padded"),
    "decode_padded": ("context_tokens", "decode_context"),
}
"""Facts that (nearly) add up to each other or to this one: a fit of its coefficient leaves them out."""

EXPLAINED = 0.9
"""A term that explains this share of a phase's squared residual is named as its cause."""


def residuals(a: RunLike, b: RunLike, aligned: Aligned) -> pd.DataFrame:
    """One row a pair of steps that did the same work.

    replica, step_a, step_b, the `FACTS`, duration_ns_a, duration_ns_b, residual_ns (b - a), and `<phase>_ns_a`,
    `<phase>_ns_b` of each phase.
    """
    same = aligned.pairs[aligned.pairs["similarity"] == 1.0]
    facts = ["tokens", "batch", "samples", "prefill_tokens", "decode_tokens", "context_tokens"]
    wanted = ["replica", "step", "start_ns", "end_ns", *facts[1:]]
    out = same[["replica", "step_a", "step_b"]]
    for run, key in ((a, "a"), (b, "b")):
        steps = table_of(run, "steps", wanted)
        phases = [phase for phase in STEP_PHASES if f"{phase}_ns" in steps]
        own = steps[["replica", "step", *(f"{phase}_ns" for phase in phases)]].assign(
            duration_ns=steps["end_ns"] - steps["start_ns"]
        )
        renamed = {name: f"{name}_{key}" for name in own.columns if name != "replica"}
        own = own.rename(columns=renamed)
        if key == "a":
            own[facts[1:]] = steps[facts[1:]]
        out = out.merge(own, on=["replica", f"step_{key}"], how="left")
    out = out.assign(
        step=1,
        tokens=out["prefill_tokens"] + out["decode_tokens"],
        residual_ns=out["duration_ns_b"] - out["duration_ns_a"],
    )
    return out.assign(**_attention(a, out))


def _attention(run: RunLike, pairs: pd.DataFrame) -> dict[str, Any]:
    """Facts that take the items of a batch: what its attention reads."""
    import numpy as np

    names = ("prefill_pairs", "decode_context", "decode_padded")
    out = {name: np.zeros(len(pairs), dtype=np.int64) for name in names}
    plans = table_of(run, "plans", ["step", "request", "start", "tokens"])
    if plans.empty:
        return out
    plans = plans if "replica" in plans else plans.assign(replica=0)
    for replica in pairs["replica"].unique():
        rows = (pairs["replica"] == replica).to_numpy().nonzero()[0]
        steps = pairs["step_a"].to_numpy(dtype="int64")[rows]
        work, _ = work_items([plans[plans["replica"] == replica]] * 2, [steps, steps[:0]])
        ends = work.start + work.tokens
        one = work.tokens == 1
        count = len(rows)
        pairs_of = np.where(one, 0, work.tokens * work.start + work.tokens * (work.tokens + 1) // 2)
        context = np.bincount(work.row, np.where(one, ends, 0), count)
        longest = np.zeros(count)
        np.maximum.at(longest, work.row, np.where(one, ends, 0))
        padded = np.bincount(work.row, one, count) * longest
        for name, values in zip(
            names, (np.bincount(work.row, pairs_of, count), context, padded), strict=True
        ):
            out[name][rows] = values.astype(np.int64)
    return out


def residual_map(table: pd.DataFrame) -> pd.DataFrame:
    """Residuals binned by powers of two of tokens, context and batch.

    tokens_from, context_from, batch_from (a bin holds less than twice of each), steps, a_ms, b_ms, residual_ms (means
    a step), error_pct of a, total_ms.
    """
    import numpy as np
    import pandas as pd

    def floor(values: pd.Series[int]) -> NDArray[np.int64]:
        return np.int64(1) << np.log2(np.maximum(values.to_numpy(dtype=float), 1)).astype(np.int64)

    keys = {
        "tokens_from": floor(table["tokens"]),
        "context_from": floor(table["context_tokens"]),
        "batch_from": floor(table["batch"]),
    }
    ms = pd.DataFrame(
        {**keys, **{f"{key}_ms": table[f"duration_ns_{key}"].to_numpy(dtype=float) / 1e6 for key in "ab"}}
    )
    grouped = ms.groupby(list(keys), as_index=False).agg(
        steps=("a_ms", "size"), a_ms=("a_ms", "mean"), b_ms=("b_ms", "mean")
    )
    residual = grouped["b_ms"] - grouped["a_ms"]
    return grouped.assign(
        residual_ms=residual,
        error_pct=100 * residual / grouped["a_ms"].where(grouped["a_ms"] > 0),
        total_ms=residual * grouped["steps"],
    )


def terms(table: pd.DataFrame) -> pd.DataFrame:
    """Which fact each phase's residual is proportional to, the phase with the most residual first.

    phase, share (of all phases' absolute residual), fact, explained (of the squared residual, 0 to 1), delta_ns (a
    unit, b - a), a_ns (what a takes a unit, fitted), factor (b's over a's; NaN where a's is 0), alike (facts that
    explain it as well).
    """
    import numpy as np
    import pandas as pd

    rows = []
    phases = [p for p in STEP_PHASES if f"{p}_ns_a" in table and f"{p}_ns_b" in table]
    gap = {p: (table[f"{p}_ns_b"] - table[f"{p}_ns_a"]).to_numpy(dtype=float) for p in phases}
    moved = sum(float(np.abs(values).sum()) for values in gap.values())
    facts = {name: table[name].to_numpy(dtype=float) for name in FACTS}
    facts = {name: values for name, values in facts.items() if values.any()}
    for phase, values in gap.items():
        energy = float(values @ values)
        if not energy or not facts:
            continue
        slopes = {name: float(x @ values) / float(x @ x) for name, x in facts.items()}
        explained = {
            name: 1 - float(((values - slopes[name] * x) ** 2).sum()) / energy for name, x in facts.items()
        }
        best = max(explained, key=lambda name: explained[name])
        base = _coefficient(table[f"{phase}_ns_a"].to_numpy(dtype=float), facts, best)
        rows.append(
            {
                "phase": phase,
                "share": float(np.abs(values).sum()) / moved,
                "fact": best,
                "explained": explained[best],
                "delta_ns": slopes[best],
                "a_ns": base,
                "factor": (base + slopes[best]) / base if base > 0 else float("nan"),
                "alike": [n for n in explained if n != best and explained[n] > explained[best] - 1e-3],
            }
        )
    columns = ["phase", "share", "fact", "explained", "delta_ns", "a_ns", "factor", "alike"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _coefficient(took: NDArray[np.float64], facts: dict[str, NDArray[np.float64]], name: str) -> float:
    """What one unit of this fact takes, by non-negative least squares over all of them."""
    import numpy as np
    from scipy.optimize import nnls

    names = [fact for fact in facts if fact not in _SUMS.get(name, ())]
    scale = np.array([max(float(facts[n].max()), 1.0) for n in names])
    every = max(1, -(-len(took) // 4000))
    matrix = np.column_stack([facts[n][::every] for n in names]) / scale
    fit, _ = nnls(matrix, took[::every])
    return float(fit[names.index(name)] / scale[names.index(name)])
