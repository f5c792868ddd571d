"""Pausing, as a scheduler or Ctrl-C asks for it: exit statuses, step borders, and what several tasks of one job do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gen import cli, interrupts
from lit_gen.data.split import Paused, locked

Command = Callable[..., int]
ROOT = Path(__file__).parents[2]


def batches(run: str) -> list[str]:
    return Path(f"runs/{run}/trace").read_text().split()


def python(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", f"import os, signal, sys, time\nfrom lit_gen import interrupts\n{code}"]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)


def at_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have something happen in the middle of a training step."""
    from toy import Regression

    real = Regression.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch["key"][0] == str(number):
            act()
        return real(self, batch, batch_idx)

    monkeypatch.setattr("toy.Regression.training_step", step)


@pytest.mark.parametrize("signum", interrupts.PAUSING)
def test_a_pause_waits_for_the_optimizer_and_heeds_no_minimum(
    lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    words = ["fit", "-c", "toy.yaml", "--stage", "one", "--trainer.accumulate_grad_batches", "3"]
    words += ["--trainer.min_steps", "6", "--model.sgd.lr", "0.1", "--data.batches", "50"]
    with monkeypatch.context() as patch:
        at_batch(patch, 6, lambda: interrupts._remember(signum, None))
        assert lit_gen(*words) == 75
    assert batches("toy/one") == [f"{i // 3}:{i}" for i in range(9)]
    interrupts.received = None
    assert lit_gen(*words) == 0 and lit_gen(*words, "--experiment", "straight") == 0
    assert batches("toy/one") == batches("straight/one") == [f"{i // 3}:{i}" for i in range(24)]
    one, other = (
        torch.load(f"runs/{name}/one/checkpoints/last.ckpt", weights_only=True)["state_dict"]["net.weight"]
        for name in ("toy", "straight")
    )
    assert torch.equal(one, other)


def test_a_pause_while_data_is_built(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_data(self: Any) -> None:
        raise Paused

    with monkeypatch.context() as patch:
        patch.setattr("toy.Numbers.prepare_data", prepare_data)
        assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 75
    assert not Path("runs/toy/one/trace").exists()
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0 and len(batches("toy/one")) == 8


def test_a_pause_while_another_task_builds(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(here / "lock"):  # what another task holds, perhaps for hours
        threading.Timer(0.5, lambda: interrupts._remember(signal.SIGUSR1, None)).start()
        monkeypatch.setattr(interrupts, "received", None)
        with pytest.raises(Paused), locked(here / "lock"):
            pass


def test_lightning_keeps_its_hands_off_signals(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(signum) for signum in interrupts.PAUSING]
    seen = []
    at_batch(monkeypatch, 1, lambda: seen.append([signal.getsignal(signum) for signum in interrupts.PAUSING]))
    assert lit_gen("fit", "-c", "toy.yaml", "--stage", "one") == 0
    assert seen[0] == before


def test_only_training_goes_on_after_a_signal(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(Exception):
        pass

    def leave() -> None:
        raise Left

    assert lit_gen("fit", "-c", "toy.yaml") == 0
    monkeypatch.setattr(interrupts, "leave_at_once", leave)
    assert lit_gen("fit", "-c", "toy.yaml", "--stages.two.trainer.max_steps", "7") == 0
    for words in (("validate", "-c", "toy.yaml"), ("check", "-c", "toy.yaml"), ("world", "sheet")):
        with pytest.raises(Left):
            lit_gen(*words)


def test_leaving_at_once_tells_that_there_is_more_to_do() -> None:
    told = python(
        "interrupts.install(); interrupts.leave_at_once(); os.kill(os.getpid(), signal.SIGUSR1); time.sleep(9)"
    )
    assert (told.returncode, told.stderr) == (75, "stopped by SIGUSR1\n")
    told = python("interrupts.install(); os.kill(os.getpid(), signal.SIGTERM); interrupts.leave_at_once()")
    assert (told.returncode, told.stderr) == (75, "stopped by SIGTERM\n")  # it came before, during the imports


def test_neither_a_signal_nor_a_thread_at_the_very_end_changes_the_exit_status() -> None:
    code = """
import atexit, threading
import torch
import lit_gen.__main__ as front, lit_gen.cli

def work():
    a = torch.eye(500)
    while True:
        a = a @ a

threading.Thread(target=work, daemon=True).start()
interrupts.leave_at_once()
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
lit_gen.cli.main = lambda: print("said") or 3
front.main()
"""
    told = python(code)
    assert (told.returncode, told.stdout, told.stderr) == (3, "said\n", "")


def test_a_signal_before_the_child_reaches_the_child() -> None:
    child = (
        "import time\nfrom lit_gen import interrupts\ninterrupts.install()\ntime.sleep(2)\nprint(interrupts.received)"
    )
    code = "interrupts.install(); os.kill(os.getpid(), signal.SIGUSR1)\n"
    told = python(f"{code}raise SystemExit(interrupts.call([sys.executable, '-c', {child!r}]))")
    assert (told.returncode, told.stdout) == (0, f"{signal.SIGUSR1!s}\n")


@pytest.mark.parametrize(("tasks", "launched"), [(1, 0), (2, 1)])
def test_several_tasks_agree_within_a_stage_not_before_it(
    lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch, tasks: int, launched: int
) -> None:
    stages: list[list[str]] = []
    monkeypatch.setattr(cli, "launch", lambda words: stages.append(words) or interrupts.PAUSED)
    monkeypatch.setattr(interrupts, "received", signal.SIGUSR1)
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert lit_gen("fit", "-c", "toy.yaml") == 75
    assert len(stages) == launched  # the other task may be in the stage already, waiting for this one


def test_tasks_of_a_job_have_a_smoke_folder_of_their_own_and_one_voice(
    lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "launch", lambda words: interrupts.PAUSED)
    for name, value in (("NTASKS", "2"), ("JOB_ID", "7"), ("PROCID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert lit_gen("fit", "-c", "toy.yaml", "--smoke") == 75
    assert [p.name for p in Path("runs/smoke").iterdir()] == ["toy-job7"]
    assert capsys.readouterr().out.count("paused") == 1
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert lit_gen("fit", "-c", "toy.yaml", "--smoke") == 75
    assert capsys.readouterr().out == ""


def test_a_requeued_job_does_not_start_over(lit_gen: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "-c", "toy.yaml", "--stage", "one", "--fresh"]
    with monkeypatch.context() as patch:
        at_batch(patch, 3, lambda: interrupts._remember(signal.SIGUSR1, None))
        assert lit_gen(*words) == 75
    interrupts.received = None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # with the words it was submitted with
    assert lit_gen(*words) == 0
    assert batches("toy/one") == [f"{i}:{i}" for i in range(8)] and not Path("runs/toy/one.old1").exists()


def test_ctrl_c_saves_and_a_second_one_stops_at_once(toy: Path, lit_gen: Command) -> None:
    words = ["fit", "-c", "toy.yaml", "--stage", "one", "--checkpoint.every_n_steps", "100"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}

    def start(seconds_a_step: float) -> subprocess.Popen[str]:
        there = len(batches("toy/one")) if Path("runs/toy/one/trace").exists() else 0
        command = [sys.executable, "-m", "lit_gen", *words, "--model.pause", str(seconds_a_step)]
        running = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell starts with &
        )
        while running.poll() is None and (not Path("runs/toy/one/trace").exists() or len(batches("toy/one")) == there):
            time.sleep(0.05)
        time.sleep(0.5)  # well into the next step
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does, to the command and its child
        return running

    running = start(1)
    told, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "as soon as all is saved" in told and "paused; the same command" in told, told
    assert "Traceback" not in told, told
    stopped_after = len(batches("toy/one"))
    assert 0 < stopped_after < 8

    running = start(5)
    time.sleep(0.5)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    told, _ = running.communicate(timeout=20)
    assert running.returncode == 130 and "interrupted; the same command" in told, told
    assert "Traceback" not in told, told

    Path("runs/toy/one/trace").unlink()
    assert lit_gen(*words) == 0
    assert batches("toy/one") == [f"{i}:{i}" for i in range(stopped_after, 8)]
