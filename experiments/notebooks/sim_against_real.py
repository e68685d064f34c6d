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
# # Sim against real
#
# One workload through both data planes under one policy object. The real engine here serves a tiny model with
# random weights, so that this takes seconds (the first run only warms the machine up); with
# `model=smollm2` it is the experiment of the README.

# %%
# %matplotlib inline
from lab.analysis import diff, launch, load, plots
from lab.analysis.verdict import verdict
from lab.diff import compare

LOAD = ("trace=poisson", "trace.n=24", "trace.rate=200", "trace.prompt.mean=48", "trace.output.mean=16")
launch("backend=real", "model=tiny", "model.dtype=float32", *LOAD, "run.report=false", "run.dir=runs/warm")
real = launch(
    "backend=both", "model=tiny", "model.dtype=float32", *LOAD, "run.report=false", "run.dir=runs/both"
)
sim = load("runs/both/sim")

# %%
difference = compare(real, sim)
for sentence in verdict(difference):
    print("-", sentence)

# %% [markdown]
# ## The hinge
#
# Driven with the real run's durations, the simulator must take every decision of the real run: all that is left
# between the two is how long steps take.

# %%
replayed = load("runs/both/replay")
assert replayed.metrics["plan_digest"] == real.metrics["plan_digest"]
print("digest of the real run  ", real.metrics["plan_digest"])
print("digest of the replayed  ", replayed.metrics["plan_digest"])

# %% [markdown]
# ## Step time: predicted against measured
#
# Steps are laid over each other while the decisions agree. The residual's shape says what the cost model lacks.

# %%
plots.step_time([real, sim])

# %%
plots.time_by_phase([real, sim])

# %% [markdown]
# ## Requests

# %%
plots.latency_cdfs([real, sim])

# %%
plots.request_errors(difference)

# %% [markdown]
# ## Against what noise?
#
# An error means something only beside the difference of two real runs. The same again, real against real:

# %%
again = launch(
    "backend=real", "model=tiny", "model.dtype=float32", *LOAD, "run.report=false", "run.dir=runs/again"
)
floor = diff(real, again)
for key in ("ttft_ms.mean", "tpot_ms.mean", "e2e_ms.mean"):
    error, noise = difference.metrics[key]["error_pct"], floor.metrics[key]["error_pct"]
    print(f"{key:<14} sim - real {error:+7.1f} %     real - real {noise:+7.1f} %")
