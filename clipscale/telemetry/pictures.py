"""What a tracker is shown where it may see the data: sheets of images, and matrices."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

SHOWN = 16  # images of a batch
ACROSS = 4
RIGHT, OTHER = (61, 139, 87), (222, 226, 230)  # frames


class Picture(NamedTuple):
    """An image and what to write below it."""

    image: Image.Image
    caption: str


def batch_sheet(images: torch.Tensor, captions: Sequence[str]) -> Picture:
    """The first of UInt8[B, 3, S, S] as training sees them, row by row, and their captions."""
    few = images[:SHOWN].cpu()
    tiles = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in few]
    listed = "\n".join(f"{i}. {caption}" for i, caption in enumerate(captions[: len(tiles)], start=1))
    return Picture(_grid([ImageOps.expand(tile, 2, OTHER) for tile in tiles], ACROSS), listed)


def of_examples(shown: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """What ``Examples.shown`` gives, as pictures by name."""
    found: dict[str, list[Picture]] = {}
    for asked in shown.get("retrieval", []):
        tiles = [ImageOps.expand(_image(one["image"]), 3, RIGHT if one["right"] else OTHER) for one in asked["found"]]
        found.setdefault("retrieval", []).append(Picture(_grid(tiles, len(tiles)), str(asked["caption"])))
    if similarity := shown.get("similarity"):
        drawn = _matrix(similarity["captions"], similarity["values"], "image of", "caption")
        found["similarity"] = [Picture(drawn, "cosine similarity of held-out pairs")]
    if confusion := shown.get("confusion"):
        drawn = _matrix(confusion["classes"], confusion["counts"], "answer", "class")
        found["confusion"] = [Picture(drawn, "zero-shot answers, of the classes that are mistaken most")]
    return found


def _image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def _grid(tiles: Sequence[Image.Image], across: int) -> Image.Image:
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * across, height * -(-len(tiles) // across)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % across * width, i // across * height))
    return sheet


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]], across: str, down: str) -> Image.Image:
    short = [name if len(name) <= 24 else name[:23] + "…" for name in (name.replace("$", r"\$") for name in names)]
    figure = Figure(figsize=(6.4, 5.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(values, cmap="Blues"), ax=axes, shrink=0.8)
    axes.set_xticks(range(len(short)), short, rotation=90, fontsize=7)
    axes.set_yticks(range(len(short)), short, fontsize=7)
    axes.set(xlabel=across, ylabel=down)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
