"""The dual encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.models.hf import HFTextTower
from clipscale.models.init import Draw, first_values, initialize
from clipscale.models.packing import Packing
from clipscale.models.text import TextTower
from clipscale.models.vision import VisionTower


class Features(NamedTuple):
    """What the loss needs: ``image`` and ``text`` Float[B, D], L2-normalised fp32; ``extra_text`` Float[P, D] of
    captions beyond those of the images; the multiplier and the bias on their similarities, Float[1]; the bias is None
    for the softmax loss."""

    image: torch.Tensor
    text: torch.Tensor
    extra_text: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None


class Temperature(nn.Module):
    """The learned multiplier (and bias) on similarities.

    A module of its own so that sharding keeps it in fp32: rounding a log-temperature to bf16 changes it by 0.7 %.
    Shape (1,), because FSDP2 refuses scalars.
    """

    def __init__(self, logit_scale: float, logit_bias: float | None) -> None:
        super().__init__()
        self.first = {"logit_scale": math.log(logit_scale)}
        self.logit_scale = nn.Parameter(torch.tensor([math.log(logit_scale)], dtype=torch.float32))
        self.logit_bias = None
        if logit_bias is not None:
            self.first["logit_bias"] = logit_bias
            self.logit_bias = nn.Parameter(torch.tensor([logit_bias], dtype=torch.float32))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A copy: FSDP frees the gathered parameter after this, and the loss would read freed memory.
        bias = None if self.logit_bias is None else _at_least_fp32(self.logit_bias).clone()
        return _at_least_fp32(self.logit_scale).exp(), bias


class CLIP(nn.Module):
    """Two towers into one space.

    ``model.logit_scale`` is the parameter, the logarithm of the multiplier, Float[1].
    """

    def __init__(self, config: Model, *, logit_scale: float = 1 / 0.07, logit_bias: float | None = None) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.text: TextTower | HFTextTower = _text_tower(config)
        self.temperature = Temperature(logit_scale, logit_bias)
        self.locked: Sequence[nn.Module] = ()
        self.first: Mapping[str, Draw] = {}  # of a model without storage: the values that its parameters are to have

    @property
    def full_precision(self) -> list[nn.Module]:
        """What computes in fp32 whatever the towers do."""
        return [self.temperature]

    @property
    def logit_scale(self) -> nn.Parameter:
        """The log of the multiplier on cosine similarities, Float[1]."""
        return self.temperature.logit_scale

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for what is ``locked``: that computes as in evaluation."""
        super().train(mode)
        for module in self.locked:
            module.training = False
        return self

    def forward(
        self,
        images: torch.Tensor,
        text_ids: torch.Tensor,
        text_lengths: torch.Tensor | Packing,
        after_text: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
        seeds: torch.Tensor | None = None,
    ) -> Features:
        """Features of a batch of B pairs: ``images`` as VisionTower takes them, captions packed as TextTower does.

        Captions beyond the first B belong to no image. ``after_text`` is called with ``text`` and ``extra_text`` before
        the image tower begins. ``seeds`` Int64[B] are the images', as VisionTower takes them.
        """
        parts = _normalize(self.text(text_ids, text_lengths)).tensor_split([len(images)])
        text, extra_text = (part.clone() for part in parts)  # FSDP would warn of views, whatever is done with them
        if after_text is not None:
            after_text(text, extra_text)
        image = _normalize(self.visual(images, seeds))
        return Features(image, text, extra_text, *self.temperature())

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Float[B, D] of UInt8[B, 3, S, S] (normalised inside) or Float[B, 3, S, S] (taken as normalised already)."""
        features = self.visual(images)
        return _normalize(features) if normalize else features

    def encode_text(self, text: Any, lengths: torch.Tensor | None = None, normalize: bool = False) -> torch.Tensor:
        """Float[B, D] of captions.

        ``text`` is padded ids Int64[B, L] as the tokenizer gives them, or packed ids Int[T] with ``lengths`` Int[B]
        (on the host, where the device must not be waited for), or a loader's ``Batch``. Raises ValueError for a caption
        without an end, or longer than the context.
        """
        if hasattr(text, "text_ids"):
            text, lengths = text.text_ids, text.text_lengths
        if lengths is None:
            text, lengths = self.text.pack(text)
        features = self.text(text, lengths)
        return _normalize(features) if normalize else features


class Classifier(CLIP):
    """A dual encoder with a linear head over fixed classes, ``config.classes``, on its image tower.

    Text tower and temperature take no part in its training and stay as they start: what is fine-tuned can still be
    compared with captions.
    """

    def __init__(self, config: Model, *, logit_scale: float = 1 / 0.07, logit_bias: float | None = None) -> None:
        super().__init__(config, logit_scale=logit_scale, logit_bias=logit_bias)
        assert config.classes is not None
        self.head = nn.Linear(config.embed_dim, len(config.classes))
        for unused in (self.text, self.temperature):
            unused.requires_grad_(False)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def full_precision(self) -> list[nn.Module]:
        """What computes in fp32 whatever the towers do."""
        return [self.temperature, self.head]

    def forward(
        self,
        images: torch.Tensor,
        text_ids: torch.Tensor,
        text_lengths: torch.Tensor | Packing,
        after_text: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
        seeds: torch.Tensor | None = None,
    ) -> Features:
        """Logits of B images in the place of their features; texts are not looked at, and have none."""
        logits = self.classify(images, seeds)
        nothing = logits.detach()[:, :0]
        return Features(logits, nothing, nothing[:0], *self.temperature())

    def classify(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Float[B, C], logits of ``config.classes``, of B images as VisionTower takes them, and ``seeds``."""
        features = _normalize(self.visual(images, seeds))
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)


