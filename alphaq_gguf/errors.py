"""Errors a user can fix: one line saying what is wrong and where, one hint saying what to do."""

from __future__ import annotations


class AlphaQError(Exception):
    """A problem the user can fix; the command line shows it as one line and exits with `exit_code`.

    `message` says what is wrong, where, and expected against found; `hint` is the command, flag or
    change that helps (may be empty).
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SourceError(AlphaQError):
    """The checkpoint cannot be read: missing, damaged, not a model, or of a family we do not know."""


class WeightError(SourceError):
    """A tensor holds NaN or infinite values."""


class ConnectionLostError(SourceError):
    """The Hub could not be reached or a download broke off for good; the same command goes on from there."""


class BudgetError(AlphaQError):
    """No allocation meets the budget; the hint names the feasible range."""


class OutputError(AlphaQError):
    """The output cannot be written: it exists, the directory is read-only, or the disk is full."""


class UsageError(AlphaQError):
    """An option's value makes no sense; exits with the usage code."""

    exit_code = 2


class ThresholdError(AlphaQError):
    """A file misses a bound that the user set; exits with a code of its own, for use in scripts."""

    exit_code = 3
