"""Finds policies, backends and trace registries by name. Control plane; runs before a run begins.

A plug-in is named in one of three ways:

    policy=fcfs                         an entry point of the group `diptych.scheduling` (see KINDS)
    policy=my_package.my_module:MyPolicy
    policy=./my_file.py:MyPolicy        a loose file, relative to the working directory
    policy=./my_file.py                 the same, where the file defines only one policy

Only what is chosen is ever imported. The built-ins stand in a table as well as in the distribution's entry
points, so that a checkout that isn't installed works too.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType

import lab
from lab.errors import ConfigError, PolicyError, UnknownNameError
from lab.policy import (
    AdmissionPolicy,
    CompressionPolicy,
    EvictionPolicy,
    LengthPredictor,
    PreemptionPolicy,
    RoutingPolicy,
    ScalingPolicy,
    SchedulingPolicy,
)

try:
    SIBLINGS, __version__ = lab.SIBLINGS, lab.__version__
except AttributeError:
    # Another distribution's `lab` came first and led here all the same, as an editable install's finder does.
    # Nothing works then, and no command has begun that could say so.
    raise SystemExit(
        f"error: package 'lab' is shadowed: Python finds {lab.__file__}, expected {Path(__file__).parent}. "
        "Take its directory off PYTHONPATH, or uninstall it."
    ) from None

DISTRIBUTION = "diptych"


@dataclass(frozen=True, slots=True)
class Kind:
    """One seam: its entry-point group, the base class plug-ins must have (None: any), the built-ins."""

    group: str
    base: type | None
    builtin: Mapping[str, str]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "policy": Kind(
            "diptych.scheduling",
            SchedulingPolicy,
            {
                "fcfs": "policies.scheduling.fcfs:Fcfs",
                "prefill_first": "policies.scheduling.prefill_first:PrefillFirst",
                "sjf": "policies.scheduling.sjf:ShortestJobFirst",
                "priority": "policies.scheduling.priority:Priority",
                "edf": "policies.scheduling.edf:EarliestDeadlineFirst",
                "vllm_v0": "policies.scheduling.prefill_first:PrefillFirst",
                "vllm_v1": "policies.scheduling.vllm_v1:VllmV1",
                "orca": "policies.scheduling.orca:Orca",
                "sarathi": "policies.scheduling.sarathi:Sarathi",
                "srpt": "policies.scheduling.srpt:ShortestRemaining",
                "psjf": "policies.scheduling.psjf:PreemptiveShortestJob",
                "spf": "policies.scheduling.spf:ShortestPromptFirst",
                "hrrn": "policies.scheduling.hrrn:HighestResponseRatio",
                "mlfq": "policies.scheduling.mlfq:Mlfq",
                "ltr": "policies.scheduling.ltr:LearningToRank",
                "mc_sf": "policies.scheduling.mc_sf:MemoryConstrainedShortest",
                "least_slack": "policies.scheduling.least_slack:LeastSlack",
                "andes": "policies.scheduling.andes:Andes",
                "vtc": "policies.scheduling.vtc:VirtualTokenCounter",
                "drr": "policies.scheduling.drr:DeficitRoundRobin",
                "lpm": "policies.scheduling.lpm:LongestPrefixMatch",
                "dlpm": "policies.scheduling.dlpm:DeficitPrefixMatch",
            },
        ),
        "eviction": Kind(
            "diptych.eviction",
            EvictionPolicy,
            {
                "lru": "policies.eviction.lru:Lru",
                "fifo": "policies.eviction.fifo:Fifo",
                "lfu": "policies.eviction.lfu:Lfu",
                "lru_head": "policies.eviction.lru_head:LruHead",
                "radix_lru": "policies.eviction.radix_lru:RadixLru",
                "clock": "policies.eviction.clock:Clock",
                "lfu_perfect": "policies.eviction.lfu_perfect:LfuPerfect",
                "2q": "policies.eviction.two_q:TwoQ",
                "arc": "policies.eviction.arc:Arc",
                "s3fifo": "policies.eviction.s3fifo:S3Fifo",
                "sieve": "policies.eviction.sieve:Sieve",
                "gdsf": "policies.eviction.gdsf:Gdsf",
                "ttl": "policies.eviction.ttl:Ttl",
                "t_lru": "policies.eviction.t_lru:TailLru",
                "length_aware": "policies.eviction.length_aware:LengthAware",
                "workload_aware": "policies.eviction.workload_aware:WorkloadAware",
                "belady": "policies.eviction.belady:Belady",
            },
        ),
        "compression": Kind(
            "diptych.compression",
            CompressionPolicy,
            {
                "none": "policies.compression.none:Nothing",
                "streaming_llm": "policies.compression.streaming_llm:StreamingLlm",
                "knorm": "policies.compression.knorm:KeyNorm",
                "tova": "policies.compression.tova:Tova",
            },
        ),
        "admission": Kind(
            "diptych.admission",
            AdmissionPolicy,
            {
                "always": "policies.admission.always:Always",
                "token_bucket": "policies.admission.token_bucket:TokenBucket",
                "quota": "policies.admission.quota:Quota",
                "kv_watermark": "policies.admission.kv_watermark:KvWatermark",
                "aimd": "policies.admission.aimd:Aimd",
                "gradient2": "policies.admission.gradient2:Gradient2",
                "slo_reject": "policies.admission.slo_reject:SloReject",
            },
        ),
        "routing": Kind(
            "diptych.routing",
            RoutingPolicy,
            {
                "single": "policies.routing.single:Single",
                "round_robin": "policies.routing.round_robin:RoundRobin",
                "random": "policies.routing.random:Random",
                "least_requests": "policies.routing.least_requests:LeastRequests",
                "least_tokens": "policies.routing.least_tokens:LeastTokens",
                "power_of_two": "policies.routing.power_of_two:PowerOfTwo",
                "session_affinity": "policies.routing.session_affinity:SessionAffinity",
                "consistent_hash": "policies.routing.consistent_hash:ConsistentHash",
                "prefix_cost": "policies.routing.prefix_cost:PrefixCost",
                "lmetric": "policies.routing.lmetric:LMetric",
            },
        ),
        "scaling": Kind(
            "diptych.scaling",
            ScalingPolicy,
            {
                "fixed": "policies.scaling.fixed:Fixed",
                "queue_threshold": "policies.scaling.queue_threshold:QueueThreshold",
                "concurrency": "policies.scaling.concurrency:Concurrency",
                "slo": "policies.scaling.slo:Slo",
            },
        ),
        "predictor": Kind(
            "diptych.prediction",
            LengthPredictor,
            {
                "oracle": "policies.prediction.oracle:Oracle",
                "noisy": "policies.prediction.noisy:Noisy",
                "bucket": "policies.prediction.bucket:Bucket",
                "constant": "policies.prediction.constant:Constant",
                "online": "policies.prediction.online:Online",
            },
        ),
        "preemption": Kind(
            "diptych.preemption",
            PreemptionPolicy,
            {
                "last": "policies.preemption.last:Last",
                "lowest_priority": "policies.preemption.lowest_priority:LowestPriority",
                "largest_kv": "policies.preemption.largest_kv:LargestKv",
                "least_progress": "policies.preemption.least_progress:LeastProgress",
                "cost_benefit": "policies.preemption.cost_benefit:CostBenefit",
            },
        ),
        "backend": Kind(
            "diptych.backend",
            None,
            {"real": "real_engine.backend:open_backend", "sim": "sim.backend:open_backend"},
        ),
        "diagnosis": Kind("diptych.diagnosis", None, {"real": "real_engine.doctor:diagnose"}),
        "trace_registry": Kind("diptych.trace_registry", None, {"builtin": "traces.registry:TRACES"}),
    }
)
"""Kinds that are also configuration groups carry the group's name."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a name leads: `module:attribute`, and the distribution that says so ("" for the checkout)."""

    target: str
    dist: str
    version: str


