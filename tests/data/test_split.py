"""Work cut into tasks: which part is whose, tasks of several processes at once, and what is left when they die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from shard_sets import picture

from lit_gen import interrupts
from lit_gen.data import pack as packing
from lit_gen.data.build import build
from lit_gen.data.command import main
from lit_gen.data.module import Images
from lit_gen.data.shards import ShardSet
from lit_gen.data.split import Paused, locked, own_devices
from lit_gen.errors import ShardError, UserError
from lit_gen.task import Task

ROOT = Path(__file__).parents[2]
SET = dict(kind="images", recipe="photo", split="train", count=30, seed=5, size=32, samples_per_shard=3)


def job(**variables):
    return {f"SLURM_{name}": str(value) for name, value in variables.items()}


def array(number, count, first=0, step=1, **more):
    last = first + step * (count - 1)
    given = dict(ID=first + step * number, COUNT=count, MIN=first, MAX=last, STEP=step)
    return job(**{f"ARRAY_TASK_{name}": value for name, value in given.items()}, **more)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        (array(2, 4), (2, 4)),
        (array(2, 4, first=5, step=10), (2, 4)),  # --array=5-35:10
        (array(0, 1, first=7), (0, 1)),  # a lost task, submitted alone: it does what is missing
        (job(NTASKS=4, PROCID=0), (0, 1)),  # the batch script of four tasks
        (job(NTASKS=4, STEP_NUM_TASKS=4, PROCID=3), (3, 4)),
        (array(1, 2, STEP_NUM_TASKS=4, PROCID=3), (7, 8)),
        ({"SLURM_ARRAY_TASK_COUNT": ""}, (0, 1)),
    ],
)
def test_a_process_finds_its_part_of_a_slurm_job(environment, expected):
    task = Task.of_job(environment)
    assert (task.number, task.count) == expected


def test_every_process_of_an_array_has_a_part_of_its_own():
    found = [Task.of_job(array(a, 3, 1, 2, STEP_NUM_TASKS=2, PROCID=p)) for a in range(3) for p in range(2)]
    assert sorted(t.number for t in found) == list(range(6)) and {t.count for t in found} == {6}


def test_an_array_with_gaps_must_say_its_part(monkeypatch):
    gaps = job(ARRAY_TASK_ID=7, ARRAY_TASK_COUNT=3, ARRAY_TASK_MIN=1, ARRAY_TASK_MAX=7, ARRAY_TASK_STEP=1)
    with pytest.raises(UserError, match="with gaps; .* --task"):
        Task.of_job(gaps)
    for name, value in gaps.items():
        monkeypatch.setenv(name, value)
    assert Task.parse("7/64") == Task(7, 64)
    for wrong in ("4/4", "1", "-1/4", "a/b", "1/0"):
        with pytest.raises(UserError, match="a task is I/N"):
            Task.parse(wrong)


def test_processes_of_one_node_share_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_devices(None, 8, {}) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert own_devices("cpu", 3, {}) == ["cpu"] * 3 and own_devices("cuda:2", 1, {}) == ["cuda:2"]
    shared = [own_devices(None, 1, job(STEP_TASKS_PER_NODE="2(x3)", LOCALID=i)) for i in range(2)]
    assert shared == [["cuda:0", "cuda:2"], ["cuda:1", "cuda:3"]]
    bound = job(STEP_TASKS_PER_NODE="2", LOCALID=1, GPUS_PER_TASK=4)
    assert len(own_devices(None, 1, bound)) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_devices(None, 2, {}) == ["cpu"] * 2
    with pytest.raises(UserError, match="sees no GPU"):
        own_devices("cuda", 1, {})


def set_file(folder: Path, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(SET | changes))
    return file


def sums(folder: Path) -> list[str]:
    return [s.sha256 for s in ShardSet.open(folder).shards]


def start(number: int, count: int, file: Path, **environment: str) -> subprocess.Popen:
    words = ["data", "-c", str(file), "--workers", "1", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "lit_gen", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **array(number, count), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_array_of_processes_builds_the_bytes_of_one_although_one_is_killed(tmp_path):
    (tmp_path / "alone").mkdir()
    expected = sums(build(set_file(tmp_path / "alone", count=150), workers=1, device="cpu"))
    file, building = set_file(tmp_path, count=150), tmp_path / "shards"
    tasks = [start(i, 2, file) for i in range(2)]
    victim = tasks[0]
    deadline = time.monotonic() + 120
    while len(list(building.glob(".*.building/*.done"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    for task in tasks:
        out, _ = task.communicate()
    assert not (building / "tiny").exists() and "still to come" in out
    # Those that are recorded: the kill may fall between a shard and its record.
    finished = [record.with_suffix(".tar") for record in building.glob(".*.building/*.done")]
    before = {f.name: f.stat().st_mtime_ns for f in finished}
    assert 25 <= len(before) < 50  # the other one's half, and what the killed one had finished
    again = [start(0, 2, file), start(0, 2, file)]  # submitted twice, by mistake
    for task in again:
        out, err = task.communicate()
        assert task.returncode == 0, err
    assert sums(building / "tiny") == expected and "150 images samples in 50 shards" in out
    after = {f.name: f.stat().st_mtime_ns for f in (building / "tiny").glob("*.tar")}
    assert all(after[name] == written for name, written in before.items())
    assert {f.name for f in building.iterdir()} == {"tiny"}


def test_a_signal_ends_a_build_at_the_end_of_a_shard(tmp_path):
    file = set_file(tmp_path, count=3000, size=64)
    task = start(0, 1, file)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("shards/.*/*.done")) and time.monotonic() < deadline:
        time.sleep(0.02)
    task.send_signal(signal.SIGUSR1)
    _, err = task.communicate()
    assert task.returncode == interrupts.PAUSED and "paused" in err
    assert not list(tmp_path.glob("shards/.*/*.partial")) and not (tmp_path / "shards/tiny").exists()


def test_a_fit_that_is_asked_to_pause_while_it_builds_says_so(tmp_path, monkeypatch):
    data = Images(train=str(set_file(tmp_path)))
    monkeypatch.setattr(interrupts, "received", signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        data.prepare_data()
    assert stop.value.code == interrupts.PAUSED
    monkeypatch.setattr(interrupts, "received", None)
    data.prepare_data()
    assert len(ShardSet.open(tmp_path / "shards/tiny")) == 30


def test_tasks_and_one_that_has_all_the_work_do_not_meet(tmp_path):
    """Tasks work side by side; a fit that needs the set waits for them."""
    lock, entered = tmp_path / "lock", threading.Event()

    def enter(shared):
        with locked(lock, shared):
            entered.set()

    def other(shared):
        entered.clear()
        thread = threading.Thread(
            target=enter, args=(shared,)
        )  # the kernel asks who opened the file, not which process
        thread.start()
        return thread

    with locked(lock, shared=True):
        other(True).join(60)
        assert entered.is_set()
        waiting = other(False)
        assert not entered.wait(0.5)
    waiting.join(60)
    assert entered.is_set() and not lock.exists()


def test_force_is_not_for_tasks(tmp_path, capsys):
    assert main(["-c", str(set_file(tmp_path)), "--force", "--task", "0/2"]) == 2
    assert "--force by several tasks" in capsys.readouterr().err


# -- pack -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    for number in range(10):
        file = folder / f"{'sub/' * (number % 2)}{number}.png"
        Image.fromarray(picture(20 * number, 16)).save(file)
        file.with_suffix(".txt").write_text(f"picture {number}")
    return folder


def test_packing_by_tasks_is_packing(pictures, tmp_path, capsys):
    whole = packing.pack(pictures, tmp_path / "whole", samples_per_shard=3)
    words = ["pack", str(pictures), "--out", str(tmp_path / "parts"), "--samples-per-shard", "3", "--task"]
    for number in (2, 0):
        assert main([*words, f"{number}/3"]) == 0
    assert not (tmp_path / "parts").exists() and "1 of 4 shards are still to come" in capsys.readouterr().out
    (pictures / "late.jpg").write_bytes(b"not there when the work was divided")
    assert main([*words, "1/3"]) == 0 and main([*words, "0/3"]) == 0
    assert sums(tmp_path / "parts") == sums(whole)
    assert "10 images samples in 4 shards" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_packing_goes_on(pictures, tmp_path, monkeypatch):
    whole = packing.pack(pictures, tmp_path / "whole", samples_per_shard=3)
    real, read = packing._members, []

    def members(file, caption):
        read.append(file.name)
        if len(read) == 5:
            monkeypatch.setattr(interrupts, "received", signal.SIGTERM)
        return real(file, caption)

    monkeypatch.setattr(packing, "_members", members)
    with pytest.raises(Paused):
        packing.pack(pictures, tmp_path / "out", samples_per_shard=3)
    assert len(read) == 6
    monkeypatch.setattr(interrupts, "received", None)
    assert sums(packing.pack(pictures, tmp_path / "out", samples_per_shard=3)) == sums(whole) and len(read) == 10


def test_unreadable_files_are_counted_over_all_tasks(pictures, tmp_path):
    for name in ("0.png", "sub/9.png"):
        (pictures / name).write_bytes(b"no picture")

    def task(number, out, tolerance):
        return packing.pack(pictures, tmp_path / out, None, 4, tolerance, task=Task(number, 3))

    assert task(0, "strict", 0.1) is None and task(1, "strict", 0.1) is None
    with pytest.raises(ShardError, match="2 of 10 files cannot be read, the first is .*/0.png"):
        task(2, "strict", 0.1)
    for number in range(3):
        done = task(number, "lenient", 0.2)
    assert len(ShardSet.open(done)) == 8


def test_two_processes_pack_as_one(pictures, tmp_path):
    whole = packing.pack(pictures, tmp_path / "whole", samples_per_shard=3)
    assert sums(packing.pack(pictures, tmp_path / "out", samples_per_shard=3, workers=2)) == sums(whole)
