"""A small model of open_clip's and small data sets of every kind, for what asks models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tests.shards import WORDS, jpeg, write_shard

SIDE = 64  # of the model's images: pictures of that size are not resized
COUNT, CLASSES = 42, 6
LABELS = ("red", "old", "wet")


def open_clip_directory(path: Path, model: Any, **images: Any) -> Path:
    """As open_clip writes its model: ``tests.peers.small("tiny_quickgelu")[1]``."""
    path.mkdir()
    sizes = dict(layers=4, width=128, head_width=32, patch_size=16, image_size=SIDE)
    text = dict(context_length=32, vocab_size=49408, width=128, heads=4, layers=2)
    told = {"embed_dim": 128, "quick_gelu": True, "vision_cfg": sizes, "text_cfg": text}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": told, "preprocess_cfg": images}))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


def names() -> list[str]:
    """Of the classes."""
    return [f"{WORDS[i]} thing" for i in range(CLASSES)]


def captions(number: int) -> list[str]:
    """One to three of an image, no two the same."""
    return [f"{WORDS[number % 10]} {WORDS[number // 10]} {WORDS[extra]}" for extra in range(1 + number % 3)]


def label(number: int) -> int:
    """Class of an image; some classes have more."""
    return (number * number) % 17 % CLASSES


def marks(number: int) -> list[float]:
    """Of LABELS: 1, 0 or unknown."""
    return [number % 2, (number // 3) % 2, float("nan") if number % 5 == 0 else (number // 7) % 2]


def write_sets(root: Path) -> Path:
    """``benchmark`` (CLIP_benchmark's layout), ``pairs.tar``, ``labels.csv`` with its pictures, ``videos``."""
    split = root / "benchmark" / "test"
    split.mkdir(parents=True)
    images = [jpeg(number, SIDE) for number in range(COUNT)]
    for shard, numbers in enumerate((range(20), range(20, COUNT))):
        samples = []
        for n in numbers:
            group = io.BytesIO()
            np.save(group, np.array([n % 3, 0]))
            members = {"webp": images[n], "cls": str(label(n)).encode(), "npy": group.getvalue()}
            samples.append((f"s{n:04d}", members))
        write_shard(split / f"{shard}.tar", samples)
    (split / "nshards.txt").write_text("2")
    (root / "benchmark" / "classnames.txt").write_text("\n".join(names()))
    (root / "benchmark" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of the {c}.\n")
    pairs = [(f"p{n}", {"jpg": images[n], "txt": "\n".join(captions(n)).encode()}) for n in range(COUNT)]
    write_shard(root / "pairs.tar", pairs)
    rows = ["image," + ",".join(LABELS)]
    for n in range(COUNT):
        (root / f"{n}.jpg").write_bytes(images[n])
        rows.append(f"{n}.jpg," + ",".join("" if np.isnan(mark) else str(int(mark)) for mark in marks(n)))
    (root / "labels.csv").write_text("\n".join(rows))
    for n in range(24):
        frame = root / "videos" / names()[n % 2].replace(" ", "_") / f"clip{n // 4}" / f"{n}.jpg"
        frame.parent.mkdir(parents=True, exist_ok=True)
        frame.write_bytes(images[n])
    return root


def write_folder(root: Path) -> None:
    """Images in folders that are their classes."""
    for number in range(12):
        path = root / f"{WORDS[number % 3]}_photo" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, SIDE))
