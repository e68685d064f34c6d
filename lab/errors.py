"""Every exception Diptych raises on purpose.

    DiptychError                    one sentence for a person; a command prints it and exits
    ├── ConfigError                 what was typed is wrong: option, value, combination
    │   └── UnknownNameError        ... a name; carries the nearest valid ones
    ├── TraceError                  a workload file is missing, unreadable or malformed (path, line, column)
    ├── ModelError                  a model is missing, truncated or of an unsupported shape
    ├── RequestRefused              a request can never fit; says needed against available
    ├── PolicyError                 a policy broke its contract or raised; says policy, step, request
    ├── ExecutorError               the data plane failed or answered nonsense
    ├── ReplayError                 a recorded run can't drive this one
    └── RunError                    a run directory is missing, partial or can't be written

Anything else that escapes is a bug of Diptych's own and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiptychError(Exception):
    """Base of every expected failure. `exit_code` is what a command exits with."""

    exit_code = 1


class ConfigError(DiptychError):
    """An option, a value or a combination of them that makes no sense."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name that nothing answers to."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        message = f"unknown {kind} '{name}'"
        message += f"; did you mean '{near[0]}'?" if near else "."
        message += f" Known: {', '.join(self.known)}." if self.known else ""
        super().__init__(f"{message} {hint}".rstrip())


class TraceError(DiptychError):
    """A workload file is missing, unreadable or malformed."""

    exit_code = 2


class ModelError(DiptychError):
    """A model is missing, truncated or of a shape that isn't supported."""


class RequestRefused(DiptychError):
    """A request that could never be served is refused at entry, not starved later."""

    def __init__(self, request_id: str, reason: str, *, needed: int, available: int) -> None:
        self.request_id, self.reason, self.needed, self.available = request_id, reason, needed, available
        super().__init__(f"request '{request_id}' refused: {reason} (needs {needed}, has {available})")


class PolicyError(DiptychError):
    """A policy broke its contract, or raised. The run ends; what was recorded stays."""


class ExecutorError(DiptychError):
    """The data plane failed, or its result doesn't answer the plan."""


class ReplayError(DiptychError):
    """A recorded run can't drive this one."""


class RunError(DiptychError):
    """A run directory is missing, partial, or can't be written."""
