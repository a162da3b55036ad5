"""Text towers and tokenizers of Hugging Face: what theirs give, and what is refused."""

from __future__ import annotations

import json
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from clipscale.checkpoint.pretrained import Pretrained, load_pretrained, read_text_tower
from clipscale.config import compose, validate
from clipscale.config.data import Tokenizer as TokenizerConfig
from clipscale.config.model import HFPool, HFProjection, Text
from clipscale.data.tokenizer import Tokenizer, build_tokenizer
from clipscale.errors import ConfigError
from clipscale.models import build_model
from clipscale.models.flops import parameters
from clipscale.models.hf import HFTextTower, hf_config, read_hf_config
from clipscale.parallel.parallelize import find_blocks
from tests.hf import CONTEXT, byte_pieces, hf_model, hf_spec, save_hf, word_pieces
from tests.towers import draw_captions, randomise

pytest.importorskip("transformers")
LENGTHS = [5, CONTEXT, 1, 9, 9, 16]
KINDS = ["bert", "roberta", "distilbert", "t5", "gpt2", "llama", "modernbert", "mpnet"]


def tower(kind: str, **changes: Any) -> HFTextTower:
    """One in training mode, as a run has it, with weights that hide nothing."""
    config = hf_model(kind, **changes)
    made = HFTextTower(config.text, config.context_length, config.embed_dim).train()
    randomise(made)
    return made


@pytest.mark.parametrize(
    ("kind", "pool", "pooler", "proj"),
    [
        ("bert", None, "cls_last_hidden_state_pooler", HFProjection.mlp),
        ("bert", HFPool.mean, "mean_pooler", HFProjection.linear),
        ("roberta", None, "mean_pooler", HFProjection.mlp),
    ],
)
def test_equals_open_clips(kind: str, pool: HFPool | None, pooler: str, proj: HFProjection, tmp_path: Path) -> None:
    """Features and gradients, captions of all lengths at once, against captions padded to the context."""
    from open_clip.hf_model import HFTextEncoder

    ours = tower(kind, hf_pool=pool, hf_proj=proj)
    hf_spec(kind).save_pretrained(tmp_path)
    theirs = HFTextEncoder(str(tmp_path), 16, pooler_type=pooler, proj_type=proj.value, pretrained=False).eval()
    theirs.transformer.load_state_dict(ours.transformer.state_dict())
    theirs.proj.load_state_dict(ours.proj.state_dict())
    ids, lengths = draw_captions(LENGTHS, 100)
    ids += 2  # theirs takes the id of padding for padding
    padded = torch.full((len(LENGTHS), CONTEXT), ours.pad_id)
    padded[torch.arange(CONTEXT) < lengths[:, None]] = ids.long()
    features, expected = ours(ids, lengths), theirs(padded)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    for result in (features, expected):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.norm()) for g in gradients.values())
    for name, parameter in ours.named_parameters():
        error = float((parameter.grad - gradients[name]).norm())
        assert error <= 1e-5 * max(float(gradients[name].norm()), 1e-2 * scale), f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_alone_in_its_batch(kind: str) -> None:
    """Packed with others it has the features that transformers gives it alone, without padding."""
    ours = tower(kind)
    ids, lengths = draw_captions(LENGTHS, 100)
    ids += 4  # none is special
    with torch.no_grad():
        together = ours(ids, ours.packing(lengths))
        for row, one in zip(together, ids.split(LENGTHS), strict=True):
            hidden = ours.transformer(input_ids=one.long()[None]).last_hidden_state[0]
            pooled = {HFPool.cls: hidden[0], HFPool.mean: hidden.mean(0), HFPool.last: hidden[-1]}[ours.pool]
            torch.testing.assert_close(row, ours.proj(pooled), atol=1e-5, rtol=1e-4)


def test_how_kinds_are_pooled() -> None:
    found = {kind: tower(kind).pool for kind in ("bert", "roberta", "t5", "gpt2", "llama", "clip")}
    assert found == {
        "bert": HFPool.cls, "roberta": HFPool.mean, "t5": HFPool.mean, "gpt2": HFPool.last, "llama": HFPool.last,
        "clip": HFPool.last,
    }  # fmt: skip


