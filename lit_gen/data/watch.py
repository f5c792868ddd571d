"""Waiting for batches without waiting for ever: who reads what, and since when nothing has moved."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from lit_gen import interrupts
from lit_gen.errors import ShardError

logger = logging.getLogger(__name__)

_IDLE = -1.0
_ASIDE = {signal.SIGTERM, signal.SIGINT, *interrupts.PAUSING}  # are for the training process alone


class Pulse:
    """What each reader of a loader is at, in memory that the loader and its worker processes share."""

    def __init__(self, readers: int) -> None:
        self._table = RawArray("d", [0.0, _IDLE] * readers)  # seconds of the last progress, shard being read

    def start(self, shard: int) -> None:
        """This process begins to read a sample of a shard."""
        self._table[2 * _reader() + 1] = shard
        self.beat()

    def beat(self) -> None:
        """There is progress."""
        self._table[2 * _reader()] = time.monotonic()

    def rest(self) -> None:
        """This process reads nothing at the moment."""
        self._table[2 * _reader() + 1] = _IDLE

    def seen(self) -> bytes:
        """Changes with every progress of any reader."""
        return bytes(self._table)

    def oldest(self) -> int | None:
        """The shard at which a reader has been for longest without progress; None when nobody reads."""
        busy = [(self._table[i], int(self._table[i + 1])) for i in range(0, len(self._table), 2)]
        return min((pair for pair in busy if pair[1] != _IDLE), default=(0.0, None))[1]


class Stream:
    """The batches of a DataLoader, in order, from a thread of their own.

    So whoever waits for one can stop waiting, whether it is read in this process or in workers, and a worker that dies
    ends in an error here and not in the middle of a training step.
    """

    def __init__(
        self, loader: DataLoader, pulse: Pulse, name: Callable[[int], str], source: str, stall_seconds: float
    ) -> None:
        """Start reading at the first `next`.

        Args:
            pulse: what the loader's dataset tells its progress.
            name: of a shard, for messages.
            source: of the set, for messages.
            stall_seconds: without any progress, after which ShardError is raised.
        """
        self._pulse, self._name, self._source, self._limit = pulse, name, source, stall_seconds
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._workers: list[BaseProcess] = []
        # of this thread; a new one would have the first GPU, on which every process would then open a context
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        work = (loader, self._asked, self._answers, self._workers, gpu)
        thread = threading.Thread(target=_serve, args=work, daemon=True)
        _serving[thread] = self._asked
        thread.start()
        weakref.finalize(self, self._asked.put, False).atexit = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._asked.put(True)
        answer = self._wait()
        if isinstance(answer, _Raised):
            # A dead worker shows as RuntimeError, or as whatever its half-sent batch makes of itself.
            if self._workers and isinstance(answer.error, (RuntimeError, OSError, EOFError)):
                self._raise_if_dead(0.5)
            raise answer.error
        return answer

    def _wait(self) -> Any:
        pause = min(1.0, self._limit / 10)
        still, seen, told = 0.0, b"", False  # seconds counted by polls: a job that was suspended has not stalled
        while True:
            try:
                return self._answers.get(timeout=pause)
            except queue.Empty:
                now = self._pulse.seen()
                still, seen = (still + pause if now == seen else 0.0), now
            if still >= min(self._limit, 5 * pause):  # died in the middle of a message, for whose rest torch waits
                self._raise_if_dead()
            if still >= self._limit:
                raise ShardError(
                    f"{self._source}: no progress for {self._limit:g} s{self._where()}; is its disk or server alive?"
                )
            if still >= self._limit / 2 and not told:
                told = True
                logger.warning("data: %s: no progress for %.3g s%s", self._source, still, self._where())

    def _raise_if_dead(self, seconds: float = 0.0) -> None:
        """ShardError if a worker is gone, or goes within so many seconds."""
        ended = wait([worker.sentinel for worker in self._workers], seconds)
        for worker in self._workers:
            if worker.sentinel in ended:
                raise ShardError(f"{self._source}: a loader worker {_end_of(worker)}{self._where()}; start again")

    def _where(self) -> str:
        shard = self._pulse.oldest()
        return "" if shard is None else f" while reading {self._name(shard)}"


class _Raised:
    """An exception on its way to the one who waits."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _end_of(worker: BaseProcess) -> str:
    worker.join()  # it has closed its files, but may not be gone yet
    for _ in range(50):
        if (code := worker.exitcode) is not None:  # None while the thread, which also asked, has not been told
            break
        time.sleep(0.01)
    if code is None or code >= 0:
        return f"ended with status {code}"
    return f"was killed by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)


_serving: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # threads of all streams, with their requests
_workers: weakref.WeakSet = weakref.WeakSet()  # processes of all loaders


def _serve(
    loader: DataLoader, asked: queue.SimpleQueue, answers: queue.SimpleQueue, workers: list, gpu: int | None
) -> None:
    """Answer each request with the next batch until there is a request for none."""
    batches = None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASIDE)  # inherited: no worker is without `settle` for a moment
    while asked.get():
        try:
            if batches is None:
                before = set(multiprocessing.active_children())
                batches = iter(loader)
                if loader.num_workers:
                    workers += [p for p in multiprocessing.active_children() if p not in before]
                    _workers.update(workers)
            answer = next(batches)
            if gpu is not None and isinstance(answer, dict):
                # A copy to the GPU from anywhere else waits until the GPU has done all that it was told to do.
                answer = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in answer.items()}
        except BaseException as error:
            answer = _Raised(error)
        answers.put(answer)
        del answer  # or the last batch would be kept until the next is asked for


def settle(_: int) -> None:
    """What a worker process does first: leave signals to the training process, and die with it.

    Schedulers send SIGTERM to every process of a job; the training process then takes its last steps and saves, for
    which it still needs batches.
    """
    for signum in _ASIDE:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASIDE)
    interrupts.die_with_parent()


@atexit.register
def _end() -> None:
    """Nothing that still reads may keep this process from its end, nor run into it.

    Workers ignore SIGTERM and may be stuck in a read; a thread that is caught by the interpreter's end within torch
    aborts the process.
    """
    for process in list(_workers):
        with contextlib.suppress(ValueError, AssertionError):  # closed already, or another process's
            if process.is_alive():
                process.kill()
    threads = dict(_serving)
    for asked in threads.values():
        asked.put(False)
    for thread in threads:
        thread.join(2)  # seconds; one that is stuck in a read is left to the kernel


def _reader() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
