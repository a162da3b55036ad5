"""A cap per concept: which concepts a caption holds, which samples a concept draws, and that all are accounted for."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.apps.data.balance import LimitTask, balance, find_limits
from clipscale.apps.data.concepts import Concepts
from clipscale.apps.data.shards import all_samples
from clipscale.data.order import mix
from clipscale.errors import ClipscaleError
from tests.shards import sample, shard_files, write_shard


@pytest.mark.parametrize(
    ("concept", "caption", "found"),
    [
        ("cat", "A Cat.", True),
        ("cat", "concatenate", False),
        ("cat", "cats", False),
        ("hot dog", "two HOT  dogs", False),
        ("hot dog", "a hot\ndog!", True),
        ("hot dog", "hot, not dog", False),
        ("T-shirt", "a t shirt", True),
        ("Straße", "eine STRASSE", True),
        ("ｆｕｌｌ", "full", True),
        ("9", "a 9", True),
        ("a b c d e f g", "x a b c d e f g y", True),
    ],
)
def test_concepts_are_whole_words(concept: str, caption: str, found: bool) -> None:
    assert Concepts([concept, "nothing of this"]).find(caption) == ({concept} if found else set())


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3), max_size=9), st.lists(st.sampled_from("abcd"))
)
def test_concepts_equal_a_search_of_substrings(concepts: list[list[str]], words: list[str]) -> None:
    names = [" ".join(concept) for concept in concepts]
    text = " ".join(words)
    assert Concepts(names).find(text) == {name for name in names if f" {name} " in f" {text} "}


def test_many_concepts_cost_a_caption_nothing() -> None:
    concepts = Concepts([f"word{i} word{i + 1}" for i in range(200_000)])
    assert concepts.find("a word7 word8 word9 b") == {"word7 word8", "word8 word9"}


LABELS = ["common"] * 40 + ["middle"] * 10 + ["rare"] * 3


def write(root: Path, labels: list[Any], cuts: list[int]) -> None:
    """Shards with one json each; a label of None is left out."""
    root.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(labels)), key=lambda i: mix(99, i))
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(labels)], strict=True)):
        samples = []
        for i in order[start:stop]:
            fields = {} if labels[i] is None else {"label": labels[i]}
            samples.append((f"{i:04d}", sample(i) | {"json": json.dumps(fields).encode()}))
        write_shard(root / f"{number:05d}.tar", samples)


def kept(directory: Path) -> list[str]:
    files = shard_files(sorted(directory.glob("*.tar")))
    return [member.key.partition("/")[2] for file in files for member in all_samples(file)]


def run(root: Path, output: Path, **options: Any) -> Any:
    return balance(
        "{00000..00002}.tar", output, [f"data.root={root}"], **{"jobs": 1, "label_key": "json:label", **options}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write(root, [*LABELS, None, "", ["rare", "common"], 7], [20, 21])
    return root


def table(output: Path) -> dict[str, tuple[int, int]]:
    with (output / "concepts.csv").open() as lines:
        return {row["concept"]: (int(row["before"]), int(row["after"])) for row in csv.DictReader(lines)}


def test_each_concept_draws_the_cap(source: Path, tmp_path: Path) -> None:
    account = run(source, tmp_path, per_concept=8, shard_samples=7)
    assert account.read == 57 and account.dropped["no_label"] == 1 and account.dropped["no_concept"] == 1
    counts = table(tmp_path)
    assert list(counts) == ["common", "middle", "rare", "7"]
    assert counts["middle"] == (10, 8) and counts["rare"] == (4, 4) and counts["7"] == (1, 1)
    assert counts["common"][0] == 41 and counts["common"][1] in (8, 9)  # the sample of two concepts is rare's anyhow
    assert account.kept == len(kept(tmp_path)) == 8 + counts["common"][1] + 4 - 1 + 1
    assert [*account.shards.values()][:-1] == [7] * ((account.kept - 1) // 7)
    order = kept(source)
    assert kept(tmp_path) == [key for key in order if key in set(kept(tmp_path))]


def test_the_draw_is_the_seeds_and_nothing_elses(source: Path, tmp_path: Path) -> None:
    for name, options in (("a", {}), ("b", {"jobs": 2}), ("c", {"seed": 1})):
        run(source, tmp_path / name, per_concept=8, **options)

    def digests(name: str) -> list[bytes]:
        return [hashlib.sha256(path.read_bytes()).digest() for path in sorted((tmp_path / name).glob("*.tar"))]

    assert digests("a") == digests("b") and kept(tmp_path / "a") != kept(tmp_path / "c")
    run(source, tmp_path / "more", per_concept=12)
    assert set(kept(tmp_path / "a")) <= set(kept(tmp_path / "more")), "a higher cap adds to what a lower one keeps"


def test_captions(tmp_path: Path) -> None:
    captions = ["a red car", "a red bus", "the RED bus", "a blue car", "nothing", "red"]
    content = [(f"{i}", {"jpg": b"", "txt": text.encode()}) for i, text in enumerate(captions)]
    write_shard(tmp_path / "00000.tar", [*content, ("mute", {"jpg": b""})])
    (tmp_path / "concepts.txt").write_text("Red\nbus\ncar\n\nred\nzebra\n!!\n")
    account = balance(
        "00000.tar",
        tmp_path / "out",
        [f"data.root={tmp_path}"],
        per_concept=1,
        concepts=tmp_path / "concepts.txt",
        jobs=1,
    )
    counts = table(tmp_path / "out")
    assert {name: before for name, (before, _) in counts.items()} == {"Red": 4, "bus": 2, "car": 2, "zebra": 0}
    assert all(after >= 1 for name, (before, after) in counts.items() if before)
    assert account.dropped["no_concept"] == 1 and account.dropped["no_caption"] == 1
    assert account.kept <= 3


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_limits_are_the_smallest_hashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The search by digits gives what sorting gives, however close the hashes lie."""
    root = tmp_path_factory.mktemp("limits")
    cap = data.draw(st.integers(1, 6))
    narrow = st.integers(0, 40) | st.integers(0, (1 << 64) - 1) | st.integers((1 << 64) - 9, (1 << 64) - 1)
    pairs = data.draw(st.lists(st.tuples(st.sampled_from("abc"), narrow), max_size=40, unique=True))
    paths = []
    for shard in range(2):
        part = pairs[shard::2]
        names = sorted({name for name, _ in part})
        paths.append(root / f"{shard}.npz")
        np.savez(
            paths[-1],
            names=np.frombuffer(json.dumps(names).encode(), np.uint8),
            concept=np.array([names.index(name) for name, _ in part], np.int64),
            sample=np.arange(len(part)),
            hash=np.array([value for _, value in part], np.uint64),
        )
    find_limits(LimitTask(tuple(paths), (), cap, root / "limits.npz"))
    with np.load(root / "limits.npz") as found:
        limits = dict(zip(json.loads(found["names"].tobytes()), found["limits"].tolist(), strict=True))
    for name, count in Counter(name for name, _ in pairs).items():
        drawn = sorted(value for other, value in pairs if other == name)
        assert [value for value in drawn if value <= limits[name]] == drawn[:cap], (name, count)


def test_mistakes_are_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("!!\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for match, options in (
        ("--per-concept 0: at least 1", {"per_concept": 0}),
        ("one of them", {"label_key": None}),
        ("one of them", {"concepts": tmp_path / "none.txt"}),
        ("No such file", {"label_key": None, "concepts": tmp_path / "absent"}),
        ("holds no concept", {"label_key": None, "concepts": tmp_path / "none.txt"}),
        ("is not UTF-8", {"label_key": None, "concepts": tmp_path / "latin.txt"}),
        ("no sample is left", {"label_key": "json:other"}),
    ):
        with pytest.raises(ClipscaleError, match=match):
            run(source, tmp_path / "out", **options)
