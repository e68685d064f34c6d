# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compare two policies
#
# First come, first served against shortest job first, on one workload: who gains, who pays, and where the
# decisions part. The difference is exact: it is attributed to stages without a rest.

# %%
# %matplotlib inline
import pandas as pd

from lab.analysis import diff, launch, plots
from lab.analysis.verdict import verdict

LOAD = (
    "trace=poisson",
    "trace.n=150",
    "trace.rate=7",
    "trace.prompt.mean=160",
    "trace.output.mean=60",
    "kv.blocks=120",
)
runs = {
    name: launch("backend=sim", "cost=reference", f"policy={name}", *LOAD, f"run.dir=runs/policies/{name}")
    for name in ("fcfs", "sjf")
}
fcfs, sjf = runs.values()

# %%
pd.DataFrame(
    {name: run.latencies[["ttft_ms", "tpot_ms", "e2e_ms"]].mean() for name, run in runs.items()}
).round(1)

# %%
plots.latency_cdfs([fcfs, sjf])

# %%
plots.queue_depth([fcfs, sjf])

# %% [markdown]
# ## Who gains and who pays
#
# A request's answer length decides which of the two it is.

# %%
difference = diff(fcfs, sjf)
by_request = difference.requests
quarters = pd.qcut(by_request.output_tokens, 4, labels=["shortest", "short", "long", "longest"])
(by_request.groupby(quarters, observed=True).e2e_delta_ns.mean() / 1e6).round(0).rename(
    "mean E2E difference (ms)"
)

# %% [markdown]
# ## Where the difference comes from

# %%
plots.attribution_bars(difference)

# %%
stages = difference.attribution["e2e"]["stages"]
total = difference.attribution["e2e"]["mean_ms"]
assert abs(sum(stage["mean_ms"] for stage in stages.values()) - total) < 1e-6
for sentence in verdict(difference):
    print("-", sentence)

# %% [markdown]
# ## Is it luck?
#
# The same under other seeds of the workload. One number a seed, paired: both policies served the same requests.

# %%
gains = []
for seed in range(6):
    pair = [
        launch(
            "backend=sim",
            "cost=reference",
            f"policy={name}",
            *LOAD,
            f"seed={seed}",
            f"run.dir=runs/policies/seeds/{name}",
        )
        for name in ("fcfs", "sjf")
    ]
    gains.append(pair[0].latencies.e2e_ms.mean() - pair[1].latencies.e2e_ms.mean())
gains = pd.Series(gains, name="ms that sjf saves a request")
gains.describe().round(1)

# %%
from scipy import stats

interval = stats.t.interval(0.95, len(gains) - 1, gains.mean(), gains.sem())
print(f"sjf saves {gains.mean():.0f} ms a request, 95 % interval {interval[0]:.0f} to {interval[1]:.0f} ms")
