"""`check`: finds what `fit` would stumble over, and starts nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., int]

STYLED = """\
trainer: {{accelerator: cpu, max_steps: 5, val_check_interval: {interval}}}
model:
  class_path: toy.Regression
  init_args: {{reads: {reads}}}
data:
  class_path: lit_gen.data.module.StyledImages
  init_args: {{train: {train}, val: sets/small.yaml, batch_size: {batch_size}}}
stages:
  one: {{}}
  two:
    init_from: {init_from}
"""
GOOD = {
    "interval": "3",
    "reads": "sets/small.yaml",
    "train": "sets/small.yaml",
    "batch_size": "4",
    "init_from": "runs/a/one/checkpoints/last.ckpt",
}


@pytest.fixture
def sets(here: Path) -> Path:
    (here / "sets").mkdir()
    (here / "sets" / "small.yaml").write_text("kind: style\nrecipe: styled\nsplit: train\ncount: 16\n")
    (here / "sets" / "clips.yaml").write_text("kind: videos\nrecipe: motion\nsplit: train\ncount: 16\n")
    return here / "a.yaml"


def test_nothing_wrong(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write_text(STYLED.format(**GOOD))
    assert lit_gen("check", "-c", "a.yaml") == 0
    out = capsys.readouterr().out
    assert "a/one: Regression, sets/small.yaml (16 samples, to be built), 4 steps of 4 an epoch, not started" in out
    assert "0 problems" in out
    assert not Path("runs").exists() and not Path("sets/shards").exists()


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        ({"train": "sets/smal.yaml"}, 7, "sets/small.yaml"),
        ({"train": "sets/clips.yaml"}, 7, "videos"),
        ({"batch_size": "17"}, 7, "fewer than one step of 17"),
        ({"interval": "5"}, 1, "check_val_every_n_epoch"),
        ({"reads": "sets/none.txt"}, 4, "no `none.txt` in sets"),
        ({"init_from": "sets/last.ckpt"}, 11, "sets/last.ckpt"),
    ],
)
def test_a_problem_is_named_with_its_line(
    change: dict[str, str], line: int, said: str, sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    sets.write_text(STYLED.format(**GOOD | change))
    assert lit_gen("check", "-c", "a.yaml") == 2
    captured = capsys.readouterr()
    lines = [text for text in captured.err.splitlines() if said in text]
    assert lines and f"a.yaml:{line}: " in lines[0], captured.err


def test_misspelt_keys_of_every_stage(sets: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write_text(STYLED.format(**GOOD) + "    trainer: {max_stps: 3}\n  three: {model: {init_args: {widht: 3}}}\n")
    assert lit_gen("check", "-c", "a.yaml", "--trainer.max_epoch", "3") == 2
    err = capsys.readouterr().err
    for said in ("a.yaml:12", "a.yaml:13", "--trainer.max_epoch", "`max_steps`", "`width`", "`max_epochs`"):
        assert said in err
