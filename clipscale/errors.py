"""The errors that a user can mend; each prints as one line and carries the exit code of its kind."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of ``clipscale train`` (and of ``result.json``)."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    DIVERGED = 3
    DATA_BUDGET = 4
    PREEMPTED = 75


class ClipscaleError(Exception):
    """Something the user can mend: says what is wrong, the value seen, and the key or command that mends it."""

    exit_code = ExitCode.USER_ERROR


class ConfigError(ClipscaleError):
    """A configuration that cannot be run."""


class DataError(ClipscaleError):
    """Data that is not there, or is not what the configuration says."""


class MissingError(DataError):
    """A file or an object that does not exist."""


class DataBudgetError(ClipscaleError):
    """More samples than the budget allows could not be used."""

    exit_code = ExitCode.DATA_BUDGET


class BusyError(ClipscaleError):
    """A run that another process is training."""


class DivergedError(ClipscaleError):
    """Training produced a non-finite loss."""

    exit_code = ExitCode.DIVERGED
