"""Random numbers in the shape of real batches: what the speed of training is measured on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from lit_gen.data.endless import Endless
from lit_gen.errors import at_least


class RandomData(L.LightningDataModule):
    """A few batches of random numbers, made once, on the device, which take turns. A subclass says what `batch` is.

    Args:
        batches: how many.
        seed: of the numbers; every rank has others.
    """

    def __init__(self, batches: int, seed: int) -> None:
        super().__init__()
        at_least(1, batches=batches)
        self.batches, self.seed = batches, seed
        self.made: list[dict[str, Any]] = []

    def batch(self, generator: torch.Generator, rank: int) -> dict[str, Any]:
        """One batch, on the generator's device."""
        raise NotImplementedError

    def example(self) -> dict[str, Any]:
        """A batch of the shapes that training has, on the CPU."""
        return self.batch(torch.Generator().manual_seed(self.seed), 0)

    def setup(self, stage: str) -> None:
        rank, device = self.trainer.global_rank, self.trainer.strategy.root_device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + rank)
        self.made = [self.batch(generator, rank) for _ in range(self.batches)]

    def train_dataloader(self) -> Endless:
        return Endless(1000)

    def transfer_batch_to_device(self, batch: int, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        return dict(self.made[batch % self.batches])


class RandomBatches(RandomData):
    """Batches of random numbers, and of the same text for each sample.

    Args:
        shapes: of what a sample has, by name, e.g. {latents: [4, 64, 64], text_states: [77, 768]}; standard normal,
            float32.
        batch_size: samples per step and rank.
        texts: what else it has, by name, e.g. {caption: a red ball}.
        batches: different batches, which take turns.
        seed: of the numbers; every rank has others.
    """

    def __init__(
        self,
        shapes: dict[str, list[int]],
        batch_size: int = 8,
        texts: dict[str, str] | None = None,
        batches: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(batches, seed)
        at_least(1, batch_size=batch_size)
        self.shapes, self.batch_size, self.texts = shapes, batch_size, texts or {}

    def batch(self, generator: torch.Generator, rank: int) -> dict[str, Any]:
        numbers = {
            name: torch.randn((self.batch_size, *shape), generator=generator, device=generator.device)
            for name, shape in self.shapes.items()
        }
        return numbers | {name: [text] * self.batch_size for name, text in self.texts.items()}
