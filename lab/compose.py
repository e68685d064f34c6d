"""Command-line words to a `Config`, through Hydra's compose API. Control plane.

Hydra wants typed nodes before it composes, and we want to import only the plug-ins that are chosen, which
is known only after composing. So each configuration is composed twice: first with untyped nodes and the
group choices alone, to learn the names; then with the typed nodes of exactly those. Around that stand
sweeps over several values, and one sentence about what is wrong where Hydra prints a page.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lab import plugins
from lab.choices import COSTS, DEFAULT_TRACE, MODELS, choice_schema, traces
from lab.config import SEAMS, Config, ModelConfig, Origin
from lab.errors import ConfigError, UnknownNameError
from lab.topology import TOPOLOGIES

GROUPS = (*SEAMS, "trace", "model", "cost", "topology")
_CHOICES = (*SEAMS, "trace")
_FAILURES = (HydraException, OmegaConfBaseException, yaml.YAMLError)


class Composer:
    """Composes configurations; make one with `composer()`, which holds Hydra's global state open."""

    def __init__(self, config_dir: Path | None = None) -> None:
        self._config_dir = config_dir
        self._store = ConfigStore.instance()
        defaults: list[Any] = ["base_config"]
        defaults += [{group: name} for group, name in SEAMS.items()]
        defaults += [
            {"trace": DEFAULT_TRACE},
            {"model": "smollm2"},
            {"cost": "fitted"},
            {"topology": "single"},
            "_self_",
        ]
        self._store.store(name="base_config", node=Config)
        self._store.store(name="config", node={"defaults": defaults})
        for model, (_, node) in MODELS.items():
            self._store.store(group="model", name=model, node=node)
        for cost, (_, cost_node) in COSTS.items():
            self._store.store(group="cost", name=cost, node=cost_node)
        for topology, (_, groups) in TOPOLOGIES.items():
            self._store.store(group="topology", name=topology, node=groups)
        self._in_files: dict[str, list[str]] = {}
        """By group, what configuration files add to it: asking Hydra takes a fifth of a composition."""
        self._options = {group: plugins.names(group) for group in SEAMS} | {"trace": list(traces())}
        for group, names in self._options.items():
            for name in names:
                self._store.store(group=group, name=name, node={"name": name})

    def jobs(self, words: Sequence[str], *, sweep: bool) -> list[list[str]]:
        """The overrides of each job: one, or with `sweep` one for each combination of listed values."""
        axes: list[list[str]] = []
        for override in self._parse(words):
            if not override.is_sweep_override():
                axes.append([str(override.input_line)])
                continue
            if not sweep:
                raise ConfigError(
                    f"'{override.input_line}' lists several values; add -m to run each of them."
                )
            key = override.get_key_element()
            value: Any = override.value()
            if isinstance(value, Glob):
                axes.append([f"{key}={name}" for name in self._matching(override.key_or_group, value)])
            elif override.is_discrete_sweep():
                axes.append([f"{key}={item}" for item in override.sweep_string_iterator()])
            else:
                raise ConfigError(
                    f"'{override.input_line}' is a continuous range; expected listed values or range()."
                )
        return [list(job) for job in itertools.product(*axes)]

    def compose(self, words: Sequence[str]) -> DictConfig:
        """The configuration as Hydra composes it. Raises `ConfigError` for what makes no sense."""
        overrides = self._parse(words)
        choosing = [self._choice(o) for o in overrides if self._chooses(o)]
        try:
            first = hydra.compose("config", choosing)
        except _FAILURES as error:
            raise self._explain(error, overrides, None) from error
        typed = []
        for group in _CHOICES:
            typed.append(f"{group}={self._typed_node(group, self._name(first, group))}")
        typed += [str(o) for o in choosing if o.partition("=")[0].lstrip("+") not in _CHOICES]
        rest = [str(o.input_line) for o in overrides if not self._chooses(o)]
        try:
            return hydra.compose("config", typed + rest)
        except _FAILURES as error:
            raise self._explain(error, overrides, typed) from error

    def config(self, words: Sequence[str]) -> Config:
        """A checked `Config` (types and names; `lab/validation.py` does the values)."""
        found = to_config(self.compose(words))
        found.origin = Origin(tuple(words), self._config_dir)
        return found

    # --- choices ----------------------------------------------------------------------------------------

    def _parse(self, words: Sequence[str]) -> list[Override]:
        parser, found = OverridesParser.create(), []
        for word in words:
            if not word.partition("=")[0].strip("+~ "):
                raise ConfigError(f"can't read '{word}': it has no key; expected key=value.")
            try:
                found += parser.parse_overrides([word])
            except (OverrideParseException, HydraException) as error:
                raise ConfigError(
                    f"can't read '{word}'; expected key=value (quote values with , = or brackets)."
                ) from error
        for override in found:
            if re.match(r"hydra\b", override.key_or_group):
                raise ConfigError(f"'{override.input_line}': Hydra's own settings have no effect here.")
        return found

    def _chooses(self, override: Override) -> bool:
        """Whether an override picks from a group, so that it says which nodes are needed."""
        key = override.key_or_group
        return key in GROUPS or key in [f"{g}.name" for g in _CHOICES] or self._is_file_group(key)

    def _choice(self, override: Override) -> str:
        """The override for Hydra. A path is registered under a plain name; an unknown name is refused."""
        key, value = override.key_or_group, override.value()
        if override.is_delete() or override.is_sweep_override() or override.package is not None:
            raise ConfigError(f"'{override.input_line}': {key} must be one of its options.")
        if key.endswith(".name") or self._is_file_group(key):
            return str(override.input_line)
        if not isinstance(value, str):
            # Quoted, or a word that reads as a number or null.
            value = override.get_value_string().strip("'\"")
        return f"{key}={self._node(key, value)}"

    def _node(self, group: str, name: str) -> str:
        """The name under which Hydra finds what the user called `name`."""
        if group in ("cost", "topology"):
            known: Mapping[str, Any] = COSTS if group == "cost" else TOPOLOGIES
            if name not in known:
                raise UnknownNameError(group, name, known)
            return name
        if group == "model":
            if name in MODELS:
                return name
            if "/" not in name and not Path(name).is_dir():
                raise UnknownNameError("model", name, MODELS, "Or a local directory, or a hub id (org/name).")
            return self._store_as(group, name, ModelConfig(name))
        if name in self._options[group]:
            return name
        if group in SEAMS and plugins.is_path(name):
            return self._store_as(group, name, {"name": name})
        choice_schema(group, name)  # raises with the nearest name
        raise UnknownNameError(group, name, self._options[group])

    def _store_as(self, group: str, name: str, node: Any) -> str:
        plain = re.sub(r"\W", "_", name)
        self._store.store(group=group, name=plain, node=node)
        return plain

    def _typed_node(self, group: str, name: str) -> str:
        return self._store_as(group, name, choice_schema(group, name))

    @staticmethod
    def _name(cfg: DictConfig, group: str) -> str:
        node: Any = cfg.get(group)
        if not isinstance(node, DictConfig) or not isinstance(node.get("name"), str):
            raise ConfigError(f"{group} is {node!r}; expected one of its options, with a name.")
        return str(node["name"])

    def _matching(self, group: str, glob: Glob) -> list[str]:
        known = self._options | {"model": list(MODELS), "cost": list(COSTS), "topology": list(TOPOLOGIES)}
        names = list(glob.filter(known.get(group) or self._file_options(group)))
        if not names:
            raise ConfigError(f"no option of {group} matches the glob.")
        return names

    # --- what went wrong --------------------------------------------------------------------------------

    def _explain(self, error: Exception, overrides: list[Override], typed: list[str] | None) -> ConfigError:
        """One sentence. Hydra's own messages name the key but not the nearest valid one."""
        for override in overrides:
            group, value = override.key_or_group, override.value()
            if self._is_file_group(group):
                if value not in self._file_options(group):
                    return UnknownNameError(group, str(value), self._file_options(group))
                if not override.is_add():
                    return ConfigError(
                        f"'{override.input_line}' adds to the defaults: write +{override.input_line}."
                    )
        if typed is not None:
            try:
                base = hydra.compose("config", typed)
            except _FAILURES as inner:
                return ConfigError(_said(inner))
            for override in overrides:
                if not self._chooses(override) and (found := self._explain_one(base, override)):
                    return found
        return ConfigError(_said(error))

    def _explain_one(self, base: DictConfig, override: Override) -> ConfigError | None:
        key, node = override.key_or_group, cast(Any, base)
        if "/" in key or "@" in str(override.input_line).partition("=")[0]:
            return UnknownNameError("option group", key, GROUPS)
        *path, last = key.split(".")
        for depth, part in enumerate([*path, last]):
            if not isinstance(node, DictConfig):
                above = ".".join(key.split(".")[:depth])
                return ConfigError(f"{key}: {above} is a value and has no options below it.")
            if part not in node:
                if override.is_add() and not OmegaConf.is_struct(node):
                    return None
                return _unknown_option(".".join(key.split(".")[:depth]), part, node)
            node = node._get_node(part) if depth < len(path) else node
        if override.is_add():
            return ConfigError(f"{override.input_line}: {key} exists already; drop the '+'.")
        if isinstance(node._get_node(last), DictConfig):
            return ConfigError(
                f"{key} is a section; set its options, as in {key}.{next(iter(node[last]))}=VALUE."
            )
        try:
            OmegaConf.update(base, key, override.value())
        except OmegaConfBaseException as error:
            return ConfigError(f"{override.input_line}: {_said(error)}.")
        return None

    def _file_options(self, group: str) -> list[str]:
        if group not in self._in_files:
            instance = GlobalHydra.instance().hydra
            assert instance is not None
            self._in_files[group] = list(instance.config_loader.get_group_options(group))
        return self._in_files[group]

    def _is_file_group(self, group: str) -> bool:
        """A group that only configuration files define, such as `+experiment=...`."""
        return "." not in group and group not in GROUPS and bool(self._file_options(group))


