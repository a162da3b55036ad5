"""``clipscale export --to onnx``: the graphs give the model's features, and none that does not is left."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import clipscale
from clipscale.apps.export import export
from clipscale.checkpoint.interop import from_open_clip
from clipscale.checkpoint.onnx import TextEncoder, draw_inputs, write_graphs
from clipscale.config.model import TextPool
from clipscale.errors import ClipscaleError
from clipscale.models import build_model
from tests.hf import byte_pieces
from tests.peers import SMALL, scramble, small
from tests.unit.test_export import assert_private, make_run
from tests.unit.test_towers import LENGTHS, text_tower

BOUND = 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("onnx"), "model=tiny_quickgelu", "loss=siglip", "model.vision.layers=2",
        "model.mean=[0.5,0.4,0.3]", "model.vision.resize_mode=longest",
    )  # fmt: skip


@torch.no_grad()
def test_its_model_card_loads_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, "onnx", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"image.onnx", "text.onnx", "clipscale.json", "README.md", "vocab.json", "merges.txt"} <= names
    assert not any(name.endswith(".data") for name in names)
    monkeypatch.chdir(tmp_path)
    there: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[0], there)
    model, preprocess, tokenizer = clipscale.load(run)
    pictures = [Image.new("RGB", (320, 240), "red"), Image.new("RGB", (240, 320), "blue")]
    image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    text = model.encode_text(tokenizer(["something red", "something blue", "a dog"]), normalize=True)
    scale, bias = model.temperature()
    for name, truth in {"image": image, "text": text, "logits": scale * image @ text.t() + bias}.items():
        found = torch.as_tensor(there[name])
        assert found.dtype == torch.float32 or name == "logits"
        torch.testing.assert_close(found.float(), truth, atol=BOUND * (float(scale) if name == "logits" else 1), rtol=0)
    told = json.loads((tmp_path / "out" / "clipscale.json").read_text())
    assert told["logit_scale"] == pytest.approx(float(scale)) and told["logit_bias"] == pytest.approx(float(bias))
    assert all(difference <= BOUND for difference in told["largest_difference"].values())


@torch.no_grad()
def test_its_tokenizer_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card works where the tokenizer's own directory is not."""
    words = tmp_path / "words"
    byte_pieces().save_pretrained(words)
    overrides = ["model.vision.layers=1", "model.text.layers=1", "model.text.eot_id=2", f"tokenizer.name=hf:{words}"]
    run = make_run(tmp_path, "model=tiny", *overrides)
    export(run, "onnx", tmp_path / "out")
    assert_private(tmp_path / "out", tmp_path)
    model, _, tokenizer = clipscale.load(run)
    words.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    there: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[0], there)
    text = model.encode_text(tokenizer(["something red", "something blue", "a dog"]), normalize=True)
    torch.testing.assert_close(torch.as_tensor(there["text"]), text, atol=BOUND, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_tower(name: str, tmp_path: Path) -> None:
    model, other = small(name)
    model.load_state_dict(from_open_clip(other.state_dict()))
    found = write_graphs(model, tmp_path, most_bytes=0)
    print(f"\n| {name} |", " | ".join(f"{difference:.1e}" for difference in found.values()), "|", flush=True)
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{x}.onnx{y}" for x in ("image", "text") for y in ("", ".data")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_32", "vit_l_14", "siglip_b_16"])
def test_models_of_real_size(name: str, tmp_path: Path) -> None:
    model = build_model(name, logit_bias=-10.0 if "siglip" in name else None).eval()
    scramble(model)
    found = write_graphs(model, tmp_path)
    print(f"\n| {name} |", " | ".join(f"{difference:.1e}" for difference in found.values()), "|", flush=True)


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", TextPool)
def test_the_padded_encoder_gives_the_packed_features(pool: TextPool, causal: bool, filled: bool) -> None:
    tower = text_tower(torch.float64, layers=2, pool=pool, causal=causal, pad_to_context=filled, pad_id=7)
    for sizes in (LENGTHS["usual"], LENGTHS["one-token"], LENGTHS["full"]):
        lengths = torch.tensor(sizes)
        ids = torch.randint(0, tower.eot_id, (len(lengths), 77), generator=torch.Generator().manual_seed(0))
        ids.scatter_(1, lengths[:, None] - 1, tower.eot_id)
        found, truth = TextEncoder(tower)(ids), normalize(tower(*tower.pack(ids)), dim=-1)
        torch.testing.assert_close(found, truth, atol=1e-13, rtol=1e-12)


def test_captions_drawn_for_the_comparison_have_one_end() -> None:
    model = build_model("tiny")
    ids = draw_inputs(model, "text.onnx", 50)
    assert ((ids == model.text.eot_id).sum(dim=1) == 1).all()
    assert len({int(row.argmax()) for row in (ids == model.text.eot_id).int()}) > 15, "of many lengths"


def test_a_wrong_graph_is_not_left(tmp_path: Path) -> None:
    model = build_model("tiny")
    with torch.no_grad():
        model.visual.proj.weight[3, 5] = torch.nan
    with pytest.raises(ClipscaleError, match=r"image.onnx differs from the model by inf, more than 1e-04"):
        write_graphs(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_text_tower_that_it_does_not_know(tmp_path: Path) -> None:
    class Other(type(build_model("tiny").text)):
        """Whatever it computes, the padded encoder knows nothing of it."""

    model = build_model("tiny")
    model.text.__class__ = Other
    with pytest.raises(ClipscaleError, match="takes clipscale's own text tower"):
        write_graphs(model, tmp_path)


def test_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as Python marks a package that there is not
    with pytest.raises(ClipscaleError, match=r"needs onnxscript: pip install 'clipscale\[onnx\]'$"):
        write_graphs(build_model("tiny"), tmp_path)
