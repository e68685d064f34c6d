"""Does a policy keep its contracts? For the authors of policies. Observation path.

    from lab.testing import check_policy

    def test_mine():
        check_policy(Mine).raise_for_problems()

or `python -m lab.testing ./mine.py:Mine`. The policy is played on the engine core itself, without model or
clock: KV nearly full, giant prompts, equal keys, aborts, pauses, stale views. What breaks a contract is shown
with the policy's own line and the smallest workload that does it. Needs Hypothesis (the `test` extra).
"""

from lab.testing.cases import Ask, Case
from lab.testing.check import check_policy, replay
from lab.testing.contracts import CONTRACTS
from lab.testing.report import Problem, Report

__all__ = ["CONTRACTS", "Ask", "Case", "Problem", "Report", "check_policy", "replay"]
