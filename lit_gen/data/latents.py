"""Random numbers in the shape of cached latents and text states: what a diffusion model's speed is measured on."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as L
import torch
from torch import Tensor


class Endless:
    """Batch numbers 0, 1, …, `length` of them an epoch."""

    waited = 0.0  # seconds spent waiting for data: none

    def __init__(self, length: int) -> None:
        self.length, self.number = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length - self.number % self.length):
            self.number += 1  # before yielding: a checkpoint written during the step counts its batch
            yield self.number - 1

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class RandomLatents(L.LightningDataModule):
    """Batches {"latents": B C h w, "text_states": B L D} of random numbers, made once, on the device.

    Args:
        batch_size: samples per step and rank.
        pixels: height and width of the pictures that the latents would be of, eight to a latent.
        channels: of the latents.
        tokens: length of a text.
        text_width: width of a text state.
        batches: different batches, which take turns.
        seed: of the numbers; every rank has others.
    """

    def __init__(
        self,
        batch_size: int = 32,
        pixels: int = 512,
        channels: int = 4,
        tokens: int = 77,
        text_width: int = 768,
        batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shapes = {"latents": (batch_size, channels, pixels // 8, pixels // 8)}
        self.shapes["text_states"] = (batch_size, tokens, text_width)
        self.batches, self.seed = batches, seed
        self.made: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + trainer.global_rank)
        device = trainer.strategy.root_device
        self.made = [
            {name: torch.randn(shape, generator=generator).to(device) for name, shape in self.shapes.items()}
            for _ in range(self.batches)
        ]

    def train_dataloader(self) -> Endless:
        return Endless(1000)

    def transfer_batch_to_device(self, batch: int, device: torch.device, dataloader_idx: int) -> dict[str, Tensor]:
        return dict(self.made[batch % self.batches])
