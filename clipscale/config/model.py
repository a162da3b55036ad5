"""``model`` and ``init``: the two towers, the space they share, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import fixed, group


class HeadStart(Enum):
    """What a classifier's head starts from."""

    zeroshot = "zeroshot"  # the text tower's features of the classes' prompts
    zeros = "zeros"


class Activation(Enum):
    """Activation of the transformer MLPs; OpenAI's own weights were trained with ``quickgelu``."""

    gelu = "gelu"
    quickgelu = "quickgelu"


class ResizeMode(Enum):
    """How a picture of any shape becomes square, outside of training's random crop."""

    shortest = "shortest"  # the shorter side fits, the longer one is cut
    longest = "longest"  # the longer side fits, the rest is white
    squash = "squash"  # both sides fit, the proportions are lost


@dataclass
class Vision:
    """The image tower: any timm architecture."""

    timm: str = fixed("vit_base_patch32_clip_224")
    """timm model name."""
    image_size: int = fixed(224)
    """Side of the square input image, in pixels."""
    resize_mode: ResizeMode = fixed(ResizeMode.shortest)
    """How a picture becomes square: `shortest` cuts the longer side (CLIP), `longest` adds white, `squash` distorts."""
    patch_size: int | None = fixed(None)
    """Patch side of a ViT in pixels; null keeps the architecture's own."""
    width: int | None = fixed(None)
    """Embedding width of a ViT; null keeps the architecture's own."""
    layers: int | None = fixed(None)
    """Depth of a ViT; null keeps the architecture's own."""
    heads: int | None = fixed(None)
    """Attention heads of a ViT; null keeps the architecture's own."""
    drop_path: float = fixed(0.0)
    """Stochastic depth rate."""


@dataclass
class Text:
    """The text tower: a causal transformer that pools at the end-of-text token (CLIP paper, section 2.4)."""

    width: int = fixed(512)
    """Embedding width."""
    layers: int = fixed(12)
    """Number of transformer blocks."""
    heads: int = fixed(8)
    """Attention heads."""
    mlp_ratio: float = fixed(4.0)
    """Width of the MLP over the width of the block."""
    vocab_size: int = fixed(49408)
    """Number of token ids; must cover the tokenizer's."""
    eot_id: int = fixed(49407)
    """Id of the end-of-text token, at which the caption is pooled."""


@dataclass
class Model:
    """A dual encoder."""

    name: str = fixed("vit_b_32")
    """Name shown in logs; the option's own name."""
    embed_dim: int = fixed(512)
    """Width of the shared space."""
    context_length: int = fixed(77)
    """Tokens per caption, start and end tokens included; longer captions are cut and counted."""
    activation: Activation = fixed(Activation.gelu)
    """Activation of both transformers."""
    vision: Vision = group(Vision)
    text: Text = group(Text)
    mean: list[float] = fixed([0.48145466, 0.4578275, 0.40821073])
    """Per-channel mean that is taken from images in [0, 1]; the default is OpenAI's."""
    std: list[float] = fixed([0.26862954, 0.26130258, 0.27577711])
    """Per-channel standard deviation of images in [0, 1]; the default is OpenAI's."""
    classes: list[str] | None = fixed(None)
    """Names of the classes of a head on the image tower. Recorded by `loss=cross_entropy`, from
    `data.zeroshot.classes`; null: no head."""


@dataclass
class Init:
    """What a run starts from."""

    weights: str | None = fixed(None)
    """Weights that a new run starts from: `open_clip:NAME/TAG`, `hf:ORGANISATION/NAME`, or a path to a run, a
    checkpoint, an exported directory, or a `.safetensors` or `.pt` file; null draws them from the seed. Not read again
    when the run is resumed."""
    head: HeadStart = fixed(HeadStart.zeroshot)
    """What the head of `loss=cross_entropy` starts from: `zeroshot`, the features of the classes' prompts times the
    temperature, so that the classifier is at first the zero-shot one (WiSE-FT); or `zeros`."""


def model_summary(model: Any) -> str:
    """One line for logs: name, image size, context length, width of the shared space."""
    return f"{model.name} (image {model.vision.image_size}, context {model.context_length}, dim {model.embed_dim})"
