"""The pictures of a run: its training curve, and what it finds for some captions.

python docs/pictures.py RUN docs/img
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import clipscale
from clipscale.checkpoint import find_checkpoint
from clipscale.data.collections import Shards
from clipscale.data.evalset import EvalItem, EvalSet
from clipscale.data.manifest import expand_shards
from clipscale.data.samples import find_captions
from clipscale.distributed.runtime import Runtime
from clipscale.trainer.build import build_store, place_data

QUERIES, FOUND = 5, 6
BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#888888"


def curve(run: Path, out: Path) -> None:
    """Loss on the left; retrieval and zero-shot accuracy with their chance levels on the right."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    train = [(row["samples_seen"], row["train/loss"]) for row in rows if "train/loss" in row]
    left.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.5)
    left.set(xlabel="samples seen", ylabel="training loss")
    shown = {"val/retrieval/i2t_r1": ("image→text R@1", BLUE), "val/zeroshot/top1": ("zero-shot top-1", ORANGE)}
    for key, (label, colour) in shown.items():
        points = [(row["samples_seen"], row[key], row[f"{key}_chance"]) for row in rows if key in row]
        if points:
            seen, value, luck = zip(*points, strict=True)
            right.plot(seen, value, "o-", color=colour, label=label, linewidth=1.5, markersize=4)
            right.plot(seen, luck, ":", color=colour, label=f"chance, {luck[-1]:.3f}")
    right.set(xlabel="samples seen", ylabel="held-out accuracy", ylim=(0, None))
    right.set_xlim(left=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def retrieval(run: Path, out: Path) -> None:
    """For some held-out captions, the held-out images that the model ranks first; the right one has a frame."""
    _, config = find_checkpoint(run)
    model, _, tokenizer = clipscale.load(run)
    data = place_data(config.data, Runtime(0, 1, 0, torch.device("cpu")))
    files = expand_shards(data.val.shards, data.root, "data.val.shards", build_store(config))
    fields = (lambda sample: find_captions(sample, data.caption_key)[0],)
    items = EvalSet(Shards(files), data.image_keys, config.model.vision, data.max_pixels, fields)
    held_out = [item for item in items.read(0, len(items)) if isinstance(item, EvalItem)]
    asked = [i * len(held_out) // QUERIES for i in range(QUERIES)]
    with torch.no_grad():
        images = model.encode_image(torch.stack([item.image for item in held_out]), normalize=True)
        texts = model.encode_text(tokenizer([held_out[i].fields[0] for i in asked]), normalize=True)
    figure, axes = plt.subplots(QUERIES, FOUND, figsize=(9, 1.75 * QUERIES))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.96, hspace=0.25, wspace=0.03)
    for row, number, scores in zip(axes, asked, texts @ images.T, strict=True):
        row[0].set_title(f"“{held_out[number].fields[0]}”", loc="left", fontsize=10)
        for cell, found in zip(row, scores.topk(FOUND).indices.tolist(), strict=True):
            cell.imshow(held_out[found].image.permute(1, 2, 0))
            cell.set(xticks=[], yticks=[])
            right = found == number
            cell.spines[:].set(color=ORANGE if right else GREY, linewidth=4 if right else 0.5)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    curve(Path(sys.argv[1]), where / "curve.png")
    retrieval(Path(sys.argv[1]), where / "retrieval.png")
