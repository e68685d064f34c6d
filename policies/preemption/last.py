"""last: the last in the scheduler's own order gives way.

Rule: whoever the scheduler holds least worthy: under fcfs the last admitted, under priority the least important.
Origin: vLLM. Wins: those first in line keep going, no surprises. Loses: a long request that came last is thrown
out again and again. Cost: O(1).
"""

from __future__ import annotations

from policies.preemption.common import WithMode


class Last(WithMode):
    """The base class's choice: `candidates[-1]`."""
