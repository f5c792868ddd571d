"""`check` on settings that cannot be used at all: every problem is a line, and none of them is a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_errors
from toy import TOY

Command = Callable[..., int]

SETTINGS = """\
vars: {{n: 3}}
trainer: {{accelerator: cpu, max_steps: 5{trainer}}}
model:
  class_path: toy.Regression
data:
  class_path: lit_gen.data.module.StyledImages
  init_args: {{train: small.yaml, val: {val}, batch_size: 4{data}}}
checkpoint: {{every_n_steps: {every}}}
"""
GOOD = {"trainer": "", "val": "small.yaml", "data": "", "every": "2"}

# what is changed, (a line, what is said of it)
SLIPS: list[tuple[dict[str, str], int, str]] = [
    ({"data": ", batch_siz: 3"}, 7, "`batch_size`"),
    ({"data": "}\n  init_arg: {x: 3"}, 8, "`init_args`"),
    ({"trainer": ", min_steps: ten"}, 2, "`trainer.min_steps` must be a whole number"),
    ({"trainer": ", min_steps: '${vars.n}', val_check_interval: '${vars.n}', max_epoch: 2"}, 2, "`max_epochs`"),
    ({"trainer": ", min_steps: '${vars.nn}'"}, 2, "vars.nn, which is not set, did you mean `n`?"),
    ({"trainer": ", accumulate_grad_batches: two"}, 2, "`trainer.accumulate_grad_batches` must be a whole number"),
    ({"trainer": ", num_nodes: two"}, 2, "`trainer.num_nodes` must be a whole number"),
    ({"trainer": "}\ncallbacks: {"}, 3, "`callbacks`"),
    ({"trainer": ", max_time: {hour: 1}"}, 2, "is not a time; its units are"),
    ({"trainer": ", devices: two"}, 2, "`trainer.devices` must be a number"),
    ({"trainer": ", val_check_interval: 0"}, 2, "`trainer.val_check_interval` must be at least 1, not 0"),
    ({"trainer": ", accumulate_grad_batches: 0"}, 2, "`trainer.accumulate_grad_batches` must be at least 1, not 0"),
    ({"trainer": ", val_check_interval: 1.5"}, 2, "invalid value 1.5"),
    ({"trainer": ", max_epochs: -3"}, 2, "trainer.max_epochs: `max_epochs` must be a non-negative integer"),
    ({"trainer": ", strategy: dp"}, 2, "`trainer.strategy`: there is no strategy `dp`, did you mean `ddp`?"),
    ({"trainer": ", strategy: lit_gen.scale.ddp.DDP"}, 2, "--trainer.strategy.class_path lit_gen.scale.ddp.DDP"),
    ({"trainer": ", strategy: FSDP"}, 2, "`trainer.strategy`: FSDP reads checkpoints in a way"),
    ({"trainer": ", strategy: single_device, devices: 2"}, 2, "single_device trains on one device"),
    ({"trainer": "}\nseed_everything: -5 #"}, 3, "`seed_everything` must be from 0 to 4294967295, not -5"),
    ({"data": ", size: 0"}, 7, "`size` must be at least 1, not 0"),
    ({"data": ", val_batch_size: 0"}, 7, "`val_batch_size` must be at least 1, not 0"),
    ({"data": ", workers: -1"}, 7, "`workers` must be at least 0, not -1"),
    ({"every": "0"}, 8, "`checkpoint.every_n_steps` must be at least 1, not 0"),
]


@pytest.fixture
def here_is_a_set(here: Path) -> Path:
    (here / "small.yaml").write_text("kind: style\nrecipe: styled\nsplit: train\ncount: 16\n")
    return here / "a.yaml"


@pytest.mark.parametrize(("change", "line", "said"), SLIPS, ids=lambda value: str(value)[:50])
def test_a_slip_is_told_beside_what_else_is_wrong(
    change: dict[str, str],
    line: int,
    said: str,
    here_is_a_set: Path,
    lit_gen: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here_is_a_set.write_text(SETTINGS.format(**GOOD | {"val": "smal.yaml"} | change))
    assert lit_gen("check", "-c", "a.yaml") == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert sum(f"error: a.yaml:{line}: " in text and said in text for text in lines) == 1, captured.err
    assert sum("did you mean `small.yaml`" in text or "small.yaml" in text for text in lines) == 1, captured.err
    assert len(lines) == 2 and "2 problems found" in captured.out, captured.err


def test_nothing_else_is_printed(here_is_a_set: Path) -> None:
    here_is_a_set.write_text(SETTINGS.format(**GOOD))
    tests = Path(test_errors.__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    words = [sys.executable, "-m", "lit_gen", "check", "-c", "a.yaml"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("a: Regression") and "GPU available" not in done.stdout, done.stdout


@pytest.mark.parametrize("change", [{"trainer": "3"}, {"data": "3"}, {"data.init_args": "3"}, {"batch_size": "0"}])
def test_a_number_in_the_place_of_a_section(
    change: dict[str, str], here_is_a_set: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    ((key, value),) = change.items()
    text = SETTINGS.format(**GOOD)
    old = {
        "trainer": "{accelerator: cpu, max_steps: 5}",
        "data": "\n  class_path: lit_gen.data.module.StyledImages\n"
        "  init_args: {train: small.yaml, val: small.yaml, batch_size: 4}",
        "data.init_args": "{train: small.yaml, val: small.yaml, batch_size: 4}",
        "batch_size": "4",
    }[key]
    assert old in text
    here_is_a_set.write_text(text.replace(f" {old}" if key != "data" else old, f" {value}", 1))
    assert lit_gen("check", "-c", "a.yaml") == 2
    captured = capsys.readouterr()
    assert f"`{key}` must" in captured.err and "1 problem found" in captured.out, captured.err


@pytest.mark.parametrize("name", test_errors.MISTAKES)
def test_what_fit_objects_to_check_objects_to(
    name: str, lit_gen: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old, new), words, expected = test_errors.MISTAKES[name]
    (here / "toy.yaml").write_text(TOY.replace(old, new, 1))
    assert lit_gen("check", "-c", "toy.yaml", *words) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert all(line.startswith("error: ") for line in lines), captured.err
    assert any(all(part in line for part in expected) for line in lines), captured.err


SWEEP = """\
sweep:
  seeds: [0, 1]
  over: {lr: [0.1, 0.2]}
  arms:
    narrow: {model: {init_args: {width: 1}}}
    wide: {model: {init_args: {widht: 4}}}
    late: {trainer: {max_steps: many}, model: {init_args: {sgd: {lr: "${vars.lr}"}}}}
    long: {trainer: {max_steps: -2}}
