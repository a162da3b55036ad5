"""Conditions on samples: what each one keeps, what is refused, and that every sample is accounted for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipscale.apps.data.check import check
from clipscale.apps.data.filter import filter_shards
from clipscale.apps.data.shards import all_samples
from clipscale.apps.data.where import holds, parse
from clipscale.data.samples import BadSample
from clipscale.errors import ClipscaleError, ConfigError
from tests.shards import sample, shard_files, write_shard, write_shards

FIELDS = {
    "width": 300,
    "score": 0.25,
    "name": "Red Car",
    "tags": ["car", "red"],
    "deep": {"list": [1, 2]},
    "none": None,
}


def field(name: str) -> Any:
    if name not in FIELDS:
        raise BadSample(f"no_{name}")
    return FIELDS[name]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("width >= 200 and score > 0.2", True),
        ("200 <= width < 300", False),
        ("not width == 300", False),
        ("'car' in lower(name)", True),
        ("'car' in name", False),
        ("'car' in tags and 'blue' not in tags", True),
        ("len(name) == 7", True),
        ("width % 7 == 6 and width // 7 == 42", True),
        ("width / 2 - 1 == 149", True),
        ("-score < 0", True),
        ("name in ('Red Car', 'x')", True),
        ("deep['list'][1] == 2", True),
        ("tags[1] == 'red'", True),
        ("width > 1 or absent > 1", True),
        ("none == None", True),
        ("width", True),
        ("True and not False", True),
        (" width > 1 ", True),
    ],
)
def test_conditions_that_hold(condition: str, expected: bool) -> None:
    assert holds(parse(condition), field) is expected


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("absent > 1 or width > 1", "no_absent"),
        ("not absent", "no_absent"),
        ("deep['other'] > 1", "no_other"),
        ("name > 1", "not_computable"),
        ("none < 1", "not_computable"),
        ("width / 0 > 1", "not_computable"),
        ("name * 1000000000 == 'x'", "not_computable"),
        ("'%s' % name == 'x'", "not_computable"),
        ("lower(width) == 1", "not_computable"),
        ("len(width) == 1", "not_computable"),
        ("width['a'] == 1", "not_computable"),
        ("tags[9] == 1", "no_9"),
    ],
)
def test_what_cannot_be_told_is_false_with_a_reason(condition: str, reason: str) -> None:
    with pytest.raises(BadSample, match=f"^{reason}$"):
        holds(parse(condition), field)


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "width >",
        "width = 3",
        "width > 3 AND x",
        "__import__('os')",
        "name.lower() == 'a'",
        "open('x')",
        "len(name, 2)",
        "[x for x in tags]",
        "lambda: 1",
        "width if 1 else 2",
        "f'{name}'",
        "width ** 9",
        "tags[0:1]",
        "tags[-1] == 1",
        "b'a' in name",
        "name == ...",
        "(width := 3)",
        "lower(*tags)",
        "deep[name]",
        "1j < 2",
        "a;b",
        "x" * 10 + "(" * 300,
        "not " * 5000 + "x",
        "lower(len)(name)",
        "{1: 2}",
        "~width",
        "width is 3",
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(condition: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(condition)
    assert "\n" not in str(error.value)


@given(st.text(max_size=40) | st.text("abx10.()[]'+-*/%<>=! notadrin,\\\n", max_size=40))
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    try:
        tree = parse(text)
    except ConfigError:
        return
    with suppress(BadSample):
        assert holds(tree, field) in (True, False)


def picture(width: int, height: int, turned: bool = False) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 20, the third one small and odd."""
    root = tmp_path_factory.mktemp("source")
    write_shards(root, [20, 20])
    odd = [
        ("wide", {"jpg": picture(40, 20), "txt": b"wide", "json": b'{"label": 1}'}),
        ("turned", {"jpg": picture(40, 20, turned=True), "txt": b"turned", "json": b'{"label": 1, "rare": 5}'}),
        ("nojson", {"jpg": picture(4, 2), "txt": b"x"}),
        ("badjson", {"jpg": picture(4, 2), "txt": b"x", "json": b"{"}),
        ("listjson", {"jpg": picture(4, 2), "txt": b"x", "json": b"[1]"}),
        ("broken", {"jpg": b"no", "txt": b"x", "json": b'{"label": 1}'}),
        ("blind", {"txt": b"x", "json": b'{"label": 1}', "extra.bin": b"\0"}),
        ("mute", {"jpg": picture(4, 2), "json": b'{"label": 1}'}),
    ]
    write_shard(root / "00002.tar", odd)
    return root


