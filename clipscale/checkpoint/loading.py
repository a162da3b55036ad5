"""A model ready for use: of a run, or of another library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from clipscale.checkpoint.own import find_checkpoint, load_own, load_tokenizer
from clipscale.checkpoint.pretrained import (
    BIAS,
    architecture,
    is_library,
    load_pretrained,
    read_pretrained,
)
from clipscale.config import Config
from clipscale.config.optim import LossName
from clipscale.data.samples import preprocess
from clipscale.data.tokenizer import Tokenizer, build_tokenizer
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models import CLIP, build_model

WHERE = "a run, a checkpoint, open_clip:NAME/TAG, hf:NAME, or the path of weights or of an exported directory"


def load(where: str | Path, device: str = "cpu") -> tuple[CLIP, Callable[[Image.Image], torch.Tensor], Tokenizer]:
    """A trained model, as ``(model, preprocess, tokenizer)``; the averaged weights where a run kept an average.

    ``where`` is a run or a checkpoint, or else what ``init.weights`` takes of a whole model: ``open_clip:NAME/TAG``,
    ``hf:ORGANISATION/NAME``, a file of weights, a directory that open_clip, Hugging Face or clipscale wrote.
    ``model.encode_image(preprocess(picture)[None])`` and ``model.encode_text(tokenizer(["a caption"]))`` give
    Float[1, D]; ``normalize=True`` gives unit vectors. ``preprocess`` takes a PIL image to UInt8[3, S, S].

    Raises ClipscaleError, in one line, when it is not there, cannot be downloaded, or is no model of clipscale's kind.
    """
    model, config, tokenizer = open_model(where)
    model.eval().to(device)
    vision = config.model.vision
    return model, partial(preprocess, size=vision.image_size, mode=vision.resize_mode), tokenizer


def load_model(where: str | Path) -> tuple[CLIP, Config]:
    """A trained model, on the CPU, and its configuration, which of another library's says the model and the tokenizer;
    else as :func:`load`."""
    if is_library(str(where)):
        return open_model(where)[:2]
    with _accepting(where):
        return load_own(where)


def open_model(where: str | Path) -> tuple[CLIP, Config, Tokenizer]:
    """What :func:`load_model` gives, and the tokenizer."""
    if is_library(str(where)):
        with naming(str(where)):
            return _of_library(str(where))
    with _accepting(where):
        path, config = find_checkpoint(Path(where))
    return load_own(path)[0], config, load_tokenizer(path, config)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong with weights is said of ``where``, which is no value of ``init.weights`` here."""
    try:
        yield
    except ClipscaleError as error:
        raise ClipscaleError(str(error).replace(f"init.weights={where}", where)) from None


@contextmanager
def _accepting(where: str | Path) -> Iterator[None]:
    """Where there is nothing at all, say what could be."""
    if not Path(where).exists():
        raise ConfigError(f"{where} does not exist; name {WHERE}")
    yield


def _of_library(where: str) -> tuple[CLIP, Config, Tokenizer]:
    if where.startswith("timm:"):
        raise ConfigError(f"{where} is an image tower alone, which knows no captions; name {WHERE}")
    found, config = read_pretrained(where), Config()
    config.tokenizer.name = found.tokenizer_name
    config.model = architecture(found)
    if BIAS in found.state:
        config.loss.name = LossName.siglip
    model = build_model(config.model, logit_bias=config.loss.first_bias)
    if without := [name for name in model.state_dict() if name not in found.state]:
        raise ClipscaleError(f"{where} holds a part of a model alone, without {without[0]}; name a whole model")
    load_pretrained(model, found)
    return model, config, build_tokenizer(config.tokenizer, config.model)
