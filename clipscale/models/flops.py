"""What a model costs, from its configuration alone: parameters, FLOPs, and activations kept for the backward pass.

Importing this imports no torch, so that planning is instant. A multiply-add counts as two FLOPs; norms, activations and
softmax, which are not products, as none. ``python -m clipscale.models.flops`` prints the table of all options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipscale.config import config_dir, load_group
from clipscale.config.model import Model
from clipscale.config.optim import Lock, PrecisionName
from clipscale.config.running import RECOMPUTED
from clipscale.errors import ConfigError
from clipscale.models.groups import rounded
from clipscale.models.parts import Kept, Part, Tokens, text_parts, vision_parts

MIB = 2**20
TYPICAL = 17  # tokens of a caption of LAION's, in the mean


@dataclass(frozen=True)
class Parameters:
    """Numbers that a model has; ``head`` are those of a classifier's."""

    vision: int
    text: int
    temperature: int
    head: int = 0

    @property
    def total(self) -> int:
        return self.vision + self.text + self.temperature + self.head


@dataclass(frozen=True)
class Execution:
    """How a model is run; as it stands, as :mod:`clipscale.models` does.

    ``lengths`` are the tokens of the captions of a batch, start and end included; None is captions of the full context
    length. A batch that is padded to its longest caption costs what ``lengths=[longest]`` does.

    ``grouped``: captions are computed in groups, each padded to its longest (:mod:`clipscale.models.groups`), as where
    there is no kernel for captions of any lengths: on CPUs, and in fp32. Otherwise nothing is padded.

    ``pooled_last_block``: the last block of each transformer computes queries, attention and MLP for the pooled token
    only. The result is the same.

    ``checkpointing`` is ``parallel.activation_checkpointing``: "none", "full", or a number k, the first k blocks of
    each tower (or all that it has), which keep their input only and are computed again in the backward pass; or
    "selective", all blocks, which keep some results beside it.

    ``lock`` is what is not trained, and has no backward pass: groups of layers, counted from the output.
    ``classifies``: the text tower is not run at all, as where a classifier is trained.
    """

    lengths: Sequence[int] | None = None
    grouped: bool = False
    pooled_last_block: bool = True
    checkpointing: str | int = "none"
    lock: Lock | None = None
    classifies: bool = False


NOMINAL = Execution(pooled_last_block=False)
"""Every token of the full context in every block: by what models are compared, and what other frameworks compute."""


@dataclass(frozen=True)
class Flops:
    """FLOPs per sample: of the ``vision`` and ``text`` towers' forward passes, of what checkpointing repeats, and of
    the forward passes through what is trained."""

    vision: float
    text: float
    repeated: float
    trained: float

    @property
    def forward(self) -> float:
        """Of both towers."""
        return self.vision + self.text

    @property
    def training(self) -> float:
        """That a step needs, three times the forward pass: the figure for model FLOPs utilisation (MFU). What is locked
        needs its forward pass alone.

        A backward pass has two products for each of the forward pass. Strictly, the first layer has one, as images
        need no gradient, which makes 0.6 % for ViT-B/32, 2.6 % for `tiny`.
        """
        return self.forward + 2 * self.trained

    @property
    def executed(self) -> float:
        """That a step does, repeated ones included: the figure for hardware utilisation (HFU)."""
        return self.training + self.repeated


@dataclass(frozen=True)
class Activations:
    """Bytes per sample that are kept from the forward to the backward pass, by tower.

    ``live`` are those of the largest checkpointed block, which the backward pass computes anew, one block at a time.
    """

    vision: float
    text: float
    live: float

    @property
    def total(self) -> float:
        """At the peak."""
        return self.vision + self.text + self.live


def parameters(model: Model, *, logit_bias: bool = False) -> Parameters:
    """Exactly those of ``build_model(model)``; ``logit_bias``: with the sigmoid loss's bias.

    Raises ConfigError for an image tower whose cost is not known, as all functions here do.
    """
    vision, text = _towers(model, Execution())
    counts = [sum(part.parameters for part in tower) for tower in (vision, text)]
    head = 0 if model.classes is None else (model.embed_dim + 1) * len(model.classes)
    return Parameters(counts[0], counts[1], 2 if logit_bias else 1, head)


def trained_parameters(model: Model, execution: Execution = Execution()) -> int:
    """Of the towers, those that ``execution`` neither locks nor leaves out."""
    towers = _towers(model, execution)
    return sum(part.parameters for tower in _trained(towers, execution) for part in tower)


def blocks(model: Model) -> tuple[list[int], list[int]]:
    """Parameters of each block of the vision and of the text tower: what is recomputed, and sharded, as one."""
    vision, text = _towers(model, Execution())
    return _blocks(vision), _blocks(text)


def flops(model: Model, execution: Execution = Execution()) -> Flops:
    """FLOPs of one sample, as torch's counter counts them; those that are ``NOMINAL``, as open_clip's profile has them
    (its docs/model_profile.csv).

    Of a transformer block of width d with n tokens and MLP width rd, these are 2nd²(4 + 2r) + 4n²d: attention counts
    in full where it is causal, as is usual.
    """
    towers = _towers(model, execution)
    vision, text = (sum(part.flops for part in tower) for tower in towers)
    moved = _trained(towers, execution)
    trained = sum(part.flops for tower in moved for part in tower)
    again = [part for tower in moved for part in _checkpointed(tower, execution)]
    if execution.checkpointing == "selective":
        return Flops(vision, text, sum(part.again for part in again), trained)
    return Flops(vision, text, sum(part.flops - part.unrepeated for part in again), trained)


