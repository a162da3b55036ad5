"""The towers as lists of parts, each with what it costs: parameters, FLOPs, and what it keeps for the backward pass.

Pure Python, from the configuration alone. What a part keeps is what autograd saves when the tower runs as
:mod:`clipscale.models` writes it, parameters and their half-precision copies left out: fused attention keeps no matrix
of weights, in-place ReLU shares the memory of its input, and under autocast the residual stream of transformers stays
in fp32, because position embeddings do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from clipscale.config.model import Activation, ImageProjection, Model, Pool, TextPool, text_activation
from clipscale.errors import ConfigError

# Width, depth, heads and MLP width of the ViTs that timm calls vit_<size>_patch<p>_clip_<image size>, or siglip.
VITS = {
    "xsmall": (256, 10, 4, 1024),
    "medium": (512, 12, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# Depths of the four stages, and width of the stem (CLIP paper, table 19).
RESNETS = {
    "resnet50_clip": ((3, 4, 6, 3), 64),
    "resnet101_clip": ((3, 4, 23, 3), 64),
    "resnet50x4_clip": ((4, 6, 10, 6), 80),
    "resnet50x16_clip": ((6, 8, 18, 8), 96),
    "resnet50x64_clip": ((3, 15, 36, 10), 128),
}
# Depths of the four stages, and width of the first (ConvNeXt, Liu et al. 2022, section 3).
CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), 96),
    "convnext_small": ((3, 3, 27, 3), 96),
    "convnext_base": ((3, 3, 27, 3), 128),
    "convnext_large": ((3, 3, 27, 3), 192),
    "convnext_xlarge": ((3, 3, 27, 3), 256),
}


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass: where towers compute in fp32, and where they are autocast to 16 bits."""

    fp32: float = 0.0
    amp: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.fp32 + other.fp32, self.amp + other.amp)


@dataclass(frozen=True)
class Part:
    """A piece of a tower, for one sample.

    ``flops`` of its forward pass, a multiply-add being two. A block that can be checkpointed has an ``entry``, its
    input, which is all that it keeps then; ``unrepeated`` are the FLOPs after the last thing that it keeps, at which
    torch stops when it repeats the block. Where it is checkpointed selectively, it keeps what is ``chosen`` as well,
    and repeats ``again`` FLOPs (:func:`clipscale.parallel.recompute.keeps`).
    """

    parameters: int
    flops: float
    kept: Kept
    entry: Kept | None = None
    unrepeated: float = 0.0
    chosen: Kept = Kept()
    again: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """Tokens per sample: mean of their number, and of its square, which attention costs. ``packed`` are captions;
    if ``grouped``, attention leaves its result in pieces, which are then put together."""

    mean: float
    square: float
    packed: bool = False
    grouped: bool = False

    @classmethod
    def of(cls, lengths: Collection[int], grouped: bool) -> Tokens:
        """Of captions."""
        return cls(sum(lengths) / len(lengths), sum(n * n for n in lengths) / len(lengths), True, grouped)


def text_parts(model: Model, tokens: Tokens, pooled: bool) -> list[Part]:
    """The text tower on captions of ``tokens`` each; ``pooled`` as in :class:`clipscale.models.flops.Execution`."""
    text, n = model.text, tokens.mean
    if text.hf is not None:
        raise ConfigError(f"what model.text.hf={text.hf} costs is not known; model.text.hf=null is the tower that is")
    # Of each token its id, in 32 bits, and its position, in 64.
    embedding = Part((text.vocab_size + model.context_length) * text.width, 0, _wide(3 * n))
    hidden, quick = int(text.width * text.mlp_ratio), text_activation(model) is Activation.quickgelu
    one = text.pool is TextPool.last
    block = [_block(text.width, hidden, text.heads, tokens, quick, 0.0, last) for last in (False, pooled and one)]
    # The pooled token alone is normalised; where it lies, and whose it is, takes two 64-bit indices.
    norm = Part(2 * text.width, 0, _wide(text.width + 2 + 4))
    if not one:
        norm = Part(2 * text.width, 0, _wide(n * (text.width + 2) + 2))
    pool = {
        TextPool.last: [],
        TextPool.mean: [Part(0, 0, _wide((n + 2) * text.width + 6))],
        TextPool.map: [_map_pool(text.width, hidden, text.heads, n, quick)],
    }[text.pool]
    projection = _projection(text.width, model.embed_dim, text.proj_bias)
    return [embedding, *block[:1] * (text.layers - 1), block[1], norm, *pool, projection]