def _text_tower(config: Model) -> TextTower | HFTextTower:
    if config.text.hf is not None:
        return HFTextTower(config.text, config.context_length, config.embed_dim)
    return TextTower(config.text, config.context_length, config.embed_dim, config.activation)


def build_model(
    config: Model | str,
    *,
    seed: int = 0,
    logit_scale: float = 1 / 0.07,
    logit_bias: float | None = None,
    drawn: bool = True,
) -> CLIP:
    """A freshly initialised model: ``build_model("vit_b_32")`` takes an option of the ``model`` group by its name.

    One with ``classes`` is a :class:`Classifier`, whose head is zeros.

    The same seed gives the same weights on every machine and for every layout. A text tower of Hugging Face's is drawn
    as well: its own weights are what a run starts from (:func:`clipscale.checkpoint.pretrained.read_text_tower`).
    Without ``drawn``, parameters have no storage yet (they are on the meta device, buffers are not), and
    :func:`clipscale.parallel.parallelize` gives each rank its shards of what they would be; a model with weights that
    are drawn by its library, timm or transformers, has them all the same. Raises ConfigError for an unknown name, and
    for towers that cannot be had.
    """
    schema: Model = load_group("model", config, Model) if isinstance(config, str) else config

    def make() -> CLIP:
        with torch.random.fork_rng(devices=[]):
            # Architectures whose weights initialize() leaves to timm are drawn here.
            torch.manual_seed(seed)
            kind = CLIP if schema.classes is None else Classifier
            return kind(schema, logit_scale=logit_scale, logit_bias=logit_bias)

    if not drawn and schema.text.hf is None:
        with _without_storage():
            model = make()
        model.first = first_values(model, seed)
        if all(name in model.first for name, _ in model.named_parameters()):
            return model
    model = make()
    initialize(model, seed)
    return model


@contextmanager
def _without_storage() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, one after the other as they come to be."""

    def forget(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(forget)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _normalize(features: torch.Tensor) -> torch.Tensor:
    # In fp32 whatever autocast says: the epsilon of a normalisation lies below fp16's smallest number.
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(_at_least_fp32(features), dim=-1)
