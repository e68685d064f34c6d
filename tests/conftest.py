"""Before anything of Diptych is imported: what is tested is the source, not what was compiled of it some time ago."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("DIPTYCH_COMPILED", "0")

# A run of the tests tells what a change did: the same examples every time. New ones are looked for on their own,
# with `make explore`.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("repeatable")
