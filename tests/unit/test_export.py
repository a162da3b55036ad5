"""``clipscale export``: what another library loads gives the same features on the same picture and caption."""

from __future__ import annotations

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import clipscale
from clipscale.apps.export import export
from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.loading import load_model
from clipscale.checkpoint.pretrained import load_pretrained, read_pretrained
from clipscale.config import compose, save_config
from clipscale.config.rundir import write_result
from clipscale.errors import ClipscaleError
from clipscale.models import build_model
from tests.hf import byte_pieces
from tests.peers import scramble, vit_small_patch16_siglip_64

SMALL_SIGLIP = vit_small_patch16_siglip_64.__name__  # once imported, timm knows it
CAPTIONS = ["A red circle, and 2 blue stars!", "don't  look", "naïve café"]
SIGLIP = [
    "model=tiny", f"model.vision.timm={SMALL_SIGLIP}", "model.vision.proj=none", "model.text.causal=false",
    "model.vision.patch_size=null", "model.vision.width=null", "model.vision.layers=null", "model.vision.heads=null",
    "model.text.pad_to_context=true", "model.text.proj_bias=true", "model.text.norm_eps=1e-6",
    "model.vision.resize_mode=squash",
]  # fmt: skip
SMALL_TEXT = ["model.embed_dim=64", "model.context_length=24", "model.text.width=64", "model.text.layers=2"]


def make_run(place: Path, *overrides: str, classes: list[str] | None = None) -> Path:
    """A run that stopped after one save, whose average differs from its weights."""
    config, _ = compose([*overrides, "name=mine", "data.root=/secret/place"])
    config.model.classes = classes
    model = build_model(config.model, logit_bias=config.loss.first_bias)
    scramble(model)
    average = {name: p.detach() + 0.01 for name, p in model.named_parameters()} if config.ema.decay else {}
    run = place / "run"
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    saved = Saved(samples_seen=512, step=4)
    saver = Checkpointer(run / "checkpoints", 1)
    saver.save(model, torch.optim.AdamW(model.parameters()), average, saved)
    saver.wait()
    write_result(run, "done", 0, samples_seen=512, metrics={"val/loss": 1.25, "train/loss": 9.0})
    return run


@pytest.fixture
def picture() -> Image.Image:
    """Of the model's height: where nothing is resized, every library's preparation gives the same pixels."""
    noise = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy()).resize((90, 64))


