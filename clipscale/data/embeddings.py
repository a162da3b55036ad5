"""Embeddings that a teacher left with the samples: ``.npy`` members, read without trust."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from clipscale.data.samples import BadSample, Member

_DTYPES = ("float16", "float32", "float64")
_LONGEST_HEADER = 4096  # bytes


@dataclass(frozen=True)
class StoredTeacher:
    """The members that hold a teacher's embeddings of the image and of the captions, and their dimension D_t."""

    image_key: str
    text_key: str
    dim: int

    def read(self, sample: Member, place: int, captions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The embeddings, Float32[D_t] each, of the image and of caption number ``place`` of as many as are stored.

        Raises BadSample where one is absent, or is not what it should be.
        """
        image, text = read_embeddings(sample, self.image_key), read_embeddings(sample, self.text_key)
        if image.shape != (1, self.dim) or text.shape != (captions, self.dim):
            raise BadSample("bad_teacher_embedding")
        return image[0], text[place]


def read_embeddings(sample: Member, key: str) -> NDArray[np.float32]:
    """The vectors in a member, L2-normalised, Float32[rows, D]; a single one may be stored as [D].

    Raises BadSample where the member is absent, or is anything but a finite array of floats of the size it says.
    """
    data = sample.members.get(key)
    if data is None:
        raise BadSample("no_teacher_embedding")
    start = 10 if data[6:7] == b"\1" else 12
    body = start + int.from_bytes(data[8:start], "little")
    try:
        if body > _LONGEST_HEADER:
            raise ValueError("a header that long describes something else")
        shape, is_fortran, dtype = _layout(data[:body])
        if dtype.name not in _DTYPES or not 1 <= len(shape) <= 2:
            raise ValueError("no vectors of floats")
        # Raises ValueError where the body has another size than the header says; what it says takes no memory.
        stored = np.frombuffer(data, dtype, offset=body).reshape(shape, order="F" if is_fortran else "C")
    except Exception as error:  # numpy's parser of headers fails in many ways
        raise BadSample("bad_teacher_embedding") from error
    vectors = np.atleast_2d(stored).astype(np.float64)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not vectors.size or not (np.isfinite(norms) & (norms > 0)).all():
        raise BadSample("bad_teacher_embedding")
    return (vectors / norms).astype(np.float32)


@lru_cache(maxsize=256)
def _layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type that a header tells; those of a data set are all alike, and slow to parse."""
    raw = io.BytesIO(header)
    read = npy.read_array_header_1_0 if npy.read_magic(raw) == (1, 0) else npy.read_array_header_2_0
    return read(raw)
