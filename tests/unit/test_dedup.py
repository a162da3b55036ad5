"""Duplicates, exact and near: what is found, what is left, which one stays; and evaluation sets in training data."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from clipscale.apps.data import contamination
from clipscale.apps.data.contamination import best_copies
from clipscale.apps.data.dedup import dedup
from clipscale.apps.data.filter import filter_shards
from clipscale.apps.data.likeness import Pictures, alike, first_of_each, near_pairs, perceive
from clipscale.apps.data.shards import all_samples
from clipscale.errors import ClipscaleError
from tests.shards import shard_files, write_shard


def drawing(number: int, side: int = 96) -> Image.Image:
    """A smooth picture that depends on a number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def marked(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((30, 30, 60, 60), fill="black")
    return image


def seen(image: Image.Image) -> tuple[int, np.ndarray]:
    return perceive(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def same(one: Image.Image, other: Image.Image, distance: int = 4) -> bool:
    (a, x), (b, y) = seen(one), seen(other)
    return (a ^ b).bit_count() <= distance and bool(alike(x, y, distance))


@pytest.mark.parametrize("number", range(20))
def test_what_is_one_picture_and_what_is_not(number: int) -> None:
    image = drawing(number)
    again = [
        Image.open(io.BytesIO(encoded(image, quality=60))),
        image.resize((64, 64)),
        image.resize((200, 150)),
        ImageEnhance.Brightness(image).enhance(1.02),
    ]
    assert all(same(image, other) for other in again)
    red, green, blue = image.split()
    others = [drawing(number + 100), marked(image), Image.merge("RGB", (blue, green, red)), image.transpose(0)]
    assert not any(same(image, other) for other in others)


def test_pictures_in_one_colour() -> None:
    def flat(*colour: int) -> Image.Image:
        return Image.new("RGB", (50, 70), colour)

    assert seen(flat(255, 255, 255))[0] == seen(flat(10, 20, 30))[0] == 0
    assert same(flat(200, 0, 0), flat(202, 0, 0)) and not same(flat(200, 0, 0), flat(0, 0, 200))


@settings(deadline=None)
@given(st.data())
def test_pairs_equal_a_comparison_of_all_with_all(data: st.DataObject) -> None:
    centres = data.draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=4))
    turned = st.lists(st.integers(0, 63), max_size=6).map(lambda bits: sum(1 << bit for bit in set(bits)))
    values = data.draw(
        st.lists(st.tuples(st.sampled_from(centres), turned).map(lambda pair: pair[0] ^ pair[1]), max_size=30)
    )
    distance = data.draw(st.integers(0, 12))
    expected = [
        [a, b]
        for a in range(len(values))
        for b in range(a + 1, len(values))
        if (values[a] ^ values[b]).bit_count() <= distance
    ]
    assert near_pairs(np.array(values, np.uint64), distance).tolist() == expected


def test_many_hashes_are_not_compared_all_with_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, 40_000, dtype=np.uint64)
    hashes[30_000] = hashes[7] ^ np.uint64((1 << 63) + 0b1011)
    hashes[39_999] = hashes[7]
    assert near_pairs(hashes, 4).tolist() == [[7, 30_000], [7, 39_999], [30_000, 39_999]]


