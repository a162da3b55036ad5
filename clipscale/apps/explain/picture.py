"""An explanation as a picture: where in the image the score comes from, and from which words."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clipscale.evals.explain import Explanation

SIDE = 448  # pixels at which the image is shown
# What speaks for the caption is red, what speaks against it blue, in the image and in its words.
SIGNED = LinearSegmentedColormap.from_list("signed", colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256)))
VEIL = 0.8  # share of the colour where the heat is strongest
PALE = 0.75  # of the grey image's contrast is kept
LEFT, RIGHT = 0.03, 0.96  # of the picture's width
NARROW = 0.055  # of it, the least for a word, so that its number fits below
INK, SOFT, LINE = "#22272d", "#68717b", "#d5d9de"
UNITS = {"integrated": "part of the score, per cell"}


def overlay(explanation: Explanation, picture: torch.Tensor) -> bytes:
    """A PNG: the image, the image under its heat with a colour bar, and the caption's words, coloured.

    ``picture`` UInt8[3, P, P] is the square that the model saw, as sharp as it can be had.
    """
    figure = Figure(figsize=(8.4, 6.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    pixels = picture.permute(1, 2, 0).numpy()
    places = ((LEFT, 0.27, 0.435, 0.59), (LEFT + 0.453, 0.27, 0.435, 0.59))
    shown = (pixels, blend(pixels, explanation.heat))
    for place, image in zip(places, shown, strict=True):
        axes = figure.add_axes(place)
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(LINE)
    _bar(figure, explanation)
    _title(figure, explanation)
    _words(figure, explanation)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def blend(pixels: NDArray[np.uint8], heat: torch.Tensor) -> NDArray[np.float64]:
    """Float[P, P, 3]: the image in grey under the colours of ``heat`` Float[rows, columns]."""
    strong = heat / heat.abs().max().clamp(min=1e-12)
    smooth = F.interpolate(strong[None, None], pixels.shape[:2], mode="bicubic", align_corners=False)[0, 0]
    values = smooth.clamp(-1, 1).numpy()[:, :, None]
    grey = 1 - PALE + PALE * pixels.mean(2, keepdims=True) / 255
    veil = VEIL * np.abs(values)
    return (1 - veil) * grey + veil * SIGNED(values[:, :, 0] / 2 + 0.5)[:, :, :3]


def _bar(figure: Figure, explanation: Explanation) -> None:
    most = float(explanation.heat.abs().max()) or 1.0
    axes = figure.add_axes((0.925, 0.27, 0.014, 0.59))
    bar = figure.colorbar(ScalarMappable(Normalize(-most, most), SIGNED), cax=axes)
    axes.set_ylim(min(float(explanation.heat.min()), 0.0), most)
    axes.set_title(UNITS.get(explanation.method, "share of the relevance, per cell"), loc="right", color=SOFT,
                   fontsize=8, pad=6)  # fmt: skip
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.tick_params(labelsize=7, color=LINE, labelcolor=SOFT, pad=1)
    bar.outline.set_edgecolor(LINE)


def _title(figure: Figure, explanation: Explanation) -> None:
    caption = textwrap.shorten(explanation.caption, 80, placeholder=" …")
    figure.text(LEFT, 0.952, caption, fontsize=13, color=INK, weight="bold", parse_math=False)
    told = f"cosine similarity {explanation.score:.3f}"
    if explanation.against:
        others = ", ".join(f"{text} ({value:.3f})" for text, value in explanation.against.items())
        shown = textwrap.shorten(others, 60, placeholder=" …")
        told += f"; explained are the {explanation.explained:+.3f} that it has more than {shown}"
    figure.text(LEFT, 0.912, told, fontsize=9, color=SOFT, parse_math=False)


def _words(figure: Figure, explanation: Explanation) -> None:
    """The words on up to three lines, each with what the score loses without it."""
    most = max(abs(word.value) for word in explanation.words) or 1.0
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    x, y = LEFT + 0.008, 0.175
    figure.text(LEFT, 0.225, "The words, and how much lower the score is without each", fontsize=9, color=SOFT)
    for place, word in enumerate(explanation.words):
        shown = _word(figure, word.text, word.value / most)
        extent = shown.get_window_extent(renderer).width / figure.bbox.width
        slot = max(extent, NARROW)
        if x + slot > RIGHT:
            x, y = LEFT + 0.008, y - 0.085
        if y < 0.0:
            shown.remove()
            more = f"… and {len(explanation.words) - place} more words"
            figure.text(RIGHT, 0.225, more, fontsize=9, color=SOFT, ha="right")
            return
        shown.set_position((x + (slot - extent) / 2, y))
        figure.text(x + slot / 2, y - 0.042, f"{word.value:+.3f}", fontsize=7, color=SOFT, ha="center", va="center")
        x += slot + 0.016


def _word(figure: Figure, text: str, strength: float) -> Any:
    shade = SIGNED(strength / 2 + 0.5)
    dark = float(np.dot(shade[:3], (0.3, 0.59, 0.11))) < 0.5
    box = {"boxstyle": "round,pad=0.3", "facecolor": shade, "edgecolor": LINE}
    shown = textwrap.shorten(text, 40, placeholder="…") or text[:40]
    return figure.text(
        0, 0, shown, fontsize=11, color="white" if dark else INK, va="center", parse_math=False, bbox=box
    )
