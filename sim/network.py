"""Which links a topology has: as configured, else as the devices at their ends do. Data plane, state path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lab import topology
from lab.choices import SHAPED
from lab.topology import TopologyConfig
from sim import hardware, model_shape
from sim.hardware import Hardware
from sim.links import Link, Network
from sim.moves import Failure


def network(config: Mapping[str, Any]) -> Link | Network | None:
    """What KV moves over in this configuration, as plain data; None where none moves. One link for all where no nodes
    are named."""
    wanted = topology.of(config)
    if not topology.disaggregated(wanted):
        return None
    cost, layers = config["cost"], 0
    if wanted.link.layerwise:
        layers = model_shape.load(cost.get("model") or config["model"]["name"]).layers
    devices: list[Hardware] = []
    if cost["name"] in SHAPED:
        for group in wanted.groups.values():
            name = group.hardware or cost.get("hardware") or hardware.USUAL
            devices += [hardware.load(name)] * group.count
    return _links(wanted, devices, layers)


def failures(config: Mapping[str, Any]) -> list[Failure]:
    """Which replicas are lost in this configuration, and when."""
    return [
        Failure(
            each["replica"],
            round(each["at_s"] * 1e9),
            None if each["back_s"] is None else round(each["back_s"] * 1e9),
        )
        for each in config["fleet"].get("failures") or ()
    ]


def _links(config: TopologyConfig, devices: Sequence[Hardware], layers: int) -> Link | Network:
    wanted = config.link

    def made(ports: Sequence[hardware.Link], gb_s: float | None, latency_us: float | None) -> Link:
        rate = min(port.bytes_s for port in ports) if gb_s is None else gb_s * 1e9
        late = max(port.latency_s for port in ports) if latency_us is None else latency_us * 1e-6
        return Link(rate, round(late * 1e9), layers)

    places = topology.slots(asdict(config))
    nodes = tuple(place.node for place in places if place.node is not None)
    if not nodes:
        return made([device.network for device in devices], wanted.gb_s, wanted.latency_us)
    links: dict[tuple[int, int], Link] = {}
    sources, destinations = ([p.node for p in places if p.role == role] for role in ("prefill", "decode"))
    for way in sorted({(a, b) for a in sources for b in destinations if a is not None and b is not None}):
        ends = [
            device
            for device, place in zip(devices, places, strict=False)
            if (place.role, place.node) in (("prefill", way[0]), ("decode", way[1]))
        ]
        if way[0] == way[1]:
            links[way] = made([end.link for end in ends], wanted.node_gb_s, wanted.node_latency_us)
        else:
            links[way] = made([end.network for end in ends], wanted.gb_s, wanted.latency_us)
    return Network(links, nodes, None if wanted.switch_gb_s is None else wanted.switch_gb_s * 1e9)