def providers(kind: str) -> dict[str, list[Provider]]:
    """Every name of a kind with what provides it; built-ins first. More than one provider is a conflict."""
    spec = _kind(kind)
    found = {name: [Provider(target, DISTRIBUTION, "")] for name, target in spec.builtin.items()}
    for name, provider in _entry_points(spec.group, tuple(sys.path)):
        known = found.setdefault(name, [])
        if all(other.target != provider.target for other in known) and provider.dist != DISTRIBUTION:
            known.append(provider)
    return {name: known for name, known in found.items() if known}


@functools.cache  # reads the metadata of every distribution that is installed
def _entry_points(group: str, path: tuple[str, ...]) -> list[tuple[str, Provider]]:
    """The entry points of a group with what provides them, as things stand on this `sys.path`."""
    found = []
    for point in importlib.metadata.entry_points(group=group):
        dist, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
        found.append((point.name, Provider(point.value.replace(" ", ""), dist, version)))
    return found


def names(kind: str) -> list[str]:
    """The names that a kind answers to, built-ins first."""
    return list(providers(kind))


def is_path(name: str) -> bool:
    """Whether a name is `module:Class`, `file.py:Class` or `file.py`, and not a registered one."""
    return ":" in name or name.endswith(".py")


def load(kind: str, name: str) -> type:
    """The class behind a name. Raises `UnknownNameError`, `ConfigError` (not loadable, wrong base)."""
    base = _kind(kind).base
    if name.endswith(".py") and base is not None:
        return only_class(f"{kind} '{name}'", name, (base,))
    found = load_object(kind, name)
    if not isinstance(found, type) or (base is not None and not issubclass(found, base)):
        what = f"a {type(found).__name__}" if not isinstance(found, type) else f"the class {found.__name__}"
        wanted = f"a subclass of lab.policy.{base.__name__}" if base else "a class"
        raise ConfigError(f"{kind} '{name}' is {what}; expected {wanted}.")
    return found


