"""What `check_policy` found, for people: each broken contract with a workload that shows it. Observation path."""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.errors import PolicyError
from lab.testing.cases import Case
from lab.testing.contracts import CONTRACTS, KINDS


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken contract, and the smallest workload found that shows it (None: none is needed)."""

    contract: str
    says: str
    where: str
    situation: str = ""
    case: Case | None = None
    spec: str = ""

    def __str__(self) -> str:
        lines = [f"{self.contract}: {CONTRACTS[self.contract]}.", f"  {self.says}"]
        lines += [f"  at {self.where}"] * bool(self.where)
        if self.case is not None:
            code = f"replay({self.spec}, {self.case.code()})"
            lines += ["", f"  The smallest workload found ({self.situation}):"]
            lines += [f"    {line}" for line in self.case.table().splitlines()]
            lines += ["", "  To see it again:"]
            lines += [f"    {line}" for line in ("from lab.testing import Ask, Case, replay", "")]
            lines += [f"    {line}" for line in code.splitlines()]
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """What `check_policy` found. `str()` is for people."""

    name: str
    kind: str
    problems: list[Problem] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """What works, and should be better: cost and memory."""
    played: int = 0
    """Workloads tried."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise `PolicyError` with the whole report if a contract broke."""
        if self.problems:
            raise PolicyError(str(self))

    def __str__(self) -> str:
        what = KINDS[self.kind].words
        if self.ok:
            lines = [f"{self.name} keeps every contract of {what} ({self.played} workloads played)."]
        else:
            count = len(self.problems)
            lines = [f"{self.name} breaks {count} contract{'s' * (count > 1)} of {what}."]
        for number, problem in enumerate(self.problems, 1):
            first, *rest = str(problem).splitlines()
            lines += ["", f"{number}. {first}", *(f" {line}".rstrip() for line in rest)]
        if self.advice:
            lines += ["", "Advice:", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines)
