"""Real commands, as a user would type them: train, be killed, resume, resize, use."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clipscale
from clipscale.cli import app
from clipscale.data.manifest import ShardFile
from clipscale.data.stream import read_samples
from tests.runs import command, keys, kill_everything, losses, rows, run, run_here
from tests.shards import STORE, jpeg, write_shards

BATCH, STEPS = 32, 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    captions = {"json": b'{"captions": ["a thing"]}'}
    bad = {5: captions | {"jpg": b"broken"}, 90: captions}
    write_shards(root, [60, 45, 70], bad)
    write_shards(root / "val", [40])
    classes = {
        "classnames": [f"thing {i}" for i in range(7)],
        "templates": ["a {}", "the {}"],
        "baselines": {"luck": 0.2},
    }
    (root / "classes.json").write_text(json.dumps(classes))
    return root


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that steps in milliseconds, on data with two bad samples."""
    return [
        f"runs_dir={tmp_path_factory.mktemp('runs')}", "data=shards", f"data.root={data}",
        "data.train.shards={00000..00002}.tar", "data.val.shards=val/00000.tar", "data.val.group_key=json:name",
        "data.zeroshot.shards=val/00000.tar", "data.zeroshot.classes=classes.json", "data.caption_key=json:captions",
        "data.workers=1", "data.trace=true", "tracking=disabled", "tracking.log_every_steps=1",
        f"global_batch_size={BATCH}", f"total_samples={BATCH * STEPS}", "schedule.warmup_samples=64",
        "checkpoint.every_samples=128", "eval.every_samples=512", "ema.decay=0.9",
        "model.vision.image_size=16", "model.vision.patch_size=8", "model.vision.width=32", "model.vision.layers=2",
        "model.vision.heads=2", "model.text.width=32", "model.text.layers=1", "model.text.heads=2",
        "model.embed_dim=16", "model.context_length=12",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(recipe: list[str]) -> tuple[Path, str]:
    """The run that the others must equal."""
    output = run(*recipe, "name=undisturbed")
    return Path(recipe[0].removeprefix("runs_dir=")) / "undisturbed", output


def assert_equal_runs(path: Path, truth: Path, bound: float) -> None:
    ours, theirs = losses(path), losses(truth)
    assert list(ours) == list(theirs) == [BATCH * (i + 1) for i in range(STEPS)]
    for seen, loss in theirs.items():
        assert ours[seen] == pytest.approx(loss, abs=bound), seen
    assert keys(path) == keys(truth)


def test_a_run_leaves_what_it_should(undisturbed: tuple[Path, str], data: Path) -> None:
    path, output = undisturbed
    for name in (
        "config.yaml",
        "overrides.txt",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "examples.json",
        "report.html",
        "logs/rank0.log",
    ):
        assert (path / name).stat().st_size, name
    result = json.loads((path / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("done", 0)
    spent = {key: value for key, value in result["metrics"].items() if key.startswith("time/") and key.endswith("_s")}
    assert sum(spent.values()) == pytest.approx(2 * spent["time/wall_s"], abs=0.1), "every second has a name"
    assert 0 < result["metrics"]["time/goodput"] < 1
    asked = json.loads((path / "examples.json").read_text())
    assert len(asked["retrieval"]) == 8 and asked["samples_seen"] == BATCH * STEPS
    assert len(asked["confusion"]["classes"]) == 7
    last = rows(path)[-1]
    for key in ("val/loss", "val/retrieval/i2t_r1", "val/retrieval/t2i_r10", "val/zeroshot/top5"):
        assert key in last
        assert key == "val/loss" or f"{key}_chance" in last
    assert last["val/zeroshot/top1_luck"] == 0.2
    for text in ("zeroshot/top1", "chance", "what luck would score", "undecodable_image", "no_image"):
        assert text in output
    seen = [key for batch in keys(path).values() for key in batch]
    times = Counter(seen)
    assert len(times) == 173, "every usable sample is seen"
    # A stream that passes over a bad sample runs a little ahead of the others.
    assert max(times.values()) - min(times.values()) <= 2, "and as often as any other"
    assert not {"00000.tar/000005", "00001.tar/000090"} & set(seen)


def test_the_trained_model_can_be_used(undisturbed: tuple[Path, str]) -> None:
    path, _ = undisturbed
    model, preprocess, tokenizer = clipscale.load(path)
    image = model.encode_image(preprocess(Image.new("RGB", (50, 20), "red"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a red thing", "a blue thing"]), normalize=True)
    assert (image @ text.T).shape == (1, 2)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


def test_eval_repeats_the_last_numbers(undisturbed: tuple[Path, str]) -> None:
    path, _ = undisturbed
    done = subprocess.run(
        [sys.executable, "-m", "clipscale.cli", "eval", str(path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    again, last = json.loads(done.stdout), rows(path)[-1]
    for key, value in again.items():
        assert value == pytest.approx(last[key], abs=1e-6), key


def test_a_finished_run_says_so(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    assert "nothing to do" in run(*recipe, "name=undisturbed")


def test_two_processes_equal_one(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    run(*recipe, "name=two", "cluster=cpu2", "parallel=ddp")
    assert_equal_runs(undisturbed[0].with_name("two"), undisturbed[0], 1e-4)


def test_microbatches_equal_whole_batches(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    output = run(*recipe, "name=cached", "optim.microbatches=auto", "optim.max_microbatch=9")
    assert "in batches of 32, 4 microbatches on each process" in output
    assert_equal_runs(undisturbed[0].with_name("cached"), undisturbed[0], 1e-4)


def test_microbatches_that_cannot_be_are_one_line(recipe: list[str]) -> None:
    assert "error: optim.microbatches=33 is more than" in run_here(
        *recipe, "name=many", "optim.microbatches=33", expect=2
    )
    sizes = [f"model.vision.{key}=null" for key in ("patch_size", "width", "layers", "heads")]
    refused = run_here(*recipe, "name=norm", "model.vision.timm=resnet18", *sizes, "optim.microbatches=2", expect=2)
    assert "error: optim.microbatches=2: BatchNorm" in refused


def test_torchrun_by_hand(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "clipscale.train", *recipe, "name=by-hand", "parallel=fsdp", "data.workers=0"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed[0].with_name("by-hand"), undisturbed[0], 1e-4)


@pytest.mark.slow
def test_killed_and_resumed_on_other_world_sizes(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    """kill -9 of everything at random steps, each time resumed on another number of processes."""
    path = undisturbed[0].with_name("killed")
    draw = random.Random(0)
    for attempt, world in enumerate([1, 2, 1]):
        process = subprocess.Popen(
            command(*recipe, "name=killed", f"cluster.processes_per_node={world}"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        goal = BATCH * (15 * attempt + draw.randint(2, 15))
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (path / "metrics.jsonl").exists() and max(losses(path), default=0) >= goal:
                break
            time.sleep(0.02)
        kill_everything(process, path)
    run(*recipe, "name=killed", "cluster=cpu2", "parallel=fsdp")
    assert_equal_runs(path, undisturbed[0], 1e-4)


@pytest.mark.parametrize(
    ("world", "number"),
    [(1, signal.SIGINT), pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow), (2, signal.SIGTERM)],
)
def test_asked_to_stop_it_saves_and_goes_on(
    undisturbed: tuple[Path, str], recipe: list[str], world: int, number: signal.Signals
) -> None:
    path = undisturbed[0].with_name(f"stopped-{world}-{number.name}")
    arguments = [
        *recipe,
        f"name={path.name}",
        f"cluster.processes_per_node={world}",
        "checkpoint.every_samples=null",
    ]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (path / "metrics.jsonl").exists() and losses(path):
            break
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped at" in output and "Traceback" not in output
    assert json.loads((path / "result.json").read_text())["status"] == "preempted"
    run_here(*arguments, "cluster.processes_per_node=1")
    assert_equal_runs(path, undisturbed[0], 1e-4)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_too_many_bad_samples_stop_the_run(recipe: list[str], world: int) -> None:
    name = f"budget-{world}"
    short = [*recipe, f"name={name}", f"cluster.processes_per_node={world}", "total_samples=320"]
    output = run(*short, "data.max_bad_fraction=0.001", expect=4)
    path = Path(recipe[0].removeprefix("runs_dir=")) / name
    assert "more than data.max_bad_fraction=0.001" in output and "worst shards: " in output
    result = json.loads((path / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 4)
    listed = [json.loads(line) for file in (path / "bad_samples").iterdir() for line in file.read_text().splitlines()]
    assert {row["key"].partition("/")[0] for row in listed} <= {"00000.tar", "00001.tar", "00002.tar"}
    assert all(row["reason"] and row["attempt"] == 1 and row["samples_seen"] for row in listed) and listed
    if world == 1:
        output = run(*short, "data.max_bad_fraction=null", "data.max_bad_fraction_per_shard=0.001", expect=4)
        assert "samples read of shard 0000" in output and "data.max_bad_fraction_per_shard=0.001" in output
    other = [*short, "data.max_bad_fraction=null", "cluster.processes_per_node=1"]
    assert "done: " in run_here(*other), "the same run goes on under another limit"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["data.train.shards=/nowhere/{0..3}.tar"], "4 of 4 shards do not exist, first /nowhere/0.tar"),
        (["data.train.shards=[]"], "data.train.shards is empty"),
        (["data.streams=7"], "data.streams=7 does not divide global_batch_size=32"),
        (["name=undisturbed", "seed=9"], "seed: 0 in the run, 9 now"),
        (["tokenizer.context_length=99"], "model.context_length=99"),
        (["model.text.vocab_size=100"], "use model.text.vocab_size=49408"),
        (["cluster=slurm"], "use `clipscale launch`"),
        (["data.val.group_key=json:colour"], "none of the 40 samples can be used (40 x no_colour)"),
        (["data.zeroshot.label_key=json:captions"], "40 x label_is_no_number"),
        (["runs_dir=/proc/nowhere"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    undisturbed: tuple[Path, str], recipe: list[str], overrides: list[str], message: str
) -> None:
    output = run_here(*recipe, "name=mistake", *overrides, expect=2)
    assert message in output
    assert output.startswith("error: ")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody trained a short demo, and has two pictures."""
    place = tmp_path_factory.mktemp("demo")
    small = ["data.shapes.train=128", "data.shapes.val=32", "data.shapes.classes=24", "data.shapes.image_size=32"]
    run_here(
        f"runs_dir={place}/runs",
        "name=demo",
        "total_samples=256",
        "schedule.warmup_samples=0",
        "tracking=disabled",
        *small,
    )
    for name in ("picture.png", "other.png"):
        Image.new("RGB", (30, 20), "red").save(place / name)
    return place


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/data.md",
        "docs/packing.md",
        "docs/curating.md",
        "docs/inspecting.md",
        "docs/layouts.md",
        "docs/generalising.md",
        "docs/loss.md",
        "docs/models.md",
        "docs/planning.md",
        "docs/probing.md",
        "docs/surviving.md",
        "docs/watching.md",
        "docs/weights.md",
    ],
)
def test_the_examples_run(
    demo: Path, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    (demo / "cat.jpg").write_bytes(jpeg(1))
    monkeypatch.chdir(demo)
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out


@pytest.mark.parametrize("tutorial", ["search_page", "finetune"])
def test_a_tutorial_runs(demo: Path, tutorial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, from its own pictures on; but for the server, which would not end, and for a shorter run."""
    page = (ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text()
    monkeypatch.chdir(demo)
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ").splitlines()
    said = {}
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            assert "done: " in run_here(*words[1:], "tracking=disabled", "total_samples=640")
        else:
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            said[words[0]] = done.stdout
    if tutorial == "search_page":
        assert said["search"].count(".png") == 3, said
    else:
        assert "B: after" in said["results"] and (demo / "arrows-model" / "README.md").exists()


def test_eval_on_other_data(demo: Path, data: Path) -> None:
    """What was trained on the built-in scenes is measured on the user's pairs, and on these alone."""
    evaluate = [sys.executable, "-m", "clipscale.cli", "eval", str(demo / "runs" / "demo"), "--json"]
    other = [f"data.root={data}", "data.val.shards=val/00000.tar", "data.caption_key=json:captions"]
    done = subprocess.run([*evaluate, *other], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["val/retrieval/i2t_r1_chance"] == pytest.approx(1 / 40)
    assert not any("zeroshot" in key for key in measured)
    done = subprocess.run([*evaluate, "data.val.shards=null"], capture_output=True, text=True)
    assert all("zeroshot" in key for key in json.loads(done.stdout)), "the rest of the run's own data is still there"


def test_killed_in_an_evaluation_it_is_made_up_for(
    undisturbed: tuple[Path, str], recipe: list[str], tmp_path: Path
) -> None:
    """As after a kill between a checkpoint and the end of the evaluation that follows it."""
    path = undisturbed[0].with_name("unevaluated")
    shutil.copytree(undisturbed[0], path)
    kept = [json.dumps(row) for row in rows(path) if not ("val/loss" in row and row["step"] == STEPS)]
    (path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in kept))
    text = (path / "config.yaml").read_text().replace("undisturbed", "unevaluated")
    (path / "config.yaml").write_text(text)
    assert "done: " in run(*recipe, "name=unevaluated")
    again, before = rows(path)[-1], rows(undisturbed[0])[-1]
    assert again["val/loss"] == pytest.approx(before["val/loss"], abs=1e-6) and again["epoch"] == before["epoch"]
    assert len(rows(path)) == len(rows(undisturbed[0]))


def test_the_torchrun_script_starts_one_rank_without_gpus(tmp_path: Path) -> None:
    for name, body in (("python", 'echo "$@"'), ("nvidia-smi", "exit 9")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "launch" / "torchrun.sh"), "experiment=demo"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--standalone" in done.stdout and "--nproc-per-node=1" in done.stdout
    assert done.stdout.startswith("-m clipscale.launch.node ") and done.stdout.rstrip().endswith("-- experiment=demo")


def test_a_sweep_runs_every_job(recipe: list[str]) -> None:
    output = run(*recipe, "-m", "optim.lr=1e-3,1e-2", "total_samples=96")
    assert output.count("done: ") == 2
    head, *found = [line for line in output.splitlines() if line.strip()][-3:]
    assert head.split()[:2] == ["optim.lr", "val/retrieval/i2t_r1"]
    assert {line.split()[0] for line in found} == {"0.001", "0.01"}


def test_cfg_job_prints_and_trains_nothing(tmp_path: Path) -> None:
    output = run(f"runs_dir={tmp_path}/runs", "--cfg", "job")
    assert "global_batch_size: 128" in output
    assert not (tmp_path / "runs").exists()


def test_a_process_too_many_idles(undisturbed: tuple[Path, str], recipe: list[str]) -> None:
    output = run(*recipe, "name=spare", "cluster.processes_per_node=3", f"total_samples={BATCH * 10}")
    assert "1 of 3 processes idle: 32 streams" in output and "2 x cpu" in output
    traced = keys(Path(recipe[0].removeprefix("runs_dir=")) / "spare")
    assert traced == {step: names for step, names in keys(undisturbed[0]).items() if step <= 10}


def test_a_table_trains_without_packing(recipe: list[str], data: Path, tmp_path: Path) -> None:
    rows = ["image,caption"]
    for number, one in enumerate(read_samples(ShardFile(STORE, str(data / "val" / "00000.tar")), 0, 40)):
        (tmp_path / f"{number}.jpg").write_bytes(one.members["jpg"])
        rows.append(f'{number}.jpg,"{one.members["txt"].decode()}"')
    (tmp_path / "pairs.csv").write_text("\n".join([*rows, "nowhere.jpg,lost"]))
    table = [*recipe, "name=table", f"data.root={tmp_path}", "data.train.shards=pairs.csv", "data.caption_key=txt"]
    output = run_here(*table, "data.val.shards=null", "data.zeroshot.shards=null", f"total_samples={BATCH * 4}")
    assert "data 41 samples" in output and "missing_image" in output
    traced = keys(Path(recipe[0].removeprefix("runs_dir=")) / "table")
    seen = Counter(key for names in traced.values() for key in names)
    assert set(seen) == {f"pairs.csv/{number}" for number in range(40)} and max(seen.values()) - min(seen.values()) <= 1


def test_synthetic_data(recipe: list[str]) -> None:
    kept = [
        one for one in recipe if not one.startswith(("data=", "data.root", "data.train", "data.val", "data.zeroshot"))
    ]
    output = run_here(
        *kept, "data=synthetic", "name=synthetic", f"total_samples={BATCH * 4}", "data.synthetic.samples=100"
    )
    assert "done: " in output and "data 100 samples" in output
