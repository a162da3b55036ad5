"""`clipscale data check`: what it says of damaged shards is what is wrong with them, and what training would count."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipscale.apps.data import repeats
from clipscale.apps.data.check import caption_warnings, check, image_warnings
from clipscale.apps.data.jobs import Jobs
from clipscale.data import manifest
from clipscale.data.index import read_index
from clipscale.errors import ConfigError, DataError
from tests.shards import jpeg, sample, write_shard, write_shards

KEYS = "data.image_keys=[jpg,jpeg,png,webp,gif,bmp]"


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dirty(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The manifest of the damaged set, and what checking the whole set wrote."""
    manifest = json.loads((shared_data / "dirty" / "manifest.json").read_text())
    names = {entry.get("shard") or entry["file"] for entry in manifest["samples"] + manifest["shards"]}
    there = sorted(name for name in names if (shared_data / name).exists())
    output = tmp_path_factory.mktemp("check")
    assert check("::".join(there), output, [f"data.root={shared_data}", KEYS], jobs=2) == 4
    return manifest, output


def test_every_damaged_sample_is_judged_as_its_manifest_says(dirty: tuple[dict[str, Any], Path]) -> None:
    manifest, output = dirty
    bad = {(row["shard"], row["key"]): row["reason"] for row in rows(output / "bad_samples.csv")}
    assert len(manifest["samples"]) == 65
    for entry in manifest["samples"]:
        reason = bad.get((entry["shard"].removeprefix("dirty/"), entry["key"]))
        assert entry["verdict"] in ("skip" if reason else "yield", "either"), f"{entry['key']}: {reason}"
    assert bad["images-000000.tar", "026_bomb_1bit_30000"] == bad["images-000000.tar", "027_bomb_rgb_12000"]


def test_every_damaged_shard_is_told(dirty: tuple[dict[str, Any], Path]) -> None:
    manifest, output = dirty
    found, bad = report(output), rows(output / "bad_samples.csv")
    for entry in manifest["shards"]:
        if entry["bytes"] is None:
            continue
        name = entry["file"].removeprefix("dirty/")
        assert not set(entry["must_yield"]) & {row["key"] for row in bad if row["shard"] == name}
        assert entry["verdict"] != "yield_then_warn" or name in found["damaged_shards"]
    assert "struct-zero-byte.tar" in found["damaged_shards"] and "struct-html.tar" in found["damaged_shards"]
    assert sum(reason["samples"] for reason in found["reasons"].values()) == found["bad"] == len(bad)
    assert found["warnings"]["extreme_aspect_ratio"]["worst_shards"] == {"images-000000.tar": 1}
    assert found["warnings"]["caption_is_a_file_name"]["samples"] == 1


def test_good_shards_pass(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 7])
    assert check("{00000..00001}.tar", tmp_path / "out", [f"data.root={tmp_path}"], jobs=1) == 0
    found = report(tmp_path / "out")
    assert (found["samples"], found["usable"], found["passed"], found["reasons"]) == (12, 12, True, {})
    assert found["duplicate_keys"]["within_a_shard"] == found["duplicate_keys"]["across_shards"] == 0
    assert rows(tmp_path / "out" / "bad_samples.csv") == []


@pytest.mark.parametrize(("limit", "code"), [("0.5", 0), ("0.2", 4), ("null", 0)])
def test_the_budget_is_that_of_training(tmp_path: Path, limit: str, code: int) -> None:
    write_shards(tmp_path, [10], bad={n: {"jpg": b"no", "txt": b"a"} for n in range(3)})
    arguments = [f"data.root={tmp_path}", f"data.max_bad_fraction={limit}"]
    assert check("00000.tar", tmp_path / "out", arguments, jobs=1) == code
    assert report(tmp_path / "out")["reasons"]["undecodable_image"]["worst_shards"] == {"00000.tar": 3}


