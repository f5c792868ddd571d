"""Every experiment that is here trains under ZeRO; `test_resume.py` tries them under DDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_experiments import RUN

from lit_gen import experiment

deepspeed = pytest.importorskip("deepspeed")

Command = Callable[..., int]

ZERO = """\
trainer:
  accelerator: cpu
  devices: 1
  limit_val_batches: 0
  strategy: {class_path: zero_ranks.CPUZeRO, init_args: {bucket: 100000}}
"""


@pytest.mark.usefixtures("distributed")
@pytest.mark.parametrize("file", RUN, ids=str)
def test_two_steps_run(file: Path, lit_gen: Command, universe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # it would be compiled
    monkeypatch.chdir(universe)
    (universe / "zero.yaml").write_text(ZERO)
    words = ("-c", str(file), "-c", "zero.yaml", "--experiment", f"zero/{file.stem}")
    assert lit_gen("fit", *words, "--smoke") == 0
    for run in experiment.runs([str(file), "zero.yaml"], [("experiment", f"zero/{file.stem}")], smoke=True):
        assert run.done.is_file() and (run.last / "latest").is_file()
