"""Reading that never ends, workers that die, signals, and the time that is spent waiting."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from damage import epoch, make, numbers, one_line

from lit_gen.data import bench
from lit_gen.data.images import ImageSample
from lit_gen.data.mixed import MixedLoader
from lit_gen.errors import ShardError


@pytest.fixture
def pipes(folder):
    """Puts a pipe that nobody writes to in the place of a shard: opening it blocks, like a dead file server."""
    made = []

    def block(name):
        file = folder / name
        file.rename(folder / f"{name}.whole")
        os.mkfifo(file)
        made.append(file)

    yield block
    for file in made:  # let the readers go
        os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_never_returns_ends_in_time_and_names_the_shard(folder, pipes, workers, caplog):
    loader = make(folder, 3, workers=workers, stall_seconds=1)
    shards = loader.shards
    for i in range(22):  # so that the headers are known
        shards.read(i, {"txt"})
    pipes("000002.tar")
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        epoch(loader)
    assert one_line(caught).startswith(f"{folder}: no progress for 1 s while reading {folder}/000002.tar")
    assert 0.9 < time.monotonic() - start < 15
    assert "no progress for" in caplog.text  # said before it is final


class _Stuck(ImageSample):
    """Never done with sample 7."""

    def __call__(self, sample, rng):
        if sample["key"].endswith("000007"):
            threading.Event().wait(30)
        return super().__call__(sample, rng)


def test_a_decoder_that_never_returns_is_a_stall_too(folder):
    with pytest.raises(ShardError, match="no progress for 0.5 s while reading .*000001.tar"):
        epoch(make(folder, transform=_Stuck(), stall_seconds=0.5))


class _Slow(ImageSample):
    """Takes its time over every sample."""

    def __call__(self, sample, rng):
        time.sleep(0.1)
        return super().__call__(sample, rng)


def test_a_slow_batch_is_not_a_stalled_one(folder):
    assert len(epoch(make(folder, 22, transform=_Slow(), stall_seconds=1))) == 22  # 2.2 s in all


class _Deadly(ImageSample):
    """Kills the worker that reads sample 7."""

    def __call__(self, sample, rng):
        if sample["key"].endswith("000007"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(sample, rng)


def test_a_worker_that_dies_is_one_line_with_the_shard(folder):
    loader = make(folder, transform=_Deadly(), workers=2)
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        epoch(loader)
    told = one_line(caught)
    assert "a loader worker was killed by SIGKILL (out of memory?)" in told
    assert f"{folder}/000001.tar" in told
    assert time.monotonic() - start < 30


class _Broken(ImageSample):
    def __call__(self, sample, rng):
        raise KeyError("a slip in a transform")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slip_in_the_code_is_not_taken_for_bad_data(folder, workers):
    with pytest.raises(KeyError, match="a slip in a transform"):
        epoch(make(folder, transform=_Broken(), workers=workers))


def test_workers_outlive_the_signal_that_asks_the_run_to_pause(folder):
    """A scheduler signals every process of a job; the last steps before the checkpoint still need batches."""
    before = set(multiprocessing.active_children())
    loader = make(folder, workers=2)
    batches = iter(loader)
    seen = numbers(next(batches))
    workers = [p for p in multiprocessing.active_children() if p not in before]
    assert len(workers) == 2
    for worker in workers:
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, signum)
    seen += [i for batch in batches for i in numbers(batch)]
    assert sorted(seen) == list(range(22))
    del batches, loader
    limit = time.monotonic() + 8
    while any(worker.is_alive() for worker in workers) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="is for copies to a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_can_be_copied_while_it_works(folder, workers):
    torch.cuda.init()
    batch = next(iter(make(folder, 3, workers=workers)))
    assert batch["image"].is_pinned()


def test_waiting_is_counted(folder):
    loader = make(folder, 11, transform=_Slow())
    assert loader.waited == 0
    start = time.perf_counter()
    for _ in loader:
        time.sleep(0.3)
    assert 2.2 < loader.waited < time.perf_counter() - start - 0.59


def test_a_mixture_has_waited_for_both(folder):
    loaders = make(folder, 11, transform=_Slow()), make(folder, 11, transform=_Slow())
    mixed = MixedLoader(*loaders, probability=0.5)
    next(iter(mixed))
    assert mixed.waited == sum(loader.waited for loader in loaders) > 1


def test_bench_tells_samples_and_megabytes_per_second(folder, capsys):
    assert bench.main(["-c", str(folder), "--workers", "0,2", "--seconds", "0.3", "--warmup", "0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    stored = sum(file.stat().st_size for file in folder.glob("*.tar")) / 22
    assert said[0] == f"{folder}: 22 samples of {stored / 1000:.1f} kB in 4 shards, batches of 16"
    rows = [[float(word) for word in line.split()] for line in said[2:]]
    for workers, row in zip((0, 2), rows, strict=True):
        assert row[0] == workers and row[1] > 10 and row[4] == 0
        assert row[2] == pytest.approx(row[1] / max(workers, 1), rel=0.01)
        assert row[3] == pytest.approx(row[1] * stored / 1e6, abs=0.06)
    assert bench.main(["-c", str(folder / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