PATTERN = "{00000..00002}.tar"


def kept(directory: Path) -> dict[str, dict[str, bytes]]:
    files = shard_files(sorted(directory.glob("*.tar")))
    return {member.key: member.members for file in files for member in all_samples(file)}


def run(source: Path, output: Path, **options: Any) -> Any:
    return filter_shards(PATTERN, output, [f"data.root={source}"], jobs=1, **options)


def test_fields_of_the_json(source: Path, tmp_path: Path) -> None:
    account = run(source, tmp_path, where="label == 3")
    assert set(kept(tmp_path)) == {f"{n // 20:05d}.tar/{n:06d}" for n in range(40) if n % 7 == 3}
    assert all(members == sample(int(key[-6:])) for key, members in kept(tmp_path).items())
    assert account.read == 48 and account.kept == len(kept(tmp_path))
    assert account.dropped["no_label"] == 1 and account.dropped["bad_json"] == 2
    assert account.dropped.total() == account.read - account.kept
    assert account.shards["00002.tar"] == 0
    assert json.loads((tmp_path / "account.json").read_text())["dropped"] == dict(account.dropped)


def test_names_of_their_own(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "a", where="width > height")
    assert set(kept(tmp_path / "a")) == {
        f"00002.tar/{key}" for key in ("wide", "nojson", "badjson", "listjson", "mute")
    }
    account = run(source, tmp_path / "b", where="width < height and shard == '00002.tar' and key != 'x'")
    assert set(kept(tmp_path / "b")) == {"00002.tar/turned"}
    assert account.dropped["undecodable_image"] == 1 and account.dropped["no_image"] == 1
    run(source, tmp_path / "c", where="caption == 'wide'")
    assert set(kept(tmp_path / "c")) == {"00002.tar/wide"}


def test_a_slip_in_a_fields_name_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"json field 'lable'; did you mean label\?"):
        run(source, tmp_path / "a", where="lable == 3")
    assert not (tmp_path / "a").exists()
    run(source, tmp_path / "b", where="json['never'] == 5 or 1 == 1")


@pytest.mark.parametrize("name", ["keys.txt", "keys.csv", "keys.jsonl"])
def test_lists_of_keys(source: Path, tmp_path: Path, name: str) -> None:
    wanted = ["00000.tar/000003", "000021", "00001.tar/000003"]  # the last one is in another shard
    written = {
        "keys.txt": "".join(f"{key}\n" for key in wanted),
        "keys.csv": "reason,key\n" + "".join(f'"a,b",{key}\n' for key in wanted),
        "keys.jsonl": "".join(json.dumps({"key": key}) + "\n" for key in wanted),
    }
    (tmp_path / name).write_text(written[name])
    both = {"00000.tar/000003", "00001.tar/000021"}
    account = run(source, tmp_path / "keep", keep=tmp_path / name)
    assert set(kept(tmp_path / "keep")) == both and account.dropped == {"not_in_keep": 46}
    account = run(source, tmp_path / "drop", drop=tmp_path / name)
    assert set(kept(source)) - set(kept(tmp_path / "drop")) == both and account.dropped == {"in_drop": 2}


