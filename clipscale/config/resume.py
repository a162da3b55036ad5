"""What a changed configuration means for a run that exists: its identity, and the keys in which two differ."""

from __future__ import annotations

import hashlib
import json
import posixpath
from enum import Enum
from functools import reduce
from typing import Any

from clipscale.config.fields import Resume, leaves
from clipscale.config.schema import Config

# Chosen or read by clipscale when they are null, and then recorded: a null in the command keeps what the run has.
RECORDED = ("data.streams", "data.window", "model.classes", "model.text.hf_config")


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key, as plain YAML types."""
    value = reduce(getattr, key.split("."), config)
    return value.value if isinstance(value, Enum) else value


def identity(config: Config) -> str:
    """Eight hex digits of the fixed and event keys: what the run is, wherever it runs and however long."""
    keys = {
        key: _comparable(key, value_of(config, key))
        for key, field, _ in leaves(Config)
        if field.metadata["resume"] is not Resume.free
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]


def differences(stored: Config, new: Config) -> dict[Resume, dict[str, tuple[Any, Any]]]:
    """Keys in which two configurations differ, by what a resume does with them: ``{key: (stored, new)}``."""
    found: dict[Resume, dict[str, tuple[Any, Any]]] = {kind: {} for kind in Resume}
    for key, field, _ in leaves(Config):
        before, after = value_of(stored, key), value_of(new, key)
        if key in RECORDED and after is None:
            continue
        if _comparable(key, before) != _comparable(key, after):
            found[field.metadata["resume"]][key] = (before, after)
    return found


def _comparable(key: str, value: Any) -> Any:
    if key == "data.train.shards" and value is not None:
        # Data may move between resumes: only file names count, their contents are checked by the cursor.
        sources = [value] if isinstance(value, str) else list(value)
        return ["::".join(posixpath.basename(part) for part in str(source).split("::")) for source in sources]
    return value
