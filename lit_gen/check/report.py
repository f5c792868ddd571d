"""What was found out about a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lit_gen.errors import OutOfRange, UserError
from lit_gen.run import Run
from lit_gen.settings import KeyPath, Settings

T = TypeVar("T")


@dataclass
class Report:
    """What was found out about one run.

    Args:
        run: the run.
        tree: its settings with those of the command line, which know where they were written.
        settings: as the parser resolved them; what fits of those of the files, without defaults, where it objects.
        bound: whether the parser had no objection.
        gone: places of the settings that it objected to, which `settings` lacks.
        problems: what would end it, or make it another run than was meant; one line each.
        notes: what may be meant.
        facts: what it would do, by topic.
        stored: bytes its checkpoints will take.
    """

    run: Run
    tree: Settings = field(default_factory=Settings)
    settings: dict[str, Any] = field(default_factory=dict)
    bound: bool = False
    gone: list[KeyPath] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    stored: int = 0

    def is_whole(self, path: KeyPath) -> bool:
        """Whether nothing was objected to at a place, below it or above it."""
        return not any(place[: len(path)] == path or path[: len(place)] == place for place in self.gone)

    def problem(self, path: KeyPath, text: str) -> None:
        self.problems += [self.located(path, line) for line in text.splitlines()]

    def note(self, path: KeyPath, text: str) -> None:
        self.notes.append(self.located(path, text))

    def located(self, path: KeyPath, text: str) -> str:
        if any(text.startswith(f"{where}: ") for where in {self.run.name, *self.tree.origins.values()}):
            return text
        return f"{self.tree.origin(path) or self.run.name}: {text}"


def made(report: Report, path: KeyPath, node: dict[str, Any], make: Callable[[dict[str, Any]], T]) -> T | None:
    """What `make` makes of bound settings; raises what it raises, and returns None where one is out of range.

    A constructor objects to one such setting and stops; it is tried again without, so that all of them are told.
    """
    from lit_gen.mistakes import places
    from lit_gen.stage import as_user_error, unwrapped

    node, wrong = copy.deepcopy(node), False
    while True:
        try:
            result = make(node)
            return None if wrong else result
        except Exception as error:
            cause = unwrapped(error)
            if wrong and not isinstance(cause, UserError):  # for want of what was left out
                return None
            if not isinstance(cause, OutOfRange):
                raise
            report.problem(path, str(as_user_error(cause, report.run)))
            wrong, left = True, 0
            for name, value in cause.found.items():
                for place in places(Settings(node), name.rpartition(".")[2], value):
                    left += _leave_out(node, place)
            if not left:
                return None


def _leave_out(node: dict[str, Any], place: KeyPath) -> bool:
    """Remove a setting; one within a list goes with the list."""
    keys = place[: next((i for i, key in enumerate(place) if isinstance(key, int)), len(place))]
    for key in keys[:-1]:
        node = node[key]
    return node.pop(keys[-1], None) is not None


def described(error: Exception) -> str:
    """An error that nobody meant for a user, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def bytes_of(number: float) -> str:
    """A number of bytes in words, in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} {units[0]}" if number >= 100 or units[0] == "B" else f"{number:.1f} {units[0]}"
