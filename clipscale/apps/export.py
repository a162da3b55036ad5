"""``clipscale export``: what a run trained as a directory that another library loads, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipscale import __version__
from clipscale.apps.audit.card import audit_section
from clipscale.checkpoint.export import WRITERS, write_safetensors
from clipscale.checkpoint.manifest import MANIFEST
from clipscale.checkpoint.own import copy_tokenizer, find_checkpoint, load_own
from clipscale.checkpoint.places import local
from clipscale.checkpoint.pretrained import LIBRARIES
from clipscale.config import Config
from clipscale.config.data import Builtin
from clipscale.config.hub import shareable
from clipscale.config.model import model_summary
from clipscale.config.rundir import read_result
from clipscale.data.tokenizer import shareable_name
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models import CLIP

LIBRARY = {"open_clip": "open_clip", "hf": "transformers", "safetensors": "clipscale", "onnx": "onnx"}

INTENDED = """\
To be written by who publishes this model: what it was made for, by whom it may be used, and what is out of scope.
Whatever that is: do not let a similarity of this model decide about people, and do not use it for surveillance or to
tell who somebody is.
"""
NOT_AUDITED = """\
Not measured: `clipscale audit` compares accuracy and labels between groups, `clipscale export --audit` puts it here.
To be added by who publishes this model: whom the training images and captions show, and how they were filtered.
"""

# Blocks that fill a directory with the name OUT stands for.
LOADING = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:OUT")
tokenizer = open_clip.get_tokenizer("local-dir:OUT")
model.eval()
""",
    "hf": """\
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

model = CLIPModel.from_pretrained("OUT").eval()
preprocess = CLIPImageProcessor.from_pretrained("OUT")
tokenizer = CLIPTokenizer.from_pretrained("OUT")
""",
    "hf, siglip": """\
from transformers import CLIPImageProcessor, CLIPTokenizer, SiglipModel

model = SiglipModel.from_pretrained("OUT").eval()
preprocess = CLIPImageProcessor.from_pretrained("OUT")
tokenizer = CLIPTokenizer.from_pretrained("OUT")  # the model sees the padding: tokenizer(…, padding="max_length")
""",
    "safetensors": """\
import clipscale

model, preprocess, tokenizer = clipscale.load("OUT")
""",
    "onnx": """\
import json
from pathlib import Path

import numpy
import onnxruntime
from clipscale.config.model import ResizeMode
from clipscale.data.samples import preprocess
from clipscale.data.tokenizer import Tokenizer
from PIL import Image

told = json.load(open("OUT/clipscale.json"))
image_encoder, text_encoder = (onnxruntime.InferenceSession(f"OUT/{name}.onnx") for name in ("image", "text"))

# What goes in: UInt8[B, 3, S, S], resized and cut but not normalised, and Int64[B, L], each row with its end token.
pictures = [Image.new("RGB", (320, 240), "red"), Image.new("RGB", (240, 320), "blue")]
captions = ["something red", "something blue", "a dog"]
pixels = [preprocess(picture, told["image_size"], ResizeMode(told["resize_mode"])).numpy() for picture in pictures]
ids = Tokenizer(told["tokenizer"], told["context_length"], Path("OUT/tokenizer"))(captions).numpy()

# What comes out: unit vectors, Float[B, D].
[image] = image_encoder.run(None, {"images": numpy.stack(pixels)})
[text] = text_encoder.run(None, {"ids": ids})
logits = told["logit_scale"] * image @ text.T + (told["logit_bias"] or 0)
""",
}


def check_new(out: Path) -> None:
    """Raise ConfigError where ``--out`` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} holds something already; choose a new directory")


def export(run: Path, to: str, out: Path, audit: Path | None = None) -> None:
    """Write a run or checkpoint to the directory ``out``: averaged weights where the run kept an average. The card
    tells of ``audit``, what ``clipscale audit --json`` printed.

    Raises ClipscaleError for a path that is no run, a format that there is not or that cannot hold this model, and a
    directory that holds something.
    """
    if to not in WRITERS:
        raise ConfigError(f"--to {to}: choose from {', '.join(WRITERS)}")
    check_new(out)
    audited = audit_section(audit) if audit else NOT_AUDITED
    path, config = find_checkpoint(run)
    if config.model.classes is not None and to != "safetensors":
        raise ConfigError(
            f"--to {to} has no place for the head of {run}, which tells {len(config.model.classes)} classes apart; use "
            "--to safetensors"
        )
    model, config = load_own(path)
    with filling(out):
        WRITERS[to](model, config, out)
        if to == "safetensors":
            copy_tokenizer(path, out)
        (out / "README.md").write_text(model_card(path, config, to, out.resolve().name, audited))
    print(f"{out}: {config.model.name} for {LIBRARY[to]}; README.md says how to load it")


def write_own(model: CLIP, config: Config, checkpoint: Path, out: Path, card: str) -> None:
    """Write weights that were made of others' as ``--to safetensors`` does, with the tokenizer of a checkpoint."""
    with filling(out):
        write_safetensors(model, config, out)
        copy_tokenizer(checkpoint, out)
        (out / "README.md").write_text(card)


