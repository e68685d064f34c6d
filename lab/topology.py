"""What a fleet is made of: groups of equal replicas, what each group is there for, and the link between them.

Control plane. A topology is data: `topology=NAME` picks one of `TOPOLOGIES`, and each value can be changed, as in
`topology.groups.decode.count=3`. `slots` lists its replicas; the simulator says what each costs.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lab.errors import ConfigError

ROLES = ("mixed", "prefill", "decode")
MOST_DEVICES = 65_536


def _option(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass
class GroupConfig:
    """Replicas that are alike."""

    count: int = _option(1, "replicas")
    most: int | None = _option(None, "replicas that the scaling policy may reach; null: as many as `count`")
    role: str = _option("mixed", "mixed, prefill (up to the first token), decode (what follows)")
    hardware: str | None = _option(None, "their device; null: cost.hardware")
    tp: int | None = _option(None, "devices that share each layer; null: cost.tensor_parallel")
    pp: int | None = _option(None, "runs of layers; null: cost.pipeline_parallel")
    microbatches: int | None = _option(None, "parts a batch is cut into; null: cost.microbatches")
    ep: int | None = _option(
        None,
        "devices that share out the experts; beyond tp, groups of tp have requests of their own; null: 1",
    )
    nodes: list[int] = field(
        default_factory=list,
        metadata={
            "help": "node of each of its replicas, as in [0, 0, 1]; none, in all groups: one link for all KV"
        },
    )
    imbalance: float = _option(1.0, "ep: work of the busiest device's experts over the mean")


@dataclass
class LinkConfig:
    """What KV moves over from prefill to decode replicas: one link for all, or for each pair of their nodes."""

    gb_s: float | None = _option(None, "bandwidth; null: the slower end's network port")
    latency_us: float | None = _option(None, "until the first byte is there; null: the slower end's")
    node_gb_s: float | None = _option(None, "bandwidth inside a node; null: the slower end's device link")
    node_latency_us: float | None = _option(None, "the same until the first byte; null: the slower end's")
    switch_gb_s: float | None = _option(
        None, "what all links between different nodes carry together; null: they share nothing"
    )
    layerwise: bool = _option(False, "send a prompt's KV layer by layer while it is being computed")


@dataclass
class TopologyConfig:
    """Replica groups by name; none: fleet.replicas of what `cost` describes."""

    name: str = "single"
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    link: LinkConfig = field(default_factory=LinkConfig)


def _alike(name: str, **group: Any) -> TopologyConfig:
    return TopologyConfig(name, {"replica": GroupConfig(**group)})


def _split(name: str, prefill: GroupConfig, decode: GroupConfig) -> TopologyConfig:
    prefill.role, decode.role = "prefill", "decode"
    return TopologyConfig(name, {"prefill": prefill, "decode": decode})


TOPOLOGIES: Mapping[str, tuple[str, TopologyConfig]] = types.MappingProxyType(
    {
        "single": ("fleet.replicas replicas as cost describes them", TopologyConfig()),
        "tp2": ("one replica, each layer shared by 2 devices", _alike("tp2", tp=2)),
        "tp4": ("one replica, each layer shared by 4 devices", _alike("tp4", tp=4)),
        "pp2": ("one replica, its layers on 2 devices, 2 microbatches", _alike("pp2", pp=2, microbatches=2)),
        "dp2": ("2 replicas", _alike("dp2", count=2)),
        "dp4": ("4 replicas", _alike("dp4", count=4)),
        "tp2_dp2": ("2 replicas of 2 devices", _alike("tp2_dp2", count=2, tp=2)),
        "ep8": ("one replica on 8 devices that share out the experts", _alike("ep8", ep=8)),
        "tp8_ep8": (
            "one replica on 8 devices: each layer shared by all, but for its experts, whole on one each",
            _alike("tp8_ep8", tp=8, ep=8),
        ),
        "pd_1p1d": (
            "1 replica for prompts, 1 for what follows",
            _split("pd_1p1d", GroupConfig(), GroupConfig()),
        ),
        "pd_2p2d": (
            "2 replicas for prompts, 2 for what follows",
            _split("pd_2p2d", GroupConfig(count=2), GroupConfig(count=2)),
        ),
        "pd_hetero": (
            "prompts on an H100, what follows on 2 A100",
            _split("pd_hetero", GroupConfig(hardware="h100_sxm"), GroupConfig(count=2, hardware="a100_80g")),
        ),
        "hetero": (
            "an H100 and 2 A100 that do the same",
            TopologyConfig(
                "hetero",
                {
                    "fast": GroupConfig(hardware="h100_sxm"),
                    "slow": GroupConfig(count=2, hardware="a100_80g"),
                },
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A group whose replicas a scaling policy of its own adds to."""

    group: str
    first: int
    """Its first replica's place among those of the topology."""
    least: int
    most: int


def scaled(topology: Mapping[str, Any]) -> tuple[Scaled, ...]:
    """The groups that may grow, in their order."""
    found, first = [], 0
    for name, group in (topology.get("groups") or {}).items():
        count, most = int(group["count"]), group.get("most")
        if most is not None and most > count:
            found.append(Scaled(str(name), first, count, int(most)))
        first += count
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Slot:
    """One replica's place in a topology: which group it belongs to, and what that is there for."""

    group: str
    role: str
    node: int | None = None


