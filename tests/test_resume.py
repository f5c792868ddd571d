"""Exact resume: killed at any instant and started again, a run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data.shard_sets import image_set
from forks import ROOT, Forks, over, until
from ranks import RANKS, trained_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_experiments import RUN
from toy import TOY, TWO_STAGES

SHORT = {  # six steps, epochs of four, a checkpoint every second and a validation every third
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 3,
    "checkpoint.every_n_steps": 2,
    "checkpoint.keep": 9,
}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


def words(file: Path | str, name: str, **settings: Any) -> list[str]:
    given = {**SHORT, **{key.replace("__", "."): value for key, value in settings.items()}, "experiment": name}
    return ["-c", str(file), *(f"--{key}={value}" for key, value in given.items())]


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.rglob("step-*.ckpt"))


def curves(stage: Path) -> dict[str, list[tuple[int, float | bytes]]]:
    """Figures and pictures by name, (step, value) as TensorBoard shows them; none about time."""
    events = EventAccumulator(str(stage), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "epoch" and not tag.startswith("speed/")]
    figures = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in events.Tags()["images"]}
    return figures | pictures


# Times, and Lightning's count of validation batches in this epoch, which decides nothing.
IRRELEVANT = ("seconds", "epoch_loop.val_loop.batch_progress")


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal in every bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in IRRELEVANT:
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b or a != a, where


def compare(straight: Path, killed: Path) -> None:
    """Every checkpoint, every figure of every step and the results of two runs."""
    stages = sorted(done.parent.relative_to(straight) for done in straight.rglob("DONE"))
    assert stages and all((killed / stage / "DONE").is_file() for stage in stages)
    for stage in stages:
        expected, found = curves(straight / stage), curves(killed / stage)
        for tag, points in found.items():
            assert len({step for step, _ in points}) == len(points), f"{stage}: two values at a step of {tag}"
        assert found == expected and any(tag.startswith("train") for tag in found)
        names = [path.name for path in checkpoints(straight / stage)]
        assert names == [path.name for path in checkpoints(killed / stage)]
        for name in names:
            one, other = (torch.load(r / stage / "checkpoints" / name, weights_only=True) for r in (straight, killed))
            same(one, other, f"{stage}/{name}")
        results = [json.loads((run / stage / "metrics.json").read_text()) for run in (straight, killed)]
        same(*results, f"{stage}/metrics.json")


def train_straight(forks: Forks, folder: Path, argv: list[str], verb: str = "smoke") -> float:
    """Seconds from the first checkpoint to the end."""
    assert forks.run([verb, *argv], folder) == 0, logs(folder)
    run = run_of(folder, argv, verb)
    first = min(path.stat().st_mtime for path in checkpoints(run))
    return max(path.stat().st_mtime for path in run.rglob("DONE")) - first


def run_of(folder: Path, argv: list[str], verb: str = "smoke") -> Path:
    name = argv[-1].partition("=")[2]
    return folder / "runs" / ("smoke" if verb == "smoke" else "") / name


def kill_and_continue(forks: Forks, folder: Path, argv: list[str], delays: list[float], verb: str = "smoke") -> None:
    """Kill the command so many seconds after its next checkpoint, once for each delay, and let it end."""
    run = run_of(folder, argv, verb)
    for delay in delays:
        before = len(checkpoints(run))
        process = forks.start([verb, *argv], folder)
        until(lambda: len(checkpoints(run)) > before or over(process))  # noqa: B023
        time.sleep(delay)
        forks.kill(process)
        forks.wait(process)
    assert forks.run([verb, *argv], folder) == 0, logs(folder)


def logs(folder: Path) -> str:
    return max(folder.glob("log-*")).read_text()[-3000:]


# A measurement of experiments/bench/ is of a method that is here under another name, and keeps no checkpoints.
@pytest.mark.parametrize("file", [file for file in RUN if file.parts[1] != "bench"], ids=str)
def test_killed_at_a_random_instant(file: Path, forks: Forks, universe: Path) -> None:
    name = "-".join(file.with_suffix("").parts[1:])
    # DDP objects to parameters that a method trains without using them.
    given = {"trainer__max_steps": 5, "trainer__devices": 1, "trainer__strategy__class_path": "lit_gen.scale.ddp.DDP"}
    straight, killed = (words(file, f"{name}/{which}", **given) for which in ("straight", "killed"))
    seconds = train_straight(forks, universe, straight)
    instant = random.Random(str(file)).random() * seconds
    kill_and_continue(forks, universe, killed, [instant])
    compare(run_of(universe, straight), run_of(universe, killed))
    assert "not resumable" not in logs(universe)  # as Lightning says of loaders that do not know where they were


EMA_AND_WORKERS = """\
trainer:
  callbacks+: [{class_path: lit_gen.callbacks.ema.EMA, init_args: {decay: 0.9}}]
