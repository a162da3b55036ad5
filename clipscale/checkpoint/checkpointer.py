"""Checkpoints by torch's distributed checkpointing: every rank writes its shards, any layout reads them back.

A checkpoint is a directory ``checkpoints/step_N/``. ``manifest.json`` is written last, with the size of every file: a
directory without it, or whose files do not match it, was never finished and is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from clipscale.distributed.collectives import rank, world_size
from clipscale.errors import ClipscaleError

MANIFEST = "manifest.json"


@dataclass
class Saved:
    """What a checkpoint holds beside tensors: where the run stands."""

    samples_seen: int = 0
    step: int = 0
    time_s: float = 0.0
    positions: list[int] = field(default_factory=list)
    """Where each canonical stream stands after the last finished step."""
    fingerprint: str = ""
    """Of the sample order that the positions belong to."""
    bad_samples: int = 0
    bad_reasons: dict[str, int] = field(default_factory=dict)
    truncated_captions: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    skipped: list[list[list[int]]] = field(default_factory=list)
    """Stretches of the order that are passed over, ``[starts, stops]`` with a position of each canonical stream."""
    skipped_steps: int = 0
    rollbacks: int = 0
    bad_steps: list[int] = field(default_factory=list)
    """Those of the last steps that were bad."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps that were not skipped, if spikes are looked for."""
    teachers: list[str] = field(default_factory=list)
    """Checkpoints of the runs that teach, and the fingerprints of each."""


class Checkpointer:
    """Saves and restores a model, its optimizer and the tensors of its average.

    Args:
        directory: the run's ``checkpoints``.
        keep_last: newest checkpoints that stay.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self._directory, self._keep_last = directory, keep_last

    def newest(self) -> Path | None:
        """The newest finished checkpoint."""
        return next(iter(finished_checkpoints(self._directory)), None)

    def before(self, step: int) -> Path | None:
        """The newest finished checkpoint of a step up to ``step``, or else the oldest that there is."""
        finished = finished_checkpoints(self._directory)
        return next((path for path in finished if read_saved(path).step <= step), next(reversed(finished), None))

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has gone back. Main rank only."""
        for path in finished_checkpoints(self._directory):
            if read_saved(path).step > step:
                _remove(path)

    def clean(self) -> None:
        """Remove what an interrupted save left behind. Main rank only."""
        finished = finished_checkpoints(self._directory)
        for path in self._directory.glob("step_*"):
            if path not in finished:
                shutil.rmtree(path)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Mapping[str, torch.Tensor],
        saved: Saved,
    ) -> Path:
        """Write a checkpoint; every rank calls it. Returns its directory."""
        path = self._directory / f"step_{saved.step:08d}"
        weights, moments = get_state_dict(model, optimizer)
        with _quiet(), _in_one_line(path, "written"):
            dcp.save({"model": weights, "optim": moments, "ema": dict(ema)}, checkpoint_id=path)
        if rank() == 0:
            files = {file.name: file.stat().st_size for file in path.iterdir() if file.name != MANIFEST}
            scratch = path / f"{MANIFEST}.tmp"
            scratch.write_text(json.dumps({"saved": asdict(saved), "files": files}, indent=1))
            scratch.replace(path / MANIFEST)
            for old in finished_checkpoints(self._directory)[self._keep_last :]:
                _remove(old)
        if world_size() > 1:
            dist.barrier()
        return path

    def restore(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, torch.Tensor]
    ) -> Saved:
        """Load a checkpoint in place, whatever layout and world size wrote it; every rank calls it.

        Raises ClipscaleError when it does not fit the model or is damaged.
        """
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": moments, "ema": dict(ema)}
        read_tensors(path, state)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return read_saved(path)


def finished_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints below a directory, newest first."""
    return [path for path in sorted(directory.glob("step_*"), reverse=True) if _is_finished(path)]


def fingerprint(path: Path) -> str:
    """Sixteen hex digits by which a checkpoint is known again."""
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16]


def read_saved(path: Path) -> Saved:
    """Where the run stood when a checkpoint was written."""
    return Saved(**json.loads((path / MANIFEST).read_text())["saved"])


def read_tensors(path: Path, state: dict[str, Any], alone: bool = False) -> None:
    """Fill a state dict in place from a checkpoint; a collective unless this process is to do it ``alone``.

    Raises ClipscaleError when it does not fit or is damaged.
    """
    with _quiet(), _in_one_line(path, "loaded"):
        dcp.load(state, checkpoint_id=path, no_dist=alone)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink()  # first: a half-removed checkpoint must not look finished
    shutil.rmtree(path)


@contextmanager
def _in_one_line(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except dcp.api.CheckpointException as error:  # not an Exception, and its text is pages long
        first = next(iter(error.failures.values()))[0]
        raise ClipscaleError(f"checkpoint {path} cannot be {verb}: {str(first).splitlines()[0]}") from None


def _is_finished(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


class _quiet(warnings.catch_warnings):
    """Without torch's remarks that a single process saves without a process group."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return entered
