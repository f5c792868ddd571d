"""The pair of processes that this folder's tests look at the results of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
FILES = [p.relative_to(ROOT) for p in sorted((ROOT / "experiments").rglob("*.yaml"))]
# Overlays are tried over experiments, and benchmarks are too large for this.
EXPERIMENTS = [
    f"{file} under {s}" for file in FILES if file.parts[1] not in ("scale", "bench") for s in ("ddp", "zero")
]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def trainings(tiny_base: Path, universe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """Folder and results of both ranks of every case of `ranks.py` and of every experiment."""
    ranks = pytest.importorskip("ranks", reason="needs DeepSpeed and a POSIX system")
    folder = tmp_path_factory.mktemp("pair")
    return folder, ranks.run_pair(tiny_base, folder, [*ranks.CASES, *EXPERIMENTS], universe)


@pytest.fixture(params=EXPERIMENTS)
def experiment_pair(request: pytest.FixtureRequest, trainings: tuple[Path, Results]) -> list[dict[str, Any]]:
    """Results of both ranks of two steps of an experiment."""
    return trainings[1][request.param]
