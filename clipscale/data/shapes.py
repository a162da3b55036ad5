"""Built-in data: compositional scenes of shapes, rendered on this machine and written as WebDataset shards.

A clean machine can train, validate and classify zero-shot with no download. The data asks what a dual encoder should
learn, to compose: some compositions of colour, shape and texture occur in no training image, and the validation and
zero-shot sets are about exactly those, while each colour, shape and texture is seen often.

Only numpy and Pillow are needed. The shards are written with `tarfile`, since importing `webdataset` imports torch.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipscale.data.order import KeyedRandom
from clipscale.errors import ConfigError, DataError

FORMAT_VERSION = 2  # part of the cache's name: raise it whenever the same spec gives other bytes
SAMPLES_PER_SHARD = 1024
SUPERSAMPLE = 3


def _arc(radius: float, count: int, start: float = -0.25, stop: float = 0.75) -> np.ndarray:
    """Points on a circle, Float[count, 2], from `start` to `stop` in turns, clockwise from the right."""
    t = 2 * math.pi * np.linspace(start, stop, count, endpoint=False)
    return radius * np.stack([np.cos(t), np.sin(t)], 1)


_T = np.linspace(0, 2 * math.pi, 48, endpoint=False)
_HEART_Y = -13 * np.cos(_T) + 5 * np.cos(2 * _T) + 2 * np.cos(3 * _T) + np.cos(4 * _T)
_CROSS = [(-0.34, -0.98), (0.34, -0.98), (0.34, -0.34), (0.98, -0.34), (0.98, 0.34), (0.34, 0.34)]
SHAPES = {  # corners, in radii from the centre; y grows downwards
    "circle": _arc(0.9, 48),
    "square": _arc(1.08, 4, 0.125, 1.125),
    "triangle": _arc(1.08, 3) + np.array([0, 0.16]),
    "star": _arc(1.08, 10) * np.array([[1], [0.42]] * 5),
    "heart": np.stack([np.sin(_T) ** 3, _HEART_Y / 16], 1),
    "cross": np.array([*_CROSS, *((-x, -y) for x, y in _CROSS)]),
    "crescent": np.concatenate([_arc(1, 30, 0.13, 0.87), _arc(0.8, 24, 0.8, 0.2) + np.array([0.42, 0])]),
    "arrow": np.array([(1, 0), (0.1, -0.85), (0.1, -0.32), (-1, -0.32), (-1, 0.32), (0.1, 0.32), (0.1, 0.85)]),
    "diamond": _arc(1.05, 4) * np.array([0.66, 1]),
    "drop": np.stack([0.76 * np.sin(_T) * np.sin(_T / 2) ** 1.5, -np.cos(_T)], 1),
    "hourglass": np.array([(-0.75, -1), (0.75, -1), (0.12, 0), (0.75, 1), (-0.75, 1), (-0.12, 0)]),
    "bolt": np.array([(-0.1, -1), (-0.72, 0.2), (-0.12, 0.2), (-0.4, 1), (0.74, -0.3), (0.16, -0.3), (0.62, -1)]),
}
COLOURS = {"red": (216, 36, 40), "orange": (246, 138, 24), "yellow": (242, 214, 40), "green": (44, 158, 62)}
COLOURS |= {"cyan": (64, 204, 214), "blue": (40, 78, 212), "purple": (126, 48, 176), "pink": (246, 120, 180)}
# A texture's words after a noun, and its second colour: a light or a dark one, or None.
TEXTURES = {"solid": ("without pattern", None), "striped": ("with stripes", "light"), "dotted": ("with dots", "dark")}
TEXTURES |= {"checkered": ("with checks", "dark"), "hollow": ("in outline", None), "ringed": ("with rings", "light")}
SYNONYMS = {"circle": "disc", "cross": "plus", "crescent": "moon", "diamond": "rhombus", "drop": "teardrop"}
SYNONYMS |= {"solid": "plain", "dotted": "spotted", "checkered": "checked", "small": "little", "large": "big"}
# Radii as fractions of the image, for an object alone and for one among others. Small and large never meet.
ALONE = {"small": (0.15, 0.18), "large": (0.27, 0.36)}
AMONG = {"small": (0.13, 0.16), "large": (0.20, 0.24)}
# The number of alike objects in each group of a scene, and the percentage of such scenes. Most show one object: with
# several, colours and counts alone tell the images of a batch apart, and shape and texture are learned late.
SCENES = {(1,): 66, (1, 1): 16, (2,): 6, (1, 1, 1): 5, (2, 1): 4, (3,): 3}
_LOW, _HIGH, _MIDDLE = (0.0, 0.5), (0.5, 1.0), (0.0, 1.0)
_HALVES = [[(_LOW, _MIDDLE), (_HIGH, _MIDDLE)], [(_MIDDLE, _LOW), (_MIDDLE, _HIGH)]]
# Where the objects of a scene of so many may lie: ranges of x and y, one pair for each.
LAYOUTS: dict[int, list[Any]] = {
    1: [[(_MIDDLE, _MIDDLE)]],
    2: _HALVES,
    3: [list(itertools.product((_LOW, _HIGH), repeat=2))],
}
FRAMES = ("{}", "{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "there {be} {}", "here {be} {}")
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "an image of a {}", "there is a {}")


@dataclass(frozen=True)
class ShapesSpec:
    """What to render; raises ConfigError for a number out of its range. Equal specs give equal bytes on one machine."""

    train: int = 8192
    """Training images."""
    val: int = 600
    """Validation images, each with a held-out composition and a caption that is true of no other."""
    classes: int = 240
    """Zero-shot classes: half as many held-out compositions of colour, shape and texture, each small and large."""
    per_class: int = 4
    """Zero-shot images of each class, with one object each."""
    image_size: int = 64
    """Height and width in pixels."""
    seed: int = 0
    """Chooses the scenes and the held-out compositions."""
    shuffle_captions: bool = False
    """Control: each training image gets the captions of another one, so every metric must stay at chance."""

    def __post_init__(self) -> None:
        # Two thirds of the compositions stay in training, where every attribute must be met often.
        bounds = dict(train=(2, 10**5), val=(1, 10**4), classes=(2, 384), per_class=(1, 1000), image_size=(32, 512))
        for key, (low, high) in bounds.items():
            if not low <= getattr(self, key) <= high:
                raise ConfigError(f"data.shapes.{key}={getattr(self, key)}: give a number from {low} to {high}")


class SceneRandom(KeyedRandom):
    """A stream of its own for each purpose: another wording leaves the pixels as they were."""

    def __init__(self, spec: ShapesSpec, purpose: str, index: int = 0) -> None:
        super().__init__(spec.seed, int.from_bytes(purpose.encode(), "big"), index)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]

    def word(self, word: str) -> str:
        return self.choice((word, SYNONYMS.get(word, word)))


class Thing(NamedTuple):
    """One object. Its centre and radius are fractions of the image's side; y grows downwards."""

    colour: str
    shape: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    group: int  # alike objects, which a caption names together

    @property
    def class_name(self) -> str:
        # The size comes first so that no name begins with a vowel: the templates say "a {}".
        return f"{self.size} {self.texture} {self.colour} {self.shape}"


