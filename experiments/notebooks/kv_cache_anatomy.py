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
# # KV cache anatomy
#
# Every block is free, cached (nobody holds it, but its content can be hit) or held. What moves between the three,
# what a hit is worth, and how much memory the prefix cache wants.

# %%
# %matplotlib inline
from lab.analysis import launch, plots

BASE = ("backend=sim", "cost=reference", "trace=chat", "trace.limit=80")
roomy = launch(*BASE, "kv.blocks=400", "run.dir=runs/kv/roomy")
tight = launch(*BASE, "kv.blocks=112", "run.dir=runs/kv/tight")
off = launch(*BASE, "kv.blocks=400", "kv.prefix_cache=false", "run.dir=runs/kv/off")

# %% [markdown]
# ## The life of blocks
#
# Blocks are taken in planning and given back when a request ends or is preempted. With room, content stays; without,
# the eviction policy chooses what to forget. Free, cached and held are the whole pool at every step:

# %%
steps = tight.steps
assert (steps.blocks_free + steps.blocks_cached + steps.blocks_held == 112).all()
assert steps.evicted.sum() > 0
plots.block_flows(tight)

# %%
plots.kv_occupancy([tight])

# %% [markdown]
# ## Hits
#
# Turns of a conversation repeat all that was said before, and system prompts are shared: both come out of the cache
# while they are there.

# %%
plots.cache_hits([roomy, tight])

# %% [markdown]
# A hit saves prefill, and so time to first token:

# %%
plots.latency_cdfs([off, roomy])

# %%
first = {
    name: run.latencies.ttft_ms.mean()
    for name, run in (("no cache", off), ("tight", tight), ("roomy", roomy))
}
for name, mean in first.items():
    print(f"{name:<10} mean TTFT {mean:6.1f} ms")
assert first["roomy"] < first["tight"] < first["no cache"]

# %% [markdown]
# ## How much memory?
#
# The trace's block accesses alone, without engine or time: hit ratio over the size of the cache. `belady` drops the
# block whose next use is furthest off; it reads the future and so bounds what any policy can do.

# %%
import random

from lab import plugins
from lab.state.cache_replay import replay_accesses

requests = roomy.workload()
sizes = [64, 72, 80, 112, 160, 224, 320]


def ratio(name: str, blocks: int) -> float:
    policy = plugins.create("eviction", name)
    policy.rng = random.Random(0)
    return 100 * replay_accesses(requests, policy, blocks=blocks, block_size=16).hit_ratio_blocks


lines = {name: (sizes, [ratio(name, size) for size in sizes]) for name in ("fifo", "lru", "gdsf", "belady")}
assert all(best >= other - 1e-9 for best, other in zip(lines["belady"][1], lines["fifo"][1], strict=True))
plots.curves(
    lines, title="Prefix hits by size of the cache", x="KV blocks of 16 tokens", y="blocks hit (%)", log=True
)
