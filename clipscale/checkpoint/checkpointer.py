"""Checkpoints by torch's distributed checkpointing: every rank writes its shards, any layout reads them back.

A checkpoint is a directory, or a remote prefix, ``checkpoints/step_N``. Saving copies the state and returns; a thread
writes the copy, in a process group of its own: collectives of two threads in one group would meet each other's. When
all ranks have written, rank 0 writes the manifest: without it there is no checkpoint, and an older one goes only then.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from clipscale.checkpoint.manifest import MANIFEST, DamagedError, Manifest, Saved, Stored, read_manifest
from clipscale.checkpoint.places import checkpoints_in, finished_at, finished_in, superseded
from clipscale.checkpoint.reading import Reader, SafePlanner
from clipscale.checkpoint.staging import Staging
from clipscale.checkpoint.writing import write
from clipscale.config.data import Storage
from clipscale.data.io import ShardStore, parent
from clipscale.distributed.collectives import Group, rank, world_size
from clipscale.distributed.runtime import SAVING_GROUP
from clipscale.errors import ClipscaleError, DataError, SaveError

T = TypeVar("T")
log = logging.getLogger("clipscale")

PATIENCE = timedelta(minutes=30)  # of ranks whose files are written for those whose files are not yet
DAMAGED = "damaged.json"  # what the manifest of a damaged checkpoint becomes


class Checkpointer:
    """Saves and restores a model, its optimizer and the tensors of its average.

    Args:
        place: the run's ``checkpoints``, a directory or a remote prefix.
        keep_last: newest checkpoints that stay.
        store: what opens a remote place.
        scratch: local directory for what is on its way to a remote place.
        behind: one that is so many steps old stays, too, for a run that has to go back so far.
    """

    def __init__(
        self,
        place: str | Path,
        keep_last: int,
        store: ShardStore | None = None,
        scratch: Path | None = None,
        behind: int = 0,
    ) -> None:
        self._place, self._keep_last, self._behind = str(place), keep_last, behind
        self._store, self._scratch = store or ShardStore(Storage()), scratch
        self._staging = Staging()
        self._group: Group = None
        self._group_is_good = False
        self._save: _Background | None = None
        self.damaged: dict[str, str] = {}
        """What is wrong with the checkpoints that :meth:`newest` passed over, by name."""

    def newest(self) -> Stored | None:
        """The newest checkpoint that is as it was written, to the last bit; None if there is none. A collective.

        Every rank verifies a share of the files. Raises ClipscaleError when there are checkpoints and all are damaged.
        """
        found = self._whole(_from_first(lambda: finished_in(self._place, self._store)))
        if rank() == 0 and found is not None:
            for name in self.damaged:
                self._set_aside(Stored(f"{self._place}/{name}", self._store))
        return found

    def elsewhere(self, where: str) -> Stored:
        """As :meth:`newest`, of another run, or the checkpoint that ``where`` is. Raises ClipscaleError for none."""
        found = self._whole(_from_first(lambda: finished_at(where, self._store)))
        if found is None:
            raise ClipscaleError(f"checkpoint.resume_from={where} is neither a finished checkpoint nor a run with one")
        return found

    def before(self, step: int) -> Stored | None:
        """As :meth:`newest`, of those that were saved at ``step`` or before it, or else the oldest of all.

        Waits for the save that is under way, whose failure is nobody's concern any more.
        """
        with suppress(SaveError):
            self.wait()
        found = _from_first(lambda: finished_in(self._place, self._store))
        return self._whole([stored for stored in found if stored.step <= step] or found[-1:])

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has gone back. Main rank only."""
        for stored in checkpoints_in(self._place, self._store):
            if stored.step > step:
                self._forget(stored)

    def _forget(self, stored: Stored) -> None:
        self._store.remove(f"{stored.location}/{MANIFEST}")  # first: a half-removed one must not look finished
        self._store.remove(stored.location)

    def _whole(self, found: list[Stored]) -> Stored | None:
        self.damaged = {}
        for stored in found:
            if not (problem := self._damage(stored)):
                return stored
            self.damaged[stored.name] = problem
        if found:
            listed = "; ".join(f"{name}: {problem}" for name, problem in self.damaged.items())
            raise ClipscaleError(
                f"no checkpoint is whole in {parent(found[0].location)} ({listed}); put one back from a copy, or "
                "remove them to start from the beginning; they must be seen by all nodes, see checkpoint.dir"
            )
        return None

    def _damage(self, stored: Stored) -> str:
        def look() -> tuple[str, str]:
            try:
                return stored.damage(stored.manifest(), among=slice(rank(), None, world_size())), ""
            except DamagedError as error:
                return str(error), ""
            except DataError as error:  # a store that does not answer says nothing of what lies in it
                return "", str(error)

        problems, failures = zip(*_everywhere(look()), strict=True)
        if failed := next(filter(None, failures), ""):
            raise DataError(failed)
        return next(filter(None, problems), "")

    def _set_aside(self, stored: Stored) -> None:
        """Take a damaged checkpoint from those to be kept; the rest of it stays, for who would mend it, until the next
        save."""
        try:
            text = read_manifest(stored)
        except DamagedError:
            text = b""
        self._store.write(f"{stored.location}/{DAMAGED}", text)
        self._store.remove(f"{stored.location}/{MANIFEST}")

    def clean(self) -> list[str]:
        """Remove what interrupted saves left behind; returns their names. Main rank only."""
        known = {MANIFEST, DAMAGED}
        found = checkpoints_in(self._place, self._store)
        left = [stored for stored in found if known.isdisjoint(self._store.names(stored.location))]
        for stored in left:
            self._store.remove(stored.location)
        return [stored.name for stored in left]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Mapping[str, torch.Tensor],
        saved: Saved,
    ) -> None:
        """Begin to write a checkpoint of this moment; every rank calls it, and may change everything at once after.

        Waits for the save before this one, and raises its error.
        """
        self.wait()
        weights, moments = get_state_dict(model, optimizer)
        state = self._staging.copy({"model": weights, "optim": moments, "ema": dict(ema)})
        self._renew_group()
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")  # for good: it is a thread's
        stored = Stored(f"{self._place}/step_{saved.step:08d}", self._store)
        now, group = copy.deepcopy(saved), self._group
        retire = partial(self._retire, now)
        self._save = _Background(lambda: write(stored, self._scratch, state, now, group, retire))

    def _renew_group(self) -> None:
        """Have a group for the next save: gloo's connections are of no use after an exchange that did not complete."""
        if world_size() > 1 and not all(_everywhere(self._group_is_good)):
            self._group = cast(
                dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=SAVING_GROUP)
            )
            self._group_is_good = True

    def amend(self, saved: Saved) -> None:
        """Write what is now known of the run to the manifest of the step's checkpoint, if there is one; every rank
        calls it, after :meth:`wait`."""
        stored = Stored(f"{self._place}/step_{saved.step:08d}", self._store)
        try:
            if rank() == 0 and MANIFEST in self._store.names(stored.location):
                manifest = replace(stored.manifest(), saved=copy.deepcopy(saved))
                self._store.write(f"{stored.location}/{MANIFEST}", manifest.to_json().encode())
        except (DataError, DamagedError) as error:  # what it said before is no less true
            log.warning("%s does not say what is known since: %s", stored.location, error)

    def wait(self) -> None:
        """Wait until the save that is under way has ended. Raises SaveError, on all ranks, when it failed."""
        if self._save is not None:
            ended, self._save = self._save, None
            try:
                ended.join()
            except SaveError:
                self._group_is_good = False
                raise

    def failure(self) -> str:
        """Why the last save failed, if it has ended by now; told once. Empty while all is well. Never waits."""
        if self._save is None or not self._save.ended:
            return ""
        try:
            self.wait()
        except SaveError as error:
            return str(error)
        return ""

    def _retire(self, newest: Saved) -> None:
        """Remove what is not to be kept, now that a newer one is finished. Main rank only."""
        try:
            for old in superseded(self._place, self._store, self._keep_last, newest, self._behind):
                self._forget(old)
        except DataError as error:  # the new one is there all the same
            log.warning("an old checkpoint stays: %s", error)

    def restore(
        self, stored: Stored, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, torch.Tensor]
    ) -> Saved:
        """Load a checkpoint in place, whatever layout and world size wrote it; every rank calls it.

        Raises ClipscaleError when it does not fit the model or is damaged.
        """
        manifest = stored.manifest()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": moments, "ema": dict(ema)}
        _load(stored, manifest, state)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return manifest.saved


