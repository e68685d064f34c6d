"""Topologies: from a name and a few words to replicas with devices, blocks and roles; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab import compose, topology
from lab.analysis.runs import load
from lab.assembly import EngineSpec
from lab.config import Config
from lab.console import Console
from lab.control.plan import Decoding
from lab.errors import DiptychError
from lab.experiment import experiment
from lab.validation import validate
from sim import hardware
from sim.backend import SimBackend, open_backend
from sim.cost.physical import Parallel, PhysicalCost
from sim.links import Link, Network
from sim.moves import Failure

LLAMA = ["backend=sim", "cost=physical", "cost.model=llama-3.1-8b"]


Composed = Callable[..., Config]
Opened = Callable[..., SimBackend]


@pytest.fixture(scope="module")
def composed() -> Iterator[Composed]:
    """A configuration of these words, from one composer for all."""
    with compose.composer() as composer:

        def made(*words: str) -> Config:
            cfg = composer.config(list(words))
            validate(cfg)
            return cfg

        yield made


@pytest.fixture
def opened(composed: Composed) -> Opened:
    return lambda *words: open_backend(composed(*LLAMA, *words), Console(), None)


def costs(backend: SimBackend) -> list[PhysicalCost]:
    found = [cost for cost, _ in backend.replicas]
    assert all(isinstance(cost, PhysicalCost) for cost in found)
    return found  # type: ignore[return-value]


def laid_out(backend: SimBackend) -> list[tuple[str, int, int]]:
    return [(cost.hardware.name, cost.parallel.tensor, cost.parallel.pipeline) for cost in costs(backend)]


@pytest.mark.parametrize("name", topology.TOPOLOGIES)
def test_every_topology_composes_and_survives_its_file(name: str, composed: Composed) -> None:
    words = [f"topology={name}", "routing=round_robin"] if name != "single" else []
    cfg = composed(*LLAMA, *words)
    again = compose.from_yaml(compose.to_yaml(cfg))
    assert again.topology == cfg.topology == topology.TOPOLOGIES[name][1]
    spec = EngineSpec.of(dataclasses.asdict(cfg))
    counts = [group.count for group in cfg.topology.groups.values()]
    assert spec.fleet.replicas == spec.fleet.most == (sum(counts) or 1)


def test_groups_say_what_their_replicas_are(composed: Composed, opened: Opened) -> None:
    assert laid_out(opened("topology=tp2_dp2", "routing=round_robin")) == [("h100_sxm", 2, 1)] * 2
    mixed = opened("topology=hetero", "routing=round_robin", "topology.groups.slow.count=1")
    assert laid_out(mixed) == [("h100_sxm", 1, 1), ("a100_80g", 1, 1)]
    split = opened("topology=pd_1p1d", "topology.groups.decode.tp=4", "topology.groups.prefill.pp=2")
    assert laid_out(split) == [("h100_sxm", 1, 2), ("h100_sxm", 4, 1)]
    cfg = composed(*LLAMA, "topology=pd_2p2d", "routing=round_robin")
    assert EngineSpec.of(dataclasses.asdict(cfg)).fleet.roles == ("prefill", "prefill", "decode", "decode")


def test_four_devices_hold_more_kv_than_four_replicas_by_the_weights_they_share(opened: Opened) -> None:
    one, four = opened("topology=single").capacity, opened("topology=tp4").capacities[0]
    assert four.blocks > 4 * one.blocks


def test_what_a_group_says_of_its_devices_reaches_their_costs(opened: Opened) -> None:
    assert costs(opened("topology=pp2"))[0].parallel == Parallel(pipeline=2, microbatches=2)
    words = "cost.model=qwen3-30b-a3b", "topology=ep8", "topology.groups.replica.imbalance=1.5"
    assert costs(opened(*words))[0].parallel == Parallel(expert=8, imbalance=1.5)
    words = "cost.model=qwen3-30b-a3b", "topology=tp8_ep8", "topology.groups.replica.tp=2"
    found = opened(*words, "topology.groups.replica.pp=2")
    assert costs(found)[0].parallel == Parallel(2, 2, expert=8)
    assert found.power[0].devices == 16


def test_kv_moves_at_the_pace_of_the_slower_end(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    known = hardware.load

    def load(name: str) -> hardware.Hardware:
        """The A100's port is the slower one; here the H100's is the later one, too."""
        found = known(name)
        port = replace(found.network, latency_s=9e-6 if name == "h100_sxm" else 5e-6)
        return replace(found, network=port)

    monkeypatch.setattr("sim.hardware.load", load)
    assert opened("topology=pd_hetero", "routing=round_robin")._link == Link(25e9, 9000)
    told = "topology.link.gb_s=10", "topology.link.latency_us=7"
    assert opened("topology=pd_1p1d", *told)._link == Link(10e9, 7000)
    assert opened("topology=pd_1p1d", *told, "topology.link.layerwise=true")._link == Link(10e9, 7000, 32)
    unshaped = "cost=reference", "topology.link.layerwise=true", "model=smollm2"
    assert opened("topology=pd_1p1d", *told, *unshaped, "cost.model=null")._link == Link(10e9, 7000, 30)
    assert opened("topology=tp2")._link is None


def test_links_of_nodes_are_those_of_the_devices_at_their_ends(opened: Opened) -> None:
    """An H100 beside an A100 on node 0, and one on node 1."""
    words = "topology=pd_hetero", "topology.groups.prefill.nodes=[0]", "topology.groups.decode.nodes=[0,1]"
    fast, slow = hardware.load("h100_sxm"), hardware.load("a100_80g")
    inside = Link(slow.link.bytes_s, round(max(slow.link.latency_s, fast.link.latency_s) * 1e9), 32)
    across = Link(slow.network.bytes_s, round(max(slow.network.latency_s, fast.network.latency_s) * 1e9), 32)
    more = "routing=round_robin", "topology.link.layerwise=true"
    assert opened(*words, *more)._link == Network({(0, 0): inside, (0, 1): across}, (0, 0, 1))
    told = [
        f"topology.link.{word}" for word in ("gb_s=10", "latency_us=7", "node_gb_s=100", "node_latency_us=1")
    ]
    expected = Network({(0, 0): Link(100e9, 1000), (0, 1): Link(10e9, 7000)}, (0, 0, 1))
    assert opened(*words, *told, "routing=round_robin")._link == expected
    shared = replace(expected, switch_bytes_s=5e9)
    assert opened(*words, *told, "routing=round_robin", "topology.link.switch_gb_s=5")._link == shared
    assert opened(*words, *told, "routing=round_robin", "topology.groups.prefill.hardware=null", "cost=reference",
                  "topology.groups.decode.hardware=null", "cost.model=null")._link == expected  # fmt: skip


def test_failures_are_told_in_seconds(opened: Opened) -> None:
    found = opened("topology=pd_1p1d", "fleet.failures=[{replica: 1, at_s: 2.5, back_s: 0.25}]")
    assert found._failures == [Failure(1, 2_500_000_000, 250_000_000)]


def test_every_replica_is_its_own_groups(composed: Composed, tmp_path: Path) -> None:
    """Steps, blocks, energy and price of a fleet whose replicas differ, against each group's own description."""
    cfg = composed(
        *LLAMA, "topology=hetero", "topology.groups.fast.tp=2", "routing=round_robin", "trace=poisson", "trace.n=9",
        "trace.rate=20", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    experiment(cfg)
    run = load(tmp_path / "run")
    backend = open_backend(cfg, Console(), None)
    up = run.metrics["duration_s"]
    watts = usd = 0.0
    for replica, cost in enumerate(costs(backend)):
        own = run.steps[run.steps["replica"] == replica]
        least = cost.cost_of(Decoding(1, 1, 1), ()).weights
        assert own["weights_term_ns"].min() == pytest.approx(least * 1e9, abs=1)
        pool = own["blocks_free"] + own["blocks_cached"] + own["blocks_held"]
        assert set(pool) == {backend.capacities[replica].blocks}
        device, count = cost.hardware, 2 if replica == 0 else 1
        busy = float((own["end_ns"] - own["start_ns"]).sum()) / 1e9
        watts += count * (device.idle_w * up + (device.tdp_w - device.idle_w) * busy)
        usd += count * device.price_per_hour * up / 3600
    assert len({capacity.blocks for capacity in backend.capacities}) == 2
    assert run.metrics["energy"]["kwh"] == pytest.approx(watts / 3.6e6)
    assert run.metrics["cost"]["usd"] == pytest.approx(usd)


def examples() -> list[list[str]]:
    page = (Path(__file__).parents[2] / "docs" / "topology.md").read_text(encoding="utf-8")
    return [shlex.split(line)[3:] for line in re.findall(r"^    (python -m lab\.experiment .*)$", page, re.M)]


@pytest.mark.parametrize("words", examples(), ids=lambda words: str(words[3]))
def test_the_pages_examples_run(
    words: list[str], composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(*words, "trace.limit=12", "trace.rate_scale=10", f"run.dir={tmp_path / 'run'}")
    assert experiment(cfg) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["requests"]["finished"] == 12
    assert metrics["cost"]["usd"] > 0
    assert "USD/M" in capsys.readouterr().out
    assert load(tmp_path / "run").request_records()


def attainment(composed: Composed, folder: Path, name: str, budget: int) -> float:
    words = [
        "cost=physical", "cost.model=llama-3.1-8b", "routing=least_tokens", "engine.max_seqs=256", "trace=poisson",
        "trace.n=250", "trace.rate=24", "trace.prompt.mean=2000", "trace.prompt.high=8192", "trace.output.mean=128",
        "trace.output.high=1024", "slo.ttft_ms=100", "slo.tpot_ms=9", "run.record=requests", "backend=sim",
    ]  # fmt: skip
    more = f"topology={name}", f"engine.token_budget={budget}", f"run.dir={folder / name}-{budget}"
    experiment(composed(*words, *more))
    return float(
        json.loads((folder / f"{name}-{budget}" / "metrics.json").read_text())["goodput"]["attainment"]
    )


def test_the_best_step_size_is_another_on_another_topology(composed: Composed, tmp_path: Path) -> None:
    both = {
        name: [attainment(composed, tmp_path, name, size) for size in (256, 2048)]
        for name in ("dp4", "pd_2p2d")
    }
    assert both["dp4"][0] > both["dp4"][1] + 0.1
    assert both["pd_2p2d"][0] < both["pd_2p2d"][1] - 0.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["topology=tp3"], "unknown topology 'tp3'"),
        (["topology=tp2", "topology.groups.replica.tp=3"], "32 query heads; expected a divisor"),
        (["topology=pp2", "topology.groups.replica.pp=33"], "has 32 layers"),
        (["topology=tp2", "topology.groups.replica.tp=0"], "topology.groups.replica.tp is 0; expected 1"),
        (["topology=tp2", "topology.groups.replica.cores=2"], "cores"),
        (["topology=tp2", "cost.model=llama-3.1-70b", "cost.hardware=l40s"], "doesn't fit on 2 x l40s"),
        (["topology=pd_1p1d", "topology.groups.decode.role=prefill"], "none for decode"),
        (["topology=pd_1p1d", "topology.groups.decode.role=mixed"], "none for decode"),
        (["topology=ep8", "topology.groups.replica.imbalance=0.9"], "imbalance is 0.9; expected a finite"),
        (
            [
                "topology=ep8",
                "cost.model=qwen3-30b-a3b",
                *(f"topology.groups.replica.{x}" for x in ("tp=32", "pp=49")),
            ],
            "has 48 layers",
        ),
        (
            ["topology=tp8_ep8", "cost.model=mixtral-8x7b", "topology.groups.replica.ep=3"],
            "over 3 devices, and mixtral-8x7b has 8 experts",
        ),
        (["topology=tp8_ep8"], "llama-3.1-8b has no experts"),
        (["topology=pd_1p1d", "topology.link.node_gb_s=9"], "no group says on which nodes"),
        (
            ["topology=pd_1p1d", "topology.link.switch_gb_s=9"],
            "switch_gb_s is 9.0, and no group says on which nodes",
        ),
        (["topology=pd_1p1d", "topology.link.switch_gb_s=0"], "topology.link.switch_gb_s is 0.0"),
        (["topology=dp2", "topology.groups.replica.nodes=[0,1]"], "topology dp2 moves none"),
        (["topology=pd_1p1d", "topology.groups.decode.nodes=[0]"], "prefill.nodes is []; expected a number"),
        (
            ["topology=pd_1p1d", *(f"topology.groups.{x}.nodes=[0,1]" for x in ("prefill", "decode"))],
            "of its 1 replicas",
        ),
        (["topology=dp2", "topology.link.layerwise=true"], "sends KV from prefill to decode"),
        (["topology=pd_1p1d", "topology.link.latency_us=-1"], "topology.link.latency_us is -1.0"),
        (["topology=pd_1p1d", "cost=reference"], "topology.link needs gb_s and latency_us"),
        (["topology=hetero"], "leave all replicas but one idle"),
        (["topology=dp2", "fleet.replicas=2"], "topology.groups.GROUP.count"),
        (["topology=tp2", "cost=reference"], "knows no devices"),
        (["topology=tp2", "topology.groups.replica.hardware=h1000"], "unknown hardware 'h1000'"),
        (["topology=pd_1p1d", "sampling.n=2"], "one output alone"),
        (["topology=pd_1p1d", "topology.link.gb_s=0"], "topology.link.gb_s is 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(words: list[str], said: str, opened: Opened) -> None:
    with pytest.raises(DiptychError) as caught:
        opened(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_replica_does_both_or_one_of_the_two_in_all_groups() -> None:
    groups = {role: topology.GroupConfig(role=role) for role in topology.ROLES}
    with pytest.raises(DiptychError, match="mixed replicas beside prefill and decode"):
        topology.validate(topology.TopologyConfig("three", groups), True)
    del groups["mixed"]
    topology.validate(topology.TopologyConfig("two", groups), True)
