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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clipscale.config.fields import leaves
from clipscale.config.schema import Config
from clipscale.config.validate import all_mistakes
from clipscale.errors import ConfigError

GROUPS = (
    "experiment", "model", "data", "tokenizer", "loss", "optim", "schedule", "precision",
    "parallel", "cluster", "checkpoint", "eval", "tracking",
)  # fmt: skip

ALIASES = {  # what other programs call them
    "batch_size": "global_batch_size", "lr": "optim.lr", "learning_rate": "optim.lr", "epochs": "total_samples",
    "wd": "optim.weight_decay", "warmup": "schedule.warmup_samples", "workers": "data.workers",
    "nodes": "cluster.nodes",
}  # fmt: skip

ConfigStore.instance().store(name="schema", node=Config)


def config_dir() -> Path:
    """The tree of config groups: packed into the wheel, or the checkout's own under an editable install."""
    packed = Path(__file__).parent.parent / "conf"
    return packed if packed.is_dir() else packed.parent.parent / "conf"


def compose(overrides: Sequence[str], user_dir: str | None = None) -> tuple[Config, str]:
    """Compose the configuration without a command line.

    ``user_dir`` is a tree of the user's own groups, beside the packed ones. Returns the configuration and
    the name of its experiment. Raises ConfigError for unknown keys and options and wrong types, all of them at once,
    and with them whatever else is wrong with the rest.
    """
    if user_dir is not None and not Path(user_dir).is_dir():
        raise ConfigError(f"--config-dir {user_dir}: there is no such directory")
    left, mistakes = _readable(overrides)
    cause: Exception | None = None
    while True:
        try:
            found = _compose(left, user_dir)
            break
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            cause = cause or error
            text, key, meant = _explained(error, left)
            mistakes.append(text)
            culprit = next((o for o in left if key and o.split("=")[0].lstrip("+~") == key), None)
            if culprit is None:  # nothing to go on without
                raise ConfigError.of(mistakes) from cause
            # What was meant is taken for given, so that it is not missed by what is said next.
            left = [o for o in left if o is not culprit] + ([meant] if meant else [])
    if mistakes:
        raise ConfigError.of([*mistakes, *all_mistakes(found[0])]) from cause
    return found


def _readable(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides that Hydra's grammar can read, and what is wrong with the others."""
    parser, left, mistakes = OverridesParser.create(), [], []
    for given in overrides:
        (quoted,) = quote_shards([given])
        try:
            read = parser.parse_override(quoted)
        except HydraException:
            mistakes.append(
                f"{given} cannot be read; give KEY=VALUE, in quotes where it holds blanks, quotes or brackets"
            )
            continue
        if read.key_or_group in GROUPS and not isinstance(read.value(), str | list) and not read.is_delete():
            mistakes.append(f"{given}: name an option of the group {read.key_or_group}")
        else:
            left.append(given)
    return left, mistakes


def _compose(overrides: Sequence[str], user_dir: str | None) -> tuple[Config, str]:
    search = [search_path(Path(user_dir))] if user_dir else []
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir().absolute()), version_base="1.3"):
        full = hydra.compose("config", [*quote_shards(overrides), *search], return_hydra_config=True)
    experiment = full.hydra.runtime.choices.get("experiment") or "custom"
    OmegaConf.set_struct(full, False)
    full.pop("hydra")
    return typed(full), experiment


def search_path(place: Path) -> str:
    """The override by which Hydra finds a tree of the user's own groups as well."""
    quoted = str(place.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.searchpath=['file://{quoted}']"


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
    return ConfigError(_explained(error, overrides)[0])


def _explained(error: Exception, overrides: Sequence[str]) -> tuple[str, str | None, str | None]:
    """The line for the user, the key of the override that an error comes from, if one can be told, and the override
    that seems to be meant."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        near = _nearest(option, error.options)
        return str(unknown_option(group, option, sorted(error.options))), group, near and f"{group}={near}"
    text = f"{error}\n{cause or ''}"
    named = re.search(r"full_key: (\S+)", text)
    key = getattr(cause, "full_key", None) or (named[1] if named else _key_of(text, overrides))
    where = re.match(r"In '([^']+)'", text)
    origin = f" (in {where[1]}.yaml)" if where else ""
    if key and re.search(r"Key '.*' (is )?not in|Could not (override|delete)", text) and key not in ALL_KEYS:
        near = _nearest(key, ALL_KEYS)
        value = next((o.partition("=")[2] for o in overrides if o.split("=")[0] == key), None)
        meant = f"{near}={value}" if near and value else None
        return f"{key}: no such key{_did_you_mean(key, ALL_KEYS)}{origin}", key, meant
    lines = [line.strip() for line in str(cause or error).splitlines() if not line.startswith("In '")]
    first = next(filter(None, lines), type(error).__name__)
    return f"{key}: {first}{origin}" if key else first, key, None


def _key_of(text: str, overrides: Sequence[str]) -> str | None:
    named = re.search(r"Could not (?:override|append|delete from config\.) '?([\w.]+)'?", text)
    if named:
        return named[1]
    return next((o.split("=")[0].lstrip("+~") for o in overrides if o.split("=")[0].lstrip("+~") in text), None)


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = _nearest(word, choices)
    return f"; did you mean {near}?" if near else ""


def _nearest(word: str, choices: Sequence[str]) -> str | None:
    if word in ALIASES:
        return ALIASES[word]
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if not close:
        leaf = word.rpartition(".")[2]
        close = [choice for choice in choices if choice.rpartition(".")[2] == leaf]
    return close[0] if close else None


ALL_KEYS = (*(key for key, _, _ in leaves(Config)), *GROUPS)
