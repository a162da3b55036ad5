"""Runs, their checkpoints and what was exported of them: where they are, and the models in them."""

from __future__ import annotations

import shutil
from pathlib import Path

from clipscale.checkpoint.checkpointer import read_tensors
from clipscale.checkpoint.files import read_file
from clipscale.checkpoint.manifest import MANIFEST
from clipscale.checkpoint.places import CHECKPOINTS, fetch, finished_in, home, local
from clipscale.config import Config, load_config
from clipscale.data.io import REMOTE, ShardStore
from clipscale.data.tokenizer import Tokenizer, build_tokenizer
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP, build_model

EXPORTED = "model.safetensors"  # beside config.yaml: weights under our own names
FETCHED = "fetched"  # in a run's directory: copies of its remote checkpoints
TOKENIZER = "tokenizer"  # beside config.yaml: a tokenizer that is not part of a library


def load_tokenizer(checkpoint: Path, config: Config) -> Tokenizer:
    """The tokenizer of a run, by what :func:`find_checkpoint` gives."""
    return build_tokenizer(config.tokenizer, config.model, stored_tokenizer(checkpoint))


def stored_tokenizer(checkpoint: Path) -> Path:
    """Where the run of a checkpoint has its tokenizer, if it keeps one."""
    run = checkpoint if (checkpoint / EXPORTED).exists() else checkpoint.parent.parent
    return run / TOKENIZER


def copy_tokenizer(checkpoint: Path, out: Path) -> None:
    """Put the tokenizer that the run of a checkpoint keeps, if it does, beside what is written of it."""
    if stored_tokenizer(checkpoint).is_dir():
        shutil.copytree(stored_tokenizer(checkpoint), out / TOKENIZER)


def load_own(run_or_checkpoint: str | Path) -> tuple[CLIP, Config]:
    """What a run trained, on the CPU, and its configuration; the averaged weights where the run kept an average.

    Raises ClipscaleError when there is no finished checkpoint.
    """
    path, config = find_checkpoint(Path(run_or_checkpoint))
    model = build_model(config.model, seed=config.seed, logit_bias=config.loss.first_bias)
    if (path / EXPORTED).exists():
        state = read_file(path / EXPORTED)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[1:2] or [str(error)]
            raise ClipscaleError(
                f"{path / 'config.yaml'} is not of the weights beside it: {first[0].strip()}"
            ) from None
        return model, config
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    if config.ema.decay is not None:
        read_tensors(local(path), {"ema": weights, "model": buffers})
    else:
        read_tensors(local(path), {"model": weights | buffers})
    return model, config


def find_checkpoint(path: Path) -> tuple[Path, Config]:
    """A checkpoint and the configuration of its run, from a run directory or a checkpoint directory.

    What `clipscale export --to safetensors` wrote is both.
    """
    run = path if (path / "config.yaml").exists() else path.parent.parent
    if not (run / "config.yaml").exists():
        raise ClipscaleError(
            f"{path} is neither a run directory nor a checkpoint: {run / 'config.yaml'} does not exist"
        )
    if run == path and (path / EXPORTED).exists():
        return path, load_config(path / "config.yaml")
    config = load_config(run / "config.yaml")
    found = path if run != path else _newest_of(run, config)
    if found is None or not (found / MANIFEST).exists():
        raise ClipscaleError(f"{path} has no finished checkpoint yet; train it first: clipscale train")
    return found, config


def _newest_of(run: Path, config: Config) -> Path | None:
    """The newest checkpoint of a run, wherever it keeps them; a remote one is copied into the run's directory."""
    place = place_of(run, config)
    found = finished_in(place, ShardStore(config.storage))
    if found and place.startswith(REMOTE):
        return fetch(found[0], run / FETCHED)
    return Path(found[0].location) if found else None


def place_of(run: Path, config: Config) -> str:
    """The directory or remote prefix of a run's checkpoints; the run's directory may have been moved."""
    if config.checkpoint.dir is None:
        return str(run / CHECKPOINTS)
    return f"{home(config)}/{CHECKPOINTS}"