Composition = tuple[str, str, str]  # colour, shape, texture
Scene = tuple[Thing, ...]


@lru_cache(maxsize=4)
def _compositions(spec: ShapesSpec) -> tuple[list[Composition], list[Composition]]:
    """The held-out compositions, random but even over every attribute, and those left for training."""
    rest = SceneRandom(spec, "held out").shuffled(list(itertools.product(COLOURS, SHAPES, TEXTURES)))
    used, held = Counter[str](), list[Composition]()
    while 2 * len(held) < spec.classes:
        evenness = {a: used[a] * len(kind) for kind in (COLOURS, SHAPES, TEXTURES) for a in kind}
        held.append(min(rest, key=lambda composition: sum(evenness[a] for a in composition)))
        rest.remove(held[-1])
        used.update(held[-1])
    return sorted(held), sorted(rest)


def draw_scene(random: SceneRandom, kinds: Sequence[tuple[Composition, str]], counts: Sequence[int]) -> Scene:
    """A scene of counts[g] objects of composition and size kinds[g], none of which touch."""
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    things = []
    for group, spans in zip(groups, random.shuffled(random.choice(LAYOUTS[len(groups)])), strict=False):
        composition, size = kinds[group]
        radius = round(random.uniform(*(ALONE if len(groups) == 1 else AMONG)[size]), 4)
        free = [(0.42, 0.58) if span is _MIDDLE else (span[0] + radius, span[1] - radius) for span in spans]
        x, y = (round(random.uniform(*span), 4) for span in free)
        things.append(Thing(*composition, size, x, y, radius, group))
    return tuple(things)


