"""Questions about built-in scenes, in the layouts of Winoground and SugarCrepe.

Two objects whose colours, textures, sizes or places are exchanged between two images that are alike in everything
else, down to the grain; and one, two or three alike objects, to be counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipscale.data.questions import EXAMPLES
from clipscale.data.shapes import (
    COLOURS,
    SHAPES,
    TEXTURES,
    SceneRandom,
    ShapesSpec,
    Thing,
    draw_scene,
    ensure_cached,
    scene_jpeg,
)

PAIRS, COUNTS = "swaps", "counting"  # the two sets, each a directory
SWAPPED = ("colour", "texture", "size", "place")
NUMBERS = ("one", "two", "three")
PER_KIND = 100
VERSION = 1  # part of the cache's name: raise it whenever the same numbers give other bytes


def write_compositions(directory: Path, per_kind: int = PER_KIND, image_size: int = 64, seed: int = 0) -> None:
    """Write ``swaps/examples.jsonl``, ``counting/counting.json``, and the images of both.

    ``per_kind`` examples of each exchanged attribute, and images of each number, of ``image_size`` pixels.
    """
    spec = ShapesSpec(image_size=image_size, seed=seed)
    for name in (PAIRS, COUNTS):
        (directory / name / "images").mkdir(parents=True)
    rows = [row for kind in SWAPPED for row in _swaps(directory / PAIRS / "images", spec, kind, per_kind)]
    (directory / PAIRS / EXAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = list(_counts(directory / COUNTS / "images", spec, per_kind))
    (directory / COUNTS / f"{COUNTS}.json").write_text(json.dumps(dict(enumerate(counted)), indent=1) + "\n")


def ensure_compositions(image_size: int, root: Path | None = None) -> Path:
    """The directory of the questions for models of ``image_size``; writes them where it is absent
    (:func:`~clipscale.data.shapes.ensure_cached`).
    """
    name = f"compositions-{VERSION}-{image_size}"
    return ensure_cached(name, lambda draft: write_compositions(draft, image_size=image_size), root)


def _swaps(folder: Path, spec: ShapesSpec, kind: str, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        random = SceneRandom(spec, f"swapped {kind}", index)
        colours, shapes = random.shuffled(tuple(COLOURS))[:2], random.shuffled(tuple(SHAPES))[:2]
        textures = random.shuffled(tuple(TEXTURES))[:2] if kind == "texture" else ["solid", "solid"]
        sizes = ["small", "large"] if kind == "size" else ["large", "large"]
        kinds = [((c, s, t), size) for c, s, t, size in zip(colours, shapes, textures, sizes, strict=True)]
        one, other = draw_scene(random, kinds, [1, 1])
        scenes = ((one, other), _exchanged(one, other, kind))
        names = [f"{kind}-{index:04d}-{side}.jpg" for side in (0, 1)]
        for name, scene in zip(names, scenes, strict=True):
            pixels = SceneRandom(spec, f"swapped {kind} pixels", index)  # the same for both: alike down to the grain
            (folder / name).write_bytes(scene_jpeg(pixels, scene, spec.image_size))
        captions = [_told(scene, kind) for scene in scenes]
        yield {"id": f"{kind}-{index}", "tag": kind, "image_0": names[0], "image_1": names[1],
               "caption_0": captions[0], "caption_1": captions[1]}  # fmt: skip


def _exchanged(one: Thing, other: Thing, kind: str) -> tuple[Thing, Thing]:
    """Both objects, each with what the other one has of a kind."""
    fields = {"colour": ("colour",), "texture": ("texture",), "size": ("size", "radius"), "place": ("x", "y")}[kind]
    return (
        one._replace(**{field: getattr(other, field) for field in fields}),
        other._replace(**{field: getattr(one, field) for field in fields}),
    )


def _told(scene: tuple[Thing, Thing], kind: str) -> str:
    phrases = [_phrase(thing, kind) for thing in scene]
    if kind != "place":
        return f"{phrases[0]} and {phrases[1]}"
    one, other = scene
    if abs(one.x - other.x) > abs(one.y - other.y):
        return f"{phrases[0]} {'left of' if one.x < other.x else 'right of'} {phrases[1]}"
    return f"{phrases[0]} {'above' if one.y < other.y else 'below'} {phrases[1]}"


def _phrase(thing: Thing, kind: str) -> str:
    told = {"texture": thing.texture, "size": thing.size}.get(kind, "")
    words = " ".join(filter(None, (told, thing.colour, thing.shape)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _counts(folder: Path, spec: ShapesSpec, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count * len(NUMBERS)):
        random = SceneRandom(spec, "counted", index)
        shown = index % len(NUMBERS)
        colour, shape = random.choice(tuple(COLOURS)), random.choice(tuple(SHAPES))
        # Small ones whatever their number, whose size would otherwise tell it.
        scene = draw_scene(random, [((colour, shape, "solid"), "small")], [shown + 1])
        name = f"{index:04d}.jpg"
        (folder / name).write_bytes(scene_jpeg(SceneRandom(spec, "counted pixels", index), scene, spec.image_size))
        captions = [_numbered(number, colour, shape) for number in range(len(NUMBERS))]
        right = captions.pop(shown)
        yield {"filename": name, "caption": right, "negative_caption": captions}


def _numbered(number: int, colour: str, shape: str) -> str:
    plural = "" if not number else "es" if shape.endswith("s") else "s"
    return f"{NUMBERS[number]} {colour} {shape}{plural}"
