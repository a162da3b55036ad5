"""The two towers of a model, as search and rerank ask them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from clipscale.apps.devices import check_device
from clipscale.checkpoint.loading import load
from clipscale.data.samples import decode_image, eval_crop, preprocess
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError
from clipscale.models import CLIP

BATCH = 64


@dataclass(frozen=True)
class Towers:
    """A model with its tokenizer on a device."""

    model: CLIP
    tokenizer: Tokenizer
    device: torch.device

    @cached_property
    def weights(self) -> str:
        """A digest of the weights, by which the model is known wherever it lies."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    @property
    def dim(self) -> int:
        """Dimension D of the space that both towers map to."""
        return self.model.config.embed_dim

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as the model takes it, UInt8[3, S, S]."""
        vision = self.model.config.vision
        return preprocess(image, vision.image_size, vision.resize_mode)

    def crop(self, data: bytes, max_pixels: int) -> torch.Tensor:
        """An image file as the model takes it, UInt8[3, S, S]. Raises BadSample with the reason it cannot be used."""
        vision = self.model.config.vision
        return eval_crop(decode_image(data, max_pixels), vision.image_size, vision.resize_mode)

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Float32[N, D] on the CPU, normalised, of UInt8[N, 3, S, S]."""
        parts = [self.model.encode_image(part.to(self.device), normalize=True) for part in images.split(BATCH)]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0, self.dim)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Float32[N, D] on the CPU, normalised, of N texts."""
        starts = range(0, len(texts), BATCH)
        tokens = [self.tokenizer(list(texts[start : start + BATCH])) for start in starts]
        parts = [self.model.encode_text(ids.to(self.device), normalize=True) for ids in tokens]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0, self.dim)


def open_towers(where: str, device: str) -> Towers:
    """Open what ``clipscale.load`` takes. Raises ClipscaleError where it cannot."""
    check_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    place = "cpu"
    if device != "cpu" and torch.cuda.is_available():  # one for each process of a node that shares the work
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        place = f"cuda:{local % torch.cuda.device_count()}"
    model, _, tokenizer = load(where, place)
    if model.config.classes is not None:
        raise ConfigError(f"{where} is a classifier, which reads no text; use a model that was trained with captions")
    return Towers(model, tokenizer, torch.device(place))


def as_towers(model: CLIP, _: object, tokenizer: Tokenizer) -> Towers:
    """What ``clipscale.load`` gave, wherever it lies now."""
    return Towers(model, tokenizer, next(model.parameters()).device)