def vision_parts(model: Model, pooled: bool) -> list[Part]:
    """The image tower in training; raises ConfigError for an architecture whose cost is not known."""
    name, size = model.vision.timm, model.vision.image_size
    vit = re.fullmatch(r"vit_([a-z]+)_patch(\d+)_clip_(quickgelu_)?\d+", name)
    if vit and vit[1] in VITS:
        if model.vision.pool is Pool.map:
            raise ConfigError("model.vision.pool=map: what it costs is not known; known are token and avg")
        _check_size(model, model.vision.patch_size or int(vit[2]))
        return _vit(model, vit[1], model.vision.patch_size or int(vit[2]), pooled)
    siglip = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_\d+", name)
    if siglip and siglip[1] in VITS:
        if model.vision.pool not in (None, Pool.map):
            raise ConfigError(f"model.vision.pool={model.vision.pool.value}: what {name} then costs is not known")
        _check_size(model, model.vision.patch_size or int(siglip[2]))
        return _siglip_vit(model, siglip[1], model.vision.patch_size or int(siglip[2]))
    if name in RESNETS or name in CONVNEXTS:
        _check_size(model, 32)
        return _resnet(*RESNETS[name], size, model.embed_dim) if name in RESNETS else _convnext(model)
    known = [f"vit_{{{','.join(VITS)}}}_patch*_{{clip,siglip}}_*", *RESNETS, *CONVNEXTS]
    raise ConfigError(f"model.vision.timm={name}: what it costs is not known; known are {', '.join(known)}")


def _check_size(model: Model, step: int) -> None:
    if model.vision.image_size % step:
        raise ConfigError(
            f"model.vision.image_size={model.vision.image_size} must be a multiple of {step} "
            f"for model.vision.timm={model.vision.timm}"
        )


def _wide(count: float) -> Kept:
    """Numbers of 32 bits in any precision."""
    return Kept(4 * count, 4 * count)


def _narrow(count: float) -> Kept:
    """Numbers that autocast halves."""
    return Kept(4 * count, 2 * count)


def _projection(width: int, embed_dim: int, bias: bool = False) -> Part:
    """Into the shared space, and onto the unit sphere there."""
    parameters = (width + bias) * embed_dim
    return Part(parameters, 2 * width * embed_dim, _narrow(width) + _wide(embed_dim + 2))


def _block(width: int, hidden: int, heads: int, tokens: Tokens, quick: bool, drop_path: float, pooled: bool) -> Part:
    """A pre-norm transformer block; if ``pooled``, one that computes everything but keys and values for one token."""
    n, d, rows = tokens.mean, width, 1 if pooled else tokens.mean
    attention = 4 * d * (tokens.mean if pooled else tokens.square)
    linear = 2 * n * 2 * d * d + rows * (2 * 2 * d * d + 2 * 2 * d * hidden)
    # In 32 bits: the stream before each norm, mean and deviation of its tokens, and a log-sum-exp per head and query.
    stream = _wide((n + rows) * (d + 2) + rows * heads)
    # The normalised inputs, keys, values; queries, attention's result, and the MLP with its activation's parts.
    inner = _narrow(n * 3 * d + rows * (3 * d + (3 if quick else 2) * hidden))
    if pooled:  # what asks is a view, unless it is picked out or cast
        inner += _narrow(d) if tokens.packed else Kept(0, 2 * d)
    if tokens.grouped:
        inner += _narrow(rows * d)
    # Queries, keys and values, if all tokens ask; attention's result, and the first layer of the MLP.
    chosen = _narrow(n * (2 if pooled else 3) * d + rows * (d + hidden)) + _wide(rows * heads)
    second = 2 * rows * d * hidden
    return Part(
        4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d,
        attention + linear,
        stream + inner,
        entry=_wide(n * d),
        unrepeated=0 if drop_path else second,
        chosen=chosen,
        again=2 * rows * d * d * (2 if pooled else 1) + (second if drop_path else 0),
    )


