"""Explanations hold against other implementations of their formulas, and follow what a model really looks at."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from clipscale.apps.explain.check import Options, check
from clipscale.apps.explain.command import explain_image
from clipscale.checkpoint.export import write_safetensors
from clipscale.cli import app
from clipscale.config import compose
from clipscale.config.model import Vision
from clipscale.data.samples import pack
from clipscale.errors import ClipscaleError
from clipscale.evals.attention import RecordedAttention
from clipscale.evals.explain import explain
from clipscale.evals.faithful import area, blurred, curves, edges
from clipscale.evals.relevance import STEPS, cell_of, cell_sums, cells, mean_colour, methods, relevance, similarity
from clipscale.models import CLIP, build_model
from tests.peers import scramble, siglip_config, small
from tests.shards import write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    model = build_model(compose(["model=tiny"])[0].model).eval()
    scramble(model)
    return model


@pytest.fixture(scope="module")
def resnet() -> CLIP:
    return small("rn50")[0]


@pytest.fixture(scope="module")
def exported(tiny: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    write_safetensors(tiny, compose(["model=tiny"])[0], out)
    return out


def pictures(count: int, side: int = 64) -> torch.Tensor:
    rough = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    return F.interpolate(rough, (side, side), mode="bicubic").clamp(0, 255).byte()


def directions(model: CLIP, count: int) -> torch.Tensor:
    draw = torch.randn(count, model.config.embed_dim, generator=torch.Generator().manual_seed(1))
    return F.normalize(draw, dim=-1)


# ---- what attention was, and what was computed with it --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "siglip"])
def test_recording_attention_changes_nothing(kind: str, tiny: CLIP) -> None:
    model = tiny if kind == "tiny" else build_model(siglip_config()).eval()
    ids, lengths = torch.tensor([5, 6, 7, 8, 1, 9, 1]), torch.tensor([5, 2])
    ends = torch.where(ids == 1, model.config.text.eot_id, ids)
    with RecordedAttention() as recorded:
        seen, read = model.encode_image(pictures(2)), model.encode_text(ends, lengths)
    torch.testing.assert_close(seen, model.encode_image(pictures(2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read, model.encode_text(ends, lengths), rtol=1e-4, atol=1e-5)
    for weights in recorded.weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_attention_of_the_pooled_block_is_that_of_the_whole_one(tiny: CLIP) -> None:
    """Row 0 of the rollout over timm's own, whole blocks: the pooled token's, though ours computes no other."""
    import timm

    trunk: Any = tiny.visual.trunk
    whole: Any = timm.create_model(
        "vit_base_patch16_clip_224", img_size=64, embed_dim=128, depth=4, num_heads=4, num_classes=0
    ).eval()
    whole.load_state_dict(trunk.state_dict())
    images, wanted = tiny.visual.normalize(pictures(2)), directions(tiny, 2)
    with RecordedAttention() as recorded:
        score = (F.normalize(tiny.visual.proj(whole(images)), dim=-1) * wanted).sum()
    found = torch.eye(17).expand(2, 17, 17)
    for weight, gradient in zip(recorded.weights, torch.autograd.grad(score, recorded.weights), strict=True):
        assert weight.shape[2] == 17
        found = found + (weight * gradient).clamp(min=0).mean(1) @ found
    expected = found[:, 0, 1:] / found[:, 0, 1:].sum(1, keepdim=True)
    ours = relevance(tiny.visual, pictures(2), wanted, "attention").flatten(1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pool", ["map", "avg"])
def test_attention_of_other_pools_reaches_every_patch(pool: str) -> None:
    config = siglip_config() if pool == "map" else compose(["model=tiny", "model.vision.pool=avg"])[0].model
    model = build_model(config).eval()
    scramble(model)
    heat = relevance(model.visual, pictures(2), directions(model, 2), "attention")
    assert heat.shape == (2, 4, 4) and (heat > 0).all()
    torch.testing.assert_close(heat.sum((1, 2)), torch.ones(2))


# ---- captum as the oracle -------------------------------------------------------------------------------------------


def test_integrated_gradients_are_captums(tiny: CLIP) -> None:
    captum = pytest.importorskip("captum.attr")
    images, wanted = pictures(3), directions(tiny, 3)
    tower = tiny.visual
    start = tower.normalize(mean_colour(images))
    oracle = captum.IntegratedGradients(lambda x: similarity(tower, x, wanted.repeat(len(x) // 3, 1)))
    values = oracle.attribute(tower.normalize(images), start, n_steps=STEPS, method="riemann_middle")
    expected = F.avg_pool2d(values.sum(1), 16) * 256
    ours = relevance(tower, images, wanted, "integrated")
    torch.testing.assert_close(ours, expected.float(), rtol=1e-3, atol=1e-5)
    # Completeness: what is given to the cells is all that the score gains between the plain colour and the image.
    with torch.no_grad():
        gained = similarity(tower, images, wanted) - similarity(tower, start, wanted)
    torch.testing.assert_close(ours.sum((1, 2)), gained, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(("size", "grid"), [(64, (4, 4)), (98, (4, 4)), (50, (3, 7)), (13, (13, 13))])
def test_every_pixel_is_in_one_cell(size: int, grid: tuple[int, int]) -> None:
    values = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0)).double()
    sums, counted = cell_sums(values, grid), cell_sums(torch.ones(1, size, size).double(), grid)
    torch.testing.assert_close(sums.sum((1, 2)), values.sum((1, 2)))
    assert counted.sum() == size * size and counted.min() > 0
    for row in range(grid[0]):
        for column in range(grid[1]):
            ys, xs = cell_of(size, grid[0]) == row, cell_of(size, grid[1]) == column
            torch.testing.assert_close(sums[:, row, column], values[:, ys][:, :, xs].sum((1, 2)))
    for one, count in zip((0, -1), (0, grid[0] - 1), strict=True):
        assert cell_of(size, grid[0])[one] == count, "from edge to edge"


@pytest.mark.parametrize("kind", ["tiny", "siglip", "resnet"])
def test_cells_that_do_not_divide_the_image_give_the_whole_score(kind: str) -> None:
    """Completeness, as where they do: 70 pixels are four patches of 16 and a rest, or three cells of a ResNet."""
    config = compose(["model=tiny"])[0].model if kind == "tiny" else siglip_config()
    if kind == "resnet":
        config.vision = Vision(timm="resnet18")
    config.vision.image_size = 70
    model = build_model(config).eval()
    scramble(model)
    tower, images, wanted = model.visual, pictures(2, side=70), directions(model, 2)
    heat = relevance(tower, images, wanted, "integrated")
    start = tower.normalize(mean_colour(images))
    with torch.no_grad():
        gained = similarity(tower, images, wanted) - similarity(tower, start, wanted)
    assert heat.shape[1:] == cells(tower) and 70 % cells(tower)[0]
    torch.testing.assert_close(heat.sum((1, 2)), gained, rtol=0.05, atol=4e-3)
    found = curves(tower, images, wanted, heat)
    torch.testing.assert_close(found.deletion[:, 0], found.insertion[:, -1], rtol=1e-4, atol=1e-5)


def test_grad_cam_is_captums(resnet: CLIP) -> None:
    captum = pytest.importorskip("captum.attr")
    images, wanted = pictures(4), directions(resnet, 4)
    tower = resnet.visual
    trunk: Any = tower.trunk
    oracle = captum.LayerGradCam(lambda x: similarity(tower, x, wanted), trunk.stages[-1])
    expected = oracle.attribute(tower.normalize(images), relu_attributions=True)[:, 0]
    total = expected.sum((1, 2), keepdim=True)
    assert (total > 0).any()
    expected = expected / total.clamp(min=1e-30)
    assert methods(tower) == ("integrated", "gradcam") and expected.shape[1:] == cells(tower)
    torch.testing.assert_close(relevance(tower, images, wanted, "gradcam"), expected.detach(), rtol=1e-3, atol=1e-5)


# ---- sanity ---------------------------------------------------------------------------------------------------------


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's, the mean over images."""
    ranks = [x.flatten(1).argsort(dim=1).argsort(dim=1).double() for x in (one, other)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    return float((F.normalize(centred[0], dim=1) * F.normalize(centred[1], dim=1)).sum(1).mean())


@pytest.mark.parametrize("method", ["integrated", "attention"])
def test_randomised_parameters_change_the_map(method: str, tiny: CLIP) -> None:
    """Adebayo et al. 2018 (arXiv:1810.03292), section 3: a map that stays as the weights are drawn anew explains the
    image, not the model. One of edges would."""
    images, wanted = pictures(8), directions(tiny, 8)
    other = build_model(tiny.config, seed=5).eval()
    before = relevance(tiny.visual, images, wanted, method)
    after = relevance(other.visual, images, wanted, method)
    assert abs(correlation(before, after)) < 0.3
    assert correlation(edges(images, (4, 4)), edges(images, (4, 4))) > 0.999


class Counter(nn.Module):
    """A tower whose cosine with (1, 0) is the share of an image that is white in its upper half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        share = images[:, 0, :32].float().mean((1, 2)) / 255
        return torch.stack([share, (1 - share**2).sqrt()], dim=1)


def test_curves_reward_the_order_of_what_counts() -> None:
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :16] = 255  # four of eight cells that count
    true = (image[:, 0].float().unflatten(1, (4, 16)).unflatten(3, (4, 16))).mean((2, 4))
    tower: Any = Counter()
    wanted = torch.tensor([[1.0, 0.0]])
    right, wrong = (curves(tower, image, wanted, heat, "mean") for heat in (true, -true))
    grey = 64 / 255  # the mean colour, where cells are gone
    assert right.deletion[0, 0] == pytest.approx(0.5) and right.deletion[0, -1] == pytest.approx(grey, abs=1e-6)
    assert right.deletion[0, 4] == pytest.approx(grey / 2, abs=1e-6), "its four cells first"
    torch.testing.assert_close(right.insertion[:, -1], right.deletion[:, 0])
    assert area(right.deletion) < area(wrong.deletion) and area(right.insertion) > area(wrong.insertion)


def test_edges_are_where_brightness_changes() -> None:
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :, 40:] = 200
    found = edges(image, (4, 4))[0]
    assert (found[:, 2] > 0).all() and found[:, [0, 1, 3]].sum() == 0
    assert blurred(image).float().std() < image.float().std()


# ---- words, and the command -----------------------------------------------------------------------------------------


def test_a_words_value_is_what_the_score_loses(tiny: CLIP, exported: Path) -> None:
    import clipscale

    model, _, tokenizer = clipscale.load(exported)
    image = pictures(1)[0]
    found = explain(model, tokenizer, image, "a red  circle", ["a blue circle"])

    @torch.no_grad()
    def score(*captions: str) -> float:
        ids, lengths = pack([tokenizer.encode(caption)[0] for caption in captions])
        first, *rest = (model.encode_text(ids, lengths, True) @ model.encode_image(image[None], True)[0]).tolist()
        return first - sum(rest) / len(rest)

    whole = score("a red circle", "a blue circle")
    assert [word.text for word in found.words] == ["a", "red", "circle"]
    assert found.explained == pytest.approx(whole, abs=1e-5)
    expected = [score("red circle", "blue circle"), score("a circle", "a blue circle"), score("a red", "a blue")]
    assert [word.value for word in found.words] == pytest.approx([whole - one for one in expected], abs=1e-5)


def test_words_of_scripts_without_spaces(exported: Path) -> None:
    import clipscale

    model, _, tokenizer = clipscale.load(exported)
    found = explain(model, tokenizer, pictures(1)[0], "赤い circle です")
    assert [word.text for word in found.words] == ["赤", "い", "circle", "で", "す"]


def test_the_command_writes_a_picture_and_json(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).resize((90, 70)).save(tmp_path / "in.png")
    out = tmp_path / "made" / "out.png"
    words = "a $red circle " * 20
    explain_image(str(exported), tmp_path / "in.png", words, ["two\nstars"], out, None, "cpu", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert len(found["words"]) == 60 and len(found["heat"]) == 4 and found["method"] == "integrated"
    assert found["explained"] == pytest.approx(found["score"] - found["against"]["two\nstars"])
    assert Image.open(out).width > 1000
    explain_image(str(exported), tmp_path / "in.png", "[red] circle", [], None, "attention", "cpu", as_json=False)
    assert "[red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("caption", "image", "method", "message"),
    [
        ("  ", "in.png", None, "the caption to explain is empty"),
        ("a", "absent.png", None, "absent.png cannot be read: No such file"),
        ("a", "text.png", None, "is no image that can be used: undecodable_image"),
        ("a", "in.png", "gradcam", "for VisionTransformer, choose from integrated, attention"),
    ],
)
def test_mistakes_are_one_line(
    exported: Path, tmp_path: Path, caption: str, image: str, method: str | None, message: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ClipscaleError, match=message):
        explain_image(str(exported), tmp_path / image, caption, [], None, method, "cpu", as_json=True)


def test_the_page_does_what_it_says(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "explaining.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for run in ("demo", "photos"):
        Path("runs", run).symlink_to(exported)
    for name in ("picture.png", "helicopter.jpg"):
        Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(name)
    write_shards(tmp_path, [3])[0].rename("photos-val-000000.tar")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})  # type: ignore[index]
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert "integrated - edges" in result.output and Path("why.png").exists() and Path("curves.png").exists()


def test_the_check_compares_with_baselines(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_shards(tmp_path, [4], bad={3: {"jpg": b"no image", "txt": b"a"}})
    out = tmp_path / "curves.png"
    check(str(exported), str(shard), Options(images=4, fill="mean", contrast=True, batch_size=2), out, "cpu", True)
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 3 and found["cells"] == 16 and set(found["area"]) == {
        "integrated", "attention", "edges", "random"
    }  # fmt: skip
    difference = found["minus"]["integrated"]["random"]["deletion"]
    both = [found["area"][name]["deletion"]["mean"] for name in ("integrated", "random")]
    assert difference["mean"] == pytest.approx(both[0] - both[1], abs=1e-6)
    assert difference["low"] <= difference["mean"] <= difference["high"] and Image.open(out).width > 1000
    with pytest.raises(ClipscaleError, match="choose from blur, mean"):
        check(str(exported), str(shard), Options(fill="white"), None, "cpu", False)
