"""`clipscale data stats`: numbers equal those counted by hand, whatever the number of processes; the page is safe."""

from __future__ import annotations

import io
import json
import random
import statistics
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipscale.apps.data.stats import stats
from clipscale.apps.data.stats_plots import edges, is_wide
from clipscale.apps.data.summaries import Draw, Spread, Top
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError, DataError
from tests.shards import sample, write_shard, write_shards

PLOTS = ("captions.png", "images.png", "shards.png")


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 90)).save(buffer, kind)
    return buffer.getvalue()


def found(output: Path) -> dict[str, Any]:
    return json.loads((output / "stats.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of pictures of many sizes."""
    directory = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for shard, count in enumerate((40, 7, 23)):
        samples = []
        for number in range(count):
            fields = {"label": number % 3, "score": rng.random(), "tags": ["x"] * (number % 4), "note": None}
            members = {
                "png": picture(rng.randint(1, 300), rng.randint(1, 60)),
                "txt": " ".join(rng.choices(["red", "round", "thing"], k=rng.randint(1, 90))).encode(),
                "json": json.dumps(fields if number % 2 else {"label": number % 3}).encode(),
            }
            samples.append((f"{shard}-{number}", members))
        write_shard(directory / f"{shard}.tar", samples)
    write_shard(directory / "3.tar", [("bad", {"txt": b"no image"}), ("worse", {"png": b"?", "txt": b"words"})])
    return directory


def contents(data: Path) -> list[dict[str, bytes]]:
    import tarfile

    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(data.glob("?.tar"))[:3]:
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return list(samples.values())


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats")
    stats("{0..3}.tar", directory, [f"data.root={data}"], jobs=1)
    return directory


def test_the_numbers_are_those_counted_by_hand(data: Path, output: Path) -> None:
    document, samples = found(output), contents(data)
    captions = [sample["txt"].decode() for sample in samples]
    assert (document["samples"], document["usable"]) == (72, 70)
    assert document["unusable"] == {"no_image": 1, "undecodable_image": 1}
    words = [len(caption.split()) for caption in captions]
    told = document["captions"]["words"]
    assert (told["count"], told["min"], told["max"]) == (70, min(words), max(words))
    assert told["median"] == statistics.median_low(words) and told["mean"] == pytest.approx(statistics.mean(words))
    tokens = [len(Tokenizer("clip", 1000).encode(caption)[0]) for caption in captions]
    assert document["captions"]["cut"] == sum(count > 77 for count in tokens) > 0
    assert document["captions"]["tokens"]["max"] == max(tokens)
    assert document["captions"]["distinct"] == len(set(captions))
    assert document["captions"]["frequent_words"][0] == list(
        Counter(word for caption in captions for word in set(caption.split())).most_common(1)[0]
    )
    widths = [Image.open(io.BytesIO(sample["png"])).width for sample in samples]
    assert document["images"]["width"]["median"] == statistics.median_low(widths)
    assert document["images"]["formats"] == {"PNG": 70} and document["images"]["modes"] == {"RGB": 70}
    assert document["shards"]["samples_per_shard"]["max"] == 40 and document["shards"]["count"] == 4
    assert document["bytes"] == sum(path.stat().st_size for path in data.glob("?.tar"))


def test_the_fields_of_json(data: Path, output: Path) -> None:
    fields = found(output)["fields"]
    values = [json.loads(sample["json"]) for sample in contents(data)]
    counted = Counter(str(value["label"]) for value in values)
    assert fields["label"]["present"] == 70 and fields["label"]["distinct"] == 3
    assert dict(fields["label"]["frequent_values"]) == counted
    assert fields["score"]["number"]["max"] == pytest.approx(max(value.get("score", 0) for value in values), abs=1e-5)
    assert fields["tags"]["length"]["max"] == 3 and fields["note"]["types"] == {"null": fields["score"]["present"]}


def test_every_number_of_processes_says_the_same(data: Path, output: Path, tmp_path: Path) -> None:
    stats("{0..3}.tar", tmp_path, [f"data.root={data}"], jobs=2)
    for name in ("stats.json", "index.html", *PLOTS, "fields.png"):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes(), name


def test_taken_up_again_it_reads_the_rest(data: Path, output: Path) -> None:
    before = (output / "index.html").read_bytes()
    next((output / ".clipscale" / "stats" / "samples").glob("000001*")).unlink()
    (output / ".clipscale" / "stats" / "parts" / "000001.json").unlink()
    stats("{0..3}.tar", output, [f"data.root={data}"], jobs=1)
    assert (output / "index.html").read_bytes() == before


def test_the_draw_is_random_and_not_by_order(output: Path) -> None:
    page = (output / "index.html").read_text()
    sheet = page[page.index('id="samples"') : page.index('id="captions"')]
    assert sheet.count('class="card"') == 48
    drawn = Counter(int(key[0]) for key in sheet.split(".tar/")[1:])
    assert all(drawn[shard] > 0 for shard in range(3)), "of every shard"


class Page(HTMLParser):
    """Tags of a page, and what its attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]


def test_nothing_of_the_data_becomes_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)> & \u202e \ud800 [red]:smile:'
    members = sample(1) | {"json": json.dumps({"caption": evil, evil: evil, "n$^": 1.5}).encode()}
    keys = [f"{i}<b onclick=x>" for i in range(30)]
    good = [(key, members | {"json": json.dumps({"caption": evil, evil: evil, "n$^": 2.5 * i}).encode()})
            for i, key in enumerate(keys)]  # fmt: skip
    write_shard(tmp_path / "<i>.tar", [*good, ("<bad>", {"jpg": b"", "json": members["json"]})])
    stats(str(tmp_path / "<i>.tar"), tmp_path / "out", ["data.caption_key=json:caption"], jobs=1)
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "i", "iframe", "link"} & set(page.tags)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert page.tags.count("img") > 30
    assert "&lt;script&gt;" in text and "default-src 'none'" in text


def test_odd_data_is_described(shared_data: Path, tmp_path: Path) -> None:
    """Bombs, broken EXIF, 100 kB captions, one-pixel images, archives cut short."""
    names = "{images-000000,captions-000000,struct-truncated-midmember,struct-zero-byte,struct-pax-longname}.tar"
    stats(names, tmp_path, [f"data.root={shared_data}/dirty"], jobs=1)
    document = found(tmp_path)
    assert document["captions"]["characters"]["max"] == 100_000 and document["images"]["width"]["min"] == 1
    assert set(document["shards"]["damaged"]) == {"struct-truncated-midmember.tar", "struct-zero-byte.tar"}
    assert document["unusable"]["too_many_pixels"] == 2
    for name in PLOTS:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"


def test_mistakes(tmp_path: Path) -> None:
    path = str(write_shards(tmp_path, [3])[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="no_nope 3"):
        stats(path, tmp_path / "out", ["data.caption_key=json:nope"], jobs=1)
    with pytest.raises(DataError, match="do not exist"):
        stats(str(tmp_path / "none.tar"), tmp_path / "out", [])
    with pytest.raises(ConfigError, match=r"tokenizer\.name=klip"):
        stats(path, tmp_path / "out", ["tokenizer.name=klip"])
    with pytest.raises(DataError, match="cannot be written"):
        stats(path, tmp_path / "file", [], jobs=1)


def test_a_table_is_one_shard(tmp_path: Path) -> None:
    """Though training takes it in parts."""
    (tmp_path / "a.png").write_bytes(picture(32, 32))
    table = tmp_path / "table.csv"
    table.write_text("filepath,caption\n" + "".join(f"a.png,a picture {number}\n" for number in range(100)))
    stats(str(table), tmp_path / "out", [], jobs=1)
    document = found(tmp_path / "out")
    assert document["samples"] == 100 and document["bytes"] == table.stat().st_size
    assert document["shards"]["count"] == 1 and document["shards"]["samples_per_shard"]["max"] == 100


def test_the_first_node_alone_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_shards(tmp_path, [4])[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        stats(str(path), tmp_path / "out", [], jobs=1, as_json=True)
        assert (tmp_path / "out" / "index.html").exists() == bool(capsys.readouterr().out) == (rank == "0")


def test_json_is_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_shards(tmp_path, [3])[0])
    stats(path, tmp_path / "out", [], jobs=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == found(tmp_path / "out")


VALUES = st.lists(st.integers(0, 10**7) | st.floats(1e-6, 1e9), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES)
def test_distributions_add_up(left: list[float], right: list[float]) -> None:
    parts, whole = (Spread(), Spread()), Spread()
    for part, values in zip(parts, (left, right), strict=True):
        for value in values:
            part.add(value)
            whole.add(value)
    merged = Spread.from_json(json.loads(json.dumps(parts[0].to_json())))
    merged.merge(Spread.from_json(json.loads(json.dumps(parts[1].to_json()))))
    assert merged.counts == whole.counts and (merged.low, merged.high) == (whole.low, whole.high)
    middle = sorted(left + right)[(len(left + right) - 1) // 2]
    assert whole.quantile(0.5) == pytest.approx(middle, rel=6e-3)
    for logarithmic in {False, is_wide(whole)}:
        bins = edges(whole, logarithmic)
        assert all(bins[0] <= value <= bins[-1] for value in whole.counts) and (bins[1:] > bins[:-1]).all()


def test_the_most_frequent_survive_pruning() -> None:
    rng = random.Random(1)
    texts = [f"rare {rng.random()}" for _ in range(3000)] + ["often"] * 400 + ["sometimes"] * 90
    rng.shuffle(texts)
    total = Top(20)
    for start in range(0, len(texts), 500):
        part = Top(20)
        part.add(texts[start : start + 500])
        total.merge(Top.from_json(json.loads(json.dumps(part.to_json()))))
    (first, most), (second, next_most) = total.best(2)
    assert (first, second) == ("often", "sometimes")
    assert 400 - total.lost <= most <= 400 and 90 - total.lost <= next_most <= 90


def test_a_draw_does_not_depend_on_how_the_work_was_shared() -> None:
    entries = [(rank % 5, hash((rank, "x")) & 0xFFFF, 0, rank) for rank in range(500)]
    draws = []
    for parts in (1, 3, 50):
        whole = Draw(7)
        for i in range(parts):
            part = Draw(7)
            for entry in entries[i::parts]:
                part.add(*entry)
            whole.merge(Draw.from_json(json.loads(json.dumps(part.to_json()))))
        draws.append(list(whole))
    assert draws[0] == draws[1] == draws[2] and len(draws[0]) == 7