def _random_scene(random: SceneRandom, first: Sequence[Composition], others: Sequence[Composition]) -> Scene:
    """A scene whose first group has a composition among `first`, the others different ones among `others`."""
    counts = random.choice([counts for counts, share in SCENES.items() for _ in range(share)])
    chosen = [random.choice(first)]
    while len(chosen) < len(counts):
        composition = random.choice(others)
        if composition not in chosen:
            chosen.append(composition)
    return draw_scene(random, [(composition, random.choice(tuple(ALONE))) for composition in chosen], counts)


@lru_cache(maxsize=4)
def _scenes(spec: ShapesSpec, split: str) -> list[Scene]:
    """A split's scenes in order. A zero-shot scene i shows class i % spec.classes."""
    (held, trained), random = _compositions(spec), SceneRandom(spec, split)
    if split == "train":
        return [_random_scene(random, trained, trained) for _ in range(spec.train)]
    if split == "zeroshot":
        kinds = list(itertools.product(held, ALONE))[: spec.classes]
        return [draw_scene(random, [kind], [1]) for kind in kinds * spec.per_class]
    # Different compositions in each, so that a caption that names them all is true of one scene only.
    scenes: dict[tuple[Composition, ...], Scene] = {}
    while len(scenes) < spec.val:
        scene = _random_scene(random, held, held + trained)
        scenes.setdefault(tuple(sorted(thing[:3] for thing in scene)), scene)
    return list(scenes.values())


def _noun_phrase(random: SceneRandom, thing: Thing, count: int, detail: float) -> str:
    """Such as "a big striped red star" or "two red stars with stripes"; `detail` is the chance to tell each."""
    noun, adjective = random.word(thing.shape), random.word(thing.texture)
    if count > 1:
        noun += "es" if noun.endswith("s") else "s"
    phrase = f"{thing.colour} {noun}"
    if random.chance(detail):
        usual, following = f"{adjective} {phrase}", TEXTURES[thing.texture][0]
        phrase = random.choice((usual, usual, f"{thing.colour} {adjective} {noun}", f"{phrase} {following}"))
    if random.chance(detail):
        phrase = f"{random.word(thing.size)} {phrase}"
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{(article, 'two', 'three')[count - 1]} {phrase}"


def _relation(random: SceneRandom, a: Thing, b: Thing) -> str:
    """Where a is, seen from b, along the axis on which they lie farther apart."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return random.choice(("left of", "to the left of") if a.x < b.x else ("right of", "to the right of"))
    return random.choice(("above", "over") if a.y < b.y else ("below", "under"))


def _caption(random: SceneRandom, scene: Scene, detail: float) -> str:
    """One true description of the scene, of at most 24 words."""
    counts = Counter(thing.group for thing in scene)
    leaders = random.shuffled(list({thing.group: thing for thing in scene}.values()))
    phrases = [_noun_phrase(random, thing, counts[thing.group], detail) for thing in leaders]
    if len(scene) == len(leaders) == 2 and random.chance(0.7):
        text = f"{phrases[0]} {_relation(random, *leaders)} {phrases[1]}"
    else:
        text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return random.choice(FRAMES).format(text, be="is" if counts[leaders[0].group] == 1 else "are")


def _captions(spec: ShapesSpec, split: str, index: int, scene: Scene) -> list[str]:
    """Three phrasings. Training captions leave things out, as people do; those to be matched tell everything."""
    random, captions = SceneRandom(spec, f"{split} captions", index), dict[str, None]()
    while len(captions) < 3:
        captions[_caption(random, scene, 0.8 if split == "train" else 1.0)] = None
    return list(captions)


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where an object has its second colour; u and v, in 64ths of the image, lie along the object's axes.

    Patterns keep their scale whatever the object's size, which is what makes them quick to learn.
    """

    def cell(at: np.ndarray, width: float) -> np.ndarray:
        return (at * np.float32(1 / width) + 64).astype(np.int16)  # a cast is a floor here, at a third of the cost

    if texture == "checkered":
        return (cell(u, 4.5) ^ cell(v, 4.5)) & 1
    if texture == "dotted":
        u, v = u - (cell(u, 6) - 63.5) * 6, v - (cell(v, 6) - 63.5) * 6
        return u * u + v * v < 3.6
    return cell((v if texture == "striped" else np.sqrt(u * u + v * v)) + 1.5, 3) & 1


