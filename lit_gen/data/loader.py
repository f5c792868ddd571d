"""Streaming that resumes exactly: what is read is a pure function of one integer, the samples seen so far.

Sample number c of the endless training stream is element c % N of the permutation that belongs to (seed, epoch c // N).
A global batch takes the next `batch_size * world` numbers and rank r the r-th part of them, so every rank has the same
number of batches, each sample comes exactly once in N, and a run may continue on another number of ranks or workers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_gen.data.decode import decode
from lit_gen.data.facts import Facts
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.errors import ShardError, UserError

logger = logging.getLogger(__name__)

# Turns the decoded members of a sample, e.g. {"png": picture, "txt": str, "json": dict}, into its part of a batch.
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


@lru_cache(maxsize=4)  # a batch may straddle two epochs, and validation runs in between
def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order in which an epoch visits the samples."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


class Batches(Dataset):
    """Batch number -> batch, whatever process asks; the DataLoader's workers therefore cannot change anything.

    A sample that cannot be read is replaced by the next readable one in the order; the batch says so under "replaced".
    """

    patience = 100  # samples in a row that may be unreadable

    def __init__(self, shards: ShardSet, transform: Transform, extensions: set[str], batch_size: int, seed: int):
        self.shards, self.transform, self.extensions = shards, transform, extensions
        self.batch_size, self.seed = batch_size, seed
        self.shuffle = True

    def __getitem__(self, start: int) -> dict[str, Any] | UserError:
        """The batch of the samples numbered start … start + batch_size - 1."""
        try:
            samples, replaced = [], {}
            for clock in range(start, start + self.batch_size):
                sample, valid = self._read(clock, replaced)
                samples.append(sample if self.shuffle else sample | {"valid": torch.tensor(valid)})
            return collate(samples) | {"replaced": replaced}
        except UserError as error:  # as a value: a DataLoader would wrap its one line in a worker's traceback
            return error

    def _read(self, clock: int, replaced: dict[str, str]) -> tuple[dict[str, Any], bool]:
        total = len(self.shards)
        valid = self.shuffle or clock < total  # an evaluation's last batch is padded by starting again
        for number in range(clock, clock + self.patience):
            epoch, position = divmod(number, total)
            index = int(permutation(self.seed, epoch, total)[position]) if self.shuffle else position
            name = f"sample {index}"
            try:
                name, members = self.shards.read(index, self.extensions)
                decoded = {extension: decode(extension, data) for extension, data in members.items()}
                # Crops and the like depend on the sample and the epoch alone, never on who reads it.
                rng = np.random.default_rng((self.seed, epoch if self.shuffle else 0, index))
                return self.transform(decoded | {"key": name}, rng), valid
            except BadSample as error:
                replaced[name] = str(error)
                valid = valid and self.shuffle  # never score a sample twice
        reason = f"{name}: {replaced[name]}"
        raise ShardError(f"{self.shards.source}: {self.patience} samples in a row cannot be read, the last is {reason}")


class ShardLoader:
    """Batches of a set of shards, endless in training, resumed exactly from `state_dict()`.

    Iterating gives the rest of the current epoch (len(loader) batches in all) and continues where it was left. With
    `shuffle=False` (evaluation) each iteration gives every sample once, in order, identically sized batches on every
    rank, and a mask `batch["valid"]` (B, bool) that is False for padding and for unreadable samples.

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
    ) -> None:
        """Stream `shards`.

        Args:
            transform: what a sample of the batch is made of.
            extensions: members that are read and decoded; others are not touched.
            batch_size: samples per rank.
            seed: of the order and of every per-sample random choice.
            workers: processes that decode; 0 decodes in this one. The batches do not depend on it.
            tolerance: share of unreadable samples above which iterating raises ShardError.
        """
        self.shards, self.shuffle, self.seed = shards, shuffle, seed
        self.rank, self.world, self.workers, self.tolerance = rank, world, workers, tolerance
        self.batch_size = batch_size
        self.global_batch = batch_size * world
        self.clock = 0  # samples seen by all ranks together
        self.bad: dict[str, str] = {}  # name of an unreadable sample -> why
        self._batches = Batches(shards, transform, extensions, batch_size, seed)
        self._batches.shuffle = shuffle
        self._stream: Iterator | None = None

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        if self.shuffle:
            return max(1, len(self.shards) // self.global_batch)
        return -(-len(self.shards) // self.global_batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.shuffle:
            yield from map(self._received, self._read(range(0, len(self) * self.global_batch, self.global_batch)))
            return
        remaining = len(self) - self.clock // self.global_batch % len(self)
        for _ in range(remaining):
            if self._stream is None:  # workers stay and read ahead across epochs
                self._stream = self._read(itertools.count(self.clock, self.global_batch))
            batch = self._received(next(self._stream))
            self.clock += self.global_batch  # before yielding: a checkpoint written during the step counts its batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The clock, the same on every rank, and what it is the clock of."""
        return {"samples": self.clock, "seed": self.seed, "set": self.shards.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run's order. ShardError when its set or seed was another one."""
        for key, now in (("seed", self.seed), ("set", self.shards.fingerprint)):
            if state[key] != now:
                raise ShardError(
                    f"{self.shards.source}: the checkpoint was written with another {key} ({state[key]!s:.12}, now "
                    f"{now!s:.12}), so its data order cannot be continued; restore it or start over with --fresh"
                )
        self.clock = state["samples"]
        self._stream = None

    def _read(self, starts: Iterable[int]) -> Iterator[dict[str, Any] | UserError]:
        own = self.rank * self.batch_size  # (a sampler that held `self` would keep workers alive in a reference cycle)
        loader = DataLoader(
            self._batches,
            sampler=(start + own for start in starts),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the default one would disturb the training's random numbers
        )
        return iter(loader)

    def _received(self, batch: dict[str, Any] | UserError) -> dict[str, Any]:
        if isinstance(batch, UserError):
            self._stream = None  # ends the workers; the traceback would keep them
            raise batch
        for name, reason in batch.pop("replaced").items():
            if name not in self.bad:
                self.bad[name] = reason
                logger.warning(
                    "data: %s of %s cannot be read and was replaced (%s); %d of %d samples so far",
                    *(name, self.shards.source, reason, len(self.bad), len(self.shards)),
                )
        if len(self.bad) > self.tolerance * len(self.shards):
            self._stream = None
            name, reason = next(iter(self.bad.items()))
            raise ShardError(
                f"{self.shards.source}: {len(self.bad)} of {len(self.shards)} samples cannot be read (more than "
                f"{self.tolerance:.1%}), the first is {name}: {reason}"
            )
        return batch


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors along a new first dimension B and list everything else, dicts as Facts."""
    batch = {}
    for key, first in samples[0].items():
        column = [sample[key] for sample in samples]
        if isinstance(first, torch.Tensor):
            shapes = {tuple(value.shape) for value in column}
            if len(shapes) > 1:
                raise ShardError(f"samples differ in the shape of {key}: {sorted(shapes)}; set `size` (and `frames`)")
            batch[key] = torch.stack(column)
        else:
            batch[key] = Facts(column) if isinstance(first, dict) else column
    return batch


def _as_it_is(batch: Any) -> Any:
    """Spares the DataLoader its search for arrays to convert."""
    return batch
