"""The losses as their papers word them: the whole matrix of logits in one process, gradients by torch's autograd.

Nothing here comes from ``clipscale.losses``. A :class:`Case` says what is computed, :func:`make` draws it for the whole
global batch, :func:`truth` is float64 on the very numbers that the loss is given, and :func:`usual` the loss that one
would write down in the case's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Teach = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Case:
    """A global batch of ``pairs`` and ``extra`` texts (of which every third is absent), and how its loss is called."""

    loss: str = "clip"  # clip, siglip, distill
    dtype: str = "float64"
    geometry: str = "random"  # random, correlated, opposed, duplicates, clustered
    tile: Any = "auto"
    cache_mb: float = 0
    ids: str = ""  # "", image, text, both
    extra: int = 0
    smoothing: float = 0.0
    weight: float = 0.7
    needs: tuple[str, ...] = ("image", "text", "scale", "bias", "extra")
    factor: float = 1.0
    scale_as: str = "[1]"  # float, 0-d, [1]
    scale: float = 0.0  # 0: what the geometry has
    pairs: int = 24
    dim: int = 16
    norm: float = 1.0
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the features."""
        return getattr(torch, self.dtype)

    @property
    def multiplier(self) -> float:
        """The logit scale."""
        return self.scale or {"random": 20.0, "duplicates": 20.0, "clustered": 30.0}.get(self.geometry, 100.0)

    @property
    def bias(self) -> float:
        """The logit bias: where it makes half of the positives' losses matter."""
        return -self.multiplier / 2


