"""``model`` and ``init``: the two towers, the space they share, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import fixed, group


class Activation(Enum):
    """Activation of the transformer MLPs; OpenAI's own weights were trained with ``quickgelu``."""

    gelu = "gelu"
    quickgelu = "quickgelu"
    gelu_tanh = "gelu_tanh"  # the approximation that JAX calls gelu, with which SigLIP was trained


class ResizeMode(Enum):
    """How a picture of any shape becomes square, outside of training's random crop."""

    shortest = "shortest"  # the shorter side fits, the longer one is cut
    longest = "longest"  # the longer side fits, the rest is white
    squash = "squash"  # both sides fit, the proportions are lost


class TextPool(Enum):
    """What becomes of a caption's tokens."""

    last = "last"  # its end-of-text token; padded to the context, whatever stands at the last position
    mean = "mean"  # all its tokens
    map = "map"  # attention of a learned probe to all its tokens, and an MLP


class ImageProjection(Enum):
    """What leads from the image tower's features to the shared space."""

    linear = "linear"  # a matrix without a bias
    none = "none"  # nothing: the tower's width is that of the space


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
    proj: ImageProjection = fixed(ImageProjection.linear)
    """From the tower's features into the shared space: a `linear` layer, or `none` as in SigLIP, whose attention pool
    ends with an MLP."""


@dataclass
class Text:
    """The text tower: a transformer, by default causal and pooled at the end of the text (CLIP paper, section 2.4)."""

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
    """Id of the end-of-text token, with which a caption ends."""
    causal: bool = fixed(True)
    """Whether a token sees only those before it (CLIP), or all of its caption (SigLIP)."""
    pool: TextPool = fixed(TextPool.last)
    """One vector of a caption's tokens: the `last` one, their `mean`, or `map`, a learned probe's attention to them."""
    pad_to_context: bool = fixed(False)
    """Whether captions are filled up to the context length with tokens that are seen and pooled as any other, as
    SigLIP's are; else nothing but the caption is computed."""
    pad_id: int = fixed(0)
    """Id of the token that fills captions, where `pad_to_context` does."""
    proj_bias: bool = fixed(False)
    """Whether the projection into the shared space has a bias."""
    norm_eps: float = fixed(1e-5)
    """Epsilon of the layer norms; SigLIP's is 1e-6."""
    activation: Activation | None = fixed(None)
    """Activation of this tower, where it is another than `model.activation`."""


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
    """Activation of both transformers; `model.text.activation` gives the text tower its own."""
    vision: Vision = group(Vision)
    text: Text = group(Text)
    mean: list[float] = fixed([0.48145466, 0.4578275, 0.40821073])
    """Per-channel mean that is taken from images in [0, 1]; the default is OpenAI's."""
    std: list[float] = fixed([0.26862954, 0.26130258, 0.27577711])
    """Per-channel standard deviation of images in [0, 1]; the default is OpenAI's."""


@dataclass
class Init:
    """What a run starts from."""

    weights: str | None = fixed(None)
    """Weights that a new run starts from: `open_clip:NAME/TAG`, `hf:ORGANISATION/NAME`, `timm:NAME` (of the image tower
    alone), or a path to a run, a checkpoint, an exported directory, or a `.safetensors` or `.pt` file; null draws them
    from the seed. Not read again when the run is resumed."""


def text_activation(model: Model) -> Activation:
    """That of the text tower."""
    return model.text.activation or model.activation


def model_summary(model: Any) -> str:
    """One line for logs: name, image size, context length, width of the shared space."""
    return f"{model.name} (image {model.vision.image_size}, context {model.context_length}, dim {model.embed_dim})"
