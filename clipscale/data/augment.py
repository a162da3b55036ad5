"""Changes of colour that a training image may go through; each is drawn from the sample's own key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as TF

from clipscale.data.order import KeyedRandom


@dataclass(frozen=True)
class ColorOptions:
    """Strengths of brightness, contrast, saturation (0 and up) and hue (0 to 0.5); None changes none of them.

    ``jitter_prob`` and ``grayscale_prob`` are how often an image is changed.
    """

    jitter: tuple[float, float, float, float] | None = None
    jitter_prob: float = 1.0
    grayscale_prob: float = 0.0


def change_colors(image: torch.Tensor, options: ColorOptions, random: KeyedRandom) -> torch.Tensor:
    """Colour jitter, then greyscale: UInt8[3, H, W] to the same (SimCLR's, arXiv:2002.05709, appendix A).

    The four changes of the jitter come in a random order, each by a factor in [max(0, 1 - s), 1 + s] for its
    strength s, and the hue by a turn in [-s, s]; torchvision's ColorJitter does the same with a generator of its own.
    """
    if options.jitter is not None and random.uniform() < options.jitter_prob:
        *strengths, hue = options.jitter
        scaled = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
        factors = [random.uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
        turn = random.uniform(-hue, hue)
        steps: list[Callable[[torch.Tensor], torch.Tensor]] = [
            *(lambda x, f=f, k=k: f(x, k) for f, k in zip(scaled, factors, strict=True) if k != 1.0),
            *([lambda x: TF.adjust_hue(x, turn)] if turn else []),
        ]
        while steps:
            image = steps.pop(random.below(len(steps)))(image)
    if options.grayscale_prob and random.uniform() < options.grayscale_prob:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    return image
