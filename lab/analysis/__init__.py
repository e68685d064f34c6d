"""Runs opened, compared and drawn. Observation path.

    from lab.analysis import diff, load
    d = diff(load("runs/x/real"), load("runs/x/sim"))
    d.requests["e2e_delta_ns"].describe()

`frames` and `runs` read; `diff` (with `decisions` and `distances`) compares; `verdict`, `table`, `plots` and
`report` show. pandas and matplotlib are imported when they are first needed.
"""

from lab.analysis.diff import diff
from lab.analysis.difference import Diff
from lab.analysis.launch import launch
from lab.analysis.runs import Run, load

__all__ = ["Diff", "Run", "diff", "launch", "load"]
