"""Every YAML in experiments/: its settings bind.

That its stages run is seen in `scale/test_every_experiment.py`, that they run on in `test_resume.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gen import experiment, sweep

Command = Callable[..., int]
ROOT = Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT) for p in (ROOT / "experiments").rglob("*.yaml"))
OVERLAYS = [p for p in FILES if p.parts[1] == "scale"]
EXPERIMENTS = [p for p in FILES if p not in OVERLAYS]
# Run as an experiment, an ablation is the one it is based on.
RUN = [p for p in EXPERIMENTS if not p.stem.endswith("_ablation")]


def companions(overlay: Path) -> list[Path]:
    """The experiments that the comments of an overlay name."""
    return [Path(p) for p in dict.fromkeys(re.findall(r"experiments/[\w/.-]+\.yaml", overlay.read_text()))]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=str)
def test_settings_bind(
    file: Path,
    lit_gen: Command,
    universe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lit_gen.stage import Binding

    monkeypatch.chdir(universe)
    Binding("fit", experiment.runs([str(file)], []))
    if file not in RUN:
        arms = {cell.series: cell.runs for cell in sweep.read([str(file)], write=False).cells}
        Binding("fit", [run for runs in arms.values() for run in runs])
    assert lit_gen("check", "-c", str(file), "--smoke") == 0  # small, since the sets of this universe are
    told = capsys.readouterr().out
    assert "its size was not found" not in told
    assert "RenderedWorld" in file.read_text() or "activations" in told and "without activations" not in told
    assert experiment.describe(file)


@pytest.mark.parametrize("file", OVERLAYS, ids=str)
def test_overlays_bind(file: Path, lit_gen: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_gen.stage import Binding

    monkeypatch.chdir(ROOT)
    over = [p for p in companions(file) if p not in OVERLAYS]
    assert over, f"{file}: say in a comment which experiment this goes over, as `-c experiments/NAME.yaml`"
    for other in over:  # what `check` says of files that are not here is not a mistake of the overlay
        Binding("fit", experiment.runs([str(other), str(file)], []))
