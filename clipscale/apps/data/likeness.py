"""When two pictures are the same: exactly, by their bytes, or nearly, by what they look like.

Near duplicates agree in the 64 bits of a perceptual hash (pHash: the signs of the lowest 8 x 8 cosine terms of the
32 x 32 grey picture against their median) but for D, and in each of 8 x 8 colour cells but for 4 D of 255 levels. The
hash alone takes drawings that differ in colour or in a small part for one another: of the pairs that it finds within 4
bits among flat emoji, one in seventy is the same picture to the eye.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from clipscale.apps.data.account import Account
from clipscale.apps.data.jobs import MARKERS, Jobs
from clipscale.apps.data.shards import all_samples
from clipscale.apps.writing import whole
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, decode_image, find_captions, find_image

SIDE, CELLS = 32, 8  # of the picture that is hashed, and of what is kept of it
COLOUR = 4  # levels by which a colour cell may differ, for each bit that the hashes may
CANDIDATES = 1 << 21  # pairs that are looked at in one go

_PLACES = np.arange(SIDE)
_COSINES = np.cos(np.pi * (2 * _PLACES[None] + 1) * _PLACES[1 : CELLS + 1, None] / (2 * SIDE))
_GREY = np.array([0.299, 0.587, 0.114])


class Pictures(NamedTuple):
    """The N usable images of a shard.

    ``places`` Int[N] in the shard, ``exact`` UInt64[N, 2] of the bytes' sha256, ``hash`` UInt64[N], ``cells``
    UInt8[N, 192]; the captions are UInt64[C], ``caption_of`` Int[C] says of which image each one is.
    """

    keys: list[str]
    places: NDArray[np.int64]
    exact: NDArray[np.uint64]
    hash: NDArray[np.uint64]
    cells: NDArray[np.uint8]
    captions: NDArray[np.uint64]
    caption_of: NDArray[np.int64]


class LookTask(NamedTuple):
    """One shard, and the file of what its pictures look like."""

    file: ShardFile
    path: Path
    data: Data


def look_at(work: Jobs, step: str, files: Sequence[ShardFile], data: Data) -> tuple[tuple[Path, ...], Account]:
    """Look at all pictures of some shards: the file of each shard's, and what became of the samples."""
    place = work.output / MARKERS / work.tool / "pictures" / step
    tasks = {f"{i:06d}": LookTask(file, place / f"{i:06d}.npz", data) for i, file in enumerate(files)}
    account = Account.of(files, work.run(step, look, tasks))
    return tuple(task.path for task in tasks.values()), account


def look(task: LookTask) -> dict[str, Any]:
    """Write the Pictures of a shard; counts ``read``, ``kept`` and ``dropped`` samples."""
    torch.set_num_threads(1)  # processes are what -j adds
    dropped: Counter[str] = Counter()
    keys: list[str] = []
    places: list[int] = []
    exact: list[bytes] = []
    hashes: list[int] = []
    cells: list[NDArray[np.uint8]] = []
    captions: list[tuple[int, int]] = []
    read = 0
    for place, sample in enumerate(all_samples(task.file)):
        read += 1
        try:
            if sample.problem:
                raise BadSample(sample.problem)
            data = find_image(sample, task.data.image_keys)
            value, small = perceive(decode_image(data, task.data.max_pixels))
        except BadSample as reason:
            dropped[str(reason)] += 1
            continue
        captions += [(caption, len(keys)) for caption in _captions(sample, task.data.caption_key)]
        keys.append(sample.key.partition("/")[2])
        places.append(place)
        exact.append(hashlib.sha256(data).digest()[:16])
        hashes.append(value)
        cells.append(small)
    with whole(task.path) as out:
        np.savez(
            out, keys=np.frombuffer(json.dumps(keys).encode(), np.uint8), places=np.array(places, np.int64),
            exact=np.frombuffer(b"".join(exact), np.uint64).reshape(-1, 2), hash=np.array(hashes, np.uint64),
            cells=np.array(cells, np.uint8).reshape(-1, 3 * CELLS**2),
            captions=np.array([caption for caption, _ in captions], np.uint64),
            caption_of=np.array([owner for _, owner in captions], np.int64),
        )  # fmt: skip
    return {"read": read, "kept": len(keys), "dropped": dropped, "damage": task.file.summary.damage}


def load_pictures(path: Path) -> Pictures:
    """What ``look`` wrote."""
    with np.load(path) as stored:
        keys = json.loads(stored["keys"].tobytes())
        return Pictures(keys, *(stored[name] for name in Pictures._fields[1:]))


def perceive(image: torch.Tensor) -> tuple[int, NDArray[np.uint8]]:
    """The hash and the colour cells UInt8[192] of UInt8[3, H, W]."""
    small = F.interpolate(image[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0].numpy()
    terms = _COSINES @ np.tensordot(_GREY, small, 1) @ _COSINES.T
    # Rounded, or the noise of the arithmetic would be the hash of a picture in one colour.
    terms = terms.ravel().round(2)
    bits = np.packbits(terms > np.median(terms))
    step = SIDE // CELLS
    cells = small.reshape(3, CELLS, step, CELLS, step).mean((2, 4)).round().astype(np.uint8)
    return int.from_bytes(bits.tobytes(), "big"), cells.ravel()


def _captions(sample: Member, key: str) -> list[int]:
    """A 64-bit hash of each caption, whatever its case and spacing; none where it has none."""
    try:
        found = {" ".join(caption.casefold().split()) for caption in find_captions(sample, key)}
    except BadSample:
        return []
    hashed = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8) for text in sorted(found))
    return [int.from_bytes(value.digest(), "big") for value in hashed]


