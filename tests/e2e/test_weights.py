"""Runs that start from other libraries' weights, and what those libraries make of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from clipscale.config import Config, load_config
from clipscale.config.rundir import count_events
from clipscale.data.tokenizer import build_tokenizer
from clipscale.distributed.runtime import Runtime
from clipscale.trainer.build import build_loader, build_train_data, place_data
from tests.peers import small
from tests.runs import losses, run, run_here
from tests.shards import STORE

BATCH = 32


def recipe(place: Path) -> list[str]:
    return [
        f"runs_dir={place}", f"global_batch_size={BATCH}", "schedule.warmup_samples=0", "tracking=disabled",
        "tracking.log_every_steps=1", "data.shapes.train=128", "data.shapes.val=32", "data.shapes.classes=24",
        "data.shapes.image_size=32", "data.val.shards=null", "data.zeroshot.shards=null",
    ]  # fmt: skip


def first_loss(config: Config, model: Any) -> float:
    """open_clip's loss of one of its models on the first batch of a run."""
    runtime = Runtime(0, 1, 0, torch.device("cpu"))
    tokenizer = build_tokenizer(config.tokenizer, config.model)
    train = build_train_data(config, place_data(config.data, runtime), STORE, runtime)
    start = np.zeros(train.order.streams, np.int64)
    batch = next(iter(build_loader(config, train, start, tokenizer, runtime)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.model.mean, config.model.std))
    captions = pad_sequence(list(batch.text_ids.long().split(batch.text_lengths.tolist())), batch_first=True)
    captions = torch.nn.functional.pad(captions, (0, config.model.context_length - captions.shape[1]))
    with torch.no_grad():
        image = model.encode_image((batch.images / 255 - mean) / std, normalize=True)
        text = model.encode_text(captions, normalize=True)
        return open_clip.ClipLoss()(image, text, model.logit_scale.exp()).item()


@pytest.mark.parametrize("layout", [[], ["cluster=cpu2", "parallel=fsdp"]], ids=["alone", "sharded"])
def test_a_run_starts_from_weights(layout: list[str], tmp_path: Path) -> None:
    _, other = small("tiny")
    weights = tmp_path / "start.pt"
    torch.save(other.state_dict(), weights)
    command = [*recipe(tmp_path), "name=from", *layout]
    start = run if layout else run_here
    output = start(*command, f"init.weights={weights}", f"total_samples={BATCH}")
    assert f"starting from {weights}, of 32 samples" in output
    path = tmp_path / "from"
    assert losses(path)[BATCH] == pytest.approx(first_loss(load_config(path / "config.yaml"), other), rel=1e-5)
    if layout:
        return
    weights.unlink()  # they decide the start, and only that
    assert "resuming at 32" in run_here(*command, f"init.weights={weights}", f"total_samples={2 * BATCH}")
    refused = run_here(*command, f"total_samples={3 * BATCH}", expect=2)
    assert f"init.weights: '{weights}' in the run, None now" in refused


def test_weights_of_another_model_are_refused_before_training(tmp_path: Path) -> None:
    torch.save(small("tiny")[1].state_dict(), tmp_path / "tiny.pt")
    command = [*recipe(tmp_path), f"init.weights={tmp_path / 'tiny.pt'}", "name=wrong"]
    output = run_here(*command, "model=vit_s_16", "total_samples=32", expect=2)
    assert output.startswith("error: init.weights=") and output.strip().endswith("use model=tiny")
    assert not count_events(tmp_path / "wrong", "started")


@pytest.mark.slow
def test_a_run_goes_on_at_a_higher_resolution(tmp_path: Path) -> None:
    """And with longer captions, from the checkpoint of a run."""
    low = ["model.vision.image_size=32", "model.context_length=8"]
    run(*recipe(tmp_path), *low, "name=low", f"total_samples={2 * BATCH}")
    output = run(*recipe(tmp_path), f"init.weights={tmp_path / 'low'}", "name=full", f"total_samples={BATCH}")
    for change in ("pos_embed interpolated from 5 to 17", "positional_embedding interpolated from 8 to 32"):
        assert f"{change} positions" in output
    assert len(losses(tmp_path / "full")) == 1
