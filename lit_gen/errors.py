"""Errors that are the user's to fix: one readable line each, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; `str()` of it says what is wrong, where, and what to do."""

    status = 2  # of the command that it ends


class ShardError(UserError):
    """A set of shards is missing, incomplete or not readable."""


def at_least(least: float, **values: float | None) -> None:
    """UserError for the first of the settings that is smaller, or no number; None stands for one that was not made."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"`{name}` must be at least {least}, not {value}")


def nearest(wrong: str, names: Iterable[str]) -> str:
    """', did you mean `right`?' where a name is close to `wrong`, else ''."""
    names = [str(n) for n in names]
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(wrong.lower(), lower, n=1, cutoff=0.6)
    return f", did you mean `{lower[close[0]]}`?" if close else ""
