"""`export`: what a run trained, as files that need nothing of this project."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_gen.weights import read_checkpoint

Command = Callable[..., int]


def test_weights_of_the_last_stage_or_a_named_one(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_gen("export", "-c", "toy.yaml") == 2
    assert "run `fit` first" in capsys.readouterr().err
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    assert lit_gen("export", "-c", "toy.yaml") == 0
    assert lit_gen("export", "-c", "toy.yaml", "--stage", "one", "--out", "here") == 0
    assert Path("here/weights.safetensors").stat().st_mode == Path("here/export.json").stat().st_mode
    assert lit_gen("export", "-c", "toy.yaml", "--ouput", "there") == 2  # before anything is written
    assert "ouput" in capsys.readouterr().err and not Path("there").exists()
    for stage, folder in (("two", Path("runs/toy/two/export")), ("one", Path("here"))):
        saved = read_checkpoint(f"runs/toy/{stage}/checkpoints/last.ckpt")["state_dict"]
        weights = load_file(folder / "weights.safetensors")
        assert weights.keys() == saved.keys() and all(torch.equal(weights[n], w) for n, w in saved.items())
        about = json.loads((folder / "export.json").read_text())
        assert about["run"] == f"toy/{stage}" and about["step"] == {"one": 8, "two": 6}[stage]
        assert about["parameters"] == 6 and about["averaged"] == [] and "torch" in about["versions"]
    assert lit_gen("export", "-c", "toy.yaml", "--format", "safetensor") == 2
    assert "did you mean" in capsys.readouterr().err


def test_averaged_weights_where_the_run_averaged(lit_gen: Command, toy: Path) -> None:
    average = "trainer: {callbacks: [{class_path: lit_gen.callbacks.ema.EMA, init_args: {decay: 0.9}}]}\n"
    (toy.parent / "average.yaml").write_text(average)
    files = ("-c", "toy.yaml", "-c", "average.yaml", "--experiment", "toy")
    assert lit_gen("fit", *files, "--stage", "one") == 0
    assert lit_gen("export", *files, "--stage", "one") == 0
    saved = read_checkpoint("runs/toy/one/checkpoints/last.ckpt")
    weights = load_file("runs/toy/one/export/weights.safetensors")
    assert torch.equal(weights["net.weight"], saved["ema"]["net.weight"])
    assert not torch.equal(weights["net.weight"], saved["state_dict"]["net.weight"])


def test_a_method_writes_its_own_layout(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy as toys

    def export(self: toys.Regression, folder: Path) -> None:
        (folder / "matrix.txt").write_text(str(self.net.weight.tolist()))

    monkeypatch.setattr(toys.Regression, "export", export, raising=False)
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert lit_gen("export", "-c", "toy.yaml", "--stage", "one", "--model.width", "2") == 0
    saved = read_checkpoint("runs/toy/one/checkpoints/last.ckpt")["state_dict"]["net.weight"]
    assert Path("runs/toy/one/export/matrix.txt").read_text() == str(saved.tolist())


def test_one_file_of_a_checkpoint_continues(lit_gen: Command, toy: Path) -> None:
    first = ["-c", "toy.yaml", "--stage", "one"]
    assert lit_gen("fit", *first, "--trainer.max_steps", "4") == 0
    assert lit_gen("export", *first, "--format", "checkpoint", "--out", "there") == 0
    assert lit_gen("fit", *first, "--experiment", "b", "--ckpt_path", "there/checkpoint.ckpt") == 0
    assert lit_gen("fit", *first) == 0
    a, b = (read_checkpoint(f"runs/{run}/one/checkpoints/last.ckpt")["state_dict"] for run in ("toy", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [p for p in Path("there").iterdir() if p.name.startswith(".")] and os.listdir("there")