def test_the_first_one_stays() -> None:
    """A chain: each is near the one before it, the third is not near the first."""
    hashes = np.array([0, 0b1111, 0b11111111, 1 << 40, 0b11111111], np.uint64)
    exact = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [0, 3]], np.uint64)
    cells = np.zeros((5, 192), np.uint8)
    assert first_of_each(exact, hashes, cells, 4).tolist() == [0, 0, 2, 0, 2]
    cells[1] = 200
    assert first_of_each(exact, hashes, cells, 4).tolist() == [0, 1, 2, 0, 2]
    assert first_of_each(exact[:0], hashes[:0], cells[:0], 4).tolist() == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    one, two = drawing(1), drawing(2)
    write_shard(
        root / "00000.tar",
        [
            ("a", {"jpg": encoded(one), "txt": b"one", "npy": b"\0"}),
            ("b", {"png": encoded(two, "PNG"), "txt": b"two"}),
            ("broken", {"jpg": b"no"}),
        ],
    )
    write_shard(
        root / "00001.tar",
        [
            ("a", {"jpg": encoded(one), "txt": b"one again"}),
            ("c", {"jpg": encoded(two.resize((64, 64)), quality=70), "txt": b"<b>two</b> & smaller"}),
            ("d", {"jpg": encoded(drawing(3)), "txt": b"three"}),
        ],
    )
    write_shard(root / "00002.tar", [("e", {"jpg": encoded(one), "txt": b"once more"})])
    write_shard(
        root / "val.tar",
        [
            ("near", {"jpg": encoded(two, quality=50), "txt": b"<script>"}),
            ("exact", {"jpg": encoded(drawing(3)), "txt": b" THREE "}),
            ("new", {"jpg": encoded(drawing(4)), "txt": b"one"}),
            ("newer", {"jpg": encoded(drawing(5)), "txt": b"nothing like it"}),
            ("blind", {"txt": b"x"}),
        ],
    )
    return root


PATTERN = "{00000..00002}.tar"


def keys(directory: Path) -> list[str]:
    return [member.key for file in shard_files(sorted(directory.glob("*.tar"))) for member in all_samples(file)]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as lines:
        return list(csv.reader(lines))


@pytest.mark.parametrize("jobs", [1, 2])
def test_duplicates_are_dropped(source: Path, tmp_path: Path, jobs: int) -> None:
    account = dedup(PATTERN, tmp_path, [f"data.root={source}"], jobs=jobs)
    assert account is not None
    assert keys(tmp_path) == ["00000.tar/a", "00000.tar/b", "00001.tar/d"]
    assert account.dropped == {"exact_duplicate": 2, "near_duplicate": 1, "undecodable_image": 1}
    assert account.shards == {"00000.tar": 2, "00001.tar": 1, "00002.tar": 0}
    head, *listed = rows(tmp_path / "duplicates.csv")
    assert head == ["key", "kept", "kind", "distance"]
    assert [row[:3] for row in listed] == [
        ["00001.tar/a", "00000.tar/a", "exact"],
        ["00001.tar/c", "00000.tar/b", "near"],
        ["00002.tar/e", "00000.tar/a", "exact"],
    ]
    (first,) = (m for m in all_samples(shard_files([tmp_path / "00000.tar"])[0]) if m.key.endswith("/a"))
    assert first.members == {"jpg": encoded(drawing(1)), "txt": b"one", "npy": b"\0"}
    page = (tmp_path / "duplicates.html").read_text()
    assert "&lt;b&gt;two&lt;/b&gt; &amp; smaller" in page and page.count('<img src="data:image/png') == 2
    before = hashlib.sha256((tmp_path / "00000.tar").read_bytes()).digest()
    dedup(PATTERN, tmp_path, [f"data.root={source}"], jobs=jobs)
    assert hashlib.sha256((tmp_path / "00000.tar").read_bytes()).digest() == before


def test_the_list_of_duplicates_is_one_for_the_filter(source: Path, tmp_path: Path) -> None:
    dedup(PATTERN, tmp_path / "a", [f"data.root={source}"], jobs=1)
    filter_shards(PATTERN, tmp_path / "b", [f"data.root={source}"], drop=tmp_path / "a" / "duplicates.csv", jobs=1)
    assert keys(tmp_path / "b") == ["00000.tar/a", "00000.tar/b", "00000.tar/broken", "00001.tar/d"]


def test_a_distance_of_none_takes_equal_pictures_alone(source: Path, tmp_path: Path) -> None:
    account = dedup(PATTERN, tmp_path, [f"data.root={source}"], distance=0, jobs=1)
    assert account is not None and account.dropped == {"exact_duplicate": 2, "undecodable_image": 1}


