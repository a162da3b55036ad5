"""Built-in data: compositional scenes of shapes, rendered here and written as WebDataset shards.

A clean machine can train, validate and run zero-shot classification with no download. The data tests what a dual
encoder should learn, to compose: some (colour, shape, texture) compositions never occur in a training image, and the
validation and zero-shot sets are about exactly those.

Only numpy and Pillow are needed. Shards are written with `tarfile` because importing `webdataset` imports torch, which
costs seconds and is not needed to draw shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tarfile
import time
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FORMAT_VERSION = 1  # raise it when the same spec would give other bytes: caches of the old format are then left alone
SAMPLES_PER_SHARD = 1024

COLOURS = {
    "red": (216, 36, 40),
    "orange": (246, 138, 24),
    "yellow": (242, 214, 40),
    "green": (44, 158, 62),
    "cyan": (64, 204, 214),
    "blue": (40, 78, 212),
    "purple": (126, 48, 176),
    "pink": (246, 130, 186),
}
SHAPES = {  # nouns; the first is the name
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "moon"),
    "arrow": ("arrow",),
    "diamond": ("diamond", "rhombus"),
    "drop": ("drop", "teardrop"),
    "hourglass": ("hourglass",),
    "bolt": ("bolt", "lightning bolt"),
}
# Adjectives, then a phrase to follow the noun. The first word names the class, so it starts with a consonant: the
# zero-shot templates say "a {}".
TEXTURES = {
    "solid": (("solid", "plain"), "with no pattern"),
    "striped": (("striped",), "with stripes"),
    "dotted": (("dotted", "spotted"), "with dots"),
    "checkered": (("checkered", "checked"), "with a checkered pattern"),
    "hollow": (("hollow", "outlined"), "with an empty middle"),
    "ringed": (("ringed",), "with rings"),
}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
RADII = ({"small": (0.15, 0.20), "large": (0.26, 0.34)}, {"small": (0.13, 0.16), "large": (0.19, 0.235)})
TEMPLATES = ("a {}", "a photo of a {}", "there is a {}", "a picture of a {}", "an image showing a {}")
TRIPLES = tuple(itertools.product(COLOURS, SHAPES, TEXTURES))
# How many alike objects each group of a scene has, and how often such a scene is drawn.
GROUPINGS = (((1,), 0.66), ((1, 1), 0.16), ((2,), 0.06), ((1, 1, 1), 0.05), ((3,), 0.03), ((2, 1), 0.04))


@dataclass(frozen=True)
class ShapesSpec:
    """What to render. Equal specs give byte-identical shards (for one version of Pillow's JPEG encoder)."""

    train: int = 8192
    """Training images; none shows a held-out composition."""
    val: int = 600
    """Validation images, each with a caption of its own and at least one held-out composition."""
    classes: int = 240
    """Held-out (colour, shape, texture) compositions, which are the zero-shot classes."""
    per_class: int = 4
    """Zero-shot images per class, one object each."""
    image_size: int = 64
    """Height and width in pixels."""
    seed: int = 0
    """Draws other scenes and holds other compositions out."""
    shuffle_captions: bool = False
    """Control: permute the captions among the training images, so that no metric may rise above chance."""

    def __post_init__(self) -> None:
        most = len(TRIPLES) // 2
        if not 1 <= self.classes <= most:
            raise ValueError(f"shapes: classes must lie in 1..{most} (the rest is trained on), not {self.classes}")
        for key, least in (("train", 1), ("val", 1), ("per_class", 1), ("image_size", 16)):
            if getattr(self, key) < least:
                raise ValueError(f"shapes: {key} must be at least {least}, not {getattr(self, key)}")


class _Draws:
    """Random draws from a key by splitmix64 (Steele et al. 2014), so that no library version can change them."""

    def __init__(self, *key: object) -> None:
        self.state = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")

    def unit(self) -> float:
        self.state = (self.state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice(self, options):
        return options[int(self.unit() * len(options))]

    def shuffled(self, items) -> list:
        rest = list(items)
        return [rest.pop(int(self.unit() * len(rest))) for _ in range(len(rest))]


# ---------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class _Object:
    colour: str
    shape: str
    texture: str
    size: str
    x: float  # of the centre, as a fraction of the image's width, rightwards
    y: float  # downwards
    radius: float
    group: int  # objects of one group are alike and are named together

    @property
    def position(self) -> str:
        vertical = "top" if self.y < 0.4 else "bottom" if self.y > 0.6 else ""
        horizontal = "left" if self.x < 0.4 else "right" if self.x > 0.6 else ""
        return f"{vertical} {horizontal}".strip() or "center"

    @property
    def class_name(self) -> str:
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class _Scene:
    objects: tuple[_Object, ...]
    tone: str  # of the background: light or dark

    @property
    def name(self) -> str:
        return " + ".join(sorted(f"{o.size} {o.class_name} at the {o.position}" for o in self.objects))

    @property
    def compositions(self) -> tuple[str, ...]:
        return tuple(sorted(o.class_name for o in self.objects))


@functools.lru_cache(maxsize=8)
def _held_out(seed: int, classes: int) -> tuple[tuple[str, str, str], ...]:
    """The held-out (colour, shape, texture) triples in class order: random, but even over every attribute."""
    draws = _Draws(seed, "held out")
    rest, used, held = draws.shuffled(TRIPLES), Counter(), []
    for _ in range(classes):
        triple = min(rest, key=lambda t: sum(used[a] * n for a, n in zip(t, (8, 12, 6), strict=True)))
        rest.remove(triple)
        used.update(triple)
        held.append(triple)
    return tuple(sorted(held))


@functools.lru_cache(maxsize=8)
def _trained(seed: int, classes: int) -> tuple[tuple[str, str, str], ...]:
    return tuple(sorted(set(TRIPLES) - set(_held_out(seed, classes))))


def _centres(draws: _Draws, radii: list[float]) -> list[tuple[float, float]]:
    """A centre for each object, in a cell of its own, so that none overlap: all, halves or quarters of the image."""

    def within(low: float, high: float, radius: float) -> float:
        return round(draws.uniform(low + radius, high - radius), 4)

    if len(radii) == 1:
        return [(within(0.0, 1.0, radii[0]), within(0.0, 1.0, radii[0]))]
    if len(radii) == 2:
        halves = draws.shuffled([(0.0, 0.5), (0.5, 1.0)])
        along = [within(*half, radius) for half, radius in zip(halves, radii, strict=True)]
        across = [within(0.15, 0.85, radius) for radius in radii]
        pairs = list(zip(along, across, strict=True))
        return pairs if draws.chance(0.5) else [(y, x) for x, y in pairs]
    corners = draws.shuffled([(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
    return [(within(x, x + 0.5, r), within(y, y + 0.5, r)) for (x, y), r in zip(corners, radii, strict=False)]


def _scene(draws: _Draws, first: tuple, others: tuple, groups: tuple[int, ...]) -> _Scene:
    """A scene whose first group is one of the triples `first`, and whose other groups are of `others`."""
    triples = [draws.choice(first)]
    while len(triples) < len(groups):
        triple = draws.choice(others)
        if triple not in triples:
            triples.append(triple)
    sizes = [draws.choice(tuple(SIZES)) for _ in groups]
    members = [group for group, count in enumerate(groups) for _ in range(count)]
    ranges = RADII[len(members) > 1]
    radii = [round(draws.uniform(*ranges[sizes[g]]), 4) for g in members]
    centres = _centres(draws, radii)
    objects = tuple(
        _Object(*triples[g], sizes[g], *centre, radius, g)
        for g, centre, radius in zip(members, centres, radii, strict=True)
    )
    return _Scene(objects, draws.choice(("light", "dark")))


def _groups(draws: _Draws) -> tuple[int, ...]:
    mark = draws.unit()
    for groups, share in GROUPINGS:
        mark -= share
        if mark < 0:
            return groups
    return GROUPINGS[0][0]


# -------------------------------------------------------------------------------------------------- captions


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _noun_phrase(draws: _Draws, thing: _Object, count: int, full: bool) -> str:
    """Such as "a big striped red star" or "two red stars with stripes"; not `full` may leave the texture out."""
    noun = draws.choice(SHAPES[thing.shape])
    if count > 1:
        noun += "es" if noun.endswith("s") else "s"
    adjectives, following = TEXTURES[thing.texture]
    words, tail = [thing.colour], ""
    if full or draws.chance(0.4):
        style = draws.unit()
        if style < 0.25:
            tail = f" {following}"
        else:
            words.insert(0 if style < 0.7 else 1, draws.choice(adjectives))
    if draws.chance(0.3):
        words.insert(0, draws.choice(SIZES[thing.size]))
    phrase = " ".join([*words, noun]) + tail
    return _article(phrase) if count == 1 else f"{('two', 'three')[count - 2]} {phrase}"


def _related(draws: _Draws, a: _Object, b: _Object) -> str:
    """The words between a and b, by the axis along which they lie farther apart."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return draws.choice(("to the left of", "left of") if a.x < b.x else ("to the right of", "right of"))
    return draws.choice(("above", "over") if a.y < b.y else ("below", "under"))


def _place(draws: _Draws, thing: _Object) -> str:
    if thing.position == "center":
        return draws.choice(("in the center", "in the middle"))
    if thing.position in ("left", "right"):
        return draws.choice(("on the {}", "on the {} side")).format(thing.position)
    corner = " " in thing.position
    return draws.choice(("at the {}", "in the {} corner" if corner else "near the {}")).format(thing.position)


def _caption(draws: _Draws, scene: _Scene, full: bool) -> str:
    """One true sentence about the scene, of at most 24 words."""
    counts = Counter(thing.group for thing in scene.objects)
    kinds = {thing.group: thing for thing in reversed(scene.objects)}  # one of each group
    full = full or draws.chance(0.8)
    phrases = [(kinds[g], _noun_phrase(draws, kinds[g], counts[g], full)) for g in draws.shuffled(counts)]
    (a, text), extras = phrases[0], []
    if len(scene.objects) == 1:
        style = draws.unit()
        if style < 0.08:
            return f"{_place(draws, a)} there is {text}"
        extras = [_place(draws, a)] if style < 0.25 else []
    elif len(scene.objects) == 2 and len(phrases) == 2 and draws.chance(0.7):
        text = f"{text} {_related(draws, a, phrases[1][0])} {phrases[1][1]}"
    else:
        text = ", ".join(phrase for _, phrase in phrases[:-1])
        text += " and " * (len(phrases) > 1) + phrases[-1][1]
    if len(scene.objects) < 3 and draws.chance(0.1):
        extras.append(f"on {_article(scene.tone)} background")
    opening = draws.choice(
        ("", "", "", "a photo of ", "a picture of ", "there is " if counts[a.group] == 1 else "we see ")
    )
    return " ".join([opening + text, *extras])


def _captions(draws: _Draws, scene: _Scene, full: bool) -> list[str]:
    """Three different phrasings."""
    captions: dict[str, None] = {}
    while len(captions) < 3:
        captions[_caption(draws, scene, full)] = None
    return list(captions)


# ------------------------------------------------------------------------------------------------- rendering


def _turn(start: float, stop: float, count: int) -> np.ndarray:
    return np.linspace(start, stop, count, endpoint=False) * 2 * math.pi


def _outlines() -> dict[str, np.ndarray]:
    """Each shape's corners, Float[N, 2], within the unit circle; y points down."""

    def ring(radius, start: float = -0.25, count: int = 40, stop: float | None = None) -> np.ndarray:
        t = _turn(start, start + 1 if stop is None else stop, count)
        return np.stack([np.cos(t), np.sin(t)], 1) * np.broadcast_to(radius, count)[:, None]

    t = _turn(0, 1, 48)
    heart = np.stack([16 * np.sin(t) ** 3, 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)], 1)
    drop = np.stack([0.72 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], 1)
    outer, inner = ring(1.0, 0.13, 30, 0.87), ring(0.8, 0.8, 24, 0.2)
    half, wide = 0.34, 0.98
    cross = [(-half, -wide), (half, -wide), (half, -half), (wide, -half), (wide, half), (half, half)]
    arrow = [(1, 0), (0.1, -0.85), (0.1, -0.32), (-0.95, -0.32), (-0.95, 0.32), (0.1, 0.32), (0.1, 0.85)]
    bolt = [(-0.1, -1), (-0.72, 0.2), (-0.12, 0.2), (-0.4, 1), (0.74, -0.3), (0.16, -0.3), (0.62, -1)]
    corners = {
        "circle": ring(0.88),
        "square": ring(1.08, -0.125, 4),
        "triangle": ring(1.05, count=3) + (0, 0.15),
        "star": ring(np.tile((1.05, 0.44), 5), count=10),
        "heart": heart / 16.5,
        "cross": [*cross, *((-x, -y) for x, y in cross)],
        "crescent": np.concatenate([outer, inner + (0.42, 0)]),
        "arrow": arrow,
        "diamond": [(0, -1.05), (0.68, 0), (0, 1.05), (-0.68, 0)],
        "drop": drop,
        "hourglass": [(-0.72, -0.95), (0.72, -0.95), (0.12, 0), (0.72, 0.95), (-0.72, 0.95), (-0.12, 0)],
        "bolt": bolt,
    }
    return {name: np.asarray(points, dtype=np.float64) for name, points in corners.items()}


OUTLINES = _outlines()
SUPERSAMPLE = 4


def _cell(at: np.ndarray, width: float) -> np.ndarray:
    """Which cell of that width a coordinate falls in; a cast costs a third of np.floor or np.mod, hence the shift."""
    return (at / np.float32(width) + 64).astype(np.int16)


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = u - (_cell(u, 0.56) - 63.5) * 0.56, v - (_cell(v, 0.56) - 63.5) * 0.56
    return u * u + v * v < 0.028


PATTERNS = {  # which points of an object carry its second colour; u and v are in radii, along the object's own axes
    "striped": lambda u, v: _cell(v, 0.28) & 1,
    "dotted": _dots,
    "checkered": lambda u, v: (_cell(u, 0.4) ^ _cell(v, 0.4)) & 1,
    "ringed": lambda u, v: _cell(np.sqrt(u * u + v * v) + 0.12, 0.26) & 1,
}


@functools.lru_cache(maxsize=2)
def _grain(size: int) -> np.ndarray:
    """Unit noise, Float[2 * size, 2 * size, 3], of which each image cuts its own window."""
    state = np.arange(1, 12 * size * size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    flat = (state >> np.uint64(40)).astype(np.float32) / 2**24
    return ((flat - 0.5) * math.sqrt(12)).reshape(2 * size, 2 * size, 3)


def _background(draws: _Draws, tone: str, size: int) -> np.ndarray:
    """A greyish gradient, Float[size, size, 3], whose lightness is what captions call it."""
    low, high = (178, 236) if tone == "light" else (18, 70)
    base = np.array([draws.uniform(low, high)] * 3, dtype=np.float32)
    tint = np.array([draws.uniform(-12, 12) for _ in range(3)], dtype=np.float32)
    slope_x, slope_y = draws.uniform(-14, 14), draws.uniform(-14, 14)
    across = np.linspace(-1, 1, size, dtype=np.float32)
    return base + tint + (across[None, :] * slope_x + across[:, None] * slope_y)[..., None]


def _paint(draws: _Draws, canvas: np.ndarray, thing: _Object) -> None:
    """Draw one object on canvas, Float[size, size, 3], with antialiased edges."""
    size = len(canvas)
    radius, fine = thing.radius * size, SUPERSAMPLE
    left, top = int(thing.x * size - radius) - 1, int(thing.y * size - radius) - 1
    side = int(2 * radius) + 4
    angle = draws.uniform(-0.26, 0.26)
    cos, sin = math.cos(angle), math.sin(angle)
    centre = np.array([thing.x * size - left, thing.y * size - top])
    corners = OUTLINES[thing.shape] @ np.array([[cos, sin], [-sin, cos]]) * radius + centre
    mask = Image.new("L", (side * fine, side * fine))
    points = (corners * fine).ravel().tolist()
    if thing.texture == "hollow":
        ImageDraw.Draw(mask).polygon(points, outline=255, width=max(1, round(0.22 * radius * fine)))
    else:
        ImageDraw.Draw(mask).polygon(points, fill=255)
    covers = [mask]
    if thing.texture in PATTERNS:
        at = (np.arange(side * fine, dtype=np.float32) + 0.5) / (fine * radius)
        x, y = (at - centre[0] / radius)[None, :], (at - centre[1] / radius)[:, None]
        chosen = PATTERNS[thing.texture](
            np.float32(cos) * x + np.float32(sin) * y, np.float32(cos) * y - np.float32(sin) * x
        )
        covers.append(Image.fromarray(np.asarray(mask) * chosen.astype(np.uint8)))
    colour = np.array([c * draws.uniform(0.9, 1.0) + draws.uniform(-8, 8) for c in COLOURS[thing.colour]], np.float32)
    second = colour + 0.78 * (255 - colour) if draws.chance(0.5) else 0.35 * colour
    x, y = max(left, 0), max(top, 0)
    view = canvas[y : top + side, x : left + side]
    for cover, paint in zip(covers, (colour, second), strict=False):
        alpha = np.asarray(cover.reduce(fine), np.float32)[y - top :, x - left :][: len(view), : view.shape[1], None]
        view += (paint - view) * (alpha / 255)


def _jpeg(draws: _Draws, scene: _Scene, size: int) -> bytes:
    canvas = _background(draws, scene.tone, size)
    for thing in scene.objects:
        _paint(draws, canvas, thing)
    x, y = int(draws.unit() * size), int(draws.unit() * size)
    canvas += _grain(size)[y : y + size, x : x + size] * draws.uniform(1, 7)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if draws.chance(0.3):
        image = image.filter(ImageFilter.BoxBlur(draws.uniform(0.2, 0.5) * size / 64))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- writing


def _train_scene(spec: ShapesSpec, index: int) -> _Scene:
    draws = _Draws(spec.seed, "train", index)
    trained = _trained(spec.seed, spec.classes)
    return _scene(draws, trained, trained, _groups(draws))


def _caption_sources(spec: ShapesSpec) -> list[int]:
    """Whose captions each training image gets: its own, or in the control another's (Sattolo's single cycle)."""
    order = list(range(spec.train))
    if spec.shuffle_captions:
        draws = _Draws(spec.seed, "shuffle")
        for last in range(spec.train - 1, 0, -1):
            other = int(draws.unit() * last)
            order[last], order[other] = order[other], order[last]
    return order


def _val_scenes(spec: ShapesSpec) -> list[_Scene]:
    """Scenes that differ in their compositions, so that a caption fits one image, whatever it says of size or place."""
    draws, scenes = _Draws(spec.seed, "val"), {}
    while len(scenes) < spec.val:
        groups = _groups(draws)
        scene = _scene(draws, _held_out(spec.seed, spec.classes), TRIPLES, groups)
        scenes.setdefault(scene.compositions, scene)
    return list(scenes.values())


def _zeroshot_scenes(spec: ShapesSpec) -> list[tuple[int, _Scene]]:
    held, draws = _held_out(spec.seed, spec.classes), _Draws(spec.seed, "zeroshot")
    labels = [label for _ in range(spec.per_class) for label in range(spec.classes)]
    return [(label, _scene(draws, (held[label],), (), (1,))) for label in labels]


def _sample(
    spec: ShapesSpec, split: str, index: int, scene: _Scene, captions: list[str], label: int | None = None
) -> dict:
    objects = [
        {key: value for key, value in dataclasses.asdict(thing).items() if key != "group"} for thing in scene.objects
    ]
    facts = {"name": scene.name, "captions": captions, "background": scene.tone, "objects": objects}
    if label is not None:
        facts["label"] = label
    return {
        "jpg": _jpeg(_Draws(spec.seed, split, index, "render"), scene, spec.image_size),
        "json": json.dumps(facts).encode(),
        "txt": captions[0].encode(),
    }


def _samples(spec: ShapesSpec, split: str, start: int, stop: int):
    """The samples of one shard, as (key, files)."""
    if split == "train":
        sources = _caption_sources(spec)[start:stop]
        rows = [
            (_train_scene(spec, i), _train_scene(spec, source), source, None) for i, source in enumerate(sources, start)
        ]
    elif split == "val":
        rows = [(scene, scene, i, None) for i, scene in enumerate(_val_scenes(spec)[start:stop], start)]
    else:
        rows = [(scene, scene, i, label) for i, (label, scene) in enumerate(_zeroshot_scenes(spec)[start:stop], start)]
    for index, (scene, told, source, label) in enumerate(rows, start):
        captions = _captions(_Draws(spec.seed, split, source, "captions"), told, full=split != "train")
        yield f"{split}-{index:06d}", _sample(spec, split, index, scene, captions, label)


def _write_shard(path: Path, spec: ShapesSpec, split: str, start: int, stop: int) -> None:
    with open(path, "wb") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for key, files in _samples(spec, split, start, stop):
                for extension, data in files.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")  # its defaults are fixed: time 0, user 0, mode 0644
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        stream.flush()
        os.fsync(stream.fileno())


def _classes(spec: ShapesSpec) -> dict:
    held = _held_out(spec.seed, spec.classes)
    colours = Counter(colour for colour, _, _ in held)
    return {
        "classnames": [f"{texture} {colour} {shape}" for colour, shape, texture in held],
        "templates": list(TEMPLATES),
        # Every class has as many images, so the mean over images is the mean over classes.
        "baselines": {"colour alone": sum(1 / colours[colour] for colour, _, _ in held) / len(held)},
    }


def write_shapes(directory: Path, spec: ShapesSpec, jobs: int | None = None) -> None:
    """Write `train-{000000..}.tar`, `val-000000.tar`, `zeroshot-000000.tar` and `zeroshot.classes.json`.

    A sample is `KEY.jpg`, `KEY.txt` (a caption) and `KEY.json`: `captions` (three phrasings, the first is the txt's),
    `name` (equal for equal content), `background`, `objects` (x, y and radius as fractions of the image) and, in the
    zero-shot shard, `label`. `jobs` processes share the shards (default: this one alone); the bytes do not depend on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = [(f"train-{n:06d}.tar", "train", start) for n, start in enumerate(range(0, spec.train, SAMPLES_PER_SHARD))]
    tasks = [(directory / name, spec, split, at, min(at + SAMPLES_PER_SHARD, spec.train)) for name, split, at in parts]
    tasks.append((directory / "val-000000.tar", spec, "val", 0, spec.val))
    tasks.append((directory / "zeroshot-000000.tar", spec, "zeroshot", 0, spec.classes * spec.per_class))
    if jobs is None or jobs == 1:
        for task in tasks:
            _write_shard(*task)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # fork would copy torch's locks
            list(pool.map(_write_shard, *zip(*tasks, strict=True)))
    (directory / "zeroshot.classes.json").write_text(json.dumps(_classes(spec), indent=1) + "\n")


def ensure_shapes(spec: ShapesSpec, root: Path | None = None) -> Path:
    """The directory of this spec's shards, written first where it is absent.

    It is `clipscale/shapes-<8 hex digits>` in `root`, by default `$XDG_CACHE_HOME` or `~/.cache`. It appears whole or not
    at all: processes that race each write a copy of their own, and one copy wins.
    """
    root = Path(root or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    facts = json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(spec)}, sort_keys=True)
    final = root / "clipscale" / f"shapes-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}-*"):  # left by a killed process; a living one is done in seconds
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    draft = final.parent / f".{final.name}-{uuid.uuid4().hex}"
    try:
        write_shapes(draft, spec)
        os.replace(draft, final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final