def slots(topology: Mapping[str, Any]) -> tuple[Slot, ...]:
    """A replica for each, in order of the groups; from the configuration as plain data."""
    return tuple(
        Slot(str(name), str(group["role"]), (group.get("nodes") or [None] * group["count"])[n])
        for name, group in (topology.get("groups") or {}).items()
        for n in range(group["count"])
    )


def of(config: Mapping[str, Any]) -> TopologyConfig:
    """From a configuration as plain data, such as a run directory's `config.yaml`. Raises `ConfigError`."""
    told = config.get("topology") or {}
    try:
        groups = {str(name): GroupConfig(**group) for name, group in (told.get("groups") or {}).items()}
        return TopologyConfig(told.get("name", "single"), groups, LinkConfig(**(told.get("link") or {})))
    except TypeError as error:
        raise ConfigError(
            f"the topology can't be read: {error}; was it written by another version?"
        ) from error


def disaggregated(topology: TopologyConfig) -> bool:
    """Whether requests prefill on one replica and decode on another."""
    return any(group.role != "mixed" for group in topology.groups.values())


def validate(topology: TopologyConfig, shaped: bool) -> None:
    """Raises `ConfigError`, one sentence, for groups that make no sense. `shaped`: the cost model knows devices."""
    known = "', '".join(ROLES)
    for name, group in topology.groups.items():
        key = f"topology.groups.{name}"
        if group.role not in ROLES:
            raise ConfigError(f"{key}.role is '{group.role}'; expected one of '{known}'.")
        for what in ("count", "tp", "pp", "microbatches", "ep"):
            value = getattr(group, what)
            if value is not None and not 1 <= value <= MOST_DEVICES:
                raise ConfigError(f"{key}.{what} is {value}; expected 1 to {MOST_DEVICES}.")
        if group.most is not None and not group.count <= group.most <= MOST_DEVICES:
            raise ConfigError(
                f"{key}.most is {group.most}; expected {group.count}, its count, to {MOST_DEVICES}."
            )
        if not 1 <= group.imbalance < math.inf:
            raise ConfigError(f"{key}.imbalance is {group.imbalance}; expected a finite number, at least 1.")
        if not shaped:
            for what in _devices(group):
                raise ConfigError(
                    f"{key}.{what} is {getattr(group, what)}, and this cost model knows no devices; expected "
                    "cost=roofline, physical or tables."
                )
    roles = [group.role for group in topology.groups.values()]
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role in roles and other not in roles:
            raise ConfigError(
                f"topology {topology.name} has replicas for {role} and none for {other}; expected a group with "
                f"role={other} too."
            )
    if "mixed" in roles and len(set(roles)) > 1:
        raise ConfigError(
            f"topology {topology.name} has mixed replicas beside prefill and decode; expected one kind or the other."
        )
    _validate_nodes(topology, shaped)
    for what in ("gb_s", "latency_us", "node_gb_s", "node_latency_us", "switch_gb_s"):
        value = getattr(topology.link, what)
        if value is not None and not (0 <= value < math.inf and (value or "gb_s" not in what)):
            raise ConfigError(f"topology.link.{what} is {value}; expected a finite number above 0.")
    if topology.link.layerwise and not disaggregated(topology):
        raise ConfigError(
            f"topology.link.layerwise=true sends KV from prefill to decode replicas, and topology {topology.name} has "
            "neither; expected one with both, such as topology=pd_1p1d."
        )
    if not shaped and disaggregated(topology) and None in (topology.link.gb_s, topology.link.latency_us):
        raise ConfigError(
            "topology.link needs gb_s and latency_us where the cost model knows no devices, as in "
            "topology.link.gb_s=25 topology.link.latency_us=5."
        )


def _validate_nodes(topology: TopologyConfig, shaped: bool) -> None:
    """All groups name their replicas' nodes, or none does."""
    named = [name for name, group in topology.groups.items() if group.nodes]
    inside = {"node_gb_s": topology.link.node_gb_s, "node_latency_us": topology.link.node_latency_us}
    for what, value in {**inside, "switch_gb_s": topology.link.switch_gb_s}.items():
        if value is not None and not named:
            raise ConfigError(
                f"topology.link.{what} is {value}, and no group says on which nodes its replicas are; expected "
                "topology.groups.GROUP.nodes, such as [0, 1]."
            )
    if named and not disaggregated(topology):
        raise ConfigError(
            f"topology.groups.{named[0]}.nodes says where KV moves, and topology {topology.name} moves none; expected "
            "one with prefill and decode replicas, such as topology=pd_2p2d."
        )
    for name, group in topology.groups.items() if named else ():
        if len(group.nodes) != group.count or min(group.nodes) < 0:
            raise ConfigError(
                f"topology.groups.{name}.nodes is {list(group.nodes)}; expected a number, at least 0, for each of its "
                f"{group.count} replicas, since group {named[0]} names its nodes."
            )
    if named and not shaped and None in inside.values():
        raise ConfigError(
            "topology.link needs node_gb_s and node_latency_us where the cost model knows no devices, as in "
            "topology.link.node_gb_s=100 topology.link.node_latency_us=2."
        )


def _devices(group: GroupConfig) -> Iterator[str]:
    """What of a group only a cost model with devices can say."""
    for item in fields(GroupConfig):
        if item.name not in ("count", "most", "role", "nodes") and getattr(group, item.name) != item.default:
            yield item.name
