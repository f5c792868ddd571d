"""Batches for methods that make their own, or have the same one in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Endless:
    """Batch numbers 0, 1, …, or always the same `batch`, `length` of them an epoch; continues where it was left."""

    waited = 0.0  # seconds spent waiting for data: none

    def __init__(self, length: int, batch: Any = None) -> None:
        self.length, self.batch, self.number = length, batch, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.length):
            self.number += 1  # before yielding: a checkpoint written during the step counts its batch
            yield self.number - 1 if self.batch is None else self.batch

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]