def _covers(random: SceneRandom, thing: Thing, centre: np.ndarray, side: int, size: int) -> list[np.ndarray]:
    """The share of each pixel, Float[side, side, 1], that an object covers in its first and its second colour."""
    radius, fine, angle = thing.radius * size, side * SUPERSAMPLE, random.uniform(-0.26, 0.26)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    corners = SHAPES[thing.shape] @ np.array([[cos, sin], [-sin, cos]]) * radius + centre
    mask = Image.new("L", (fine, fine))
    width = round((0.12 * radius + 0.03 * size) * SUPERSAMPLE)
    style = {"outline": 255, "width": width} if thing.texture == "hollow" else {"fill": 255}
    ImageDraw.Draw(mask).polygon((corners * SUPERSAMPLE).ravel().tolist(), **style)
    masks = [mask]
    if TEXTURES[thing.texture][1]:
        at = (np.arange(fine, dtype=np.float32)[:, None] + 0.5) / SUPERSAMPLE - centre.astype(np.float32)
        x, y = at[:, 0] * np.float32(64 / size), at[:, 1:] * np.float32(64 / size)
        second = _pattern(thing.texture, cos * x + sin * y, cos * y - sin * x)
        masks.append(Image.fromarray(np.asarray(mask) * second.astype(np.uint8)))
    return [np.asarray(mask.reduce(SUPERSAMPLE), np.float32)[..., None] / 255 for mask in masks]


def _paint(random: SceneRandom, canvas: np.ndarray, thing: Thing) -> None:
    """Draw one object on canvas, Float[size, size, 3]; what reaches over the edge is cut off."""
    size, reach = len(canvas), 1.1 * thing.radius * len(canvas) + 1
    left, top = math.floor(thing.x * size - reach), math.floor(thing.y * size - reach)
    side, shade = math.ceil(2 * reach) + 1, random.uniform(0.9, 1.0)
    first = np.array([level * shade + random.uniform(-8, 8) for level in COLOURS[thing.colour]], np.float32)
    second = 0.22 * first + 0.78 * 255 if TEXTURES[thing.texture][1] == "light" else 0.3 * first
    centre = np.array([thing.x * size - left, thing.y * size - top])
    view = canvas[max(top, 0) : top + side, max(left, 0) : left + side]
    inside = slice(max(-top, 0), size - top), slice(max(-left, 0), size - left)
    for cover, colour in zip(_covers(random, thing, centre, side, size), (first, second), strict=False):
        view += (colour - view) * cover[inside]


def scene_jpeg(random: SceneRandom, scene: Scene, size: int) -> bytes:
    """The scene on a light, slightly tinted gradient, with some grain and sometimes a little blur."""
    base, across = random.uniform(165, 238), np.linspace(-1, 1, size, dtype=np.float32)
    tint = np.array([base + random.uniform(-14, 14) for _ in range(3)], np.float32)
    slope_x, slope_y = (across * np.float32(random.uniform(-16, 16)) for _ in range(2))
    canvas = (slope_x + slope_y[:, None])[..., None] + tint
    for thing in scene:
        _paint(random, canvas, thing)
    grain = np.frombuffer(hashlib.shake_128(b"%d" % random.below(2**48)).digest(canvas.size), np.uint8)
    canvas += (grain.reshape(canvas.shape) - np.float32(127.5)) * np.float32(random.uniform(0.015, 0.1))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if random.chance(0.3):
        image = image.filter(ImageFilter.BoxBlur(random.uniform(0.2, 0.5) * size / 64))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _samples(spec: ShapesSpec, split: str, indices: range) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key, and bytes by suffix, of some of a split's samples."""
    scenes, told = _scenes(spec, split), dict(enumerate(range(indices.stop)))
    if split == "train" and spec.shuffle_captions:
        order = SceneRandom(spec, "shuffle").shuffled(range(spec.train))
        told = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: no image keeps its own
    for index in indices:
        captions = _captions(spec, split, told[index], scenes[told[index]])
        name = " + ".join(sorted(thing.class_name for thing in scenes[index]))
        objects = [{key: value for key, value in thing._asdict().items() if key != "group"} for thing in scenes[index]]
        facts: dict[str, Any] = {"name": name, "captions": captions, "objects": objects}
        if split == "zeroshot":
            facts["label"] = index % spec.classes
        image = scene_jpeg(SceneRandom(spec, f"{split} pixels", index), scenes[index], spec.image_size)
        yield f"{split}-{index:06d}", {"jpg": image, "json": json.dumps(facts).encode(), "txt": captions[0].encode()}


