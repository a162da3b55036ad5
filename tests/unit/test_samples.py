"""Decoding, cropping and captions; what cannot be used is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from clipscale.data.order import KeyedRandom
from clipscale.data.samples import (
    BadSample,
    ImageOptions,
    Member,
    decode_image,
    eval_crop,
    find_captions,
    find_field,
    find_image,
    pack,
    preprocess,
    train_crop,
)

LIMIT = 10_000_000


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.add.outer(np.arange(size[1]) * 5, np.arange(size[0]) * 3).astype(np.uint8)
    return Image.fromarray(np.stack([pixels, pixels[::-1], 255 - pixels], -1)).convert(mode)


def test_jpeg_equals_pil() -> None:
    data = encode(picture(), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(decode_image(data, LIMIT).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_modes(mode: str) -> None:
    assert decode_image(encode(picture(mode), "JPEG"), LIMIT).shape == (3, 30, 40)


def test_transparency_shows_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_image(encode(clear, "PNG"), LIMIT) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    assert (decode_image(encode(palette, "PNG", transparency=0), LIMIT) == 255).all()


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode_image(encode(Image.fromarray(ramp), "PNG"), LIMIT)
    assert decoded.min() == 0 and decoded.max() == 255 and 120 < decoded.float().mean() < 135


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(picture(), "JPEG", exif=exif), LIMIT).shape == (3, 40, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"<html>not found</html>", "undecodable_image"),
        (encode(picture(size=(400, 300)), "JPEG")[:1500], "undecodable_image"),
        (encode(Image.new("L", (4000, 4000)), "PNG"), "too_many_pixels"),
    ],
)
def test_bad_images_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(data, LIMIT)


def test_fields_of_a_sample() -> None:
    sample = Member("s/k", {"png": b"x", "txt": b" a dog ", "json": b'{"captions": ["one", " ", "two"], "n": 3}'})
    assert find_image(sample, ["jpg", "png"]) == b"x"
    assert find_captions(sample, "txt") == ["a dog"]
    assert find_captions(sample, "json:captions") == ["one", "two"]
    assert find_field(sample, "json:n") == 3


@pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
        ({}, "txt", "no_caption"),
        ({"txt": b"  "}, "txt", "empty_caption"),
        ({"txt": "é".encode("latin-1")}, "txt", "bad_text_encoding"),
        ({"json": b"{"}, "json:captions", "bad_json"),
        ({"json": b"{}"}, "json:captions", "no_captions"),
        ({"json": b'{"captions":' + b"[" * 200_000}, "json:captions", "bad_json"),
        ({"json": b"[]"}, "json:captions", "bad_json"),
        ({}, "json:captions", "no_json|no_captions"),
    ],
)
def test_bad_captions_are_refused(members: dict[str, bytes], key: str, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        find_captions(Member("s/k", members), key)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (200, 3), (3, 200), (1, 1)])
def test_crops_have_the_size_and_depend_on_the_key_alone(size: tuple[int, int]) -> None:
    options = ImageOptions(24, (0.5, 1.0), (0.75, 4 / 3), LIMIT)
    image = torch.from_numpy(np.array(picture(size=size))).permute(2, 0, 1)
    crops = [train_crop(image, options, KeyedRandom(0, i)) for i in (1, 1, 2)]
    assert all(crop.shape == (3, 24, 24) and crop.dtype == torch.uint8 for crop in crops)
    assert torch.equal(crops[0], crops[1])
    if min(size) > 20:
        assert not torch.equal(crops[0], crops[2])


@pytest.mark.parametrize("size", [(40, 30), (33, 70), (24, 24), (5, 9)])
def test_eval_crop_equals_open_clips(size: tuple[int, int]) -> None:
    from open_clip.transform import image_transform

    image = picture(size=size)
    theirs = image_transform(24, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)(image) * 255
    ours = preprocess(image, 24)
    assert ours.shape == (3, 24, 24)
    assert torch.equal(ours.float(), theirs.round()) and (ours.float() - theirs).abs().max() < 1e-4
    assert torch.equal(ours, eval_crop(torch.from_numpy(np.array(image)).permute(2, 0, 1), 24))


def test_pack() -> None:
    ids, lengths = pack([np.array([1, 2, 3], np.int32), np.array([4], np.int32)])
    assert ids.tolist() == [1, 2, 3, 4] and lengths.tolist() == [3, 1]
    assert ids.dtype == lengths.dtype == torch.int32
