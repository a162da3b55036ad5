"""``init.weights``: what it reads, and what it refuses with the key that mends it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig

import clipscale
from clipscale.checkpoint.interop import from_hf, from_open_clip, to_timm
from clipscale.checkpoint.pretrained import Pretrained, check_tokenizer, load_pretrained, read_pretrained
from clipscale.checkpoint.told import activation_of, told_by_hf
from clipscale.checkpoint.trunk import of_timm
from clipscale.config import compose, load_group, save_config
from clipscale.config.model import Model
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP, build_model
from tests.hf import byte_pieces
from tests.peers import hf_model, scramble, small


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """open_clip's names."""
    return small("tiny")[1].state_dict()


@pytest.fixture
def tiny() -> CLIP:
    return build_model("tiny", logit_bias=-3.0)


def load(model: CLIP, where: str | Path) -> None:
    load_pretrained(model, read_pretrained(str(where)))


@pytest.mark.parametrize("layout", ["bare.pt", "training.pt", "weights.safetensors", "half.bin", "own.safetensors"])
def test_files(layout: str, state: dict[str, torch.Tensor], tiny: CLIP, tmp_path: Path) -> None:
    path = tmp_path / layout
    if layout == "half.bin":
        state = {name: tensor.half() for name, tensor in state.items()}
    expected = from_open_clip(state)
    if layout == "training.pt":
        inner = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": inner, "optimizer": {"state": {}}}, path)
    elif path.suffix == ".safetensors":
        of_file = expected if layout.startswith("own") else state
        save_file({name: tensor.clone().contiguous() for name, tensor in of_file.items()}, path)
    else:
        torch.save(state, path)
    load(tiny, path)
    found = tiny.state_dict()
    assert found["temperature.logit_bias"].item() == -3, "the weights have none"
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float()), name