def _write_shard(path: Path, spec: ShapesSpec, split: str, indices: range) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in _samples(spec, split, indices):
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")  # its time and its owner are 0
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def write_shapes(directory: Path, spec: ShapesSpec, jobs: int | None = None) -> None:
    """Write `train-{000000..}.tar`, `val-000000.tar`, `zeroshot-000000.tar` and `zeroshot.classes.json`.

    A sample is `KEY.jpg`, `KEY.txt` with a caption and `KEY.json` with `captions` (three phrasings, the txt's first),
    `name` (equal where all objects are of equal kinds), `objects` and, in the zero-shot shard, `label`.

    Args:
        jobs: processes that share the shards; by default this one writes them all. The bytes do not depend on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    totals = {"train": spec.train, "val": spec.val, "zeroshot": spec.classes * spec.per_class}
    tasks = []
    for split, total in totals.items():
        step = SAMPLES_PER_SHARD if split == "train" else total
        cuts = [range(start, min(start + step, total)) for start in range(0, total, step)]
        tasks += [(directory / f"{split}-{n:06d}.tar", spec, split, indices) for n, indices in enumerate(cuts)]
    if jobs is None:
        list(itertools.starmap(_write_shard, tasks))
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # a fork may inherit held locks
            list(pool.map(_write_shard, *zip(*tasks, strict=True)))
    shown = [thing for (thing,) in _scenes(spec, "zeroshot")]
    names, colours = [thing.class_name for thing in shown[: spec.classes]], Counter(thing.colour for thing in shown)
    guess = sum(spec.per_class / colours[thing.colour] for thing in shown) / len(shown)
    classes = {"classnames": names, "templates": TEMPLATES, "baselines": {"colour alone": guess}}
    (directory / "zeroshot.classes.json").write_text(json.dumps(classes, indent=1) + "\n")


def train_shards(spec: ShapesSpec) -> str:
    """The names of the training shards, as a brace pattern."""
    return f"train-{{000000..{(spec.train - 1) // SAMPLES_PER_SHARD:06d}}}.tar"


def ensure_shapes(spec: ShapesSpec, root: Path | None = None) -> Path:
    """The directory of a spec's shards, `shapes-XXXXXXXX`; writes them where it is absent (:func:`ensure_cached`)."""
    identity = json.dumps({"format": FORMAT_VERSION, **asdict(spec)}, sort_keys=True)
    name = f"shapes-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return ensure_cached(name, lambda draft: write_shapes(draft, spec), root)


def ensure_cached(name: str, write: Callable[[Path], object], root: Path | None = None) -> Path:
    """The directory `ROOT/clipscale/NAME`; where it is absent, what ``write`` makes at the path that it is given.

    ROOT is `$XDG_CACHE_HOME` or `~/.cache` unless given. The directory appears whole or not at all; of processes that
    race, each writes a copy, the same as every other's, and the first to finish wins. Raises DataError where it cannot
    be written.
    """
    root = Path(root or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    final = root / "clipscale" / name
    if final.is_dir():
        return final
    for stale in final.parent.glob(f".{final.name}-*"):  # of a killed process; a living one needs seconds
        with suppress(FileNotFoundError):  # it is finished at this moment
            if time.time() - stale.stat().st_mtime > 3600:
                shutil.rmtree(stale, ignore_errors=True)
    draft = final.parent / f".{final.name}-{os.getpid()}-{time.time_ns()}"
    try:
        write(draft)
        os.replace(draft, final)
    except OSError as error:
        if not final.is_dir():  # otherwise another process was first, with the same bytes
            raise DataError(
                f"the built-in data cannot be written to {final.parent}: {error.strerror}; set XDG_CACHE_HOME"
            ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final
