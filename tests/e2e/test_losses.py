"""What a run may ask of its loss, from the command line to the numbers: teachers, hard negatives, duplicates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipscale
from clipscale.trainer.teachers import resize_pixels
from tests.runs import losses, rows, run_here
from tests.shards import jpeg, sample, write_shard

COUNT, BATCH = 96, 32


def as_npy(vector: torch.Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, vector.numpy())
    return out.getvalue()


def members(number: int) -> dict[str, bytes]:
    """A sample with its hard negatives; four share each caption, and every third has no negative."""
    found = sample(number % 24) | {"jpg": jpeg(number)}
    fields = json.loads(found["json"])
    fields["negatives"] = [] if number % 3 == 0 else [f"no {fields['captions'][1]}", "nothing"]
    return found | {"json": json.dumps(fields).encode()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("losses")
    write_shard(root / "00000.tar", [(f"{i:04d}", members(i)) for i in range(COUNT)])
    return [
        f"runs_dir={root}/runs", "data=shards", f"data.root={root}", "data.train.shards=00000.tar",
        "data.crop_scale=null", "data.workers=0", "tracking=disabled", "tracking.log_every_steps=1",
        f"global_batch_size={BATCH}", f"total_samples={4 * BATCH}", "optim.lr=0.01", "schedule.warmup_samples=0",
        "data.val.shards=null", "data.zeroshot.shards=null", "model.vision.image_size=16",
        "model.vision.patch_size=8", "model.vision.width=32",
        "model.vision.layers=2", "model.vision.heads=2", "model.text.width=32", "model.text.layers=1",
        "model.text.heads=2", "model.embed_dim=16", "model.context_length=12",
    ]  # fmt: skip


def train(recipe: list[str], name: str, *overrides: str) -> dict[int, float]:
    run_here(*recipe, f"name={name}", *overrides)
    return losses(Path(recipe[0].removeprefix("runs_dir="), name))


@pytest.fixture(scope="module")
def teacher(recipe: list[str]) -> Path:
    """A run of another architecture, and its embeddings stored beside the samples that it saw."""
    train(recipe, "teacher", "model.embed_dim=24", "model.vision.image_size=32", "seed=1")
    root = Path(recipe[2].removeprefix("data.root="))
    model, _, tokenizer = clipscale.load(root / "runs" / "teacher")
    (root / "taught").mkdir()
    stored = []
    for number in range(COUNT):
        found = members(number)
        # The pixels that a student of 16 pixels hands on, made as large as the teacher wants them.
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(found["jpg"])).convert("RGB")).copy())
        pixels = resize_pixels(pixels.permute(2, 0, 1)[None], 32)
        image = model.encode_image(pixels, normalize=True)[0].detach()
        text = model.encode_text(tokenizer([found["txt"].decode()]), normalize=True)[0].detach()
        stored.append((f"{number:04d}", found | {"t.image.npy": as_npy(image), "t.text.npy": as_npy(text)}))
    write_shard(root / "taught" / "00000.tar", stored)
    return root / "runs" / "teacher"


def test_a_teacher_teaches_as_its_stored_embeddings_do(recipe: list[str], teacher: Path) -> None:
    scale = clipscale.load(teacher)[0].logit_scale.exp().item()
    alone = train(recipe, "alone")
    asked = train(recipe, "asked", f"loss.teachers=[{teacher}]")
    stored = train(
        recipe, "stored", f"data.root={teacher.parents[1]}/taught",
        f"loss.teachers=[{{image: t.image.npy, text: t.text.npy, logit_scale: {scale}}}]",
    )  # fmt: skip
    assert list(asked.values()) == pytest.approx(list(stored.values()), rel=1e-4)
    assert asked[BATCH] != pytest.approx(alone[BATCH], rel=1e-3)
    in_parts = train(recipe, "parts", f"loss.teachers=[{teacher}]", "optim.microbatches=3")
    assert list(in_parts.values()) == pytest.approx(list(asked.values()), rel=1e-4)


def test_a_teacher_that_trains_on_teaches_what_it_knew(recipe: list[str], teacher: Path) -> None:
    taught = [f"loss.teachers=[{teacher}]"]
    train(recipe, "interrupted", *taught, f"total_samples={2 * BATCH}", "schedule=constant")
    before = train(recipe, "constant", *taught, "schedule=constant")
    options = ["model.embed_dim=24", "model.vision.image_size=32", "seed=1", f"total_samples={8 * BATCH}"]
    train(recipe, "teacher", *options, "checkpoint.keep_last=9")
    assert train(recipe, "interrupted", *taught, "schedule=constant") == before
    assert train(recipe, "afterwards", *taught, "schedule=constant")[BATCH] != before[BATCH]
    pinned = next((teacher / "checkpoints").glob("step_*4"))
    (pinned / "manifest.json").write_text((pinned / "manifest.json").read_text() + " ")
    output = run_here(*recipe, "name=interrupted", *taught, "schedule=constant", f"total_samples={6 * BATCH}", expect=2)
    assert "is not the checkpoint that this run has learnt from" in output


def test_teachers_that_cannot_be_asked_are_told(recipe: list[str], teacher: Path, tmp_path: Path) -> None:
    output = run_here(*recipe, f"loss.teachers=[{tmp_path}]", expect=2)
    assert "neither a run directory nor a checkpoint" in output
    output = run_here(*recipe, f"loss.teachers=[{teacher}]", "model.context_length=20", expect=2)
    assert "use tokenizer.context_length=12" in output
    output = run_here(*recipe, "name=self", f"loss.teachers=[{recipe[0].removeprefix('runs_dir=')}/self]", expect=2)
    assert "is this run itself" in output
    output = run_here(*recipe, f"loss.teachers={teacher}", expect=2)
    assert "must be a list; write loss.teachers=[RUN]" in output
    output = run_here(*recipe, "loss.teachers=[{image: t.image.npy}]", expect=2)
    assert "write RUN or {image: MEMBER, text: MEMBER, logit_scale: 100}" in output


def test_negatives_and_duplicates_change_the_denominators(recipe: list[str]) -> None:
    negatives = ["data.negatives_key=json:negatives", "data.negatives_per_sample=2"]
    alone = train(recipe, "plain")
    masked = train(recipe, "masked", "loss.mask_duplicates=text")
    opposed = train(recipe, "opposed", "loss.mask_duplicates=text", *negatives)
    assert masked[BATCH] < alone[BATCH] and masked[BATCH] < opposed[BATCH]
    split = ["loss.mask_duplicates=text", *negatives, "optim.microbatches=2", "cluster=cpu2"]
    assert list(train(recipe, "split", *split).values()) == pytest.approx(list(opposed.values()), rel=1e-4)
    ahead = ["loss.mask_duplicates=text", *negatives, "loss.overlap_gather=true", "cluster=cpu2", "parallel=fsdp"]
    assert list(train(recipe, "ahead", *ahead).values()) == pytest.approx(list(opposed.values()), rel=1e-4)


def test_statistics_are_logged(recipe: list[str]) -> None:
    train(recipe, "statistics", f"total_samples={20 * BATCH}", "tracking.log_every_steps=5")
    found = rows(Path(recipe[0].removeprefix("runs_dir="), "statistics"))
    last = found[-1]
    assert 0 < last["train/i2t_top1"] <= 1 and 0 < last["train/t2i_top1"] <= 1
    assert {"train/positive_logit", "train/negative_logit"} <= last.keys()
    assert 0.5 < last["train/duplicate_fraction"] <= 1
