"""Every attack would leave a canary, a file in the working directory, if it succeeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from security.evil import CANARY


@pytest.fixture(autouse=True)
def nothing_ran(here: Path) -> Iterator[None]:
    """The test's working directory, and the proof at its end."""
    yield
    assert not (here / CANARY).exists()


@pytest.fixture
def refused(lit_gen: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("fit", ...)`: the one line with which a command ends."""

    def run(*words: str | Path) -> str:
        assert lit_gen(*words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run
