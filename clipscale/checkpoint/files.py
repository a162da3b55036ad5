"""Files of weights and their configurations, of any library: what cannot be read is one line."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipscale.checkpoint.interop import State
from clipscale.errors import ClipscaleError


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises ClipscaleError for anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        raise ClipscaleError(f"{path.name} is not JSON") from None
    except OSError as error:
        raise ClipscaleError(f"{path.name} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ClipscaleError(f"{path.name} is no JSON object, but begins with {str(content)[:20]!r}")
    return content


@contextmanager
def well_formed(name: str) -> Iterator[None]:
    """Say in one line that the values in a file are not of the kinds that its format has."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ClipscaleError(f"{name} does not hold what its format has: {str(error).splitlines()[0]}") from None


def read_weights(path: Path, prefix: str) -> State:
    """The weights beside a configuration, in one file or in several."""
    index = path / f"{prefix}model.safetensors.index.json"
    if index.exists():
        state: State = {}
        with well_formed(index.name):
            parts = sorted(set(read_json(index)["weight_map"].values()))
        for name in parts:
            state |= read_file(path / name)
        return state
    names = (f"{prefix}model.safetensors", f"{prefix}pytorch_model.bin", f"{prefix}pytorch_model.safetensors")
    for name in names:
        if (path / name).exists():
            return read_file(path / name)
    raise ClipscaleError(f"there is none of {', '.join(names)} in {path}")


def _is_safetensors(path: Path) -> bool:
    """By the first bytes, whatever the name says: the length of a header of JSON, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    pickled = start.startswith((b"PK", b"\x80"))  # torch's two formats
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not pickled)


def read_file(path: Path) -> State:
    """A state dict of tensors; a pickle that holds anything else is not executed but refused."""
    if not path.is_file():
        raise ClipscaleError(f"{path} is no file or directory; give open_clip:NAME/TAG, hf:NAME, timm:NAME or a path")
    try:
        if _is_safetensors(path):
            return load_file(path)
        # An open file: by its name torch would take it for safetensors. Ignored is a remark on TorchScript archives.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ClipscaleError(
            f"{path.name} is no file of tensors alone; a pickle of anything else could run code and is not read; save "
            "its state dict"
        ) from None
    except Exception as error:  # what torch raises of damaged files has no end: KeyError, IndexError, struct.error …
        if "TorchScript" in str(error):
            raise ClipscaleError(
                f"{path.name} is a TorchScript archive; save its weights first: "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
            ) from None
        first = str(error).splitlines()[0] if isinstance(error, SafetensorError | OSError | RuntimeError) else ""
        raise ClipscaleError(
            f"{path.name} cannot be read: {first or 'it is damaged, or neither safetensors nor of torch.save'}"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # a checkpoint of open_clip's training
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor | int) for value in content.values()):
        raise ClipscaleError(f"{path.name} holds no state dict")
    return {str(name).removeprefix("module."): torch.as_tensor(value) for name, value in content.items()}
