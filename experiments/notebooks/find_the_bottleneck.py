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
# # Find the bottleneck
#
# Requests are slow. Is it the queue, the KV cache, the batch, or the model? Four looks, then the proof: change
# what seemed to be at fault, and see.

# %%
# %matplotlib inline
from lab.analysis import launch, plots

LOAD = ("trace=poisson", "trace.n=120", "trace.rate=6", "trace.prompt.mean=160", "trace.output.mean=60")
slow = launch("backend=sim", "cost=reference", *LOAD, "kv.blocks=80", "run.dir=runs/bottleneck/slow")
slow.latencies[["queue_ms", "ttft_ms", "tpot_ms", "e2e_ms"]].describe(percentiles=[0.5, 0.9]).round(1)

# %% [markdown]
# ## 1. In which stage is the time?

# %%
plots.time_by_stage([slow])

# %%
plots.slowest_requests(slow)

# %% [markdown]
# Waiting, and not decoding. So either the engine is out of slots or tokens, or out of KV blocks.

# %% [markdown]
# ## 2. What runs short while they wait?

# %%
plots.kv_occupancy([slow])

# %%
plots.queue_depth([slow])

# %% [markdown]
# The pool is full while requests wait, and the batch is far from `engine.max_seqs`: memory is what runs short.

# %%
busy = slow.steps[slow.steps.waiting > 0]
held = (busy.blocks_held / (busy.blocks_held + busy.blocks_cached + busy.blocks_free)).mean()
limit = slow.config["engine"]["max_seqs"]
print(
    f"while anybody waits: {100 * held:.0f} % of the blocks held, {busy.running.mean():.1f} of {limit} slots used"
)
print(f"preemptions: {int(slow.latencies.preemptions.sum())}")
assert held > 0.8
assert busy.running.max() < limit

# %% [markdown]
# ## 3. What does a step cost?

# %%
plots.time_by_phase([slow])

# %% [markdown]
# ## 4. The proof
#
# Twice the blocks, nothing else. If memory was the bottleneck, waiting goes.

# %%
roomy = launch("backend=sim", "cost=reference", *LOAD, "kv.blocks=160", "run.dir=runs/bottleneck/roomy")
plots.time_by_stage([slow, roomy])

# %%
gain = slow.latencies.e2e_ms.mean() / roomy.latencies.e2e_ms.mean()
print(f"mean E2E: {slow.latencies.e2e_ms.mean():.0f} ms before, {roomy.latencies.e2e_ms.mean():.0f} ms after")
assert gain > 1.2
