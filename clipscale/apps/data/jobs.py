"""Work on many shards: side by side, on several nodes, and taken up again where it stopped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clipscale.errors import ClipscaleError, ConfigError

MARKERS = ".clipscale"  # directory of an output that says what is done
POLL_S = 1.0  # between two looks for what other nodes have done

# Number of this process among those that share the work, and how many they are: array jobs, srun, torchrun.
_SHARES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("RANK", "WORLD_SIZE"),
)

T = TypeVar("T")


def share() -> tuple[int, int]:
    """``(number, count)`` of the processes that share the work, from Slurm's array or tasks, or torchrun's ranks."""
    for number, count in _SHARES:
        if number in os.environ and int(os.environ.get(count, "1")) > 1:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")) if "ARRAY" in number else 0
            return int(os.environ[number]) - first, int(os.environ[count])
    return 0, 1


@dataclass(frozen=True)
class Jobs:
    """How one call of a tool works through its tasks.

    Args:
        output: directory of the results, shared by all nodes; ``output/.clipscale`` says what is done.
        tool: name of the tool.
        options: all that the results depend on. An output made with others is refused.
        workers: processes on this node; 0 is one per core.
        ray: spread the tasks with Ray Data instead.
    """

    output: Path
    tool: str
    options: Mapping[str, Any]
    workers: int = 0
    ray: bool = False

    def run(self, step: str, work: Callable[[T], Any], tasks: Mapping[str, T]) -> dict[str, Any]:
        """``work(task)`` of every task that is not done yet; the results of all, by name, in the tasks' order.

        A result must survive JSON, and a task must leave its files complete or not at all: it may be run again. With
        several nodes, each does its share, and returns when all are done. Raises ClipscaleError from a task.
        """
        self._claim()
        number, nodes = share()
        mine = [name for i, name in enumerate(tasks) if i % nodes == number]
        todo = {name: tasks[name] for name in mine if not self._marker(step, name).is_file()}
        with self._progress(step, len(mine), len(mine) - len(todo)) as advance:
            for name, result in self._results(work, todo):
                _write(self._marker(step, name), result)
                advance()
        return {name: self._read(step, name) for name in tasks}

    def _claim(self) -> None:
        wanted = json.loads(json.dumps(dict(self.options), default=str))
        path = self.output / MARKERS / self.tool / "options.json"
        try:
            if not path.is_file():
                _write(path, wanted)
            found = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{self.output} cannot be written: {error.strerror}") from None
        changed = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
        if changed:
            raise ConfigError(
                f"{self.output} was begun with other options ({', '.join(sorted(changed))}); choose another directory, "
                "or delete it to begin anew"
            )

    def _marker(self, step: str, name: str) -> Path:
        plain = re.sub(r"[^\w.-]", "_", name)
        if plain != name:  # or two names could become one
            plain += f".{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return self.output / MARKERS / self.tool / step / f"{plain}.json"

    def _read(self, step: str, name: str) -> Any:
        path = self._marker(step, name)
        while not path.is_file():  # another node is at it
            time.sleep(POLL_S)
        return json.loads(path.read_text())

    def _results(self, work: Callable[[T], Any], todo: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
        workers = min(self.workers or len(os.sched_getaffinity(0)), len(todo))
        if self.ray:
            yield from _with_ray(work, todo)
        elif workers <= 1:
            for name, task in todo.items():
                yield name, work(task)
        else:
            yield from _side_by_side(work, todo, workers)

    @staticmethod
    def _progress(step: str, count: int, done: int) -> _Bar:
        return _Bar(step, count, done)


class _Bar:
    """A progress bar on standard error; called once per task."""

    def __init__(self, step: str, count: int, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(step, total=count, completed=done)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return partial(self._bar.advance, self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _side_by_side(work: Callable[[T], Any], todo: Mapping[str, T], workers: int) -> Iterator[tuple[str, Any]]:
    # Not fork: obstore must not be used in one. What is imported here, the server imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.func.__module__ if isinstance(work, partial) else work.__module__])
    with ProcessPoolExecutor(workers, context, initializer=_leave_interrupts) as pool:
        futures = {pool.submit(work, task): name for name, task in todo.items()}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise ClipscaleError(
                "a process was killed, likely for want of memory; use fewer with -j; what is done stays done"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what has begun is finished, not thrown away


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _with_ray(work: Callable[[T], Any], todo: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
    try:
        import ray.data
    except ImportError:
        raise ConfigError("--ray needs Ray Data: pip install 'clipscale[ray]'") from None
    rows: Sequence[dict[str, Any]] = [{"name": name, "task": task} for name, task in todo.items()]
    if not rows:
        return
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        lambda row: {"name": row["name"], "result": json.dumps(work(row["task"]))}
    )
    for row in made.iter_rows():
        yield row["name"], json.loads(row["result"])


def _write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(value))
    scratch.replace(path)
