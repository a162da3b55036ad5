"""A pretrained model is fine-tuned as a classifier, resumed on other ranks, interpolated, evaluated, loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipscale
from clipscale.apps.evaluation.own import evaluate
from clipscale.apps.interpolate import interpolate
from clipscale.cli import start
from clipscale.config import compose, load_config, validate
from clipscale.config.model import Vision
from clipscale.config.rundir import open_run
from clipscale.data.tokenizer import build_tokenizer
from clipscale.distributed.collectives import rank, world_size
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ClipscaleError, ExitCode
from clipscale.evals import Classes
from clipscale.models import Classifier, build_model
from clipscale.parallel.batchnorm import takes_statistics
from clipscale.trainer.build import start_head
from clipscale.trainer.trainer import Trainer
from tests.runs import losses, rows
from tests.shards import jpeg, write_shard, write_shards

BATCH = 32
SMALL = [
    "model=tiny", "model.vision.image_size=16", "model.vision.patch_size=8", "model.vision.width=32",
    "model.vision.layers=2", "model.vision.heads=2", "model.text.width=32", "model.text.layers=1", "model.text.heads=2",
    "model.embed_dim=16", "model.context_length=12", "precision=fp32", "tracking=disabled",
    "tracking.log_every_steps=1", "data.workers=0", f"global_batch_size={BATCH}", "schedule.warmup_samples=0",
]  # fmt: skip
NAMES = ["plain thing", "odd thing", "red thing", "blue thing"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four classes of one picture each; two of the training samples have labels that are none."""
    root = tmp_path_factory.mktemp("data")
    members = [(f"{i:06d}", {"jpg": jpeg(i % 4), "cls": str(i % 4).encode()}) for i in range(96)]
    members[50][1]["cls"], members[61][1]["cls"] = b"4", b"none"
    write_shard(root / "train.tar", members)
    write_shard(root / "val.tar", members[:40])
    write_shards(root / "pairs", [64])
    (root / "classes.json").write_text(json.dumps({"classnames": NAMES, "templates": ["a {}", "the {}"]}))
    return [*SMALL, f"data.root={root}", f"runs_dir={tmp_path_factory.mktemp('runs')}"]


def place(recipe: list[str], name: str) -> Path:
    return Path(recipe[-1].removeprefix("runs_dir="), name)


def train(*overrides: str) -> None:
    config, experiment = compose(overrides)
    assert start(config, experiment, list(overrides))[0] == ExitCode.DONE


