"""The writing of a set cut by shard: over processes, GPUs, machines and the tasks of a SLURM array.

A set in the making is a hidden folder beside its place, where each finished shard has a record. Tasks may end and start
again in any order; the one that finds the last shard written puts the whole in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from lit_gen import interrupts
from lit_gen.data.shards import INDEX, Shard
from lit_gen.data.write import write_tar
from lit_gen.errors import UserError
from lit_gen.task import Task

# Number of a shard -> its samples, as `write_tar` takes them.
Samples = Callable[[int], Iterable[dict[str, str | bytes]]]


class Paused(Exception):
    """A signal asked to stop; what is written stays, and the same command continues."""


@dataclass
class Job:
    """A set to be written.

    Args:
        folder: where the set will be.
        key: twelve hex digits that tell what it is made from; the leavings of another key are not continued.
        title: for the progress bar.
        sizes: samples of each shard.
        start: (building folder, device) -> samples of each shard; called once in every process, so it must pickle.
        finish: (building folder, all shards) -> nothing; writes the index.
    """

    folder: Path
    key: str
    title: str
    sizes: list[int]
    start: Callable[[Path, str], Samples]
    finish: Callable[[Path, list[Shard]], Any]

    @property
    def building(self) -> Path:
        return building_folder(self.folder, self.key)

    def run(self, task: Task, devices: list[str], current: Callable[[], bool]) -> bool:
        """Write what is missing of a task's shards; whether the set is now whole and in its place.

        Args:
            devices: one process each; "cpu" may stand there several times.
            current: whether there is nothing to do, asked once nobody else is putting the set in its place.

        Raises:
            Paused: a signal came; shards that were begun are finished.
        """
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        # One that has all the work waits for others to end; tasks work side by side.
        with locked(lock, shared=task.count > 1):
            if current():
                return True
            self.building.mkdir(exist_ok=True)
            self._write(task, devices)
            if task.count == 1:
                return self._put_in_place()
        if missing := self.missing():
            print(
                f"{self.folder}: task {task.number}/{task.count} has written its part; {len(missing)} of "
                f"{len(self.sizes)} shards are still to come, and whoever writes the last one completes the set"
            )
            return False
        with locked(lock):
            return self._put_in_place()

    def missing(self) -> list[int]:
        """Numbers of the shards that nobody has written yet."""
        if not self.building.is_dir() or (self.building / INDEX).is_file():
            return []
        written = {file.name for file in self.building.glob("*.done")}
        return [n for n in range(len(self.sizes)) if f"{n:06d}.done" not in written]

    def _write(self, task: Task, devices: list[str]) -> None:
        own = range(task.number, len(self.sizes), task.count)
        left = [n for n in self.missing() if n in own]
        total = sum(self.sizes[n] for n in own)
        done = total - sum(self.sizes[n] for n in left)
        devices = devices[: max(1, len(left))]
        with tqdm(total=total, initial=done, desc=self.title, unit="sample", disable=not left, **_bar()) as bar:
            if len(devices) > 1:
                self._write_in_processes(left, devices, bar)
            elif left:
                samples = self.start(self.building, devices[0])
                for number in left:
                    _stop_if_asked()
                    write_shard(self.building, number, samples)
                    bar.update(self.sizes[number])

    def _write_in_processes(self, numbers: list[int], devices: list[str], bar: tqdm) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads, and CUDA, do not survive a fork
        free = context.SimpleQueue()
        for device in devices:
            free.put(device)
        given = (self.start, self.building, free)
        with ProcessPoolExecutor(len(devices), context, _start_worker, given) as pool:
            futures = {pool.submit(_write_in_worker, number): number for number in numbers}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(self.sizes[futures[future]])
                    _stop_if_asked()
            except BrokenProcessPool:
                raise UserError(
                    f"{self.folder}: a process that wrote shards was killed, perhaps for want of memory; the same "
                    "command continues"
                ) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _put_in_place(self) -> bool:
        if not self.building.is_dir():  # another task was quicker
            return self.folder.is_dir()
        if self.missing():
            return False
        if not (self.building / INDEX).is_file():
            self.finish(self.building, [_record(self.building, n) for n in range(len(self.sizes))])
        kept = {INDEX, *(shard["file"] for shard in json.loads((self.building / INDEX).read_text())["shards"])}
        for file in self.building.iterdir():
            if file.name not in kept:
                file.unlink()
        aside = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(aside)
        self.building.rename(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        for leaving in self.folder.parent.glob(f".{self.folder.name}.*.building"):
            if re.fullmatch(r"[0-9a-f]{12}", leaving.name[len(self.folder.name) + 2 : -len(".building")]):
                shutil.rmtree(leaving)
        return True


def building_folder(folder: Path, key: str) -> Path:
    """Where a set is written before it is whole."""
    return folder.with_name(f".{folder.name}.{key}.building")


def write_shard(building: Path, number: int, samples: Samples) -> None:
    """Write one shard and then its record, unless another process has."""
    with locked(building / f"{number:06d}.lock"):  # a task that was submitted twice
        record = building / f"{number:06d}.done"
        if record.is_file():
            return
        shard = write_tar(building / f"{number:06d}.tar", samples(number))
        partial = record.with_suffix(".record")
        partial.write_text(json.dumps(asdict(shard) | {"file": shard.file.name}))
        partial.rename(record)


def _record(building: Path, number: int) -> Shard:
    record = json.loads((building / f"{number:06d}.done").read_text())
    return Shard(**record | {"file": building / record["file"]})


# -- processes and devices --------------------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use, which on a shared node are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_devices(device: str | None, workers: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The devices of `Job.run`: every GPU that is this process's own, or `workers` times the CPU.

    Args:
        device: "cpu", "cuda" (all), "cuda:1" (one); by default the GPUs if there are any.

    Raises:
        UserError: a GPU is asked for, and there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return ["cpu"] * workers
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU here; use --device cpu")
    if device != "cuda":
        return [device]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    beside = int((re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) or ["1"])[0])
    if 1 < beside <= len(gpus) and "SLURM_GPUS_PER_TASK" not in environment:  # every task of the node sees every GPU
        gpus = gpus[int(environment.get("SLURM_LOCALID", 0)) :: beside]
    return gpus


_work: tuple[Callable[[Path, str], Samples], Path, str] | None = None  # of a worker process
_samples: Samples | None = None


def _start_worker(start: Callable[[Path, str], Samples], building: Path, free: Any) -> None:
    global _work
    _work = start, building, free.get()
    torch.set_num_threads(1)
    interrupts.install()  # a signal to the whole job is the parent's to answer

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed: nobody wants the rest, and a second run may have begun

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_in_worker(number: int) -> None:
    global _samples
    start, building, device = _work
    if _samples is None:  # here and not in `_start_worker`, where an error would only break the pool
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        _samples = start(building, device)
    write_shard(building, number, _samples)


def _stop_if_asked() -> None:
    if interrupts.received is not None:
        raise Paused


# -- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(file: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock against other processes, also of other machines where the file system knows locks.

    The last holder leaves no file behind.
    """
    while True:
        handle = file.open("a+")
        try:
            _wait_for(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError:  # a file system without locks; what is written appears by renames, whole, even so
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                break
        handle.close()  # removed while we waited
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever waits for the removed file notices
            file.unlink()
        handle.close()


def _wait_for(handle: IO[str], kind: int) -> None:
    """Take a lock; a signal ends the waiting, which a blocking call would not let it do."""
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            _stop_if_asked()
            time.sleep(0.2)


def _bar() -> dict[str, Any]:
    # In a log file a line every ten seconds, on a terminal a live bar.
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 10, "ascii": True}
