"""Compose a configuration once, from Hydra's groups and overrides; every rank then reads the one result."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipscale.config.fields import leaves
from clipscale.config.schema import Config
from clipscale.errors import ConfigError

GROUPS = (
    "experiment", "model", "data", "tokenizer", "loss", "optim", "schedule", "precision",
    "parallel", "cluster", "checkpoint", "eval", "tracking",
)  # fmt: skip

ConfigStore.instance().store(name="schema", node=Config)


def config_dir() -> Path:
    """The tree of config groups: packed into the wheel, or the checkout's own under an editable install."""
    packed = Path(__file__).parent.parent / "conf"
    return packed if packed.is_dir() else packed.parent.parent / "conf"


def compose(overrides: Sequence[str], user_dir: str | None = None) -> tuple[Config, str]:
    """Compose the configuration without a command line.

    ``user_dir`` is a tree of the user's own groups, searched before the packed one. Returns the configuration and
    the name of its experiment. Raises ConfigError, in one line, for an unknown key, option or type.
    """
    search = [f"hydra.searchpath=[file://{Path(user_dir).absolute()}]"] if user_dir else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir().absolute()), version_base="1.3"):
            full = hydra.compose("config", [*quote_shards(overrides), *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    experiment = full.hydra.runtime.choices.get("experiment") or "custom"
    OmegaConf.set_struct(full, False)
    full.pop("hydra")
    return typed(full), experiment


def quote_shards(overrides: Sequence[str]) -> list[str]:
    """Quote brace patterns, which Hydra's grammar would read as dictionaries: ``data.train.shards=/d/{0..9}.tar``."""
    bare = re.compile(r"^([\w.+~]+\.shards)=([^'\"\[].*)$")
    return [
        bare.sub(lambda match: match[0] if match[2] in ("null", "0") else f"{match[1]}='{match[2]}'", o)
        for o in overrides
    ]


def override(config: Config, overrides: Sequence[str], allowed: Sequence[str]) -> Config:
    """A copy of ``config`` with ``KEY=VALUE`` changes, for commands other than training.

    Raises ConfigError, in one line, for an unknown key or type, or a key that does not begin as ``allowed`` says.
    """
    for change in overrides:
        if not change.startswith(tuple(allowed)) or "=" not in change:
            raise ConfigError(f"{change}: this command takes {', '.join(f'{key}KEY=value' for key in allowed)}")
    try:
        changes = OmegaConf.from_dotlist(quote_shards(overrides))
        merged = OmegaConf.merge(OmegaConf.structured(config), changes)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise explain(error, overrides) from error


def typed(node: DictConfig) -> Config:
    """The resolved configuration as dataclasses, checked against the schema once more."""
    try:
        # Through a plain container: a typed node would carry keys that `+key=value` added past the schema.
        plain = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise explain(error, ()) from error


def load_config(path: Path) -> Config:
    """Read a ``config.yaml`` that ``save_config`` wrote."""
    try:
        return typed(OmegaConf.load(path))  # type: ignore[arg-type]
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a run directory holds its configuration there") from None


def save_config(config: Config, path: Path) -> None:
    """Write the configuration as YAML, in place of any older file, atomically."""
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(to_yaml(config))
    scratch.replace(path)


def to_yaml(config: Config) -> str:
    """The configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load_group(group: str, option: str, schema: type) -> Any:
    """One option of one group as its dataclass, for use without a run: ``load_group("model", "vit_b_32", Model)``."""
    path = config_dir() / group / f"{option}.yaml"
    if not path.is_file():
        raise unknown_option(group, option, sorted(file.stem for file in path.parent.glob("*.yaml")))
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))


def unknown_option(group: str, option: str, options: Sequence[str]) -> ConfigError:
    """The error for an option that a group does not have."""
    return ConfigError(
        f"{group}={option}: no such option{_did_you_mean(option, options)}; choose from {', '.join(options)}"
    )


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Turn what Hydra and OmegaConf raise into one line that names the key and the nearest right one."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return unknown_option(group, option, sorted(error.options))
    text = f"{error}\n{cause or ''}"
    named = re.search(r"full_key: (\S+)", text)
    key = getattr(cause, "full_key", None) or (named[1] if named else _key_of(text, overrides))
    where = re.match(r"In '([^']+)'", text)
    origin = f" (in {where[1]}.yaml)" if where else ""
    if key and re.search(r"Key '.*' (is )?not in|Could not override", text) and key not in ALL_KEYS:
        return ConfigError(f"{key}: no such key{_did_you_mean(key, ALL_KEYS)}{origin}")
    lines = [line for line in str(cause or error).splitlines() if not line.startswith("In '")]
    first = lines[0] if lines else type(error).__name__
    return ConfigError(f"{key}: {first}{origin}" if key else first)


def _key_of(text: str, overrides: Sequence[str]) -> str | None:
    named = re.search(r"Could not (?:override|append|delete) '?([\w.]+)'?", text)
    if named:
        return named[1]
    return next((o.split("=")[0].lstrip("+~") for o in overrides if o.split("=")[0].lstrip("+~") in text), None)


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not close:
        leaf = word.rpartition(".")[2]
        close = [choice for choice in choices if choice.rpartition(".")[2] == leaf]
    return f"; did you mean {close[0]}?" if close else ""


ALL_KEYS = (*(key for key, _, _ in leaves(Config)), *GROUPS)
