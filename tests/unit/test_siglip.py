"""SigLIP's models are open_clip's and Hugging Face's on the same weights: features, loss, gradients, and every bit of
the weights there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from clipscale.checkpoint.interop import from_hf, from_open_clip, to_hf, to_open_clip
from clipscale.config import load_group
from clipscale.config.model import Activation, Model, TextPool
from clipscale.config.running import Parallel
from clipscale.errors import ClipscaleError
from clipscale.losses import siglip_loss
from clipscale.models import CLIP, build_model
from clipscale.parallel.parallelize import parallelize
from tests.peers import hf_siglip, open_clip_siglip, same_state, siglip_config
from tests.unit.test_gradients import WAYS


class Captions(NamedTuple):
    """Int64[B, L], ended and padded by one id, and what a loader makes of them: Int32[T] and Int32[B]."""

    padded: Tensor
    ids: Tensor
    lengths: Tensor


def batch(config: Model, lengths: list[int]) -> tuple[Tensor, Captions]:
    generator, text = torch.Generator().manual_seed(1), config.text
    padded = torch.full((len(lengths), config.context_length), text.pad_id)
    for row, length in zip(padded, lengths, strict=True):
        row[: length - 1] = torch.randint(2, text.vocab_size, (length - 1,), generator=generator)
        row[length - 1] = text.eot_id
    ids = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    side = config.vision.image_size
    images = torch.randn(len(lengths), 3, side, side, generator=generator)
    return images, Captions(padded, ids.int(), torch.tensor(lengths, dtype=torch.int32))


class Step(NamedTuple):
    """Features Float[B, D] of both modalities, the loss, and gradients by our names."""

    image: Tensor
    text: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]


def step_of_open_clip(model: Any, images: Tensor, captions: Captions) -> Step:
    image, text, scale, bias = model(images, captions.padded)
    loss = SigLipLoss()(image, text, scale, bias)
    return Step(image, text, loss, from_open_clip(gradients(loss, model)))


def step_of_hf(model: Any, images: Tensor, captions: Captions) -> Step:
    out = model(input_ids=captions.padded, pixel_values=images, return_loss=True)
    return Step(out.image_embeds, out.text_embeds, out.loss, from_hf(gradients(out.loss, model)))


def our_step(model: CLIP, images: Tensor, captions: Captions, packed: bool, way: str = "plain") -> Step:
    if packed:
        module = parallelize(model, Parallel(**WAYS[way]), torch.device("cpu")).module
        image, text, _, scale, bias = module(images, captions.ids, captions.lengths)
    else:
        image, text = model.encode_image(images, normalize=True), model.encode_text(captions.padded, normalize=True)
        scale, bias = model.temperature()
    assert bias is not None
    loss = siglip_loss(image, text, scale, bias)
    return Step(image, text, loss, gradients(loss, model))


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(found: Step, truth: Step) -> None:
    """The largest errors of features, of the loss and of a parameter's gradient are below their bounds."""
    assert found.gradients.keys() == truth.gradients.keys()
    everything = torch.stack([g.norm() for g in truth.gradients.values()]).norm()
    relative = {
        name: float((found.gradients[name] - g).norm() / max(g.norm(), 1e-6 * everything))
        for name, g in truth.gradients.items()
    }
    features = max(float((found[i] - truth[i]).detach().abs().max()) for i in (0, 1))
    loss = float((found.loss / truth.loss - 1).detach().abs())
    worst = max(relative, key=relative.__getitem__)
    assert features <= 1e-5 and loss <= 1e-6 and relative[worst] <= 1e-5, (features, loss, worst, relative[worst])
    print(f"features {features:.1e}, loss {loss:.1e}, gradient {relative[worst]:.1e} ({worst})")


Peer = tuple[Callable[..., Any], Callable[..., Step], Callable[..., Any], Callable[..., Any]]
PEERS: dict[str, Peer] = {
    "open_clip": (open_clip_siglip, step_of_open_clip, from_open_clip, to_open_clip),
    "hf": (hf_siglip, step_of_hf, from_hf, to_hf),
}
LENGTHS = {"drawn": [5, 16, 2, 9, 1], "whole": [16] * 3}