"""


def test_the_arms_of_a_sweep_are_checked(
    here_is_a_set: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SETTINGS.format(**GOOD)
    here_is_a_set.write_text(text + SWEEP)
    first = text.count("\n") + 1
    assert lit_gen("check", "-c", "a.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, lines
    assert sum(f"a.yaml:{first + 5}: `model.init_args.widht`" in line and "`width`" in line for line in lines) == 1
    assert sum(f"a.yaml:{first + 6}: `trainer.max_steps` must be a whole number" in line for line in lines) == 1
    assert sum(f"a.yaml:{first + 7}: trainer.max_steps: " in line for line in lines) == 1
    assert not Path("runs").exists()

    good = "".join(
        line for line in SWEEP.splitlines(keepends=True) if not line.strip().startswith(("wide", "la", "lo"))
    )
    here_is_a_set.write_text(text + good)
    assert lit_gen("check", "-c", "a.yaml") == 0
    assert "sweep   4 runs of 1 arm," in capsys.readouterr().out

    for old, new, said in (
        ("seeds", "seed", f"a.yaml:{first + 1}: there is no setting `sweep.seed`, did you mean `seeds`?"),
        ("[0, 1]", "2", f"a.yaml:{first + 1}: `seeds` is a list of numbers"),
        ("{model: {init_args: {width: 1}}}", "3", f"a.yaml:{first + 4}: `narrow` must be a mapping, not 3"),
        ("{model:", "{take: one, model:", f"a.yaml:{first + 4}: `take` must be a mapping, not 'one'"),
    ):
        here_is_a_set.write_text(text + good.replace(old, new, 1))
        assert lit_gen("check", "-c", "a.yaml") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}"), line


def test_all_that_is_out_of_range_is_told_at_once(
    here_is_a_set: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SETTINGS.format(
        **GOOD | {"data": ", size: 0, workers: '${vars.n}', val_batch_size: 0", "every": "0, keep: 0"}
    )
    here_is_a_set.write_text(text.replace("n: 3", "n: -3"))
    words = ("-c", "a.yaml", "--data.init_args.tolerance", "-1", "--data.init_args.batch_size=0")
    assert lit_gen("check", *words) == 2
    lines = sorted(capsys.readouterr().err.splitlines())
    told = ("--data.init_args.batch_size: `batch_size`", "--data.init_args.tolerance: `tolerance`")
    told += ("a.yaml:7: `size`", "a.yaml:7: `val_batch_size`", "a.yaml:7: `workers`")
    told += ("a.yaml:8: `checkpoint.every_n_steps`", "a.yaml:8: `checkpoint.keep`")
    assert [line[: len(f"error: {start}")] for line, start in zip(lines, told, strict=True)] == [
        f"error: {start}" for start in told
    ], lines
    assert lit_gen("fit", *words) == 2  # told by those who build it, so by one of them at a time
    assert capsys.readouterr().err.startswith("error: ")
