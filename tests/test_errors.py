"""Mistakes in settings: one readable line each, which names the key, the place and the nearest valid name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy import TOY

from lit_gen.errors import nearest

Command = Callable[..., int]
MAX_STEPS = "trainer:\n  max_steps: 1"
TOY_MODEL = "model:\n  class_path: toy.Regression\n"

# name: (what replaces what in toy.yaml, extra words of the command line, what the line must say)
MISTAKES: dict[str, tuple[tuple[str, str], list[str], list[str]]] = {
    "misspelt top-level key": (("trainer:", "trainr:"), [], ["toy.yaml:2", "`trainr`", "`trainer`"]),
    "empty misspelt section": (("seed_everything: 7", "optimiser: {}"), [], ["toy.yaml:1", "`optimiser`"]),
    "misspelt trainer key": (("log_every_n_steps", "log_evry_n_steps"), [], ["toy.yaml:4", "`log_every_n_steps`"]),
    "misspelt model argument": (
        ("toy.Regression", "toy.Regression\n  init_args: {widht: 3}"),
        [],
        ["toy.yaml:9", "`model.init_args.widht`", "`width`"],
    ),
    "misspelt nested argument": (
        ("toy.Regression", "toy.Regression\n  init_args: {sgd: {lrr: 3}}"),
        [],
        ["toy.yaml:9", "`model.init_args.sgd.lrr`", "`lr`"],
    ),
    "misspelt callback argument": (
        ("accelerator: cpu", "callbacks: [{class_path: lit_gen.callbacks.ema.EMA, init_args: {deca: 0.9}}]"),
        [],
        ["toy.yaml:3", "`deca`", "`decay`"],
    ),
    "misspelt data argument": (
        ("toy.Numbers", "toy.Numbers\n  init_args: {batch_siz: 3}"),
        [],
        ["toy.yaml:11", "`batch_size`"],
    ),
    "argument beside init_args": (
        ("toy.Regression", "toy.Regression\n  width: 3"),
        [],
        ["toy.yaml:9", "`model.width`", "init_args"],
    ),
    "misspelt init_args": (("toy.Regression", "toy.Regression\n  init_arg: {}"), [], ["toy.yaml:9", "`init_args`"]),
    "word for a number": (
        ("log_every_n_steps: 1", "max_epochs: ten"),
        [],
        ["toy.yaml:4", "`trainer.max_epochs`", "'ten'"],
    ),
    "list for a number": (
        ("toy.Regression", "toy.Regression\n  init_args: {width: [3]}"),
        [],
        ["toy.yaml:9", "`model.init_args.width`", "a whole number"],
    ),
    "word for a nested number": (
        ("toy.Regression", "toy.Regression\n  init_args: {sgd: {lr: fast}}"),
        [],
        ["toy.yaml:9", "`model.init_args.sgd.lr`", "a number", "'fast'"],
    ),
    "number for a section": (
        ("checkpoint:\n  every_n_steps: 2", "checkpoint: 3"),
        [],
        ["toy.yaml:11", "`checkpoint`", "mapping"],
    ),
    "no such precision": (("accelerator: cpu", "precision: bf17"), [], ["toy.yaml:3", "'bf16'", "'bf17'"]),
    "no such class": (("toy.Regression", "toy.Regresion"), [], ["toy.yaml:8", "`Regression`"]),
    "no such module": (
        ("toy.Regression", "lit_gen.methods.bse.Method"),
        [],
        ["toy.yaml:8", "`lit_gen.methods`", "`base`"],
    ),
    "no such package": (("toy.Regression", "lit_gn.methods.base.Method"), [], ["toy.yaml:8", "`lit_gen`"]),
    "no such callback": (("accelerator: cpu", "callbacks: [{class_path: EarlyStoping}]"), [], ["`EarlyStopping`"]),
    "class of the wrong kind": (("toy.Regression", "toy.Numbers"), [], ["toy.yaml:8", "not a LightningModule"]),
    "no model": ((TOY_MODEL, ""), [], ["`model:`"]),
    "missing argument": (
        ("accelerator: cpu", "callbacks: [{class_path: EarlyStopping}]"),
        [],
        ["toy.yaml:3", "`monitor`", "EarlyStopping"],
    ),
    "not YAML": (("seed_everything: 7", "seed_everything: [7"), [], ["toy.yaml:", "not valid YAML"]),
    "key written twice": (
        ("seed_everything: 7", "seed_everything: 7\nseed_everything: 8"),
        [],
        ["toy.yaml:2", "twice"],
    ),
    "missing base file": (("seed_everything: 7", "base: [toi.yaml]"), [], ["toy.yaml:1", "toi.yaml", "`toy.yaml`"]),
    "missing experiment": (("7", "7"), ["-c", "toi.yaml"], ["toi.yaml", "`toy.yaml`"]),
    "missing checkpoint": (
        ("seed_everything: 7", "init_from: runs/other/last.ckpt"),
        [],
        ["toy.yaml:1", "runs/other/last.ckpt"],
    ),
    "missing file": (
        ("toy.Regression", "toy.Regression\n  init_args: {reads: no/such.txt}"),
        [],
        ["toy.yaml:9", "no/such.txt"],
    ),
    "missing data set": (
        ("toy.Numbers", "lit_gen.data.module.Images\n  init_args: {train: data/imges.yaml}"),
        [],
        ["toy.yaml:11", "data/imges.yaml"],
    ),
    "missing shard": (
        ("toy.Numbers", "lit_gen.data.module.Images\n  init_args: {train: 'shards/{000000..000002}.tar'}"),
        [],
        ["toy.yaml:11", "00000"],
    ),
    "no samples in a batch": (
        ("toy.Numbers", "lit_gen.data.module.Images\n  init_args: {batch_size: 0}"),
        [],
        ["toy.yaml:11", "`batch_size`", "not 0"],
    ),
    "less than no workers": (
        ("toy.Numbers", "lit_gen.data.module.Images\n  init_args: {workers: -1}"),
        [],
        ["toy.yaml:11", "`workers`", "not -1"],
    ),
    "pictures without pixels": (
        ("toy.Numbers", "lit_gen.data.module.Images\n  init_args: {size: 0}"),
        [],
        ["toy.yaml:11", "`size`", "not 0"],
    ),
    "no such unit of time": (("accelerator: cpu", "max_time: {hour: 1}"), [], ["max_time", "'hour'", "hours"]),
    "nothing between saves": (("every_n_steps: 2", "every_n_steps: 0"), [], ["`checkpoint.every_n_steps`", "not 0"]),
    "nothing between validations": (("interval: 4", "interval: 0"), [], ["toy.yaml:5", "`trainer.val_check_interval`"]),
    "no such number of devices": (("7", "7"), ["--trainer.accelerator=cpu", "--trainer.devices=two"], ["devices"]),
    "no such unknown": (("interval: 4", "interval: ${vars.of}"), ["--vars.off", "4"], ["toy.yaml:5", "`off`"]),
    "impossible time": (("accelerator: cpu", "max_time: soon"), [], ["max_time", "`soon`", "HH:MM:SS"]),
    "run folder set by hand": (("accelerator: cpu", "default_root_dir: x"), [], ["toy.yaml:3", "`run_root`"]),
    "unknown interpolation": (("log_every_n_steps: 1", "max_steps: ${vars.step}"), [], ["vars.step"]),
    "misspelt override": (("7", "7"), ["--trainer.max_step", "3"], ["--trainer.max_step", "`max_steps`"]),
    "misspelt deep override": (("7", "7"), ["--model.sgd.lrr=3"], ["--model.sgd.lrr", "`lr`"]),
    "override of the wrong type": (("7", "7"), ["--trainer.max_steps", "3x"], ["--trainer.max_steps", "'3x'"]),
    "override without dashes": (("7", "7"), ["trainer.max_steps", "3"], ["`trainer.max_steps`", "--key"]),
    "unknown stage": (("7", "7"), ["--stage", "two"], ["no such stage", "no stages"]),
    "unknown stage override": (("7", "7"), ["--stages.two.seed_everything", "3"], ["stage `two`"]),
    "Lightning's own objection": (("accelerator: cpu", "accelerator: tpuu"), [], ["tpuu"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_says_what_is_wrong(
    name: str, lit_gen: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old, new), words, expected = MISTAKES[name]
    assert old in TOY
    (here / "toy.yaml").write_text(TOY.replace(old, new, 1))
    assert lit_gen("fit", "-c", "toy.yaml", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for part in expected:
        assert part in error, error


def test_several_mistakes_are_listed_together(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = toy.with_name("over.yaml")
    over.write_text("trainer: {max_epoch: 3}\nmodel:\n  init_args: {widht: 3}\nstages:\n  two:\n    traner: {}\n")
    assert lit_gen("fit", "-c", "toy.yaml", "-c", "over.yaml", "--data.batchez", "3") == 2
    lines = capsys.readouterr().err.splitlines()
    for part in ("over.yaml:1", "over.yaml:3", "over.yaml:6", "--data.batchez"):
        assert sum(part in line for line in lines) == 1, lines
    assert len(lines) == 4
    assert not Path("runs/toy/one/checkpoints").exists()  # a mistake in stage two shows before stage one is run


def test_what_is_right_is_let_through(lit_gen: Command, toy: Path) -> None:
    words = ["--trainer.callbacks+=lit_gen.callbacks.ema.EMA", "--trainer.callbacks.decay=0.5", "--trainer.max_steps=1"]
    words += [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=train/loss",
        "--model",
        "toy.Regression",
    ]
    assert lit_gen("fit", "-c", "toy.yaml", *words) == 0
    config = Path("runs/toy/two/config.yaml").read_text()
    assert "decay: 0.5" in config and "monitor: train/loss" in config


def test_bugs_keep_their_traceback(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, batch: object, batch_idx: int) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("toy.Regression.training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        lit_gen("fit", "-c", "toy.yaml")


def test_nearest() -> None:
    assert nearest("max_step", ["max_steps", "max_epochs"]) == ", did you mean `max_steps`?"
    assert nearest("MODEL", ["model"]) == ", did you mean `model`?"
    assert nearest("zebra", ["max_steps"]) == ""
