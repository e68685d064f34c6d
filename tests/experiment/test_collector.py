"""The cycle collector rests while a run begins and goes, and isn't woken by what was made meanwhile."""

from __future__ import annotations

import gc

from lab.collector import collector_at_rest


def test_nothing_is_looked_through_and_the_old_ways_come_back() -> None:
    before = gc.get_threshold()
    seen: list[int] = []

    def told(phase: str, about: dict[str, int]) -> None:
        seen.append(about["generation"])

    gc.collect()
    gc.callbacks.append(told)
    try:
        with collector_at_rest():
            kept = [[n] for n in range(50_000)]
        more = [[n] for n in range(before[0] // 2)]
        assert not seen
        assert gc.get_threshold() == before
        more += [[n] for n in range(2 * before[0])]
        assert seen
    finally:
        gc.callbacks.remove(told)
    assert gc.get_freeze_count() == 0
    assert len(kept) + len(more) > 50_000
