"""Traces by name: what exists, what each one takes, and `build`. Request path."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, TypeVar

from lab.errors import ConfigError, UnknownNameError
from traces.azure import AzureOptions, load_azure
from traces.chat import ChatOptions, load_chat
from traces.files import shown
from traces.mooncake import MooncakeOptions, load_mooncake
from traces.shape import FileOptions, ShapeOptions
from traces.synthetic import GammaOptions, PoissonOptions, load_synthetic
from traces.tenants import TenantsOptions, load_tenants
from traces.workload import Workload

Schema = TypeVar("Schema", bound=object)


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """One trace a user can name.

    `options` is a plain dataclass with a default for every field, so a configuration system can make a typed
    schema of it. `get` says where a file comes from when `needs_path`.
    """

    about: str
    options: type[ShapeOptions]
    load: Callable[[str, Any], Workload]
    needs_path: bool = False
    get: str = ""


def _file(loader: Callable[[str, Any, str], Workload]) -> Callable[[str, Any], Workload]:
    return lambda name, options: loader(name, options, options.path)


_AZURE_2023 = "download AzureLLMInferenceTrace_{}.csv from data/ of github.com/Azure/AzurePublicDataset"

TRACES: Final[dict[str, TraceSpec]] = {
    "chat": TraceSpec(
        "a chat service in small: multi-turn sessions under shared system prompts (ships with Diptych)",
        ChatOptions,
        lambda name, options: load_chat(name, options, options.path),
    ),
    "azure_2023_conv": TraceSpec(
        "Azure 2023 conversations, 19,366 requests; Azure 2024 files have the same columns",
        AzureOptions,
        _file(load_azure),
        needs_path=True,
        get=_AZURE_2023.format("conv"),
    ),
    "azure_2023_code": TraceSpec(
        "Azure 2023 code completion, 8,819 requests; Azure 2024 files have the same columns",
        AzureOptions,
        _file(load_azure),
        needs_path=True,
        get=_AZURE_2023.format("code"),
    ),
    "mooncake": TraceSpec(
        "Mooncake's format: lengths and chained ids of 512-token prompt blocks",
        MooncakeOptions,
        _file(load_mooncake),
        needs_path=True,
        get="download conversation_trace.jsonl from FAST25-release/traces/ of github.com/kvcache-ai/Mooncake",
    ),
    "tenants": TraceSpec(
        "requests of several tenants, CSV of arrival_s, client, prompt_tokens, output_tokens",
        TenantsOptions,
        _file(load_tenants),
        needs_path=True,
        get="write a CSV file as traces/README.md describes",
    ),
    "poisson": TraceSpec("independent arrivals at a rate, seeded lengths", PoissonOptions, load_synthetic),
    "gamma": TraceSpec("bursty or steady arrivals at a rate, seeded lengths", GammaOptions, load_synthetic),
    "jsonl": TraceSpec(
        "conversations or single requests of your own, JSON lines",
        ChatOptions,
        _file(load_chat),
        needs_path=True,
        get="write a JSON-lines file as traces/README.md describes",
    ),
}


def build(name: str, options: Mapping[str, object] | ShapeOptions | None = None) -> Workload:
    """The workload called `name`.

    `options` holds the fields of `TRACES[name].options`, nested ones as mappings, or is an instance of it.
    Raises UnknownNameError (trace or option), ConfigError (value, missing path), TraceError (the file).
    """
    if name not in TRACES:
        raise UnknownNameError("trace", name, TRACES)
    spec = TRACES[name]
    if isinstance(options, ShapeOptions):
        if not isinstance(options, spec.options):
            expected = spec.options.__name__
            raise ConfigError(f"trace '{name}' got {type(options).__name__}; expected {expected}")
        filled = options
    else:
        filled = fill(spec.options, options or {}, "trace")
    if spec.needs_path and not getattr(filled, "path", None):
        raise ConfigError(f"trace '{name}' needs a file: {spec.get}, then set trace.path=PATH")
    if isinstance(filled, FileOptions) and filled.path == "":
        raise ConfigError("trace.path is ''; expected a file's path, or null")
    return spec.load(name, filled)


def fill(schema: type[Schema], values: Mapping[str, object], prefix: str) -> Schema:
    """An instance of the dataclass `schema` from a mapping, with names and types checked."""
    hints = typing.get_type_hints(schema)
    known = [item.name for item in fields(typing.cast(Any, schema))]
    checked: dict[str, object] = {}
    for key, value in values.items():
        if key not in known:
            raise UnknownNameError("option", f"{prefix}.{key}", [f"{prefix}.{name}" for name in known])
        checked[key] = _typed(hints[key], value, f"{prefix}.{key}")
    return schema(**checked)


def _typed(hint: Any, value: object, option: str) -> object:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    kind = choices[0]
    if is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        if isinstance(value, Mapping):
            return fill(typing.cast(type, kind), value, option)
    elif typing.get_origin(kind) is list:
        if isinstance(value, Sequence) and not isinstance(value, str):
            (inner,) = typing.get_args(kind)
            return [_typed(inner, item, f"{option}.{number}") for number, item in enumerate(value)]
        raise ConfigError(f"{option} is {shown(value)}; expected a list")
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer too large for a float falls through
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    expected = words.get(kind, "a group of options") + (" or null" if type(None) in choices else "")
    raise ConfigError(f"{option} is {shown(value)}; expected {expected}")
