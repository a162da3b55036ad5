"""The engine of the data tools: taken up again, on several nodes, stopped in the middle, errors told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clipscale.apps.data.jobs import MARKERS, Jobs, Tasks, share
from clipscale.apps.writing import check_writable, whole_text
from clipscale.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
NAMES = [f"shard/{number:02d}" for number in range(12)]  # a slash, which no file name may hold

# A tool: each task notes that it began, waits for leave where there is a gate, and writes a file.
TOOL = """
import sys, time
from functools import partial
from pathlib import Path
from clipscale.apps.data.jobs import Jobs
from clipscale.errors import DataError
from tests.unit.test_jobs import NAMES, work

if __name__ == "__main__":
    output, workers = Path(sys.argv[1]), int(sys.argv[2])
    try:
        found = Jobs(output, "tool", {"a": 1}, workers).run("step", partial(work, output), {n: n for n in NAMES})
        assert found == {n: {"name": n, "length": len(n)} for n in NAMES} and list(found) == NAMES
    except KeyboardInterrupt:
        sys.exit(130)
"""


# A tool of two steps: the second one reads what the first one left, and slow nodes begin it when the gate opens.
TWO_STEPS = """
import sys
from functools import partial
from pathlib import Path
from clipscale.apps.data.jobs import Jobs
from tests.unit.test_jobs import make, use

if __name__ == "__main__":
    output = Path(sys.argv[1])
    jobs = Jobs(output, "tool", {}, int(sys.argv[2]))
    jobs.run("make", partial(make, output), {n: n for n in "abcd"})
    found = jobs.run("use", partial(use, output), {n: n for n in "abcd"})
    assert found == {n: n for n in "abcd"}
    jobs.leave(output / "runs")
"""


def make(output: Path, name: str) -> None:
    with whole_text(output / "runs" / name) as out:
        out.write(name)


def use(output: Path, name: str) -> str:
    if os.environ.get("RANK") == "1":
        with (output / "began.txt").open("a") as log:
            log.write(f"{name}\n")
        while (output / "gate").exists():
            time.sleep(0.01)
    return (output / "runs" / name).read_text()


def work(output: Path, name: str) -> dict[str, Any]:
    if name == "unreadable":
        raise DataError("unreadable: not a shard; make it anew")
    number = name.rpartition("/")[2]
    with (output / "began.txt").open("a") as log:
        log.write(f"{number}\n")
    while (output / "gate").exists() and int(number) >= 4:
        time.sleep(0.01)
    with whole_text(output / f"{number}.out") as out:
        out.write(name)
    return {"name": name, "length": len(name)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def start(output: Path, workers: int, tool: str = TOOL, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", tool, str(output), str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def began(output: Path) -> Counter[str]:
    return Counter((output / "began.txt").read_text().split())


def marked(output: Path) -> set[str]:
    return {json.loads(path.read_text())["name"][-2:] for path in (output / MARKERS / "tool" / "step").glob("*.json")}


def wait_for(output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (output / "began.txt").exists() or len(began(output)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def everything(output: Path) -> dict[str, str]:
    assert not list(output.glob(".*.tmp"))
    return {path.stem: path.read_text() for path in output.glob("*.out")}


ALL = {name[-2:]: name for name in NAMES}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_tasks_order_and_nothing_is_done_twice(output: Path, workers: int) -> None:
    for _ in range(2):
        finish(start(output, workers))
        assert everything(output) == ALL and began(output) == Counter(list(ALL))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_redoes_only_what_is_not_done(output: Path, workers: int) -> None:
    (output / "gate").touch()
    process = start(output, workers)
    wait_for(output, 4 + workers)
    process.kill()
    process.communicate()
    before, done = began(output), marked(output)
    assert done == {"00", "01", "02", "03"} and len(before) == 4 + workers
    (output / "gate").unlink()
    finish(start(output, workers))
    assert everything(output) == ALL
    redone = {name for name, times in began(output).items() if times > 1}
    assert redone == set(before) - done


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_it_leaves_whole_files_and_their_marks(output: Path, workers: int) -> None:
    (output / "gate").touch()
    process = start(output, workers)
    wait_for(output, 4 + workers)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    if workers > 1:
        assert process.stderr is not None
        while "finishing" not in process.stderr.readline():
            pass
        (output / "gate").unlink()  # what has begun may end
    assert process.wait(60) == 130
    if workers == 1:
        (output / "gate").unlink()
    assert marked(output) == set(everything(output)), "each file has its mark, and each mark its file"
    assert len(marked(output)) == (4 if workers == 1 else 6)
    finish(start(output, workers))
    assert everything(output) == ALL


def test_interrupted_twice_it_ends_at_once(output: Path) -> None:
    (output / "gate").touch()  # never to be opened
    process = start(output, 2)
    wait_for(output, 6)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    while "finishing" not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert marked(output) == {"00", "01", "02", "03"}


def test_workers_do_not_outlive_who_started_them(output: Path) -> None:
    (output / "gate").touch()
    process = start(output, 2)
    wait_for(output, 6)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while _group(process.pid):
        assert time.monotonic() < deadline, _group(process.pid)
        time.sleep(0.05)


def _group(leader: int) -> list[str]:
    """Processes of a group that still run."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(leader) and "Z" not in row[1]]


ARRAY = [
    {"SLURM_ARRAY_TASK_ID": str(5 + 10 * i), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "5",
     "SLURM_ARRAY_TASK_STEP": "10"}
    for i in range(2)
]  # fmt: skip
RANKS = [{"RANK": str(i), "WORLD_SIZE": "2"} for i in range(2)]
STEPS = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "2"} for i in range(2)]