def activations(
    model: Model,
    execution: Execution = Execution(),
    precision: PrecisionName = PrecisionName.fp32,
) -> Activations:
    """Bytes that autograd keeps for one sample between the passes; for what is locked, none.

    Per block of a transformer with width d, MLP width rd: nd(8 + 2r) numbers of fp32, or under autocast 2nd of 32 and
    nd(6 + 2r) of 16 bits (quick-GELU rd more), and a few per token; checkpointed, nd of 32, and selectively nd(4 + r)
    of 16 beside it. ``bf16`` counts as autocast does, which is more than it keeps: its residual stream has 16 bits.

    Not in it, because they do not grow with the batch: parameters, their half-precision copies under autocast (2 bytes
    each), and BatchNorm's statistics, which over several ranks keep more (``clipscale.parallel``). Counted on CPUs;
    attention is the fused one, as on GPUs.
    """
    kept, live = [], 0.0
    for tower in _trained(_towers(model, execution), execution):
        selective = execution.checkpointing == "selective"
        saved = [
            _bytes(part.kept, precision)
            - _bytes(part.entry, precision)
            - (_bytes(part.chosen, precision) if selective else 0)
            for part in _checkpointed(tower, execution)
            if part.entry is not None
        ]
        kept.append(sum(_bytes(part.kept, precision) for part in tower) - sum(saved))
        live = max([live, *saved])
    return Activations(kept[0], kept[1], live)


def render() -> str:
    """Markdown: a row for every option of ``model``, each at its own image size.

    FLOPs are nominal, but for the training column's last; memory is that of captions of full context length.
    """
    lines = [
        "| `model=` | parameters, M: vision | text | all | GFLOPs forward: vision | text "
        f"| GFLOPs training | needed, {TYPICAL} tokens | MiB per sample: fp32 | amp_bf16 | amp_bf16, checkpointed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for option in sorted(file.stem for file in (config_dir() / "model").glob("*.yaml")):
        model: Model = load_group("model", option, Model)
        count, cost = parameters(model), flops(model, NOMINAL)
        needed = flops(model, Execution([min(TYPICAL, model.context_length)]))
        memory = [
            activations(model, execution, precision).total / MIB
            for precision, execution in (
                (PrecisionName.fp32, Execution(grouped=True)),
                (PrecisionName.amp_bf16, Execution()),
                (PrecisionName.amp_bf16, Execution(checkpointing="full")),
            )
        ]
        millions = [f"{number / 1e6:.2f}" for number in (count.vision, count.text, count.total)]
        billions = [f"{number / 1e9:.2f}" for number in (cost.vision, cost.text, cost.training, needed.training)]
        lines.append(" | ".join([f"| `{option}`", *millions, *billions, *(f"{size:.1f}" for size in memory)]) + " |")
    return "\n".join(lines) + "\n"


def _towers(model: Model, execution: Execution) -> tuple[list[Part], list[Part]]:
    most, lengths = model.context_length, execution.lengths or [model.context_length]
    if not all(0 < length <= most for length in lengths):
        raise ConfigError(f"captions of {min(lengths)} to {max(lengths)} tokens do not fit model.context_length={most}")
    if model.text.pad_to_context:
        lengths = [most]
    pooled, grouped = execution.pooled_last_block, execution.grouped
    tokens = Tokens.of(rounded(lengths) if grouped else lengths, grouped)
    return vision_parts(model, pooled), [] if execution.classifies else text_parts(model, tokens, pooled)


def _trained(towers: tuple[list[Part], list[Part]], execution: Execution) -> tuple[list[Part], list[Part]]:
    """What has a backward pass: of a locked tower, its groups that are not (``clipscale.parallel.layers``)."""
    lock = execution.lock or Lock()
    vision = _unlocked(towers[0], lock.image_unlocked_groups) if lock.image else towers[0]
    return vision, _unlocked(towers[1], lock.text_unlocked_groups) if lock.text else towers[1]


def _unlocked(tower: list[Part], groups: int) -> list[Part]:
    """The last ``groups`` of a tower: its projection, if it has one, then its blocks, the last one with its norm."""
    starts = [i for i, part in enumerate(tower) if part.entry is not None]
    projects = tower[-1].entry is None and tower[-1].parameters > 0
    begun = groups - projects  # blocks
    if groups == 0 or begun == 0:
        return tower[-1:] if groups else []
    return tower[starts[-begun] if begun <= len(starts) else 0 :]


def _blocks(tower: list[Part]) -> list[int]:
    return [part.parameters for part in tower if part.entry is not None]


def _checkpointed(tower: list[Part], execution: Execution) -> list[Part]:
    blocks, asked = [part for part in tower if part.entry is not None], execution.checkpointing
    if asked in RECOMPUTED:
        return [] if asked == "none" else blocks
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise ConfigError(
            f"parallel.activation_checkpointing={asked} must be {', '.join(RECOMPUTED)} or a number of blocks"
        )
    return blocks[:asked]


def _bytes(kept: Kept, precision: PrecisionName) -> float:
    return kept.fp32 if precision is PrecisionName.fp32 else kept.amp


if __name__ == "__main__":
    print(render(), end="")
