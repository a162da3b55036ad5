"""What ``init.weights`` names: weights of open_clip, Hugging Face, a run or a file, held against the model."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipscale.checkpoint.covered import model_of_open_clip
from clipscale.checkpoint.interop import OPENAI_EXTRAS, TRUNK, State, from_hf, from_open_clip
from clipscale.checkpoint.loading import load_model
from clipscale.checkpoint.positions import fit_positions
from clipscale.checkpoint.told import activation_of, tell, told_by_hf, told_by_open_clip
from clipscale.checkpoint.trunk import download_timm, of_timm
from clipscale.config import config_dir, load_group
from clipscale.config.hub import fetch, unavailable
from clipscale.config.model import Activation, Model
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models import CLIP
from clipscale.models.hf import HFTextTower, hf_class, quiet_transformers, text_part

OPEN_CLIP_CONFIG = "open_clip_config.json"
HF_CONFIG = "config.json"
HF_IMAGES = "preprocessor_config.json"
BIAS, HEAD = "temperature.logit_bias", "head."


@dataclass(frozen=True)
class Pretrained:
    """Weights under our names, and what their source tells of the model beside them."""

    where: str
    """As ``init.weights`` says it."""
    state: State
    told: dict[str, Any] = field(default_factory=dict)
    """Values of ``model.*`` keys, without that prefix, that weights do not show."""

    @property
    def of_hf_text(self) -> bool:
        """Whether the text tower is one of Hugging Face's, as clipscale names it."""
        return any(name.startswith("text.transformer.") for name in self.state)


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
        state = _read_file(path)
        of_openai = any(name in state for name in OPENAI_EXTRAS)
        return Pretrained(where, _own_names(state), {"activation": Activation.quickgelu.value} if of_openai else {})
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
    _check_told(model, found)
    model.load_state_dict(state)
    return resized


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


def _advise(found: Pretrained) -> str:
    shapes = {name: tensor.shape for name, tensor in found.state.items() if name != BIAS}
    for name in sorted(file.stem for file in (config_dir() / "model").glob("*.yaml")):
        config = load_group("model", name, Model)
        if config.activation.value != found.told.get("activation", Activation.gelu.value):
            continue
        with torch.device("meta"):
            if {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()} == shapes:
                return f"use model={name}"
    return "no option of model has these shapes; set model.* keys to those of the weights"


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
    if "activation" in differing:
        base = model.config.name.removesuffix("_quickgelu")
        twin = base if differing["activation"] == Activation.gelu.value else f"{base}_quickgelu"
        if (config_dir() / "model" / f"{twin}.yaml").exists():
            keys[list(differing).index("activation")] = f"model={twin}"
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
    model_of_open_clip(config)  # refuses what cannot be loaded before it is downloaded
    logging.disable(logging.ERROR)  # open_clip logs what it then raises
    try:
        model = open_clip.create_model(name, pretrained=tag)
    except Exception as error:
        raise unavailable(error) from None
    finally:
        logging.disable(logging.NOTSET)
    config["quick_gelu"] = activation_of(name, tag) == Activation.quickgelu.value
    told = told_by_open_clip({"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg})
    return Pretrained(where, from_open_clip(model.state_dict()), told)


def _timm(where: str) -> Pretrained:
    try:
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
        config = _read_json(path / OPEN_CLIP_CONFIG)
        model_of_open_clip(config.get("model_cfg") or {})
        return Pretrained(where, from_open_clip(_read_weights(path, "open_clip_")), told_by_open_clip(config))
    if (path / HF_CONFIG).exists():
        told = told_by_hf(_read_json(path / HF_CONFIG))
        if (path / HF_IMAGES).exists():
            images = _read_json(path / HF_IMAGES)
            told |= {key: images[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in images}
        return Pretrained(where, from_hf(_read_weights(path, "")), told)
    model, _ = load_model(path)
    return Pretrained(where, model.state_dict(), tell(model))


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ClipscaleError(f"{path.name} is not JSON") from None


def _read_weights(path: Path, prefix: str) -> State:
    """The weights beside a configuration, in one file or in several."""
    index = path / f"{prefix}model.safetensors.index.json"
    if index.exists():
        state: State = {}
        for name in sorted(set(_read_json(index)["weight_map"].values())):
            state |= _read_file(path / name)
        return state
    names = (f"{prefix}model.safetensors", f"{prefix}pytorch_model.bin", f"{prefix}pytorch_model.safetensors")
    for name in names:
        if (path / name).exists():
            return _read_file(path / name)
    raise ClipscaleError(f"there is none of {', '.join(names)} in {path}")


def _read_file(path: Path) -> State:
    """A state dict of tensors; a pickle that holds anything else is not executed but refused."""
    if not path.is_file():
        raise ClipscaleError(f"{path} is no file or directory; give open_clip:NAME/TAG, hf:NAME, timm:NAME or a path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # a remark on TorchScript archives, which are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ClipscaleError(
            f"{path.name} is no file of tensors alone; a pickle of anything else could run code and is not read; save "
            "its state dict"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ClipscaleError(
                f"{path.name} is a TorchScript archive; save its weights first: "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
            ) from None
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ClipscaleError(f"{path.name} cannot be read: {first}") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # a checkpoint of open_clip's training
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor | int) for value in content.values()):
        raise ClipscaleError(f"{path.name} holds no state dict")
    return {str(name).removeprefix("module."): torch.as_tensor(value) for name, value in content.items()}


def _own_names(state: State) -> State:
    if "temperature.logit_scale" in state:
        return state
    if "text_model.embeddings.token_embedding.weight" in state:
        return from_hf(state)
    return from_open_clip(state)
