"""The towers as groups of layers, from the input to the output: what is locked, and by what learning rates fall."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipscale.config.optim import Lock
from clipscale.errors import ConfigError
from clipscale.models import CLIP
from clipscale.parallel.parallelize import find_blocks


def layer_groups(model: CLIP) -> dict[str, list[list[str]]]:
    """Names of each tower's parameters, in groups from its input to its output.

    Embeddings or stem, then the blocks, the last one with the norm behind it, then the projection (of CLIP's ResNets,
    the attention pool): the order of open_clip's ``--lock-image-unlocked-groups``. What stands between two blocks goes
    with the second; a tower without blocks is one group and its projection.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {tower: _group(tower, blocks, names) for tower, blocks in find_blocks(model).items()}


def _group(tower: str, blocks: list[nn.Module], names: dict[int, str]) -> list[list[str]]:
    block_of = {names[id(p)]: i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    mine = [name for name in names.values() if name.startswith(f"{tower}.")]
    has_projection = any(name.startswith(f"{tower}.proj.") for name in mine)
    groups: list[list[str]] = [[] for _ in range(len(blocks) + 2)]
    passed = 0  # blocks that have begun: parameters are registered in the order in which they are used
    for name in mine:
        if name in block_of:
            passed = number = block_of[name]
        elif name.startswith(f"{tower}.proj."):
            number = len(blocks) + 1
        elif passed < len(blocks):
            number = passed + 1 if passed else 0
        else:
            number = passed if has_projection else passed + 1
        groups[number].append(name)
    return [group for group in groups if group]


def heights(model: CLIP) -> dict[str, int]:
    """How many groups of its tower lie above a parameter's, by name; 0 for projections and what is in no tower."""
    found = {name: 0 for name, _ in model.named_parameters()}
    for groups in layer_groups(model).values():
        found |= {name: height for height, group in enumerate(reversed(groups)) for name in group}
    return found


def lock(model: CLIP, config: Lock) -> None:
    """Take what ``config`` locks out of training; call it before the model is laid out over ranks.

    Its weights want no gradient, so that no pass keeps anything for it, and it computes as in evaluation. Raises
    ConfigError for more unlocked groups than a tower has.
    """
    parameters, groups = dict(model.named_parameters()), layer_groups(model)
    for tower, key in (("visual", "image"), ("text", "text")):
        unlocked = getattr(config, f"{key}_unlocked_groups")
        if not getattr(config, key):
            continue
        if unlocked >= len(groups[tower]):
            raise ConfigError(
                f"lock.{key}_unlocked_groups={unlocked} leaves nothing to lock: the {key} tower has "
                f"{len(groups[tower])} groups of layers; use fewer, or lock.{key}=false"
            )
        for group in groups[tower][: len(groups[tower]) - unlocked]:
            for name in group:
                parameters[name].requires_grad_(False)
    model.locked = [one for one in _locked(model) if config.batchnorm or not isinstance(one, _BatchNorm)]
    model.train(model.training)


def _locked(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside of ones that have parameters, and none that is trained."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield from module.modules()
    else:
        for child in module.children():
            yield from _locked(child)
