"""A model as two ONNX graphs, image and text encoder, that are run and compared before they are left to anybody."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config.model import TextPool
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models import CLIP
from clipscale.models.packing import find_lengths
from clipscale.models.text import AttentionPool, TextTower

BOUND = 1e-4  # of a unit vector's components
IMAGE, TEXT = "image.onnx", "text.onnx"
MOST_BYTES = 1_900_000_000  # protobuf ends at 2 GiB: beyond this the weights lie in a file of their own
BATCHES = (1, 2, 5)
OPSET = 20


class ImageEncoder(nn.Module):
    """UInt8[B, 3, S, S] to Float[B, D] of unit vectors."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual(images), dim=-1)


class TextEncoder(nn.Module):
    """Padded ids Int64[B, L] to Float[B, D] of unit vectors: the text tower's own modules, its captions not packed.

    Packing is worked out on the host from the captions' lengths, which a graph cannot do. What follows a caption's end
    is computed here, but the caption does not see it.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tower, config = self.tower, self.tower.config
        lengths = find_lengths(ids, tower.eot_id)[:, None]
        ends = (lengths - 1).clamp(min=0)
        real = torch.arange(ids.shape[1], device=ids.device) <= ends
        if config.pad_to_context:  # the caption sees what fills it
            ids = ids.where(real, config.pad_id)
            ends, real = torch.full_like(ends, ids.shape[1] - 1), torch.ones_like(real)
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        mask = None if config.causal else real[:, None, None]
        for block in tower.blocks:
            x = self._block(block, x, mask)
        x = tower.norm(x)
        if tower.attn_pool is not None:
            x = self._map(tower.attn_pool, x, real)
        elif config.pool is TextPool.mean:
            x = (x * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        else:
            x = x.gather(1, ends[:, :, None].expand(-1, 1, x.shape[2])).squeeze(1)
        # A graph cannot refuse a row without an end as the model does: it has no features.
        return F.normalize(tower.proj(x), dim=-1).masked_fill(lengths == 0, torch.nan)

    @staticmethod
    def _block(block: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    @staticmethod
    def _map(pool: AttentionPool, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        q = pool.q(pool.latent).unflatten(-1, (pool.heads, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)
        k, v = pool.kv(x).unflatten(-1, (2, pool.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = pool.proj(attended.squeeze(2).flatten(1))
        return x + pool.mlp(pool.norm(x))


def write_graphs(model: CLIP, out: Path, most_bytes: int = MOST_BYTES) -> dict[str, float]:
    """Write ``image.onnx`` and ``text.onnx`` into ``out``; returns the largest difference of each from the model.

    Both take any batch size and give unit vectors in fp32. Weights of more than ``most_bytes`` lie in ``*.onnx.data``
    beside the graph. Raises ConfigError without the packages it needs, and ClipscaleError, leaving no graph, where one
    cannot be made, or gives other features than the model on random inputs, by more than 1e-4.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to onnx needs {', '.join(missing)}: pip install 'clipscale[onnx]'")
    model.eval()
    if type(model.text) is not TextTower:
        raise ClipscaleError("--to onnx takes clipscale's own text tower, and this model has another")
    encoders: dict[str, nn.Module] = {IMAGE: ImageEncoder(model), TEXT: TextEncoder(model.text)}
    found = {}
    try:
        for name, encoder in encoders.items():
            _write(encoder, draw_inputs(model, name, 2), out / name, most_bytes)
            found[name] = _difference(model, out / name)
            if not found[name] <= BOUND:
                raise ClipscaleError(f"{name} differs from the model by {found[name]:.1e}, more than {BOUND:.0e}")
    except BaseException:
        for name in encoders:
            for file in (out / name, out / f"{name}.data"):
                file.unlink(missing_ok=True)
        raise
    return found


def draw_inputs(model: CLIP, name: str, batch: int) -> torch.Tensor:
    """Random pictures UInt8[B, 3, S, S] for ``image.onnx``; else padded captions Int64[B, L], of lengths drawn too."""
    generator = torch.Generator().manual_seed(batch)
    side, text = model.config.vision.image_size, model.config.text
    if name == IMAGE:
        return torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, text.vocab_size, (batch, model.config.context_length), generator=generator)
    ids[ids == text.eot_id] = 0 if text.eot_id else 1
    ends = torch.randint(0, model.config.context_length, (batch, 1), generator=generator)
    return ids.scatter(1, ends, text.eot_id)


@torch.no_grad()
def _write(encoder: nn.Module, example: torch.Tensor, path: Path, most_bytes: int) -> None:
    try:
        with _quiet():
            program = torch.onnx.export(
                encoder.eval(),
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images" if path.name == IMAGE else "ids"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ClipscaleError(f"torch cannot export this model's {path.stem} tower to ONNX: {first}") from None
    assert program is not None
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    program.save(path, external_data=size > most_bytes)


@torch.no_grad()
def _difference(model: CLIP, path: Path) -> float:
    """The largest difference of a component, over random inputs in batches of several sizes."""
    import onnxruntime

    encode = model.encode_image if path.name == IMAGE else model.encode_text
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in BATCHES:
        given = draw_inputs(model, path.name, batch)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])
        difference = (found - encode(given, normalize=True)).abs().max()
        worst = max(worst, float(difference.nan_to_num(torch.inf)))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter tells of every operator that it looks up.
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
