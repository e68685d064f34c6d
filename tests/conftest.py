"""Before anything of Diptych is imported: what is tested is the source, not what was compiled of it some time ago."""

from __future__ import annotations

import os

os.environ.setdefault("DIPTYCH_COMPILED", "0")