def test_a_bias_that_the_softmax_does_not_see(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({**state, "logit_bias": torch.tensor(-10.0)}, tmp_path / "siglip.pt")
    sigmoid, softmax = build_model("tiny", logit_bias=0.0), build_model("tiny")
    load(sigmoid, tmp_path / "siglip.pt")
    load(softmax, tmp_path / "siglip.pt")
    assert sigmoid.temperature.logit_bias is not None and sigmoid.temperature.logit_bias.item() == -10


def open_clip_directory(path: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file({name: tensor.clone() for name, tensor in state.items()}, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


def of_tiny(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """open_clip's configuration of the model ``tiny``, but for what is given."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 16,
            "width": 128,
            "layers": 4,
            "head_width": 32,
            **(vision or {}),
        },
        "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 2, **(text or {})},
        **more,
    }


def test_what_the_source_tells_is_compared(state: dict[str, torch.Tensor], tiny: CLIP, tmp_path: Path) -> None:
    path = open_clip_directory(tmp_path, state, model_cfg=of_tiny(quick_gelu=True))
    with pytest.raises(ClipscaleError, match=r"trained with activation quickgelu, not gelu; use model=tiny_quickgelu$"):
        load(tiny, path)
    load(build_model("tiny_quickgelu"), path)
    open_clip_directory(path, state, model_cfg=of_tiny({"heads": 2}), preprocess_cfg={"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ClipscaleError, match=r"use model.mean=\[0.5,0.5,0.5\] model.text.heads=2$"):
        load(tiny, path)
    open_clip_directory(path, state, model_cfg=of_tiny(vision={"head_width": 64}))
    with pytest.raises(ClipscaleError, match=r"trained with vision.heads 2, not 4; use model.vision.heads=2$"):
        load(tiny, path)
    torch.save(state | {"input_resolution": torch.tensor(64)}, path / "openai.pt")
    with pytest.raises(ClipscaleError, match="use model=tiny_quickgelu"):
        load(tiny, path / "openai.pt")


@pytest.mark.parametrize(
    ("text", "vision", "reason"),
    [
        ({}, {"pool_type": "avg", "final_ln_after_pool": True}, "pool_type=avg; clipscale's of CLIP have tok"),
        ({}, {"pos_embed_type": "sin_cos_2d"}, "pos_embed_type=sin_cos_2d"),
        ({}, {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs={'eps': 1e-06}; clipscale's of CLIP have eps=1e-05"),
        ({}, {"qk_norm": True}, "norms of queries and keys in its image tower"),
        ({"scaled_cosine_attn": True}, {}, "attention by scaled cosines in its text tower"),
        ({"scale_fc": True}, {}, "a norm inside its MLPs in its text tower"),
        ({"norm_kwargs": {"elementwise_affine": False}}, {}, "norms of its text tower have elementwise_affine"),
        ({}, {"layers": [3, 4, 6, 3], "width": 64, "head_width": 32}, "head_width=32; timm's have 64"),
        ({}, {"timm_model_name": "vit_base_patch16_224"}, "timm_pool=avg; clipscale's as timm makes it"),
    ],
)
def test_another_function_of_the_same_names_is_refused(
    text: dict[str, Any], vision: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": of_tiny(text, vision)}))
    with pytest.raises(ClipscaleError, match=re.escape(reason)):
        read_pretrained(str(tmp_path))


def test_old_files_say_it_twice() -> None:
    """transformers takes the part that ends in _dict, and its own defaults of what that leaves out."""
    config = {"model_type": "clip", "text_config": {"num_attention_heads": 4}, "vision_config": {"hidden_act": "gelu"}}
    old = config | {"text_config_dict": {"hidden_act": "gelu"}, "vision_config_dict": {"num_attention_heads": 16}}
    told, expected = told_by_hf(old), CLIPConfig(**old)
    assert told["text.heads"] == expected.text_config.num_attention_heads == 8
    assert told["vision.heads"] == expected.vision_config.num_attention_heads == 16
    assert (told["text.activation"], expected.text_config.hidden_act) == ("gelu", "gelu")
    assert (told["activation"], expected.vision_config.hidden_act) == ("quickgelu", "quick_gelu")


@pytest.mark.parametrize("parts", ["one file", "several"])
def test_a_directory_of_hugging_face(parts: str, tiny: CLIP, tmp_path: Path) -> None:
    other = hf_model()
    other.save_pretrained(tmp_path, **({} if parts == "one file" else {"max_shard_size": "5MB"}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or parts == "several"
    with pytest.raises(ClipscaleError, match="use model=tiny_quickgelu"):
        load(tiny, tmp_path)
    ours = build_model("tiny_quickgelu")
    load(ours, tmp_path)
    for name, tensor in from_hf(other.state_dict()).items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_another_model_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "tiny.pt")
    with pytest.raises(
        ClipscaleError, match=r"is not model=vit_s_16: visual.trunk.cls_token is \[1, 1, 128\].*more such"
    ):
        load(build_model("vit_s_16"), tmp_path / "tiny.pt")
    with pytest.raises(ClipscaleError, match=r"use model=tiny$"):
        load(build_model("vit_s_16"), tmp_path / "tiny.pt")
    state = dict(state)
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ClipscaleError, match=r"text.norm.weight is missing; no option of model has these shapes"):
        load(build_model("tiny"), tmp_path / "less.pt")


class Code:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which the variable sets at its import
    torch.save({"a": Code()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "openai.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    (tmp_path / "broken.pt").write_bytes(b"1234")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    blip = tmp_path / "blip"
    blip.mkdir()
    (blip / "config.json").write_text('{"model_type": "blip"}')
    for where, message in {
        tmp_path / "code.pt": "code.pt is no file of tensors alone",
        tmp_path / "list.pt": "holds no state dict",
        tmp_path / "openai.pt": "is a TorchScript archive; save its weights first",
        tmp_path / "broken.safetensors": "cannot be read",
        tmp_path / "broken.pt": "broken.pt is no file of tensors alone",
        tmp_path / "other.pt": "1 of 1 weights have no place in clipscale's towers: x",
        tmp_path / "nothing": "is no file or directory; give open_clip:NAME/TAG",
        tmp_path: "neither a run directory nor a checkpoint",
        blip: "model_type=blip; only clip and siglip",
        "open_clip:ViT-B32/openai": "open_clip has no model ViT-B32",
        "open_clip:ViT-B-32/mine": "no weights 'mine' of ViT-B-32; choose from openai, ",
        "hf:clipscale/no-such-model": "cannot be downloaded here",
        "open_clip:ViT-B-32/laion2b_s34b_b79k": "cannot be downloaded here",
        "open_clip:coca_ViT-B-32/laion2b_s13b_b90k": "clipscale's models have no decoder",
        "timm:vit_tiny_patch16_224.augreg_in21k": "cannot be downloaded here",
        "timm:vit_tiny_patch16_224.mine": "no weights 'mine' of vit_tiny_patch16_224; choose from ",
        "timm:vit_mine": "timm has no model vit_mine; near it: ",
    }.items():
        with pytest.raises(ClipscaleError) as caught:
            read_pretrained(str(where))
        assert message in str(caught.value), where
        assert "\n" not in str(caught.value) and str(where) in str(caught.value)


def test_open_clips_tags_tell_the_activation() -> None:
    assert activation_of("ViT-B-32", "openai") == "quickgelu", "though the model of this name is not"
    assert activation_of("ViT-B-32-quickgelu", "laion400m_e32") == "quickgelu"
    assert activation_of("ViT-B-32", "laion2b_s34b_b79k") == "gelu"


TIMM = {"tiny": ("vit_base_patch16_clip_224", dict(img_size=64, patch_size=16, embed_dim=128, depth=4, num_heads=4))}
TIMM["rn50"] = ("resnet50_clip", dict(img_size=64, num_classes=128))
TIMM["convnext_base"] = ("convnext_atto", {})


@pytest.mark.parametrize("name", TIMM)
def test_an_image_tower_of_timm(name: str) -> None:
    """Its classifier is left; the text tower and the projection are those drawn from the seed; and back, bit by bit."""
    theirs = timm.create_model(TIMM[name][0], **TIMM[name][1])
    scramble(theirs)
    ours = small(name)[0]
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    state, _ = of_timm(theirs)
    load_pretrained(ours, Pretrained("timm:it", state))
    for key, tensor in ours.state_dict().items():
        if key.startswith("visual.trunk."):
            assert torch.equal(tensor, theirs.state_dict()[key.removeprefix("visual.trunk.")]), key
        else:
            assert torch.equal(tensor, before[key]), key
    back = to_timm(ours.state_dict())
    theirs.load_state_dict(theirs.state_dict() | back)
    assert back.keys() == {key for key in theirs.state_dict() if name == "rn50" or not key.startswith("head.fc")} - (
        {"head.weight", "head.bias"}
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        trunk = theirs.eval() if name == "rn50" else theirs.eval().reset_classifier(0) or theirs
        torch.testing.assert_close(ours.visual.trunk(images), trunk(images), atol=1e-5, rtol=1e-5)


def test_what_timm_tells_of_its_weights() -> None:
    with torch.device("meta"):
        told = of_timm(timm.create_model("vit_tiny_patch16_224"))[1]
    assert told == {"mean": [0.5] * 3, "std": [0.5] * 3, "activation": "gelu", "vision.heads": 3}
    theirs = timm.create_model(TIMM["tiny"][0] + ".openai", **TIMM["tiny"][1])
    with pytest.raises(ClipscaleError, match=r"use .*model.mean=\[0.48"):
        config = load_group("model", "tiny", Model)
        config.mean = [0.5, 0.5, 0.5]
        load_pretrained(CLIP(config), Pretrained("timm:it", *of_timm(theirs)))
    with pytest.raises(ClipscaleError, match=r"init.weights=timm:it is not model=vit_b_32"), torch.device("meta"):
        load_pretrained(CLIP(load_group("model", "vit_b_32", Model)), Pretrained("timm:it", of_timm(theirs)[0]))


def test_ids_and_tokens_are_compared(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = load_group("model", "tiny", Model)
    for text, key in ({"pool_type": "eos", "eos_id": 2}, "eot_id"), ({"pool_type": "last"}, "pad_id"):
        model.text.eot_id, model.text.pad_to_context, model.text.pad_id = 49407, key == "pad_id", 7
        open_clip_directory(tmp_path, state, model_cfg=of_tiny(text))
        with pytest.raises(ClipscaleError, match=rf"use model.text.{key}={2 if key == 'eot_id' else 0}$"):
            load(CLIP(model), tmp_path)
    text = {"num_attention_heads": 4, "eos_token_id": 2, "vocab_size": 300}
    assert told_by_hf({"model_type": "clip", "text_config": text})["text.eot_id"] == 299, "so old files say it"
    byte_pieces().save_pretrained(tmp_path / "words")
    words, pairs = Tokenizer(f"hf:{tmp_path / 'words'}", 32), Tokenizer("clip", 32)
    check_tokenizer(Pretrained("run", state, {}, words), words)
    check_tokenizer(Pretrained("file", state, {}), words)
    with pytest.raises(ClipscaleError, match=r"reads the tokens of clip, not those of .*; use tokenizer.name=clip$"):
        check_tokenizer(Pretrained("run", state, {}, pairs), words)


def test_a_twin_is_of_quickgelu_alone(tiny: CLIP) -> None:
    found = Pretrained("there", tiny.state_dict(), {"activation": "gelu_tanh"})
    with pytest.raises(ClipscaleError, match=r"gelu_tanh, not gelu; use model.activation=gelu_tanh$"):
        load_pretrained(tiny, found)


@pytest.mark.parametrize(("value", "message"), [(0, "is int8"), (1j, "is complex64"), (torch.nan, "not finite")])
def test_values_that_are_no_weights(value: complex, message: str, tiny: CLIP) -> None:
    state = tiny.state_dict()
    state["text.norm.weight"] = torch.full((128,), value).to(torch.int8 if value == 0 else None)
    with pytest.raises(ClipscaleError, match=f"text.norm.weight .*{message}|text.norm.weight {message}"):
        load_pretrained(tiny, Pretrained("there", state))


def test_the_first_bytes_tell_the_format(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    plain = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    save_file(plain, tmp_path / "a.pt")
    torch.save(plain, tmp_path / "b.safetensors")
    torch.save(plain, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert read_pretrained(str(path)).state.keys() == from_open_clip(state).keys(), path


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_clip_config.json", [], "open_clip_config.json is no JSON object"),
        ("open_clip_config.json", {"model_cfg": of_tiny() | {"text_cfg": None}}, "has no text_cfg"),
        ("open_clip_config.json", {"model_cfg": of_tiny({"vocab_size": "x"})}, "does not hold what its format has"),
        ("open_clip_config.json", {"model_cfg": of_tiny(), "preprocess_cfg": {"mean": [1]}}, "are not three numbers"),
        ("config.json", {"model_type": "clip", "text_config": "x"}, "config.json does not hold what its format has"),
        ("model.safetensors.index.json", {}, "model.safetensors.index.json does not hold what its format has"),
    ],
)
def test_malformed_configurations_are_one_line(file: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ClipscaleError, match=re.escape(message)) as caught:
        read_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_one_mean_is_that_of_all_channels(state: dict[str, torch.Tensor], tiny: CLIP, tmp_path: Path) -> None:
    open_clip_directory(tmp_path, state, model_cfg=of_tiny(), preprocess_cfg={"mean": 0.5})
    with pytest.raises(ClipscaleError, match=r"use model.mean=\[0.5,0.5,0.5\]$"):
        load(tiny, tmp_path)
    open_clip_directory(tmp_path, state, model_cfg=of_tiny(), preprocess_cfg=None)
    load(tiny, tmp_path)


@torch.no_grad()
def test_a_damaged_export_is_one_line(tmp_path: Path) -> None:
    config, _ = compose(["model=tiny", "name=mine", "data.root=/nowhere"])
    save_file({name: t.clone() for name, t in build_model("tiny").state_dict().items()}, tmp_path / "model.safetensors")
    save_config(replace(config, model=replace(config.model, embed_dim=64)), tmp_path / "config.yaml")
    for read in (clipscale.load, lambda path: read_pretrained(str(path))):
        with pytest.raises(ClipscaleError, match=r"config.yaml is not of the weights beside it: size mismatch"):
            read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    for read in (clipscale.load, lambda path: read_pretrained(str(path))):
        with pytest.raises(ClipscaleError, match=r"model.safetensors cannot be read"):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"hello world, these are words", b"Repository not found", b""])
def test_a_file_of_something_else_is_one_line(content: bytes, tiny: CLIP, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ClipscaleError, match=r"weights\.pt cannot be read: it is damaged, or neither") as raised:
        load(tiny, tmp_path / "weights.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", range(0, 4000, 97))
def test_damaged_bytes_are_one_line(size: int, tmp_path: Path) -> None:
    torch.save({"temperature.logit_scale": torch.zeros(1)}, tmp_path / "weights.pt")
    content = bytearray((tmp_path / "weights.pt").read_bytes())
    for place in range(size % len(content), len(content), 397):
        content[place] ^= 0x55
    (tmp_path / "weights.pt").write_bytes(content)
    with suppress(ClipscaleError):  # or it is read, where nothing that counts was hit
        read_pretrained(str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("text_projection", (2, 3, 4)),
        ("positional_embedding", ()),
        ("positional_embedding", (0, 128)),
        ("logit_scale", (2,)),
    ],
)
def test_odd_shapes_are_one_line(
    name: str, shape: tuple[int, ...], state: dict[str, torch.Tensor], tiny: CLIP, tmp_path: Path
) -> None:
    torch.save(state | {name: torch.zeros(shape)}, tmp_path / "weights.pt")
    with pytest.raises(ClipscaleError, match=r"no CLIP has|is not model=tiny"):
        load(tiny, tmp_path / "weights.pt")


def test_tokens_of_clips_weights_are_clips(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    byte_pieces().save_pretrained(tmp_path / "pieces")
    pieces = Tokenizer(f"hf:{tmp_path / 'pieces'}", 32)
    (tmp_path / "there").mkdir()
    open_clip_directory(tmp_path / "there", state, model_cfg=of_tiny())
    with pytest.raises(ClipscaleError, match="reads the tokens of clip, not those of"):
        check_tokenizer(read_pretrained(str(tmp_path / "there")), pieces)
