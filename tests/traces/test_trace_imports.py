"""`traces` stands on `lab.control.request`, and what that stands on, alone, and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import traces.registry, traces.make_sample
print(*sorted(sys.modules))
"""


def test_importing_every_trace_imports_no_array_library_and_no_other_part():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    modules = set(found.stdout.split())
    assert "traces.registry" in modules
    allowed = {"lab", "lab.control", "lab.control.request", "lab.compiled", "lab.errors", "lab.frozen"}
    assert {name for name in modules if name.split(".")[0] == "lab"} <= allowed
    heavy = {"numpy", "pandas", "torch", "pyarrow", "scipy", "transformers", "hydra", "omegaconf", "simpy"}
    assert not heavy & modules
    assert not {"sim", "real_engine", "policies"} & modules
