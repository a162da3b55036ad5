"""What a training image and a caption may go through: drawn from the sample's key, and nothing unless asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from clipscale.config.model import ResizeMode
from clipscale.data.augment import ColorOptions, change_colors
from clipscale.data.captions import clean_caption, from_random_sentence
from clipscale.data.order import KeyedRandom
from clipscale.data.samples import ImageOptions, eval_crop, train_crop

IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 20, 30), dtype=np.uint8))


def test_no_option_draws_nothing() -> None:
    random, untouched = KeyedRandom(1), KeyedRandom(1)
    assert change_colors(IMAGE, ColorOptions(), random) is IMAGE
    assert random.uniform() == untouched.uniform()


def test_jitter_depends_on_the_key_alone() -> None:
    options = ColorOptions((0.4, 0.4, 0.4, 0.1))
    first, again, other = (change_colors(IMAGE, options, KeyedRandom(key)) for key in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == IMAGE.shape
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_strength_is_one_change() -> None:
    random = KeyedRandom(5)
    random.uniform()
    factor = random.uniform(0.5, 1.5)
    changed = change_colors(IMAGE, ColorOptions((0.5, 0, 0, 0)), KeyedRandom(5))
    assert torch.equal(changed, TF.adjust_brightness(IMAGE, factor))


def test_greyscale() -> None:
    grey = change_colors(IMAGE, ColorOptions(grayscale_prob=1.0), KeyedRandom(0))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    often = sum(
        change_colors(IMAGE, ColorOptions(grayscale_prob=0.25), KeyedRandom(k)) is not IMAGE for k in range(400)
    )
    assert 70 <= often <= 130


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (2000, 3), (1, 1)])
def test_resize_modes(size: tuple[int, int]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for mode in ResizeMode:
        assert eval_crop(image, 16, mode).shape == (3, 16, 16)
    assert (eval_crop(image, 16, ResizeMode.squash) == 0).all()
    ground = (eval_crop(image, 16, ResizeMode.longest) == 255).float().mean().item()
    assert ground == pytest.approx(1 - min(size) / max(size), abs=0.07)


def test_without_a_random_crop_training_sees_what_evaluation_sees() -> None:
    for mode in ResizeMode:
        options = ImageOptions(16, None, (0.75, 1.33), 10**6, mode)
        assert torch.equal(train_crop(IMAGE, options, KeyedRandom(0)), eval_crop(IMAGE, 16, mode))


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a <b>red</b> bus", "a red bus"),
        ("see https://example.org/a?b=c now", "see now"),
        ("<PERSON> at the sea", "person at the sea"),
        ("two\tlines\r\n\x00here\u200b", "two lines here"),
        ("3 < 5 and 7 > 2", "3 < 5 and 7 > 2"),
        ("www.example.org", ""),
        ("👨‍👩‍👧 می‌خواهم", "👨‍👩‍👧 می‌خواهم"),
        ("ein Übergang, naïve 東京", "ein Übergang, naïve 東京"),
    ],
)
def test_cleaning(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_a_caption_from_any_of_its_sentences() -> None:
    caption = "One. Two! Three? Four"
    found = {from_random_sentence(caption, KeyedRandom(key)) for key in range(50)}
    assert found == {"One. Two! Three? Four", "Two! Three? Four", "Three? Four", "Four"}
    report = "A 3.5 cm nodule, e.g. in the U.S.A. today."
    assert {from_random_sentence(report, KeyedRandom(key)) for key in range(50)} == {report, *(
        report[report.index(start) :] for start in ("in the", "today")
    )}  # fmt: skip
    assert from_random_sentence("no end of sentence", KeyedRandom(0)) == "no end of sentence"