@pytest.mark.parametrize("most", [1, 7, 1 << 18])
def test_the_best_copy_is_that_of_a_comparison_of_all_with_all(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many are one picture, such as blanks, and the pairs are more than are looked at in one go."""
    monkeypatch.setattr(contamination, "PAIRS", most)
    monkeypatch.setattr(contamination, "BLOCK", 100)
    draw = np.random.default_rng(0)

    def pictures(count: int) -> Pictures:
        hashes = np.uint64(1) << draw.integers(0, 4, count).astype(np.uint64)
        hashes[: count // 3] = 0
        exact, cells = (
            draw.integers(0, 6, (count, 2)).astype(np.uint64),
            np.repeat(draw.integers(0, 250, (count, 1)), 192, 1),
        )
        none = np.empty(0, np.uint64)
        return Pictures(
            [""] * count, np.arange(count), exact, hashes, cells.astype(np.uint8), none, none.astype(np.int64)
        )

    ours, theirs = pictures(40), pictures(30)
    expected: dict[int, tuple[int, int, int]] = {}
    for image in range(30):
        for other in range(40):
            bits = (int(theirs.hash[image]) ^ int(ours.hash[other])).bit_count()
            same = theirs.exact[image].tolist() == ours.exact[other].tolist()
            if bits <= 1 and (same or alike(theirs.cells[image, None], ours.cells[other, None], 1)[0]):
                copy = (int(not same), bits, other)
                expected[image] = min(expected.get(image, copy), copy)
    assert len(expected) < 30 and {kind for kind, _, _ in expected.values()} == {0, 1}
    assert best_copies(ours, theirs, 1) == expected


def test_contamination(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dedup(PATTERN, tmp_path / "report", [f"data.root={source}"], against="val.tar", jobs=1)
    assert "50.0 % of the evaluation images are in the training data" in capsys.readouterr().out
    assert (tmp_path / "report" / "contaminated.txt").read_text() == "val.tar/near\nval.tar/exact\n"
    assert (tmp_path / "report" / "clean.txt").read_text() == "val.tar/new\nval.tar/newer\n"
    _, *listed = rows(tmp_path / "report" / "contamination.csv")
    assert [row[:3] for row in listed] == [
        ["val.tar/near", "00000.tar/b", "near"],
        ["val.tar/exact", "00001.tar/d", "exact"],
        ["val.tar/exact", "00001.tar/d", "caption"],
        ["val.tar/new", "00000.tar/a", "caption"],
    ]
    page = (tmp_path / "report" / "contamination.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page and page.count("<tr>") == 2
    assert not list((tmp_path / "report").glob("*.tar"))
    filter_shards(
        "val.tar", tmp_path / "clean", [f"data.root={source}"], keep=tmp_path / "report" / "clean.txt", jobs=1
    )
    assert keys(tmp_path / "clean") == ["val.tar/new", "val.tar/newer"]


def test_mistakes_are_told(source: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "blind.tar", [("a", {"txt": b"x"})])
    for match, options in (
        ("--distance 17: 0 to 16", {"distance": 17}),
        ("1 of 1 shards do not exist", {"against": "nowhere.tar"}),
        ("none of 1 samples has an image", {"against": str(tmp_path / "blind.tar")}),
    ):
        with pytest.raises(ClipscaleError, match=match):
            dedup(PATTERN, tmp_path / "out", [f"data.root={source}"], jobs=1, **options)


def test_the_real_drawings(shared_data: Path, tmp_path: Path) -> None:
    """Flat drawings: flags that are one picture are found; what differs in colour, as skin does, is left."""
    account = dedup("emoji-train-{000000..000003}.tar", tmp_path, [f"data.root={shared_data}"], jobs=2)
    assert account is not None
    assert 0 < account.dropped.total() < 0.02 * account.read