def load_object(kind: str, name: str) -> object:
    """Like `load`, for kinds whose plug-ins are functions or tables (`backend`, `trace_registry`)."""
    if is_path(name):
        return _import_target(kind, name)
    found = providers(kind)
    if name not in found:
        hint = "" if _kind(kind).base is None else f"Or {kind}=module:Class, {kind}=./file.py:Class."
        raise UnknownNameError(kind, name, found, hint)
    if len(found[name]) > 1:
        sides = " and ".join(f"{p.dist or 'an unnamed distribution'} ({p.target})" for p in found[name])
        raise ConfigError(f"{kind} '{name}' is provided twice, by {sides}; say {kind}=module:Class instead.")
    return _import_target(kind, found[name][0].target, called=name)


def load_any(name: str, bases: tuple[type, ...]) -> type:
    """The class behind `module:Class`, `file.py:Class` or `file.py`, of whichever of these bases it is."""
    if name.endswith(".py"):
        return only_class(f"policy '{name}'", name, bases)
    found = _import_target("policy", name)
    if not isinstance(found, type) or not issubclass(found, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"policy '{name}' is {found!r}; expected a subclass of {wanted} of lab.policy.")
    return found


def only_class(label: str, path: str, bases: tuple[type, ...]) -> type:
    """The one class with one of these bases that a loose file defines. Raises `ConfigError` unless it's one."""
    module = _loose(label, path)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, bases)
    ]
    leaves = [cls for cls in own if not any(other is not cls and issubclass(other, cls) for other in own)]
    if len(leaves) == 1:
        return leaves[0]
    wanted = " or ".join(f"lab.policy.{base.__name__}" for base in bases)
    if not own:
        raise ConfigError(f"{label} defines no subclass of {wanted}.")
    several = ", ".join(f"{path}:{cls.__name__}" for cls in own)
    raise ConfigError(f"{label} defines several policies; say which: {several}.")


def is_loose(cls: type) -> bool:
    """Whether a class comes from a file named by its path."""
    return cls.__module__.startswith(_LOOSE)


def parameters(cls: type) -> dict[str, tuple[object, object]]:
    """Parameters of a plug-in's `__init__`: name -> (type hint, default). `inspect.Parameter.empty`: none.

    Raises `ConfigError` for parameters that no name on a command line can reach (`*args`, positional-only).
    """
    init = vars(next(base for base in cls.__mro__ if "__init__" in vars(base)))["__init__"]
    if init is object.__init__:
        return {}
    signature = inspect.signature(init)
    try:
        hints = typing.get_type_hints(init)
    except Exception:  # a hint that only a type checker can resolve: the value is then taken as it comes
        hints = {}
    found: dict[str, tuple[object, object]] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"{cls.__qualname__}.__init__ takes '{parameter}', which has no name to set it by."
            )
        found[name] = (hints.get(name, typing.Any), parameter.default)
    return found