def alike(one: NDArray[np.uint8], other: NDArray[np.uint8], distance: int) -> NDArray[np.bool_]:
    """Whether colour cells UInt8[P, 192] differ by no more than ``distance`` allows, Bool[P]."""
    difference = np.maximum(one, other) - np.minimum(one, other)
    return difference.max(axis=-1) <= COLOUR * distance


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """All pairs ``a < b`` of hashes UInt64[N] that differ in at most ``distance`` bits, Int[P, 2] in order.

    Not by comparing all with all: of ``distance`` different bits, spread over M bands, some band has ``distance // M``
    or fewer (Norouzi et al. 2012, "Fast search in Hamming space with multi-index hashing"). So each hash looks up, in
    a sorted list per band, the values that its own becomes with that many bits turned.
    """
    found = [np.empty((0, 2), np.int64)]
    bands = _band_count(len(hashes), distance)
    edges = [64 * i // bands for i in range(bands + 1)]
    for low, high in pairwise(edges):
        values = hashes >> np.uint64(low) & np.uint64((1 << high - low) - 1)
        order = np.argsort(values, kind="stable")
        ranked = values[order]
        for bits in range(distance // bands + 1):
            for turned in combinations(range(high - low), bits):
                # In the order of their values, so that neighbours look in the same part of the list.
                wanted = ranked ^ np.uint64(sum(1 << bit for bit in turned))
                start = np.searchsorted(ranked, wanted)
                stop = np.searchsorted(ranked, wanted, "right")
                found += _close_ones(hashes, order, start, stop, distance)
    return np.unique(np.concatenate(found), axis=0)


def _close_ones(
    hashes: NDArray[np.uint64],
    order: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    distance: int,
) -> Iterator[NDArray[np.int64]]:
    """Of the candidates ``order[start:stop]`` of each hash, by ``order``, those behind it that are close enough."""
    sizes = stop - start
    upto = np.cumsum(sizes)
    cuts = np.searchsorted(upto, np.arange(0, upto[-1] if len(upto) else 0, CANDIDATES), "right")
    for first, last in pairwise([*cuts.tolist(), len(sizes)]):
        some = sizes[first:last]
        ones = np.repeat(order[first:last], some)
        behind = np.arange(len(ones)) - np.repeat(np.cumsum(some) - some, some)
        others = order[np.repeat(start[first:last], some) + behind]
        close = (ones < others) & (np.bitwise_count(hashes[ones] ^ hashes[others]) <= distance)
        if close.any():
            yield np.stack([ones[close], others[close]], axis=1)


def _band_count(count: int, distance: int) -> int:
    """The number of bands with the fewest look-ups and candidates, if the hashes were random."""

    def cost(bands: int) -> float:
        width = 64 // bands
        looked_up = sum(math.comb(width, bits) for bits in range(distance // bands + 1))
        return bands * looked_up * (1 + count / 2**width)

    return min(range(1, distance + 2), key=cost)


def first_of_each(
    exact: NDArray[np.uint64], hashes: NDArray[np.uint64], cells: NDArray[np.uint8], distance: int
) -> NDArray[np.int64]:
    """For each of N pictures, in order, the first one that it is a duplicate of, or itself: Int[N].

    A picture is dropped for the first one that stays and is near it, or that is its equal in bytes or near it with the
    same hash, whatever becomes of that one. ``exact`` is UInt64[N, 2], ``hashes`` UInt64[N], ``cells`` UInt8[N, 192].
    """
    _, firsts, inverse = np.unique(exact, axis=0, return_index=True, return_inverse=True)
    parent = firsts[inverse.reshape(-1)]
    for same in _equal_groups(hashes, np.sort(firsts)):
        while len(same) > 1:
            close = alike(cells[same], cells[same[0]], distance)
            parent[same[close]] = same[0]
            same = same[~close]
    leaders = np.flatnonzero(parent == np.arange(len(parent)))
    pairs = leaders[near_pairs(hashes[leaders], distance)]
    apart = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
    for at in np.lexsort((pairs[:, 0], apart, pairs[:, 1])).tolist():
        one, other = pairs[at].tolist()
        # All pairs of an earlier picture come before this one, so whether it stays is settled.
        if parent[one] == one and parent[other] == other and alike(cells[one], cells[other], distance):
            parent[other] = one
    for _ in range(2):  # to an equal's first, and what that one was dropped for
        parent = parent[parent]
    return parent


def _equal_groups(hashes: NDArray[np.uint64], chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The pictures among ``chosen`` that share a hash, in order, two or more at a time."""
    order = chosen[np.argsort(hashes[chosen], kind="stable")]
    edges = np.flatnonzero(np.diff(hashes[order])) + 1
    yield from (group for group in np.split(order, edges) if len(group) > 1)


def joined(paths: Sequence[Path]) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    """``exact`` and ``hash`` of many shards end to end, and where each shard begins, Int[S + 1]."""
    parts = [load_pictures(path) for path in paths]
    starts = np.cumsum([0, *(len(part.places) for part in parts)])
    exact = np.concatenate([part.exact for part in parts])
    return exact, np.concatenate([part.hash for part in parts]), starts
