"""A run directory: what is in it is whole, whatever happens."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from lab.analysis.runs import load
from lab.errors import RunError
from lab.observe.claim import FILES, PARTIAL, clear, held, part_of_another
from lab.observe.environment import environment, git_state
from lab.observe.metrics import summarise
from lab.observe.recorder import Recorder
from lab.observe.rundir import RunDirectory
from lab.observe.spans import spans
from tests.observe.made import info_for, rich

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


def make(path: Path | None, **more: object) -> RunDirectory:
    return RunDirectory.create(path, "fcfs", now=NOW, key="config", **more)  # type: ignore[arg-type]


def saved(path: Path, recorder: Recorder | None = None, wall_s: float = 1.0, **more: str) -> RunDirectory:
    recorder = recorder or rich()
    with make(path) as run:
        run.write_text("config.yaml", "policy: {name: fcfs}\nseed: 7\n")
        run.write_json("environment.json", environment(["x"]))
        run.save(recorder, info_for(recorder, run=str(path)), block_size=16, wall_s=wall_s, **more)  # type: ignore[arg-type]
    return run


def names(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}


def test_a_saved_run_is_complete_and_gives_back_what_was_recorded(tmp_path: Path) -> None:
    recorder = rich()
    saved(tmp_path / "run", recorder)
    run = load(tmp_path / "run")
    assert run.partial is None
    later = {"cost.json", "log.jsonl", "spans.otlp.jsonl", "timeline.perfetto-trace", "report.html"}
    assert names(run.path) == {*FILES, "_SUCCESS"} - later
    again = run.recorded()
    assert again.steps == recorder.steps
    assert list(spans(again, info_for(recorder))) == list(spans(recorder, info_for(recorder)))
    assert summarise(again, block_size=16, wall_s=1.0) == run.metrics
    assert run.timings() == [replace(step.timing, terms=()) for step in recorder.steps]
    assert sorted(request.id for request in run.workload()) == sorted(r.request.id for r in recorder.requests)
    assert run.config == {"policy": {"name": "fcfs"}, "seed": 7}
    assert len(run.requests) == len(recorder.requests)
    assert run.steps["digest"].tolist() == [step.plan.digest for step in recorder.steps]
    assert run.plans["step"].tolist() == run.steps["step"].tolist()
    assert set(run.spans["name"]) >= {"request", "step"}
    assert run.environment["argv"] == ["x"]


def test_two_runs_of_the_same_thing_are_equal_bytes_but_for_the_wall_clock(tmp_path: Path) -> None:
    for name, wall in (("a", 1.0), ("b", 2.0)):
        saved(tmp_path / name, wall_s=wall)
    for name in names(tmp_path / "a") - {"environment.json"}:
        left, right = ((tmp_path / side / name).read_bytes() for side in ("a", "b"))
        if name == "metrics.json":
            left, right = (json.dumps(json.loads(side) | {"wall_s": 0}).encode() for side in (left, right))
        assert left == right, name


def test_a_run_is_marked_partial_from_its_first_moment(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert "killed" in (load(tmp_path / "run").partial or "")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted (Ctrl-C)"),
        (RunError("the disk is full"), "the disk is full"),
        (ZeroDivisionError("by\nzero"), "it failed with ZeroDivisionError: by zero"),
    ],
)
def test_leaving_by_an_exception_says_why_and_keeps_what_was_written(
    error: BaseException, reason: str, tmp_path: Path
) -> None:

    def fail() -> None:
        with make(tmp_path / "run") as run:
            run.write_text("config.yaml", "a: 1\n")
            raise error

    with pytest.raises(type(error)):
        fail()
    opened = load(tmp_path / "run")
    assert reason in (opened.partial or "")
    assert opened.config == {"a": 1}
    with pytest.raises(RunError, match=r"no 'metrics\.json' \(it is partial: "):
        _ = opened.metrics


def test_an_interrupted_run_saves_what_it_has_and_stays_partial(tmp_path: Path) -> None:
    recorder = rich()
    del recorder.steps[7:]
    saved(tmp_path / "run", recorder, partial="it was interrupted at step 7")
    run = load(tmp_path / "run")
    assert run.partial == "it was interrupted at step 7"
    assert len(run.steps) == 7
    assert "_SUCCESS" not in names(run.path)


def test_an_earlier_run_is_replaced_whole_and_the_users_own_files_stay(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "run" / ".spans.parquet.1.tmp").write_text("left by a kill", encoding="utf-8")
    make(tmp_path / "run")
    assert names(tmp_path / "run") == {"PARTIAL", "notes.txt"}


@pytest.mark.parametrize("marker", [None, "_SUCCESS", "PARTIAL"])
def test_a_directory_of_someone_elses_is_refused_and_untouched(marker: str | None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years", encoding="utf-8")
    if marker:
        (tmp_path / marker).write_text("", encoding="utf-8")  # as other systems leave them
    before = names(tmp_path)
    with pytest.raises(RunError, match="not a run's"):
        make(tmp_path)
    assert names(tmp_path) == before


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="it is a file"):
        make(tmp_path / "run")
    with pytest.raises(RunError, match="can't make the run directory"):
        make(tmp_path / "run" / "deeper")
    with pytest.raises(RunError, match="it is a file"):
        make(None, root=tmp_path / "run")
    with pytest.raises(RunError, match="Not a directory"):
        make(None, root=tmp_path / "run" / "deeper")


def test_default_names_say_when_and_what_and_never_collide(tmp_path: Path) -> None:
    paths = [make(None, root=tmp_path / "runs").path for _ in range(3)]
    assert len(set(paths)) == 3
    assert paths[0].name.startswith("20260102-030405-fcfs-")
    assert len(paths[0].name.rpartition("-")[2]) == 6
    other = RunDirectory.create(None, "a/b c", now=NOW, key="other", root=tmp_path / "runs").path
    assert other.parent == tmp_path / "runs"
    assert other.name.startswith("20260102-030405-a-b-c-")


def test_a_write_that_fails_keeps_the_older_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    run = make(tmp_path / "run")
    run.write_text("config.yaml", "old: 1\n")

    def fill(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        shutil.copyfile(source, "/dev/full")  # the system's own ENOSPC

    with pytest.raises(RunError, match=r"can't write '.*config\.yaml': No space left on device"):
        run.write("config.yaml", fill)

    def interrupt(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write("config.yaml", interrupt)
    assert names(run.path) == {"PARTIAL", "config.yaml"}
    assert run.file("config.yaml").read_text(encoding="utf-8") == "old: 1\n"


def test_a_file_is_replaced_at_once_and_never_changed_in_place(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.write_text("config.yaml", "old: 1\n")
    os.link(run.file("config.yaml"), tmp_path / "held")  # as a reader that has it open
    run.write_text("config.yaml", "new: 1\n")
    assert (tmp_path / "held").read_text(encoding="utf-8") == "old: 1\n"


def test_a_disk_that_takes_only_small_files_keeps_those_and_marks_the_run(tmp_path: Path) -> None:
    """In a process of its own, under a limit on file size that the system enforces."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import pyarrow.parquet
        from tests.observe.test_rundir import Path, RunError, saved
        resource.setrlimit(resource.RLIMIT_FSIZE, (19000, 19000))
        try:
            saved(Path({str(tmp_path / "run")!r}))
        except RunError as error:
            print(error)
            sys.exit(error.exit_code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "can't write" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    run = load(tmp_path / "run")
    assert "can't write" in (run.partial or "")
    assert "File too large" in (run.partial or "")
    present = names(run.path)
    assert not any(name.endswith(".tmp") for name in present)
    assert {"config.yaml", "environment.json", "metrics.json", "steps.parquet"} <= present
    assert not {"requests.parquet", "metrics.prom"} & present
    assert len(run.steps) == run.metrics["steps"]


def test_an_unwritable_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="can't make the run directory '/proc/nowhere'"):
        make(Path("/proc/nowhere"))


