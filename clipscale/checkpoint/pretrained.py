"""What ``init.weights`` names: weights of open_clip, Hugging Face, a run or a file, held against the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipscale.checkpoint.covered import model_of_hf, model_of_open_clip, with_told
from clipscale.checkpoint.files import read_file, read_json, read_weights, well_formed
from clipscale.checkpoint.interop import OPENAI_EXTRAS, TRUNK, State, from_hf, from_open_clip
from clipscale.checkpoint.own import find_checkpoint, load_own, load_tokenizer
from clipscale.checkpoint.positions import fit_positions
from clipscale.checkpoint.told import (
    activation_of,
    of_channels,
    resize_by_hf,
    tell,
    told_by_hf,
    told_by_open_clip,
)
from clipscale.checkpoint.trunk import download_timm, of_timm
from clipscale.config import config_dir, load_group
from clipscale.config.hub import asking_hub, fetch, unavailable
from clipscale.config.model import Activation, Model
from clipscale.data.tokenizer import HF, Tokenizer
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models import CLIP
from clipscale.models.hf import HFTextTower, hf_class, quiet_transformers, text_part

OPEN_CLIP_CONFIG = "open_clip_config.json"
HF_CONFIG = "config.json"
HF_IMAGES = "preprocessor_config.json"
BIAS, HEAD = "temperature.logit_bias", "head."
LIBRARIES = ("open_clip:", "hf:", "timm:")  # before names of weights that others publish


@dataclass(frozen=True)
class Pretrained:
    """Weights under our names, and what their source tells of the model beside them."""

    where: str
    """As ``init.weights`` says it."""
    state: State
    told: dict[str, Any] = field(default_factory=dict)
    """Values of ``model.*`` keys, without that prefix, that weights do not show."""
    tokenizer: Tokenizer | None = None
    """Whose tokens its text tower reads, where the source holds that, too."""
    tokenizer_name: str = "clip"
    """As ``tokenizer.name`` says it."""
    described: Callable[[], Model] | None = None
    """Makes its architecture, where its source says that; raises ClipscaleError for one that clipscale has not."""

    @property
    def of_hf_text(self) -> bool:
        """Whether the text tower is one of Hugging Face's, as clipscale names it."""
        return any(name.startswith("text.transformer.") for name in self.state)


def is_library(where: str) -> bool:
    """Whether ``where`` names weights of another library, or a file, and no run, checkpoint or export of one."""
    if where.startswith(LIBRARIES):
        return True
    path = Path(where)
    return path.is_file() or any((path / name).exists() for name in (OPEN_CLIP_CONFIG, HF_CONFIG))


def architecture(found: Pretrained) -> Model:
    """The model that weights are of: as their source says it, or the option of ``model`` that has their shapes.

    Raises ClipscaleError where clipscale has no such towers, or nothing tells.
    """
    if found.described is not None:
        return with_told(found.described(), found.told)
    option = _option_of(found)
    if option is None:
        raise ClipscaleError(
            f"{found.where} does not say its architecture, and has shapes that no option of model has; give a "
            f"directory with {OPEN_CLIP_CONFIG} or {HF_CONFIG}"
        )
    return with_told(load_group("model", option, Model), found.told)


def read_pretrained(where: str) -> Pretrained:
    """Read ``open_clip:NAME/TAG``, ``hf:NAME``, ``timm:NAME`` or a path; those libraries download what is remote.

    Raises ClipscaleError, in one line, when it is not there, cannot be downloaded, or holds no weights of a CLIP.
    """
    try:
        if where.startswith("open_clip:"):
            return _open_clip(where)
        if where.startswith("hf:"):
            return _directory(where, _download(where.removeprefix("hf:")))
        if where.startswith("timm:"):
            return _timm(where)
        path = Path(where)
        if path.is_dir():
            return _directory(where, path)
        state = read_file(path)
        if any(name in state for name in OPENAI_EXTRAS):
            return Pretrained(where, _own_names(state), {"activation": Activation.quickgelu.value}, _of_clip())
        return Pretrained(where, _own_names(state))
    except ClipscaleError as error:
        raise ClipscaleError(f"init.weights={where}: {error}") from None