class _Background:
    """Work in a thread that does not keep a failed process alive."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # told by join
            self._error = error


def fingerprint(stored: Stored) -> str:
    """Sixteen hex digits by which a checkpoint is known again."""
    return hashlib.sha256(read_manifest(stored)).hexdigest()[:16]


def read_tensors(stored: Stored, state: dict[str, Any]) -> None:
    """Fill a state dict in place from a checkpoint, in this process alone, after all of its files are verified.

    Raises ClipscaleError when it does not fit or is damaged.
    """
    manifest = stored.manifest()
    if problem := stored.damage(manifest):
        raise DamagedError(f"checkpoint {stored.location} is damaged: {problem}; name an older one")
    _load(stored, manifest, state, alone=True)


def _load(stored: Stored, manifest: Manifest, state: dict[str, Any], alone: bool = False) -> None:
    with warnings.catch_warnings(), _in_one_line(stored):
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp.load(state, storage_reader=Reader(stored, manifest), planner=SafePlanner(), no_dist=alone)


@contextmanager
def _in_one_line(stored: Stored) -> Iterator[None]:
    try:
        yield
    except dcp.api.CheckpointException as error:  # not an Exception, and its text is pages long
        first = next(iter(error.failures.values()))[0]
        reason = (str(first) or type(first).__name__).splitlines()[0]
        raise ClipscaleError(f"checkpoint {stored.location} cannot be loaded: {reason}") from None


def _from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on all ranks; its error, too."""
    made: list[Any] = [None, ""]
    try:
        made[0] = make() if rank() == 0 else None
    except DataError as error:
        made[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(made)
    if made[1]:
        raise DataError(made[1])
    return made[0]


def _everywhere(mine: T) -> list[T]:
    """What each rank brings, in rank order."""
    everyone: list[Any] = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, mine)
    return everyone