def ours(run: Path, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    model, preprocess, tokenizer = clipscale.load(run)
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        return image, model.encode_text(tokenizer(CAPTIONS), normalize=True)


def assert_close(image: torch.Tensor, text: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(image, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny_quickgelu", "ema.decay=0.9"],
        ["model=tiny", "loss=siglip", "model.mean=[0.5,0.5,0.5]"],
        ["model=rn50", "model.vision.image_size=64", "model.text.activation=quickgelu", *SMALL_TEXT],
        ["model=convnext_base", "model.vision.timm=convnext_atto", "model.vision.image_size=64", *SMALL_TEXT],
        ["model=tiny", "model.text.causal=false", "model.text.pad_to_context=true", "model.activation=gelu_tanh"],
        [*SIGLIP, "loss=siglip", "model.text.pad_id=0", "model.text.activation=gelu_tanh"],
    ],
    ids=lambda overrides: " ".join(overrides[:2]),
)
@torch.no_grad()
def test_open_clip_loads_it(overrides: list[str], picture: Image.Image, tmp_path: Path) -> None:
    run, out = make_run(tmp_path, *overrides), tmp_path / "out"
    export(run, "open_clip", out)
    load_pretrained(load_model(run)[0], read_pretrained(str(out)))  # what is told of the weights is what they are
    if "model.vision.resize_mode=squash" in overrides:
        picture = picture.resize((64, 64))  # by each library a bit differently
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    model.eval()
    kept, _ = load_model(run)
    assert torch.equal(model.logit_scale, kept.logit_scale[0])
    if kept.temperature.logit_bias is not None:
        assert torch.equal(model.logit_bias, kept.temperature.logit_bias[0])
    image = model.encode_image(preprocess(picture)[None], normalize=True)
    assert_close(image, model.encode_text(tokenizer(CAPTIONS), normalize=True), ours(run, picture))


@torch.no_grad()
def test_open_clip_loads_a_tokenizer_with_it(picture: Image.Image, tmp_path: Path) -> None:
    """SigLIP's, which is one of Hugging Face's, goes into the same directory."""
    byte_pieces().save_pretrained(tmp_path / "words")
    place = f"hf:{tmp_path / 'words'}"
    ids = ["model.text.vocab_size=80", "model.text.eot_id=2", "model.text.pad_id=1"]
    run = make_run(tmp_path, *SIGLIP, *ids, "loss=siglip", f"tokenizer.name={place}", f"init.weights={place}")
    export(run, "open_clip", tmp_path / "out")
    assert_private(tmp_path / "out", tmp_path)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    captions = ["red square", "a red, red  star"]
    mine, _, own = clipscale.load(run)
    text = model.eval().encode_text(tokenizer(captions), normalize=True)
    torch.testing.assert_close(text, mine.encode_text(own(captions), normalize=True), atol=1e-5, rtol=0)
    with pytest.raises(ClipscaleError, match="is not CLIP's, the only one"):
        export(run, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists(), "what failed can be tried again"
    export(run, "safetensors", tmp_path / "own")
    assert_private(tmp_path / "own", tmp_path)


def assert_private(out: Path, place: Path) -> None:
    """No file says where anything lay."""
    for file in out.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(place).encode() not in content and b"/secret" not in content, file


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("CLIPModel", ["model=tiny", "model.text.norm_eps=1e-3"]),
        ("CLIPModel", ["model=tiny_quickgelu", "model.text.activation=gelu"]),
        ("SiglipModel", [*SIGLIP, "loss=siglip", "model.text.pad_id=49407"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@torch.no_grad()
def test_transformers_loads_it(name: str, overrides: list[str], picture: Image.Image, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, out = make_run(tmp_path, *overrides, "ema.decay=0.9"), tmp_path / "out"
    export(run, "hf", out)
    assert f"{name}.from_pretrained" in (out / "README.md").read_text()
    model, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    load_pretrained(load_model(run)[0], read_pretrained(str(out)))  # what is told of the weights is what they are
    assert not any(report.values()), report
    tokenizer = transformers.CLIPTokenizer.from_pretrained(out)
    texts = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    _, _, ids = clipscale.load(run)
    for row, mine in zip(texts["input_ids"], ids(CAPTIONS), strict=True):
        end = int((mine == ids.eot_id).nonzero()[0])
        assert row[: end + 1].tolist() == mine[: end + 1].tolist()
    if name == "SiglipModel":
        picture = picture.resize((64, 64))  # the sides are squashed, by each library a bit differently
    pixels = transformers.CLIPImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"]
    told = model(pixel_values=pixels, input_ids=texts["input_ids"])
    assert_close(told.image_embeds, told.text_embeds, ours(run, picture))


@torch.no_grad()
def test_clipscale_loads_it(picture: Image.Image, tmp_path: Path) -> None:
    run, out = make_run(tmp_path, "model=tiny", "ema.decay=0.9", "loss=siglip"), tmp_path / "out"
    export(run, "safetensors", out)
    for mine, again in zip(ours(run, picture), ours(out, picture), strict=True):
        assert torch.equal(mine, again)
    assert "/secret" not in (out / "config.yaml").read_text()


def test_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "model=tiny", "ema.decay=0.9", "init.weights=/secret/place/model.pt")
    export(run, "open_clip", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("# mine", "| samples seen | 512 |", "| val/loss | 1.25 |", "their moving average", "local-dir:out"):
        assert part in card
    assert "secret" not in card and "train/loss" not in card
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == ["Intended use", "How to load it", "Training", "Data", "Evaluation", "Biases", "Limits"]
    assert "Not measured" in card
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0])
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"samples_seen": 9999}))
    export(run, "safetensors", tmp_path / "older")
    assert "None were recorded of these weights" in (tmp_path / "older" / "README.md").read_text()
    export(tmp_path / "older", "open_clip", tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text()
    assert "| all else | not recorded |" in again and "lr" not in again and "synthetic" not in again


def test_a_classifier_is_clipscales_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "model=tiny", "loss=cross_entropy", classes=["cat", "dog"])
    for to in ("open_clip", "hf", "onnx"):
        with pytest.raises(ClipscaleError, match="tells 2 classes apart; use --to safetensors"):
            export(run, to, tmp_path / to)
    export(run, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a head of 2 classes: `model.classify(images)`" in card and "pipeline_tag: image-classification" in card
    assert clipscale.load(tmp_path / "out")[0].config.classes == ["cat", "dog"]


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, "model=tiny", "loss=siglip", "model.vision.timm=vit_tiny_patch16_224")
    with pytest.raises(ClipscaleError, match="--to torchscript: choose from open_clip, hf, safetensors, onnx"):
        export(run, "torchscript", tmp_path / "a")
    with pytest.raises(ClipscaleError, match="holds something already"):
        export(run, "hf", run)
    with pytest.raises(ClipscaleError, match="no logit_bias"):
        export(run, "hf", tmp_path / "b")
    with pytest.raises(ClipscaleError, match="cannot be told of another size"):
        export(run, "open_clip", tmp_path / "c")
    with pytest.raises(ClipscaleError, match="neither a run directory nor a checkpoint"):
        export(tmp_path / "nothing", "hf", tmp_path / "d")
    run = make_run(tmp_path / "both", "model=tiny", "model.text.causal=false")
    with pytest.raises(ClipscaleError, match=r"open_clip has no text tower with .*causal=False, pad_to_context=False"):
        export(run, "open_clip", tmp_path / "e")
    with pytest.raises(ClipscaleError, match=r"CLIPModel has no text tower with model.text.causal=False, but True"):
        export(run, "hf", tmp_path / "f")
