"""Errors that are the user's to fix: one readable line each, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; `str()` of it says what is wrong, where, and what to do."""

    status = 2  # of the command that it ends


class ShardError(UserError):
    """A set of shards is missing, incomplete or not readable."""


class OutOfRange(UserError):
    """Settings have values that they cannot have; one line each.

    Args:
        least: that they may have.
        found: what they have, by name.
    """

    def __init__(self, least: float, found: dict[str, float]) -> None:
        self.least, self.found = least, found
        super().__init__("\n".join(f"`{name}` must be at least {least}, not {value}" for name, value in found.items()))


def at_least(least: float, **values: float | None) -> None:
    """OutOfRange if a setting is smaller, or no number; None stands for one that was not made."""
    if found := {name: value for name, value in values.items() if value is not None and not value >= least}:
        raise OutOfRange(least, found)


def nearest(wrong: str, names: Iterable[str]) -> str:
    """', did you mean `right`?' where a name is close to `wrong`, else ''."""
    names = [str(n) for n in names]
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(wrong.lower(), lower, n=1, cutoff=0.6)
    return f", did you mean `{lower[close[0]]}`?" if close else ""
