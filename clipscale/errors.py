"""The errors that a user can mend; each prints as one line and carries the exit code of its kind."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence


class ExitCode(enum.IntEnum):
    """Exit codes of ``clipscale train`` (and of ``result.json``)."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    DIVERGED = 3
    DATA_BUDGET = 4
    PREEMPTED = 75


_SECRETS = (
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),  # user and password of a URL
    (re.compile(r"(\w+://[^\s?]+\?)[^\s'\",;)]+"), r"\1***"),  # its query, which may be a signature
    # What a command may be given, as in `curl -H 'Authorization: Bearer …'`.
    (
        re.compile(r"((?:authorization|token|secret|password)\w*\s*[:=]\s*(?:bearer |basic )?)[^\s'\"]+", re.I),
        r"\1***",
    ),
)


def masked(text: str) -> str:
    """A text without the secrets that locations in it may carry."""
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return text


class ClipscaleError(Exception):
    """Something the user can mend: says what is wrong, the value seen, and the key or command that mends it.

    Secrets in locations that the message names are masked.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class ConfigError(ClipscaleError):
    """A configuration that cannot be run."""

    @classmethod
    def of(cls, mistakes: Sequence[str]) -> ConfigError:
        """One error of one mistake or several."""
        mistakes = list(dict.fromkeys(mistakes))
        if len(mistakes) == 1:
            return cls(mistakes[0])
        return cls(f"{len(mistakes)} mistakes:" + "".join(f"\n  - {line}" for line in mistakes))


class DataError(ClipscaleError):
    """Data that is not there, or is not what the configuration says."""


class MissingError(DataError):
    """A file or an object that does not exist."""


class RefusedError(DataError):
    """Something that these credentials may not read."""


class DataBudgetError(ClipscaleError):
    """More samples than the budget allows could not be used."""

    exit_code = ExitCode.DATA_BUDGET


class SaveError(ClipscaleError):
    """A checkpoint that could not be written."""

    exit_code = ExitCode.FAILED


class BusyError(ClipscaleError):
    """A run that another process is training."""


class DivergedError(ClipscaleError):
    """Training went wrong again and again."""

    exit_code = ExitCode.DIVERGED


class OutOfMemoryError(ClipscaleError):
    """The device has too little memory for this configuration."""


class DiskFullError(ClipscaleError):
    """What a run must write finds no room."""

    exit_code = ExitCode.FAILED


class LostPeerError(ClipscaleError):
    """Another rank is gone, or does not answer."""

    exit_code = ExitCode.FAILED
