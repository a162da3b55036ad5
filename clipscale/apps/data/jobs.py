"""Work on many shards: side by side, on several nodes, and taken up again where it stopped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clipscale.apps.writing import SCRATCH, remove_left, whole
from clipscale.distributed.workers import worker_context
from clipscale.errors import ClipscaleError, ConfigError

MARKERS = ".clipscale"  # directory of an output that says what is done

LONGEST = 100  # characters of a task's name that stand in a file's

T = TypeVar("T")
Todo = Iterator[tuple[T, Path]]  # tasks, each with the file that says that it is done


def share() -> tuple[int, int]:
    """``(number, count)`` of the processes that share the work: Slurm's array and tasks, torchrun's ranks.

    Raises ConfigError for an array whose numbers are not evenly spaced.
    """
    array, arrays = _array()
    # SLURM_NTASKS will not do: it is set in a batch script as well, which is one process, whatever it says.
    for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if number in os.environ and count in os.environ:
            return array * int(os.environ[count]) + int(os.environ[number]), arrays * int(os.environ[count])
    return array, arrays


def _array() -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    task, count, first, step = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("COUNT", "1"), ("MIN", "0"), ("STEP", "1"))
    )
    if count == 1:  # one that is run again alone takes what is left
        return 0, 1
    number, rest = divmod(task - first, step)
    if rest or not 0 <= number < count:
        raise ConfigError(f"task {task} of an array of {count}: use evenly spaced numbers, --array=0-{count - 1}")
    return number, count


class Tasks(Mapping[str, T]):
    """Tasks by name, each made by ``make(number)`` when it is asked for, so that not all are in memory at once."""

    def __init__(self, names: Sequence[str], make: Callable[[int], T]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._make = make

    def __getitem__(self, name: str) -> T:
        return self._make(self._numbers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass(frozen=True)
class Jobs:
    """How one call of a tool works through its tasks.

    Args:
        output: directory of the results, shared by all nodes; ``output/.clipscale`` says what is done.
        tool: name of the tool.
        options: all that the results depend on. An output made with others is refused.
        workers: processes on this node; 0 is one per core.
        ray: spread the tasks over a Ray cluster instead.
    """

    output: Path
    tool: str
    options: Mapping[str, Any]
    workers: int = 0
    ray: bool = False

    def run(self, step: str, work: Callable[[T], Any], tasks: Mapping[str, T]) -> dict[str, Any]:
        """``work(task)`` of every task that is not done yet; the results of all, by name, in the tasks' order.

        A result must survive JSON. A task must leave its files complete or not at all, and the same each time: it may
        be run again, by two nodes at once even. Each node does its share and then what others have left undone, so
        none waits for one that died, or for an array's task that has not been started. Tasks are taken from the
        mapping only when their turn comes. Raises ClipscaleError from a task.
        """
        self._claim()
        _sweep(self.output, self.tool)
        number, nodes = share()
        names = list(tasks)
        others = [name for i, name in enumerate(names) if i % nodes != number]
        markers = {name: self._marker(step, name) for name in names[number::nodes] + others[::-1]}
        done = sum(marker.is_file() for marker in markers.values())
        with _Bar(step, len(names), done) as advance:
            todo = ((tasks[name], marker) for name, marker in markers.items() if not marker.is_file())
            try:
                for _ in self._through(work, todo, len(names) - done):
                    advance()
            except KeyboardInterrupt:
                print("stopped; the same command goes on from here", file=sys.stderr)
                raise
        return {name: json.loads(markers[name].read_text()) for name in names}

    def recheck(self, step: str, names: Sequence[str], is_whole: Callable[[str, Any], bool]) -> None:
        """Forget that a task of this node's share is done where ``is_whole(name, result)`` says that what it left is
        not there any more, or not as it was."""
        self._claim()
        number, nodes = share()
        for name in names[number::nodes]:
            marker = self._marker(step, name)
            if marker.is_file() and not is_whole(name, json.loads(marker.read_text())):
                print(f"{name} is damaged, and made anew", file=sys.stderr)
                marker.unlink(missing_ok=True)

    def leave(self, directory: Path) -> None:
        """Remove what was kept of the work on the way, unless another node may still be at it: the last one does."""
        number, nodes = share()
        left = self.output / MARKERS / self.tool / "left"
        _write(left / str(number), None)
        if all((left / str(node)).is_file() for node in range(nodes)):
            shutil.rmtree(directory, ignore_errors=True)

    def _claim(self) -> None:
        wanted = json.loads(json.dumps(dict(self.options), default=str))
        path = self.output / MARKERS / self.tool / "options.json"
        try:
            if not path.is_file():
                _write(path, wanted)
            found = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{self.output} cannot be read: {error.strerror}") from None
        changed = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
        if changed:
            raise ConfigError(
                f"{self.output} was begun with other options ({', '.join(sorted(changed))}); choose another directory, "
                "or delete it to begin anew"
            )

    def _marker(self, step: str, name: str) -> Path:
        plain = re.sub(r"[^\w.-]", "_", name)
        if plain != name or len(name) > LONGEST:  # or two names could become one
            plain = f"{plain[-LONGEST:]}.{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"
        return self.output / MARKERS / self.tool / step / f"{plain}.json"

    def _through(self, work: Callable[[T], Any], todo: Todo[T], left: int) -> Iterator[None]:
        workers = min(self.workers or _cores(), left)
        if self.ray:
            yield from _with_ray(work, todo)
        elif workers <= 1:
            for task, marker in todo:
                _finish(work, task, marker)
                yield
        else:
            yield from _side_by_side(work, todo, workers)


def _cores() -> int:
    # Of those that this process may use; macOS cannot say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finish(work: Callable[[T], Any], task: T, marker: Path) -> None:
    try:
        result = work(task)
    except Exception:
        if not marker.is_file():
            raise
        return  # another node did it meanwhile, went on, and removed what it was made of
    _write(marker, result)  # by the one who did it: it counts even if whoever asked for it is gone


def _side_by_side(work: Callable[[T], Any], todo: Todo[T], workers: int) -> Iterator[None]:
    context = worker_context([work.func.__module__ if isinstance(work, partial) else work.__module__])
    with ProcessPoolExecutor(workers, context, initializer=_serve) as pool:
        begun: set[Future[None]] = set()
        try:
            # No more than can run at once, so that nothing is waited for that has not begun.
            while begun := begun | {
                pool.submit(_finish, work, task, marker) for task, marker in islice(todo, workers - len(begun))
            }:
                done, begun = wait(begun, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ClipscaleError(
                "a process was killed, likely for want of memory; use fewer with -j; what is done stays done"
            ) from None
        except KeyboardInterrupt:
            try:
                print("finishing what has begun; Ctrl-C once more ends at once", file=sys.stderr)
                wait(begun)
            except KeyboardInterrupt:
                for child in multiprocessing.active_children():
                    child.kill()
            raise


def _serve() -> None:
    """What a worker does first: leave interrupts to its parent, and see to it that it does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool's way to end what is left of a broken one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _with_ray(work: Callable[[T], Any], todo: Todo[T]) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'clipscale[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    finish = ray.remote(_finish)
    begun: list[Any] = []
    at_once = 2 * int(ray.cluster_resources().get("CPU", 1))
    try:
        while begun := begun + [finish.remote(work, *each) for each in islice(todo, at_once - len(begun))]:
            done, begun = ray.wait(begun)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClipscaleError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ClipscaleError(f"Ray gave up ({str(error).splitlines()[0]}); what is done stays done") from None


class _Bar:
    """A progress bar on standard error; what it gives is called once per task."""

    def __init__(self, step: str, count: int, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(step, total=count, completed=done)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return partial(self._bar.advance, self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _write(path: Path, value: Any) -> None:
    with whole(path) as out:
        out.write(json.dumps(value).encode())


def _sweep(output: Path, tool: str) -> None:
    """Remove what processes of this machine had half written when they were killed."""
    remove_left((*output.glob(SCRATCH), *(output / MARKERS / tool).rglob(SCRATCH)))
