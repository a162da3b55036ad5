"""One sample: bytes in, a uint8 image and token ids out; what cannot be used is refused with a reason."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import center_crop

from clipscale.config.model import ResizeMode
from clipscale.data.augment import ColorOptions
from clipscale.data.order import KeyedRandom

LONGEST = 32  # times the shorter side: what an evaluation resizes of an image; it uses one times


class BadSample(Exception):
    """A sample that cannot be trained on; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Member:
    """A raw sample: ``shard-file-name/sample-key`` and its members by lower-case suffix.

    ``problem`` is why it cannot be used, if that is known already; ``beyond`` names the samples that follow the last
    one of a shard which was said to end there.
    """

    key: str
    members: dict[str, bytes]
    problem: str = ""
    beyond: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageOptions:
    """How training images are cut: side in pixels, ranges of area share and aspect ratio, largest pixel count.

    Without ``crop_scale`` they are cut as in evaluation, by ``resize_mode``.
    """

    size: int
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    max_pixels: int
    resize_mode: ResizeMode = ResizeMode.shortest
    colors: ColorOptions = field(default_factory=ColorOptions)


def find_image(sample: Member, image_keys: Sequence[str]) -> bytes:
    """The bytes of a sample's image. Raises BadSample when it has none."""
    for key in image_keys:
        if key in sample.members:
            return sample.members[key]
    raise BadSample("no_image")


def find_field(sample: Member, key: str) -> Any:
    """The value at ``json:FIELD`` or of a member as text. Raises BadSample when it is absent or unreadable."""
    if key.startswith("json:"):
        field = key.removeprefix("json:")
        try:
            return json.loads(sample.members["json"])[field]
        except KeyError:
            raise BadSample(f"no_{field}") from None
        except (ValueError, TypeError, RecursionError):
            raise BadSample("bad_json") from None
    if key not in sample.members:
        raise BadSample("no_caption" if key == "txt" else f"no_{key}")
    try:
        return sample.members[key].decode()
    except UnicodeDecodeError:
        raise BadSample("bad_text_encoding") from None


def find_captions(sample: Member, caption_key: str) -> list[str]:
    """All captions of a sample, at least one. Raises BadSample when there is none."""
    kept = [caption for caption in stored_texts(sample, caption_key) if caption]
    if not kept:
        raise BadSample("empty_caption")
    return kept


def stored_texts(sample: Member, key: str) -> list[str]:
    """The text or the list of texts at ``key``, each in its place, stripped; what is no text there is empty.

    Raises BadSample when there is nothing at ``key``, or it is unreadable.
    """
    value = find_field(sample, key)
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text.strip() if isinstance(text, str) else "" for text in texts]


def find_negatives(sample: Member, negatives_key: str) -> list[str]:
    """All texts of a sample that are wrong about its image on purpose; it need not have any."""
    try:
        return [text for text in stored_texts(sample, negatives_key) if text]
    except BadSample:
        return []


def find_label(sample: Member, key: str) -> int:
    """The class index at ``key``. Raises BadSample when there is none."""
    value = find_field(sample, key)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int):
        return value
    raise BadSample("label_is_no_number")


def list_members(sample: Member) -> str:
    """The members of a sample and the fields of its JSON, to say where something could be found."""
    try:
        fields = json.loads(sample.members["json"])
    except (KeyError, ValueError, RecursionError):
        fields = None
    inside = ", ".join(sorted(fields)) if isinstance(fields, dict) and fields else ""
    return ", ".join(f"json ({inside})" if k == "json" and inside else k for k in sorted(sample.members))


