"""Devices that needn't be there: peak arithmetic, memory, links, power and price. Data plane, state path.

A description is a JSON file: one of `sim/data/hardware` by its name, or any other by its path. Each number comes with
a note of its source. Peaks are what the datasheet promises; what software reaches of them is the cost model's part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lab.errors import ConfigError, UnknownNameError

HARDWARE = Path(__file__).parent / "data" / "hardware"
USUAL = "h100_sxm"
"""Where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Link:
    """A way between two memories: bytes a second each way, and seconds before the first byte."""

    name: str
    bytes_s: float
    latency_s: float

    def seconds(self, size: float) -> float:
        """Time for `size` bytes one way."""
        return self.latency_s + size / self.bytes_s


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, and how it reaches others. Peaks are dense operations a second by dtype."""

    name: str
    about: str
    device: str
    """gpu or cpu."""
    flops: Mapping[str, float]
    memory_bytes: int
    """As the driver reports it."""
    memory_bytes_s: float
    link: Link
    """To the other devices of its node."""
    host_link: Link
    network: Link
    """To devices of other nodes."""
    devices_per_node: int
    tdp_w: float
    idle_w: float
    price_per_hour: float
    """USD."""
    sources: Mapping[str, str]

    def peak(self, dtype: str) -> float:
        """Operations a second in this dtype; in bfloat16, or what else there is, where it has no units for it."""
        for known in (dtype, "bfloat16", "float16", "float32"):
            if known in self.flops:
                return self.flops[known]
        return max(self.flops.values())

    def energy_j(self, busy_s: float, total_s: float) -> float:
        """Joules of a device that draws its full power while busy, and idle power for the rest of `total_s`.

        An upper bound: what waits for memory seldom draws all that the board may.
        """
        return self.tdp_w * busy_s + self.idle_w * max(total_s - busy_s, 0.0)


def names() -> list[str]:
    """Devices that are described here."""
    return sorted(path.stem for path in HARDWARE.glob("*.json"))


def load(name: str) -> Hardware:
    """A device by its name, or by the path of its description. Raises `ConfigError` in one sentence."""
    path = Path(name).expanduser()
    if not (name.endswith(".json") or "/" in name):
        path = HARDWARE / f"{name}.json"
        if not path.is_file():
            raise UnknownNameError("hardware", name, names())
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return _parse(path.stem, raw)
    except OSError as error:
        raise ConfigError(f"hardware description '{path}' can't be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"hardware description '{path}' is malformed: {error!r}") from error


def _parse(name: str, raw: Mapping[str, Any]) -> Hardware:
    known = {field.name for field in fields(Hardware)} - {"name", "memory_bytes_s"} | {"memory_gb_s"}
    missing, unknown = sorted(known - raw.keys()), sorted(raw.keys() - known)
    if missing or unknown:
        raise ValueError(f"missing keys {missing}, unknown keys {unknown}")
    return Hardware(
        name=name,
        about=str(raw["about"]),
        device=str(raw["device"]),
        flops={dtype: _positive(f"flops.{dtype}", value) for dtype, value in raw["flops"].items()},
        memory_bytes=int(_positive("memory_bytes", raw["memory_bytes"])),
        memory_bytes_s=_positive("memory_gb_s", raw["memory_gb_s"]) * 1e9,
        link=_link("link", raw["link"]),
        host_link=_link("host_link", raw["host_link"]),
        network=_link("network", raw["network"]),
        devices_per_node=int(_positive("devices_per_node", raw["devices_per_node"])),
        tdp_w=_positive("tdp_w", raw["tdp_w"]),
        idle_w=_positive("idle_w", raw["idle_w"]),
        price_per_hour=_positive("price_per_hour", raw["price_per_hour"]),
        sources={str(key): str(value) for key, value in raw["sources"].items()},
    )


def _link(key: str, raw: Mapping[str, Any]) -> Link:
    rate, latency = _positive(f"{key}.gb_s", raw["gb_s"]), _positive(f"{key}.latency_us", raw["latency_us"])
    return Link(str(raw["name"]), rate * 1e9, latency * 1e-6)


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; expected a finite number above 0")
    return float(value)
