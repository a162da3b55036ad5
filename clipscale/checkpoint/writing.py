"""Writing a checkpoint: every rank its own files, the manifest last. It runs in a thread beside training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from clipscale.checkpoint.manifest import MANIFEST, FileSum, Manifest, Saved, Stored, checksum
from clipscale.checkpoint.reading import METADATA
from clipscale.data.io import REMOTE
from clipscale.distributed.collectives import Group, rank, world_size
from clipscale.errors import ClipscaleError, DataError, SaveError

T = TypeVar("T")


def write(
    stored: Stored,
    scratch: Path | None,
    state: dict[str, Any],
    saved: Saved,
    group: Group,
    committed: Callable[[], None],
) -> None:
    """Write a checkpoint; all ranks of ``group``, which nothing else uses, call it. Rank 0 calls ``committed`` after.

    Raises SaveError on all of them when one of them fails; what was written is then removed.
    """
    remote = stored.location.startswith(REMOTE)
    assert scratch is not None or not remote, "a remote checkpoint is written by way of a local directory"
    folder = scratch / stored.name if remote and scratch else Path(stored.location)
    try:
        with _in_one_line(stored, folder):
            # What an attempt before this one left here, or a damaged checkpoint that was passed over.
            _together(group, lambda: stored.store.remove(stored.location) if rank(group) == 0 else None)
            _together(group, lambda: _make_room(folder, group))
            # Nothing is copied ahead: that takes a CUDA device, in a thread whose device is not this rank's.
            writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=world_size(group) == 1)
            parts = _together(group, lambda: _finish_own(stored, folder, group))
            _together(group, lambda: _commit(stored, saved, parts) if rank(group) == 0 else None)
    except SaveError:
        if rank(group) == 0:
            with suppress(DataError):  # of a store that is gone, too
                stored.store.remove(stored.location)  # on a full disk it would be in the way of the next
        raise
    else:
        if rank(group) == 0:
            committed()
    finally:
        if remote:
            shutil.rmtree(folder, ignore_errors=True)


def _make_room(folder: Path, group: Group) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"__{rank(group)}_*"):
        old.unlink()


def _finish_own(stored: Stored, folder: Path, group: Group) -> dict[str, FileSum]:
    """Sum up the files of this rank, and send them where they belong."""
    mine = sorted(folder.glob(f"__{rank(group)}_*"))
    found = {}
    for path in [*mine, folder / METADATA] if rank(group) == 0 else mine:
        with path.open("rb") as file:
            found[path.name] = checksum(file)
        if str(folder) != stored.location:
            stored.store.write(f"{stored.location}/{path.name}", path)
    return found


def _commit(stored: Stored, saved: Saved, parts: list[dict[str, FileSum]]) -> None:
    manifest = Manifest(saved, {name: known for part in parts for name, known in part.items()})
    stored.store.write(f"{stored.location}/{MANIFEST}", manifest.to_json().encode())


def _together(group: Group, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank; when it fails on one, the error of the first that did on all."""
    answer: tuple[T | None, str]
    try:
        answer = work(), ""
    except (ClipscaleError, OSError) as error:
        answer = None, str(error)
    everyone: list[Any] = [answer]
    if world_size(group) > 1:
        everyone = [None] * world_size(group)
        dist.all_gather_object(everyone, answer, group=group)
    if failed := next((problem for _, problem in everyone if problem), ""):
        raise ClipscaleError(failed)
    return [value for value, _ in everyone]


@contextmanager
def _in_one_line(stored: Stored, folder: Path) -> Iterator[None]:
    try:
        yield
    except dcp.api.CheckpointException as error:  # not an Exception, and its text is pages long
        reason: BaseException = next(iter(error.failures.values()))[0]
    except (ClipscaleError, OSError, RuntimeError) as error:  # gloo's, when a rank is gone, is a RuntimeError
        reason = error
    else:
        return
    while reason.__context__ is not None:  # torch's archives hide what the disk said behind a position
        reason = reason.__context__
    first = (str(reason) or type(reason).__name__).splitlines()[0]
    raise SaveError(f"checkpoint {stored.location} cannot be written: {first}{_left(folder)}") from None


def _left(folder: Path) -> str:
    where = next((path for path in (folder, *folder.parents) if path.exists()), None)
    free = shutil.disk_usage(where).free if where else 0
    return f" ({free / 2**20:,.0f} MiB are left on the disk)" if where else ""
