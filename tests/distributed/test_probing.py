"""What two ranks measure together is what one measures, to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipscale.apps.probing.composition import composition
from clipscale.apps.probing.generalise import Options as Gap
from clipscale.apps.probing.generalise import generalise
from clipscale.apps.probing.probe import Options, probe
from clipscale.data.compositions import PAIRS, write_compositions
from tests.pool import Pool
from tests.shards import write_shards


def measured(model: str, data: str, out: str) -> list[Any]:
    torch.set_num_threads(1)
    train, test = f"{data}/train", f"{data}/test"
    return [
        probe(model, train, test, Options(), "cpu", 16, True),
        generalise(model, train, test, Path(out), Gap(text_key="json:name", most=5), "cpu", 16, True),
        composition(model, [f"{data}/questions/{PAIRS}"], None, "cpu", 16, True),
    ]


def test_two_ranks_are_one(pool2: Pool, tiny_model: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [30, 21])
    write_shards(tmp_path / "test", [19])
    write_compositions(tmp_path / "questions", per_kind=5, image_size=32)
    threads = torch.get_num_threads()
    alone = measured(str(tiny_model), str(tmp_path), str(tmp_path / "one"))
    torch.set_num_threads(threads)
    first, second = pool2.run(measured, str(tiny_model), str(tmp_path), str(tmp_path / "two"))
    assert first == alone
    assert second[:2] == [{}, {}] and second[2] == alone[2], "one rank writes, all know the scores"
    for name in ("neighbours.csv", "report.html", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