def test_loading_what_is_no_run_says_so_and_finds_runs_inside(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="it is a file"):
        load(tmp_path / "file")
    with pytest.raises(RunError, match="not a run directory"):
        load(tmp_path)
    make(tmp_path / "both" / "real")
    make(tmp_path / "both" / "sim")
    with pytest.raises(RunError, match=r"did you mean '.*/both/real' or '.*/both/sim'\?"):
        load(tmp_path / "both")


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml", "steps.parquet", "plans.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"\x00[")
    run = load(tmp_path / "run")
    with pytest.raises(RunError, match=f"can't read '.*{name}'"):
        _ = {"metrics.json": lambda: run.metrics, "config.yaml": lambda: run.config}.get(name, run.recorded)()


def test_the_environment_names_the_machine_and_does_not_import_torch() -> None:
    code = "import sys, lab.observe.environment as e; e.environment([]); print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
    found = environment(["a", "b"], started="now")
    assert found["argv"] == ["a", "b"]
    assert found["started"] == "now"
    assert found["cores"] >= 1
    assert found["packages"]["numpy"]
    json.dumps(found)


def test_the_revision_is_that_of_the_checkout_and_nothing_where_there_is_none(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> str:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1", encoding="utf-8")
    git("add", "a")
    git("commit", "-q", "--no-verify", "-m", "first")
    assert git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert git_state(tmp_path)[1] is True


def test_observation_imports_nothing_heavy_until_it_is_used() -> None:
    modules = [path.stem for path in Path(__file__).parents[2].joinpath("lab/observe").glob("[a-z]*.py")]
    assert "spans" in modules
    code = "import sys\n" + "".join(f"import lab.observe.{name}\n" for name in modules)
    code += "import lab.analysis.runs\n"
    code += (
        "print([m for m in 'numpy pandas pyarrow opentelemetry torch omegaconf'.split() if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def full(run: RunDirectory, *files: str) -> None:
    """Make the disk full for these files: what is written for them goes to the system's own full device."""
    for name in files:
        (run.path / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")


def test_a_disk_that_fills_up_while_saving_costs_no_table_that_still_fits(tmp_path: Path) -> None:
    recorder = rich()
    run = make(tmp_path / "run")
    full(run, "workload.parquet", "metrics.json", "spans.parquet", PARTIAL)
    with pytest.raises(RunError, match=r"can't write '.*workload\.parquet': .*No space left on device"), run:
        run.save(recorder, info_for(recorder), block_size=16)
    left = load(tmp_path / "run")
    assert "workload.parquet" in (left.partial or "")
    assert "No space left on device" in (left.partial or "")
    assert len(left.requests) == len(recorder.requests)
    assert len(left.steps) == len(left.plans) == len(recorder.steps)


def test_what_cannot_be_made_again_is_written_first(tmp_path: Path) -> None:
    recorder, run, order = rich(), make(tmp_path / "run"), []
    write = run.write
    run.write = lambda name, writer: order.append(name) or write(name, writer)  # type: ignore[method-assign]
    run.save(recorder, info_for(recorder), block_size=16, more={"extra": lambda path: path.touch()})
    assert order[:2] == ["requests.parquet", "steps.parquet"]
    assert order.index("extra") < order.index("_SUCCESS")
    assert run.file("extra").exists()


def test_the_reason_of_an_interruption_is_kept_beside_that_of_a_full_disk(tmp_path: Path) -> None:
    recorder, run = rich(), make(tmp_path / "run")
    full(run, "spans.parquet")
    with pytest.raises(RunError, match=r"spans\.parquet"), run:
        run.save(recorder, info_for(recorder), block_size=16, partial="it was interrupted (Ctrl-C)")
    assert (load(run.path).partial or "").startswith("it was interrupted (Ctrl-C); then can't write")


def test_two_runs_at_once_into_one_directory_are_refused_until_the_first_ends(tmp_path: Path) -> None:
    with make(tmp_path / "run") as first:
        first.write_text("config.yaml", "a: 1\n")
        with pytest.raises(RunError, match=r"another run is being written to '.*run' now"):
            make(tmp_path / "run")
        assert first.file("config.yaml").read_text(encoding="utf-8") == "a: 1\n"
        with pytest.raises(RunError, match="another run is being written"), held(tmp_path / "run"):
            pass
    make(tmp_path / "run")


def test_a_lock_goes_with_the_process_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import datetime, os, signal; from lab.observe.rundir import RunDirectory; "
        f"run = RunDirectory.create({str(tmp_path / 'run')!r}, 'x', now=datetime.datetime.now(), key='k'); "
        "print('held', flush=True); signal.pause()"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another run is being written"):
        make(tmp_path / "run")
    process.kill()
    process.wait()
    assert names(make(tmp_path / "run").path) == {PARTIAL}


def test_clearing_an_experiment_removes_all_of_it_and_nothing_of_the_users(tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved(out)  # an earlier run of one backend
    for side in ("real", "sim", "replay"):
        saved(out / side)
    for name in ("diff.json", "report.html", "notes.txt", "sim/mine.txt"):
        (out / name).write_text("", encoding="utf-8")
    clear(out)
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {"notes.txt", "sim", "sim/mine.txt"}
    with pytest.raises(RunError, match=r"sim'.*not a run's"):
        clear(out)
    (out / "diff.json").touch()
    with pytest.raises(RunError, match="not a run's"):
        clear(out)
    assert (out / "diff.json").exists()  # refused before anything was removed


def test_a_run_alone_in_place_of_an_experiment_on_both_is_refused_by_that_name(tmp_path: Path) -> None:
    saved(tmp_path / "out" / "real")
    before = names(tmp_path / "out" / "real")
    with pytest.raises(RunError, match="it holds an experiment on both backends"):
        make(tmp_path / "out")
    assert names(tmp_path / "out" / "real") == before


@pytest.mark.parametrize(
    ("config", "name", "compared", "part"),
    [
        ("backend: both\nseed: 0\n", "sim", False, True),
        ("backend: both\nseed: 0\n", "elsewhere", False, True),
        ("backend: sim\nseed: 0\n", "replay", True, True),
        ("backend: sim\nseed: 0\n", "sim", False, False),
        ("backend: sim\nnote: 'backend: both'\n", "b", True, False),
    ],
)
def test_one_side_of_an_experiment_is_known_as_such(
    config: str, name: str, compared: bool, part: bool, tmp_path: Path
) -> None:
    assert not part_of_another(tmp_path / name)
    make(tmp_path / name).write_text("config.yaml", config)
    if compared:
        (tmp_path / "diff.json").touch()
    assert part_of_another(tmp_path / name) is part
