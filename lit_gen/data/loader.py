"""Streaming that resumes exactly: what is read is a pure function of one integer, the samples seen so far.

Sample number c of the endless training stream is element c % N of the order that belongs to (seed, epoch c // N).
A global batch takes the next `batch_size * world` numbers and rank r the r-th part of them, so every rank has the same
number of batches, each sample comes exactly once in N, and a run may continue on another number of ranks or workers.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lit_gen.data.decode import decode
from lit_gen.data.facts import Facts
from lit_gen.data.order import Order, epoch_order
from lit_gen.data.remote import STALL_SECONDS
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.data.watch import Pulse, Stream, settle
from lit_gen.errors import ShardError, UserError, at_least

logger = logging.getLogger(__name__)

WINDOW = 8  # shards mixed at a time, twice as many fetched ahead, where they come from elsewhere
NAMED = 100  # unreadable samples that are named one by one in the log, later each 100th is

# Turns the decoded members of a sample, e.g. {"png": picture, "txt": str, "json": dict}, into its part of a batch.
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


class Batches(Dataset):
    """Batch number -> batch, whatever process asks; the DataLoader's workers therefore cannot change anything.

    A sample that cannot be read is replaced by the next readable one in the order; the batch says so under "replaced".
    """

    patience = 100  # samples in a row that may be unreadable

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        extensions: set[str],
        batch_size: int,
        seed: int,
        shuffle: bool,
        window: int,
        stall_seconds: float,
    ) -> None:
        self.shards, self.transform, self.extensions = shards, transform, extensions
        self.batch_size, self.seed, self.shuffle, self.window = batch_size, seed, shuffle, window
        self.stall_seconds = stall_seconds
        self.pulse = Pulse(1)
        self._sizes = np.array([shard.samples for shard in shards.shards], np.int64).tobytes()

    def __getitem__(self, start: int) -> dict[str, Any] | UserError:
        """The batch of the samples numbered start … start + batch_size - 1."""
        try:
            if self.shards.remote:
                self._fetch_ahead(*divmod(start, len(self.shards)))
            samples, replaced = [], {}
            for clock in range(start, start + self.batch_size):
                sample, valid = self._read(clock, replaced)
                samples.append(sample if self.shuffle else sample | {"valid": torch.tensor(valid)})
            return collate(samples) | {"replaced": replaced}
        except UserError as error:  # as a value: a DataLoader would wrap its one line in a worker's traceback
            return error
        finally:
            self.pulse.rest()

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        upcoming = self._order(epoch).shards_after(position, 2 * (self.window or WINDOW))
        worker = get_worker_info()
        self.shards.prefetch(upcoming if worker is None else upcoming[worker.id :: worker.num_workers])

    def _order(self, epoch: int) -> Order:
        return epoch_order(self.seed, epoch if self.shuffle else 0, self._sizes, self.window, self.shuffle)

    def _read(self, clock: int, replaced: dict[str, str]) -> tuple[dict[str, Any], bool]:
        total = len(self.shards)
        valid = self.shuffle or clock < total  # an evaluation's last batch is padded by starting again
        # Neighbours are often lost together: an evaluation, which is in order, looks for a stand-in all over the set.
        stride = 1 if self.shuffle else max(1, total // self.patience)
        for number in range(clock, clock + self.patience * stride, stride):
            epoch, position = divmod(number, total)
            index = int(self._order(epoch).samples[position])
            name = f"sample {index}"
            self.pulse.start(self.shards.place(index)[0])
            try:
                name, members = self.shards.read(index, self.extensions, self.pulse.beat, self.stall_seconds)
                decoded = {extension: decode(extension, data) for extension, data in members.items()}
                # Crops and the like depend on the sample and the epoch alone, never on who reads it.
                rng = np.random.default_rng((self.seed, epoch if self.shuffle else 0, index))
                return self.transform(decoded | {"key": name}, rng), valid
            except BadSample as error:
                replaced[name := error.name or name] = str(error)
                valid = valid and self.shuffle  # never score a sample twice
        reason = f"{name}: {replaced[name]}"
        raise ShardError(f"{self.shards.source}: {self.patience} samples in a row cannot be read, the last is {reason}")


class ShardLoader:
    """Batches of a set of shards, endless in training, resumed exactly from `state_dict()`.

    Iterating gives len(loader) batches from where it was left; Lightning, which counts them, takes fewer where it
    continues within an epoch. With `shuffle=False` (evaluation) each iteration gives every sample once, in order,
    identically sized batches on every rank, and a mask `batch["valid"]` (B, bool) that is False for padding and for
    unreadable samples.

    It has no `batch_sampler`, on purpose: strategies take that for a map-style DataLoader's.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        extensions: set[str],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        tolerance: float = 0.01,
        window: int | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Stream `shards`.

        Args:
            transform: what a sample of the batch is made of.
            extensions: members that are read and decoded; others are not touched.
            batch_size: samples per rank.
            seed: of the order and of every per-sample random choice.
            workers: processes that decode; 0 decodes in this one. The batches do not depend on it.
            tolerance: share of unreadable samples above which iterating raises ShardError.
            window: shards whose samples are mixed at a time, 0 for all; by default 8 where shards are fetched from
                elsewhere, so that training starts before all are here, and all where they are on this machine.
            stall_seconds: without any progress in reading, after which iterating raises ShardError.
        """
        at_least(1, batch_size=batch_size)
        at_least(0, workers=workers)
        self.shards, self.shuffle, self.seed = shards, shuffle, seed
        self.rank, self.world, self.workers, self.tolerance = rank, world, workers, tolerance
        self.batch_size = batch_size
        self.global_batch = batch_size * world
        self.clock = 0  # samples seen by all ranks together
        self.bad: dict[str, str] = {}  # name of an unreadable sample -> why
        self.waited = 0.0  # seconds spent waiting for batches
        window = window if window is not None else WINDOW if shards.remote and shuffle else 0
        self._batches = Batches(shards, transform, extensions, batch_size, seed, shuffle, window, stall_seconds)
        self._stream: Stream | None = None

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        if self.shuffle:
            return max(1, len(self.shards) // self.global_batch)
        return -(-len(self.shards) // self.global_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.shuffle:
            stream = self._open(range(0, len(self) * self.global_batch, self.global_batch))
            for _ in range(len(self)):
                yield self._next(stream)
            return
        for _ in range(len(self)):
            if self._stream is None:  # workers stay and read ahead across epochs
                self._stream = self._open(itertools.count(self.clock, self.global_batch))
            try:
                batch = self._next(self._stream)
            except BaseException:
                self._stream = None  # ends the workers
                raise
            self.clock += self.global_batch  # before yielding: a checkpoint written during the step counts its batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The clock, the same on every rank, and what it is the clock of."""
        window = self._batches.window
        return {"samples": self.clock, "seed": self.seed, "set": self.shards.fingerprint, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run's order, also where the set has moved. ShardError when its set or seed was another one."""
        for key, now in (("seed", self.seed), ("set", self.shards.fingerprint)):
            if state[key] != now:
                raise ShardError(
                    f"{self.shards.source}: the checkpoint was written with another {key} ({state[key]!s:.12}, now "
                    f"{now!s:.12}), so its data order cannot be continued; restore it or start over with --fresh"
                )
        self.clock = state["samples"]
        self._batches.window = state.get("window", 0)
        self._stream = None

    def _open(self, starts: Iterable[int]) -> Stream:
        own = self.rank * self.batch_size  # (a sampler that held `self` would keep workers alive in a reference cycle)
        batches = copy.copy(self._batches)
        batches.pulse = Pulse(max(1, self.workers))
        loader = DataLoader(
            batches,
            sampler=(start + own for start in starts),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the default one would disturb the training's random numbers
            worker_init_fn=settle,
        )
        shards = self.shards.shards
        return Stream(loader, batches.pulse, lambda i: str(shards[i]), self.shards.source, batches.stall_seconds)

    def _next(self, stream: Stream) -> dict[str, Any]:
        """The next batch; ShardError when it, or too many samples so far, cannot be read."""
        start = time.perf_counter()
        try:
            batch = next(stream)
        finally:
            self.waited += time.perf_counter() - start
        if isinstance(batch, UserError):
            raise batch
        for name, reason in batch.pop("replaced").items():
            if name in self.bad:
                continue
            self.bad[name] = reason
            if len(self.bad) <= NAMED or len(self.bad) % NAMED == 0:
                logger.warning(
                    "data: %s of %s cannot be read and was replaced (%s); %d of %d samples so far",
                    *(name, self.shards.source, reason, len(self.bad), len(self.shards)),
                )
        if len(self.bad) > self.tolerance * len(self.shards):
            name, reason = next(iter(self.bad.items()))
            raise ShardError(
                f"{self.shards.source}: {len(self.bad)} of {len(self.shards)} samples cannot be read (more than "
                f"{self.tolerance:.1%}), the first is {name}: {reason}"
            )
        return batch


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors along a new first dimension B and list everything else, dicts as Facts.

    Raises ShardError where samples do not have the same contents, shapes or types.
    """
    batch = {}
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise _differing("contents", samples, lambda sample: sorted(sample.keys() - {"valid"}))
    for key, first in samples[0].items():
        column = [sample[key] for sample in samples]
        if isinstance(first, torch.Tensor):
            if len({value.shape for value in column}) > 1:
                todo = "; set `size` (and `frames`)" * (key in ("image", "video", "style"))
                raise _differing(f"the shape of {key}", samples, lambda sample, key=key: tuple(sample[key].shape), todo)
            if len({value.dtype for value in column}) > 1:
                raise _differing(f"the type of {key}", samples, lambda sample, key=key: sample[key].dtype)
            batch[key] = torch.stack(column)
        else:
            batch[key] = Facts(column) if isinstance(first, dict) else column
    return batch


def _differing(what: str, samples: list[dict[str, Any]], told: Callable[[dict], Any], todo: str = "") -> ShardError:
    """Names one sample of each sort."""
    sorts = {str(told(sample)): sample.get("key", "a sample") for sample in samples}
    return ShardError(f"samples differ in {what}: {', '.join(f'{s} ({name})' for s, name in sorts.items())}{todo}")


def _as_it_is(batch: Any) -> Any:
    """Spares the DataLoader its search for arrays to convert."""
    return batch


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch of a loader."""
    while True:
        yield from loader