def decode_image(data: bytes, max_pixels: int) -> torch.Tensor:
    """Decode to RGB, UInt8[3, H, W], upright, transparency on white. Raises BadSample.

    Plain JPEGs take torchvision's decoder, several times faster than PIL and equal to it; PIL does the rest.
    """
    with undecodable():
        if size := _plain_jpeg_size(data):
            _refuse_bomb(*size, max_pixels)
            try:
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            except RuntimeError:
                pass  # libjpeg refuses some files that PIL reads, and the other way round
        return _to_rgb(open_image(data, max_pixels))


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image as it is stored, whole: in its own mode, not turned upright yet. Raises BadSample."""
    if not data:
        raise BadSample("empty_image")
    with undecodable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about large images; max_pixels decides
        image = Image.open(io.BytesIO(data))
        _refuse_bomb(image.width, image.height, max_pixels)
        image.load()  # raises on truncated data, before any conversion hides it
        return image


@contextmanager
def undecodable() -> Iterator[None]:
    """Whatever goes wrong with an image inside is its own fault: a BadSample."""
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels") from error
    except Exception as error:
        raise BadSample("undecodable_image") from error


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample("too_many_pixels")


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an 8-bit grey or colour JPEG that carries no EXIF block, from its markers; None otherwise."""
    place, end = 2, len(data) - 9
    if data[:2] != b"\xff\xd8":
        return None
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xC2:
            bits, components = data[place + 4], data[place + 9]
            height, width = int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
            return (width, height) if bits == 8 and components in (1, 3) else None
        if not 0xC3 <= marker <= 0xFE or marker == 0xE1:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def upright(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    """The image turned as its EXIF block says, and in 8 bits.

    ``window`` holds the values of a deep greyscale image that become black and white; None takes its own range.
    """
    image = ImageOps.exif_transpose(image)
    if not is_deep(image):
        return image
    values = np.asarray(image, dtype=np.float64)  # PIL would clip it to white
    low, high = window or (np.nanmin(values), np.nanmax(values))
    scaled = np.rint(np.nan_to_num((values - low) / max(high - low, 1e-12)) * 255.0)
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Whether it is greyscale of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def has_transparency(image: Image.Image) -> bool:
    """Whether pixels can be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _to_rgb(image: Image.Image) -> torch.Tensor:
    image = upright(image, None if image.mode == "F" else (0.0, 65535.0))
    if has_transparency(image):
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def train_crop(image: torch.Tensor, options: ImageOptions, random: KeyedRandom) -> torch.Tensor:
    """CLIP's only augmentation, a random resized crop (paper, section 2.3): UInt8[3, H, W] to UInt8[3, S, S]."""
    if options.crop_scale is None:
        return eval_crop(image, options.size, options.resize_mode)
    height, width = image.shape[-2:]
    low, high = (math.log(ratio) for ratio in options.crop_ratio)
    for _ in range(10):
        area = height * width * random.uniform(*options.crop_scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top, left = random.below(height - h + 1), random.below(width - w + 1)
            break
    else:  # no such crop fits: the largest central one whose ratio is allowed
        ratio = min(max(width / height, options.crop_ratio[0]), options.crop_ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        top, left = (height - h) // 2, (width - w) // 2
    return _resize(image[:, top : top + h, left : left + w], (options.size, options.size))


def eval_crop(image: torch.Tensor, size: int, mode: ResizeMode = ResizeMode.shortest) -> torch.Tensor:
    """Resize to a square without chance, by PIL's bicubic filter: UInt8[3, H, W] to UInt8[3, S, S].

    ``shortest``, CLIP's evaluation transform, fits the shorter side and cuts the centre; ``longest`` fits the longer
    side on a white ground; ``squash`` fits both.
    """
    height, width = image.shape[-2:]
    if mode is ResizeMode.squash:
        return _resize_as_pil(image, (size, size))
    if mode is ResizeMode.longest:
        scale = size / max(height, width)
        fitted = _resize_as_pil(image, (max(1, round(height * scale)), max(1, round(width * scale))))
        top, left = (size - fitted.shape[-2]) // 2, (size - fitted.shape[-1]) // 2
        square = image.new_full((3, size, size), 255)
        square[:, top : top + fitted.shape[-2], left : left + fitted.shape[-1]] = fitted
        return square
    if max(height, width) > LONGEST * min(height, width):  # resized whole, a few kB of an image could fill the memory
        image = center_crop(image, [min(height, LONGEST * width), min(width, LONGEST * height)])
        height, width = image.shape[-2:]
    # The longer side is rounded down, as torchvision's Resize does.
    image = _resize_as_pil(image, (size if height <= width else int(size * height / width),
                            size if width <= height else int(size * width / height)))  # fmt: skip
    return center_crop(image, [size, size])


def _resize_as_pil(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """By PIL itself, as everybody's evaluations do: torch's resize is a step off here and there."""
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(image.shape[-2:]) == size:
        return image.contiguous()
    # On uint8 this is PIL's within a step, what torchvision's resize would call, and the quicker one.
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def preprocess(image: Image.Image, size: int, mode: ResizeMode = ResizeMode.shortest) -> torch.Tensor:
    """A PIL image as a model takes it: UInt8[3, S, S]."""
    return eval_crop(_to_rgb(image), size, mode)


def pack(captions: Sequence[NDArray[np.int32]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids laid end to end, Int32[T], and their lengths, Int32[B]."""
    lengths = torch.tensor([len(ids) for ids in captions], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(captions)), lengths


def pack_some(groups: Sequence[Sequence[NDArray[np.int32]]], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of B samples with up to ``most`` texts each: ids end to end, Int32[T], and lengths, Int32[B * most].

    A text that a sample lacks has length 0, behind those that it has.
    """
    absent = np.empty(0, np.int32)
    return pack([ids for group in groups for ids in (*group, *[absent] * (most - len(group)))])


def content_digest(content: bytes) -> bytes:
    """Eight bytes that tell contents apart, on every machine alike."""
    return hashlib.blake2b(content, digest_size=8).digest()


def join_digests(digests: Sequence[bytes]) -> torch.Tensor:
    """Digests as numbers, Int64[B]."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").astype(np.int64))


def caption_ids(captions: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    """Int64[B] for the token ids of B captions: equal for equal ones, and hardly ever for others."""
    return join_digests([content_digest(ids.astype("<i4", copy=False).tobytes()) for ids in captions])