# Who else has it, and the activations of its image and text towers: open_clip's SigLIP, its SigLIP 2, Hugging Face's.
CASES = [
    ("open_clip", Activation.gelu, Activation.gelu),
    ("open_clip", Activation.gelu, Activation.gelu_tanh),
    ("hf", Activation.gelu_tanh, Activation.gelu_tanh),
]


@pytest.mark.parametrize(("peer", "image", "text"), CASES)
def test_a_step_is_that_of_the_other_library(peer: str, image: Activation, text: Activation) -> None:
    make, step, from_theirs, to_theirs = PEERS[peer]
    config = siglip_config()
    config.activation, config.text.activation = image, None if image is text else text
    other, ours = make(config), build_model(config, logit_scale=10.0, logit_bias=-10.0).eval()
    state = other.state_dict()
    ours.load_state_dict(from_theirs(state))
    same_state(to_theirs(ours.state_dict()), state)
    same_state(from_theirs(to_theirs(ours.state_dict())), ours.state_dict())
    for lengths in LENGTHS.values():
        images, captions = batch(config, lengths)
        truth = step(other, images, captions)
        for packed in (True, False):
            assert_same(our_step(ours, images, captions, packed), truth)


@pytest.mark.parametrize("way", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_step_in_other_ways(way: str) -> None:
    config = siglip_config()
    other, ours = open_clip_siglip(config), build_model(config, logit_scale=10.0, logit_bias=-10.0).eval()
    ours.load_state_dict(from_open_clip(other.state_dict()))
    images, captions = batch(config, LENGTHS["drawn"])
    assert_same(our_step(ours, images, captions, True, way), step_of_open_clip(other, images, captions))


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_a_step_of_the_real_size_is_that_of_the_other_library(peer: str) -> None:
    _, step, from_theirs, to_theirs = PEERS[peer]
    config = load_group("model", "siglip_b_16", Model)
    if peer == "hf":
        config.activation = Activation.gelu_tanh
    other = open_clip_siglip(config) if peer == "open_clip" else hf_siglip(config, layers=12)
    images, captions = batch(config, [9, 64, 23])
    truth, state = step(other, images, captions), other.state_dict()
    del other
    ours = build_model(config, logit_bias=-10.0).eval()
    ours.load_state_dict(from_theirs(state))
    same_state(to_theirs(ours.state_dict()), state)
    for packed in (True, False):
        assert_same(our_step(ours, images, captions, packed), truth)
    for way in WAYS:
        assert_same(our_step(ours, images, captions, True, way), truth)


def test_captions_of_full_length_need_no_padding() -> None:
    """Which is where a model that sees its padding and one that does not are the same."""
    config = siglip_config()
    sees = build_model(config, logit_bias=0.0).eval()
    config = siglip_config()
    config.text.pad_to_context = False
    not_seen = build_model(config, logit_bias=0.0).eval()
    for lengths, same in (([16, 16], True), ([16, 5], False)):
        _, captions = batch(config, lengths)
        one, other = (model.encode_text(captions.padded) for model in (sees, not_seen))
        assert torch.allclose(one, other, atol=1e-6) == same


def test_weights_of_half_a_siglip_have_no_place() -> None:
    config = siglip_config()
    state = build_model(config, logit_bias=0.0).state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "temperature.logit_bias"}
    with pytest.raises(ClipscaleError, match="SiglipModel has a logit_bias, which this model has not"):
        to_hf(without)
    same_state(from_open_clip(to_open_clip(without)), without)
    config.text.pool = TextPool.map
    pooled = build_model(config, logit_bias=0.0).state_dict()
    for convert in (to_hf, to_open_clip):
        with pytest.raises(ClipscaleError, match=r"have no place in that format: text.attn_pool.latent"):
            convert(pooled)
