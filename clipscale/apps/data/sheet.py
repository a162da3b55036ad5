"""A page of picture pairs, to judge by eye: one HTML file with the pictures in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipscale.apps.writing import whole_text
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, decode_image, find_captions, find_image
from clipscale.data.stream import read_samples

SIDE = 128  # of the pictures on the page, at most
MOST_PAIRS = 200

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em }}
td {{ padding: .4em 1em .4em 0; vertical-align: top; max-width: 22em; overflow-wrap: anywhere }}
small {{ color: #666 }}
</style>
<h1>{title}</h1>
<p>{told}</p>
<table>
"""


class Place(NamedTuple):
    """A sample by its shard and its number in it."""

    file: ShardFile
    number: int


class Pair(NamedTuple):
    """Two samples that are thought to be one, and what is said of them."""

    one: Place
    other: Place
    remark: str


def write_sheet(path: Path, title: str, told: str, pairs: Iterable[Pair], data: Data) -> None:
    """Write the page; every text on it is escaped."""
    with whole_text(path) as out:
        out.write(HEAD.format(title=html.escape(title), told=html.escape(told)))
        for pair in pairs:
            cells = "".join(_cell(place, data) for place in (pair.one, pair.other))
            out.write(f"<tr>{cells}<td>{html.escape(pair.remark)}</td></tr>\n")
        out.write("</table></html>\n")


def _cell(place: Place, data: Data) -> str:
    (sample,) = read_samples(place.file, place.number, place.number + 1)
    try:
        caption = find_captions(sample, data.caption_key)[0]
    except BadSample:
        caption = ""
    text = f"{html.escape(_plain(caption))}<br><small>{html.escape(_plain(sample.key))}</small>"
    return f'<td><img src="data:image/png;base64,{_picture(sample, data)}" alt=""><br>{text}</td>'


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode()


def _picture(sample: Member, data: Data) -> str:
    image = decode_image(find_image(sample, data.image_keys), data.max_pixels)
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
