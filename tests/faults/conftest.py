"""Models this small run on one thread."""

from __future__ import annotations

from tests.threads import one_thread as one_thread
