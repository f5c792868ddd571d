"""`bench -c`: the window is the steps it says, the table says what was measured, and a bare loop does the same work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DeepSpeedStrategy
from toy import Numbers, Regression

from lit_gen import bench, cli, interrupts
from lit_gen.bench import compare, table
from lit_gen.errors import UserError
from lit_gen.measure import BareLoop, _forget_exports
from lit_gen.stage import Binding

Command = Callable[..., int]
ROOT = Path(__file__).parents[1]
SHORT = ("--warmup", "2", "--steps", "3", "--rounds", "2")


def rows(folder: str = "runs/bench/toy") -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "bench.json").read_text())["rows"]


def test_arms_and_stages_are_measured(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ("--arm", "slow: --model.pause 0.05", "--arm", "quick: --model.pause 0.01 --data.batch_size 8")
    assert lit_gen("bench", "-c", "toy.yaml", *SHORT, *arms) == 0
    out = capsys.readouterr().out
    found = rows()
    assert [(row["arm"], row["stage"]) for row in found] == [
        ("slow", "one"), ("slow", "two"), ("quick", "one"), ("quick", "two"),
    ]  # fmt: skip
    slow, quick = found[0], found[2]
    assert slow["steps"] == 6 and slow["devices"] == 1 and slow["trained_parameters"] == 6
    assert (slow["samples_per_step_per_device"], quick["samples_per_step_per_device"]) == (4, 8)
    assert slow["ms_per_step_p10"] <= slow["ms_per_step"] <= slow["ms_per_step_p90"] and slow["ms_per_step"] >= 50
    assert 1 < slow["samples_per_second"] <= 4 / 0.05
    ratio = quick["samples_per_second"] / slow["samples_per_second"]
    assert ratio > 1.5 and quick["efficiency_percent"] == pytest.approx(100 * ratio, abs=0.1)
    assert slow["machine"]["cores"] == os.cpu_count() and slow["versions"]["torch"] == torch.__version__
    # a table for people, on the screen and on the disk, without columns that say nothing
    written = Path("runs/bench/toy/bench.md").read_text()
    assert table(found) in out and table(found) in written and "| slow one | 1 | 32-true | 4 |" in written
    assert "--arm 'slow: --model.pause 0.05'" in written and "MFU" not in written and "fit costs" not in written
    # nothing else stays
    assert [p.name for p in Path("runs").iterdir()] == ["bench"]


class Dawdling(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.06)


def test_what_fit_costs_over_a_bare_loop(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.write_text(toy.read_text() + "speed: {peak_tflops: 1.0e-6}\n")
    argv = ("--stage", "one", "--bare", "--model.pause", "0.03", "--trainer.callbacks", '["test_bench.Dawdling"]')
    assert lit_gen("bench", "-c", "toy.yaml", *SHORT, *argv) == 0
    (row,) = rows()
    assert row["ms_per_step"] >= 90 and row["bare_ms_per_step"] >= 30
    assert 50 < row["overhead_percent_min"] <= row["overhead_percent"] <= row["overhead_percent_max"]
    assert (
        row["mfu_percent"] == pytest.approx(100 * row["tflops_per_device"] / 1e-6, rel=0.01) and row["mfu_percent"] > 0
    )
    assert "| MFU | bare loop | fit costs |" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "-c", "toy.yaml", "--stage", "one", *SHORT, "--arm", "a:", "--arm", "b: --model.pause 0.01"]
    assert lit_gen(*argv, "--task", "1/2") == 0  # the other task is still to come
    (second,) = rows()
    assert second["arm"] == "b" and lit_gen(*argv, "--task", "0/2") == 0
    first, again = rows()
    assert (first["arm"], again["ms_per_step"]) == ("a", second["ms_per_step"])
    assert again["efficiency_percent"] < 100 == second["efficiency_percent"]
    capsys.readouterr()
    assert lit_gen(*argv, "--continue") == 0 and rows() == [first, again]
    assert capsys.readouterr().out.count("measured before") == 2
    assert lit_gen(*argv[:-1], "b: --model.pause 0.03", "--continue") == 0  # not the same measurement
    assert rows()[0] == first and rows()[1]["ms_per_step"] >= 30
    assert lit_gen(*argv) == 0 and rows()[0]["ms_per_step"] != first["ms_per_step"]  # without the word, anew


def test_a_baseline_that_was_faster_is_an_exit_status(lit_gen: Command, toy: Path) -> None:
    argv = ("bench", "-c", "toy.yaml", "--stage", "one", *SHORT, "--model.pause", "0.03")
    assert lit_gen(*argv, "--out", "before") == 0
    stored = json.loads(Path("before/bench.json").read_text())
    assert lit_gen(*argv, "--baseline", "before/bench.json", "--tolerance", "0.9") == 0
    stored["rows"][0]["samples_per_second_per_device"] *= 10
    Path("before/bench.json").write_text(json.dumps(stored))
    assert lit_gen(*argv, "--baseline", "before/bench.json", "--tolerance", "0.5") == 1


def test_a_comparison_says_what_else_changed(capsys: pytest.CaptureFixture[str]) -> None:
    old = {
        "arm": "fit", "stage": "", "devices": 1, "precision": "32-true", "samples_per_step_per_device": 4,
        "samples_per_second_per_device": 100.0, "machine": {"device": "A"}, "versions": {"torch": "2.6"},
    }  # fmt: skip
    new = old | {"samples_per_second_per_device": 90.0, "machine": {"device": "B"}}
    assert compare([new], [old], 0.05) and not compare([new], [old], 0.15) and not compare([old], [new], 0.0)
    assert "fit: -10.0 % against the baseline, slower than tolerated (device A -> B)" in capsys.readouterr().out
    assert not compare([old | {"arm": "other"}], [old], 0.0)
    assert "other: not in the baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "bench needs an experiment, -c FILE, or one of: "),
        (["-c", "toy.yaml", "--arm", "two"], 'write it as "NAME: --key value …"'),
        (["-c", "toy.yaml", "--arm", "a:", "--arm", "a:"], "there is another arm of this name"),
        (["-c", "toy.yaml", "--arm", "a b:", "--arm", "a-b:"], "there is another arm of this name"),
        (["-c", "toy.yaml", "--arm", "a: 'b"], "No closing quotation"),
        (["-c", "toy.yaml", "--arm", "a: --stage one"], "--stage has no place in an arm"),
        (["-c", "toy.yaml", "--arm", "a: --model.widht 3"], "did you mean `width`?"),
        (["-c", "toy.yaml", "--steps", "many"], "--steps needs a number, not 'many'"),
        (["-c", "toy.yaml", "--rounds", "0"], "--rounds must be at least 1"),
        (["-c", "toy.yaml", "--task", "2/2"], "--task 2/2: a task is I/N"),
        (["-c", "toy.yaml", "--smoke"], "bench has no option --smoke"),
        (["-c", "toy.yaml", "--baseline", "none.json"], "--baseline none.json: no such file"),
        (["-c", "toy.yaml", "--baseline", "toy.yaml"], "toy.yaml: not a bench.json"),
        (
            ["-c", "toy.yaml", "--bare", "--trainer.accumulate_grad_batches", "2"],
            "accumulate_grad_batches is more than",
        ),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], said: str, lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lit_gen("bench", *argv, *(SHORT[:2] if argv else ())) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_an_arm_that_fails_keeps_the_others(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a child process tells its mistake itself
    monkeypatch.setattr(cli, "launch", lambda words: cli.main(["stage", *words]))
    monkeypatch.setattr(interrupts, "die_with_parent", lambda: None)
    arms = ("--arm", "bad: --model.reads none.txt", "--arm", "good:")
    assert lit_gen("bench", "-c", "toy.yaml", "--stage", "one", *SHORT, *arms) == 2
    captured = capsys.readouterr()
    assert "none.txt" in captured.err and "| good one |" in captured.out
    assert [row["arm"] for row in rows()] == ["good"]


def test_the_bare_loop_does_the_work_of_the_trainer(here: Path) -> None:
    weights = []
    for bare in (0, 5):
        torch.manual_seed(0)
        module, data = Regression(), Numbers()
        callback = L.Callback()
        if bare:  # no step of the trainer's, five of the loop
            callback.on_train_start = lambda trainer, module: BareLoop(trainer, module).run(5)  # type: ignore[method-assign]
            callback.on_train_batch_start = lambda trainer, *_: setattr(trainer, "should_stop", True) or -1  # type: ignore[method-assign]
            module.on_train_batch_start = lambda *_: -1  # type: ignore[method-assign]
        L.Trainer(
            accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, callbacks=[callback], max_epochs=1 if bare else -1,
        ).fit(module, data)  # fmt: skip
        weights.append(module.net.weight)
    assert torch.equal(*weights) and not hasattr(module, "_log")
    assert module.log.__name__ == "log"  # the module's own again


def test_the_bare_loop_refuses_what_it_cannot_do() -> None:
    strategy = object.__new__(DeepSpeedStrategy)  # a subclass of DDP's
    trainer: Any = SimpleNamespace(
        strategy=strategy, accumulate_grad_batches=1, precision="32-true", precision_plugin=None
    )
    with pytest.raises(UserError, match="one backward and one step, but DeepSpeedStrategy has a way of its own"):
        BareLoop(trainer, Regression())


def test_a_measured_model_is_not_exported() -> None:
    settings = Namespace(fit=Namespace(model=Namespace(init_args=Namespace(export="data/base", base="data/base"))))
    _forget_exports(settings)
    assert settings.fit.model.init_args.export is None and settings.fit.model.init_args.base == "data/base"


def test_two_processes(toy: Path) -> None:
    toy.write_text(toy.read_text().split("stages:")[0])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    arm = "two: --trainer.devices 2 --trainer.strategy.class_path lit_gen.scale.ddp.DDP --bare"
    command = [sys.executable, "-m", "lit_gen", "bench", "-c", "toy.yaml", *SHORT, "--arm", arm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = rows()
    assert row["devices"] == 2 and row["strategy"] == "DDP" and row["stage"] == ""
    assert row["samples_per_second"] == pytest.approx(2 * row["samples_per_second_per_device"], rel=1e-3)
    assert done.stdout.count("| two | 2 |") == 1


SHRUNK = (
    "--model.compile", "null", "--model.network.widths", "[16,32]", "--model.network.layers", "1",
    "--model.network.heads", "2", "--model.network.text_width", "16", "--model.network.latent_size", "8",
    "--data.shapes", "{latents: [4, 8, 8], text_states: [8, 16]}", "--data.batch_size", "2",
)  # fmt: skip


def test_stable_diffusion_shrunk(lit_gen: Command, here: Path) -> None:
    assert lit_gen("bench", "-c", ROOT / "experiments/bench/sd15.yaml", *SHRUNK, *SHORT, "--bare") == 0
    (row,) = rows("runs/bench/sd15")
    assert row["precision"] == "bf16-mixed" and row["samples_per_step_per_device"] == 2
    assert row["data_wait_percent"] == 0 and row["tflops_per_device"] > 0 and row["overhead_percent"] is not None


def test_the_commands_in_the_experiments_bind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bound = []
    for file in sorted(Path("experiments/bench").glob("*.yaml")):
        text = file.read_text().replace("\\\n#", "")
        words: dict[str, str] = {}  # of the shell

        def told(line: str, words: dict[str, str] = words) -> str:
            return re.sub(r"\$(\w+)", lambda found: words[found[1]], line)

        for name, value in re.findall(r'^# +(\w+)="(.*)"$', text, re.MULTILINE):
            words[name] = told(value)
        for line in map(told, re.findall(r"python -m lit_gen bench (.*)", text)):
            files, _, overrides = cli.parse([word for word in shlex.split(line) if word != "--bare"])
            options, arms, overrides = bench._options(overrides, flags={"bare": False, "trace": False})
            plan = bench._plan(files, overrides, arms, None, options, str(here / str(len(bound))))
            length = options.warmup + options.steps * options.rounds
            bound += [(Binding("fit", [part.run]).bound[0].fit.trainer, length) for part in plan]
    counts = {len(d) if isinstance(d, list) else int(d) for d in (trainer.devices for trainer, _ in bound)}
    assert counts == {1, 2}
    assert all(trainer.max_steps == length and trainer.limit_val_batches == 0 for trainer, length in bound)


def test_a_slip_in_the_last_arm_shows_before_the_first_is_measured(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("--arm", "a:", "--arm", "b: --model.widht 3")
    assert lit_gen("bench", "-c", "toy.yaml", "--stage", "one", *SHORT, *arms) == 2
    told = capsys.readouterr()
    assert "did you mean `width`?" in told.err and "bench: a" not in told.out and not Path("runs/bench").exists()
