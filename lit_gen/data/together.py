"""Rendered pictures and rendered clips side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_gen.data.loader import endless
from lit_gen.data.world import Draws, RenderedWorld


class Both:
    """Batches {"clips": ..., "pictures": ...}; an epoch is one of the clips."""

    waited = 0.0  # seconds spent waiting for data: none

    def __init__(self, clips: Draws, pictures: Draws) -> None:
        self.parts = {"clips": clips, "pictures": pictures}

    def __len__(self) -> int:
        return len(self.parts["clips"])

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        pictures = endless(self.parts["pictures"])
        for clips in self.parts["clips"]:
            yield {"clips": clips, "pictures": next(pictures)}

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class PicturesAndClips(L.LightningDataModule):
    """Every training batch has clips and pictures; validation is of clips.

    Args:
        clips: the clips.
        pictures: the pictures.
    """

    def __init__(self, clips: RenderedWorld, pictures: RenderedWorld) -> None:
        super().__init__()
        self.clips, self.pictures = clips, pictures

    def setup(self, stage: str) -> None:
        for part in (self.clips, self.pictures):
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> Both:
        return Both(self.clips.train_dataloader(), self.pictures.train_dataloader())

    def val_dataloader(self) -> Draws:
        return self.clips.val_dataloader()

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Turn positions into what stands there."""
        if "clips" not in batch:
            return self.clips.transfer_batch_to_device(batch, device, dataloader_idx)
        parts = {"clips": self.clips, "pictures": self.pictures}
        return {n: part.transfer_batch_to_device(batch[n], device, dataloader_idx) for n, part in parts.items()}