@contextmanager
def composer(config_dir: Path | None = None) -> Iterator[Composer]:
    """Hydra's compose API, with the YAML files of `config_dir` (absolute) on its search path."""
    if config_dir is None:
        with hydra.initialize(version_base="1.3", config_path=None):
            yield Composer()
    else:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir)):
            yield Composer(config_dir)


def to_config(cfg: DictConfig) -> Config:
    """The dataclass. A value that is still missing, or an interpolation to nowhere, is a `ConfigError`."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(_said(error)) from error
    if missing:
        raise ConfigError(f"{missing[0]} must be given: {missing[0]}=VALUE.")
    _refuse_additions("", cfg)
    try:
        found = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_said(error)) from error
    assert isinstance(found, Config)
    return found


def _refuse_additions(prefix: str, node: DictConfig) -> None:
    """A leading `+` lets Hydra add keys to typed nodes, where nobody would ever read them."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set()
    for key in map(str, node):
        if known and key not in known:
            raise _unknown_option(prefix, key, {name: node.get(name) for name in known})
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_additions(f"{prefix}.{key}" if prefix else key, child)


def _unknown_option(prefix: str, key: str, known: Mapping[Any, Any]) -> UnknownNameError:
    dot = f"{prefix}." if prefix else ""
    hint = f"({prefix} is '{known['name']}'.)" if prefix in _CHOICES else ""
    return UnknownNameError("option", f"{dot}{key}", [f"{dot}{name}" for name in known], hint)


def to_yaml(cfg: Config) -> str:
    """`config.yaml`: every value, nothing left to resolve."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def from_yaml(text: str) -> Config:
    """The configuration that `to_yaml` wrote, checked as one that is composed."""
    try:
        data = OmegaConf.create(text)
        typed = OmegaConf.structured(Config())
        for group in _CHOICES:
            schema = choice_schema(group, str(cast(DictConfig, data)[group]["name"]))
            typed[group] = OmegaConf.structured(schema)
        return to_config(cast(DictConfig, OmegaConf.merge(typed, data)))
    except _FAILURES as error:
        raise ConfigError(_said(error)) from error


def _said(error: Exception) -> str:
    """The sentence in a message of Hydra, OmegaConf or the YAML reader, with the key it is about."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = re.sub(r"\w+ raised while composing config: ", "", text)
    key = getattr(error.__cause__, "full_key", None)
    return text.rstrip(".") + (f" (at {key})" if key else "")