def _vit(model: Model, size: str, patch: int, pooled: bool) -> list[Part]:
    vision, (width, layers, heads, hidden) = model.vision, VITS[size]
    hidden = hidden * (vision.width or width) // width
    width, layers, heads = vision.width or width, vision.layers or layers, vision.heads or heads
    patches, pixels = (vision.image_size // patch) ** 2, 3 * vision.image_size**2
    n, quick = vision.kept_patches(patches) + 1, model.activation is Activation.quickgelu
    weights = 3 * patch**2 * width
    patchify = Part(weights, 2 * patches * weights, _narrow(pixels))
    # Where patches are left out, the places of those that stay, in 64 bits.
    chosen = 2 * n if vision.patch_dropout else 0
    embedding = Part((patches + 2) * width + 2 * width, 0, _wide(n * (width + 2) + chosen))
    pooled = pooled and vision.pool is not Pool.avg
    block = [_block(width, hidden, heads, Tokens(n, n * n), quick, vision.drop_path, last) for last in (False, pooled)]
    # All tokens are normalised, unless only one is there; in fp32, the pooled one lies in the memory of all.
    rows = 1 if pooled or vision.pool is Pool.avg else n
    norm = Part(2 * width, 0, _wide(rows * (width + 2)) + Kept(4 * (rows - 1) * width, 0))
    blocks = [*block[:1] * (layers - 1), block[1]]
    return [patchify, embedding, *blocks, norm, _projection(width, model.embed_dim)]


def _siglip_vit(model: Model, size: str, patch: int) -> list[Part]:
    """All tokens are pooled, by attention; there is no class token, and no norm before the blocks."""
    vision, (width, layers, heads, hidden) = model.vision, VITS[size]
    hidden = hidden * (vision.width or width) // width
    width, layers, heads = vision.width or width, vision.layers or layers, vision.heads or heads
    n, quick = (vision.image_size // patch) ** 2, model.activation is Activation.quickgelu
    weights = 3 * patch**2 * width
    patchify = Part(weights + width + n * width, 2 * n * weights, _narrow(3 * vision.image_size**2))
    block = _block(width, hidden, heads, Tokens(n, n * n), quick, vision.drop_path, False)
    norm = Part(2 * width, 0, _wide(n * (width + 2)))
    last = Part(0, 0, _wide(width + 2))  # onto the unit sphere
    if vision.proj is ImageProjection.linear:
        last = _projection(width, model.embed_dim)
    return [patchify, *[block] * layers, norm, _map_pool(width, hidden, heads, n, quick), last]


def _map_pool(width: int, hidden: int, heads: int, n: float, quick: bool) -> Part:
    """Attention of a probe to n tokens, and an MLP."""
    d, mlp = width, 2 * width * hidden
    parameters = d + 4 * d * d + 4 * d + 2 * d + mlp + hidden + d
    flops = 2 * n * 2 * d * d + 4 * n * d + 2 * (2 * d * d) + 2 * mlp
    kept = _narrow(n * 3 * d + 3 * d + (3 if quick else 2) * hidden) + _wide(d + 2 + heads)
    return Part(parameters, flops, kept)


def _convolution(inputs: int, outputs: int, kernel: int, positions: int) -> tuple[int, int]:
    """Parameters, those of the norm after it too, and FLOPs."""
    weights = kernel * kernel * inputs * outputs
    return weights + 2 * outputs, 2 * weights * positions


def _resnet(depths: tuple[int, ...], width: int, size: int, embed_dim: int) -> list[Part]:
    """CLIP's ResNet: three convolutions in the stem, average pools for strides, attention as the last pool."""
    half, side = width // 2, size // 2
    stem = [_convolution(3, half, 3, side**2), _convolution(half, half, 3, side**2)]
    stem.append(_convolution(half, width, 3, side**2))
    # A convolution's result is kept for its norm; ReLU's, in the norm's memory, for what follows.
    kept = _narrow(3 * size**2 + 2 * (half + half + width) * side**2)
    parts = [Part(sum(p for p, _ in stem), sum(f for _, f in stem), kept)]
    side, inputs = side // 2, width
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            parts.append(_bottleneck(inputs, width * 2**stage, side, stride))
            side, inputs = side // stride, 4 * width * 2**stage
    last = _narrow(inputs * side**2)  # of every other block, the result is the next one's entry
    parts[-1] = replace(parts[-1], kept=parts[-1].kept + last)
    return [*parts, _attention_pool(inputs, side**2 + 1, embed_dim)]


def _bottleneck(inputs: int, middle: int, side: int, stride: int) -> Part:
    outputs, before, after = 4 * middle, side**2, (side // stride) ** 2
    layers = [_convolution(inputs, middle, 1, before), _convolution(middle, middle, 3, before)]
    layers.append(_convolution(middle, outputs, 1, after))
    kept = inputs * before + 4 * middle * before + outputs * after
    if stride > 1:
        kept += middle * after
    if inputs != outputs or stride > 1:
        layers.append(_convolution(inputs, outputs, 1, after))
        kept += outputs * after + (inputs * after if stride > 1 else 0)
    chosen = _narrow(2 * middle * before + (len(layers) - 2) * outputs * after)  # every convolution
    count, cost = (sum(numbers) for numbers in zip(*layers, strict=True))
    return Part(count, cost, _narrow(kept), _narrow(inputs * before), chosen=chosen)


def _attention_pool(width: int, n: int, embed_dim: int) -> Part:
    """Attention of the mean over all positions; timm's lets every position ask, though only one answer is taken."""
    weights = 3 * width * width + width * embed_dim
    flops = n * (6 * width**2 + 4 * n * width + 2 * width * embed_dim)
    # Under autocast, each of the three projections casts its own copy of its input.
    kept = Kept(4 * n * width, 6 * n * width) + _narrow(4 * n * width)
    result = Kept(4 * n * embed_dim, 4 * embed_dim)  # in fp32, the pooled one lies in the memory of all
    parameters = weights + 3 * width + embed_dim + n * width
    return Part(parameters, flops, kept + result + _wide(n * (width // 64) + 2))


def _convnext(model: Model) -> list[Part]:
    depths, width = CONVNEXTS[model.vision.timm]
    side = model.vision.image_size // 4
    weights, area = 48 * width, side**2
    stem = Part(weights + 3 * width, 2 * weights * area, _narrow(48 * area + area * (width + 2)))
    parts = [stem]
    for stage, depth in enumerate(depths):
        if stage:
            weights = 4 * width * 2 * width
            kept = _wide(area * (width + 2)) + _narrow(area * width)
            side, width = side // 2, 2 * width
            area = side**2
            parts.append(Part(weights + width + width, 2 * weights * area, kept))
        block = _convnext_block(width, area)
        # What a convolution gives is in 16 bits; from the first block on, layer scale makes the stream 32.
        first = replace(block, entry=_narrow(area * width))
        parts += [first, *[block] * (depth - 1)]
    norm = Part(2 * width, 0, _wide(width + 2))
    return [*parts, norm, _projection(width, model.embed_dim)]


def _convnext_block(width: int, area: int) -> Part:
    """A depthwise convolution, a norm, an MLP and layer scale, each with its input kept."""
    parameters = 49 * width + width + 2 * width + 8 * width**2 + 5 * width + width
    flops = area * (2 * 49 * width + 16 * width**2)
    chosen, again = _narrow(area * 4 * width), area * (2 * 49 * width + 8 * width**2)
    return Part(parameters, flops, _narrow(area * (12 * width + 2)), _wide(area * width), chosen=chosen, again=again)
