"""The pair of processes that this folder's tests look at the results of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def trainings(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Folder and results of both ranks of every case of `zero_ranks.py`."""
    ranks = pytest.importorskip("zero_ranks", reason="needs DeepSpeed and a POSIX system")
    folder = tmp_path_factory.mktemp("pair")
    return folder, ranks.run_pair(tiny_base, folder, list(ranks.CASES))