smoke:
  trainer: {accumulate_grad_batches: 2}
  stages:
    adapter: {data: {init_args: {workers: 2}}}
    temporal: {data: {init_args: {images: {init_args: {workers: 1}}, videos: {init_args: {workers: 2}}}}}
"""


def test_workers_accumulation_and_averages(forks: Forks, universe: Path) -> None:
    (universe / "workers.yaml").write_text(EMA_AND_WORKERS)
    none = EMA_AND_WORKERS.replace("workers: 2", "workers: 0").replace("workers: 1", "workers: 0")
    (universe / "none.yaml").write_text(none)
    settings = {"checkpoint.every_n_steps": 1, "trainer.max_steps": 4}  # a step is two batches, an epoch two steps
    straight, killed = (
        ["-c", "experiments/stylecrafter.yaml", *words(file, f"more/{name}", **settings)]
        for file, name in (("none.yaml", "straight"), ("workers.yaml", "killed"))
    )
    seconds = train_straight(forks, universe, straight)
    chance = random.Random(2)
    kill_and_continue(forks, universe, killed, [chance.random() * seconds / 2 for _ in range(2)])
    compare(run_of(universe, straight), run_of(universe, killed))


@pytest.fixture(scope="module")
def toy_straight(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """An uninterrupted run of two stages, saved after every step."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.yaml").write_text(TOY + TWO_STAGES)
    argv = words("toy.yaml", "straight", checkpoint__every_n_steps=1)
    train_straight(forks, folder, argv, "fit")
    return run_of(folder, argv, "fit")


def test_many_kills(forks: Forks, toy: Path, toy_straight: Path) -> None:
    chance = random.Random(1)
    argv = words("toy.yaml", "killed", checkpoint__every_n_steps=1)
    argv.insert(2, "--model.pause=0.05")
    kill_and_continue(forks, toy.parent, argv, [chance.random() * 0.2 for _ in range(6)], "fit")
    compare(toy_straight, toy.parent / "runs/killed")


@pytest.mark.parametrize(
    "instant",
    ["torch.save", "lit_gen.callbacks.checkpoint.checksums", "os.symlink", "lit_gen.callbacks.checkpoint._flush"],
)
def test_killed_while_saving(instant: str, forks: Forks, toy: Path, toy_straight: Path) -> None:
    argv = words("toy.yaml", "killed", checkpoint__every_n_steps=1)
    for call in (2, 1):
        assert forks.run(["fit", *argv], toy.parent, die=[instant, call]) == -9
    assert forks.run(["fit", *argv], toy.parent) == 0
    compare(toy_straight, toy.parent / "runs/killed")
    assert not list(Path("runs").rglob("*.unfinished"))


def test_killed_after_the_last_step(forks: Forks, toy: Path) -> None:
    # 5 is not a step at which training validates, so the end is measured apart.
    straight, killed = (words("toy.yaml", name, trainer__max_steps=5) for name in ("straight", "killed"))
    train_straight(forks, toy.parent, straight, "fit")
    for _ in range(2):
        die = ["lit_gen.stage.Command._measure_the_end", 1]
        assert forks.run(["fit", *killed], toy.parent, die=die) == -9
    assert forks.run(["fit", *killed], toy.parent) == 0
    compare(toy.parent / "runs/straight", toy.parent / "runs/killed")


