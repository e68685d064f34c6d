"""Plug-ins by name, by path, from other distributions; the built-in table; the typed schema of each."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pytest

from lab import choices, installed, plugins
from lab.errors import ConfigError, PolicyError, UnknownNameError
from lab.policy import SchedulingPolicy
from lab.shipped import KINDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a distribution (metadata and modules) beside ours."""
    site = tmp_path / "site"
    before = set(sys.modules)

    def install(name: str, points: str, **modules: str) -> Path:
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(points)
        (info / "top_level.txt").write_text("\n".join(modules))
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        return site

    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    yield install
    for module in set(sys.modules) - before:
        del sys.modules[module]


SOURCE = '''
from lab.policy import SchedulingPolicy
from lab.shipped import KINDS

class Theirs(SchedulingPolicy):
    """Somebody else's idea."""

    def __init__(self, window: int = 3) -> None:
        self.window = window
'''


def test_what_is_installed_is_what_python_says(elsewhere: Callable[..., Path]) -> None:
    elsewhere("Some_body.Else", "[console_scripts]\nx = y:z\n")
    for dist in metadata.distributions():
        assert installed.version(dist.name) == metadata.version(dist.name), dist.name
    assert installed.version("some-body-else") == "1.2"
    assert installed.version("nobody-has-this") is None


def test_of_two_of_a_name_the_first_on_the_path_counts(
    elsewhere: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere("twice", "")
    (tmp_path / "before" / "Twice-3.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "before"))
    assert installed.version("twice") == "3"


def test_a_folder_that_nobody_may_read_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(place: str) -> list[str]:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(os, "listdir", refused)
    assert not installed.extended("diptych.", "diptych", (str(tmp_path),))


@pytest.mark.parametrize("kind", ["dist-info", "egg-info", "archive"])
def test_entry_points_of_another_distribution_are_noticed(tmp_path: Path, kind: str) -> None:
    assert not installed.extended("diptych.", "diptych", (str(tmp_path), str(tmp_path / "gone.zip")))
    place = tmp_path / kind
    if kind == "archive":
        place.write_bytes(b"PK")
    else:
        for name, group in (("diptych", "diptych.scheduling"), ("other", "diptychs")):
            (info := place / f"{name}-1.{kind}").mkdir(parents=True)
            (info / "entry_points.txt").write_text(f"[{group}]\nx = y:z\n")
        assert not installed.extended("diptych.", "diptych", (str(place),))
        installed.extended.cache_clear()
        (info / "entry_points.txt").write_text("[a]\nx = y:z\n\n[diptych.scheduling]\nx = y:z\n")
    assert installed.extended("diptych.", "diptych", (str(place),))


def test_built_in_table_equals_the_entry_points_of_the_distribution() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared == {kind.group: dict(kind.builtin) for kind in KINDS.values()}


@pytest.mark.parametrize("kind", [kind for kind, spec in KINDS.items() if spec.base is not None])
def test_every_built_in_loads_can_be_made_and_says_what_it_is(kind: str) -> None:
    for name in KINDS[kind].builtin:
        made = plugins.create(kind, name)
        assert isinstance(made, plugins.load(kind, name))
        assert plugins.summary(kind, name)
        assert plugins.provenance(type(made)).startswith("diptych==")


def test_another_distribution_adds_names_and_is_only_imported_when_chosen(
    elsewhere: Callable[..., Path],
) -> None:
    elsewhere(
        "theirs",
        "[diptych.scheduling]\ntheirs = theirs_ok:Theirs\nbroken = theirs_broken:X\n",
        theirs_ok=SOURCE,
        theirs_broken="raise RuntimeError('imported')",
    )
    assert {"fcfs", "theirs", "broken"} <= set(plugins.names("policy"))
    assert plugins.summary("policy", "theirs") == "Somebody else's idea."
    assert "theirs_ok" not in sys.modules
    cls = plugins.load("policy", "theirs")
    assert plugins.create("policy", "theirs", {"window": 9}).window == 9
    assert plugins.provenance(cls) == "theirs==1.2 theirs_ok:Theirs"
    with pytest.raises(ConfigError, match=r"RuntimeError: imported \(.*theirs_broken.py:1\)"):
        plugins.load("policy", "broken")


def test_a_name_that_two_distributions_provide_is_refused_naming_both(elsewhere: Callable[..., Path]) -> None:
    elsewhere("theirs", "[diptych.scheduling]\nfcfs = theirs_two:Theirs\n", theirs_two=SOURCE)
    with pytest.raises(
        ConfigError, match=r"provided twice.*policies\.scheduling\.fcfs:Fcfs.*theirs_two:Theirs"
    ):
        plugins.load("policy", "fcfs")
    assert plugins.load("policy", "theirs_two:Theirs").__name__ == "Theirs"


def test_a_loose_file_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    first = plugins.load("policy", f"{path}:Theirs")
    assert plugins.load("policy", f"{path}:Theirs") is first
    path.write_text(SOURCE.replace("= 3", "= 4"))
    assert plugins.create("policy", f"{path}:Theirs").window == 4
    assert plugins.provenance(first) == f"{path}:Theirs"


def test_parameters_that_do_not_exist_or_are_missing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.replace("window: int = 3", "window: int"))
    with pytest.raises(UnknownNameError, match="did you mean 'window'"):
        plugins.create("policy", f"{path}:Theirs", {"windw": 1})
    with pytest.raises(ConfigError, match="needs a value for 'window'"):
        plugins.create("policy", f"{path}:Theirs")


def test_a_constructor_that_raises_is_a_policy_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE + "        raise ValueError('too wide')\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(PolicyError, match=rf"ValueError: too wide \(.*mine\.py:{line}\)"):
        plugins.create("policy", f"{path}:Theirs")


class Shaped(SchedulingPolicy):
    def __init__(
        self,
        a: int,
        b: float = 1,
        c: str | None = None,
        d: Literal["x", "y"] = "x",
        e: list[int] = [1],  # noqa: B006  # a default that must not be shared
        f: dict[str, SchedulingPolicy] | None = None,
    ) -> None: ...


def test_the_schema_of_a_plug_in_is_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins.parameters(Shaped)["a"] == (int, inspect.Parameter.empty)
    monkeypatch.setattr(plugins, "load", lambda kind, name: Shaped)
    schema = choices.choice_schema("policy", "shaped")
    one: Any = schema()
    two: Any = schema()
    assert (one.name, one.a, one.b, one.c, one.d, one.e, one.f) == ("shaped", "???", 1, None, "x", [1], None)
    one.e.append(2)
    assert two.e == [1]
    assert list(choices.params(two)) == ["a", "b", "c", "d", "e", "f"]


TWO = "from policies.eviction.lru import Lru\n" + SOURCE + "\nclass Old(Lru):\n    pass\n"


def test_a_file_with_one_policy_of_the_kind_needs_no_class_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(TWO)
    assert plugins.load("policy", str(path)).__name__ == "Theirs"
    assert plugins.load("eviction", str(path)).__name__ == "Old"  # Lru is imported there, not defined
    assert plugins.create("policy", str(path), {"window": 5}).window == 5
    assert plugins.provenance(plugins.load("policy", str(path))) == f"{path}:Theirs"


def test_a_base_class_of_ones_own_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE + "\nclass Narrow(Theirs):\n    pass\n")
    assert plugins.load("policy", str(path)).__name__ == "Narrow"