def test_a_list_of_another_tool_names_samples_of_one_shard(tmp_path: Path) -> None:
    """Keys that begin anew in every shard, and shards of one name in two folders."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("0.tar", f"{folder}.tar"):
            broken = {"jpg": b"no", "txt": b"x"}
            content = [("k0", broken if name == "a.tar" or (name, folder) == ("0.tar", "b") else sample(0))]
            write_shard(tmp_path / folder / name, [*content, ("k1", sample(1))])
    shards, keys = "a/0.tar::a/a.tar::b/0.tar::b/b.tar", [f"data.root={tmp_path}"]
    check(shards, tmp_path / "report", keys, jobs=1)
    account = filter_shards(shards, tmp_path / "out", keys, drop=tmp_path / "report" / "bad_samples.csv", jobs=1)
    assert account is not None and account.dropped == {"in_drop": 2} and account.kept == 6
    assert account.shards == {"000000-0.tar": 2, "a.tar": 1, "000002-0.tar": 1, "b.tar": 2}
    (tmp_path / "list.jsonl").write_text('{"shard": "b.tar", "key": "k1"}\n{"key": "k0"}\n')
    account = filter_shards(shards, tmp_path / "both", keys, drop=tmp_path / "list.jsonl", jobs=1)
    assert account is not None and account.shards == {"000000-0.tar": 1, "a.tar": 1, "000002-0.tar": 1, "b.tar": 0}


def test_lists_that_are_none(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, match in (
        ("empty.txt", "\n", "holds no key"),
        ("other.csv", "a,b\n1,2\n", "no column `key`"),
        ("other.jsonl", "{\n", "cannot be read"),
        ("list.jsonl", "[1]\n", "no column `key`"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=match):
            run(source, tmp_path / "out", keep=tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        run(source, tmp_path / "out", drop=tmp_path / "absent")
    (tmp_path / "strange.txt").write_text("nobody\n")
    run(source, tmp_path / "none", drop=tmp_path / "strange.txt")
    assert "none of the 1 keys of --drop" in capsys.readouterr().err


def test_the_same_bytes_with_any_number_of_processes(source: Path, tmp_path: Path) -> None:
    digests = []
    for jobs in (1, 2):
        filter_shards(PATTERN, tmp_path / str(jobs), [f"data.root={source}"], where="label < 4", jobs=jobs)
        digests.append([hashlib.sha256(p.read_bytes()).digest() for p in sorted((tmp_path / str(jobs)).glob("*.tar"))])
    assert digests[0] == digests[1]


def test_mistakes_are_told(source: Path, tmp_path: Path) -> None:
    for match, options in (
        ("--min-score 0.5 needs --model", {"min_score": 0.5}), ("nothing to filter by", {}),
        ("neither a run directory nor a checkpoint", {"model": tmp_path}),
    ):  # fmt: skip
        with pytest.raises(ClipscaleError, match=match):
            run(source, tmp_path / "out", **options)


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, as small as one can be."""
    runs = tmp_path_factory.mktemp("runs")
    recipe = [
        f"runs_dir={runs}", "name=tiny", "data=shards", f"data.root={source}", "data.train.shards={00000..00001}.tar",
        "data.workers=0", "tracking=disabled", "global_batch_size=8", "total_samples=16", "schedule.warmup_samples=0",
        "model.vision.image_size=16", "model.vision.patch_size=8", "model.vision.width=32", "model.vision.layers=1",
        "model.vision.heads=2", "model.text.width=32", "model.text.layers=1", "model.text.heads=2",
        "model.embed_dim=16", "model.context_length=12", "model.vision.resize_mode=longest",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "clipscale.cli", "train", *recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs / "tiny"


def test_scores_by_a_model(source: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import clipscale

    assert run(source, tmp_path, model=trained) is None
    assert not list(tmp_path.glob("*.tar"))
    assert "50 %" in (told := capsys.readouterr().out) and "--min-score" in told
    with (tmp_path / "scores.csv").open() as lines:
        rows = {row["key"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(kept(source))
    reasons = {key: row["reason"] for key, row in rows.items() if row["reason"]}
    assert reasons == {
        "00002.tar/broken": "undecodable_image", "00002.tar/blind": "no_image", "00002.tar/mute": "no_caption"
    }  # fmt: skip

    model, preprocess, tokenizer = clipscale.load(trained)
    wide = {"jpg": picture(40, 20), "txt": b"wide"}  # another score if it were cut, as is the default
    for key, members in {"00000.tar/000007": sample(7), "00002.tar/wide": wide}.items():
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.open(io.BytesIO(members["jpg"])))[None], normalize=True)
            text = model.encode_text(tokenizer([members["txt"].decode()]), normalize=True)
        assert float(rows[key]["score"]) == pytest.approx((image @ text.T).item(), abs=1e-5)

    limit = sorted(float(row["score"]) for row in rows.values() if row["score"])[20]
    account = run(source, tmp_path, model=trained, min_score=limit)
    expected = {key for key, row in rows.items() if row["score"] and float(row["score"]) >= limit}
    assert set(kept(tmp_path)) == expected
    assert account.dropped == {"below_min_score": 20, "undecodable_image": 1, "no_image": 1, "no_caption": 1}
    smaller = [f"data.root={source}", "data.max_pixels=500"]  # without the widest, which have a score of before
    with pytest.raises(ConfigError, match=r"begun with other options \(max_pixels\)"):
        filter_shards(PATTERN, tmp_path, smaller, model=trained, min_score=limit, jobs=1)
