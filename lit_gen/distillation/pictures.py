"""A method whose trained weights are the pictures themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_gen.callbacks.samples import save
from lit_gen.diffusion.base import PIPELINE_PARTS, load_base
from lit_gen.diffusion.objective import Schedule
from lit_gen.methods.base import Method, Optimizer
from lit_gen.metrics.scores import Scores

_STRIP = 8  # moments kept for the strips over time


class DistilledPictures(Method):
    """Latents of pictures that a frozen base is distilled into, all of them in every step. No data is needed.

    A subclass sets `latents` (a parameter B ...) and `discriminators`, and says what a step, a validation, `name` and
    `preview` are.

    Args:
        base: Hub id, diffusers folder or single-file checkpoint of the teacher.
        discriminator_lr: learning rate of the discriminators; `optimizer.lr` is that of the pictures.
        oracle: folder of the oracle that judges what is of the world; null for none.
        optimizer: settings of the optimizer.
    """

    told_in_progress = ("train/gradient",)
    latents: nn.Parameter

    def __init__(self, base: str, discriminator_lr: float, oracle: str | None, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.base = load_base(base, parts=PIPELINE_PARTS)
        self.schedule = Schedule(self.base.scheduler)
        self.discriminator_lr, self._oracle = discriminator_lr, oracle
        self.discriminators: list[nn.Module] = []
        self.scores = Scores()
        self.strips: list[Tensor] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": [self.latents], "lr": self.optimizer_settings.lr}]
        if self.discriminators:
            trained = [p for phi in self.discriminators for p in phi.trained()]
            groups.append({"params": trained, "lr": self.discriminator_lr, "clip_norm": 1.0})
        return groups

    def train_dataloader(self) -> DataLoader:
        """Every step is of all pictures."""
        return DataLoader([torch.arange(len(self.latents))] * 100, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([torch.arange(len(self.latents))], batch_size=None)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def remember(self, latents: Tensor) -> None:
        """Keep latents of this step for the strips over time, if it is one of the moments shown."""
        if self.global_step % max(1, self.trainer.max_steps // _STRIP) == 0:
            self.strips.append(latents.detach().clone())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["strips"] = self.strips

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.strips = list(checkpoint.get("strips", []))

    @torch.no_grad()
    def pictures(self) -> Tensor:
        """The pictures B 3 H W in [-1, 1]."""
        return torch.cat([self.base.decode(part) for part in self.latents.split(32)])

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)
        self.scores.write(self.run_dir)

    def name(self, index: int) -> str:
        """Of the file of a picture, without its ending."""
        raise NotImplementedError

    def preview(self) -> dict[str, Tensor]:
        """Sheets by name; the first is also what `predict` writes."""
        raise NotImplementedError

    def predict_step(self, batch: Tensor, batch_idx: int) -> Path:
        """Write every picture as a png and all of them as one sheet."""
        folder = self.run_dir / "samples" / "predict"
        for i, picture in enumerate(self.pictures().cpu()):
            save(folder / self.name(i), picture)
        path = save(folder / "contact-sheet", next(iter(self.preview().values())))
        print(f"drawn: {path}")
        return path
