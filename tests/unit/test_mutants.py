"""The tests of the order notice: each mutation of the data plane makes them fail, and the untouched copy passes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PROPERTIES = "tests/unit/test_exact.py"


class Mutant(NamedTuple):
    """``old``, found exactly once in ``clipscale/data/<file>``, becomes ``new``; ``breaks`` says what is wrong then."""

    file: str
    old: str
    new: str
    breaks: str


WINDOW = "self.seed, epoch, stream, number)"
MUTANTS = [
    Mutant("order.py", "self.streams - 1 - stream)", "self.streams - stream)", "an epoch begins one sample off"),
    Mutant("order.py", WINDOW, "self.seed, stream, number)", "windows shuffled alike in every epoch"),
    Mutant("order.py", WINDOW, "self.seed, epoch, number)", "windows shuffled alike in every stream"),
    Mutant("order.py", WINDOW, "self.seed, epoch, stream)", "windows of a segment shuffled alike"),
    Mutant(
        "order.py",
        "pieces = [pieces[i] for i in permutation(len(pieces), self.seed, epoch)]",
        "__import__('random').shuffle(pieces)",
        "shards shuffled by Python's random",
    ),
    Mutant("order.py", "permutation(len(pieces), self.seed, epoch)", "range(len(pieces))", "shards not shuffled"),
    Mutant("order.py", "self.seed, source, number, 1)", "self.seed, source, 0, 1)", "passes over a source all alike"),
    Mutant("order.py", "int(epoch * w * n)", "epoch * int(w * n)", "fractions of a weight do not rotate"),
    Mutant("order.py", "begin = piece.stop - (end - start)", "begin = piece.start", "a split shard begins anew"),
    Mutant(
        "order.py",
        "begin, begin + taken)",
        "begin, begin + taken - (end > stop))",
        "the last sample of a split piece is dropped",
    ),
    Mutant(
        "order.py",
        "lengths = [self.stream_start(epoch + 1, v) - self.stream_start(epoch, v)",
        "lengths = [self.stream_start(1, v)",
        "segments cut as in the first epoch",
    ),
    Mutant("stream.py", "range(position - window.start,", "range(0,", "a resume starts at its window's start"),
    Mutant("stream.py", "position = following, upcoming,", "position = following, held,", "the held window is kept"),
    Mutant("stream.py", "int(window.permutation[offset])", "offset", "windows not shuffled"),
    Mutant(
        "stream.py",
        "int(window.permutation[offset])",
        "window.permutation.tolist().index(offset)",
        "windows shuffled the other way round",
    ),
    Mutant("stream.py", 'parts, problem = {}, ""', "parts = {}", "after a sample with a problem, all have it"),
    Mutant("prepare.py", "KeyedRandom(options.seed, stream, position)", "KeyedRandom(options.seed, position)",
           "crops and captions alike in all streams"),
    Mutant(
        "prepare.py",
        "KeyedRandom(options.seed, stream, position) for stream, position, _ in raw",
        "KeyedRandom(options.seed, row, position) for row, (_, position, _) in enumerate(raw)",
        "crops and captions keyed by the place in a worker's batch",
    ),
    Mutant(
        "prepare.py",
        "KeyedRandom(options.seed, stream, position)",
        "KeyedRandom(options.seed + getattr(torch.utils.data.get_worker_info(), 'id', 0), stream, position)",
        "crops and captions keyed by the worker",
    ),
    Mutant(
        "loader.py",
        "positions[i] = position + 1",
        "positions[i] += not isinstance(result, BadSample)",
        "the position not advanced on a bad sample",
    ),
    Mutant("loader.py", "range(self.per_stream - len(good))", "range(self.per_stream - len(good) - len(bad))",
           "a stream is not refilled after a bad sample"),
    Mutant("prepare.py", "content_digest(data)", "content_digest(samples[i].key.encode())",
           "image ids of the keys, not of the bytes"),
    Mutant("samples.py", "[content_digest(ids.", "[content_digest(ids[:4].", "caption ids of the first tokens alone"),
    Mutant("loader.py", "join([p.caption_ids for p in parts])", "parts[0].caption_ids.repeat(len(parts))",
           "caption ids of the first part alone"),
    Mutant("prepare.py", "return _Drawn(stored[place], place,", "return _Drawn(stored[place], places.index(place),",
           "the teacher's caption is counted among the usable ones"),
    Mutant("prepare.py", "images, texts = zip(", "texts, images = zip(", "a teacher's images and captions swapped"),
    Mutant("loader.py", "join(list(texts))", "join(list(texts)[::-1])",
           "the parts' embeddings of captions joined in the wrong order"),
    Mutant("loader.py", "concatenate(parts, self._pin_memory)", "concatenate(parts[::-1], self._pin_memory)",
           "the workers' parts joined in the wrong order"),
    Mutant("loader.py", "[p.positions for p in parts]", "[p.positions.flip(0) for p in parts]",
           "positions of a rank's streams swapped"),
    Mutant("loader.py", "for p in parts for bad in p.bad]", "for p in parts[:1] for bad in p.bad]",
           "bad samples of the first part alone are told"),
    Mutant("loader.py", "array_split(np.arange(order.streams), world)[rank]", "arange(order.streams)[rank::world]",
           "streams dealt to ranks in turn"),
    Mutant("loader.py", "np.array_split(self.positions, workers)[number]", "self.positions[:len(streams)]",
           "every worker starts where the first one does"),
    Mutant("index.py", "member.data + member.size > size", "member.data > size", "a sample cut short is counted"),
    Mutant("index.py", "key is not None and key != last_key", "key is not None", "files counted, not samples"),
    Mutant("prepare.py", "places[random.below(len(places))]", "places[0]", "the first caption always"),
    Mutant("prepare.py", "in enumerate(stored) if caption]", "in enumerate(stored)]", "empty captions are drawn"),
    Mutant("prepare.py", "KeyedRandom(options.seed, stream, position, NEGATIVES)",
           "KeyedRandom(options.seed, position, NEGATIVES)", "negatives alike in all streams"),
    Mutant("prepare.py", "(prepared.ids, *prepared.negatives)", "(prepared.ids,)", "a negative comes twice"),
    Mutant("prepare.py", "(prepared.ids, *prepared.negatives)", "prepared.negatives", "the caption is a negative"),
    Mutant("prepare.py", "self._encode(texts.pop(random.below(len(texts))), random)",
           "self._encode(texts.pop(), random)", "the last negatives always"),
    Mutant("samples.py", "(*group, *[absent] * (most - len(group)))", "(*[absent] * (most - len(group)), *group)",
           "absent negatives come first"),
    Mutant("loader.py", "join([p.negative_ids for p in parts])", "join([p.negative_ids for p in parts[::-1]])",
           "the parts' negatives joined in the wrong order"),
    Mutant("samples.py", 'raise BadSample("no_image")', 'return b""', "a missing image under another reason"),
]  # fmt: skip
DRAWN = random.Random(9).sample(MUTANTS, 2)


def copy_to(directory: Path) -> Path:
    """A copy of what the tests of the order need."""
    for name in ("clipscale", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def properties_of(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of the order in a copy, up to the first failure."""
    arguments = ["-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", PROPERTIES]
    # Options of the outer run are not for this one: on several processes, -x ends with another code.
    environment = os.environ | {"PYTHONPATH": str(directory), "CLIPSCALE_SLOW": "0", "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )


def assert_killed(mutant: Mutant, directory: Path) -> None:
    path = copy_to(directory) / "clipscale" / "data" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    done = properties_of(directory)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{mutant.file:12} {mutant.breaks:60} {failed[0] if failed else 'SURVIVED'}")
    assert done.returncode == 1 and failed, f"nothing notices {mutant}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("mutant", DRAWN, ids=lambda mutant: mutant.breaks)
def test_a_drawn_mutant_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_every_mutant_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, tmp_path)


def test_every_mutation_still_applies() -> None:
    for mutant in MUTANTS:
        text = (ROOT / "clipscale" / "data" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}"


@pytest.mark.slow
def test_the_untouched_copy_passes(tmp_path: Path) -> None:
    done = properties_of(copy_to(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
