"""Other shard sizes and a shuffle of all: every sample once, whole, the same bytes however the work was done."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clipscale.apps.data.account import brace_pattern
from clipscale.apps.data.reshard import reshard
from clipscale.apps.data.shards import all_samples
from clipscale.data.samples import Member
from clipscale.errors import ClipscaleError
from tests.shards import sample, shard_files, write_shard, write_shards

COUNTS = (13, 0, 30, 7)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_shards(root, COUNTS)
    return root


def read(directory: Path) -> list[Member]:
    return [member for file in shard_files(sorted(directory.glob("*.tar"))) for member in all_samples(file)]


def keys(directory: Path) -> list[str]:
    return [member.key.partition("/")[2] for member in read(directory)]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.tar")}


def shards(source: Path) -> list[str]:
    return [f"data.root={source}"]


PATTERN = "{00000..00003}.tar"


def test_order_and_content_stay(source: Path, tmp_path: Path) -> None:
    account = reshard(PATTERN, tmp_path, shards(source), shard_samples=8, jobs=1)
    assert [m.members for m in read(tmp_path)] == [m.members for m in read(source)]
    assert keys(tmp_path) == keys(source)
    assert list(account.shards.values()) == [8, 8, 8, 8, 8, 8, 2]
    told = json.loads((tmp_path / "account.json").read_text())
    assert told["read"] == told["kept"] == 50 and told["dropped"] == {}


@pytest.mark.parametrize("shard_samples", [1, 8, 50, 1000])
def test_a_shuffle_holds_every_sample_once(source: Path, tmp_path: Path, shard_samples: int) -> None:
    account = reshard(PATTERN, tmp_path, shards(source), shuffle=True, shard_samples=shard_samples, jobs=1)
    ours, theirs = ({m.key.partition("/")[2]: m.members for m in read(place)} for place in (tmp_path, source))
    assert ours == theirs and len(keys(tmp_path)) == 50
    assert keys(tmp_path) != keys(source)
    assert [*account.shards.values()][:-1] == [shard_samples] * ((50 - 1) // shard_samples)
    assert not list((tmp_path / ".clipscale").rglob("*.bin"))


def test_a_shuffle_is_uniform_over_all_shards(tmp_path: Path) -> None:
    """Where the first sample lands, over many seeds; the shard size must not show in the order."""
    write_shards(tmp_path / "in", [2, 2])
    landed: Counter[int] = Counter()
    for seed in range(64):
        out = tmp_path / str(seed)
        reshard("{00000..00001}.tar", out, shards(tmp_path / "in"), shuffle=True, shard_samples=3, seed=seed, jobs=1)
        landed[keys(out).index("000000")] += 1
    assert sum((landed[place] - 16) ** 2 / 16 for place in range(4)) < 16.3  # chi-square, 3 degrees, p = 0.001


def test_the_seed_and_nothing_else_makes_the_order(source: Path, tmp_path: Path) -> None:
    for name, seed, jobs, size in (("a", 0, 1, 8), ("b", 0, 2, 8), ("c", 1, 1, 8), ("d", 0, 1, 20)):
        reshard(PATTERN, tmp_path / name, shards(source), shuffle=True, shard_samples=size, seed=seed, jobs=jobs)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert keys(tmp_path / "a") != keys(tmp_path / "c")
    assert keys(tmp_path / "a") == keys(tmp_path / "d")


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_was_stopped_goes_on(source: Path, tmp_path: Path, shuffle: bool) -> None:
    """After a stop at any moment: some markers and files are there, others are not."""
    reshard(PATTERN, tmp_path / "whole", shards(source), shuffle=shuffle, shard_samples=8, jobs=1)
    reshard(PATTERN, tmp_path / "cut", shards(source), shuffle=shuffle, shard_samples=8, jobs=1)
    for marker in (tmp_path / "cut" / ".clipscale").rglob("*.json"):
        if marker.name != "options.json":
            marker.unlink()
    for shard in list((tmp_path / "cut").glob("*.tar"))[::2]:
        shard.write_bytes(b"half")
    reshard(PATTERN, tmp_path / "cut", shards(source), shuffle=shuffle, shard_samples=8, jobs=1)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    reshard(PATTERN, tmp_path / "cut", shards(source), shuffle=shuffle, shard_samples=8, jobs=1)  # nothing left to do


@pytest.mark.parametrize(
    "words",
    [["reshard", "--shuffle"], ["dedup"], ["balance", "--label-key", "json:label", "--per-concept", "3"]],
)
def test_two_nodes_at_once_write_what_one_does(source: Path, tmp_path: Path, words: list[str]) -> None:
    def start(output: Path, rank: int, count: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "clipscale.cli", "data", words[0], PATTERN, str(output), *shards(source)]
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count)}
        return subprocess.Popen([*command, *words[1:], "-j", "1"], env=environment, text=True, stderr=subprocess.PIPE)

    nodes = [start(tmp_path / "two", rank, 2) for rank in (0, 1)] + [start(tmp_path / "one", 0, 1)]
    for node in nodes:
        assert node.communicate()[1] is not None and node.returncode == 0
    assert digests(tmp_path / "two") == digests(tmp_path / "one") != {}
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("runs"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_keys_that_meet_are_told_apart(tmp_path: Path, shuffle: bool) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_shard(tmp_path / place / f"{place}.v1.tar", [("a", sample(1)), ("b", sample(2))])
    # Two samples of one shard may share a key as well: other members stand between them.
    write_shard(tmp_path / "three.tar", [("a", sample(3)), ("c", sample(4)), ("a", sample(5))])
    named = f"{tmp_path}/one/one.v1.tar::{tmp_path}/two/two.v1.tar::{tmp_path}/three.tar"
    reshard(named, tmp_path / "out", [], shuffle=shuffle, jobs=1)
    if not shuffle:
        assert keys(tmp_path / "out") == ["a", "b", "two_v1-a", "two_v1-b", "three-a", "c", "three-a-2"]
    assert len(set(keys(tmp_path / "out"))) == 7
    found = [member.members for member in read(tmp_path / "out")]
    assert all(sample(number) in found for number in (1, 2, 3, 4, 5))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_kind_of_member_comes_through(tmp_path: Path, shuffle: bool) -> None:
    odd = {"jpg": b"no image", "_hidden": b"1", "seg.png": b"2", "": b"3", "npy": b""}
    long = "a/" * 60 + "k" * 120
    write_shard(tmp_path / "x.tar", [("plain", sample(0)), (long, odd)])
    reshard(str(tmp_path / "x.tar"), tmp_path / "out", [], shuffle=shuffle, jobs=1)
    found = {member.key.partition("/")[2]: member.members for member in read(tmp_path / "out")}
    assert found == {"plain": sample(0), long: odd}


@pytest.mark.parametrize("shuffle", [False, True])
def test_damage_is_counted(source: Path, tmp_path: Path, shuffle: bool, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (source / "00002.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.tar").write_bytes(b"<html>" * 500)
    twice = [("d", {"jpg": b"1", "txt": b"one"}), ("d", {"jpg": b"2"})]
    write_shard(tmp_path / "twice.tar", [*twice, ("e", sample(1))])
    account = reshard(f"{tmp_path}/{{cut,page,twice}}.tar", tmp_path / "out", [], shuffle=shuffle, jobs=1)
    assert account.dropped == {"duplicate_member": 1}
    assert account.read == account.kept + 1
    assert set(account.damaged) == {"cut.tar", "page.tar"}
    assert "warning: shard cut.tar" in capsys.readouterr().out


def test_mistakes_are_told(source: Path, tmp_path: Path) -> None:
    def refused(match: str, pattern: str, output: Path, **options: int) -> None:
        with pytest.raises(ClipscaleError, match=match):
            reshard(pattern, output, shards(source), jobs=1, **options)

    refused("2 of 3 shards do not exist", "{00003..00005}.tar", tmp_path / "a")
    refused("--shard-samples 0: at least 1", PATTERN, tmp_path / "a", shard_samples=0)
    refused("holds the shards that are read", PATTERN, source)
    refused("no sample", "00001.tar", tmp_path / "b")
    refused("no sample", "00001.tar", tmp_path / "c", shuffle=True)
    write_shards(tmp_path / "other", [3])
    refused("did not write", PATTERN, tmp_path / "other")
    reshard(PATTERN, tmp_path / "out", shards(source), jobs=1)
    refused("begun with other options", PATTERN, tmp_path / "out", shard_samples=7)
    (tmp_path / "out" / "000000.tar").unlink()
    refused("1 of 1 shards that were written are gone", PATTERN, tmp_path / "out")


def test_names_become_a_pattern() -> None:
    names = [*(f"a-{i:03d}.tar" for i in range(3)), "a-007.tar", "b.tar", "b.tar", "0.tar", "1.tar"]
    assert brace_pattern(names) == "a-{000..002}.tar::a-007.tar::b.tar::b.tar::{0..1}.tar"
    assert brace_pattern(["9.tar", "10.tar"]) == "9.tar::10.tar"
