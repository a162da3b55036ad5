"""Hugging Face's models by name: a local directory, or one of their hub that is downloaded once; no code of theirs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from clipscale.errors import ClipscaleError, ConfigError


def require_transformers(setting: str) -> None:
    """Raise ConfigError where ``setting``, as ``key=value``, needs transformers, and they are not installed."""
    if find_spec("transformers") is None:
        raise ConfigError(f"{setting} needs Hugging Face's transformers: pip install 'clipscale[hf]'")


REACH_S = 10.0  # for the first answer of the hub
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def shareable(name: str) -> str:
    """``name`` without the place of a directory: what may be told to those who are given the model."""
    path = Path(name).expanduser()
    return path.name if path.is_dir() or not HUB_NAME.fullmatch(name) else name


def fetch(name: str, files: Sequence[str]) -> Path:
    """The directory of a model: ``name`` is one, or an ``ORGANISATION/NAME`` of the hub.

    Of the latter, those of ``files``, name patterns, are downloaded where they are not yet on this machine. Raises
    ClipscaleError when it is neither, or cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(name):
        raise ClipscaleError("it is neither a directory here nor ORGANISATION/NAME of the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        with asking_hub():
            return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:
        raise unavailable(error) from None


@contextmanager
def asking_hub() -> Iterator[None]:
    """Within it, the Hugging Face hub is asked for what is not on this machine, or at once only for what is.

    Its library tries each file for a minute or two where there is no network, and warns each time: here one request
    shows first whether there is one.
    """
    from huggingface_hub import constants

    logger, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = logger.level
    logger.setLevel(logging.ERROR)
    silent = not offline and not _reachable()
    constants.HF_HUB_OFFLINE = offline or silent
    try:
        yield
    except Exception as error:
        if silent and not isinstance(error, ClipscaleError):
            raise OSError(f"{constants.ENDPOINT} does not answer") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def _reachable() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)
    except Exception:  # of whatever HTTP library it uses
        return False
    return True


def unavailable(error: Exception) -> ClipscaleError:
    """What could not be downloaded, as one line that says what helps."""
    first = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ClipscaleError(f"it cannot be downloaded here ({first}); give the path of a copy instead")