def create(kind: str, name: str, params: Mapping[str, object] | None = None) -> typing.Any:
    """A new plug-in object. Raises `UnknownNameError` (parameter), `PolicyError` (its `__init__` fails)."""
    cls = load(kind, name)
    given, known = dict(params or {}), parameters(cls)
    for key in given:
        if key not in known:
            raise UnknownNameError(f"parameter of {kind} '{name}'", key, known)
    for key, (_, default) in known.items():
        if default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"{kind} '{name}' needs a value for '{key}': {kind}.{key}=VALUE.")
    try:
        return cls(**given)
    except Exception as error:
        raise PolicyError(f"{kind} '{name}' can't be made: {_said(error)}{_where(error)}.") from error


def provenance(cls: type) -> str:
    """What to write down for a run: `distribution==version module:Class`, or `path:Class`."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if is_loose(cls):
        return f"{file}:{cls.__qualname__}"
    top = cls.__module__.partition(".")[0]
    where = f"{cls.__module__}:{cls.__qualname__}"
    if top in SIBLINGS:
        return f"{DISTRIBUTION}=={__version__} {where}"
    for dist in importlib.metadata.packages_distributions().get(top, ()):
        return f"{dist}=={importlib.metadata.version(dist)} {where}"
    return f"{file} {where}"


def summary(kind: str, name: str) -> str:
    """What a plug-in's source says of it in one line, read without importing it; else where it comes from.

    The module's docstring where that begins with `name:`, as a one-policy file's does; else the class's.
    """
    known = providers(kind).get(name)
    if not known:
        return ""
    origin = f"({known[0].dist or 'an unnamed distribution'}: {known[0].target})"
    return _documented(name, known[0]) or origin


def _documented(name: str, provider: Provider) -> str:
    module, _, attribute = provider.target.partition(":")
    try:
        tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    if first.startswith(f"{name}: "):
        return first.removeprefix(f"{name}: ")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


# --- importing -------------------------------------------------------------------------------------------

_LOOSE = "diptych_loose_"


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise UnknownNameError("kind of plug-in", kind, KINDS)
    return KINDS[kind]


def _import_target(kind: str, target: str, called: str = "") -> object:
    where, _, attribute = target.rpartition(":")
    if target.endswith(".py"):
        raise ConfigError(f"{kind} '{target}' names a file only; say {target}:NAME.")
    label = f"{kind} '{called or target}'"
    if not where or not attribute:
        raise ConfigError(f"{label} isn't 'module:Class' or './file.py:Class'.")
    if where.endswith(".py"):
        module = _loose(label, where)
    else:
        with _importing(label, where):
            module = importlib.import_module(where)
    if not hasattr(module, attribute):
        own = [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]
        public = [value.__name__ for value in own if isinstance(value, type)]
        raise UnknownNameError(f"class in {where}", attribute, public)
    return getattr(module, attribute)


@contextlib.contextmanager
def _importing(label: str, where: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{where}.".startswith(f"{error.name}."):
            raise ConfigError(f"{label}: there is no module '{error.name}'.") from error
        raise ConfigError(f"{label} fails to import: {_said(error)}{_where(error)}.") from error


def _loose(label: str, where: str) -> ModuleType:
    with _importing(label, where):
        return _loose_module(label, where)


def _loose_module(label: str, where: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{label}: can't read {where}: {error.strerror}.") from error
    # Path and content name the module: a changed file is a new module, an unchanged one keeps its classes.
    name = _LOOSE + hashlib.blake2b(str(path).encode() + b"\0" + source, digest_size=8).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it loads
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _source_path(module: str) -> Path:
    """Where a module's source should be. Imports nothing, not even the module's package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise OSError(f"no module {top}")
    if not rest:
        return Path(spec.origin or "")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))).joinpath(*rest)
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """` (file:line)` of the innermost line that is not the import system's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    inner = [f for f in frames if f.filename != __file__ and "/importlib/" not in f.filename]
    return f" ({inner[-1].filename}:{inner[-1].lineno})" if inner else ""
