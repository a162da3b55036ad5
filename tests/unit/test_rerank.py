"""Images in the order of a caption; and what docs/searching.md shows, run as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipscale
from clipscale.apps.rerank import draw_sheet, print_ranking, rerank
from clipscale.cli import app
from clipscale.errors import ConfigError, DataError
from tests.shards import jpeg
from tests.unit.test_export import SMALL_TEXT, make_run

PAGE = Path(__file__).parents[2] / "docs" / "searching.md"
CAPTION = "a red circle"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run and some pictures, as the page has them."""
    root = tmp_path_factory.mktemp("home")
    make_run(root / "made", "model=tiny", "model.vision.layers=1", *SMALL_TEXT)
    (root / "runs").mkdir()
    (root / "made" / "run").rename(root / "runs" / "mine")
    (root / "pictures" / "more").mkdir(parents=True)
    for number, name in enumerate(("one.png", "two.png", "more/three.png", "four.webp")):
        shade = (60 * number, 200 - 50 * number, 90)
        Image.new("RGB", (40 + 30 * number, 50), shade).save(root / "pictures" / name)
        (root / "pictures" / name).with_suffix(".txt").write_text(f"picture {number}")
    return root


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_the_order_is_that_of_the_cosines(place: Path) -> None:
    model, preprocess, tokenizer = loaded = clipscale.load("runs/mine")
    pictures = [Image.open(path) for path in sorted(place.rglob("*.png"))] * 30  # more than a batch, with many ties
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(one) for one in pictures]), normalize=True)
        cosines = (images @ model.encode_text(tokenizer([CAPTION]), normalize=True)[0]).tolist()
    found = clipscale.rerank(loaded, CAPTION, pictures)
    assert not found.unusable and len(found.ranked) == 90
    expected = sorted(range(3), key=lambda i: -cosines[i])
    assert [one.number for one in found.ranked] == [i + 3 * turn for i in expected for turn in range(30)]
    assert [one.score for one in found.ranked] == pytest.approx(
        [cosines[i] for i in expected for _ in range(30)], abs=1e-6
    )
    assert found.ranked[0].image is pictures[expected[0]]
    by_files = rerank(loaded, CAPTION, sorted(place.rglob("*.png")))
    assert [one.number for one in by_files.ranked] == expected, "files as pictures"


def test_what_cannot_be_used_is_listed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = tmp_path / "good.jpg", tmp_path / "[b]roken.png"
    good.write_bytes(jpeg(1))
    broken.write_bytes(b"no image")
    print_ranking("runs/mine", CAPTION, [tmp_path], None, tmp_path / "sheet.png", "cpu", True)
    told = json.loads(capsys.readouterr().out)
    assert told["unusable"] == [{"image": str(broken), "reason": "undecodable_image"}]
    assert [(one["rank"], one["image"]) for one in told["ranked"]] == [(1, str(good))] and told["caption"] == CAPTION
    print_ranking("runs/mine", CAPTION, [good, broken], None, None, "cpu", False)
    unwrapped = re.sub(r"[\s│]", "", capsys.readouterr().out)
    assert f"{broken}:undecodable_image" in unwrapped, "a name is no markup"
    with pytest.raises(DataError, match="none of the 1 images can be used"):
        print_ranking("runs/mine", CAPTION, [broken], None, None, "cpu", False)


@pytest.mark.parametrize(
    ("images", "changed", "message"),
    [
        ([], {"caption": "  "}, "the caption is empty"),
        (["pictures/none.png"], {}, "pictures/none.png does not exist"),
        (["runs/mine/checkpoints"], {}, "holds no images"),
        (["pictures"], {"model": "runs/none"}, "runs/none does not exist"),
        (["pictures"], {"sheet": Path("sheet.txt")}, r"--sheet sheet.txt: name a .png"),
        (["pictures"], {"device": "tpu"}, "--device tpu: choose from"),
    ],
)
def test_mistakes_are_one_line(images: list[str], changed: dict[str, Any], message: str) -> None:
    given = {"model": "runs/mine", "caption": CAPTION, "top": None, "sheet": None, "device": "cpu", "as_json": True}
    with pytest.raises((ConfigError, DataError), match=message):
        print_ranking(images=[Path(image) for image in images or ["pictures"]], **given | changed)  # type: ignore[arg-type]


def test_a_sheet_holds_the_images_in_their_order(tmp_path: Path) -> None:
    colours = [(number * 20, 0, 255) for number in range(7)]
    pictures = [Image.new("RGB", (300, 100 + number), colour) for number, colour in enumerate(colours)]
    found = rerank(clipscale.load("runs/mine"), CAPTION, pictures)
    draw_sheet(tmp_path / "sheet.png", "a very long caption " * 30, found.ranked)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (5 * 204 + 12, 2 * 230 + 50)
    for place, one in enumerate(found.ranked):
        assert sheet.getpixel((108 + place % 5 * 204, 134 + place // 5 * 230)) == colours[one.number]


def test_what_the_page_shows_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ran = 0
    for line in lines:
        words = shlex.split(line)
        if words[1:3] == ["search", "serve"]:
            continue  # it would not end; its own tests start it
        more = ["-j", "1"] if words[1] == "embed" or words[2] == "build" else []
        app([*words[1:], *more], standalone_mode=False)
        ran += 1
    assert ran == 5 and (place / "best.png").is_file()
    assert "4" in capsys.readouterr().out
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "4 float32" and "pictures/one.png" in said[1]
