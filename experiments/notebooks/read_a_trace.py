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
# # Read a trace
#
# One simulated run, and what its tables say: requests, the stretches of their lives, tokens, steps.
# Everything here works the same for a run of the real engine: give `load` its directory.

# %%
# %matplotlib inline
from lab.analysis import launch, plots

run = launch("backend=sim", "cost=reference", "trace=chat", "trace.limit=40", "run.dir=runs/read")
run

# %% [markdown]
# ## Requests
#
# One row a request. Columns say their unit; a request that never got a token has NaN there.

# %%
run.latencies.head()

# %%
run.latencies[["queue_ms", "ttft_ms", "tpot_ms", "e2e_ms"]].describe(percentiles=[0.5, 0.9, 0.99]).round(2)

# %% [markdown]
# ## The stretches of a request's life
#
# A request waits, its prompt is computed, it generates. The stretches tile its life: they have no gaps, so
# their durations add up to its latency to the nanosecond.

# %%
stages = run.stages
whole = stages.groupby("id").duration_ms.sum()
apart = (whole - run.latencies.set_index("id").e2e_ms).abs().max()
assert apart < 1e-6
stages[stages.id == run.latencies.id[run.latencies.e2e_ms.idxmax()]]

# %%
plots.swimlanes([run])

# %% [markdown]
# ## Tokens
#
# TTFT is the first token's time; the gaps after it are the ITLs. A gap is long where another request's prompt was
# computed in the same step.

# %%
run.tokens.groupby("id").gap_ms.agg(["count", "median", "max"]).sort_values("max", ascending=False).head(
    8
).round(2)

# %%
plots.latency_cdfs([run])

# %% [markdown]
# ## Steps
#
# One row a phase of a step. `lab.tour --trace` shows the code behind each of them.

# %%
run.phases.groupby("phase").duration_ms.agg(["mean", "sum"]).sort_values("sum", ascending=False).round(3)

# %%
plots.batch_composition([run])

# %% [markdown]
# ## One request through the source
#
# The same spans, with the line of code that each one shows.

# %%
from lab.codemap.walk import info_of, walk

print("\n".join(walk(run.recorded(), info_of(run), run.latencies.id.iloc[3]).splitlines()[:24]))
