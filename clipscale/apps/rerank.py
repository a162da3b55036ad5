"""``clipscale rerank``: images in the order of how well they match a caption, as CLIP did for DALL·E's samples
(Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.6)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import rich.console
import rich.markup
import rich.table
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipscale.apps.data.examine import shown
from clipscale.apps.search.model import Towers, as_towers, open_towers
from clipscale.apps.writing import check_writable, whole
from clipscale.config.data import Data
from clipscale.data.collections import IMAGE_SUFFIXES
from clipscale.data.folders import files_below
from clipscale.data.samples import BadSample, decode_image
from clipscale.errors import ConfigError, DataError

BATCH = 64
TILE, GAP, LINE = 192, 12, 26  # pixels of a sheet: an image, what is between two, a line of text
COLUMNS, MOST_ON_SHEET = 5, 100


class Ranked(NamedTuple):
    """An image in its place: its number among those given, the image as it was given, and its cosine."""

    number: int
    image: Any
    score: float


class Ranking(NamedTuple):
    """The usable images, best first, the earlier one of two that score the same; and the others, with the reason."""

    ranked: list[Ranked]
    unusable: list[tuple[Any, str]]


def rerank(model: Any, caption: str, images: Sequence[str | Path | Image.Image], device: str = "auto") -> Ranking:
    """Order images by the cosine similarity of their embeddings to a caption's.

    Args:
        model: what :func:`clipscale.load` takes, or what it gave.
        caption: what the images should show.
        images: files, or PIL images.
        device: auto, cpu or cuda, for a model that is opened here.

    Raises ConfigError for an empty caption or a model that is not there. An image that cannot be used is no error:
    it is among the ``unusable``.
    """
    if not caption.strip():
        raise ConfigError("the caption is empty: say what the images should show")
    towers = as_towers(*model) if isinstance(model, tuple) else open_towers(str(model), device)
    ranked: list[Ranked] = []
    unusable: list[tuple[Any, str]] = []
    text = towers.encode_texts([caption.strip()])[0]
    for start in range(0, len(images), BATCH):
        crops: list[torch.Tensor] = []
        good: list[tuple[int, Any]] = []
        for number, image in enumerate(images[start : start + BATCH], start):
            try:
                crops.append(_crop(towers, image))
                good.append((number, image))
            except BadSample as error:
                unusable.append((image, str(error)))
        if crops:
            scores = (towers.encode_images(torch.stack(crops)) @ text).tolist()
            ranked += [Ranked(*each, score) for each, score in zip(good, scores, strict=True)]
    return Ranking(sorted(ranked, key=lambda one: (-one.score, one.number)), unusable)


def _crop(towers: Towers, image: Any) -> torch.Tensor:
    if isinstance(image, Image.Image):
        return towers.preprocess(image)
    return towers.crop(_read(Path(image)), Data().max_pixels)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from None


def print_ranking(
    model: str, caption: str, images: Sequence[Path], top: int | None, sheet: Path | None, device: str, as_json: bool
) -> Ranking:
    """Rank image files, and those of folders, print a table or JSON, and draw a contact sheet where one is asked for.

    Raises ClipscaleError for files that are not there, when none can be used, and as :func:`rerank`.
    """
    if sheet is not None:
        if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError(f"--sheet {sheet}: name a .png, .jpg or .webp")
        check_writable(sheet, "--sheet")
    found = rerank(model, caption, _files(images), device)
    if not found.ranked:
        path, reason = found.unusable[0]
        raise DataError(f"none of the {len(found.unusable)} images can be used, the first, {path}, for: {reason}")
    best = found.ranked[:top]
    if sheet is not None:
        draw_sheet(sheet, caption, best)
    if as_json:
        told = [{"rank": rank, "score": one.score, "image": str(one.image)} for rank, one in enumerate(best, 1)]
        unusable = [{"image": str(path), "reason": reason} for path, reason in found.unusable]
        print(json.dumps({"caption": caption, "ranked": told, "unusable": unusable}))
        return found
    table = rich.table.Table("rank", "score", "image", title=rich.markup.escape(shown(caption, 100)))
    table.columns[-1].overflow = "fold"
    for rank, one in enumerate(best, 1):
        table.add_row(str(rank), f"{one.score:.4f}", rich.markup.escape(shown(str(one.image), 100)))
    for path, reason in found.unusable:
        table.add_row("-", "-", rich.markup.escape(f"{shown(str(path), 100)}: {reason}"))
    rich.console.Console().print(table)
    if sheet is not None:
        print(f"sheet: {sheet}")
    return found


def _files(given: Sequence[Path]) -> list[Path]:
    """The files that are named, and the images of the folders that are, in the order of their names."""
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        inside = [path / name for name, _ in files_below(path)] if path.is_dir() else [path]
        files += sorted(one for one in inside if one == path or one.suffix[1:].lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{given[0]} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def draw_sheet(path: Path, caption: str, ranked: Sequence[Ranked]) -> None:
    """A picture of the images in their order, each with its rank and score. Raises DataError where it cannot be
    written, ConfigError for a name that is no picture's."""
    ranked = ranked[:MOST_ON_SHEET]
    columns = min(COLUMNS, len(ranked))
    height = TILE + LINE + GAP
    size = max(columns, 3) * (TILE + GAP) + GAP, -(-len(ranked) // columns) * height + LINE + 2 * GAP
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 15)
    draw.text((GAP, GAP), _fitted(draw, shown(caption, 200), font, size[0] - 2 * GAP), "black", font)
    for place, one in enumerate(ranked):
        left, top = GAP + place % columns * (TILE + GAP), LINE + GAP + place // columns * height
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), "#eceef0")
        tile = ImageOps.contain(_picture(one.image), (TILE, TILE), Image.Resampling.BICUBIC)
        picture.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        draw.text((left, top + TILE + 3), f"{place + 1}", "#626c76", font)
        score = f"{one.score:.3f}"
        draw.text((left + TILE - draw.textlength(score, font), top + TILE + 3), score, "black", font)
    with whole(path) as out:
        picture.save(out, {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = decode_image(Path(image).read_bytes(), Data().max_pixels)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    while draw.textlength(text, font) > width:
        text = f"{text[:-2]}…"
    return text
