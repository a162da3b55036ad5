"""``model`` and ``init``: the two towers, the space they share, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import event, fixed, group


class HeadStart(Enum):
    """What a classifier's head starts from."""

    zeroshot = "zeroshot"  # the text tower's features of the classes' prompts
    zeros = "zeros"


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


class HFPool(Enum):
    """What becomes of the tokens of a caption in a text tower of Hugging Face's."""

    cls = "cls"  # the first token
    mean = "mean"  # all tokens
    last = "last"  # the end token


class HFProjection(Enum):
    """What leads from a text tower of Hugging Face's to the shared space."""

    linear = "linear"  # a matrix
    mlp = "mlp"  # two, with a GELU between them


class TextPool(Enum):
    """What becomes of a caption's tokens."""

    last = "last"  # its end-of-text token; padded to the context, whatever stands at the last position
    mean = "mean"  # all its tokens
    map = "map"  # attention of a learned probe to all its tokens, and an MLP


class ImageProjection(Enum):
    """What leads from the image tower's features to the shared space."""

    linear = "linear"  # a matrix without a bias
    none = "none"  # nothing: the tower's width is that of the space


class Pool(Enum):
    """What a ViT makes one vector of its tokens by."""

    token = "token"  # the class token
    avg = "avg"  # mean of the patches
    map = "map"  # attention with a learned query


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
    pool: Pool | None = fixed(None)
    """How a ViT is pooled: at its class `token`, by the mean of its patches (`avg`) or by attention (`map`); null keeps
    the architecture's own."""
    drop_path: float = fixed(0.0)
    """Stochastic depth rate of the last block; earlier ones have less, in proportion to their depth."""
    patch_dropout: float = event(0.0)
    """Share of the patches of a ViT that training leaves out, others for each sample (FLIP: 0.5 or 0.75); class and
    register tokens stay."""
    proj: ImageProjection = fixed(ImageProjection.linear)
    """From the tower's features into the shared space: a `linear` layer, or `none` as in SigLIP, whose attention pool
    ends with an MLP."""

    def kept_patches(self, patches: int) -> int:
        """How many of a ViT's ``patches`` training computes; the same of every image."""
        return max(1, int(patches * (1 - self.patch_dropout)))


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
    hf: str | None = fixed(None)
    """A text model of Hugging Face transformers as the tower, instead of our own: `ORGANISATION/NAME` or the directory
    of a copy; needs `pip install 'clipscale[hf]'`. Of the other keys of `model.text`, those with `hf` and `eot_id`
    count."""
    hf_pretrained: bool = fixed(True)
    """Start from its weights; false: draw them from the seed, as its architecture does."""
    hf_pool: HFPool | None = fixed(None)
    """One vector of a caption's tokens: `cls` (the first), their `mean`, or the `last`; null: `cls` of a BERT, `last`
    of a model made to write text (GPT-2, LLaMA) and of CLIP's, else `mean`."""
    hf_proj: HFProjection = fixed(HFProjection.linear)
    """Into the shared space: a `linear` layer, or an `mlp` of two; without bias."""
    hf_config: Any = fixed(None)
    """Its architecture, as its `config.json` has it. null reads it where `hf` says. Recorded for the life of a run."""


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
    classes: list[str] | None = fixed(None)
    """Names of the classes of a head on the image tower. Recorded by `loss=cross_entropy`, from
    `data.zeroshot.classes`; null: no head."""


@dataclass
class Init:
    """What a run starts from."""

    weights: str | None = fixed(None)
    """Weights that a new run starts from: `open_clip:NAME/TAG`, `hf:ORGANISATION/NAME`, `timm:NAME` (of the image tower
    alone), or a path to a run, a checkpoint, an exported directory, or a `.safetensors` or `.pt` file; null draws them
    from the seed. Position embeddings of another image size or context length are brought to the model's. Not read
    again when the run is resumed."""
    head: HeadStart = fixed(HeadStart.zeroshot)
    """What the head of `loss=cross_entropy` starts from: `zeroshot`, the features of the classes' prompts times the
    temperature, so that the classifier is at first the zero-shot one (WiSE-FT); or `zeros`."""


def text_activation(model: Model) -> Activation:
    """That of the text tower."""
    return model.text.activation or model.activation


def model_summary(model: Any) -> str:
    """One line for logs: name, image size, context length, width of the shared space."""
    return f"{model.name} (image {model.vision.image_size}, context {model.context_length}, dim {model.embed_dim})"