def tuning(recipe: list[str], *overrides: str) -> list[str]:
    return [
        "experiment=finetune_classifier", *recipe, f"init.weights={place(recipe, 'pretrained')}",
        "data.train.shards=train.tar", "data.zeroshot.shards=val.tar", "data.zeroshot.classes=classes.json",
        "data.label_key=cls", "data.zeroshot.label_key=cls", "optim.lr=3e-3", "checkpoint.every_samples=0",
        "eval.every_samples=0", "data.streams=4", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(recipe: list[str]) -> Path:
    train("data=shards", *recipe, "data.train.shards=pairs/00000.tar", f"total_samples={2 * BATCH}", "name=pretrained")
    return place(recipe, "pretrained")


@pytest.fixture(scope="module")
def tuned(recipe: list[str], pretrained: Path) -> Path:
    train(*tuning(recipe, f"total_samples={24 * BATCH}", "name=tuned"))
    return place(recipe, "tuned")


def test_it_learns(tuned: Path) -> None:
    last = rows(tuned)[-1]
    assert last["val/top1"] > 0.9 and last["val/top1_chance"] == 0.25
    assert last["val/top5"] == 1.0
    assert json.loads((tuned / "result.json").read_text())["objective"] == last["val/top1"]
    bad = [row for row in rows(tuned) if "train/bad_samples" in row][-1]
    assert bad["train/bad_samples/label_outside_classes"] and bad["train/bad_samples/label_is_no_number"]
    assert all("train/top1" in row for row in rows(tuned) if "train/loss" in row)


def test_what_it_leaves_classifies_and_still_reads_captions(tuned: Path, pretrained: Path) -> None:
    model, preprocess, tokenizer = clipscale.load(tuned)
    assert isinstance(model, Classifier) and model.config.classes == NAMES
    assert model.classify(preprocess(Image.new("RGB", (20, 30), "red"))[None]).shape == (1, 4)
    before = clipscale.load(pretrained)[0]
    captions = tokenizer(["a red thing", "a blue thing"])
    assert torch.equal(model.encode_text(captions), before.encode_text(captions))
    assert torch.equal(model.logit_scale, before.logit_scale)


def fit(path: Path) -> None:
    runtime = Runtime(rank(), world_size(), rank(), torch.device("cpu"))
    assert Trainer(load_config(path / "config.yaml"), runtime).fit() == ExitCode.DONE


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_the_same_steps_on_two_ranks_as_on_one(pool2: Any, recipe: list[str], pretrained: Path, layout: str) -> None:
    """Two ranks set the head, train, and one goes on."""
    alone = ["schedule=constant", "ema.decay=0.9", "optim.layer_decay=0.7"]
    moved = [*alone, f"name=moved-{layout}"]
    config, experiment = compose(tuning(recipe, *moved, f"parallel={layout}", f"total_samples={3 * BATCH}",
                                        "optim.microbatches=2"))  # fmt: skip
    pool2.run(fit, open_run(config, experiment, []).path)
    train(*tuning(recipe, *moved, f"total_samples={5 * BATCH}"))
    train(*tuning(recipe, *alone, "name=undisturbed", f"total_samples={5 * BATCH}"))
    undisturbed = losses(place(recipe, "undisturbed"))
    assert len(undisturbed) == 5
    assert losses(place(recipe, f"moved-{layout}")) == pytest.approx(undisturbed, rel=1e-4)


def test_a_head_leaves_batchnorm_in_training() -> None:
    """Microbatches are refused by what the step finds in training."""
    config, _ = compose(SMALL)
    config.model.vision, config.model.classes = Vision(timm="resnet18", image_size=32), NAMES
    model = build_model(config.model)
    assert isinstance(model, Classifier)
    tokenizer = build_tokenizer(config.tokenizer, config.model)
    start_head(config, model, Classes(NAMES, ["a {}"], {}), tokenizer, torch.device("cpu"))
    assert model.head.weight.abs().sum() > 0 and takes_statistics(model)


def evaluated(path: Path, recipe: list[str]) -> dict[str, float]:
    data = ["data.zeroshot.shards=val.tar", "data.zeroshot.label_key=cls", "data.zeroshot.classes=classes.json"]
    return evaluate(path, [recipe[-2], *data], "cpu", True)


def test_weights_between_zeroshot_and_tuned(recipe: list[str], pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "between"
    interpolate(str(pretrained), str(tuned), [0.0, 0.5, 1.0], out, None, "cpu")
    zero, half, one = (load_file(out / f"alpha_{alpha}" / "model.safetensors") for alpha in ("0", "0.5", "1"))
    ends = clipscale.load(pretrained)[0].state_dict(), clipscale.load(tuned)[0].state_dict()
    assert zero.keys() == half.keys() == one.keys() == ends[1].keys()
    assert all(torch.equal(zero[name], tensor) for name, tensor in ends[0].items())
    assert all(torch.equal(one[name], tensor) for name, tensor in ends[1].items())
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (zero[name] + one[name]) / 2, rtol=1e-6, atol=1e-7)
    as_prompts = evaluated(pretrained, recipe)["val/zeroshot/top1"]
    assert evaluated(out / "alpha_0", recipe)["val/top1"] == pytest.approx(as_prompts), "its head is the prompts"
    assert evaluated(out / "alpha_1", recipe)["val/top1"] == rows(tuned)[-1]["val/top1"]
    single = tmp_path / "single"  # an export does not know where its classes stand
    root = recipe[-2].removeprefix("data.root=")
    interpolate(str(pretrained), str(out / "alpha_1"), [0.5], single, f"{root}/classes.json", "cpu")
    assert all(torch.equal(half[name], tensor) for name, tensor in load_file(single / "model.safetensors").items())


def test_encoders_interpolate_as_well(pretrained: Path, tmp_path: Path) -> None:
    state = {name: tensor + 1 for name, tensor in clipscale.load(pretrained)[0].state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    interpolate(str(tmp_path / "other.safetensors"), str(pretrained), [0.25], tmp_path / "out", None, "cpu")
    model = clipscale.load(tmp_path / "out")[0]
    assert not isinstance(model, Classifier)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name] - 0.25, rtol=0, atol=1e-6)


def test_ends_that_do_not_belong_together_are_refused(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(build_model("tiny").state_dict(), other)
    for first, second, alpha, message in (
        (other, tuned, 0.5, "the model's is "),
        (pretrained, tuned, 1.5, "choose numbers from 0 to 1"),
        (other, other, 0.5, "neither"),
        (pretrained, tmp_path / "absent", 0.5, "absent is no file or directory"),
    ):
        with pytest.raises(ClipscaleError) as caught:
            interpolate(str(first), str(second), [alpha], tmp_path / "out", None, "cpu")
        assert message in str(caught.value) and "init.weights" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.zeroshot.classes=null", "data.zeroshot.shards=null"], "data.zeroshot.classes=FILE.json"),
        (["data.label_key=null"], "needs data.label_key"),
        (["init.weights=null"], "init.head=zeros"),
        (["data=shapes"], "needs data=shards"),
        (["data.val.shards=val.tar"], "use data.val.shards=null"),
        (["loss.mask_duplicates=text"], "use loss.mask_duplicates=none"),
        (["loss=clip"], "no effect without loss=cross_entropy"),
        (["lock.image=true", "lock.text=true"], "trains no text tower; use lock.text=false"),
        (["init.weights=timm:vit_base_patch16_224"], "init.head=zeroshot needs the towers"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(recipe: list[str], overrides: list[str], message: str) -> None:
    config, _ = compose(tuning(recipe, *overrides))
    with pytest.raises(ClipscaleError) as caught:
        validate(config)
    assert message in str(caught.value)


def test_labels_that_are_not_there_are_known_before_training(recipe: list[str], pretrained: Path) -> None:
    config, experiment = compose(tuning(recipe, "data.label_key=json:label", "name=wrong"))
    with pytest.raises(ClipscaleError, match="no sample that was looked at has a class there"):
        fit(open_run(config, experiment, []).path)
