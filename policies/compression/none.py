"""none: every request keeps all of its KV.

Rule: nothing is given up. Wins: exact attention, and blocks that the prefix cache can share. Loses: memory and time
per token grow with the context. Cost: O(1).
"""

from __future__ import annotations

from lab.policy import CompressionPolicy


class Nothing(CompressionPolicy):
    """The base class's choice."""