def test_a_file_with_several_policies_or_none_lists_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE + "\nclass Other(SchedulingPolicy):\n    pass\n")
    with pytest.raises(
        ConfigError, match=r"several policies; say which: .*mine\.py:Theirs, .*mine\.py:Other\."
    ):
        plugins.load("policy", str(path))
    with pytest.raises(ConfigError, match=r"defines no subclass of lab\.policy\.EvictionPolicy"):
        plugins.load("eviction", str(path))
    with pytest.raises(ConfigError, match="can't read"):
        plugins.load("policy", str(tmp_path / "missing.py"))


def test_a_plug_in_without_a_docstring_says_where_it_comes_from(elsewhere: Callable[..., Path]) -> None:
    silent = SOURCE.replace('    """Somebody else\'s idea."""\n', "")
    elsewhere("theirs", "[diptych.scheduling]\nsilent = theirs_silent:Theirs\n", theirs_silent=silent)
    assert plugins.summary("policy", "silent") == "(theirs: theirs_silent:Theirs)"


@pytest.mark.parametrize("command", ["experiment", "diff"])
def test_a_foreign_package_of_our_name_is_one_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    inside = f"__path__.append({str(ROOT / 'lab')!r})\n"  # what an editable install's finder comes to
    (tmp_path / "lab" / "__init__.py").write_text(inside)
    done = subprocess.run(
        [sys.executable, "-m", f"lab.{command}", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: package 'lab' is shadowed: Python finds {tmp_path}")
    assert done.stderr.count("\n") == 1
