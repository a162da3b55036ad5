"""``clipscale explain``: one image and one caption, explained as a picture, a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.markup import escape
from rich.table import Table

from clipscale.apps.asking import ask
from clipscale.apps.explain.picture import SIDE, overlay
from clipscale.apps.writing import whole
from clipscale.data.samples import BadSample, open_image, preprocess
from clipscale.errors import ConfigError, DataError
from clipscale.evals.explain import Explanation, explain

MOST_PIXELS = 100_000_000  # of an image, as data.max_pixels has it


def explain_image(
    where: str,
    image: Path,
    caption: str,
    against: Sequence[str],
    out: Path | None,
    method: str | None,
    device: str,
    as_json: bool,
) -> Explanation:
    """Explain, write ``out`` if it is given, and print a table or JSON.

    Raises ClipscaleError for a model or an image that is not there, or cannot be explained.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the picture is a .png")
    picture = read_picture(image)
    context = ask(where, device)
    vision = context.model.config.vision
    seen = preprocess(picture, vision.image_size, vision.resize_mode)
    found = explain(context.model, context.tokenizer, seen, caption, against, method)
    if out is not None:
        shown = overlay(found, preprocess(picture, max(SIDE, vision.image_size), vision.resize_mode))
        with whole(out) as file:
            file.write(shown)
    if as_json:
        print(json.dumps(document(found)))
    else:
        _print(found, out)
    return found


def read_picture(path: Path) -> Any:
    """A PIL image. Raises DataError where there is none."""
    try:
        return open_image(path.read_bytes(), MOST_PIXELS)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except BadSample as error:
        raise DataError(f"{path} is no image that can be used: {error}") from None


def document(found: Explanation) -> dict[str, Any]:
    """Plain values; ``heat`` is a list of rows."""
    return {
        "caption": found.caption,
        "score": found.score,
        "against": found.against,
        "explained": found.explained,
        "words": [{"word": word.text, "value": word.value} for word in found.words],
        "method": found.method,
        "heat": found.heat.tolist(),
    }


def _print(found: Explanation, out: Path | None) -> None:
    console = rich.console.Console(highlight=False, emoji=False)
    console.print(f"cosine similarity {found.score:.4f}")
    for caption, value in found.against.items():
        console.print(escape(f"  {value:.4f}  {caption}"), soft_wrap=True)
    if found.against:
        console.print(f"explained: {found.explained:+.4f}, what it has more than those in the mean")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("word")
    table.add_column("the score loses without it", justify="right")
    for word in found.words:
        table.add_row(escape(word.text), f"{word.value:+.4f}")
    console.print(table)
    if out is not None:
        console.print(escape(f"the image's part: {out}"), soft_wrap=True)
