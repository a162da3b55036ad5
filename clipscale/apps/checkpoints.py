"""``clipscale checkpoint``: what lies there, whether it is whole, and the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.table
import torch

from clipscale.apps.export import LOADING, check_new, write_own
from clipscale.checkpoint.checkpointer import DAMAGED
from clipscale.checkpoint.manifest import MANIFEST, DamagedError, Stored
from clipscale.checkpoint.own import find_checkpoint, load_own, place_of
from clipscale.checkpoint.places import CHECKPOINTS, PINNED, checkpoints_in, is_checkpoint
from clipscale.config import Config, load_config
from clipscale.config.compose import override
from clipscale.data.io import REMOTE, ShardStore
from clipscale.errors import ClipscaleError, ConfigError, DataError


def list_checkpoints(where: str, overrides: Sequence[str]) -> None:
    """Print the checkpoints of a run, newest first; what is in them is not read. Raises ClipscaleError for none."""
    table = rich.table.Table("checkpoint", "samples seen", "MiB", "state")
    for stored in _find(where, overrides):
        table.add_row(stored.name, *_described(stored))
    rich.console.Console().print(table)


def verify(where: str, overrides: Sequence[str]) -> None:
    """Read every byte of the checkpoints of a run, or of one. Raises ClipscaleError that names what is damaged."""
    damaged = []
    for stored in _find(where, overrides):
        try:
            manifest = stored.manifest()
            problem = stored.damage(manifest)
        except DamagedError as error:
            problem = str(error)
        if problem:
            damaged.append(f"{stored.name}: {problem}")
        print(f"{stored.name}: {problem or f'whole, {len(manifest.files)} files'}")
    if damaged:
        raise ClipscaleError(f"{len(damaged)} damaged in {where}: {'; '.join(damaged)}")


def average(paths: Sequence[Path], out: Path) -> None:
    """Write the mean of the weights of several checkpoints of one model as ``clipscale export --to safetensors`` does.

    Of a run it is the newest that counts, and the average where a run keeps one. Raises ClipscaleError for models that
    differ.
    """
    if len(paths) < 2:
        raise ConfigError("the mean of one checkpoint is that one; name two or more")
    check_new(out)
    model, config = load_own(paths[0])
    total = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for path in paths[1:]:
        other, its = load_own(path)
        if its.model != config.model:
            raise ConfigError(f"{path} is another model than {paths[0]}; only weights of the same one have a mean")
        for name, tensor in other.state_dict().items():
            if name in total:
                total[name] += tensor
    state = model.state_dict()
    with torch.no_grad():
        for name, summed in total.items():
            state[name].copy_(summed / len(paths))
    write_own(model, config, find_checkpoint(paths[0])[0], out, _card(config, paths, out))
    print(f"{out}: the mean of {len(paths)} checkpoints")


def _find(where: str, overrides: Sequence[str]) -> list[Stored]:
    """The checkpoints of a run or below a location, finished or not, newest first; or the one that it is itself."""
    config, place = Config(), where.rstrip("/")
    if not place.startswith(REMOTE) and Path(place, "config.yaml").exists():
        config = override(load_config(Path(place, "config.yaml")), overrides, ("storage.",))
        place = place_of(Path(place), config)
    else:
        config = override(config, overrides, ("storage.",))
        if is_checkpoint(place):
            return [Stored(place, ShardStore(config.storage))]
        place = place if place.endswith(f"/{CHECKPOINTS}") else f"{place}/{CHECKPOINTS}"
    if found := checkpoints_in(place, ShardStore(config.storage)):
        return found
    raise ClipscaleError(f"{where} is neither a run with checkpoints nor one: there is none in {place}")


def _described(stored: Stored) -> tuple[str, str, str]:
    names = stored.store.names(stored.location)
    pinned = ", pinned" if PINNED in names else ""
    if DAMAGED in names:
        return "", "", f"damaged{pinned}"
    if MANIFEST not in names:
        return "", "", f"unfinished{pinned}"
    try:
        manifest = stored.manifest()
        sizes = {name: stored.store.version(f"{stored.location}/{name}").size for name in manifest.files}
    except (DamagedError, DataError) as error:
        return "", "", f"damaged: {error}"
    saved = manifest.saved
    notes = [note for note, holds in (
        ("best", saved.best_step == saved.step > 0), ("kept for good", 0 < saved.kept_at == saved.samples_seen),
    ) if holds]  # fmt: skip
    wrong = [name for name, known in manifest.files.items() if sizes[name] != known.bytes]
    state = f"damaged: the size of {wrong[0]}" if wrong else ", ".join(["finished", *notes])
    mebibytes = sum(known.bytes for known in manifest.files.values()) / 2**20
    return f"{saved.samples_seen:,}", f"{mebibytes:,.1f}", state + pinned


def _card(config: Config, paths: Sequence[Path], out: Path) -> str:
    listed = "\n".join(f"- `{path.resolve().name}`" for path in paths)
    return f"""\
# {config.model.name}, the mean of {len(paths)} checkpoints

{listed}

```python
{LOADING["safetensors"].replace("OUT", out.resolve().name)}```
"""
