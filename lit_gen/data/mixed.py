"""Two loaders as one: each step takes a batch of the first or of the second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lit_gen.data.loader import ShardLoader


class MixedLoader:
    """Draws from `first` with a fixed probability; the choice is a pure function of (seed, step), so ranks agree."""

    def __init__(self, first: ShardLoader, second: ShardLoader, probability: float, seed: int = 0) -> None:
        self.first, self.second, self.probability, self.seed = first, second, probability, seed
        self.step = 0

    def __len__(self) -> int:
        """Batches in which the second set comes about once."""
        return round(len(self.second) / (1 - self.probability))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self)):
            loader = self.first if self.takes_first(self.step) else self.second
            # One batch of an endless stream: the loader keeps its place (and its workers) between calls.
            batch = next(iter(loader))
            self.step += 1
            yield batch

    @property
    def waited(self) -> float:
        """Seconds spent waiting for batches."""
        return self.first.waited + self.second.waited

    def takes_first(self, step: int) -> bool:
        """Whether this step is a batch of the first set."""
        return bool(np.random.default_rng((self.seed, step)).random() < self.probability)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first": self.first.state_dict(), "second": self.second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.first.load_state_dict(state["first"])
        self.second.load_state_dict(state["second"])
