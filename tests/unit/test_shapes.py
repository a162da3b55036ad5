"""The built-in scenes: deterministic, compositional, described truthfully, and cached whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from clipscale.data import shapes
from clipscale.data.shapes import ShapesSpec, ensure_shapes, write_shapes
from clipscale.errors import ConfigError, DataError

SPEC = ShapesSpec(train=1030, val=500, classes=240, per_class=1, image_size=32)
SMALL = ShapesSpec(train=24, val=8, classes=5, per_class=3, image_size=32)
SHARDS = ("train-000000.tar", "train-000001.tar", "val-000000.tar", "zeroshot-000000.tar")


def read(path: Path) -> list[dict[str, Any]]:
    """A shard's samples as webdataset sees them, the JSON decoded."""
    return [s | {"json": json.loads(s["json"])} for s in webdataset.WebDataset(str(path), shardshuffle=False)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(SPEC, tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def samples(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples by split."""
    shards = {name: read(directory / name) for name in SHARDS}
    train = shards["train-000000.tar"] + shards["train-000001.tar"]
    return {"train": train, "val": shards["val-000000.tar"], "zeroshot": shards["zeroshot-000000.tar"]}


def composition(thing: dict[str, Any]) -> tuple[str, str, str]:
    return thing["colour"], thing["shape"], thing["texture"]


def test_equal_specs_give_equal_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    for name, jobs in (("one", None), ("again", None), ("two", 2)):
        write_shapes(tmp_path / name, SMALL, jobs)
    assert contents(tmp_path / "one") == contents(tmp_path / "again") == contents(tmp_path / "two")
    write_shapes(tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    assert not set(contents(tmp_path / "one").values()) & set(contents(tmp_path / "other").values())


def test_the_scenes_are_those_of_this_format_version(tmp_path: Path) -> None:
    """A change here changes everybody's data: raise FORMAT_VERSION with the digest, so that no cache mixes the two."""
    write_shapes(tmp_path, SMALL)
    told = [sample["json"] for name in SHARDS if (tmp_path / name).exists() for sample in read(tmp_path / name)]
    assert (shapes.FORMAT_VERSION, hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]) == (
        2,
        "91ac165c624ddda8",
    )


def test_webdataset_reads_every_sample(directory: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    assert sorted(contents(directory)) == sorted([*SHARDS, "zeroshot.classes.json"])
    assert {split: len(rows) for split, rows in samples.items()} == {"train": 1030, "val": 500, "zeroshot": 240}
    assert len(read(directory / SHARDS[0])) == shapes.SAMPLES_PER_SHARD
    rows = list(webdataset.WebDataset(str(directory / SHARDS[1]), shardshuffle=False).decode("pil"))
    assert [row["__key__"] for row in rows] == [f"train-{index:06d}" for index in range(1024, 1030)]
    for row in rows:
        assert row["jpg"].size == (32, 32) and row["txt"] == row["json"]["captions"][0]


def test_held_out_compositions_are_never_trained_on(samples: dict[str, list[dict[str, Any]]]) -> None:
    held = {composition(thing) for sample in samples["zeroshot"] for thing in sample["json"]["objects"]}
    trained = [composition(thing) for sample in samples["train"] for thing in sample["json"]["objects"]]
    assert len(held) == 120 and held.isdisjoint(trained)
    for attribute, known in enumerate((shapes.COLOURS, shapes.SHAPES, shapes.TEXTURES)):
        assert {c[attribute] for c in trained} == {c[attribute] for c in held} == set(known)
    for sample in samples["val"]:
        assert held & {composition(thing) for thing in sample["json"]["objects"]}


MEANINGS = {synonym: word for word, synonym in shapes.SYNONYMS.items()}
MEANINGS |= {word: word for words in (shapes.COLOURS, shapes.SHAPES, shapes.TEXTURES, shapes.ALONE) for word in words}
MEANINGS |= {following: texture for texture, (following, _) in shapes.TEXTURES.items()}
NOUNS = {word: shape for word, shape in MEANINGS.items() if shape in shapes.SHAPES}
NOUNS |= {word + ("es" if word.endswith("s") else "s"): shape for word, shape in NOUNS.items()}
FOLLOWING = "|".join(following for following, _ in shapes.TEXTURES.values())
PHRASE = re.compile(rf"\b(an?|two|three) ((?:\w+ )*?)({'|'.join(NOUNS)})\b(?: ({FOLLOWING}))?")


def parse(caption: str) -> list[tuple[int, set[str]]]:
    """The noun phrases of a caption: how many, and the canonical attributes that are told."""
    found = []
    for number, words, noun, following in PHRASE.findall(re.sub(r"^an? (photo|picture|image) of ", "", caption)):
        told = {MEANINGS[word] for word in [*words.split(), *filter(None, [following])]} | {NOUNS[noun]}
        assert len(told) == len(words.split()) + 1 + bool(following), f"an attribute is told twice: {caption}"
        found.append(({"two": 2, "three": 3}.get(number, 1), told))
    return found


def attributes(thing: dict[str, Any]) -> set[str]:
    return {thing[key] for key in ("colour", "shape", "texture", "size")}


IS = {
    "left": lambda a, b: a["x"] < b["x"] - 0.2,
    "right": lambda a, b: a["x"] > b["x"] + 0.2,
    "above": lambda a, b: a["y"] < b["y"] - 0.2,
    "over": lambda a, b: a["y"] < b["y"] - 0.2,
    "below": lambda a, b: a["y"] > b["y"] + 0.2,
    "under": lambda a, b: a["y"] > b["y"] + 0.2,
}


@pytest.mark.parametrize("split", ["train", "val", "zeroshot"])
def test_captions_are_true(samples: dict[str, list[dict[str, Any]]], split: str) -> None:
    for sample in samples[split]:
        things = sample["json"]["objects"]
        for caption in sample["json"]["captions"]:
            phrases = parse(caption)
            assert sum(count for count, _ in phrases) == len(things), caption
            for count, told in phrases:
                assert sum(told <= attributes(thing) for thing in things) >= count, caption
                assert split == "train" or len(told) == 4, f"something is left out: {caption}"
            for word in set(IS) & set(caption.split()):
                (_, one), (_, other) = phrases
                pairs = ((a, b) for a in things for b in things if one <= attributes(a) and other <= attributes(b))
                assert any(IS[word](a, b) for a, b in pairs), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", caption) and len(caption.split()) <= 24, caption


def test_objects_do_not_overlap_and_sizes_do_not_meet(samples: dict[str, list[dict[str, Any]]]) -> None:
    radii: dict[str, list[float]] = {"small": [], "large": []}
    for sample in samples["train"]:
        things = sample["json"]["objects"]
        for i, thing in enumerate(things):
            radii[thing["size"]].append(thing["radius"])
            for other in things[:i]:
                apart = max(abs(thing["x"] - other["x"]), abs(thing["y"] - other["y"]))
                assert apart >= thing["radius"] + other["radius"] - 1e-3
    assert max(radii["small"]) < min(radii["large"])


def test_captions_vary_and_each_is_true_of_one_validation_image(samples: dict[str, list[dict[str, Any]]]) -> None:
    for rows in samples.values():
        assert all(len(set(sample["json"]["captions"])) == 3 for sample in rows)
        assert all(sample["txt"].decode() == sample["json"]["captions"][0] for sample in rows)
    val = [sample["json"] for sample in samples["val"]]
    assert len({row["name"] for row in val}) == len({row["captions"][0] for row in val}) == len(val)
    kinds = {tuple(sorted(composition(thing) for thing in row["objects"])) for row in val}
    assert len(kinds) == len(val)
    assert {len(row["objects"]) for row in val} == {1, 2, 3}


def test_classes_file(directory: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    classes = json.loads((directory / "zeroshot.classes.json").read_text())
    names = classes["classnames"]
    assert len(set(names)) == SPEC.classes and all("{}" in template for template in classes["templates"])
    assert not any(re.search(r"\ba [aeiou]", t.format(name)) for t in classes["templates"] for name in names)
    for sample in samples["zeroshot"]:
        (thing,) = sample["json"]["objects"]
        assert attributes(thing) == set(names[sample["json"]["label"]].split())
    assert Counter(sample["json"]["label"] for sample in samples["zeroshot"]) == dict.fromkeys(range(240), 1)
    colours = Counter(name.split()[2] for name in names)
    chances = [1 / colours[sample["json"]["objects"][0]["colour"]] for sample in samples["zeroshot"]]
    assert classes["baselines"] == {"colour alone": pytest.approx(sum(chances) / len(chances))}
    assert set(colours.values()) == {240 // len(shapes.COLOURS)}


def test_an_odd_number_of_classes(tmp_path: Path) -> None:
    write_shapes(tmp_path, SMALL)
    labels = [sample["json"]["label"] for sample in read(tmp_path / "zeroshot-000000.tar")]
    assert Counter(labels) == dict.fromkeys(range(5), 3)


def test_shuffled_captions_change_the_training_captions_only(tmp_path: Path) -> None:
    write_shapes(tmp_path / "plain", SMALL)
    write_shapes(tmp_path / "control", dataclasses.replace(SMALL, shuffle_captions=True))
    plain, control = contents(tmp_path / "plain"), contents(tmp_path / "control")
    assert {name for name in plain if plain[name] != control[name]} == {SHARDS[0]}
    before, after = read(tmp_path / "plain" / SHARDS[0]), read(tmp_path / "control" / SHARDS[0])
    for one, other in zip(before, after, strict=True):
        assert one["jpg"] == other["jpg"] and one["json"]["objects"] == other["json"]["objects"]
        assert one["json"]["captions"] != other["json"]["captions"]
        assert other["txt"].decode() == other["json"]["captions"][0]
    told = [sorted(tuple(sample["json"]["captions"]) for sample in rows) for rows in (before, after)]
    assert told[0] == told[1]


def test_images_of_a_scene_are_not_blank_nor_alike(samples: dict[str, list[dict[str, Any]]]) -> None:
    images = [Image.open(io.BytesIO(sample["jpg"])) for sample in samples["train"][:64]]
    assert len({image.tobytes() for image in images}) == 64
    assert all(max(high - low for low, high in image.getextrema()) > 40 for image in images)


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"classes": 385}, {"val": 0}, {"image_size": 8}, {"train": 1}])
def test_a_number_out_of_range_is_named(wrong: dict[str, int]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"data\.shapes\.{key}={value}: give a number from "):
        ShapesSpec(**wrong)


def start(spec: ShapesSpec, root: Path) -> subprocess.Popen[str]:
    """A process that ensures the shapes and prints where they are, without torch."""
    code = (
        "import sys; from pathlib import Path; from clipscale.data.shapes import ShapesSpec, ensure_shapes\n"
        f"print(ensure_shapes({spec!r}, Path({str(root)!r}))); assert 'torch' not in sys.modules"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_cached_copy_is_used_again(tmp_path: Path, caches: Path) -> None:
    first = ensure_shapes(SMALL, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert ensure_shapes(SMALL, tmp_path) == first and list(first.parent.iterdir()) == [first]
    assert times == {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert ensure_shapes(dataclasses.replace(SMALL, val=9), tmp_path) != first
    assert ensure_shapes(SMALL).parent == caches / "clipscale"


def test_processes_that_race_agree(tmp_path: Path) -> None:
    racers = [start(SMALL, tmp_path) for _ in range(3)]
    answers = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    (final,) = (tmp_path / "clipscale").iterdir()
    assert answers == {str(final)}
    write_shapes(tmp_path / "alone", SMALL)
    assert contents(final) == contents(tmp_path / "alone")


def test_a_killed_process_leaves_nothing_that_counts(tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, train=1200)
    process = start(spec, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("clipscale/.shapes-*/train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (draft,) = (tmp_path / "clipscale").iterdir()
    os.utime(draft, (0, 0))
    final = ensure_shapes(spec, tmp_path)
    assert list((tmp_path / "clipscale").iterdir()) == [final] and draft != final
    assert len(read(final / SHARDS[0])) + len(read(final / SHARDS[1])) == 1200


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "clipscale").write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"cannot be written to .*; set XDG_CACHE_HOME"):
        ensure_shapes(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clipscale"]
