"""The benchmarks measure what they say: the loader's on a few small pictures, the others on a few pairs."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import loss, loss_modes, mfu, step, towers
from benchmarks.loader_shards import ImageSet, make_shards
from benchmarks.loader_side import Job, measure, rates
from benchmarks.loss_sides import errors, peak_bytes, sides
from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.errors import ConfigError
from clipscale.models import build_model

TINY = ImageSet("tiny", 64, 48, 3000, 24, 2)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("bench")
    make_shards(root, None, TINY)
    return Job("clipscale", "first", str(root), TINY.pattern, TINY.samples, batch=8, turn=2, epochs=2)


def test_the_shards_are_as_large_as_asked(job: Job) -> None:
    lengths = []
    for path in sorted(Path(job.root).glob("tiny-*.tar")):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            assert len(names) == 12 * 3 and {name.rpartition(".")[2] for name in names} == {"jpg", "txt", "json"}
            lengths += [member.size for member in archive if member.name.endswith("jpg")]
            file = archive.extractfile(names[0])
            assert file is not None and Image.open(file).size == (64, 48)
    assert np.mean(lengths) == pytest.approx(TINY.file_bytes, rel=0.1)


def test_clipscales_side_of_every_measure(job: Job) -> None:
    first = measure(job)
    assert first["again"] == 0 and first["read_bytes"] > 12 * TINY.file_bytes
    # 8 streams of 3 samples: after a batch each stands one into its window, after three at the start of the next.
    assert measure(Job(**vars(job) | {"skip": 1}))["again"] == 8
    assert measure(Job(**vars(job) | {"skip": 3}))["again"] == 0
    memory = measure(Job(**vars(job) | {"measure": "memory"}))["resident_mb"]
    assert len(memory) == 2 and all(process > 0 for process, _ in memory)
    for floats in (False, True):
        answer = rates(Job(**vars(job) | {"measure": "rate", "floats": floats}))()
        assert answer["per_s"] > 0 and answer["per_cpu_s"] > 0


def test_the_losses_are_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = [{"loss": name, "pairs": 64, "peak_bytes": 1 + peak_bytes(name, 64, 16)} for name in sides()]
    found = {"time": loss.times(64, 16, rounds=2), "memory": taken}
    assert all(row["cpu_s"] > 0 for row in found["time"])
    assert [row["loss"] for row in found["time"] if "ratio" in row] == ["clip", "clip, 256 MB of tiles", "siglip"]
    loss.show(found | {"precision": [{"scale": 14.3, "pairs": 64, **errors(64, 16, 14.3)}]})
    assert "relative errors" in capsys.readouterr().out
    loss.plot(found, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def test_ours_is_held_against_the_truth_on_the_same_features() -> None:
    found = errors(64, 16, 14.3)
    assert max(found["clipscale fp32"]) < 1e-5 < min(found["clipscale bf16 features"][:2])


def test_the_modes_are_held_against_the_truth(pool2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pool2.run(loss_modes.on_rank, number)[0] for number in range(len(loss_modes.modes()))]
    for row in rows:
        found = [row["cosine"], row["norm_ratio"], row["scale_ratio"]]
        assert np.isfinite(found).all()
        assert not row["mode"].startswith("clipscale") or found == pytest.approx([1, 1, 1], abs=1e-9)
    loss_modes.show(rows)
    assert capsys.readouterr().out.count("clipscale") == 4


def test_the_towers_are_of_the_same_sizes() -> None:
    config = load_group("model", "tiny", Model)
    ours = sum(p.numel() for p in build_model(config).parameters())
    assert sum(p.numel() for p in towers.peer(config).parameters()) == ours
    assert towers.draw_lengths(10_000, 77).float().mean() == pytest.approx(17, abs=0.5)
    assert [row["tower"] for row in towers.measure(config, 4, rounds=1)] == ["text", "image"]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_both_sides_make_the_same_steps(precision: str) -> None:
    config = step.configure("tiny", 4, f"precision={precision}")
    sides, pairs = step.Sides.of(config), step.Pairs.draw(config.model, 4, "laion")
    first = sides.losses(pairs)
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    row = step.measure(sides, pairs, rounds=1)
    assert min(row[side] for side in ("ours", "theirs", "fused")) > 0
    assert row["ceiling"] > step.ceiling(config.model, step.Pairs.draw(config.model, 4, "full").batch) > 1
    now = sides.losses(pairs)
    assert now[0] < first[0] and now[1] < first[1]  # two steps of ours, four of theirs
    step.show("tiny", precision, "laion", pairs, row)


def test_utilisation_is_written_into_its_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "mfu.md"
    document.write_text(f"How.\n\n{mfu.HEADING}\n\nold\n")
    arguments = ["--device", "cpu", "--models", "tiny", "--most", "8", "--steps", "1", "1"]
    arguments += ["--sides", "clipscale", "open_clip"]
    assert mfu.main(arguments) == 2
    assert "--peak-tflops" in capsys.readouterr().err
    assert mfu.main([*arguments, "--peak-tflops", "0.1", "--write", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("How.") and "old" not in text and "aten::mm" in text
    assert [line.split("|")[2].strip() for line in text.splitlines() if "`tiny` |" in line] == [
        "clipscale",
        "open_clip",
    ]


def test_peaks_of_devices() -> None:
    assert mfu.peak_of("NVIDIA H200", None) == mfu.peak_of("NVIDIA H100 80GB HBM3", None) == 989
    assert mfu.peak_of("NVIDIA A100-SXM4-80GB", None) == 312 and mfu.peak_of("NVIDIA A100-SXM4-80GB", 100) == 100
    assert mfu.peak_of("NVIDIA H100 PCIe", None) == 756 and mfu.peak_of("NVIDIA L40S", None) == 362
    with pytest.raises(ConfigError, match="Quadro: its peak is not known"):
        mfu.peak_of("Quadro", None)
