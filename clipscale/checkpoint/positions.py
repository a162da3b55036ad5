"""Position embeddings of weights whose images or captions had another size than the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.layers.attention_pool2d import AttentionPool2d
from timm.models.vision_transformer import VisionTransformer

from clipscale.checkpoint.interop import State
from clipscale.models import CLIP

TEXT = "text.positional_embedding"


def fit_positions(model: CLIP, state: State) -> list[str]:
    """Bring the position embeddings in ``state`` to the sizes of the model's, in place; says of each what was done.

    Those of patches are interpolated on their square grid (bicubic, antialiased), as open_clip and timm do. Those of
    captions are stretched (linearly) as open_clip does where the model's context is longer. Where it is shorter they
    are cut, so that a caption that fits has the features it had, or, of a model that sees captions filled up to the
    context, squeezed as open_clip does: no caption has the features it had, and the last position is
    what it pools. What is not of the model's width stays as it is.
    """
    own, said = model.state_dict(), []
    for name, resize in _places(model):
        found = state.get(name)
        if found is None or found.ndim != own[name].ndim or 0 in found.shape or found.shape[-1] != own[name].shape[-1]:
            continue
        if found.shape == own[name].shape:
            continue
        fitting = resize(found)
        if fitting is not None:
            state[name] = fitting
            cut = name == TEXT and len(found) > len(fitting) and not model.config.text.pad_to_context
            done = "cut" if cut else "interpolated"
            said.append(f"{name} {done} from {found.shape[-2]} to {fitting.shape[-2]} positions")
    return said


def _places(model: CLIP) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor | None]]]:
    trunk = model.visual.trunk
    head = getattr(trunk, "head", None)
    if isinstance(head, AttentionPool2d):
        yield "visual.trunk.head.pos_embed", lambda found: _on_grid(found, head.feat_size, 1)
    elif isinstance(trunk, VisionTransformer) and trunk.pos_embed is not None:
        prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        yield "visual.trunk.pos_embed", lambda found: _on_grid(found, trunk.patch_embed.grid_size, prefix)
    if hasattr(model.text, "positional_embedding"):
        squeezed = model.config.text.pad_to_context
        yield TEXT, lambda found: _in_line(found, model.text.context_length, squeezed)


def _on_grid(found: torch.Tensor, grid: tuple[int, int], prefix: int) -> torch.Tensor | None:
    """Float[..., P + N, d] for another N, rows times columns of ``grid``; None where the old grid is not square."""
    patches = found.shape[-2] - prefix
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return None
    rows = resample_abs_pos_embed(found.view(1, *found.shape[-2:]), list(grid), num_prefix_tokens=prefix)
    return rows.view(*found.shape[:-2], *rows.shape[-2:])


def _in_line(found: torch.Tensor, length: int, squeezed: bool) -> torch.Tensor:
    """Float[length, d] of Float[L, d]."""
    if length < len(found) and not squeezed:
        return found[:length]
    stretched = F.interpolate(found.float().T[None], size=length, mode="linear", align_corners=False)
    return stretched[0].T.to(found.dtype)
