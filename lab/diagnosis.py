"""What `python -m lab.doctor` collects. Observation path.

A data plane adds what only it knows as a plug-in of the kind `diagnosis`: a function that takes the configuration and
returns findings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.config import Config


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `good` None: worth knowing, neither right nor wrong."""

    good: bool | None
    what: str
    says: str


Diagnose = Callable[[Config], list[Finding]]