@dataclass
class Data:
    """A global batch, in the dtype of its case."""

    image: Tensor
    text: Tensor
    extra: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    teachers: list[Teach]

    def part(self, rank: int, world: int) -> Data:
        """What a rank holds of it."""

        def cut(tensor: Any) -> Any:
            return None if tensor is None else tensor.chunk(world)[rank].clone() if len(tensor) else tensor

        teachers = [(cut(image), cut(text), scale) for image, text, scale in self.teachers]
        return Data(*map(cut, (self.image, self.text, self.extra, self.image_ids, self.text_ids)), teachers)


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def make(case: Case) -> Data:
    """The global batch of a case."""
    g = torch.Generator().manual_seed(case.seed)
    n, d = case.pairs, case.dim
    image, text, extra = unit(n, d, generator=g), unit(n, d, generator=g), unit(case.extra, d, generator=g)
    towards = unit(1, d, generator=g)
    if case.geometry == "correlated":
        text = image + 0.2 * text
    elif case.geometry in ("opposed", "clustered"):
        sign = -1 if case.geometry == "opposed" else 1
        image, text, extra = towards + 0.2 * image, sign * towards + 0.2 * text, sign * towards + 0.2 * extra
    image_of, text_of = (torch.arange(n) for _ in range(2))
    if case.geometry == "duplicates" or case.ids:
        image_of[torch.randperm(n, generator=g)[: n // 3]] = image_of[0].item()
        text_of[torch.randperm(n, generator=g)[: n // 4]] = text_of[-1].item()
        text_of[n // 2] = text_of[1].item()
    image, text = image[image_of], text[text_of]
    extra = F.normalize(extra, dim=-1)
    extra[::3] = 0
    teachers = []
    for dim, scale in ((d + 3, 15.0), (max(d - 5, 2), 60.0)):
        taught = unit(n, dim, generator=g)
        follows = F.normalize(taught + 0.7 * unit(n, dim, generator=g), dim=-1)
        teachers.append((taught.to(case.torch_dtype), follows.to(case.torch_dtype), scale))
    image, text, extra = ((case.norm * F.normalize(x, dim=-1)).to(case.torch_dtype) for x in (image, text, extra))
    return Data(
        image, text, extra,
        7 * image_of - 3 if case.ids in ("image", "both") else None,
        5 - text_of if case.ids in ("text", "both") else None,
        teachers if case.loss == "distill" else [],
    )  # fmt: skip


def leaves(case: Case, data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """What can have a gradient, and does if the case says so."""
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    scale, bias = (torch.tensor([value], dtype=kind) for value in (case.multiplier, case.bias))
    found = {"image": data.image.to(dtype), "text": data.text.to(dtype), "extra": data.extra.to(dtype)}
    found |= {"scale": scale, "bias": bias}
    return {name: tensor.clone().requires_grad_(name in case.needs) for name, tensor in found.items()}


def hidden(case: Case, data: Data) -> Tensor:
    """Bool[N, N + K]: an image and a text of another pair with an equal id, and absent extra texts."""
    n = case.pairs
    same = torch.zeros(n, n, dtype=torch.bool)
    for ids in (data.image_ids, data.text_ids):
        if ids is not None:
            same |= ids[:, None] == ids
    same &= ~torch.eye(n, dtype=torch.bool)
    return torch.cat([same, (data.extra == 0).all(1).expand(n, -1)], dim=1)


def targets(case: Case, data: Data, hide: Tensor, dim: int) -> Tensor:
    """Float64 of the shape of the logits: what each row (``dim`` 1) or column (0) should be."""
    n = case.pairs
    label = torch.eye(n, hide.shape[1], dtype=torch.float64)
    there = (~hide).double()
    label = (1 - case.smoothing) * label + case.smoothing * there / there.sum(dim, keepdim=True)
    if not data.teachers:
        return label
    taught = torch.zeros_like(label)
    for image, text, scale in data.teachers:
        logits = (scale * image.double() @ text.double().T).masked_fill(hide[:, :n], -torch.inf)
        taught[:, :n] += logits.softmax(dim) / len(data.teachers)
    return (1 - case.weight) * label + case.weight * taught


def exact_entropy(logits: Tensor, hide: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of the cross entropy, without the cancellation of ``logsumexp(S) - S_i`` when that is tiny."""
    n = len(logits)
    own = logits.diagonal()[:, None]
    others = hide | torch.eye(*logits.shape, dtype=torch.bool)
    gaps = (logits - own).masked_fill(others, -torch.inf)
    # log1p where it is small, softplus' other branch where exp would overflow
    most = gaps.detach().amax(1, keepdim=True).clamp(min=0)
    sums = (gaps - most).exp().sum(1)
    each = torch.where(most[:, 0] > 0, most[:, 0] + (torch.exp(-most[:, 0]) + sums).log(), sums.log1p())
    return each.sum() - ((logits - own).masked_fill(others, 0) * target).sum() if n else each.sum()


def plain_entropy(logits: Tensor, hide: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of the cross entropy, as everybody writes it."""
    log_p = logits.masked_fill(hide, -torch.inf).log_softmax(1).masked_fill(hide, 0)
    return -(target.to(logits.dtype) * log_p).sum()


def dense(case: Case, data: Data, given: dict[str, Tensor], entropy: Any = exact_entropy) -> Tensor:
    """The loss of the global batch, from all logits."""
    n, hide = case.pairs, hidden(case, data)
    columns = torch.cat([given["text"], given["extra"]])
    if columns.dtype is torch.bfloat16:  # as open_clip under amp: the product is bf16, the loss fp32
        logits = (given["scale"].bfloat16() * given["image"] @ columns.T).float()
    else:
        logits = given["scale"] * given["image"] @ columns.T + given.get("offsets", 0)
    if case.loss == "siglip":
        signs = 2 * torch.eye(n, columns.shape[0], dtype=logits.dtype) - 1
        terms = -F.logsigmoid(signs * (logits + given["bias"]))
        return terms.masked_fill(hide, 0).sum() / n
    rows = entropy(logits, hide, targets(case, data, hide, 1))
    # Extra texts have no image: only the texts of pairs are asked for theirs.
    square = hide[:, :n]
    columns_target = targets(case, data, hide, 0)[:, :n]
    return (rows + entropy(logits[:, :n].T, square.T, columns_target.T)) / (2 * n)


def gradients(case: Case, loss: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The loss and every gradient that there is, of ``factor`` times the loss."""
    (case.factor * loss).sum().backward()
    return {"loss": loss.detach()} | {name: tensor.grad for name, tensor in given.items()}


def truth(case: Case, data: Data) -> dict[str, Tensor | None]:
    """Float64, on the very numbers that the loss is given."""
    given = leaves(case, data, torch.float64)
    return gradients(case, dense(case, data, given), given)


def magnitudes(case: Case, data: Data) -> dict[str, float]:
    """Of the terms that add up to the gradients of scale and bias, which may all but cancel: the sum of their sizes."""
    given = leaves(replace(case, needs=()), data, torch.float64)
    columns = torch.cat([given["text"], given["extra"]])
    given["offsets"] = torch.zeros(case.pairs, len(columns), dtype=torch.float64, requires_grad=True)
    (case.factor * dense(case, data, given)).backward()
    pull = given["offsets"].grad
    return {"scale": (pull * (given["image"] @ columns.T)).abs().sum().item(), "bias": pull.abs().sum().item()}


def usual(case: Case, data: Data) -> dict[str, Tensor | None]:
    """Dense in the case's dtype: what a user would have without this package."""
    given = leaves(case, data, case.torch_dtype)
    return gradients(case, dense(case, data, given, plain_entropy), given)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected; 0 where both are 0."""
    off, norm = (found.double() - expected.double()).norm().item(), expected.double().norm().item()
    return off / norm if norm else (0.0 if off == 0 else float("inf"))
