"""Which training image an evaluation image is nearest to: by what it looks like, and by a model's features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from clipscale.apps.data.contamination import best_copies
from clipscale.apps.data.likeness import Pictures, perceive
from clipscale.data.collections import IMAGE_KEYS
from clipscale.data.evalset import EvalItem
from clipscale.data.samples import Member, find_image
from clipscale.evals.neighbours import nearest

DISTANCE = 4  # bits by which perceptual hashes of the same picture may differ; see `clipscale data dedup`
KINDS = ("exact", "near", "mirrored")


@dataclass(frozen=True)
class Contact:
    """An evaluation image's nearest training image by features, its cosine, and the place of both in their sets.

    ``copy`` is one of KINDS or empty, and ``copy_of`` the place of the training image that is the same picture.
    """

    place: int
    nearest: int
    cosine: float
    copy: str = ""
    copy_of: int = -1


def digest(sample: Member) -> bytes:
    """Of the image's bytes, to know an exact copy by."""
    return hashlib.sha256(find_image(sample, IMAGE_KEYS)).digest()[:16]


def perceived(item: EvalItem) -> EvalItem:
    """With its perceptual hash and its colour cells as fields, of the square that the model sees and of its mirror
    image: photographs are often published both ways, and a hash of one is not that of the other."""
    return replace(item, fields=(*item.fields, *perceive(item.image), *perceive(item.image.flip(-1))))


def contacts(
    train: torch.Tensor, known: Sequence[EvalItem], held_out: torch.Tensor, asked: Sequence[EvalItem]
) -> list[Contact]:
    """Of each evaluation image ``asked``; features Float[N, D] and Float[M, D] are normalised.

    The last five fields of an item are its digest, and what :func:`perceived` adds.
    """
    cosines, places = nearest(train, held_out)
    copies: dict[int, tuple[int, int, int]] = {}  # the best, as they are before as mirrored
    for mirrored in (False, True):
        found = best_copies(_pictures(known), _pictures(asked, mirrored), DISTANCE)
        for one, (kind, bits, other) in found.items():
            copies.setdefault(one, (2 if mirrored else kind, bits, other))
    told = []
    for number, item in enumerate(asked):
        contact = Contact(item.place, known[int(places[number])].place, cosines[number].item())
        if number in copies:
            kind, _, other = copies[number]
            contact = replace(contact, copy=KINDS[kind], copy_of=known[other].place)
        told.append(contact)
    return told


def _pictures(items: Sequence[EvalItem], mirrored: bool = False) -> Pictures:
    columns = (-5, -2, -1) if mirrored else (-5, -4, -3)
    digests, hashes, cells = ([item.fields[place] for item in items] for place in columns)
    return Pictures(
        keys=[item.key for item in items],
        places=np.arange(len(items)),
        exact=np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2),
        hash=np.array(hashes, np.uint64),
        cells=np.array(cells, np.uint8).reshape(len(items), -1),
        captions=np.empty(0, np.uint64),
        caption_of=np.empty(0, np.int64),
    )
