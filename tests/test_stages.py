"""Stages: order, inheritance of weights, resuming, skipping, run folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from toy import TOY

from lit_gen import interrupts
from lit_gen.callbacks.checkpoint import is_whole, newest
from lit_gen.files import alone_in

Command = Callable[..., int]
ROOT = Path(__file__).parents[1]


def weights(run: str) -> torch.Tensor:
    return torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]["net.weight"]


def trace(run: str) -> list[str]:
    return Path(f"runs/{run}/trace").read_text().split()


def metrics(run: str) -> dict:
    return json.loads(Path(f"runs/{run}/metrics.json").read_text())


def test_stages_run_in_order_from_the_weights_before(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    one, two = metrics("toy/one"), metrics("toy/two")
    assert (one["step"], one["samples"], two["step"]) == (8, 32, 6)
    assert [entry["step"] for entry in one["history"]] == [4, 8]
    assert [entry["step"] for entry in two["history"]] == [4, 6]  # the last weights are always measured
    assert one["before"]["val/error"] > one["validate"]["val/error"]
    first = torch.load("runs/toy/two/checkpoints/step-00000004.ckpt", weights_only=True)
    assert first["global_step"] == 4
    # Stage two began where stage one ended: one step of two's loss is what one's final weights give.
    assert trace("toy/two")[0] == "0:0"
    assert not torch.equal(weights("toy/one"), weights("toy/two"))
    assert (weights("toy/one") - weights("toy/two")).abs().max() < 0.2


def test_run_folder_tells_where_it_came_from(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "two", "--init_from", "null") == 0
    folder = Path("runs/toy/two")
    names = {"config.yaml", "provenance.json", "metrics.json", "DONE", "samples", "checkpoints"}
    assert names <= {p.name for p in folder.iterdir()} and list(folder.glob("events*"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["sgd"]["lr"] == 0.02 and config["trainer"]["max_steps"] == 6
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["argv"][:2] == ["-c", "toy.yaml"] and "torch" in provenance["versions"]
    assert not Path("runs/toy/one").exists()
    # The resolved settings are a command's settings again, for the same run folder.
    assert lit_gen("validate", "-c", str(folder / "config.yaml")) == 0
    assert lit_gen("fit", "-c", str(folder / "config.yaml")) == 0
    assert not Path("runs/config").exists() and len(trace("toy/two")) == 6


def test_finished_stages_are_skipped(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    assert capsys.readouterr().out.count("finished already, skipped") == 2
    assert before == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    # harmless settings do not make a finished stage another one
    assert lit_gen("fit", "-c", "toy.yaml", "--trainer.log_every_n_steps", "5") == 0


def test_changed_settings_of_a_finished_stage_are_refused(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--model.sgd.lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "sgd.lr" in error and "--fresh" in error and error.count("\n") == 1
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--model.sgd.lr", "0.5", "--fresh") == 0
    assert Path("runs/toy/one.old1/DONE").is_file() and Path("runs/toy/one/DONE").is_file()


def test_fresh_with_a_slip_moves_nothing(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--fresh", "--model.widht", "3") == 2
    assert Path("runs/toy/one/DONE").is_file() and not Path("runs/toy/one.old1").exists()


def test_more_steps_continue_a_finished_stage(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--trainer.max_steps", "11") == 0
    assert trace("toy/one") == [f"{i}:{i}" for i in range(11)]
    continued = weights("toy/one")
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--trainer.max_steps", "11", "--experiment", "b") == 0
    assert torch.equal(continued, weights("b/one"))


def test_more_epochs_continue_a_finished_run(lit_gen: Command, toy: Path) -> None:
    toy.write_text(toy.read_text().split("stages:")[0])  # a run without stages; an epoch has 5 steps
    assert lit_gen("fit", "-c", "toy.yaml", "--trainer.max_epochs", "2") == 0
    assert lit_gen("fit", "-c", "toy.yaml", "--trainer.max_epochs", "3") == 0
    assert trace("toy") == [f"{i}:{i}" for i in range(15)]
    assert [entry["step"] for entry in metrics("toy")["history"]] == [4, 8, 10, 12, 15]
    continued = weights("toy")
    assert lit_gen("fit", "-c", "toy.yaml", "--trainer.max_epochs", "3", "--experiment", "b") == 0
    assert torch.equal(continued, weights("b"))


def test_a_seed_on_the_command_line_has_its_own_folder(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--seed_everything", "3") == 0
    assert Path("runs/toy-seed3/one/DONE").is_file() and not Path("runs/toy").exists()


def test_overrides_reach_all_stages_or_one(lit_gen: Command, toy: Path) -> None:
    argv = ["--model.sgd.lr", "0.3", "--stages.two.trainer.max_steps=2", "--stages.two.model.sgd.lr", "0.4"]
    assert lit_gen("fit", "-c", "toy.yaml", *argv) == 0
    one, two = (yaml.safe_load(Path(f"runs/toy/{s}/config.yaml").read_text()) for s in ("one", "two"))
    assert one["model"]["init_args"]["sgd"]["lr"] == 0.3 and one["trainer"]["max_steps"] == 8
    assert two["model"]["init_args"]["sgd"]["lr"] == 0.4 and two["trainer"]["max_steps"] == 2


def test_a_run_in_training_can_be_tested(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("toy").Regression.training_step
    one = ["-c", "toy.yaml", "--stage", "one"]

    def step(self, batch, batch_idx):  # noqa: ANN001, ANN202
        if self.global_step == 5:
            words = [sys.executable, "-m", "lit_gen", "test", *one]
            paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return real(self, batch, batch_idx)

    monkeypatch.setattr("toy.Regression.training_step", step)
    assert lit_gen("fit", *one) == 0
    figures = json.loads(Path("runs/toy/one/metrics.json").read_text())
    assert figures["test"]["val/error"] > 0 and figures["step"] == 8 and len(figures["history"]) == 2


def test_the_time_limit_pauses_and_the_next_command_continues(lit_gen: Command, toy: Path) -> None:
    one = ["fit", "-c", "toy.yaml", "--stage", "one", "--model.pause", "0.3"]
    assert lit_gen(*one, "--trainer.max_time", "00:00:02") == 0
    assert Path("runs/toy/one/checkpoints/last.ckpt").exists() and not Path("runs/toy/one/DONE").exists()
    assert 1 <= len(trace("toy/one")) < 8
    # No second stage after the first one's time is up.
    toy.with_name("none.yaml").write_text("vars: {none: '00:00:00'}\ntrainer: {max_time: '${vars.none}'}\n")
    words = ["-c", "none.yaml", "--experiment", "toy", "--model.pause", "0.3"]
    assert lit_gen("fit", "-c", "toy.yaml", *words) == 0
    assert not Path("runs/toy/two/trace").exists()
    assert lit_gen(*one) == 0
    assert trace("toy/one") == [f"{i}:{i}" for i in range(8)]
    assert lit_gen(*one, "--experiment", "straight") == 0
    assert torch.equal(weights("toy/one"), weights("straight/one"))


def test_a_signal_pauses_at_a_step_border(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "received", None)
    real = __import__("toy").Regression.training_step

    def step(self, batch, batch_idx):  # noqa: ANN001, ANN202
        if self.global_step == 4:
            interrupts._remember(signal.SIGTERM, None)
        return real(self, batch, batch_idx)

    monkeypatch.setattr("toy.Regression.training_step", step)
    assert lit_gen("fit", "-c", "toy.yaml") == interrupts.PAUSED
    assert (
        len(trace("toy/one")) == 5 and not Path("runs/toy/one/DONE").exists() and not Path("runs/toy/two/DONE").exists()
    )
    interrupts.received = None
    monkeypatch.setattr("toy.Regression.training_step", real)
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    assert trace("toy/one") == [f"{i}:{i}" for i in range(8)]


def test_a_run_killed_in_its_last_validation_measures_the_end(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    whole = metrics("toy/one")
    Path("runs/toy/one/DONE").unlink()
    kept = {**whole, "history": whole["history"][:-1]}
    Path("runs/toy/one/metrics.json").write_text(json.dumps(kept))
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert metrics("toy/one")["history"] == whole["history"] and len(trace("toy/one")) == 8


def test_a_damaged_checkpoint_is_passed_over(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--trainer.max_steps", "5") == 0
    last = Path("runs/toy/one/checkpoints/last.ckpt")
    assert last.resolve().name == "step-00000005.ckpt"
    content = bytearray(last.read_bytes())
    last.write_bytes(content[: len(content) // 2])
    assert not is_whole(last) and newest(last.parent) == last.with_name("step-00000004.ckpt")
    content[len(content) // 2] ^= 255
    last.write_bytes(content)
    assert not is_whole(last)
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    warning = next(line for line in capsys.readouterr().out.splitlines() if "damaged" in line)
    assert "step-00000005.ckpt" in warning and "continuing from" in warning and "step-00000004.ckpt" in warning
    assert trace("toy/one")[-4:] == ["4:4", "5:5", "6:6", "7:7"]


def test_the_other_verbs_use_the_last_stage(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("test", "-c", "toy.yaml") == 2
    assert "run `fit` first" in capsys.readouterr().err
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    trained = metrics("toy/two")
    assert lit_gen("validate", "-c", "toy.yaml") == 0
    assert lit_gen("test", "-c", "toy.yaml") == 0
    measured = metrics("toy/two")
    assert measured["validate"] == trained["validate"] and measured["test"] == trained["validate"]
    assert measured["step"] == 6 and measured["history"] == trained["history"]
    assert lit_gen("predict", "-c", "toy.yaml", "--prompt", "a red ball", "--prompt", "3") == 0
    assert Path("runs/toy/two/predicted").read_text() == "a red ball|3"


def test_a_signal_during_the_imports_is_remembered(toy: Path) -> None:
    argv = [sys.executable, "-m", "lit_gen", "fit", "-c", "toy.yaml", "--model.pause", "0.2"]
    process = subprocess.Popen(argv, env=environment())
    try:
        while not Path("runs/toy/one/.fit.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)  # until the child is there, which then imports for seconds; before it nothing would be trained
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == interrupts.PAUSED
    finally:
        process.kill()
    assert len(trace("toy/one")) == 1 and is_whole(Path("runs/toy/one/checkpoints/last.ckpt"))
    assert not Path("runs/toy/one/DONE").exists()


def run_until(argv: list[str], reached: Callable[[], bool]) -> None:
    """Start a command and kill -9 it, alone, once `reached`."""
    process = subprocess.Popen([sys.executable, "-m", "lit_gen", *argv], env=environment())
    try:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_kill_9_in_either_stage(lit_gen: Command, toy: Path) -> None:
    argv = ["fit", "-c", "toy.yaml", "--model.pause", "0.15"]

    def steps(stage: str) -> int:
        return len(trace(f"toy/{stage}")) if Path(f"runs/toy/{stage}/trace").exists() else 0

    run_until(argv, lambda: steps("one") >= 5)
    assert not Path("runs/toy/one/DONE").exists()
    run_until(argv, lambda: steps("two") >= 3)
    assert Path("runs/toy/one/DONE").exists() and not Path("runs/toy/two/DONE").exists()
    first = trace("toy/one")
    # Steps since the last save were made twice, none was left out, and not all were made again.
    assert sorted(set(first), key=first.index) == [f"{i}:{i}" for i in range(8)] and first.count("0:0") == 1
    time.sleep(1)
    count = steps("two")
    time.sleep(1)
    assert steps("two") == count  # the child died with the command

    assert lit_gen(*argv) == 0
    assert trace("toy/one") == first and trace("toy/two").count("0:0") == 1
    assert lit_gen(*argv, "--experiment", "straight") == 0
    assert torch.equal(weights("toy/two"), weights("straight/two"))


def test_matrix_products_are_as_precise_as_asked_for(lit_gen: Command, here: Path) -> None:
    (here / "x.yaml").write_text(TOY)
    for words, precision in ((["--matmul_precision", "high"], "high"), ([], "highest")):
        assert lit_gen("fit", "-c", "x.yaml", "--fresh", "--trainer.max_steps", "2", *words) == 0
        assert torch.get_float32_matmul_precision() == precision


def test_other_verbs_and_later_stages_pass_a_damaged_checkpoint_over(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    last = Path("runs/toy/one/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    last.write_bytes(content)
    capsys.readouterr()
    for words in (["test", "-c", "toy.yaml", "--stage", "one"], ["fit", "-c", "toy.yaml"]):
        assert lit_gen(*words) == 0
        told = capsys.readouterr().out
        assert "step-00000008.ckpt: damaged" in told and "step-00000006.ckpt" in told
    given = last.resolve()
    for words in (["test", "-c", "toy.yaml"], ["fit", "-c", "toy.yaml", "--stage", "one", "--experiment", "other"]):
        assert lit_gen(*words, "--ckpt_path", str(given)) == 2
        assert f"{given}: damaged" in capsys.readouterr().err


def test_the_last_checkpoint_is_found_without_its_link(lit_gen: Command, toy: Path) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    Path("runs/toy/one/checkpoints/last.ckpt").unlink()
    assert lit_gen("test", "-c", "toy.yaml", "--stage", "one") == 0
    assert lit_gen("fit", "-c", "toy.yaml") == 0


@pytest.mark.parametrize("words", [["--fresh"], ["--smoke"]])
def test_a_run_in_training_is_neither_moved_nor_removed(
    words: list[str], lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    folder = Path("runs/smoke/toy/one" if words == ["--smoke"] else "runs/toy/one")
    with alone_in(folder):
        assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", *words) == 2
        assert f"{folder}: another process is using this run folder" in capsys.readouterr().err
        assert [path.name for path in folder.parent.iterdir()] == ["one"] and (folder / ".lock").exists()
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", *words) == 0


def test_what_was_refused_is_not_what_was_trained(
    lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--trainer.max_steps", "4") == 0
    Path("runs/toy/one/DONE").unlink()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with alone_in(Path("runs/toy/one")):
        assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--model.sgd.lr", "0.5") == 2
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--model.sgd.lr", "abc") == 2
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert "changed settings (trainer.max_steps: 4 -> 8)" in capsys.readouterr().out


def test_finished_stages_can_be_moved(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    Path("runs").rename("elsewhere")
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml", "--run_root", "elsewhere") == 0
    assert "nothing left to do" in capsys.readouterr().out


def test_a_stage_older_than_the_one_before_is_named(lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture) -> None:
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one", "--fresh") == 0
    capsys.readouterr()
    assert lit_gen("fit", "-c", "toy.yaml") == 0
    assert "toy/two: finished, but before toy/one was" in capsys.readouterr().out


@pytest.mark.parametrize("record", ["{}", "[]", "3"])
def test_a_record_of_another_version_is_taken_for_absent(
    record: str, lit_gen: Command, toy: Path, capsys: pytest.CaptureFixture
) -> None:
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    Path("runs/toy/one/fit.json").write_text(record)
    assert lit_gen("test", "-c", "toy.yaml", "--stage", "one") == 0
    assert "fit.json: not a record of this version" in capsys.readouterr().err