@contextmanager
def filling(out: Path) -> Iterator[None]:
    """What is written into ``out`` inside is there as a whole or not at all. Raises ClipscaleError where it cannot."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        _empty(out, made)
        if isinstance(error, OSError):
            raise ClipscaleError(f"--out {out} cannot be written: {error.strerror}") from None
        raise


def _empty(out: Path, made: bool) -> None:
    """Take away what a failed export has left, which would be in the way of the next one."""
    if made:
        shutil.rmtree(out, ignore_errors=True)
    elif out.is_dir():
        for file in out.iterdir():
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink()


def model_card(path: Path, config: Config, to: str, name: str, audited: str = NOT_AUDITED) -> str:
    """The model card of a checkpoint (after Mitchell et al. 2019): what it is, its training, its numbers, its biases as
    ``audited``; no path, host or secret."""
    title = config.name or config.model.name
    loading = LOADING["hf, siglip" if to == "hf" and not config.model.text.causal else to]
    head = head_summary(config)
    task = "zero-shot-image-classification" if config.model.classes is None else "image-classification"
    averaged = "; the weights are their moving average" if config.ema.decay is not None else ""
    return f"""\
---
library_name: {LIBRARY[to]}
pipeline_tag: {task}
tags:
- clip
- clipscale
---

# {title}

A dual encoder of images and texts, {model_summary(config.model)}, trained with clipscale {__version__}{averaged}.{head}

## Intended use

{INTENDED}
## How to load it

```python
{loading.replace("OUT", name)}```

## Training

{_table(_training(path, config), "setting", "value")}

## Data

{_data(config) if _of_a_run(path) else "Not recorded."}

## Evaluation

{_results(path)}

## Biases

{audited}
## Limits

- It knows what its captions say, and repeats their associations. A high similarity is no evidence that a caption is
  true.
- Fine-grained classes, counting, and the order of words are what dual encoders are known to be weak at.
- It was measured on the data named above; elsewhere its numbers are not known.
- To be added by who publishes this model: languages, kinds of images, and subjects on which it fails.
"""


def head_summary(config: Config) -> str:
    """What a card says of a classifier's head; nothing where there is none."""
    classes = config.model.classes
    if classes is None:
        return ""
    return (
        f" It has a head of {len(classes)} classes: `model.classify(images)` gives their logits, "
        "`model.config.classes` their names."
    )


def _training(path: Path, config: Config) -> dict[str, Any]:
    model = {
        "loss": config.loss.name.value,
        "activation": config.model.activation.value,
        "image mean and std": f"{config.model.mean} and {config.model.std}",
        "text tower": "clipscale's transformer" if config.model.text.hf is None else shareable(config.model.text.hf),
        "tokenizer": shareable_name(config.tokenizer.name),
    }
    if not _of_a_run(path):
        return model | {"all else": "not recorded"}
    return model | {
        "samples seen": local(path).manifest().saved.samples_seen,
        "global batch size": config.global_batch_size,
        "optimizer": f"AdamW, lr {config.optim.lr}, weight decay {config.optim.weight_decay}, "
        f"betas {config.optim.beta1} and {config.optim.beta2}",
        "schedule": f"{config.schedule.name.value}, warmup over {config.schedule.warmup_samples} samples",
        "precision": config.precision.name.value,
        "started from": "scratch" if config.init.weights is None else _start(config.init.weights),
        "seed": config.seed,
    }


def _of_a_run(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of training; the configuration beside exported weights holds the model alone."""
    return (path / MANIFEST).exists()


def _start(weights: str) -> str:
    return shareable_name(weights) if weights.startswith(LIBRARIES) else "weights of an earlier model"


def _data(config: Config) -> str:
    data = config.data
    if data.builtin is not Builtin.none:
        return f"clipscale's built-in data `{data.builtin.value}`, made by a program."
    sources = len(data.train.shards or []) if isinstance(data.train.shards, list) else 1
    mixed = f", repeated {data.train.weights} times an epoch" if data.train.weights else ""
    return (
        f"Image-text pairs in {sources} source{'s' if sources > 1 else ''} of shards{mixed}; images cut at random to "
        f"{data.crop_scale} of their area. To be named by who publishes this model."
    )


def _results(path: Path) -> str:
    result = read_result(path.parent.parent) or {}
    if not _of_a_run(path) or result.get("samples_seen") != local(path).manifest().saved.samples_seen:
        return "None were recorded of these weights."  # the run went on from here
    metrics = {key: f"{value:.4g}" for key, value in result.get("metrics", {}).items() if key.startswith("val/")}
    return _table(metrics, "metric", "value") if metrics else "None were recorded of these weights."


def _table(rows: dict[str, Any], left: str, right: str) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items()])
