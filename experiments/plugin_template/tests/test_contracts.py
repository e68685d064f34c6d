"""The policies keep the contracts of `lab/policy.py`, and their entry points lead to them."""

from __future__ import annotations

import diptych_plugin_template as plugin
import pytest

from lab import plugins
from lab.testing import check_policy


@pytest.mark.parametrize("policy", [plugin.NewestFirst, lambda: plugin.NewestFirst(width=1), plugin.AnyBlock])
def test_every_contract_is_kept(policy: object) -> None:
    check_policy(policy, examples=5).raise_for_problems()


def test_the_names_of_the_entry_points_lead_here() -> None:
    assert plugins.load("policy", "newest_first") is plugin.NewestFirst
    assert plugins.load("eviction", "any_block") is plugin.AnyBlock
