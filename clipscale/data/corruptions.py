"""Damage to images in five severities, the same for the same image each time.

Kinds and severities are four of Hendrycks and Dietterich's (2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", arXiv:1903.12261), made for images of 224 pixels; a blur is scaled to the image's side.
They are applied to what a model sees, after resizing.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from clipscale.data.samples import content_digest

SEVERITIES = (1, 2, 3, 4, 5)
_BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)  # standard deviation in pixels of 224
_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of a range of 1
_QUALITY = (25, 18, 15, 10, 7)
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of it


def corrupt(image: torch.Tensor, kind: str, severity: int, key: str) -> torch.Tensor:
    """UInt8[3, S, S] damaged by a ``kind`` of CORRUPTIONS with severity 1 to 5; ``key`` is the image's, which chance is
    drawn from."""
    return CORRUPTIONS[kind](image, severity - 1, key)


def _blur(image: torch.Tensor, level: int, key: str) -> torch.Tensor:
    deviation = _BLUR[level] * image.shape[-1] / 224
    reach = min(math.ceil(3 * deviation), image.shape[-1] - 1)
    return gaussian_blur(image, [2 * reach + 1] * 2, [deviation] * 2)


def _noise(image: torch.Tensor, level: int, key: str) -> torch.Tensor:
    seed = int.from_bytes(content_digest(f"noise {level} {key}".encode(errors="surrogatepass")), "big") >> 1
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return _to_bytes(image.float() + noise * (255 * _NOISE[level]))


def _jpeg(image: torch.Tensor, level: int, key: str) -> torch.Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=_QUALITY[level])
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).contiguous()


def _contrast(image: torch.Tensor, level: int, key: str) -> torch.Tensor:
    pixels = image.float()
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    return _to_bytes((pixels - mean) * _CONTRAST[level] + mean)


def _to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.round().clamp(0, 255).byte()


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int, str], torch.Tensor]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "contrast": _contrast,
}
