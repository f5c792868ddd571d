"""What was found out about a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_gen.experiment import Run
from lit_gen.settings import KeyPath, Settings


@dataclass
class Report:
    """What was found out about one run.

    Args:
        run: the run.
        tree: its settings with those of the command line, which know where they were written.
        problems: what would end it, or make it another run than was meant; one line each.
        notes: what may be meant.
        facts: what it would do, by topic.
        stored: bytes its checkpoints will take.
    """

    run: Run
    tree: Settings
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    stored: int = 0

    def problem(self, path: KeyPath, text: str) -> None:
        self.problems.append(self.located(path, text))

    def note(self, path: KeyPath, text: str) -> None:
        self.notes.append(self.located(path, text))

    def located(self, path: KeyPath, text: str) -> str:
        if any(text.startswith(f"{where}: ") for where in {self.run.name, *self.tree.origins.values()}):
            return text
        return f"{self.tree.origin(path) or self.run.name}: {text}"


def bytes_of(number: float) -> str:
    """A number of bytes in words, in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} {units[0]}" if number >= 100 or units[0] == "B" else f"{number:.1f} {units[0]}"