def declare(path: Path, **changes: Any) -> None:
    data = path.read_bytes()
    entry = {"samples": 6, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "damage": "", "tag": ""}
    entry |= {"offsets": [0, 28], **changes}
    read_index.cache_clear()
    path.with_name("shards.json").write_text(json.dumps({"format": 1, "shards": {path.name: entry}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sha256": "0" * 64}, "sha256"), ({"bytes": 7}, "its index says 7"), ({"samples": 9}, "its index says 9")],
)
def test_a_shard_is_held_against_its_index(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_shards(tmp_path, [6])[0]
    declare(path)
    assert check(str(path), tmp_path / "right", [], jobs=1) == 0
    declare(path, **changes)
    assert check(str(path), tmp_path / "wrong", [], jobs=1) == 4
    assert message in capsys.readouterr().out
    assert report(tmp_path / "wrong")["not_as_indexed"].keys() == {path.name}


def test_samples_that_the_index_declares_and_a_cut_took_are_lost(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [6])[0]
    declare(path)
    path.write_bytes(path.read_bytes()[:9000])
    assert check(str(path), tmp_path / "out", ["data.max_bad_fraction=null"], jobs=1) == 4
    found = report(tmp_path / "out")
    assert found["samples"] == 6 and found["reasons"]["lost_with_the_archive"]["samples"] == 3
    assert found["reasons"]["no_caption"]["samples"] == 1, "its image is all that is left of it"


@pytest.mark.parametrize(
    ("says", "reasons"),
    [(8, {"no_caption": 1, "missing": 2}), (5, {"no_caption": 1, "beyond_count": 1}), (6, {"no_caption": 1})],
)
def test_a_wrong_hint_is_told_and_counted_as_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: int, reasons: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(manifest, "WALKED_AT_MOST", 0)
    path = write_shards(tmp_path, [6], bad={1: {"jpg": jpeg(1)}})[0]
    (tmp_path / "sizes.json").write_text(json.dumps({path.name: says}))
    assert check(str(path), tmp_path / "out", ["data.max_bad_fraction=0.5"], jobs=1) == 0
    found, told = report(tmp_path / "out"), capsys.readouterr().out
    assert {reason: each["samples"] for reason, each in found["reasons"].items()} == reasons
    assert found["samples"] == max(says, 6) and not found["not_as_indexed"]
    assert (f"sizes.json or its _stats.json says {says}" in told) == (says != 6) == bool(found["not_as_hinted"])


def test_a_shard_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [6])[0]
    code = check(f"pipe:cat {path}; exit 3", tmp_path / "one", ["data.max_bad_fraction=null"], jobs=1)
    assert code == 4 and "ended with code 3" in str(report(tmp_path / "one")["unreadable_shards"])


def test_keys_that_occur_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a shard and across shards, however many tasks the hashes are spread over."""
    named = [["a", "b", "a"], ["b", "c"], ["a", "d", "e"]]
    for i, keys in enumerate(named):
        write_shard(tmp_path / f"{i}.tar", [(key, sample(j)) for j, key in enumerate(keys)])
    assert check("{0..2}.tar", tmp_path / "out", [f"data.root={tmp_path}"], jobs=1) == 0
    found = report(tmp_path / "out")["duplicate_keys"]
    assert (found["within_a_shard"], found["across_shards"]) == (1, 2)
    assert {example["key"]: set(example["shards"]) for example in found["examples"]} == {
        "a": {"0.tar"}, "b": {"0.tar", "1.tar"},
    }  # fmt: skip
    paths = []
    for i, keys in enumerate(named):
        paths.append(tmp_path / f"{i}.npy")
        repeats.save_hashes(paths[-1], keys)
    monkeypatch.setattr(repeats, "PER_TASK", 2)
    many = repeats.find_repeats(Jobs(tmp_path / "many", "t", {}, 1), "keys", paths)
    assert (many.values, many.repeated, many.extra) == (8, 2, 3)
    assert {named[s][p] for example in many.examples for s, p in example} == {"a", "b"}


def test_a_caption_that_is_everywhere(tmp_path: Path) -> None:
    write_shards(tmp_path, [30, 30], bad={n: {"jpg": jpeg(n), "txt": b"image unavailable"} for n in range(0, 60, 4)})
    check("{00000..00001}.tar", tmp_path / "out", [f"data.root={tmp_path}"], jobs=1)
    assert report(tmp_path / "out")["repeated_captions"] == [
        {"caption": "image unavailable", "samples": 15, "fraction": 0.25}
    ]


@pytest.mark.parametrize(
    ("caption", "warning"),
    [
        ("IMG_2041.JPG", "caption_is_a_file_name"), ("DSC_0042", "caption_is_a_file_name"),
        ("a photo of dog.jpg", "caption_is_a_file_name"), ("https://example.com/a.png", "caption_is_a_url"),
        ("cafÃ© au lait", "caption_in_broken_encoding"), ("itâ€™s", "caption_in_broken_encoding"),
        ("a \ufffd b", "caption_in_broken_encoding"), ("nul\x00s", "caption_in_broken_encoding"),
        ("a café", None), ("Ärger über Öl", None), ("猫が好き", None), ("«Ça»", None), ("an image 2 of 3", None),
        ("see https://example.com for more", None), ("naïveté – ‘quoted’ “so”…", None), ("👩‍🚀 in space", None),
    ],
)  # fmt: skip
def test_odd_captions(caption: str, warning: str | None) -> None:
    assert caption_warnings(caption) == ([warning] if warning else [])


def test_odd_images() -> None:
    assert image_warnings(16, 16) == image_warnings(1000, 50) == []
    assert image_warnings(1, 1) == ["tiny_image"] and image_warnings(16, 321) == ["extreme_aspect_ratio"]


def test_keys_that_are_no_text_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", [("\udcff\x1b[31m\n,", {"jpg": b"", "txt": b"x"}), ("b", sample(1))])
    assert check(str(tmp_path / "a.tar"), tmp_path / "out", ["data.max_bad_fraction=0.9"], jobs=1) == 0
    assert "\x1b" not in capsys.readouterr().out
    (row,) = rows(tmp_path / "out" / "bad_samples.csv")
    assert (row["key"], row["reason"]) == ("\udcff\x1b[31m\n,", "empty_image"), "the filter finds it by these bytes"


def test_the_first_node_alone_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have the verdict as their exit code."""
    path = write_shards(tmp_path, [4], bad={1: {"txt": b"a"}})[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert check(str(path), tmp_path / "out", [], jobs=1, as_json=True) == 4
        assert (tmp_path / "out" / "report.json").exists() == bool(capsys.readouterr().out) == (rank == "0")


def test_taken_up_again_it_says_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [4, 4, 4], bad={5: {"txt": b"a"}})
    arguments = ("{00000..00002}.tar", tmp_path / "out", [f"data.root={tmp_path}/data"])
    check(*arguments, jobs=1)
    before = (tmp_path / "out" / "report.json").read_bytes()
    next((tmp_path / "out" / ".clipscale" / "check" / "samples").glob("000001*")).unlink()
    check(*arguments, jobs=2)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    with pytest.raises(ConfigError, match="other options"):
        check(*arguments[:2], [f"data.root={tmp_path}/data", "data.max_pixels=5"], jobs=1)


def test_mistakes(tmp_path: Path) -> None:
    path = str(write_shards(tmp_path, [3])[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="3 of 3 shards do not exist"):
        check(str(tmp_path / "{7..9}.tar"), tmp_path / "out", [])
    with pytest.raises(DataError, match="cannot be written"):
        check(path, tmp_path / "file", [])
    with pytest.raises(ConfigError, match="no such key"):
        check(path, tmp_path / "out", ["data.caption=txt"])
    (tmp_path / "shards.json").write_text("[]")
    with pytest.raises(DataError, match="no index of shards"):
        check(path, tmp_path / "out", [], jobs=1)


def test_the_command_ends_with_the_verdict_as_its_code(tmp_path: Path) -> None:
    path = str(write_shards(tmp_path, [3])[0])
    command = [sys.executable, "-m", "clipscale.cli", "data", "check", path, str(tmp_path / "out"), "-j", "1"]
    done = subprocess.run([*command, "data.caption_key=json:nope"], capture_output=True, text=True)
    assert done.returncode == 4 and "no_nope" in done.stdout and "json (captions, label, name)" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_json_is_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_shards(tmp_path, [3])[0])
    assert check(path, tmp_path / "out", [], jobs=1, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == report(tmp_path / "out")


MEASURE = """
import re, sys
from pathlib import Path
from clipscale.data.samples import BadSample, Member, decode_image, eval_crop, find_image
from clipscale.data.stream import read_samples
from tests.shards import STORE
from clipscale.data.manifest import ShardFile

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

file = ShardFile(STORE, sys.argv[1])
samples = {sample.key.partition("/")[2]: sample for sample in read_samples(file, 0, file.index.samples)}
def use(sample):
    try:
        eval_crop(decode_image(find_image(sample, ["jpg", "png"]), 100_000_000), 224)
    except BadSample as reason:
        return str(reason)
use(samples["000_good"]), use(samples["013_rgba"])  # what is loaded at the first use
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
for key in sys.argv[2:]:
    print(key, use(samples[key]), memory("VmHWM") - before)
"""


def test_no_bomb_takes_much_memory(shared_data: Path) -> None:
    """Pixels, metadata and aspect ratios that a few kB can hold."""
    shard, bombs = str(shared_data / "dirty" / "images-000000.tar"), ["026_bomb_1bit_30000", "027_bomb_rgb_12000"]
    command = [sys.executable, "-c", MEASURE, shard, *bombs, "028_ztxt_bomb", "025_very_wide"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [reason for _, reason, _ in found] == ["too_many_pixels", "too_many_pixels", "undecodable_image", "None"]
    assert all(float(grown) < 100 for _, _, grown in found), found  # MiB
