"""Which sample comes when: a pure function of (seed, epoch), of the sizes of the shards, and of nothing else."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np


@lru_cache(maxsize=4)  # a batch may straddle two epochs, and validation runs in between
def epoch_order(seed: int, epoch: int, sizes: bytes, window: int, shuffle: bool) -> Order:
    """The order of one epoch; `sizes` are the shards' as the bytes of an int64 array."""
    return Order(seed, epoch, np.frombuffer(sizes, np.int64), window, shuffle)


class Order:
    """The samples of one epoch, each once.

    With a window of w > 0 shards, shards come in random order and w of them at a time are mixed, so that a run can
    start when it has w shards; with 0, all samples of the set are mixed.
    """

    def __init__(self, seed: int, epoch: int, sizes: np.ndarray, window: int, shuffle: bool) -> None:
        self._ends = np.cumsum(sizes)
        rng = np.random.default_rng((seed, epoch))
        if not shuffle:
            self.samples = np.arange(self._ends[-1])
        elif not window:
            self.samples = rng.permutation(self._ends[-1])
        else:
            shards = rng.permutation(len(sizes))
            groups = [shards[i : i + window] for i in range(0, len(shards), window)]
            each = [np.arange(end - size, end) for size, end in zip(sizes, self._ends, strict=True)]
            self.samples = np.concatenate([rng.permutation(np.concatenate([each[s] for s in g])) for g in groups])

    @cached_property
    def _first_needed(self) -> tuple[np.ndarray, np.ndarray]:
        shards, first = np.unique(np.searchsorted(self._ends, self.samples, side="right"), return_index=True)
        by_need = np.argsort(first)
        return shards[by_need], first[by_need]

    def shards_after(self, position: int, count: int) -> list[int]:
        """The next `count` shards that are not needed before `position`."""
        shards, first = self._first_needed
        start = int(np.searchsorted(first, position))
        return shards[start : start + count].tolist()
