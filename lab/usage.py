"""The text of `--help`: every choice with a line about it, every option with its default. Observation path.

Written from `lab/config.py` and `lab/choices.py`, without Hydra and without importing plug-ins that aren't chosen.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import plugins
from lab.choices import COSTS, DEFAULT_TRACE, MODELS, Choice, choice_schema, traces
from lab.config import SEAMS, Config, StudyConfig
from lab.errors import DiptychError
from lab.options import REQUIRED
from lab.topology import TOPOLOGIES, GroupConfig, LinkConfig

_ABOUT = {
    "policy": "who gets how many tokens of the next step; also module:Class or ./file.py:Class",
    "preemption": "whom to preempt when KV runs short, and whether its KV is dropped or swapped out",
    "predictor": "how output lengths are foreseen, for policies that order by them",
    "eviction": "which cached KV block to give up",
    "compression": "how much of its own KV a request keeps, and which part of it",
    "admission": "whether a request enters",
    "routing": "which replica serves it",
    "scaling": "how many replicas there are",
    "trace": "the workload",
    "model": "what is served; also a local directory or a hub id (org/name)",
    "cost": "where simulated durations come from",
    "topology": "which replicas the simulator has, and on what",
}


def usage(prog: str, about: str, words: Sequence[str], config_dir: Path | None = None) -> str:
    """The help page. `words` are the overrides beside `--help`: options of what they choose are shown.

    `config_dir` is where `+experiment=NAME` would be looked for; it is offered where there are any.
    """
    chosen = {**SEAMS, "trace": DEFAULT_TRACE, "model": "smollm2", "cost": "fitted", "topology": "single"}
    for word in words:
        key, _, value = word.partition("=")
        if key in chosen and value:
            chosen[key] = value.split(",")[0]
    prepared = sorted(path.stem for path in (config_dir / "experiment").glob("*.yaml")) if config_dir else []
    lines = [
        f"usage: {prog} [GROUP=NAME ...] [OPTION=VALUE ...]",
        *([f"\n{about}"] if about else []),
        "",
        "  -m, --multirun    run every combination of listed values: -m policy=fcfs,sjf seed=0,1",
        "  --cfg job         print the configuration and stop",
        "  --config-dir DIR  more configuration files: DIR/experiment/NAME.yaml is +experiment=NAME",
        *([f"  +experiment=NAME  a prepared one: {', '.join(prepared)}"] if prepared else []),
        "  -h, --help        this page, with the options of what is chosen beside it (trace=poisson --help)",
        "",
        "Choices (* unless something else is said)",
    ]
    for group, known in _choices().items():
        lines.append(f"  {group}: {_ABOUT[group]}")
        lines += [
            _line(f"{'*' if name == chosen[group] else ' '} {name}", text, 4) for name, text in known.items()
        ]
    lines += ["", "Options"]
    config = Config()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "origin":
            continue
        if item.name == "studies":
            if prepared:  # who defines studies needs a file of them
                lines += _nested("studies.STUDY", StudyConfig(), {})
        elif item.name == "topology":
            lines += _nested("topology.groups.GROUP", GroupConfig(), {})
            lines += _nested("topology.link", LinkConfig(), {})
        elif item.name in SEAMS or item.name == "trace":
            lines += _choice_options(item.name, chosen[item.name])
        elif dataclasses.is_dataclass(value):
            for option in dataclasses.fields(value):
                if option.name != "name":
                    shown = _show(getattr(value, option.name))
                    lines.append(_line(f"{item.name}.{option.name}={shown}", option.metadata.get("help", "")))
        else:
            lines.append(_line(f"{item.name}={_show(value)}", item.metadata.get("help", "")))
    return "\n".join(lines)


def _choices() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for group in SEAMS:
        found[group] = {name: plugins.summary(group, name) for name in plugins.names(group)}
    found["trace"] = {name: str(getattr(entry, "about", "")) for name, entry in traces().items()}
    found["model"] = {name: about for name, (about, _) in MODELS.items()}
    found["cost"] = {name: about for name, (about, _) in COSTS.items()}
    found["topology"] = {name: about for name, (about, _) in TOPOLOGIES.items()}
    return found


def _choice_options(group: str, name: str) -> list[str]:
    try:
        schema = choice_schema(group, name)
        docs = field_docs(traces()[name].options) if group == "trace" else {}
    except DiptychError as error:
        return [_line(f"{group}.?", str(error))]
    return _nested(group, schema(), docs)


def _nested(prefix: str, node: Any, docs: dict[str, str]) -> list[str]:
    lines = []
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if isinstance(node, Choice) and item.name == "name":
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            lines += _nested(f"{prefix}.{item.name}", value, field_docs(type(value)))
        else:
            about = docs.get(item.name) or item.metadata.get("help", "")
            lines.append(_line(f"{prefix}.{item.name}={_show(value)}", about))
    return lines


def field_docs(cls: type) -> dict[str, str]:
    """First line of the string below each field of a dataclass and its bases, read from the source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, SyntaxError):
            continue
        statements = getattr(body, "body", [])
        for item, below in itertools.pairwise(statements):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                text = getattr(getattr(below, "value", None), "value", None)
                if isinstance(text, str):
                    found[item.target.id] = inspect.cleandoc(text).partition("\n")[0]
    return found


def _show(value: object) -> str:
    if value == REQUIRED:
        return "(required)"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(left: str, right: str, indent: int = 2) -> str:
    return f"{' ' * indent}{left:<30}  {right}".rstrip()