def load_pretrained(model: CLIP, found: Pretrained) -> list[str]:
    """Copy weights into ``model``, in its own dtype. Returns what was said of those that are not as they were found.

    A bias on the logits is left out where the model's loss has none (the softmax does not see it), and kept as it is
    where the weights have none. Position embeddings of another image size or context length are brought to the model's.
    A model with a text tower of Hugging Face's takes the image tower alone of weights that have another text tower, a
    classifier's head stays the model's own, and so does all but the image tower where the weights are one alone. Raises
    ClipscaleError that says what else differs, and what to choose.
    """
    state, own = dict(found.state), model.state_dict()
    if all(name.startswith(TRUNK) for name in state):
        state = {name: tensor for name, tensor in own.items() if not name.startswith(TRUNK)} | state
    if isinstance(model.text, HFTextTower) and not found.of_hf_text:
        kept = {name: tensor for name, tensor in own.items() if not name.startswith("visual.")}
        state = kept | {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if BIAS not in own:
        state.pop(BIAS, None)
    elif BIAS not in state:
        state[BIAS] = own[BIAS]
    state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    state |= {name: tensor for name, tensor in own.items() if name.startswith(HEAD)}
    resized = fit_positions(model, state)
    _check_shapes(model, state, found)
    _check_values(model, state, found)
    _check_told(model, found)
    # A model without storage takes these tensors for its own; what it has no weights for is drawn later.
    without = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict({name: state[name].to(own[name].dtype) for name in own}, assign=without)
    return resized


def check_tokenizer(found: Pretrained, tokenizer: Tokenizer) -> None:
    """Raise ClipscaleError where a text tower that reads the tokens of another tokenizer would be given these."""
    if found.tokenizer is not None and not tokenizer.reads_as(found.tokenizer):
        raise ClipscaleError(
            f"init.weights={found.where} reads the tokens of {found.tokenizer.name}, not those of tokenizer.name="
            f"{tokenizer.name}; use tokenizer.name={found.tokenizer.name}"
        )


def read_text_tower(tower: HFTextTower, name: str) -> State:
    """Weights for ``tower.transformer`` of the Hugging Face model ``name``, a directory or one of the hub.

    They are read from safetensors, or as tensors only. Raises ConfigError when they cannot be had, or some are missing.
    """
    setting, instead = f"model.text.hf={name}", "model.text.hf_pretrained=false starts without them"
    try:
        with quiet_transformers():
            found, report = hf_class(tower.transformer.config).from_pretrained(
                _download(name), dtype=torch.float32, trust_remote_code=False, weights_only=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
        state: State = text_part(found).state_dict()
        missing = sorted({name for name in report["missing_keys"] if name in state})
        if missing:
            raise ClipscaleError(f"it has no weights for {missing[0]} and {len(missing) - 1} more; {instead}")
    except ClipscaleError as error:
        raise ConfigError(f"{setting}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{setting}: its weights cannot be read: {str(error).splitlines()[0]}; {instead}") from None
    return state


# ---- what differs ---------------------------------------------------------------------------------------------------


def _check_shapes(model: CLIP, state: State, found: Pretrained) -> None:
    own = model.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, the model's is {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in state]
    wrong += [f"the model has no {name}" for name in state if name not in own]
    if wrong:
        more = f" ({len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        raise ClipscaleError(
            f"init.weights={found.where} is not model={model.config.name}: {wrong[0]}{more}; {_advise(found)}"
        )


def _check_values(model: CLIP, state: State, found: Pretrained) -> None:
    for name, own in model.state_dict().items():
        if not own.is_floating_point() or state[name].is_meta:
            continue
        if not state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            raise ClipscaleError(f"init.weights={found.where}: {name} is {kind}; save the weights in floating point")
        if not state[name].float().isfinite().all():
            raise ClipscaleError(f"init.weights={found.where}: {name} has values that are not finite; it is damaged")


def _advise(found: Pretrained) -> str:
    option = _option_of(found)
    if option is not None:
        return f"use model={option}"
    return "no option of model has these shapes; set model.* keys to those of the weights"


def _option_of(found: Pretrained) -> str | None:
    """The option of ``model`` that has these shapes, and the activation as far as that is told."""
    shapes = {name: tensor.shape for name, tensor in found.state.items() if name != BIAS}
    for name in sorted(file.stem for file in (config_dir() / "model").glob("*.yaml")):
        config = load_group("model", name, Model)
        if config.activation.value != found.told.get("activation", Activation.gelu.value):
            continue
        if shapes.get("text.token_embedding.weight") != (config.text.vocab_size, config.text.width):
            continue  # building a large one takes a second, though it has no storage
        with torch.device("meta"):
            if {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()} == shapes:
                return name
    return None


def _check_told(model: CLIP, found: Pretrained) -> None:
    own, told = tell(model), dict(found.told)
    if model.config.text.activation is None and told.get("text.activation") == told.get("activation"):
        told.pop("text.activation", None)  # one key says both
    differing = {key: value for key, value in told.items() if key in own and not _equal(own[key], value)}
    if not differing:
        return
    there = ", ".join(f"{key} {_short(value)}" for key, value in differing.items())
    here = ", ".join(_short(own[key]) for key in differing)
    keys = [f"model.{key}={_short(value)}" for key, value in differing.items()]
    # Of towers without an activation of their own, the text tower's is the model's.
    key = "activation" if "activation" in told else "text.activation"
    if differing.get(key) in (Activation.gelu.value, Activation.quickgelu.value):
        base = model.config.name.removesuffix("_quickgelu")
        twin = base if differing[key] == Activation.gelu.value else f"{base}_quickgelu"
        if twin != model.config.name and (config_dir() / "model" / f"{twin}.yaml").exists():
            keys[list(differing).index(key)] = f"model={twin}"
    raise ClipscaleError(f"init.weights={found.where} was trained with {there}, not {here}; use {' '.join(keys)}")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _short(value: Any) -> str:
    return str(value).replace(" ", "")


# ---- sources --------------------------------------------------------------------------------------------------------


def _open_clip(where: str) -> Pretrained:
    import open_clip  # slow to import

    name, _, tag = where.removeprefix("open_clip:").partition("/")
    if name not in open_clip.list_models():
        raise ClipscaleError(
            f"open_clip has no model {name}; write open_clip:NAME/TAG, e.g. ViT-B-32/laion2b_s34b_b79k"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ClipscaleError(f"open_clip has no weights {tag!r} of {name}; choose from {', '.join(tags) or 'none'}")
    config = open_clip.get_model_config(name)
    described = model_of_open_clip(config, name)  # refuses what cannot be loaded before it is downloaded
    logging.disable(logging.ERROR)  # open_clip logs what it then raises
    try:
        with asking_hub():
            model = open_clip.create_model(name, pretrained=tag)
    except Exception as error:
        raise unavailable(error) from None
    finally:
        logging.disable(logging.NOTSET)
    config["quick_gelu"] = activation_of(name, tag) == Activation.quickgelu.value
    told = told_by_open_clip({"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg})
    state = from_open_clip(model.state_dict())
    if not config["text_cfg"].get("hf_tokenizer_name"):
        return Pretrained(where, state, told, _of_clip(), described=lambda: described)
    return Pretrained(where, state, told, None, name, partial(_with_tokens, described, name))


def _timm(where: str) -> Pretrained:
    try:
        with asking_hub():
            return Pretrained(where, *of_timm(download_timm(where.removeprefix("timm:"))))
    except ClipscaleError:
        raise
    except Exception as error:
        raise unavailable(error) from None


def _download(name: str) -> Path:
    weights = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    place = fetch(name, [HF_CONFIG, HF_IMAGES, *weights])
    if not any(place.glob("*.safetensors")):
        place = fetch(name, [HF_CONFIG, HF_IMAGES, "pytorch_model.bin"])
    return place


def _directory(where: str, path: Path) -> Pretrained:
    """An exported directory of open_clip or Hugging Face, or what clipscale wrote."""
    if (path / OPEN_CLIP_CONFIG).exists():
        config = read_json(path / OPEN_CLIP_CONFIG)
        with well_formed(OPEN_CLIP_CONFIG):
            described = model_of_open_clip(config.get("model_cfg") or {}, path.resolve().name)
            told = told_by_open_clip(config)
        tokenizer = _tokenizer_beside(path, config)
        if tokenizer is not None and not tokenizer.is_bpe:
            ids = {"text.eot_id": tokenizer.eot_id}
            told = ids | ({"text.pad_id": tokenizer.pad_id} if told["text.pad_to_context"] else {}) | told
        name = "clip" if tokenizer is not None and tokenizer.is_bpe else f"{HF}{path}"
        state = from_open_clip(read_weights(path, "open_clip_"))
        return Pretrained(where, state, told, tokenizer, name, lambda: described)
    if (path / HF_CONFIG).exists():
        config = read_json(path / HF_CONFIG)
        with well_formed(HF_CONFIG):
            told = told_by_hf(config)
        if (path / HF_IMAGES).exists():
            images = read_json(path / HF_IMAGES)
            with well_formed(HF_IMAGES):
                found = {key: of_channels(images.get(f"image_{key}")) for key in ("mean", "std")}
            told |= {key: value for key, value in found.items() if value is not None} | resize_by_hf(images)
        of_clip = config.get("model_type") == "clip" and told["text.eot_id"] == _of_clip().eot_id
        name = "clip" if of_clip else where if where.startswith(HF) else f"{HF}{path}"
        return Pretrained(
            where, from_hf(read_weights(path, "")), told, _of_clip() if of_clip else None, name,
            lambda: _with_tokens(model_of_hf(config, path.resolve().name), name),
        )  # fmt: skip
    model, trained = load_own(path)
    return Pretrained(where, model.state_dict(), tell(model), load_tokenizer(find_checkpoint(path)[0], trained))


def _with_tokens(model: Model, name: str) -> Model:
    """The architecture with the ids that its tokenizer, by ``tokenizer.name``, ends and fills captions with."""
    tokenizer = Tokenizer(name, model.context_length)
    if not tokenizer.is_bpe:
        model.text.eot_id = tokenizer.eot_id
        model.text.pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else model.text.pad_id
    return model


def _tokenizer_beside(path: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of an exported directory of open_clip; None for one that is named and not there."""
    text = config["model_cfg"]["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return _of_clip()
    if not (path / "tokenizer_config.json").exists():
        return None
    return Tokenizer(f"{HF}{path}", text.get("context_length", 77))


def _of_clip() -> Tokenizer:
    return Tokenizer("clip", 77)


def _own_names(state: State) -> State:
    if "temperature.logit_scale" in state:
        return state
    if "text_model.embeddings.token_embedding.weight" in state:
        return from_hf(state)
    return from_open_clip(state)
