"""The page on run directories says what is written, all of it and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from lab.observe import schema
from lab.observe.claim import FILES
from tests.experiment.command import ROOT
from tests.observe.test_rundir import saved


def test_every_column_has_a_unit_and_a_meaning_and_no_other_has() -> None:
    for table, (columns, meanings) in schema.TABLES.items():
        assert [name for name, _, _ in columns] == list(meanings), table
        for name, (unit, meaning) in meanings.items():
            assert meaning, f"{table}.{name}"
            assert unit == "ns" or not name.endswith("_ns"), f"{table}.{name}"


def test_every_file_that_a_run_may_write_is_described() -> None:
    assert sorted(schema.FILES) == sorted(FILES)


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8") == schema.page(), (
        "make it again: python -m lab.observe.schema > docs/run-directory.md"
    )


def test_files_have_the_columns_of_the_page(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    for table, (_, meanings) in schema.TABLES.items():
        assert pq.read_schema(tmp_path / "run" / f"{table}.parquet").names == list(meanings)