def test_every_weight_is_trained_and_every_layer_found() -> None:
    """A parameter without a gradient would stop DDP."""
    for kind in KINDS:
        model = build_model(hf_model(kind))
        assert [*find_blocks(model)["text"]] == [*model.text.blocks] and len(model.text.blocks) == 2
        ids, lengths = draw_captions(LENGTHS, 100)
        model.encode_text(ids + 4, lengths).square().sum().backward()
        assert not [name for name, p in model.text.named_parameters() if p.grad is None], kind


def test_layers_compile_for_few_shapes() -> None:
    ours = tower("bert")
    batches = [draw_captions(lengths, 100) for lengths in ([5, 9], [24, 3], [16, 2], [1, 1], [8, 20])]
    plain = [ours(ids + 4, lengths) for ids, lengths in batches]
    torch._dynamo.reset()
    graphs = CompileCounter()
    ours.compile_blocks(backend=graphs)
    for (ids, lengths), expected in zip(batches, plain, strict=True):
        torch.testing.assert_close(ours(ids + 4, lengths), expected, atol=1e-5, rtol=1e-5)
    assert graphs.frame_count <= 2 * len(ours.blocks), "one for the first length, one for all others"
    torch._dynamo.reset()


def test_weights_are_drawn_from_the_seed() -> None:
    one, same, other = (build_model(hf_model("bert"), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    matrices = [name for name, tensor in one.items() if name.startswith("text.") and tensor.ndim == 2]
    assert len(matrices) > 10 and not any(torch.equal(one[name], other[name]) for name in matrices)
    spread = one["text.transformer.encoder.layer.1.output.dense.weight"].std()
    assert spread == pytest.approx(0.02, rel=0.1)
    assert one["text.proj.weight"].std() == pytest.approx(32**-0.5, rel=0.1)


def test_padded_ids_are_the_packed_ones(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((word_pieces(), byte_pieces(), byte_pieces(ends=False))):
        tokenizer.save_pretrained(tmp_path / str(number))
        ours = Tokenizer(f"hf:{tmp_path / str(number)}", CONTEXT)
        model = build_model(hf_model("bert", eot_id=ours.eot_id)).eval()
        captions = ["red circle", "the small blue star above the large green square", ""]
        ids, lengths = model.text.pack(ours(captions))
        encoded = [ours.encode(caption)[0] for caption in captions]
        assert ids.tolist() == np.concatenate(encoded).tolist() and lengths.tolist() == [len(one) for one in encoded]
    with pytest.raises(ValueError, match="no end-of-text token"):
        model.encode_text(torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "start", "eot", "pads"),
    [
        ("bert", [2], 3, [0]),
        ("roberta", [0], 2, [0, 1]),
        ("t5", [], 1, [0]),
        ("gpt2", [], 2, [0, 2]),
        ("neox", [], 0, [0, 1]),
        ("opt", [2], 2, [0, 1]),
    ],
)
def test_padded_captions_end_where_they_do(kind: str, start: list[int], eot: int, pads: list[int]) -> None:
    """Whichever token pads, and where the one that ends captions begins them too."""
    ours = tower(kind, eot_id=eot)
    captions = [torch.tensor([*start, *range(5, 5 + n), eot]) for n in (0, 1, 7, CONTEXT - 1 - len(start))]
    lengths = torch.tensor([len(one) for one in captions])
    with torch.no_grad():
        expected = torch.cat([ours(one, lengths[i : i + 1]) for i, one in enumerate(captions)])
        for pad in pads:
            padded = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=pad)
            ids, found = ours.pack(padded)
            assert found.tolist() == lengths.tolist(), pad
            torch.testing.assert_close(ours(ids, found), expected, atol=1e-5, rtol=1e-4)


def test_a_tokenizer_does_not_pad_with_the_end(tmp_path: Path) -> None:
    made = byte_pieces(ends=False)
    made.eos_token = made.bos_token
    made.save_pretrained(tmp_path)
    ours = Tokenizer(f"hf:{tmp_path}", CONTEXT)
    assert ours.eot_id == 0
    captions = ["red star", "", "a " * 90]
    ids, lengths = tower("neox", eot_id=0).pack(ours(captions))
    encoded = [ours.encode(caption)[0] for caption in captions]
    assert ids.tolist() == np.concatenate(encoded).tolist() and lengths.tolist() == [len(one) for one in encoded]
    assert int((ours(captions) == 0).sum()) == len(captions)


@pytest.mark.parametrize("pad", [None, -1, 4096])
def test_an_id_of_padding_that_is_no_token(pad: int | None) -> None:
    config = hf_model("gpt2")
    config.text.hf_config["pad_token_id"] = pad
    assert build_model(config).text.pad_id == 0


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_word_pieces(tmp_path: Path) -> None:
    word_pieces().save_pretrained(tmp_path)
    ours, theirs = Tokenizer(f"hf:{tmp_path}", CONTEXT), word_pieces()
    assert (ours.eot_id, ours.vocab_size) == (theirs.sep_token_id, len(theirs))
    ids, cut = ours.encode("A red  circle &amp; the bluestars")
    assert ids.tolist() == theirs("A red circle & the bluestars")["input_ids"] and not cut
    long, cut = ours.encode("star " * 40)
    assert cut and len(long) == CONTEXT and long[0] == theirs.cls_token_id and long[-1] == theirs.sep_token_id
    assert ours.encode("the [SEP] red")[0].tolist().count(ours.eot_id) == 1, "a caption does not end in its middle"


def test_byte_pieces(tmp_path: Path) -> None:
    byte_pieces().save_pretrained(tmp_path / "with")
    byte_pieces(ends=False).save_pretrained(tmp_path / "without")
    whole, bare = (Tokenizer(f"hf:{tmp_path / name}", CONTEXT) for name in ("with", "without"))
    assert whole.encode("red star")[0].tolist() == byte_pieces()("red star")["input_ids"]
    assert bare.encode("red star")[0].tolist() == [*byte_pieces(ends=False)("red star")["input_ids"], bare.eot_id]
    assert bare.encode("a " * 90)[0][-1] == bare.eot_id


def test_a_tokenizer_goes_to_workers_and_is_kept(tmp_path: Path) -> None:
    word_pieces().save_pretrained(tmp_path / "there")
    ours = Tokenizer(f"hf:{tmp_path / 'there'}", CONTEXT)
    ours.save(tmp_path / "kept")
    (tmp_path / "there").rename(tmp_path / "gone")
    again = Tokenizer(ours.name, CONTEXT, tmp_path / "kept")
    caption = "the small green ring, left of a red triangle"
    for other in (pickle.loads(pickle.dumps(ours)), again):
        assert other.encode(caption)[0].tolist() == ours.encode(caption)[0].tolist()
    Tokenizer("clip", 77).save(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


# ---- weights --------------------------------------------------------------------------------------------------------


def test_pretrained_weights(tmp_path: Path) -> None:
    place = save_hf(tmp_path)
    config = hf_model("bert", hf=str(place), hf_config=None)
    config.text.hf_config = read_hf_config(config.text)
    made = build_model(config).text
    stored = load_file(place / "model.safetensors")
    state = read_text_tower(made, str(place))
    made.transformer.load_state_dict(state)
    assert state and all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    torch.save(stored, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    assert read_text_tower(made, str(place)).keys() == state.keys(), "tensors of a pickle are read as well"


def test_weights_that_are_not_its_own_are_refused(tmp_path: Path) -> None:
    place = save_hf(tmp_path)
    made = build_model(hf_model("bert")).text
    stored = load_file(place / "model.safetensors")
    few = {name: tensor for name, tensor in stored.items() if "layer.1" not in name}
    save_file(few, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has no weights for encoder\.layer\.1.*model\.text\.hf_pretrained=false"):
        read_text_tower(made, str(place))
    (place / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        read_text_tower(made, str(place))
    torch.save({"a": Path("code")}, place / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        read_text_tower(made, str(place))


def test_a_clip_gives_its_image_tower_alone() -> None:
    model, plain = build_model(hf_model("bert"), seed=1), hf_model("bert")
    plain.text.hf = plain.text.hf_config = None
    other, before = build_model(plain), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_pretrained(model, Pretrained("there", other.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name] if name.startswith("visual.") else before[name]), name
    third = build_model(hf_model("bert"), seed=2)
    load_pretrained(model, Pretrained("there", third.state_dict()))
    assert all(torch.equal(tensor, third.state_dict()[name]) for name, tensor in model.state_dict().items())


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.text.hf=a/b"], "use tokenizer.name=hf:a/b"),
        (["model.text.hf_pool=mean"], "model.text.hf_pool=mean has no effect without model.text.hf=NAME"),
        (["model.text.hf_pretrained=false"], "model.text.hf_pretrained=False has no effect"),
        (["model.text.hf=''"], "model.text.hf='' is no name"),
        (["tokenizer.name='hf:'"], "tokenizer.name=hf: is no name"),
    ],
)
def test_mistakes_at_compose(overrides: list[str], message: str) -> None:
    config, _ = compose(overrides)
    with pytest.raises(ConfigError) as raised:
        validate(config)
    assert message in str(raised.value)


def test_what_does_not_fit_is_refused_at_build(tmp_path: Path) -> None:
    long = hf_model("roberta")
    long.context_length = CONTEXT + 1
    with pytest.raises(ConfigError, match=f"exceeds the {CONTEXT} positions .* use model.context_length={CONTEXT}"):
        build_model(long)
    word_pieces().save_pretrained(tmp_path)
    named = TokenizerConfig(f"hf:{tmp_path}")
    few = hf_model("bert")
    few.text.hf_config["vocab_size"] = 50
    with pytest.raises(ConfigError, match=r"has \d+ tokens, model.text.hf=some/bert takes 50"):
        build_tokenizer(named, few)
    with pytest.raises(ConfigError, match=r"use model\.text\.eot_id=3"):
        build_tokenizer(named, hf_model("bert", eot_id=7))
    with pytest.raises(ConfigError, match=r"use tokenizer\.name=hf:some/bert"):
        build_tokenizer(TokenizerConfig("ViT-B-32"), hf_model("bert"))
    with pytest.raises(ConfigError, match=r"what model\.text\.hf=some/bert costs is not known"):
        parameters(hf_model("bert"))


def test_code_that_comes_with_weights_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    content = {"model_type": "own", "auto_map": {"AutoConfig": "run.C", "AutoModel": "run.M"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = hf_model("bert", hf=str(tmp_path), hf_config=None)
    with pytest.raises(ConfigError, match="is of the type own, which this transformers does not have"):
        build_model(config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", "is not JSON"),
        ("[]", "holds no configuration"),
        ('{"model_type": "clip"}', "is no text model"),
        ('{"model_type": "siglip_text_model"}', "siglip_text_model is none that transformers makes alone"),
        ('{"model_type": "xlnet"}', "xlnet, which has weights that captions do not train"),
        ('{"model_type": "bert", "hidden_size": 30}', "model.text.hf=.*: "),
    ],
)
def test_a_directory_that_is_no_text_model(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        build_model(hf_model("bert", hf=str(tmp_path), hf_config=None))
    assert len(str(raised.value).splitlines()) == 1


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = build_model(hf_model("bert")).text
    for attempt in (
        lambda: read_hf_config(hf_model("bert", hf="some/bert").text),
        lambda: read_text_tower(made, "some/bert"),
        lambda: Tokenizer("hf:some/bert", CONTEXT),
    ):
        with pytest.raises(
            ConfigError, match=r"cannot be downloaded here .* give the path of a copy instead"
        ) as raised:
            attempt()
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="neither a directory here nor ORGANISATION/NAME"):
        read_hf_config(hf_model("bert", hf="/not/a/directory").text)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and not listening: who connects is refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ConfigError) as raised:
            read_hf_config(hf_model("bert", hf="some/bert").text)
    assert f"cannot be downloaded here ({endpoint} does not answer); give the path of a copy" in str(raised.value)


def test_without_transformers_it_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word_pieces().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    named = Text(hf="some/bert", hf_config={"model_type": "bert"})
    for attempt in (lambda: hf_config(named), lambda: Tokenizer(f"hf:{tmp_path}", CONTEXT)):
        with pytest.raises(ConfigError, match=r"pip install 'clipscale\[hf\]'"):
            attempt()