@pytest.mark.parametrize("nodes", [ARRAY, RANKS, STEPS], ids=["array", "torchrun", "srun"])
def test_nodes_one_after_the_other(output: Path, nodes: list[dict[str, str]]) -> None:
    """The first does not wait for one that may start only when it ends: it does all, once."""
    for node in nodes:
        finish(start(output, 1, **node))
    assert everything(output) == ALL and began(output) == Counter(list(ALL))


@pytest.mark.parametrize("nodes", [ARRAY, RANKS], ids=["array", "torchrun"])
def test_nodes_side_by_side(output: Path, nodes: list[dict[str, str]]) -> None:
    (output / "gate").touch()
    running = [start(output, 1, **node) for node in nodes]
    wait_for(output, 6)
    assert set(began(output)) == {"00", "01", "02", "03", "04", "05"}, "each does its share"
    (output / "gate").unlink()
    for process in running:
        finish(process)
    assert everything(output) == ALL
    assert sum(began(output).values()) <= len(ALL) + 1, "only what is under way when a node is done may be done twice"


def test_a_node_that_died_is_made_up_for(output: Path) -> None:
    (output / "gate").touch()
    dying, other = (start(output, 1, **node) for node in RANKS)
    wait_for(output, 6)
    dying.kill()
    dying.communicate()
    (output / "gate").unlink()
    finish(other)
    assert everything(output) == ALL


def test_the_last_node_removes_what_was_on_the_way(output: Path) -> None:
    (output / "gate").touch()
    slow = start(output, 1, TWO_STEPS, **RANKS[1])
    wait_for(output, 1)
    finish(start(output, 1, TWO_STEPS, **RANKS[0]))
    assert len(list((output / "runs").iterdir())) == 4
    (output / "gate").unlink()
    finish(slow)
    assert not (output / "runs").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_node_survives_that_what_it_reads_is_gone_because_all_is_done(output: Path, workers: int) -> None:
    """As when an array's task is run again, alone, while others are at work."""
    (output / "gate").touch()
    slow = start(output, workers, TWO_STEPS, **RANKS[1])
    wait_for(output, workers)
    finish(start(output, 1, TWO_STEPS))
    assert not (output / "runs").exists()
    (output / "gate").unlink()
    finish(slow)


def test_a_file_is_there_whole_or_not_at_all(output: Path) -> None:
    path = output / "deep" / ("long" * 60)
    with pytest.raises(ValueError, match="half"), whole_text(path) as out:
        out.write("half")
        raise ValueError("half")
    assert not list(path.parent.iterdir())
    with whole_text(path) as out, whole_text(output / "other"):
        out.write("whole \udcff")
        assert not path.exists()
    assert path.read_bytes() == b"whole \xff"


def test_long_names_of_tasks(output: Path) -> None:
    names = [f"{letter}{'é' * 300}" for letter in "ab"]
    assert Jobs(output, "tool", {}, workers=1).run("step", str.upper, {n: n for n in names}) == {
        name: name.upper() for name in names
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script: one process
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"RANK": "5", "WORLD_SIZE": "16", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (5, 16)),
        (ARRAY[1] | RANKS[1], (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"}, (0, 1)),
    ],
)
def test_share(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share() == expected


def test_an_uneven_array_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ID": "7", "COUNT": "3", "MIN": "1", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(ConfigError, match=r"task 7 of an array of 3: .*--array=0-2"):
        share()


def test_other_options_are_refused(output: Path) -> None:
    finish(start(output, 1))
    with pytest.raises(ConfigError, match=r"begun with other options \(a, b\)"):
        Jobs(output, "tool", {"a": 2, "b": 0}).run("step", str, {})


def test_tasks_are_made_when_their_turn_comes(output: Path) -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    def fail_at_five(task: int) -> int:
        if task == 5:
            raise DataError("five")
        return task

    tasks = Tasks(NAMES, make)
    assert len(tasks) == 12 and list(tasks) == NAMES and not made
    with pytest.raises(DataError, match="five"):
        Jobs(output, "tool", {}, workers=1).run("step", fail_at_five, tasks)
    assert made == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_as_it_is(output: Path, workers: int) -> None:
    tasks = {name: name for name in [*NAMES[:2], "unreadable", NAMES[2]]}
    with pytest.raises(DataError, match=r"^unreadable: not a shard; make it anew$"):
        Jobs(output, "tool", {}, workers).run("step", partial(work, output), tasks)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/.* cannot be written: Not a directory"):
        Jobs(tmp_path / "file", "tool", {}).run("step", str, {"a": "a"})


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(pipe.read_text)
        with whole_text(pipe) as out:
            out.write("all of it")
        assert read.result(10) == "all of it"
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("page.html")
    for text in ("one", "two"):
        with whole_text(tmp_path / "link") as out:
            out.write(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "page.html").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for fine in ("new/er/page.html", "file", "pipe", "x" * 300):
        check_writable(tmp_path / fine, "--out")
    with pytest.raises(
        ConfigError, match=r"file/page cannot be written: .*file is no directory .*; choose another --o"
    ):
        check_writable(tmp_path / "file" / "page", "--out")
    with pytest.raises(ConfigError, match="cannot be written: it is a directory; choose another --plot"):
        check_writable(tmp_path, "--plot")
    with pytest.raises(DataError, match="x cannot be written: File name too long"), whole_text(tmp_path / ("x" * 300)):
        pass


def test_this_directory_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^\. cannot be written: "), whole_text(Path(".")) as out:
        out.write("a page")
    assert not list(tmp_path.iterdir())
