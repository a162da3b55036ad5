"""Index files and hints: what is known of shards before they are read, and what happens when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipscale.apps.data.index import index
from clipscale.apps.data.shards import named_shards
from clipscale.config.data import Storage
from clipscale.data import manifest
from clipscale.data.index import pack_offsets, sample_key, unpack_offsets, walk
from clipscale.data.io import ShardStore
from clipscale.data.manifest import ShardFile, expand_shards, summarise
from clipscale.data.stream import read_samples
from clipscale.errors import ConfigError, DataError
from tests.faults import Fault, FaultServer
from tests.shards import STORE, sample, write_shard, write_shards


def _expand(pattern: str, root: Path, **options: str) -> list[ShardFile]:
    return expand_shards(pattern, str(root), "data.train.shards", ShardStore(STORE.config), **options)


def _keys(file: ShardFile) -> list[tuple[str, str]]:
    return [(one.key, one.problem) for one in read_samples(file, 0, file.summary.samples)]


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=20))
def test_offsets_survive_packing(blocks: list[int]) -> None:
    offsets = np.cumsum(blocks) * 512
    np.testing.assert_array_equal(unpack_offsets(pack_offsets(offsets)), offsets)


def test_an_index_replaces_the_walk(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 5, 2])
    walked = _expand("{00000..00002}.tar", tmp_path)
    index("{00000..00002}.tar", [f"data.root={tmp_path}"], jobs=1)
    indexed = _expand("{00000..00002}.tar", tmp_path)
    assert all(file.declared is not None and file.declared.sha256 for file in indexed)
    assert [s.samples for s in summarise(indexed)] == [s.samples for s in summarise(walked)] == [3, 5, 2]
    for one, other in zip(walked, indexed, strict=True):
        np.testing.assert_array_equal(one.index.offsets, other.index.offsets)
        assert _keys(one) == _keys(other)
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 5, "00002.tar": 2}


def test_an_index_elsewhere(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [3])
    index("00000.tar", [f"data.root={tmp_path / 'data'}"], output=tmp_path / "index", jobs=1)
    assert not (tmp_path / "data" / "shards.json").exists()
    found = _expand("00000.tar", tmp_path / "data", index=str(tmp_path / "index" / "shards.json"))
    assert found[0].declared is not None and len(_keys(found[0])) == 3
    with pytest.raises(DataError, match=r"data\.index=.*does not exist.*clipscale data index"):
        _expand("00000.tar", tmp_path / "data", index=str(tmp_path / "nowhere.json"))


def test_an_index_tells_damage_and_bad_keys(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [("0", sample(0)), ("1", {"txt": b"no image"}), ("2", sample(2))])
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-9])
    index("a.tar", [f"data.root={tmp_path}"], jobs=1)
    stored = json.loads((tmp_path / "shards.json").read_text())["shards"]["a.tar"]
    assert "cut short" in stored["damage"] or "end-of-archive" in stored["damage"]
    assert stored["bad"] == {"no_image": ["1"]}
    assert summarise(_expand("a.tar", tmp_path))[0].damage == stored["damage"]


def test_a_shard_that_is_not_the_indexed_one_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [4])
    index("00000.tar", [f"data.root={tmp_path}"], jobs=1)
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"holds .* bytes, its index says .*clipscale data index"):
        _keys(_expand("00000.tar", tmp_path)[0])


def test_indexing_twice_adds_and_renews(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3])
    index("00000.tar", [f"data.root={tmp_path}"], jobs=1)
    index("00001.tar", [f"data.root={tmp_path}"], jobs=1)
    assert [s.samples for s in summarise(_expand("{00000..00001}.tar", tmp_path))] == [2, 3]
    assert [len(_keys(file)) for file in _expand("{00000..00001}.tar", tmp_path)] == [2, 3]


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', '{"format": 99, "shards": {}}', "nonsense"])
def test_a_damaged_index_says_so(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "shards.json").write_text(content)
    with pytest.raises(DataError, match="clipscale data index"):
        _expand("00000.tar", tmp_path)


@pytest.mark.parametrize("hint", ["sizes.json", "00000_stats.json"])
@pytest.mark.parametrize("said", [3, 5, 7])
def test_hints_are_held_against_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hint: str, said: int
) -> None:
    monkeypatch.setattr(manifest, "WALKED_AT_MOST", 0)
    write_shards(tmp_path, [5])
    (tmp_path / hint).write_text(json.dumps({"00000.tar": said} if hint == "sizes.json" else {"successes": said}))
    walk.cache_clear()
    (file,) = _expand("00000.tar", tmp_path)
    assert file.summary.samples == said and walk.cache_info().misses == 0
    found = list(read_samples(file, 0, said))
    assert [one.problem for one in found] == [""] * min(said, 5) + ["missing"] * max(0, said - 5)
    beyond = [key for one in found for key in one.beyond]
    assert beyond == [f"00000.tar/{number:06d}" for number in range(said, 5)]
    with pytest.raises(DataError, match="it changed"):
        list(read_samples(file, 0, said + 1))


def test_too_many_remote_shards_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "WALKED_AT_MOST", 2)
    write_shards(tmp_path, [1, 1, 1])
    with (
        FaultServer(tmp_path).running() as server,
        pytest.raises(DataError, match=r"3 remote shards have no index.*run clipscale data index once"),
    ):
        expand_shards("{00000..00002}.tar", server.url, "data.train.shards", STORE)


@pytest.mark.parametrize(
    "name",
    ["README", "README.md", "a/readme.txt", "LICENSE", "licence.txt", ".DS_Store", "a/._0001.jpg", "__MACOSX/0001.jpg",
     "Thumbs.db", "__meta__/x.json"],
)  # fmt: skip
def test_what_is_no_sample(name: str) -> None:
    assert sample_key(name)[0] is None


@pytest.mark.parametrize(
    ("name", "key"), [("a/0001.jpg", "a/0001"), ("readmes.txt", "readmes"), ("a.b/0.txt", "a.b/0")]
)
def test_what_is_a_sample(name: str, key: str) -> None:
    assert sample_key(name)[0] == key


def test_a_shard_of_the_same_size_is_not_the_indexed_one(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    index("00000.tar", [f"data.root={tmp_path}"], jobs=1)
    size = (tmp_path / "00000.tar").stat().st_size
    path = write_shard(tmp_path / "00000.tar", [(str(n), sample(n)) for n in range(2)])
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    walk.cache_clear()
    with pytest.raises(DataError, match="not the shard that was indexed, though as large"):
        _keys(_expand("00000.tar", tmp_path)[0])


def test_copied_shards_keep_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path / "here", [3])
    index("00000.tar", [f"data.root={tmp_path / 'here'}"], jobs=1)
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "here").iterdir():
        (tmp_path / "there" / path.name).write_bytes(path.read_bytes())
    assert len(_keys(_expand("00000.tar", tmp_path / "there")[0])) == 3


def test_one_index_of_many_directories(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [3])
    write_shards(tmp_path / "b", [5])
    write_shards(tmp_path / "val", [2])
    pattern = "{a,b}/00000.tar"
    index(pattern, [f"data.root={tmp_path}"], output=tmp_path / "index", jobs=1)
    where = str(tmp_path / "index" / "shards.json")
    assert [len(_keys(file)) for file in _expand(pattern, tmp_path, index=where)] == [3, 5]
    assert _expand("val/00000.tar", tmp_path, index=where)[0].declared is None, "of the same name, but not indexed"


def test_a_training_that_goes_on_may_use_the_older_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 3, 4])
    index("00001.tar", [f"data.root={tmp_path}"], jobs=1)
    (before,) = _expand("00001.tar", tmp_path)
    index("{00000..00002}.tar", [f"data.root={tmp_path}"], jobs=1)
    assert len(_keys(before)) == 3


def test_sizes_of_other_shards_stay(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    (tmp_path / "sizes.json").write_text('{"other.tar": 7, "00000.tar": 99}')
    index("00000.tar", [f"data.root={tmp_path}"], jobs=1)
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 2, "other.tar": 7}


def test_tools_believe_no_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "WALKED_AT_MOST", 0)
    write_shards(tmp_path, [3])
    (tmp_path / "sizes.json").write_text('{"00000.tar": 1}')
    files, _ = named_shards("00000.tar", [f"data.root={tmp_path}"])
    assert files[0].summary.samples == 3


def test_a_server_that_fails_is_not_one_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "shards.json").write_text("{}")
    with FaultServer(tmp_path, lambda number: Fault("503")).running() as server:
        failing = ShardStore(Storage(retries=0))
        with pytest.raises(DataError, match=r"shards\.json could not be read"):
            expand_shards("00000.tar", server.url, "data.train.shards", failing)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("http://me:secret@host/a.tar is bad", "http://***@host/a.tar is bad"),
     ("https://host/a.tar?sig=secret is", "https://host/a.tar?*** is"),
     ("pipe:curl -H 'Authorization: Bearer secret' x ended", "pipe:curl -H 'Authorization: Bearer ***' x ended"),
     ("s3://bucket/a.tar does not exist", "s3://bucket/a.tar does not exist")],
)  # fmt: skip
def test_errors_tell_no_secrets(text: str, shown: str) -> None:
    assert str(DataError(text)) == shown


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipe: .* cannot be indexed"):
        index("pipe:cat x.tar", [], jobs=1)
    with pytest.raises(DataError, match="an address with a query cannot be read in parts"):
        expand_shards("https://host/a.tar?signature=x", None, "data.train.shards", STORE)
