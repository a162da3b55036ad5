"""Checkpoints, configurations and archives that somebody else made: none executes, escapes, or takes memory."""

from __future__ import annotations

import io
import os
import pickle
import re
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

import clipscale
from clipscale.apps.evaluation.own import evaluate
from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.files import read_file
from clipscale.checkpoint.manifest import MANIFEST, Manifest, checksum
from clipscale.checkpoint.places import local
from clipscale.checkpoint.pretrained import read_pretrained
from clipscale.checkpoint.reading import METADATA
from clipscale.config import Config
from clipscale.data.cache import ShardCache
from clipscale.data.io import ShardStore
from clipscale.data.manifest import expand_shards, summarise
from clipscale.data.stream import read_samples
from clipscale.errors import ClipscaleError, ConfigError
from tests.unit.test_export import SMALL_TEXT, make_run

HUGE = 100 * 10**9
SCALE = "model.temperature.logit_scale"


class Evil:
    """Whoever unpickles it makes a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def forge(checkpoint: Path) -> None:
    """Make the manifest fit what the files are now, as who makes a checkpoint can."""
    files = {}
    for path in checkpoint.iterdir():
        if path.name != MANIFEST:
            with path.open("rb") as file:
                files[path.name] = checksum(file)
    (checkpoint / MANIFEST).write_text(Manifest(Saved(step=4, samples_seen=512), files).to_json())


@contextmanager
def no_room() -> Iterator[None]:
    """What asks for gigabytes gets an error that says so."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(attempt: Callable[[], Any]) -> str:
    """The line by which it is refused, without having asked for memory."""
    with no_room(), pytest.raises(ClipscaleError) as caught:
        attempt()
    text = str(caught.value)
    assert "\n" not in text and not re.search("alloc|memory", text), text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("foreign"), "model=tiny", "model.vision.layers=1", *SMALL_TEXT)


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run that may be spoilt."""
    shutil.copytree(run, tmp_path / "run")
    return next((tmp_path / "run" / "checkpoints").iterdir())


USES: dict[str, Callable[[Path], Any]] = {
    "load": lambda run: clipscale.load(run),
    "eval": lambda run: evaluate(run, [], "cpu", False),
    "init.weights": lambda run: read_pretrained(str(run)),
}


@pytest.mark.parametrize("use", USES)
def test_a_table_of_contents_with_code_is_not_executed(checkpoint: Path, tmp_path: Path, use: str) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    forge(checkpoint)
    told = refused(lambda: USES[use](checkpoint.parent.parent))
    assert "names posix.mkdir" in told and not (tmp_path / "made").exists()


def contents(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / METADATA).read_bytes())


def spoil(checkpoint: Path, change: Callable[[Any], None]) -> None:
    found = contents(checkpoint)
    change(found)
    (checkpoint / METADATA).write_bytes(pickle.dumps(found))
    forge(checkpoint)


def tensor_named(found: Any, name: str) -> Any:
    return next(index for index in found.storage_data if index.fqn == name)


@pytest.mark.parametrize("where", ["../../../outside", "/etc/passwd"])
def test_a_table_of_contents_cannot_lead_elsewhere(checkpoint: Path, where: str) -> None:
    def change(found: Any) -> None:
        found.storage_data[tensor_named(found, SCALE)] = _StorageInfo(where, 0, 10)

    spoil(checkpoint, change)
    assert "which is no file of this checkpoint" in refused(lambda: clipscale.load(checkpoint))


def test_a_length_beyond_the_file_is_not_read(checkpoint: Path) -> None:
    def change(found: Any) -> None:
        place = found.storage_data[tensor_named(found, SCALE)]
        place.length = HUGE

    spoil(checkpoint, change)
    assert "leads past the end" in refused(lambda: clipscale.load(checkpoint))


def test_a_tensor_that_claims_to_be_huge_is_not_unpacked(checkpoint: Path) -> None:
    tensor = io.BytesIO()
    torch.save(torch.zeros(4), tensor)
    content = bytearray(tensor.getvalue())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(entry.filename for entry in archive.infolist() if "/data/" in entry.filename)
    place = content.rfind(name.encode()) - 46  # its entry in the archive's directory
    content[place + 20 : place + 28] = (2**32 - 2).to_bytes(4, "little") * 2

    def change(found: Any) -> None:
        found.storage_data[tensor_named(found, SCALE)] = _StorageInfo("bomb", 0, len(content))

    (checkpoint / "bomb").write_bytes(content)
    spoil(checkpoint, change)
    assert "claims to be larger than its file" in refused(lambda: clipscale.load(checkpoint))


@pytest.mark.parametrize(
    "text",
    [
        pickle.BINBYTES8 + HUGE.to_bytes(8, "little"),
        pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + HUGE.to_bytes(8, "little"),
        pickle.PROTO + b"\x04" + pickle.FRAME + HUGE.to_bytes(8, "little"),
        pickle.PROTO + b"\x04" + pickle.EMPTY_LIST + pickle.LONG_BINPUT + b"\xff\xff\xff\xff.",
        pickle.PROTO + b"\x04" + pickle.BINUNICODE + b"\xff\xff\xff\xff",
    ],
    ids=["bytes", "bytearray", "frame", "memo", "text"],
)
def test_a_pickle_of_sizes_takes_no_memory(checkpoint: Path, text: bytes) -> None:
    (checkpoint / METADATA).write_bytes(text)
    forge(checkpoint)
    assert "no table of contents" in refused(lambda: clipscale.load(checkpoint))


def test_a_class_is_not_changed(checkpoint: Path) -> None:
    change = (
        pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + b"\x29torch.distributed.checkpoint.filesystem"
        + pickle.SHORT_BINUNICODE + b"\x0c_StorageInfo" + pickle.STACK_GLOBAL
        + pickle.NONE + pickle.EMPTY_DICT + pickle.SHORT_BINUNICODE + b"\x06length" + pickle.BININT1 + b"\x01"
        + pickle.SETITEM + pickle.TUPLE2 + pickle.BUILD + pickle.STOP
    )  # fmt: skip
    change = change.replace(b"\x29torch", bytes([len("torch.distributed.checkpoint.filesystem")]) + b"torch")
    (checkpoint / METADATA).write_bytes(change)
    forge(checkpoint)
    assert "it changes" in refused(lambda: clipscale.load(checkpoint))
    assert not hasattr(_StorageInfo, "length")


def test_a_value_with_code_is_not_executed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Checkpointer(tmp_path / "checkpoints", 1)
    saver.save(model, optimizer, {}, Saved(step=1))
    saver.wait()
    stored = saver.newest()
    assert stored is not None
    folder, found = Path(stored.location), contents(Path(stored.location))
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "made"), evil)
    (folder / "evil").write_bytes(evil.getvalue())
    name = next(fqn for fqn in found.state_dict_metadata if fqn.endswith(".lr"))
    found.storage_data[tensor_named(found, name)] = _StorageInfo("evil", 0, len(evil.getvalue()))
    (folder / METADATA).write_bytes(pickle.dumps(found))
    forge(folder)
    with pytest.raises(ClipscaleError, match="cannot be loaded"):
        saver.restore(local(folder), model, optimizer, {})
    assert not (tmp_path / "made").exists()


def test_a_configuration_names_no_code(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint.parent.parent / "config.yaml"
    text = file.read_text()
    inner = text.replace("\nmodel:\n", "\nmodel:\n  _target_: os.mkdir\n")
    for evil in (f"_target_: os.mkdir\npath: {tmp_path}/made\n{text}", inner):
        file.write_text(evil)
        with pytest.raises(ConfigError, match="_target_"):
            clipscale.load(checkpoint)
    assert not (tmp_path / "made").exists()


def test_weights_with_code_or_a_huge_header_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": Evil(tmp_path / "made")}, tmp_path / "weights.pt")
    assert "could run code" in refused(lambda: read_file(tmp_path / "weights.pt"))
    (tmp_path / "huge.safetensors").write_bytes(HUGE.to_bytes(8, "little") + b"{")
    refused(lambda: read_file(tmp_path / "huge.safetensors"))
    assert not (tmp_path / "made").exists()


def test_names_in_archives_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = tmp_path / "data"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name in ("../../../escaped.txt", "/tmp/escaped.txt", "plain.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    store = ShardStore(Config().storage)
    files = expand_shards("0.tar", str(shards), "k", store)
    (summary,) = summarise(files)
    read = list(read_samples(files[0], 0, summary.samples))
    assert len(read) == summary.samples
    assert {path for path in tmp_path.rglob("*") if "escaped" in path.name} == set()
    cache = ShardCache(tmp_path / "shards", 1000)
    with cache.open("../../escaped", 5, lambda file: file.write(b"hello")) as file:
        assert file.read() == b"hello"
    assert not Path("/tmp/escaped.txt").exists() and not list(tmp_path.glob("escaped*"))


def test_an_archive_that_claims_a_huge_member_takes_no_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0.jpg")
    header.size = HUGE
    (tmp_path / "0.tar").write_bytes(header.tobuf() + b"short")
    files = expand_shards("0.tar", str(tmp_path), "k", ShardStore(Config().storage))
    with no_room():
        (summary,) = summarise(files)
        read = list(read_samples(files[0], 0, summary.samples))
    assert not any(sample.members for sample in read)
