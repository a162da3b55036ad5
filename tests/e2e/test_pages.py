"""Every command of the pages that needs no cluster and nothing from elsewhere runs as it stands there, on small data.

Pages whose commands need data of their own kind have their own tests; those commands are only parsed here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copytree, rmtree

import pytest
from braceexpand import braceexpand
from PIL import Image
from typer.testing import CliRunner

from clipscale.cli import app
from clipscale.config import compose
from tests.runs import run_here
from tests.shards import jpeg, write_shard

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("evaluating", "auditing", "explaining", "searching", "packing", "mistakes", "search_page", "finetune")
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.stem not in ELSEWHERE)]
BEYOND = {
    r"cluster=(node8|gpu1|slurm|k8s)|launcher=submitit|ray\b": "GPUs or a cluster",
    r"s3://|open_clip:|hf:|=lit\b|tracking=online": "a bucket, a hub or a tracker",
    r"global_batch_size=32768": "much memory",
    r"cluster=cpu2": "two processes, which test_train.py starts",
    r"winoground|sugarcrepe": "others' data, in whose layouts test_composition.py writes some",
    r"teachers": "the shard that its page makes, which test_embeddings.py reads",
    r"serve ": "no end",
    r"clipscale doctor|plan.*--measure": "the machine that is meant",
}
PLANNED = r"clipscale (plan|launch)(?!.*--measure)"  # what such a command tells needs nothing of what it plans
SMALL = {
    "train": [
        "model=tiny", "model.context_length=16", "model.vision.image_size=32", "global_batch_size=16",
        "total_samples=32", "schedule.warmup_samples=0", "data.workers=0", "data.shapes.train=128",
        "data.shapes.val=32", "data.shapes.classes=24", "data.shapes.per_class=1", "data.shapes.image_size=32",
        "precision=fp32", "eval.every_samples=null", "checkpoint.every_samples=null", "tracking.mode=disabled",
    ],
    "data": ["-j", "1"],
    "launch": ["--print"],
}  # fmt: skip
NAMES = ("circle", "star")


def blocks() -> Iterator[tuple[str, list[str]]]:
    """The lines of each block that a test can run."""
    for page in PAGES:
        found = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL)
        for number, block in enumerate(found):
            lines = block.replace("\\\n", " ").splitlines()
            usable = [line for line in lines if re.match(r"clipscale |for model", line) and not beyond(line)]
            if usable:
                yield f"{page.stem}-{number}", usable


def beyond(line: str) -> bool:
    """Whether a line needs what a test does not have."""
    return not re.match(PLANNED, line) and any(re.search(pattern, line) for pattern in BEYOND)


@cache
def sample(number: int) -> dict[str, bytes]:
    """An image, its class, and captions."""
    caption = f"a {NAMES[number % 2]} of {number} stripes"
    fields = {"captions": [caption], "name": NAMES[number % 2], "label": number % 2, "similarity": 0.3 + number / 9}
    members = {"jpg": jpeg(number, 208), "txt": caption.encode(), "cls": str(number % 2).encode()}
    return members | {"json": json.dumps(fields).encode()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody trained."""
    place = tmp_path_factory.mktemp("runs")
    run_here(*SMALL["train"], f"runs_dir={place}", "name=demo", "checkpoint.every_samples=16")
    return place


@pytest.fixture
def home(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs, folders of pictures by class, and the small files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("runs").mkdir()
    for name in ("demo", "mine", "other", "before", "between", "short", "b32"):
        copytree(runs / "demo", Path("runs", name), copy_function=os.link)
    config = Path("runs", "other", "config.yaml").read_text()
    Path("runs", "other", "config.yaml").unlink()
    Path("runs", "other", "config.yaml").write_text(config.replace("lr: 0.001", "lr: 0.0003"))
    for folder in ("pictures", "held-out", "sketches"):
        for number in range(12):
            path = Path(folder, NAMES[number % 2], f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (20 * number, 90, 255 - 20 * number)).save(path)
    Path("candidates").symlink_to("pictures/star")
    Path("picture.png").symlink_to("pictures/star/1.png")
    Path("tones.csv").write_text("key,group\n" + "".join(f"{NAMES[n % 2]}/{n}.png,{n % 3}\n" for n in range(12)))
    for folder in (Path(), Path("data")):
        Path(folder, "classes.json").write_text(json.dumps({"classnames": NAMES, "templates": ["a photo of a {}."]}))
    Path("concepts.txt").write_text("\n".join(NAMES))
    Path("report").mkdir()
    Path("report", "bad_samples.csv").write_text("shard,key\n00000.tar,000001\n")
    return tmp_path


def stage(words: list[str]) -> None:
    """Write the shards that a command names, or its recipe, where nothing made them."""
    named = [word.partition("=")[2] if re.match(r"[\w.]+=", word) else word for word in words]
    root = next((word.removeprefix("data.root=") for word in words if word.startswith("data.root=")), "")
    if words[0] == "train" and root:
        data = compose([word for word in words[1:] if "=" in word and "," not in word])[0].data
        for shards in (data.train.shards, data.val.shards, data.zeroshot.shards):
            named += [shards] if isinstance(shards, str) else shards or []
    for value in named:
        for path in (Path(root, name) for name in braceexpand(value) if name.endswith(".tar")):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                first = 0 if "train" in path.name else 4  # what is held out is not what is trained on
                write_shard(path, [(f"{number:06d}", sample(number)) for number in range(first, first + 4)])


def commands(line: str, steps: list[str]) -> list[str]:
    """What a line of the shell runs, with the names that a reader puts in."""
    places = {r"/data(/[a-z0-9]+(?= |$|/))?": "data", "/SHARED/": "", r"\bDIR\b": "data", r"\bRUN\b": "runs/demo"}
    for there, here in (places | {"step_00001000": steps[0], "step_00002000": steps[1]}).items():
        line = re.sub(there, here, line)
    loop = re.fullmatch(r"for model in (\S+); do (.*); done", line)
    if loop is None:
        return [line.partition(" && ")[0]]
    return [loop[2].replace("$model", str(path)) for path in sorted(Path().glob(loop[1]))]


@pytest.mark.parametrize("lines", [pytest.param(lines, id=name) for name, lines in blocks()])
def test_the_block_runs(home: Path, lines: list[str]) -> None:
    steps = sorted(path.name for path in Path("runs/demo/checkpoints").iterdir())
    for line in lines:
        for command in commands(line, steps):
            words = shlex.split(command, comments=True)[1:]
            stage(words)
            if words[0] == "train":
                train(words[1:])
                continue
            result = CliRunner().invoke(app, [*words, *SMALL.get(words[0], [])])
            assert result.exit_code == 0, f"{command}: {result.output or result.exception}"


def train(words: list[str]) -> None:
    """On small data, from weights that are here, and as a run of its own."""
    fetched = "experiment=finetune_classifier" in words
    for name in (word for word in words if word.startswith("name=")):
        rmtree(Path("runs", name.removeprefix("name=")), ignore_errors=True)
    run_here(*words, *SMALL["train"], *(["init.weights=runs/demo"] if fetched else []))


def test_a_classifier_is_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lines,) = [lines for name, lines in blocks() if name == "finetuning-2"]
    test_the_block_runs(home, lines)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "finetuning.md").read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() in NAMES