def test_killed_while_validating(forks: Forks, toy: Path, toy_straight: Path) -> None:
    argv = words("toy.yaml", "killed", checkpoint__every_n_steps=1)
    for call in (6, 1):  # in the midst of the first validation, and again in its repetition
        assert forks.run(["fit", *argv], toy.parent, die=["toy.Regression.validation_step", call]) == -9
    assert len(checkpoints(toy.parent / "runs/killed")) == 3
    assert forks.run(["fit", *argv], toy.parent) == 0
    compare(toy_straight, toy.parent / "runs/killed")


# -- other numbers of ranks -------------------------------------------------------------------------------------------


def start_ranks(forks: Forks, folder: Path, argv: list[str], world: int, **how: Any) -> list[int]:
    """What `srun` and `torchrun` do: one process for each rank."""
    if world == 1:
        return [forks.start(["fit", *argv], folder, **how)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*argv, f"--trainer.devices={world}", "--trainer.strategy.class_path=lit_gen.scale.ddp.DDP"]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return [
        forks.start(["fit", *argv], folder, env={**shared, "LOCAL_RANK": str(rank), "RANK": str(rank)}, **how)
        for rank in range(world)
    ]


@pytest.fixture
def numbers(here: Path) -> Path:
    """`ranks.yaml`, an experiment on 24 pictures, in an empty working directory."""
    image_set(here / "numbers", (7, 5, 8, 4))
    (here / "ranks.yaml").write_text(RANKS)
    return here


@pytest.mark.parametrize(("before", "after", "steps"), [(1, 2, 6), (2, 1, 4), (1, 2, 5), (2, 1, 6)])
def test_another_number_of_ranks(before: int, after: int, steps: int, forks: Forks, numbers: Path) -> None:
    die = ["lit_gen.callbacks.checkpoint._flush", steps]  # once that many steps are safe
    first, *others = start_ranks(forks, numbers, ["-c", "ranks.yaml"], before, die=die)
    assert forks.wait(first) == -9
    for process in others:
        forks.kill(process)
        forks.wait(process)
    codes = [forks.wait(process) for process in start_ranks(forks, numbers, ["-c", "ranks.yaml"], after)]
    run = numbers / "runs/ranks"
    assert codes == [0] * after, logs(numbers)
    seen = trained_on(run, [(0, before), (steps, after)])
    everything = {f"{i:06d}" for i in range(24)}
    assert len(seen) >= 48 and set(seen[:24]) == everything == set(seen[24:48])
    assert len(seen) < 48 + 2 * after  # nothing more than what fills the last batch
    weights = [torch.load(path, weights_only=True) for path in run.glob("weights-*")]
    assert len(weights) == after
    same(weights[0], weights[-1])
    found = curves(run)
    assert [step for step, _ in found["train/loss"]] == list(range(len(found["train/loss"])))
    assert len(found["val/error"]) == 2


def front_door(folder: Path, *argv: str) -> subprocess.Popen:
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return subprocess.Popen(
        [sys.executable, "-m", "lit_gen", "fit", "-c", "ranks.yaml", *argv],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_ranks_through_the_front_door(numbers: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.pause=0.2"]
    run = numbers / "runs/ranks"
    process = front_door(numbers, *two)
    try:
        until(lambda: len(checkpoints(run)) > 2 or process.poll() is not None)
        pids = [int((run / f"pid-{rank}").read_text()) for rank in (0, 1)]
        os.kill(pids[1], signal.SIGKILL)
        told, _ = process.communicate(timeout=60)  # the first rank does not wait for the second
    finally:
        process.kill()
    assert process.returncode not in (0, 75) and "the same command continues it" in told and "Traceback" not in told
    assert told.count("parameters are trained") == 1
    until(lambda: all(over(pid) for pid in pids), 10)

    process = front_door(numbers, *two[:2])
    told, _ = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert told.count("continuing at step") == 1 and told.count("validated at step 12") == 1
    everything = {f"{i:06d}" for i in range(24)}
    seen = trained_on(run, [(0, 2)])
    assert len(seen) == 48 and set(seen[:24]) == everything == set(seen[24:])
    weights = [torch.load(path, weights_only=True) for path in sorted(run.glob("weights-*"))]
    assert len(weights) == 2
    same(*weights)
    found = curves(run)
    assert [step for step, _ in found["train/loss"]] == list(range(12)) and len(found["val/error"]) == 2
